package kube

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	authentication "k8s.io/api/authentication/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// Reviewer asks the API server whose a token is.
type Reviewer struct {
	Client kubeapi.Interface
	// Namespace and ServiceAccount are those of the nodes' pods.
	Namespace, ServiceAccount string
}

// The keys of what Kubernetes knows about the token of a pod.
const (
	extraPrefix = "authentication.kubernetes.io/"
	extraPod    = extraPrefix + "pod-name"
	extraPodUID = extraPrefix + "pod-uid"
	extraNode   = extraPrefix + "node-name"
	extraUID    = extraPrefix + "node-uid"
)

// Authenticate is router.Authenticator. Whoever may create tokens can make one with
// a node's name and no pod, so all four of pod, node and their UIDs must be there.
func (r *Reviewer) Authenticate(ctx context.Context, token string) (router.Identity, error) {
	review, err := r.Client.TokenReviews().Create(ctx, &authentication.TokenReview{
		Spec: authentication.TokenReviewSpec{Token: token, Audiences: []string{link.Audience}},
	}, meta.CreateOptions{})
	if err != nil {
		return router.Identity{}, err
	}
	s := review.Status
	want := "system:serviceaccount:" + r.Namespace + ":" + r.ServiceAccount
	switch {
	case !s.Authenticated:
		return router.Identity{}, fmt.Errorf("%w: %s", router.ErrToken, or(s.Error, "not authenticated"))
	case len(s.Audiences) != 1 || s.Audiences[0] != link.Audience:
		return router.Identity{}, fmt.Errorf("%w: it is for %q, not for %s", router.ErrToken, s.Audiences, link.Audience)
	case s.User.Username != want:
		return router.Identity{}, fmt.Errorf("%w: it belongs to %q, not to %q", router.ErrToken, s.User.Username, want)
	}
	id := router.Identity{}
	for key, value := range map[string]*string{extraPod: &id.Pod, extraPodUID: &id.PodUID, extraNode: &id.Node, extraUID: &id.NodeUID} {
		if values := s.User.Extra[key]; len(values) == 1 {
			*value = values[0]
		}
		if *value == "" {
			return router.Identity{}, fmt.Errorf("%w: it lacks %s: it is not that of a running pod", router.ErrToken, key)
		}
	}
	if id.Expires, err = expiry(token); err != nil {
		return router.Identity{}, fmt.Errorf("%w: %w", router.ErrToken, err)
	}
	return id, nil
}

// expiry reads when a token expires. Its signature is the API server's affair.
func expiry(token string) (time.Time, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}, fmt.Errorf("it has %d parts instead of 3", len(parts))
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}, fmt.Errorf("its claims: %w", err)
	}
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err := json.Unmarshal(body, &claims); err != nil {
		return time.Time{}, fmt.Errorf("its claims: %w", err)
	}
	if claims.Exp <= 0 {
		return time.Time{}, errors.New("it does not expire")
	}
	return time.Unix(claims.Exp, 0), nil
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}
