package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/csi-loop/csi-loop/internal/kubeapi"
	"github.com/csi-loop/csi-loop/pkg/driver"
	"github.com/csi-loop/csi-loop/pkg/router"
	"github.com/csi-loop/csi-loop/pkg/router/kube"
)

// API requests per second. A thousand nodes that link at once are as many reviews of
// tokens; they have a limit of their own, since anybody who reaches the controller
// can cause one.
const (
	reviewQPS   = 200
	reviewBurst = 1000
	apiQPS      = 20
	apiBurst    = 50
)

// serveController is serve in controller mode: it needs Kubernetes, and nothing of
// the machine.
func serveController(ctx context.Context, p plan, m *metrics) (err error) {
	rest, err := clientcmd.BuildConfigFromFlags("", p.link.Kubeconfig)
	if err != nil {
		return fmt.Errorf("no way to the API server: %w: run it in a pod, or give --kubeconfig", err)
	}
	rest.QPS, rest.Burst = apiQPS, apiBurst
	client, err := kubeapi.NewForConfig(rest)
	if err != nil {
		return err
	}
	rest.QPS, rest.Burst = reviewQPS, reviewBurst
	reviews, err := kubeapi.NewForConfig(rest)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	group, ctx := errgroup.WithContext(ctx)
	defer func() {
		cancel()
		if first := group.Wait(); err == nil {
			err = first
		}
	}()
	certificate := kube.Dir(p.link.LinkTLSDir)
	if p.link.LinkTLSDir == "" {
		made := &kube.Certificates{
			Client: client, Namespace: p.link.Namespace, Secret: p.link.LinkSecret, ConfigMap: p.link.LinkCAConfigMap, ServerName: p.link.ControllerName,
		}
		certificate = made.Get
		group.Go(func() error { made.Run(ctx); return nil })
	} else if _, err := certificate(); err != nil {
		return err
	}
	roster := kube.NewRoster(client, p.driver.Name)
	group.Go(func() error { roster.Run(ctx); return nil })
	var notices router.Notices
	if p.eventInterval > 0 {
		events := kube.NewNotices(ctx, client, p.driver.Name)
		group.Go(func() error { events.Run(ctx); return nil })
		notices = events
	}
	return routeCSI(ctx, p, m, group, router.Config{
		Auth:   &kube.Reviewer{Client: reviews, Namespace: p.link.Namespace, ServiceAccount: p.link.NodeServiceAccount},
		Claims: &kube.Claims{Client: client, Driver: p.driver.Name}, Notices: notices,
		Roster: roster, Certificate: func() (*tls.Certificate, error) { return certificate() },
	}, func(ctx context.Context, tell func([]string)) {
		(&kube.Replicas{Client: client, Namespace: p.link.Namespace, Driver: p.driver.Name, Self: p.link.LinkAdvertise, Tell: tell}).Run(ctx)
	})
}

// routeCSI runs the router until ctx ends.
func routeCSI(ctx context.Context, p plan, m *metrics, group *errgroup.Group, cfg router.Config, replicas func(ctx context.Context, tell func([]string))) error {
	cfg.Driver, cfg.Version, cfg.Self = p.driver.Name, p.driver.Version, p.link.LinkAdvertise
	cfg.Controller, cfg.Plugin = driver.ControllerCapabilities(), driver.PluginCapabilities()
	cfg.Group = driver.GroupCapabilities()
	cfg.Observe, cfg.TransferRate = m.observe, p.transferRate
	cfg.Stats, cfg.LinkStats = p.driver.Stats, p.linkStats
	r := router.New(cfg)
	nodes, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p.link.LinkListen)
	if err != nil {
		return fmt.Errorf("--link-listen: %w", err)
	}
	sidecars, err := driver.Listen(ctx, p.endpoint)
	if err != nil {
		_ = nodes.Close()
		return err
	}
	m.router(r)
	m.reports(r.Report)
	m.ready(r.Ready)
	klog.FromContext(ctx).Info("Serving", "mode", p.mode, "version", p.driver.Version, "endpoint", p.endpoint, "links", nodes.Addr().String())
	// At a stop the links stay until the last call has been answered.
	links, stopLinks := context.WithCancel(context.WithoutCancel(ctx))
	group.Go(func() error { return r.ServeLinks(links, nodes) })
	group.Go(func() error {
		defer stopLinks()
		return r.ServeCSI(ctx, sidecars, p.stopTimeout)
	})
	group.Go(func() error { replicas(ctx, r.SetReplicas); return nil })
	group.Go(func() error { r.WatchOrphans(ctx); return nil })
	if p.eventInterval > 0 {
		group.Go(func() error { r.WatchProblems(ctx, p.eventInterval); return nil })
	}
	return group.Wait()
}
