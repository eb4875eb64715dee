package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"

	"github.com/csi-loop/csi-loop/pkg/crypt"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
)

// planOf is what serve would do with these flags and this environment.
func planOf(t *testing.T, args []string, env map[string]string) (plan, error) {
	t.Helper()
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	f := newServeFlags(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	c, err := f.load(fs, func(name string) (string, bool) {
		v, ok := env[name]
		return v, ok
	})
	if err != nil {
		return plan{}, err
	}
	return c.resolve("v1")
}

func writeConfig(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "csi-loop.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// minimal is the least that serve can be told.
func minimal(more ...string) []string {
	return append([]string{"--endpoint=unix:///e/csi.sock", "--node-id=n", "--pool=p=/p"}, more...)
}

func TestConfiguration(t *testing.T) {
	base := plan{
		volumeMetrics: defaultVolumeMetrics,
		mode:          modeAll, link: defaultLinkConfig(),
		driver: driver.Config{
			Name: "csi-loop.io", Version: "v1", NodeID: "n", StateDir: "/run/csi-loop", CgroupRoot: "/sys/fs/cgroup", DefaultPool: "p", EphemeralMaxVolumes: 32, TrimInterval: 24 * time.Hour, TrimJitter: 6 * time.Hour, ExpediteFreezes: true,
			Encryption: crypt.Options{PBKDF: "argon2id", Memory: 64 << 20, Time: time.Second},
		},
		endpoint: "unix:///e/csi.sock",
		pools:    []image.Config{{Name: "p", Path: "/p", Overcommit: 1}},
		warm:     8, max: 256, stopTimeout: 30 * time.Second,
	}
	with := func(change func(*plan)) plan {
		p := base
		change(&p)
		return p
	}
	for name, c := range map[string]struct {
		file string
		args []string
		env  map[string]string
		want plan
	}{
		"endpoint, node and pool are enough": {args: minimal(), want: base},
		"the environment alone is enough": {
			env:  map[string]string{"CSI_ENDPOINT": "unix:///e/csi.sock", "CSILOOP_NODE_ID": "n", "CSILOOP_POOL": "p=/p"},
			want: base,
		},
		"the file alone is enough": {
			file: "{endpoint: 'unix:///e/csi.sock', nodeID: 'n', pools: [{name: p, path: /p}]}",
			want: base,
		},
		"every flag": {
			args: minimal("--pool=q=/q", "--default-pool=q", "--image-dir=/i", "--image-dir=/j,k", "--state-dir=/s", "--cgroup-root=/c", "--loop-devices-warm=1",
				"--loop-devices-max=2", "--ephemeral-max-size=10Gi", "--mkfs-always", "--expedite-freezes=false",
				"--ephemeral-max-volumes=3", "--ephemeral-pool=q", "--driver-name=d.io", "--trim-interval=12h", "--trim-jitter=0", "--luks-pbkdf=pbkdf2", "--luks-pbkdf-memory=1Mi", "--luks-pbkdf-time=5ms", "--stop-timeout=1m", "--logging-format=json", "-v=4"),
			want: with(func(p *plan) {
				p.driver = driver.Config{
					Name: "d.io", Version: "v1", NodeID: "n", StateDir: "/s", CgroupRoot: "/c", DefaultPool: "q", EphemeralMaxSize: 10 << 30,
					EphemeralMaxVolumes: 3, TrimInterval: 12 * time.Hour, EphemeralPools: []string{"q"},
					Encryption: crypt.Options{PBKDF: "pbkdf2", Memory: 1 << 20, Time: 5 * time.Millisecond},
				}
				p.pools = append(p.pools[:1:1], image.Config{Name: "q", Path: "/q", Overcommit: 1})
				p.imageDirs = []string{"/i", "/j,k"}
				p.warm, p.max, p.stopTimeout, p.mkfsAlways = 1, 2, time.Minute, true
			}),
		},
		"commas separate lists in the environment": {
			args: minimal(),
			env:  map[string]string{"CSILOOP_IMAGE_DIR": "/i, /j"},
			want: with(func(p *plan) { p.imageDirs = []string{"/i", "/j"} }),
		},
		"a flag wins over the environment, that over the file, that over the default": {
			file: "{stateDir: /file, driverName: file.io, loopDevicesMax: 9, stopTimeout: 5s}",
			args: minimal("--state-dir=/flag"),
			env:  map[string]string{"CSILOOP_STATE_DIR": "/env", "CSILOOP_DRIVER_NAME": "env.io"},
			want: with(func(p *plan) {
				p.driver.StateDir, p.driver.Name, p.max, p.stopTimeout = "/flag", "env.io", 9, 5*time.Second
			}),
		},
		"a flag that repeats the default still wins": {
			file: "{loopDevicesMax: 9}",
			args: minimal("--loop-devices-max=256"),
			want: base,
		},
		"an empty variable counts as not set": {
			args: minimal(),
			env:  map[string]string{"CSILOOP_STATE_DIR": "", "CSI_ENDPOINT": ""},
			want: base,
		},
		"a pool flag gives a pool of the file its path": {
			file: "{pools: [{name: p, path: /other, reserve: 5%, overcommit: 2.5, expect: {filesystem: xfs, uuid: u, mountPoint: true, poolID: i, existing: true}}]}",
			args: minimal(),
			want: with(func(p *plan) {
				p.pools = []image.Config{{
					Name: "p", Path: "/p", Reserve: image.Reserve{Percent: 5}, Overcommit: 2.5,
					Expect: image.Expect{Filesystem: "xfs", UUID: "u", MountPoint: true, PoolID: "i", Existing: true},
				}}
			}),
		},
		"a pool flag adds to the pools of the file": {
			file: "{pools: [{name: default, path: /d, reserve: 10Gi}]}",
			args: minimal(),
			want: with(func(p *plan) {
				p.driver.DefaultPool = "default"
				p.pools = []image.Config{{Name: "default", Path: "/d", Reserve: image.Reserve{Bytes: 10 << 30}, Overcommit: 1}, p.pools[0]}
			}),
		},
		"sizes may be numbers": {
			file: "{ephemeralMaxSize: 1048576, pools: [{name: p, reserve: 4096}]}",
			args: minimal(),
			want: with(func(p *plan) {
				p.driver.EphemeralMaxSize = 1 << 20
				p.pools = []image.Config{{Name: "p", Path: "/p", Reserve: image.Reserve{Bytes: 4096}, Overcommit: 1}}
			}),
		},
		"an empty file says nothing": {file: "# nothing\n", args: minimal(), want: base},
	} {
		t.Run(name, func(t *testing.T) {
			if c.file != "" {
				c.args = append(c.args, "--config="+writeConfig(t, c.file))
			}
			got, err := planOf(t, c.args, c.env)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(plan{}, tracingPlan{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConfigurationMistakes(t *testing.T) {
	for name, c := range map[string]struct {
		file string
		args []string
		env  map[string]string
		want string // words of the message
	}{
		"no node ID":                     {args: []string{"--endpoint=unix:///e/csi.sock", "--pool=p=/p"}, want: "give --node-id=NAME"},
		"no endpoint":                    {args: []string{"--node-id=n", "--pool=p=/p"}, want: "give --endpoint=unix:///"},
		"no pool":                        {args: []string{"--endpoint=unix:///e/csi.sock", "--node-id=n"}, want: "give --pool=default="},
		"pool without a path":            {args: minimal("--pool=q"), want: `"q" is not NAME=PATH`},
		"pool with an empty path":        {args: minimal("--pool=q="), want: `"q=" is not NAME=PATH`},
		"pool of the file, no path":      {file: "{pools: [{name: q}]}", args: minimal(), want: "--pool=q=PATH"},
		"pool twice on the command line": {args: minimal("--pool=p=/q"), want: `pool "p" is given twice`},
		"pool twice in the file":         {file: "{pools: [{name: q, path: /q}, {name: q, path: /r}]}", args: minimal(), want: `pool "q" is there twice`},
		"two pools with one directory":   {args: minimal("--pool=q=/p/"), want: `pools "p" and "q" have one directory, /p: give each its own`},
		"pool path is relative":          {args: minimal("--pool=q=r"), want: `"r" is not absolute`},
		"pool name with capitals":        {args: minimal("--pool=Q=/q"), want: `pool "Q": a name has`},
		"default pool is ambiguous":      {args: minimal("--pool=q=/q"), want: "give --default-pool, one of p, q"},
		"default pool is not one":        {args: minimal("--default-pool=x"), want: `"x" is not one of the pools: p`},
		"bad reserve":                    {file: "{pools: [{name: q, path: /q, reserve: lots}]}", args: minimal(), want: `pool "q": reserve "lots"`},
		"overcommit below 1":             {file: "{pools: [{name: q, path: /q, overcommit: 0.5}]}", args: minimal(), want: `pool "q": overcommit 0.5 is below 1`},
		"image directory is relative":    {args: minimal("--image-dir=i"), want: `--image-dir: the path "i" is not absolute`},
		"state directory is relative":    {args: minimal("--state-dir=s"), want: `--state-dir: the path "s" is not absolute`},
		"no devices at all":              {args: minimal("--loop-devices-max=0"), want: "--loop-devices-max 0: must be 1 to"},
		"more warm devices than allowed": {args: minimal("--loop-devices-warm=9", "--loop-devices-max=8"), want: "--loop-devices-warm 9: must be 0 to"},
		"no ephemeral volumes at all":    {args: minimal("--ephemeral-max-volumes=0"), want: "--ephemeral-max-volumes 0: is not a number above 0"},
		"ephemeral pool that is none":    {args: minimal("--ephemeral-pool=x"), want: `--ephemeral-pool "x": is not one of the pools`},
		"bad quantity":                   {args: minimal("--ephemeral-max-size=10Gb"), want: `--ephemeral-max-size "10Gb": is not a size such as 10Gi`},
		"half a byte":                    {args: minimal("--ephemeral-max-size=500m"), want: "is not a whole number of bytes"},
		"negative size":                  {args: minimal("--ephemeral-max-size=-1"), want: "is not a whole number of bytes"},
		"bad duration":                   {args: minimal("--stop-timeout=30"), want: `--stop-timeout "30": is not a positive time such as 30s`},
		"bad function for keys":          {args: minimal("--luks-pbkdf=md5"), want: `"md5" is neither argon2id nor pbkdf2`},
		"bad time for keys":              {args: minimal("--luks-pbkdf-time=long"), want: `--luks-pbkdf-time "long": is not a time such as 1s`},
		"bad interval of trims":          {args: minimal("--trim-interval=1"), want: `--trim-interval "1": is not a time such as 24h, or 0`},
		"negative jitter of trims":       {args: minimal("--trim-jitter=-1s"), want: `--trim-jitter "-1s": is not a time`},
		"no time to stop":                {args: minimal("--stop-timeout=0s"), want: "is not a positive time"},
		"bad variable":                   {args: minimal(), env: map[string]string{"CSILOOP_LOOP_DEVICES_MAX": "many"}, want: "environment variable CSILOOP_LOOP_DEVICES_MAX"},
		"unknown key":                    {file: "{nodeId: n}", args: minimal(), want: `unknown field "nodeId"`},
		"unknown key of a pool":          {file: "{pools: [{name: p, resreve: 5%}]}", args: minimal(), want: `unknown field "pools[0].resreve"`},
		"key twice":                      {file: "nodeID: a\nnodeID: b\n", args: minimal(), want: `key "nodeID" already set`},
		"wrong type":                     {file: "{loopDevicesMax: many}", args: minimal(), want: "loopDevicesMax"},
		"not YAML":                       {file: "{", args: minimal(), want: "yaml"},
		"file is missing":                {args: minimal("--config=/nonexistent/file"), want: "--config: open /nonexistent/file"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.file != "" {
				c.args = append(c.args, "--config="+writeConfig(t, c.file))
			}
			_, err := planOf(t, c.args, c.env)
			if err == nil {
				t.Fatal("accepted")
			}
			if line := oneLine(err); !strings.Contains(line, c.want) || strings.Contains(line, "\n") {
				t.Errorf("message is %q, want %q in it", line, c.want)
			}
			if exitCode(err) != exitUsage {
				t.Errorf("exit code %d, want %d", exitCode(err), exitUsage)
			}
		})
	}
}

func TestDefaultPoolIsTheOneCalledDefault(t *testing.T) {
	p, err := planOf(t, minimal("--pool=default=/d"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if p.driver.DefaultPool != "default" {
		t.Errorf("default pool is %q", p.driver.DefaultPool)
	}
}

// The example must be accepted, and must show every key there is.
func TestExampleConfig(t *testing.T) {
	c := defaultConfig()
	if err := c.parse([]byte(exampleConfig)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.resolve("v1"); err != nil {
		t.Fatal(err)
	}
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	newServeFlags(fs)
	keys := map[string]string{
		"pool": "pools", "image-dir": "imageDirs", "v": "verbosity", "node-id": "nodeID",
		"controller-ca": "controllerCA", "link-ca-configmap": "linkCAConfigMap", "link-tls-dir": "linkTLSDir",
		"config": "--config", "example-config": "csi-loop serve", "check-config": "csi-loop serve", "vmodule": "verbosity", // not keys
	}
	fs.VisitAll(func(f *pflag.Flag) {
		key, ok := keys[f.Name]
		if !ok {
			parts := strings.Split(f.Name, "-")
			for i := 1; i < len(parts); i++ {
				parts[i] = strings.ToUpper(parts[i][:1]) + parts[i][1:]
			}
			key = strings.Join(parts, "")
		}
		if !strings.Contains(exampleConfig, key) {
			t.Errorf("the example does not show %s (--%s)", key, f.Name)
		}
	})
	// Where a default exists, the example shows it.
	want := defaultConfig()
	got := c
	got.Endpoint, got.NodeID, got.Pools, got.DefaultPool, got.ImageDirs, got.EphemeralPools, got.ControllerAddress = "", "", nil, "", nil, nil, nil
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(config{})); diff != "" {
		t.Errorf("the example's values are not the defaults: %s", diff)
	}
}

func TestUnknownVariablesAreFound(t *testing.T) {
	fs := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	newServeFlags(fs)
	got := unknownVariables(fs, []string{
		"CSILOOP_NODE_ID=n", "CSILOOP_NODEID=n", "CSILOOP_ENDPOINT=e", "CSI_ENDPOINT=e", "PATH=/bin", "CSILOOP_V=4", "CSILOOP_SERVICE_HOST=10.0.0.1",
	})
	want := []string{"CSILOOP_ENDPOINT", "CSILOOP_NODEID", "CSILOOP_SERVICE_HOST"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzConfigFile(f *testing.F) {
	f.Add([]byte(exampleConfig))
	f.Add([]byte("{pools: [{name: p, expect: {}}]}"))
	f.Fuzz(func(_ *testing.T, text []byte) {
		c := defaultConfig()
		if c.parse(text) == nil {
			_, _ = c.resolve("v1") // must not panic
		}
	})
}
