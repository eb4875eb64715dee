package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	logsapi "k8s.io/component-base/logs/api/v1"
	_ "k8s.io/component-base/logs/json/register" // --logging-format=json
)

// envPrefix begins the environment equivalent of a flag. CSI_ is reserved by the
// CSI specification, of which only CSI_ENDPOINT is used.
const envPrefix = "CSILOOP_"

const serveHelp = `Run the CSI driver: all CSI services on one UNIX socket, over pools of image
files on this machine. It needs root.

  csi-loop serve --endpoint=unix:///run/csi/csi-loop.sock --node-id=NAME --pool=default=/some/dir

In Kubernetes it runs in two halves. --mode=node, in a pod on each node, answers
the kubelet and keeps a link to the controller, which it dials. --mode=controller,
in a Deployment beside Kubernetes' sidecars, needs no root: it answers them by
sending each call down the link of the node that has the volume. Flags that belong
to one of them say so, and are refused elsewhere.

Every flag has an environment equivalent: CSILOOP_ and the flag's name in upper
case with "_" for "-", as in CSILOOP_NODE_ID. The endpoint's is CSI_ENDPOINT.
What can be repeated is separated by commas there. A variable that is empty
counts as not set. The file given by --config has the same settings, and more for
each pool. A flag wins over the environment, that over the file, and the file
over the default. A pool is the exception: --pool adds to those of the file, or
changes the path of the one with that name.

SIGTERM or SIGINT lets running calls finish for --stop-timeout, then cancels
them; a second one ends the process at once. Volumes stay attached and mounted
over a stop, and the next start goes on with them. The exit status is 2 when the
flags, the environment or the file are wrong, and 1 for any other failure.`

// serveFlags are serve's flags as given.
type serveFlags struct {
	config  // for those that are there
	file    string
	pools   []string
	example bool
	check   bool
	logging *logsapi.LoggingConfiguration
}

// newServeFlags registers the flags. Their defaults are those of defaultConfig.
func newServeFlags(fs *pflag.FlagSet) *serveFlags {
	f := &serveFlags{config: defaultConfig(), logging: logsapi.NewLoggingConfiguration()}
	fs.SortFlags = false
	fs.StringVar(&f.Mode, "mode", f.Mode, "all: every service on one socket; node or controller: the halves of a Kubernetes cluster")
	fs.StringVar(&f.Endpoint, "endpoint", "", "UNIX socket for CSI calls, unix:///DIR/NAME.sock (environment: CSI_ENDPOINT); required")
	fs.StringVar(&f.NodeID, "node-id", "", "name of this node and value of its topology segment: in Kubernetes the node's name, else for example the host name; required")
	fs.StringArrayVar(&f.pools, "pool", nil, "directory for image files, NAME=PATH; can be repeated; required here or in the file")
	fs.StringVar(&f.DefaultPool, "default-pool", "", `pool of requests that name none (default: the only pool, or the one called "default")`)
	fs.StringArrayVar(&f.ImageDirs, "image-dir", nil, "directory whose images mapped volumes may show; can be repeated (default none)")
	fs.StringVar(&f.StateDir, "state-dir", f.StateDir, "where the node keeps what it knows of staged volumes; best on a tmpfs")
	fs.StringVar(&f.CgroupRoot, "cgroup-root", f.CgroupRoot, "where the node's cgroups (version 2) are seen, for limits of pods' I/O")
	fs.IntVar(&f.LoopDevicesWarm, "loop-devices-warm", f.LoopDevicesWarm, "loop devices to register ahead of time")
	fs.IntVar(&f.LoopDevicesMax, "loop-devices-max", f.LoopDevicesMax, "loop devices to attach at most; also the number of volumes a CO puts on the node")
	fs.BoolVar(&f.MkfsAlways, "mkfs-always", false, "run mkfs for each new filesystem, instead of copying what it wrote for equal ones")
	fs.Var(&f.EphemeralMaxSize, "ephemeral-max-size", "largest inline ephemeral volume, as in 10Gi; 0 refuses them")
	fs.IntVar(&f.EphemeralMaxVolumes, "ephemeral-max-volumes", f.EphemeralMaxVolumes, "inline ephemeral volumes to have at most at a time")
	fs.StringArrayVar(&f.EphemeralPools, "ephemeral-pool", nil, "pool that inline ephemeral volumes may name; can be repeated (default: the default pool only)")
	fs.Var(&f.TrimInterval, "trim-interval", "how often the filesystems of thin volumes are trimmed; 0 never")
	fs.Var(&f.TrimJitter, "trim-jitter", "what is added to that at random each time, at most")
	fs.BoolVar(&f.ExpediteFreezes, "expedite-freezes", f.ExpediteFreezes, "hurry the kernel (/sys/kernel/rcu_expedited) for the moment in which it freezes a filesystem for a snapshot")
	fs.StringVar(&f.LuksPBKDF, "luks-pbkdf", f.LuksPBKDF, "how passphrases of new encrypted volumes become keys: argon2id or pbkdf2")
	fs.Var(&f.LuksPBKDFMemory, "luks-pbkdf-memory", "memory that argon2id takes for that, each time such a volume is staged")
	fs.Var(&f.LuksPBKDFTime, "luks-pbkdf-time", "how long that shall take on this machine")
	fs.StringVar(&f.DriverName, "driver-name", f.DriverName, "name the driver registers with")
	fs.Var(&f.StopTimeout, "stop-timeout", "how long running calls may take to finish at a stop")
	fs.StringVar(&f.HTTPEndpoint, "http-endpoint", "", "address for /healthz, /readyz and /metrics, as in :9809 (default none)")
	fs.IntVar(&f.VolumeMetrics, "volume-metrics", f.VolumeMetrics, "volumes of this node that have metrics of their own, at most; 0 for none")
	fs.StringVar(&f.TracingEndpoint, "tracing-endpoint", "", "where OpenTelemetry traces of calls are sent (OTLP over gRPC), as in http://collector:4317 or, with TLS, https://... (default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else none are made)")
	fs.Var(&f.TracingSampling, "tracing-sampling", "part of the calls that are traced, 0 to 1, of those that the caller has not decided about (default: what OTEL_TRACES_SAMPLER says, else all)")
	f.linkFlags(fs)
	fs.StringVar(&f.file, "config", "", "configuration file (YAML)")
	fs.BoolVar(&f.check, "check-config", false, "check the flags, the environment and the file without looking at the machine, and exit")
	fs.BoolVar(&f.example, "example-config", false, "print a configuration file with every key explained, and exit")

	// Of the many logging flags, those that still mean something.
	all := pflag.NewFlagSet("logging", pflag.ContinueOnError)
	logsapi.AddFlags(f.logging, all)
	for _, name := range []string{"logging-format", "v", "vmodule"} {
		fs.AddFlag(all.Lookup(name))
	}
	fs.Lookup("logging-format").Usage = "text or json"
	return f
}

// linkFlags registers the flags of the modes node and controller.
func (f *serveFlags) linkFlags(fs *pflag.FlagSet) {
	fs.StringVar(&f.RegistrationDir, "registration-dir", "", "node: the kubelet's plugins_registry directory, to register there (default: does not register)")
	fs.StringVar(&f.KubeletEndpoint, "kubelet-endpoint", "", "node: path of the CSI socket as the kubelet sees it (default: that of --endpoint)")
	fs.StringArrayVar(&f.ControllerAddress, "controller-address", nil, "node: HOST:PORT of the controller; can be repeated")
	fs.StringVar(&f.ControllerCA, "controller-ca", "", "node: file with the certificates (PEM) that the controller's is signed with; read again at each connection")
	fs.StringVar(&f.LinkTokenFile, "link-token-file", "", "node: file with the pod's service account token for the audience csi-loop.io; read again when it changes")
	fs.StringVar(&f.ControllerName, "controller-name", f.ControllerName, "node, controller: name in the controller's certificate")
	fs.Var(&f.TransferRate, "transfer-rate", "node: what it sends to other nodes for copies there, in bytes a second, as in 100Mi; controller: what all such copies together take; 0 is no bound")
	fs.StringVar(&f.LinkListen, "link-listen", f.LinkListen, "controller: address where nodes are awaited")
	fs.StringVar(&f.LinkAdvertise, "link-advertise", "", "controller: HOST:PORT where nodes reach this replica")
	fs.StringVar(&f.Namespace, "namespace", "", "controller: namespace of csi-loop")
	fs.StringVar(&f.NodeServiceAccount, "node-service-account", "", "controller: service account of the nodes' pods")
	fs.StringVar(&f.LinkSecret, "link-secret", "", "controller: Secret for the certificate of the links, made and renewed there")
	fs.StringVar(&f.LinkCAConfigMap, "link-ca-configmap", "", "controller: ConfigMap where the nodes find its CA (key ca.crt)")
	fs.StringVar(&f.LinkTLSDir, "link-tls-dir", "", "controller: directory with a certificate that is given, tls.crt and tls.key, instead")
	fs.StringVar(&f.Kubeconfig, "kubeconfig", "", "controller: file that says how to reach the API server, outside a cluster")
	fs.Var(&f.EventInterval, "event-interval", "controller: how often volumes are looked at for problems that their claims get events of; 0 never")
}

// String, Set and Type make scalar a flag.
func (s *scalar) String() string { return string(*s) }

// Set takes any text; resolve checks it.
func (s *scalar) Set(text string) error { *s = scalar(text); return nil }

// Type is what --help shows.
func (s *scalar) Type() string { return "string" }

// envName is the environment equivalent of a flag.
func envName(flag string) string {
	if flag == "endpoint" {
		return "CSI_ENDPOINT"
	}
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// readEnvironment sets the flags that were not given from the environment.
func readEnvironment(fs *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var err error
	fs.VisitAll(func(f *pflag.Flag) {
		value, ok := lookup(envName(f.Name))
		if err != nil || f.Changed || !ok || value == "" || f.Name == "help" {
			return
		}
		values := []string{value}
		if f.Value.Type() == "stringArray" {
			values = strings.Split(value, ",")
		}
		for _, v := range values {
			if e := fs.Set(f.Name, strings.TrimSpace(v)); e != nil {
				err = usagef("environment variable %s: %w", envName(f.Name), e)
			}
		}
	})
	return err
}

// unknownVariables lists variables with our prefix that mean nothing: a setting
// that was misspelt, or what Kubernetes adds for a Service called "csiloop".
func unknownVariables(fs *pflag.FlagSet, environ []string) []string {
	var unknown []string
	for _, pair := range environ {
		name, _, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, envPrefix) {
			continue
		}
		flag := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, envPrefix), "_", "-"))
		if f := fs.Lookup(flag); f == nil || envName(flag) != name {
			unknown = append(unknown, name)
		}
	}
	slices.Sort(unknown)
	return unknown
}

// load brings defaults, file, environment and flags together.
func (f *serveFlags) load(fs *pflag.FlagSet, lookup func(string) (string, bool)) (config, error) {
	if err := readEnvironment(fs, lookup); err != nil {
		return config{}, err
	}
	c := defaultConfig()
	if f.file != "" {
		if err := c.readConfig(f.file); err != nil {
			return c, err
		}
	}
	for name, take := range map[string]func(){
		"mode":                  func() { c.Mode = f.Mode },
		"http-endpoint":         func() { c.HTTPEndpoint = f.HTTPEndpoint },
		"volume-metrics":        func() { c.VolumeMetrics = f.VolumeMetrics },
		"tracing-endpoint":      func() { c.TracingEndpoint = f.TracingEndpoint },
		"tracing-sampling":      func() { c.TracingSampling = f.TracingSampling },
		"registration-dir":      func() { c.RegistrationDir = f.RegistrationDir },
		"kubelet-endpoint":      func() { c.KubeletEndpoint = f.KubeletEndpoint },
		"controller-address":    func() { c.ControllerAddress = f.ControllerAddress },
		"controller-ca":         func() { c.ControllerCA = f.ControllerCA },
		"controller-name":       func() { c.ControllerName = f.ControllerName },
		"link-token-file":       func() { c.LinkTokenFile = f.LinkTokenFile },
		"transfer-rate":         func() { c.TransferRate = f.TransferRate },
		"link-listen":           func() { c.LinkListen = f.LinkListen },
		"link-advertise":        func() { c.LinkAdvertise = f.LinkAdvertise },
		"namespace":             func() { c.Namespace = f.Namespace },
		"node-service-account":  func() { c.NodeServiceAccount = f.NodeServiceAccount },
		"link-secret":           func() { c.LinkSecret = f.LinkSecret },
		"link-ca-configmap":     func() { c.LinkCAConfigMap = f.LinkCAConfigMap },
		"link-tls-dir":          func() { c.LinkTLSDir = f.LinkTLSDir },
		"kubeconfig":            func() { c.Kubeconfig = f.Kubeconfig },
		"event-interval":        func() { c.EventInterval = f.EventInterval },
		"endpoint":              func() { c.Endpoint = f.Endpoint },
		"node-id":               func() { c.NodeID = f.NodeID },
		"default-pool":          func() { c.DefaultPool = f.DefaultPool },
		"image-dir":             func() { c.ImageDirs = f.ImageDirs },
		"state-dir":             func() { c.StateDir = f.StateDir },
		"cgroup-root":           func() { c.CgroupRoot = f.CgroupRoot },
		"loop-devices-warm":     func() { c.LoopDevicesWarm = f.LoopDevicesWarm },
		"mkfs-always":           func() { c.MkfsAlways = f.MkfsAlways },
		"loop-devices-max":      func() { c.LoopDevicesMax = f.LoopDevicesMax },
		"ephemeral-max-size":    func() { c.EphemeralMaxSize = f.EphemeralMaxSize },
		"ephemeral-max-volumes": func() { c.EphemeralMaxVolumes = f.EphemeralMaxVolumes },
		"ephemeral-pool":        func() { c.EphemeralPools = f.EphemeralPools },
		"driver-name":           func() { c.DriverName = f.DriverName },
		"trim-interval":         func() { c.TrimInterval = f.TrimInterval },
		"expedite-freezes":      func() { c.ExpediteFreezes = f.ExpediteFreezes },
		"trim-jitter":           func() { c.TrimJitter = f.TrimJitter },
		"luks-pbkdf":            func() { c.LuksPBKDF = f.LuksPBKDF },
		"luks-pbkdf-memory":     func() { c.LuksPBKDFMemory = f.LuksPBKDFMemory },
		"luks-pbkdf-time":       func() { c.LuksPBKDFTime = f.LuksPBKDFTime },
		"stop-timeout":          func() { c.StopTimeout = f.StopTimeout },
		"logging-format":        func() { c.LoggingFormat = f.logging.Format },
		"v":                     func() { c.Verbosity = uint32(f.logging.Verbosity) },
	} {
		if fs.Changed(name) {
			take()
		}
	}
	return c, c.addPools(f.pools, "--pool")
}

// applyLogging starts logging as configured. It works once in a process.
func (f *serveFlags) applyLogging(c config) error {
	f.logging.Format = c.LoggingFormat
	f.logging.Verbosity = logsapi.VerbosityLevel(c.Verbosity)
	if err := logsapi.ValidateAndApply(f.logging, nil); err != nil {
		return usagef("logging: %w", err)
	}
	return nil
}

func newServeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the CSI driver",
		Long:  serveHelp,
		Args:  cobra.NoArgs,
	}
	f := newServeFlags(c.Flags())
	c.RunE = func(c *cobra.Command, _ []string) error {
		return failed(f.run(c))
	}
	return c
}

func (f *serveFlags) run(c *cobra.Command) error {
	if f.example {
		_, err := io.WriteString(c.OutOrStdout(), exampleConfig)
		return err
	}
	cfg, err := f.load(c.Flags(), os.LookupEnv)
	if err != nil {
		return err
	}
	p, err := cfg.resolve(thisBuild().Version)
	if err != nil {
		return err
	}
	if err := f.applyLogging(cfg); err != nil {
		return err
	}
	if f.check {
		_, err := fmt.Fprintln(c.OutOrStdout(), "the configuration is good")
		return err
	}
	if err := completePath(); err != nil {
		return fmt.Errorf("PATH: %w", err)
	}
	return serve(c.Context(), p, unknownVariables(c.Flags(), os.Environ()))
}
