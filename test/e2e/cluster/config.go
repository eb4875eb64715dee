package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// writeConfig writes what the services of node n read.
func (c *cluster) writeConfig(n int) error {
	for _, d := range []string{"conf/cni", "conf/bin", "log", "root", "var"} {
		if err := os.MkdirAll(c.dir(n, d), 0o755); err != nil {
			return err
		}
	}
	return errors.Join(
		c.writeFile(n, "containerd.toml", c.containerdConfig(n)),
		c.writeFile(n, "cni/10-ptp.conflist", cniConfig(n)),
		c.writeFile(n, "kubelet.yaml", c.kubeletConfig()),
		c.writeFile(n, "Corefile", c.corefile()),
		c.writeFile(n, "audit.yaml", auditPolicy),
		os.WriteFile(c.dir(n, "conf/bin/systemctl"), fmt.Appendf(nil, systemctl, c.dir(n, "conf")), 0o755),
		os.WriteFile(c.dir(n, "conf/bin/sudo"), []byte(sudo), 0o755),
	)
}

func (c *cluster) writeFile(n int, name, text string) error {
	return os.WriteFile(filepath.Join(c.dir(n, "conf"), name), []byte(text), 0o600)
}

// containerdConfig differs from the defaults in three ways. oom_score_adj is
// only ever raised, since lowering it needs CAP_SYS_RESOURCE, and every sandbox
// would die in runc without. Snapshotters and services that nobody uses stay
// off. The paths are ours.
func (c *cluster) containerdConfig(n int) string {
	return fmt.Sprintf(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.snapshotter.v1.native", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  enable_selinux = false
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = %q
        SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%q]
    conf_dir = %q
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %q
`, c.binary("runc"), c.bin, c.dir(n, "conf/cni"), pauseImage)
}

// cniConfig routes each pod by itself; the nodes have routes to each other's pods.
func cniConfig(n int) string {
	return fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "csi-loop-e2e", "plugins": [
  {"type": "ptp", "mtu": %s, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam",
    "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": false}
]}
`, mtu, podNetwork(n))
}

// kubeletConfig: what is not about addresses has its reason beside it.
func (c *cluster) kubeletConfig() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDomain: cluster.local
clusterDNS: [%s]
resolvConf: /etc/resolv.conf
cgroupDriver: cgroupfs            # there is no systemd in a node
failCgroupV1: false               # serve machines that still have it
failSwapOn: false                 # nor care for the machine's swap
enforceNodeAllocatable: []        # the nodes share one machine: limits would not add up
oomScoreAdj: 0                    # the default needs CAP_SYS_RESOURCE
maxOpenFiles: 20000               # so does raising it
makeIPTablesUtilChains: false
volumePluginDir: /var/lib/kubelet/volumeplugins
serializeImagePulls: false
imagePullCredentialsVerificationPolicy: NeverVerify # or an image imported after a failed pull is pulled again
imageGCHighThresholdPercent: 100  # nothing can be pulled again: never collect
imageGCLowThresholdPercent: 99
evictionHard: {memory.available: 50Mi, nodefs.available: 1%%, imagefs.available: 1%%, nodefs.inodesFree: 1%%}
syncFrequency: 2s                 # growing a mounted volume waits for it (default 60s)
volumeStatsAggPeriod: 10s
shutdownGracePeriod: 0s
`, c.pki("ca.crt"), dnsAddress)
}

// corefile answers for the cluster and refuses all other names at once: a pull
// or a lookup that waits for the outside would hide a mistake for minutes.
func (c *cluster) corefile() string {
	return fmt.Sprintf(`cluster.local:53 in-addr.arpa:53 ip6.arpa:53 {
  bind %s
  errors
  cache 5 {
    disable denial
  }
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    kubeconfig %s
    ttl 5
  }
}
.:53 {
  bind %s
  template IN ANY {
    rcode NXDOMAIN
  }
}
`, dnsAddress, c.pki("dns.kubeconfig"), dnsAddress)
}

// auditPolicy records what csi-loop's service accounts ask for: the tests compare
// it with what they are granted.
const auditPolicy = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  userGroups: ["system:serviceaccounts:csi-loop"]
- level: None
`

// dnsRules lets CoreDNS read what it answers from.
const dnsRules = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: system:coredns}
rules:
- {apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}
- {apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: system:coredns}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: system:coredns}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: system:coredns}]
`
