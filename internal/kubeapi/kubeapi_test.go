package kubeapi_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	authentication "k8s.io/api/authentication/v1"
	coordination "k8s.io/api/coordination/v1"
	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
)

// server writes down what it is asked, and answers that it is not there.
type server struct {
	mu    sync.Mutex
	asked []string // guarded by mu
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, fmt.Sprintf("%s %s\nAccept: %s\nContent-Type: %s\nAgent: %s\n%q",
		r.Method, r.URL, r.Header.Get("Accept"), r.Header.Get("Content-Type"), r.Header.Get("User-Agent"), body))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusNotFound)
	fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404,"message":"it is not there"}`)
}

// every kind of call, on every kind of object, but for those that are like another.
var calls = map[string]func(ctx context.Context, c kubeapi.Interface) error{
	"get a node": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.Nodes().Get(ctx, "n1", meta.GetOptions{})
		return err
	},
	"list volumes": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.PersistentVolumes().List(ctx, meta.ListOptions{Limit: 500, Continue: "more", LabelSelector: "a=b"})
		return err
	},
	"make a volume": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.PersistentVolumes().Create(ctx, &core.PersistentVolume{ObjectMeta: meta.ObjectMeta{Name: "pv"}}, meta.CreateOptions{})
		return err
	},
	"change a volume": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.PersistentVolumes().Patch(ctx, "pv", types.MergePatchType, []byte(`{"a":1}`), meta.PatchOptions{})
		return err
	},
	"delete a claim": func(ctx context.Context, c kubeapi.Interface) error {
		uid := types.UID("u")
		return c.PersistentVolumeClaims("ns").Delete(ctx, "data", meta.DeleteOptions{Preconditions: &meta.Preconditions{UID: &uid}})
	},
	"list all claims": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.PersistentVolumeClaims(meta.NamespaceAll).List(ctx, meta.ListOptions{})
		return err
	},
	"list pods": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.Pods("ns").List(ctx, meta.ListOptions{})
		return err
	},
	"change a secret": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.Secrets("ns").Update(ctx, &core.Secret{ObjectMeta: meta.ObjectMeta{Name: "s"}, Data: map[string][]byte{"k": {1}}}, meta.UpdateOptions{})
		return err
	},
	"get a config map": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.ConfigMaps("ns").Get(ctx, "c", meta.GetOptions{})
		return err
	},
	"make an event": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.Events("ns").Create(ctx, &core.Event{ObjectMeta: meta.ObjectMeta{Name: "e", Namespace: "ns"}}, meta.CreateOptions{})
		return err
	},
	"watch nodes of drivers": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.CSINodes().Watch(ctx, meta.ListOptions{ResourceVersion: "7", AllowWatchBookmarks: true})
		return err
	},
	"change a lease": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.Leases("ns").Update(ctx, &coordination.Lease{ObjectMeta: meta.ObjectMeta{Name: "l"}}, meta.UpdateOptions{})
		return err
	},
	"review a token": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.TokenReviews().Create(ctx, &authentication.TokenReview{Spec: authentication.TokenReviewSpec{Token: "t"}}, meta.CreateOptions{})
		return err
	},
	"ask a service": func(ctx context.Context, c kubeapi.Interface) error {
		_, err := c.GetFromService(ctx, "ns", "csi-loop", "http", "report")
		return err
	},
}

// They ask an API server for the same, in the same words, as client-go's own set of
// clients, and understand its refusals.
func TestSameAsClientGo(t *testing.T) {
	var s server
	web := httptest.NewServer(&s)
	defer web.Close()
	cfg := &rest.Config{Host: web.URL, QPS: 1000, Burst: 1000}
	ours, err := kubeapi.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	set, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			var asked [2][]string
			for i, c := range []kubeapi.Interface{ours, kubeapitest.Of(set)} {
				s.asked = nil
				if err := call(t.Context(), c); !apierrors.IsNotFound(err) {
					t.Errorf("%v, want NotFound", err)
				}
				asked[i] = s.asked
			}
			if diff := cmp.Diff(asked[1], asked[0]); diff != "" || len(asked[0]) != 1 {
				t.Errorf("%d requests; -client-go +ours\n%s", len(asked[0]), diff)
			}
		})
	}
}

// A limit without a burst would never let anything through.
func TestLimitWithoutBurst(t *testing.T) {
	if _, err := kubeapi.NewForConfig(&rest.Config{Host: "localhost", QPS: 1}); err == nil || !strings.Contains(err.Error(), "burst") {
		t.Errorf("%v does not say that it needs a burst", err)
	}
}
