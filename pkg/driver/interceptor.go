package driver

import (
	"context"
	"fmt"
	"path"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// quiet are the calls that COs make all the time and that change nothing: they
// are logged at verbosity 4 and above.
var quiet = map[string]bool{
	"Probe": true, "GetPluginInfo": true, "GetPluginCapabilities": true, "ControllerGetCapabilities": true,
	"NodeGetCapabilities": true, "NodeGetInfo": true, "NodeGetVolumeStats": true, "GetCapacity": true,
	"ListVolumes": true, "ControllerGetVolume": true, "ValidateVolumeCapabilities": true,
	"ListSnapshots": true, "GetSnapshot": true,
	"ControllerGetVolumeHealth": true, "ControllerListVolumeHealth": true, "NodeGetVolumeHealth": true, "NodeGetStorageHealth": true,
	"Report": true, // of the links
}

// running counts the calls in flight, so that a stop can wait for them even
// after their connections are gone.
type running struct {
	wg   sync.WaitGroup
	tell func(change int) // nil, or told of each beginning (1) and end (-1)
}

// begin counts one call, until end.
func (r *running) begin() (end func()) {
	r.wg.Add(1)
	if r.tell == nil {
		return r.wg.Done
	}
	r.tell(1)
	return func() {
		r.tell(-1)
		r.wg.Done()
	}
}

// intercept puts method and volume into the logger, turns errors into
// statuses, logs the outcome once, and keeps a panic from ending the other calls.
func (r *running) intercept(logger klog.Logger, observe func(method, code string, took time.Duration)) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		defer r.begin()()
		method := path.Base(info.FullMethod)
		log := logger.WithValues("method", method)
		if v, ok := req.(interface{ GetVolumeId() string }); ok && v.GetVolumeId() != "" {
			log = log.WithValues("volume", v.GetVolumeId())
		} else if v, ok := req.(interface{ GetSnapshotId() string }); ok && v.GetSnapshotId() != "" {
			log = log.WithValues("snapshot", v.GetSnapshotId())
		} else if v, ok := req.(interface{ GetName() string }); ok {
			log = log.WithValues("name", v.GetName())
		}
		log.V(4).Info("Call", "request", protosanitizer.StripSecrets(req))
		start := time.Now()
		resp, err = guarded(klog.NewContext(ctx, log), req, handler, log)
		took := time.Since(start).Round(time.Microsecond)
		err = toStatus(err)
		if observe != nil && strings.HasPrefix(info.FullMethod, "/csi.") {
			observe(method, status.Code(err).String(), took)
		}
		switch {
		case err != nil:
			logFailure(log, err, took)
			return nil, err
		case quiet[method]:
			log.V(4).Info("Done", "took", took.String())
		default:
			log.V(1).Info("Done", "took", took.String())
		}
		return resp, nil
	}
}

// logFailure logs a failed call: as an error when it points at this driver or the
// machine, as information when it answers the request.
func logFailure(log klog.Logger, err error, took time.Duration) {
	switch code := status.Code(err); code {
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.Unavailable:
		log.Error(err, "Call failed", "code", code.String(), "took", took.String())
	default:
		log.Info("Call refused", "code", code.String(), "err", err.Error(), "took", took.String())
	}
}

// guarded runs the handler and turns a panic into an error.
func guarded(ctx context.Context, req any, handler grpc.UnaryHandler, log klog.Logger) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = status.Error(codes.Internal, fmt.Sprintf("BUG: panic: %v", p))
			log.Error(err, "Panic in a call", "stack", string(debug.Stack()))
		}
	}()
	return handler(ctx, req)
}
