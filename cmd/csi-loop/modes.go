package main

import (
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/kubelet"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// The modes of serve.
const (
	modeAll        = "all"        // every service on one socket
	modeNode       = "node"       // the kubelet's socket, and a link to the controller
	modeController = "controller" // the sidecars' socket, and the links of the nodes
)

// linkConfig holds the settings of the modes node and controller.
type linkConfig struct {
	// Node.
	RegistrationDir   string   `json:"registrationDir"`
	KubeletEndpoint   string   `json:"kubeletEndpoint"`
	ControllerAddress []string `json:"controllerAddress"`
	ControllerCA      string   `json:"controllerCA"`
	LinkTokenFile     string   `json:"linkTokenFile"`
	// Both.
	ControllerName string `json:"controllerName"`
	TransferRate   scalar `json:"transferRate"`
	// Controller.
	LinkListen         string `json:"linkListen"`
	LinkAdvertise      string `json:"linkAdvertise"`
	Namespace          string `json:"namespace"`
	NodeServiceAccount string `json:"nodeServiceAccount"`
	LinkSecret         string `json:"linkSecret"`
	LinkCAConfigMap    string `json:"linkCAConfigMap"`
	LinkTLSDir         string `json:"linkTLSDir"`
	Kubeconfig         string `json:"kubeconfig"`
	EventInterval      scalar `json:"eventInterval"`
}

// defaultEventInterval is how often the controller looks for problems to tell of.
const defaultEventInterval = "5m"

func defaultLinkConfig() linkConfig {
	return linkConfig{ControllerName: link.DefaultName, LinkListen: ":9808", TransferRate: "0", EventInterval: defaultEventInterval}
}

// setting is a flag of one mode, and what was said with it.
type setting struct {
	flag  string
	value string
	modes []string
}

// settings lists what only some modes use. Values that are the default count as
// not said.
func (c *config) settings() []setting {
	said := func(value, preset string) string {
		if value == preset {
			return ""
		}
		return value
	}
	pools := ""
	if len(c.Pools) > 0 {
		pools = c.Pools[0].Name
	}
	node, controller, both := []string{modeNode}, []string{modeController}, []string{modeNode, modeController}
	machine := []string{modeAll, modeNode}
	return []setting{
		{"pool", pools, machine},
		{"node-id", c.NodeID, machine},
		{"image-dir", strings.Join(c.ImageDirs, ","), machine},
		{"volume-metrics", said(strconv.Itoa(c.VolumeMetrics), strconv.Itoa(defaultVolumeMetrics)), machine},
		{"registration-dir", c.RegistrationDir, node},
		{"kubelet-endpoint", c.KubeletEndpoint, node},
		{"controller-address", strings.Join(c.ControllerAddress, ","), node},
		{"controller-ca", c.ControllerCA, node},
		{"link-token-file", c.LinkTokenFile, node},
		{"controller-name", said(c.ControllerName, link.DefaultName), both},
		{"transfer-rate", said(string(c.TransferRate), "0"), both},
		{"link-listen", said(c.LinkListen, ":9808"), controller},
		{"link-advertise", c.LinkAdvertise, controller},
		{"namespace", c.Namespace, controller},
		{"node-service-account", c.NodeServiceAccount, controller},
		{"link-secret", c.LinkSecret, controller},
		{"link-ca-configmap", c.LinkCAConfigMap, controller},
		{"link-tls-dir", c.LinkTLSDir, controller},
		{"kubeconfig", c.Kubeconfig, controller},
		{"event-interval", said(string(c.EventInterval), defaultEventInterval), controller},
	}
}

// checkMode refuses a setting that the mode has no use for: it was meant for another
// container.
func (c *config) checkMode() error {
	if !slices.Contains([]string{modeAll, modeNode, modeController}, c.Mode) {
		return usagef("--mode %q: is none of all, node and controller", c.Mode)
	}
	for _, s := range c.settings() {
		if s.value != "" && !slices.Contains(s.modes, c.Mode) {
			return usagef("--%s means nothing with --mode=%s; it belongs to --mode=%s", s.flag, c.Mode, strings.Join(s.modes, " and "))
		}
	}
	return address("--http-endpoint", c.HTTPEndpoint, true)
}

// need refuses what is missing.
func need(mode string, settings ...[2]string) error {
	for _, s := range settings {
		if s[1] == "" {
			return usagef("--mode=%s needs --%s", mode, s[0])
		}
	}
	return nil
}

// address checks HOST:PORT.
func address(what, value string, emptyHost bool) error {
	if value == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil || port == "" || host == "" && !emptyHost {
		return usagef("%s %q: is not HOST:PORT", what, value)
	}
	return nil
}

// resolveNode checks the settings of node mode.
func (c *config) resolveNode(p *plan) error {
	if err := need(modeNode,
		[2]string{"controller-address", strings.Join(c.ControllerAddress, ",")},
		[2]string{"controller-ca", c.ControllerCA}, [2]string{"link-token-file", c.LinkTokenFile},
	); err != nil {
		return err
	}
	for _, a := range c.ControllerAddress {
		if err := address("--controller-address", a, false); err != nil {
			return err
		}
	}
	var err error
	if p.transferRate, err = c.resolveTransferRate(); err != nil || c.RegistrationDir == "" {
		return err
	}
	endpoint := c.KubeletEndpoint
	if endpoint == "" {
		endpoint = strings.Replace(strings.TrimPrefix(c.Endpoint, "unix:"), "//", "", 1)
	}
	p.plugin = &kubelet.Plugin{Driver: c.DriverName, Dir: filepath.Clean(c.RegistrationDir), Endpoint: endpoint}
	if err := p.plugin.Check(); err != nil {
		return usagef("%w", err)
	}
	return nil
}

// resolveController checks the settings of controller mode.
func (c *config) resolveController(version string) (plan, error) {
	p := plan{mode: modeController, endpoint: c.Endpoint, link: c.linkConfig, http: c.HTTPEndpoint}
	p.driver = driver.Config{Name: c.DriverName, Version: version, NodeID: "none"}
	if err := p.driver.Validate(); err != nil {
		return p, usagef("%w", err)
	}
	p.driver.NodeID = ""
	if err := need(modeController,
		[2]string{"endpoint", c.Endpoint}, [2]string{"link-listen", c.LinkListen}, [2]string{"link-advertise", c.LinkAdvertise},
		[2]string{"namespace", c.Namespace}, [2]string{"node-service-account", c.NodeServiceAccount}, [2]string{"controller-name", c.ControllerName},
	); err != nil {
		return p, err
	}
	if err := address("--link-listen", c.LinkListen, true); err != nil {
		return p, err
	}
	if err := address("--link-advertise", c.LinkAdvertise, false); err != nil {
		return p, err
	}
	if wrong := validation.IsDNS1123Subdomain(c.ControllerName); len(wrong) > 0 {
		return p, usagef("--controller-name %q: %s", c.ControllerName, wrong[0])
	}
	switch made := c.LinkSecret != "" || c.LinkCAConfigMap != ""; {
	case c.LinkTLSDir != "" && made:
		return p, usagef("--link-tls-dir is a certificate that is given, --link-secret and --link-ca-configmap are one that is made: give one or the other")
	case c.LinkTLSDir == "" && (c.LinkSecret == "" || c.LinkCAConfigMap == ""):
		return p, usagef("no certificate for the links: give --link-secret and --link-ca-configmap, to have it made, or --link-tls-dir with tls.crt and tls.key")
	}
	var err error
	if p.transferRate, err = c.resolveTransferRate(); err != nil {
		return p, err
	}
	if p.eventInterval, err = parseInterval("--event-interval", c.EventInterval); err != nil {
		return p, err
	}
	p.stopTimeout, err = c.stopTime()
	return p, err
}

// leastTransferRate is the slowest that copies between nodes can be made, in bytes a
// second: with less, one among many would look as if it did not move.
const leastTransferRate = 1 << 20

func (c *config) resolveTransferRate() (int64, error) {
	n, err := parseSize("--transfer-rate", string(c.TransferRate))
	if err == nil && n != 0 && n < leastTransferRate {
		err = usagef("--transfer-rate %q: must be 1Mi or more, in bytes a second, or 0 for no bound", c.TransferRate)
	}
	return n, err
}
