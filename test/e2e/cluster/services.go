package main

import "strconv"

// service is a program that a node runs for as long as it is up.
type service struct {
	name string
	argv []string
	api  bool // start it when the API answers: earlier it would exit or back off
}

// services of node n, in the order of their start.
func (c *cluster) services(n int) []service {
	hyperkube := c.binary("hyperkube")
	all := []service{{name: "containerd", argv: []string{
		c.binary("containerd"), "-c", c.dir(n, "conf/containerd.toml"),
	}}}
	if n == 1 {
		all = append(all, c.controlPlane(hyperkube)...)
	}
	all = append(all, service{name: "sshd", argv: []string{"/proc/1/exe", "-state=" + c.state, "-bin=" + c.bin, "sshd", strconv.Itoa(n)}})
	kubeconfig := "--kubeconfig=" + c.pki(nodeName(n)+".kubeconfig")
	return append(all,
		service{name: "coredns", api: true, argv: []string{c.binary("coredns"), "-conf", c.dir(n, "conf/Corefile")}},
		service{name: "kube-proxy", api: true, argv: []string{
			hyperkube, "kube-proxy", "--kubeconfig=" + c.pki("proxy.kubeconfig"), "--hostname-override=" + nodeName(n),
			"--proxy-mode=" + c.proxy, "--cluster-cidr=" + podNetworks,
			// The machine's connection tracking table is not ours to size.
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
		}},
		service{name: "kubelet", api: true, argv: []string{
			hyperkube, "kubelet", kubeconfig, "--config=" + c.dir(n, "conf/kubelet.yaml"),
			"--hostname-override=" + nodeName(n), "--node-ip=" + nodeAddress(n), "--v=" + strconv.Itoa(2),
		}},
	)
}

func (c *cluster) controlPlane(hyperkube string) []service {
	const etcd, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	kubeconfigs := func(name string) []string {
		file := c.pki(name + ".kubeconfig")
		return []string{
			"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file,
			"--leader-elect=false", "--profiling=false",
		}
	}
	return []service{
		{name: "etcd", argv: []string{
			hyperkube, "etcd", "--name=node1", "--data-dir=/var/lib/etcd", "--log-level=warn",
			"--unsafe-no-fsync", // it dies with its data, or the machine does
			"--listen-client-urls=" + etcd, "--advertise-client-urls=" + etcd, "--listen-peer-urls=" + peer,
			"--initial-advertise-peer-urls=" + peer, "--initial-cluster=node1=" + peer,
		}},
		{name: "kube-apiserver", argv: []string{
			hyperkube, "kube-apiserver", "--etcd-servers=" + etcd,
			"--bind-address=0.0.0.0", "--advertise-address=" + nodeAddress(1), "--service-cluster-ip-range=" + services,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--client-ca-file=" + c.pki("ca.crt"),
			"--tls-cert-file=" + c.pki("apiserver.crt"), "--tls-private-key-file=" + c.pki("apiserver.key"),
			"--kubelet-certificate-authority=", "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-client-certificate=" + c.pki("kubelet-client.crt"), "--kubelet-client-key=" + c.pki("kubelet-client.key"),
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + c.pki("service-account.pub"),
			"--service-account-signing-key-file=" + c.pki("service-account.key"),
			"--requestheader-client-ca-file=" + c.pki("ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + c.pki("front-proxy.crt"), "--proxy-client-key-file=" + c.pki("front-proxy.key"),
			"--enable-aggregator-routing=true", "--profiling=false",
			"--audit-policy-file=" + c.dir(1, "conf/audit.yaml"), "--audit-log-path=" + auditLog,
		}},
		{name: "kube-controller-manager", api: true, argv: append([]string{
			hyperkube, "kube-controller-manager",
			"--service-account-private-key-file=" + c.pki("service-account.key"), "--root-ca-file=" + c.pki("ca.crt"),
			"--cluster-signing-cert-file=" + c.pki("ca.crt"), "--cluster-signing-key-file=" + c.pki("ca.key"),
			"--use-service-account-credentials=true",
			// Shared by all controllers, and 20 is too few for a suite in parallel: default
			// ServiceAccounts come late, and pods are refused.
			"--kube-api-qps=300", "--kube-api-burst=600",
		}, kubeconfigs("controller-manager")...)},
		{name: "kube-scheduler", api: true, argv: append([]string{
			hyperkube, "kube-scheduler",
		}, kubeconfigs("scheduler")...)},
	}
}
