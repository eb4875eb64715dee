package kubelet

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/csi-loop/csi-loop/internal/roottest"
)

func TestMain(m *testing.M) { roottest.Main(m) }

// plugin is one in a directory whose path is short.
func plugin(t *testing.T) Plugin {
	t.Helper()
	dir, err := os.MkdirTemp("", "k") //nolint:usetesting // its path is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Plugin{Driver: "csi-loop.io", Endpoint: "/var/lib/kubelet/plugins/csi-loop.io/csi.sock", Dir: dir}
}

// serve runs the plugin, and returns a kubelet's client and a way to stop.
func serve(t *testing.T, p Plugin) (_ registration.RegistrationClient, done chan error, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done = make(chan error, 1)
	go func() { done <- p.Serve(ctx) }()
	conn, err := grpc.NewClient("unix:"+p.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Cleanup(cancel)
	return registration.NewRegistrationClient(conn), done, cancel
}

func info(t *testing.T, c registration.RegistrationClient) *registration.PluginInfo {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := c.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// A restart replaces the socket, which is there all the time in between.
func TestRegistration(t *testing.T) {
	p := plugin(t)
	var before os.FileInfo
	for range 2 {
		client, done, stop := serve(t, p)
		got := info(t, client)
		if got.GetType() != "CSIPlugin" || got.GetName() != p.Driver || got.GetEndpoint() != p.Endpoint || !slices.Equal(got.GetSupportedVersions(), []string{"1.0.0"}) {
			t.Errorf("%v", got)
		}
		if _, err := client.NotifyRegistrationStatus(t.Context(), &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
			t.Fatal(err)
		}
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		st, err := os.Lstat(p.Socket())
		if err != nil || st.Mode()&os.ModeSocket == 0 || st.Mode().Perm() != 0o600 {
			t.Fatalf("the socket after the stop: %v, %v", st, err)
		}
		if before != nil && before.ModTime().Equal(st.ModTime()) {
			t.Error("the socket was not made anew")
		}
		before = st
	}
}

// What the kubelet has against the driver ends the process, in one clear line.
func TestRefusal(t *testing.T) {
	client, done, _ := serve(t, plugin(t))
	info(t, client)
	for range 2 { // it may say so again before the process has ended
		_, _ = client.NotifyRegistrationStatus(t.Context(), &registration.RegistrationStatus{Error: "plugin already registered"})
	}
	err := <-done
	if err == nil || !strings.Contains(err.Error(), "csi-loop.io") || !strings.Contains(err.Error(), "plugin already registered") {
		t.Fatal(err)
	}
}

func TestMistakes(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Plugin)
		want   string
	}{
		"directory is relative": {func(p *Plugin) { p.Dir = "plugins_registry" }, "absolute"},
		"endpoint is relative":  {func(p *Plugin) { p.Endpoint = "csi.sock" }, "absolute"},
		"endpoint is too long":  {func(p *Plugin) { p.Endpoint = "/" + strings.Repeat("x", 120) }, "107"},
		"driver is too long":    {func(p *Plugin) { p.Driver = strings.Repeat("x", 120) }, "107"},
		"no such directory":     {func(p *Plugin) { p.Dir = filepath.Join(p.Dir, "none") }, "plugins_registry"},
		"a file in its place": {func(p *Plugin) {
			if err := os.WriteFile(p.Socket(), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a socket"},
	} {
		t.Run(name, func(t *testing.T) {
			p := plugin(t)
			tt.change(&p)
			if err := p.Serve(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to say %q", err, tt.want)
			}
		})
	}
}
