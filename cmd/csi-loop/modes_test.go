package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/pkg/kubelet"
	"github.com/csi-loop/csi-loop/pkg/router"
)

func nodeArgs(more ...string) []string {
	return append(minimal("--mode=node", "--controller-address=c:9808", "--controller-ca=/ca.crt", "--link-token-file=/token"), more...)
}

func controllerArgs(more ...string) []string {
	return append([]string{
		"--mode=controller", "--endpoint=unix:///e/csi.sock", "--link-advertise=10.0.0.1:9808", "--namespace=ns",
		"--node-service-account=sa", "--link-secret=s", "--link-ca-configmap=c",
	}, more...)
}

func TestModes(t *testing.T) {
	p, err := planOf(t, nodeArgs("--registration-dir=/reg/", "--controller-address=d:1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := (kubelet.Plugin{Driver: "csi-loop.io", Endpoint: "/e/csi.sock", Dir: "/reg"}); p.mode != modeNode || *p.plugin != want || len(p.link.ControllerAddress) != 2 {
		t.Errorf("%+v", p)
	}
	if p, err = planOf(t, nodeArgs("--registration-dir=/reg", "--kubelet-endpoint=/k/csi.sock"), nil); err != nil || p.plugin.Endpoint != "/k/csi.sock" {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err = planOf(t, nodeArgs(), nil); err != nil || p.plugin != nil {
		t.Errorf("%+v, %v", p, err)
	}
	p, err = planOf(t, controllerArgs("--http-endpoint=:9809"), nil)
	if err != nil || p.mode != modeController || p.link.LinkListen != ":9808" || p.http != ":9809" || p.link.ControllerName != "csi-loop-controller" || p.stopTimeout != 30*time.Second {
		t.Errorf("%+v, %v", p, err)
	}
	env := map[string]string{
		"CSI_ENDPOINT": "unix:///e/csi.sock", "CSILOOP_MODE": "controller", "CSILOOP_LINK_ADVERTISE": "[fd00::1]:9808", "CSILOOP_NAMESPACE": "ns",
		"CSILOOP_NODE_SERVICE_ACCOUNT": "sa", "CSILOOP_LINK_TLS_DIR": "/tls",
	}
	if p, err = planOf(t, nil, env); err != nil || p.link.LinkTLSDir != "/tls" {
		t.Errorf("%+v, %v", p, err)
	}
	file := writeConfig(t, "{mode: node, controllerAddress: ['c:1'], controllerCA: /ca, linkTokenFile: /t, httpEndpoint: ':1'}")
	if p, err = planOf(t, minimal("--config="+file), nil); err != nil || p.mode != modeNode || p.http != ":1" {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestModeMistakes(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"no such mode":                   {minimal("--mode=both"), []string{"--mode", "both"}},
		"node flag in mode all":          {minimal("--controller-ca=/x"), []string{"--controller-ca", "--mode=node"}},
		"controller flag on a node":      {nodeArgs("--link-secret=s"), []string{"--link-secret", "--mode=controller"}},
		"pool in the controller":         {controllerArgs("--pool=p=/p"), []string{"--pool", "--mode=controller"}},
		"node without a controller":      {minimal("--mode=node"), []string{"--controller-address"}},
		"node without a token":           {minimal("--mode=node", "--controller-address=c:1", "--controller-ca=/x"), []string{"--link-token-file"}},
		"address without a port":         {nodeArgs("--controller-address=c"), []string{"--controller-address", "HOST:PORT"}},
		"registration dir is relative":   {nodeArgs("--registration-dir=reg"), []string{"absolute"}},
		"kubelet endpoint is relative":   {nodeArgs("--registration-dir=/reg", "--kubelet-endpoint=k.sock"), []string{"absolute"}},
		"controller without its address": {[]string{"--mode=controller", "--endpoint=/e.sock"}, []string{"--link-advertise"}},
		"controller without an endpoint": {[]string{"--mode=controller"}, []string{"--endpoint"}},
		"advertised address has no host": {controllerArgs("--link-advertise=:9808"), []string{"--link-advertise", "HOST:PORT"}},
		"listen address":                 {controllerArgs("--link-listen=9808"), []string{"--link-listen", "HOST:PORT"}},
		"http address":                   {minimal("--http-endpoint=9808"), []string{"--http-endpoint", "HOST:PORT"}},
		"two certificates":               {controllerArgs("--link-tls-dir=/tls"), []string{"--link-tls-dir", "one or the other"}},
		"half a certificate":             {controllerArgs("--link-ca-configmap="), []string{"--link-ca-configmap"}},
		"certificate for no name":        {controllerArgs("--controller-name=A_B"), []string{"--controller-name"}},
		"stop timeout":                   {controllerArgs("--stop-timeout=x"), []string{"--stop-timeout"}},
		"driver name":                    {controllerArgs("--driver-name=A B"), []string{"driver name"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := planOf(t, c.args, nil)
			if err == nil || exitCode(err) != exitUsage {
				t.Fatalf("%v", err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q is not in %q", w, err)
				}
			}
		})
	}
}

// get asks a handler.
func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
	return w.Code, w.Body.String()
}

func TestHTTP(t *testing.T) {
	m := newMetrics(build{Version: "v1"})
	h := m.handler()
	if code, _ := get(t, h, "/healthz"); code != http.StatusOK {
		t.Error(code)
	}
	if code, body := get(t, h, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "starting") {
		t.Error(code, body)
	}
	var broken error
	m.ready(func() error { return broken })
	if code, _ := get(t, h, "/readyz"); code != http.StatusOK {
		t.Error(code)
	}
	broken = errors.New("pool gone")
	if code, body := get(t, h, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "pool gone") {
		t.Error(code, body)
	}
	m.observe("CreateVolume", "OK", 20*time.Millisecond)
	m.links(func() (int, int) { return 1, 3 })
	m.router(router.New(router.Config{Self: "a", Roster: noRoster{}}))
	code, body := get(t, h, "/metrics")
	for _, want := range []string{
		`csi_loop_csi_calls_seconds_count{code="OK",method="CreateVolume"} 1`, `csi_loop_build_info{`, `version="v1"`,
		`csi_loop_links{state="up"} 1`, `csi_loop_links{state="down"} 2`, `csi_loop_link_nodes{state="linked"} 0`,
		`csi_loop_link_refused_total{reason="token"} 0`, `csi_loop_link_node_away{name="n1"} 1`, `csi_loop_link_duplicate_pools 0`,
	} {
		if code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%d: no %s", code, want)
		}
	}
	stop, err := m.serve(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := m.serve(t.Context(), "256.0.0.1:x"); err == nil {
		t.Error("no such address")
	}
}

func TestReadFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, content := range []string{"", " \n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readToken(path); err == nil {
			t.Error("an empty token")
		}
		if _, err := readCA(path); err == nil {
			t.Error("an empty bundle")
		}
	}
	if err := os.WriteFile(path, []byte("abc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if token, err := readToken(path); err != nil || token != "abc" {
		t.Error(token, err)
	}
	for _, err := range []error{func() error { _, err := readToken(dir + "/x"); return err }(), func() error { _, err := readCA(dir + "/x"); return err }()} {
		if !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}
