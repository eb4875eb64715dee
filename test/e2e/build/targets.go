package main

import (
	"path"
	"strings"
)

// kubernetes is what the components report; keep it with k8s.io/kubernetes in
// go.mod.
const kubernetes = "v1.37.2"

// target is one call of the compiler.
type target struct {
	group    string // what a command line may ask for
	module   string // directory of the module, below the root
	packages []string
	test     string // the name of a test binary, if it is one
	tags     string
	ldflags  string
	cgo      bool
}

func (t target) outputs() []string {
	if t.test != "" {
		return []string{t.test}
	}
	var names []string
	for _, p := range t.packages {
		names = append(names, path.Base(p))
	}
	return names
}

// targets are in the order of use: a cluster comes up without the rest.
func targets() []target {
	const (
		containerd  = "github.com/containerd/containerd/v2/cmd/"
		cni         = "github.com/containernetworking/plugins/plugins/"
		snapshotter = "github.com/kubernetes-csi/external-snapshotter/v8/cmd/"
	)
	var stamps []string
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		// Not the commit's: without these every component calls itself v0.0.0-master,
		// and the suite compares versions.
		for _, v := range []string{
			"gitVersion=" + kubernetes, "gitMajor=1", "gitMinor=37", "gitTreeState=clean",
			"gitCommit=module", "buildDate=1970-01-01T00:00:00Z",
		} {
			stamps = append(stamps, "-X "+p+"."+v)
		}
	}
	version := strings.Join(stamps, " ")
	return []target{
		{group: "cluster", packages: []string{"./hyperkube"}, ldflags: version},
		{group: "cluster", packages: []string{
			containerd + "containerd", containerd + "containerd-shim-runc-v2", containerd + "ctr",
		}},
		// Without seccomp it refuses every pod that has a profile, which is all of them.
		// The other tags keep the C library's look-ups out of a static program.
		{
			group: "cluster", packages: []string{"github.com/opencontainers/runc"},
			cgo: true, tags: "seccomp,osusergo,netgo", ldflags: "-extldflags -static",
		},
		{group: "cluster", packages: []string{
			cni + "ipam/host-local", cni + "main/loopback", cni + "main/ptp", cni + "meta/portmap",
		}},
		{group: "cluster", packages: []string{"./coredns", "./pause"}},
		{group: "cluster", packages: []string{"k8s.io/kubernetes/test/images/agnhost"}},
		{group: "helm", packages: []string{"helm.sh/helm/v4/cmd/helm"}},
		{
			group: "sidecars", packages: []string{"github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer"},
			ldflags: "-X main.version=v2.3.0",
		},
		{
			group: "sidecars", packages: []string{snapshotter + "csi-snapshotter", snapshotter + "snapshot-controller"},
			ldflags: "-X main.version=v8.7.0",
		},
		{
			group: "sidecars", module: "provisioner",
			packages: []string{"github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"},
			ldflags:  "-X main.version=v6.3.0",
		},
		{group: "suite", packages: []string{"./suite"}, test: "storage-e2e.test", ldflags: version},
		{group: "suite", packages: []string{"github.com/onsi/ginkgo/v2/ginkgo"}},
	}
}
