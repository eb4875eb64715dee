package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// ServeCSI answers the sidecars on l until ctx ends, then lets running calls finish
// for at most grace. It returns nil after an orderly stop.
func (r *Router) ServeCSI(ctx context.Context, l net.Listener, grace time.Duration) error {
	options := []grpc.ServerOption{
		grpc.UnaryInterceptor(r.intercept(klog.FromContext(ctx))), grpc.StreamInterceptor(r.interceptStream(klog.FromContext(ctx))), grpc.WaitForHandlers(true), //nolint:contextcheck // a stream has a context of its own
	}
	if r.cfg.Stats != nil {
		options = append(options, grpc.StatsHandler(r.cfg.Stats))
	}
	srv := grpc.NewServer(options...)
	csi.RegisterIdentityServer(srv, &identityServer{r: r})
	csi.RegisterControllerServer(srv, &controllerServer{r: r})
	csi.RegisterGroupControllerServer(srv, &groupServer{r: r})
	csi.RegisterSnapshotMetadataServer(srv, &metadataServer{r: r})
	registerAdmin(srv, r)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		timer := time.AfterFunc(grace, srv.Stop)
		defer timer.Stop()
		srv.GracefulStop()
	})
	err := srv.Serve(l)
	if !stop() {
		<-stopped
		return nil
	}
	srv.Stop()
	if errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return fmt.Errorf("serve CSI: %w", err)
}

// intercept puts method and volume into the logger, refuses what is not offered,
// logs the outcome once, and keeps a panic from ending other calls.
func (r *Router) intercept(logger klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		method := path.Base(info.FullMethod)
		log := logger.WithValues("method", method)
		if v, ok := req.(interface{ GetVolumeId() string }); ok && v.GetVolumeId() != "" {
			log = log.WithValues("volume", v.GetVolumeId())
		} else if v, ok := req.(interface{ GetName() string }); ok {
			log = log.WithValues("name", v.GetName())
		}
		log.V(4).Info("Call", "request", protosanitizer.StripSecrets(req))
		start := time.Now()
		err := r.offered(method)
		var resp any
		if err == nil {
			resp, err = guarded(klog.NewContext(ctx, log), req, handler, log)
		}
		r.answered(log, info.FullMethod, err, time.Since(start))
		return resp, err
	}
}

// interceptStream does for streams what intercept does for other calls.
func (r *Router) interceptStream(logger klog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		log := logger.WithValues("method", path.Base(info.FullMethod))
		log.V(4).Info("Call")
		start := time.Now()
		_, err := guarded(klog.NewContext(stream.Context(), log), nil, func(context.Context, any) (any, error) { return nil, handler(srv, stream) }, log)
		r.answered(log, info.FullMethod, err, time.Since(start))
		return err
	}
}

// answered logs and counts the outcome of a call.
func (r *Router) answered(log klog.Logger, fullMethod string, err error, took time.Duration) {
	code := status.Code(err)
	switch code { //nolint:exhaustive // the rest answers the request
	case codes.OK:
		log.V(4).Info("Done", "took", took.String())
	case codes.Internal, codes.Unknown, codes.DataLoss:
		log.Error(err, "Call failed", "code", code.String(), "took", took.String())
	default:
		log.Info("Call refused", "code", code.String(), "err", err.Error(), "took", took.String())
	}
	if r.cfg.Observe != nil && strings.HasPrefix(fullMethod, "/csi.") {
		r.cfg.Observe(path.Base(fullMethod), code.String(), took)
	}
}

// guarded runs the handler, and turns a panic and a context's error into statuses.
func guarded(ctx context.Context, req any, handler grpc.UnaryHandler, log klog.Logger) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = status.Error(codes.Internal, fmt.Sprintf("BUG: panic: %v", p))
			log.Error(err, "Panic in a call", "stack", string(debug.Stack()))
		}
	}()
	resp, err = handler(ctx, req)
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		err = status.FromContextError(err).Err()
	}
	return resp, err
}
