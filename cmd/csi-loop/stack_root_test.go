package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/csi-loop/csi-loop/internal/kubeapi/kubeapitest"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/mount"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/kube"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// stack is what a node's process has: pools, loop devices and the driver over them.
type stack struct {
	images *image.Store
	loops  *loop.Manager
	d      *driver.Driver
}

// openStack opens all of it, as serve does.
func openStack(t *testing.T, pools []image.Config, cfg driver.Config, options ...image.Option) (m stack) {
	t.Helper()
	ctx := context.Background()
	var err error
	if m.images, err = image.Open(ctx, pools, options...); err == nil {
		m.loops, err = loop.New(ctx)
	}
	if err == nil {
		m.d, err = driver.New(cfg, m.images, nil, m.loops, mount.New())
	}
	if err == nil {
		err = m.d.Reconcile(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m stack) close() error { return errors.Join(m.d.Close(), m.images.Close(), m.loops.Close()) }

// linkCertificates makes the controller's certificate, and the file with its CA's.
func linkCertificates(t *testing.T, client *fake.Clientset, dir string) (made *kube.Certificates, ca string) {
	t.Helper()
	made = &kube.Certificates{Client: kubeapitest.Of(client), Namespace: "ns", Secret: "s", ConfigMap: "c", ServerName: link.DefaultName}
	if err := made.Ensure(t.Context()); err != nil {
		t.Fatal(err)
	}
	bundle, err := client.CoreV1().ConfigMaps("ns").Get(t.Context(), "c", meta.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ca = filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, []byte(bundle.Data[kube.CAKey]), 0o600); err != nil {
		t.Fatal(err)
	}
	return made, ca
}

// control runs the controller's half as serve does, and what else there is beside it,
// until the test ends.
func control(t *testing.T, p plan, m *metrics, cfg router.Config, beside ...func(context.Context) error) {
	running, stop := context.WithCancel(context.Background())
	group, running := errgroup.WithContext(running)
	for _, f := range beside {
		group.Go(func() error { return f(running) })
	}
	done := make(chan error, 1)
	go func() {
		done <- routeCSI(running, p, m, group, cfg, func(ctx context.Context, tell func([]string)) {
			tell([]string{p.link.LinkListen})
			<-ctx.Done()
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
