package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// The addresses. The machine's own are not touched, but these two networks must
// not be in use on it.
const (
	network     = "10.231.0."     // the machine is .1, node N is .(10+N)
	podNetworks = "10.244.0.0/16" // node N has 10.244.N.0/24
	services    = "10.96.0.0/16"  // ClusterIPs
	apiService  = "10.96.0.1"     // the first of them is the API's
	dnsAddress  = "169.254.20.10" // on each node: its own CoreDNS
	hostLink    = "csi-loop-e2e"  // the machine's end of the only visible veth
	bridge      = "br0"           // in node 1, where all nodes meet
	mtu         = "1400"          // below that of every cloud's network
	maxNodes    = 9               // of the addresses and interface names here
	poolMount   = "/var/lib/csi-loop"
	imageMount  = "/var/lib/csi-loop-images" // for mapped volumes
	auditLog    = "/var/log/kubernetes/audit.log"
	pauseImage  = "registry.k8s.io/pause:3.10.2"
	cgroupOf    = "csi-loop-e2e-" // and the node's name
)

type cluster struct {
	state  string // all that the nodes keep, removed by down
	bin    string // the binaries
	images string // archives to import
	size   int    // nodes
	pool   string // filesystem of poolMount; empty: a directory
	proxy  string // mode of kube-proxy
}

// stateDir is on a disk by the rules for /var/tmp: containerd's overlays do not
// work on every tmpfs, and images would fill the memory.
func stateDir() string {
	if dir := os.Getenv("CSI_LOOP_E2E_STATE"); dir != "" {
		return dir
	}
	return "/var/tmp/csi-loop-e2e"
}

// recall sets the flags that are not on the command line to what up had: a node
// must come back as it was.
func (c *cluster) recall() error {
	content, err := os.ReadFile(filepath.Join(c.state, flagFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var saved map[string]string
	if err := json.Unmarshal(content, &saved); err != nil {
		return err
	}
	flag.Visit(func(f *flag.Flag) { delete(saved, f.Name) })
	for name, value := range saved {
		if err := flag.Set(name, value); err != nil {
			return err
		}
	}
	return nil
}

const flagFile = "flags.json"

// remember saves the flags for recall.
func (c *cluster) remember() error {
	content, err := json.Marshal(map[string]string{
		"bin": c.bin, "images": c.images, "nodes": strconv.Itoa(c.size), "pool": c.pool, "proxy-mode": c.proxy,
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.state, flagFile), content, 0o600)
}

func (c *cluster) resolve() error {
	if c.size < 1 || c.size > maxNodes {
		return fmt.Errorf("%d nodes: 1 to %d", c.size, maxNodes)
	}
	if c.images == "" && c.bin != "" {
		c.images = filepath.Join(c.bin, "images")
	}
	for _, p := range []*string{&c.state, &c.bin, &c.images} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return err
		}
		*p = abs
	}
	return nil
}

func nodeName(n int) string    { return "node" + strconv.Itoa(n) }
func nodeAddress(n int) string { return network + strconv.Itoa(10+n) }
func podNetwork(n int) string  { return "10.244." + strconv.Itoa(n) + ".0/24" }
func apiServer() string        { return "https://" + nodeAddress(1) + ":6443" }

func (c *cluster) pki(name string) string { return filepath.Join(c.state, "pki", name) }

// Kubeconfig is the administrator's.
func (c *cluster) kubeconfig() string { return c.pki("admin.kubeconfig") }

// dir is a file or directory of node n: root is where its root directory is put
// together, var is its disk, conf and log are what their names say.
func (c *cluster) dir(n int, elem ...string) string {
	return filepath.Join(append([]string{c.state, nodeName(n)}, elem...)...)
}

func (c *cluster) binary(name string) string { return filepath.Join(c.bin, name) }
