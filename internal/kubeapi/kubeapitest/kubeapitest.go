// Package kubeapitest makes client-go's fake set of clients one of package kubeapi, for
// tests.
package kubeapitest

import (
	"context"

	authentication "k8s.io/api/authentication/v1"
	coordination "k8s.io/api/coordination/v1"
	core "k8s.io/api/core/v1"
	storage "k8s.io/api/storage/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
)

// Of asks another set of clients, usually k8s.io/client-go/kubernetes/fake.
func Of(set kubernetes.Interface) kubeapi.Interface { return &clients{set} }

type clients struct{ set kubernetes.Interface }

// IsWatchListSemanticsUnSupported tells informers not to ask the fake for what it
// cannot: a list by way of a watch.
func (c *clients) IsWatchListSemanticsUnSupported() bool { return true }

func (c *clients) Nodes() kubeapi.Objects[*core.Node, *core.NodeList] { return c.set.CoreV1().Nodes() }

func (c *clients) PersistentVolumes() kubeapi.Objects[*core.PersistentVolume, *core.PersistentVolumeList] {
	return c.set.CoreV1().PersistentVolumes()
}

func (c *clients) PersistentVolumeClaims(namespace string) kubeapi.Objects[*core.PersistentVolumeClaim, *core.PersistentVolumeClaimList] {
	return c.set.CoreV1().PersistentVolumeClaims(namespace)
}

func (c *clients) Pods(namespace string) kubeapi.Objects[*core.Pod, *core.PodList] {
	return c.set.CoreV1().Pods(namespace)
}

func (c *clients) Secrets(namespace string) kubeapi.Objects[*core.Secret, *core.SecretList] {
	return c.set.CoreV1().Secrets(namespace)
}

func (c *clients) ConfigMaps(namespace string) kubeapi.Objects[*core.ConfigMap, *core.ConfigMapList] {
	return c.set.CoreV1().ConfigMaps(namespace)
}

func (c *clients) Events(namespace string) kubeapi.Objects[*core.Event, *core.EventList] {
	return c.set.CoreV1().Events(namespace)
}

func (c *clients) CSINodes() kubeapi.Objects[*storage.CSINode, *storage.CSINodeList] {
	return c.set.StorageV1().CSINodes()
}

func (c *clients) Leases(namespace string) kubeapi.Objects[*coordination.Lease, *coordination.LeaseList] {
	return c.set.CoordinationV1().Leases(namespace)
}

func (c *clients) TokenReviews() kubeapi.Creator[*authentication.TokenReview] {
	return c.set.AuthenticationV1().TokenReviews()
}

func (c *clients) GetFromService(ctx context.Context, namespace, name, port, path string) ([]byte, error) {
	return c.set.CoreV1().Services(namespace).ProxyGet("http", name, port, path, nil).DoRaw(ctx)
}
