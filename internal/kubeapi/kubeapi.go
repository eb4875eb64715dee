// Package kubeapi has clients for the few kinds of Kubernetes objects that csi-loop
// reads and writes. client-go's own set of clients knows every kind there is, which
// doubles the program, and what of it is mapped on each node. These are made of the
// same generic client, and ask in the same words.
package kubeapi

import (
	"context"
	"fmt"

	authentication "k8s.io/api/authentication/v1"
	coordination "k8s.io/api/coordination/v1"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/gentype"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/flowcontrol"
)

// Creator makes objects of one kind.
type Creator[T any] interface {
	Create(ctx context.Context, object T, o meta.CreateOptions) (T, error)
}

// Objects reads and writes objects of one kind, and lists of them. Errors are those of
// the API server: see k8s.io/apimachinery/pkg/api/errors.
type Objects[T, L any] interface { //nolint:interfacebloat // the calls that there are
	Creator[T]
	Update(ctx context.Context, object T, o meta.UpdateOptions) (T, error)
	Patch(ctx context.Context, name string, kind types.PatchType, data []byte, o meta.PatchOptions, subresources ...string) (T, error)
	Delete(ctx context.Context, name string, o meta.DeleteOptions) error
	Get(ctx context.Context, name string, o meta.GetOptions) (T, error)
	List(ctx context.Context, o meta.ListOptions) (L, error)
	Watch(ctx context.Context, o meta.ListOptions) (watch.Interface, error)
}

// Interface has a client for each kind. Namespaces may be meta.NamespaceAll where
// objects are listed or watched.
type Interface interface { //nolint:interfacebloat // a line for each kind
	Nodes() Objects[*core.Node, *core.NodeList]
	PersistentVolumes() Objects[*core.PersistentVolume, *core.PersistentVolumeList]
	PersistentVolumeClaims(namespace string) Objects[*core.PersistentVolumeClaim, *core.PersistentVolumeClaimList]
	Pods(namespace string) Objects[*core.Pod, *core.PodList]
	Secrets(namespace string) Objects[*core.Secret, *core.SecretList]
	ConfigMaps(namespace string) Objects[*core.ConfigMap, *core.ConfigMapList]
	Events(namespace string) Objects[*core.Event, *core.EventList]
	CSINodes() Objects[*storage.CSINode, *storage.CSINodeList]
	Leases(namespace string) Objects[*coordination.Lease, *coordination.LeaseList]
	TokenReviews() Creator[*authentication.TokenReview]
	// GetFromService asks a Service by HTTP, through the API server's proxy.
	GetFromService(ctx context.Context, namespace, name, port, path string) ([]byte, error)
}

var (
	// Scheme knows the kinds of the groups that are used.
	Scheme = runtime.NewScheme()
	codecs = serializer.NewCodecFactory(Scheme)
	// parameters writes options into an address.
	parameters = runtime.NewParameterCodec(Scheme)
)

func init() { //nolint:gochecknoinits // as the scheme of client-go is made
	meta.AddToGroupVersion(Scheme, schema.GroupVersion{Version: "v1"})
	for _, add := range []func(*runtime.Scheme) error{core.AddToScheme, storage.AddToScheme, coordination.AddToScheme, authentication.AddToScheme} {
		utilruntime.Must(add(Scheme))
	}
}

// clients is an Interface that asks an API server.
type clients struct {
	core, storage, coordination, authentication rest.Interface
}

// NewForConfig makes the clients. They have one limit of QPS and one pool of
// connections together.
func NewForConfig(cfg *rest.Config) (Interface, error) {
	cfg = rest.CopyConfig(cfg)
	if cfg.UserAgent == "" {
		cfg.UserAgent = rest.DefaultKubernetesUserAgent()
	}
	if cfg.RateLimiter == nil && cfg.QPS > 0 {
		if cfg.Burst <= 0 {
			return nil, fmt.Errorf("a limit of %g requests a second needs a burst", cfg.QPS)
		}
		cfg.RateLimiter = flowcontrol.NewTokenBucketRateLimiter(cfg.QPS, cfg.Burst)
	}
	transport, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, err
	}
	c := &clients{}
	for _, g := range []struct {
		version schema.GroupVersion
		client  *rest.Interface
	}{
		{core.SchemeGroupVersion, &c.core},
		{storage.SchemeGroupVersion, &c.storage},
		{coordination.SchemeGroupVersion, &c.coordination},
		{authentication.SchemeGroupVersion, &c.authentication},
	} {
		cfg := rest.CopyConfig(cfg)
		cfg.GroupVersion, cfg.APIPath = &g.version, "/apis"
		if g.version.Group == "" {
			cfg.APIPath = "/api"
		}
		cfg.NegotiatedSerializer = rest.CodecFactoryForGeneratedClient(Scheme, codecs).WithoutConversion()
		if *g.client, err = rest.RESTClientForConfigAndClient(cfg, transport); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// of makes the client of a kind, whose pointers are the objects. It holds nothing, and
// is made for each use, as client-go's own are.
func of[T, L any, PT interface {
	*T
	runtime.Object
	meta.Object
}, PL interface {
	*L
	runtime.Object
}](group rest.Interface, resource, namespace string) Objects[PT, PL] {
	return gentype.NewClientWithList(resource, group, parameters, namespace,
		func() PT { return new(T) }, func() PL { return new(L) }, gentype.PrefersProtobuf[PT]())
}

func (c *clients) Nodes() Objects[*core.Node, *core.NodeList] {
	return of[core.Node, core.NodeList](c.core, "nodes", "")
}

func (c *clients) PersistentVolumes() Objects[*core.PersistentVolume, *core.PersistentVolumeList] {
	return of[core.PersistentVolume, core.PersistentVolumeList](c.core, "persistentvolumes", "")
}

func (c *clients) PersistentVolumeClaims(namespace string) Objects[*core.PersistentVolumeClaim, *core.PersistentVolumeClaimList] {
	return of[core.PersistentVolumeClaim, core.PersistentVolumeClaimList](c.core, "persistentvolumeclaims", namespace)
}

func (c *clients) Pods(namespace string) Objects[*core.Pod, *core.PodList] {
	return of[core.Pod, core.PodList](c.core, "pods", namespace)
}

func (c *clients) Secrets(namespace string) Objects[*core.Secret, *core.SecretList] {
	return of[core.Secret, core.SecretList](c.core, "secrets", namespace)
}

func (c *clients) ConfigMaps(namespace string) Objects[*core.ConfigMap, *core.ConfigMapList] {
	return of[core.ConfigMap, core.ConfigMapList](c.core, "configmaps", namespace)
}

func (c *clients) Events(namespace string) Objects[*core.Event, *core.EventList] {
	return of[core.Event, core.EventList](c.core, "events", namespace)
}

func (c *clients) CSINodes() Objects[*storage.CSINode, *storage.CSINodeList] {
	return of[storage.CSINode, storage.CSINodeList](c.storage, "csinodes", "")
}

func (c *clients) Leases(namespace string) Objects[*coordination.Lease, *coordination.LeaseList] {
	return of[coordination.Lease, coordination.LeaseList](c.coordination, "leases", namespace)
}

func (c *clients) TokenReviews() Creator[*authentication.TokenReview] {
	return gentype.NewClient("tokenreviews", c.authentication, parameters, "",
		func() *authentication.TokenReview { return new(authentication.TokenReview) }, gentype.PrefersProtobuf[*authentication.TokenReview]())
}

func (c *clients) GetFromService(ctx context.Context, namespace, name, port, path string) ([]byte, error) {
	return c.core.Get().Namespace(namespace).Resource("services").SubResource("proxy").
		Name(utilnet.JoinSchemeNamePort("http", name, port)).Suffix(path).Do(ctx).Raw()
}
