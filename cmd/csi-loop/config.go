package main

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/stats"
	"k8s.io/apimachinery/pkg/api/resource"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/csi-loop/csi-loop/pkg/cgroup"
	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/kubelet"
)

// exampleConfig is the configuration file with every field explained.
//
//go:embed example.yaml
var exampleConfig string

// config is what serve is told: the configuration file's form, over which the
// environment and the flags are laid.
type config struct {
	linkConfig

	Mode                string       `json:"mode"`
	HTTPEndpoint        string       `json:"httpEndpoint"`
	VolumeMetrics       int          `json:"volumeMetrics"`
	TracingEndpoint     string       `json:"tracingEndpoint"`
	TracingSampling     scalar       `json:"tracingSampling"`
	Endpoint            string       `json:"endpoint"`
	NodeID              string       `json:"nodeID"`
	DriverName          string       `json:"driverName"`
	Pools               []poolConfig `json:"pools"`
	DefaultPool         string       `json:"defaultPool"`
	ImageDirs           []string     `json:"imageDirs"`
	StateDir            string       `json:"stateDir"`
	CgroupRoot          string       `json:"cgroupRoot"`
	LoopDevicesWarm     int          `json:"loopDevicesWarm"`
	LoopDevicesMax      int          `json:"loopDevicesMax"`
	MkfsAlways          bool         `json:"mkfsAlways"`
	ExpediteFreezes     bool         `json:"expediteFreezes"`
	EphemeralMaxSize    scalar       `json:"ephemeralMaxSize"`
	EphemeralMaxVolumes int          `json:"ephemeralMaxVolumes"`
	EphemeralPools      []string     `json:"ephemeralPools"`
	TrimInterval        scalar       `json:"trimInterval"`
	TrimJitter          scalar       `json:"trimJitter"`
	LuksPBKDF           string       `json:"luksPbkdf"`
	LuksPBKDFMemory     scalar       `json:"luksPbkdfMemory"`
	LuksPBKDFTime       scalar       `json:"luksPbkdfTime"`
	StopTimeout         scalar       `json:"stopTimeout"`
	LoggingFormat       string       `json:"loggingFormat"`
	Verbosity           uint32       `json:"verbosity"`
}

// poolConfig is one pool.
type poolConfig struct {
	Name       string       `json:"name"`
	Path       string       `json:"path"`
	Reserve    scalar       `json:"reserve"`
	Overcommit float64      `json:"overcommit"`
	Expect     expectConfig `json:"expect"`
}

// expectConfig is what must be true of a pool's directory, so that a disk that
// is not mounted is noticed.
type expectConfig struct {
	Filesystem string `json:"filesystem"`
	UUID       string `json:"uuid"`
	MountPoint bool   `json:"mountPoint"`
	PoolID     string `json:"poolID"`
	Existing   bool   `json:"existing"`
}

// scalar is text that YAML may show as a number: a size, a duration.
type scalar string

// UnmarshalJSON takes a string or a number.
func (s *scalar) UnmarshalJSON(b []byte) error {
	var text string
	if json.Unmarshal(b, &text) == nil {
		*s = scalar(text)
		return nil
	}
	var number json.Number
	if err := json.Unmarshal(b, &number); err != nil {
		return fmt.Errorf("%s is neither text nor a number", b)
	}
	*s = scalar(number)
	return nil
}

// defaultVolumeMetrics is how many volumes of a node have metrics of their own: as many
// as it attaches. Each is up to a dozen series.
const defaultVolumeMetrics = 256

// defaultConfig holds the values of whatever is not said.
func defaultConfig() config {
	return config{
		linkConfig: defaultLinkConfig(), Mode: modeAll,
		ExpediteFreezes: true, DriverName: driver.DefaultName, StateDir: "/run/csi-loop", CgroupRoot: cgroup.DefaultRoot,
		LoopDevicesWarm: 8, LoopDevicesMax: 256,
		EphemeralMaxSize: "0", EphemeralMaxVolumes: driver.DefaultEphemeralMaxVolumes, TrimInterval: "24h", TrimJitter: "6h", StopTimeout: "30s",
		LuksPBKDF: "argon2id", LuksPBKDFMemory: "64Mi", LuksPBKDFTime: "1s",
		LoggingFormat: "text", VolumeMetrics: defaultVolumeMetrics,
	}
}

// readConfig lays the file over c. It is strict: a key that is not known, or
// that is there twice, is refused by name.
func (c *config) readConfig(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return usagef("--config: %w", err)
	}
	if err := c.parse(text); err != nil {
		return usagef("%s: %w (csi-loop serve --example-config prints a file with every key)", path, err)
	}
	return nil
}

func (c *config) parse(text []byte) error {
	j, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return err
	}
	strict, err := kjson.UnmarshalStrict(j, c)
	return errors.Join(append([]error{err}, strict...)...)
}

// addPools lays NAME=PATH pairs over the pools of the file: a pool of the same
// name gets the path, a new name is a new pool.
func (c *config) addPools(pairs []string, from string) error {
	var seen []string
	for _, pair := range pairs {
		name, path, ok := strings.Cut(pair, "=")
		if !ok || name == "" || path == "" {
			return usagef("%s: %q is not NAME=PATH, as in default=/var/lib/csi-loop", from, pair)
		}
		if slices.Contains(seen, name) {
			return usagef("%s: pool %q is given twice", from, name)
		}
		seen = append(seen, name)
		i := slices.IndexFunc(c.Pools, func(p poolConfig) bool { return p.Name == name })
		if i < 0 {
			c.Pools = append(c.Pools, poolConfig{Name: name, Path: path})
			continue
		}
		c.Pools[i].Path = path
	}
	return nil
}

// plan is a configuration that has been understood.
type plan struct {
	mode string
	http string // address of the HTTP endpoint; "" is none
	// volumeMetrics is how many volumes have metrics of their own.
	volumeMetrics int
	link          linkConfig      // checked, as far as the mode has use for it
	plugin        *kubelet.Plugin // what to register with the kubelet; nil is nothing
	driver        driver.Config
	tracing       tracingPlan
	linkStats     stats.Handler // sees the controller's calls of nodes; may be nil
	endpoint      string
	pools         []image.Config
	imageDirs     []string
	warm, max     int
	mkfsAlways    bool
	stopTimeout   time.Duration
	// transferRate bounds copies between nodes, in bytes a second; 0 is no bound.
	transferRate int64
	// eventInterval is how often problems of volumes are looked for; 0 is never.
	eventInterval time.Duration
}

// resolve checks everything that can be checked without looking at the machine.
// Its errors are usage errors that name the field by its flag.
func (c *config) resolve(version string) (plan, error) {
	if err := c.checkMode(); err != nil {
		return plan{}, err
	}
	traced, err := c.resolveTracing(os.LookupEnv)
	if err != nil {
		return plan{}, err
	}
	if c.Mode == modeController {
		p, err := c.resolveController(version)
		p.tracing = traced
		return p, err
	}
	p := plan{mode: c.Mode, tracing: traced, http: c.HTTPEndpoint, volumeMetrics: c.VolumeMetrics, link: c.linkConfig, endpoint: c.Endpoint, imageDirs: c.ImageDirs, warm: c.LoopDevicesWarm, max: c.LoopDevicesMax, mkfsAlways: c.MkfsAlways}
	switch {
	case c.NodeID == "":
		// Not the host's name by default: in a pod that is the pod's, and volumes
		// would be bound to a node that is gone with it.
		return p, usagef("no node ID: give --node-id=NAME: in Kubernetes the node's name (spec.nodeName), on a machine of its own for example its host name")
	case c.Endpoint == "":
		return p, usagef("no endpoint: give --endpoint=unix:///run/csi/csi-loop.sock, or set CSI_ENDPOINT")
	case len(c.Pools) == 0:
		return p, usagef("no pool: give --pool=default=/var/lib/csi-loop, a directory for the image files")
	case c.LoopDevicesMax < 1 || c.LoopDevicesMax > 1<<20:
		return p, usagef("--loop-devices-max %d: must be 1 to %d", c.LoopDevicesMax, 1<<20)
	case c.VolumeMetrics < 0:
		return p, usagef("--volume-metrics %d: is below 0", c.VolumeMetrics)
	case c.LoopDevicesWarm < 0 || c.LoopDevicesWarm > c.LoopDevicesMax:
		return p, usagef("--loop-devices-warm %d: must be 0 to --loop-devices-max, which is %d", c.LoopDevicesWarm, c.LoopDevicesMax)
	}
	if err := absolute("--state-dir", c.StateDir); err != nil {
		return p, err
	}
	if err := absolute("--cgroup-root", c.CgroupRoot); err != nil {
		return p, err
	}
	for _, dir := range c.ImageDirs {
		if err := absolute("--image-dir", dir); err != nil {
			return p, err
		}
	}
	if p.stopTimeout, err = c.stopTime(); err != nil {
		return p, err
	}
	if c.Mode == modeNode {
		if err := c.resolveNode(&p); err != nil {
			return p, err
		}
	}
	if p.pools, err = c.resolvePools(); err != nil {
		return p, err
	}
	p.driver = driver.Config{Name: c.DriverName, Version: version, NodeID: c.NodeID, StateDir: c.StateDir, CgroupRoot: c.CgroupRoot, ExpediteFreezes: c.ExpediteFreezes}
	if err := p.driver.Validate(); err != nil {
		return p, usagef("%w", err)
	}
	if p.driver.DefaultPool, err = c.defaultPool(); err != nil {
		return p, err
	}
	if err := c.resolveTrims(&p.driver); err != nil {
		return p, err
	}
	if err := c.resolveEncryption(&p.driver); err != nil {
		return p, err
	}
	return p, c.resolveEphemeral(&p.driver)
}

// resolveEncryption checks how passphrases become keys.
func (c *config) resolveEncryption(d *driver.Config) error {
	memory, err := parseSize("--luks-pbkdf-memory", string(c.LuksPBKDFMemory))
	if err != nil {
		return err
	}
	t, err := time.ParseDuration(string(c.LuksPBKDFTime))
	if err != nil {
		return usagef("--luks-pbkdf-time %q: is not a time such as 1s", c.LuksPBKDFTime)
	}
	d.Encryption = crypt.Options{PBKDF: c.LuksPBKDF, Memory: memory, Time: t}
	if err := d.Encryption.Check(); err != nil {
		return usagef("--luks-pbkdf, --luks-pbkdf-memory, --luks-pbkdf-time: %w", err)
	}
	return nil
}

// resolveTrims checks how often thin volumes are trimmed.
func (c *config) resolveTrims(d *driver.Config) error {
	var err error
	if d.TrimInterval, err = parseInterval("--trim-interval", c.TrimInterval); err != nil {
		return err
	}
	d.TrimJitter, err = parseInterval("--trim-jitter", c.TrimJitter)
	return err
}

// parseInterval reads how often something is done; 0 is never.
func parseInterval(flag string, text scalar) (time.Duration, error) {
	t, err := time.ParseDuration(string(text))
	if err != nil || t < 0 {
		return 0, usagef("%s %q: is not a time such as 24h, or 0", flag, text)
	}
	return t, nil
}

// resolveEphemeral checks the bounds of inline ephemeral volumes.
func (c *config) resolveEphemeral(d *driver.Config) (err error) {
	if c.EphemeralMaxVolumes < 1 {
		return usagef("--ephemeral-max-volumes %d: is not a number above 0", c.EphemeralMaxVolumes)
	}
	for _, name := range c.EphemeralPools {
		if !slices.ContainsFunc(c.Pools, func(p poolConfig) bool { return p.Name == name }) {
			return usagef("--ephemeral-pool %q: is not one of the pools", name)
		}
	}
	d.EphemeralMaxVolumes, d.EphemeralPools = c.EphemeralMaxVolumes, c.EphemeralPools
	d.EphemeralMaxSize, err = parseSize("--ephemeral-max-size", string(c.EphemeralMaxSize))
	return err
}

func (c *config) stopTime() (time.Duration, error) {
	d, err := time.ParseDuration(string(c.StopTimeout))
	if err != nil || d <= 0 {
		return 0, usagef("--stop-timeout %q: is not a positive time such as 30s", c.StopTimeout)
	}
	return d, nil
}

// poolName is what a StorageClass can name.
var poolName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func (c *config) resolvePools() ([]image.Config, error) {
	var pools []image.Config
	for _, p := range c.Pools {
		if !poolName.MatchString(p.Name) {
			return nil, usagef("pool %q: a name has 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends", p.Name)
		}
		if p.Path == "" {
			return nil, usagef("pool %q has no path: give it in the file, or by --pool=%s=PATH", p.Name, p.Name)
		}
		if err := absolute("pool "+p.Name, p.Path); err != nil {
			return nil, err
		}
		reserve, err := image.ParseReserve(string(p.Reserve))
		if err != nil {
			return nil, usagef("pool %q: %w", p.Name, err)
		}
		switch {
		case p.Overcommit == 0:
			p.Overcommit = 1
		case p.Overcommit < 1:
			return nil, usagef("pool %q: overcommit %v is below 1: 2 lets thin volumes have twice the space there is", p.Name, p.Overcommit)
		}
		for _, other := range pools {
			if other.Name == p.Name {
				return nil, usagef("pool %q is there twice", p.Name)
			}
			if other.Path == filepath.Clean(p.Path) {
				return nil, usagef("pools %q and %q have one directory, %s: give each its own", other.Name, p.Name, other.Path)
			}
		}
		pools = append(pools, image.Config{
			Name: p.Name, Path: filepath.Clean(p.Path), Reserve: reserve, Overcommit: p.Overcommit,
			Expect: image.Expect{
				Filesystem: p.Expect.Filesystem, UUID: p.Expect.UUID, MountPoint: p.Expect.MountPoint,
				PoolID: p.Expect.PoolID, Existing: p.Expect.Existing,
			},
		})
	}
	return pools, nil
}

// defaultPool is the pool of requests that name none: the one that is said, the
// only one, or the one called "default".
func (c *config) defaultPool() (string, error) {
	names := make([]string, len(c.Pools))
	for i, p := range c.Pools {
		names[i] = p.Name
	}
	want := c.DefaultPool
	switch {
	case want == "" && len(names) == 1:
		return names[0], nil
	case want == "" && slices.Contains(names, "default"):
		return "default", nil
	case want == "":
		return "", usagef("which pool is the default? give --default-pool, one of %s", strings.Join(names, ", "))
	case !slices.Contains(names, want):
		return "", usagef("--default-pool %q is not one of the pools: %s", want, strings.Join(names, ", "))
	}
	return want, nil
}

// absolute checks a path of the configuration.
func absolute(what, path string) error {
	if !filepath.IsAbs(path) {
		return usagef("%s: the path %q is not absolute", what, path)
	}
	return nil
}

// parseSize reads a Kubernetes quantity of bytes.
func parseSize(what, text string) (int64, error) {
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, usagef("%s %q: is not a size such as 10Gi", what, text)
	}
	n, exact := q.AsInt64()
	if !exact || n < 0 {
		return 0, usagef("%s %q: is not a whole number of bytes, 0 or more", what, text)
	}
	return n, nil
}
