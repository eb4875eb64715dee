package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router/link"
)

// serveNode answers the kubelet on l, registers with it, and keeps the link to the
// controller. Neither waits for the other: mounting needs no controller.
func serveNode(ctx context.Context, d *driver.Driver, images *image.Store, p plan, l net.Listener, m *metrics) error {
	agent := link.NewAgent(linkSettings(ctx, d, images, p))
	m.links(agent.Links)
	m.flows(d.Flows)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return d.ServeNode(ctx, l, p.stopTimeout) })
	group.Go(func() error { agent.Run(ctx); return nil })
	if p.plugin != nil {
		group.Go(func() error { return p.plugin.Serve(ctx) })
	}
	return group.Wait()
}

// linkSettings puts together what the link needs of the driver.
func linkSettings(ctx context.Context, d *driver.Driver, images *image.Store, p plan) link.Config {
	cfg := link.Config{
		Driver: p.driver.Name, Version: p.driver.Version, NodeID: p.driver.NodeID,
		Addresses: p.link.ControllerAddress, ServerName: p.link.ControllerName, StopTime: p.stopTimeout,
		CA:          func() (*x509.CertPool, error) { return readCA(p.link.ControllerCA) },
		Token:       func() (string, error) { return readToken(p.link.LinkTokenFile) },
		DefaultPool: p.driver.DefaultPool,
		Register:    d.RegisterController, Intercept: d.Interceptor(klog.FromContext(ctx)), Stats: p.driver.Stats,
		Sources: d.Sources(), Making: d.ObserveCopies, SendRate: p.transferRate, Report: d.Report,
		Observe: func(f func(poolID, volume string, exists bool)) func() {
			return images.Observe(func(c image.Change) { f(c.PoolID, c.Dir, c.Exists) })
		},
	}
	cfg.Pools = func() []link.Pool {
		var pools []link.Pool
		for _, pool := range images.Pools() {
			pools = append(pools, link.Pool{
				ID: pool.ID(), Name: pool.Name(), Key: pool.PublicKey(), Sign: pool.Sign, Volumes: pool.Dirs,
				Free: func() link.Free {
					return link.Free{Thick: pool.Capacity(image.Thick), Thin: pool.Capacity(image.Thin)}
				},
			})
		}
		return pools
	}
	return cfg
}

// readCA reads the certificates that the controller's may be signed with.
func readCA(path string) (*x509.CertPool, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s: no certificate in it", path)
	}
	return pool, nil
}

// readToken reads what proves that this is the node's pod.
func readToken(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	if b = bytes.TrimSpace(b); len(b) == 0 {
		return "", errors.New(path + ": it is empty")
	}
	return string(b), nil
}
