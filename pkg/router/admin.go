package router

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The operator's service is on the sidecars' socket: whoever reaches that can delete
// volumes anyway. Its messages are JSON in a BytesValue, as those of the links.
const (
	adminService = "csiloop.admin.v1.Admin"

	adminOrphans = "Orphans"
	adminRemove  = "RemoveOrphan"
	adminNodes   = "Nodes"
)

// admin answers operators.
type admin interface {
	answer(ctx context.Context, method string, req []byte) (any, error)
}

// registerAdmin adds the operator's service to the sidecars' server.
func registerAdmin(r grpc.ServiceRegistrar, a admin) {
	desc := grpc.ServiceDesc{ServiceName: adminService, HandlerType: (*admin)(nil)}
	for _, method := range []string{adminOrphans, adminRemove, adminNodes} {
		full := "/" + adminService + "/" + method
		handle := func(ctx context.Context, req any) (any, error) {
			m, ok := req.(*wrapperspb.BytesValue)
			if !ok {
				return nil, status.Error(codes.Internal, "BUG: not a BytesValue")
			}
			v, err := a.answer(ctx, method, m.GetValue())
			if err != nil {
				return nil, err
			}
			b, err := json.Marshal(v)
			return wrapperspb.Bytes(b), err
		}
		desc.Methods = append(desc.Methods, grpc.MethodDesc{
			MethodName: method,
			Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
				var req wrapperspb.BytesValue
				if err := decode(&req); err != nil {
					return nil, err
				}
				return intercept(ctx, &req, &grpc.UnaryServerInfo{FullMethod: full}, handle)
			},
		})
	}
	r.RegisterService(&desc, a)
}

func (r *Router) answer(ctx context.Context, method string, req []byte) (any, error) {
	switch method {
	case adminNodes:
		return r.Nodes(), nil
	case adminOrphans:
		report, err := r.Orphans(ctx)
		return report, admitted(err)
	case adminRemove:
		var id string
		if err := json.Unmarshal(req, &id); err != nil {
			return nil, invalidf("not a volume ID: %v", err)
		}
		return struct{}{}, admitted(r.RemoveOrphan(ctx, id))
	}
	return nil, status.Error(codes.Unimplemented, method)
}

// admitted gives an error of the API server a code.
func admitted(err error) error {
	if _, is := status.FromError(err); is || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return unavailablef("%v", err)
}

// Admin is the operator's client of a controller.
type Admin struct {
	// Conn leads to the sidecars' socket.
	Conn grpc.ClientConnInterface
}

// Orphans has the controller look for orphans now.
func (a Admin) Orphans(ctx context.Context) (report OrphanReport, err error) {
	err = a.ask(ctx, adminOrphans, nil, &report)
	return report, err
}

// RemoveOrphan has the controller remove an orphan.
func (a Admin) RemoveOrphan(ctx context.Context, id string) error {
	return a.ask(ctx, adminRemove, id, &struct{}{})
}

// Nodes lists the nodes that the controller knows.
func (a Admin) Nodes(ctx context.Context) (nodes []Node, err error) {
	err = a.ask(ctx, adminNodes, nil, &nodes)
	return nodes, err
}

func (a Admin) ask(ctx context.Context, method string, req, resp any) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	var m wrapperspb.BytesValue
	if err := a.Conn.Invoke(ctx, "/"+adminService+"/"+method, wrapperspb.Bytes(b), &m); err != nil {
		if s := status.Convert(err); s.Code() == codes.Unimplemented {
			return fmt.Errorf("csi-loop in --mode=controller does not answer there: %s", s.Message())
		}
		return errors.New(status.Convert(err).Message())
	}
	return json.Unmarshal(m.GetValue(), resp)
}
