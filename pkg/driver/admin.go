package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The operator's service is on the kubelet's socket, which only root can reach. One
// process serves a pool, so what changes a pool is asked of that one. Its messages are
// JSON in a BytesValue.
const (
	adminService = "csiloop.node.v1.Admin"

	adminTakeIn         = "TakeIn"
	adminTemplates      = "Templates"
	adminRemoveTemplate = "RemoveTemplate"
)

// operators answers operators; *Driver does.
type operators interface {
	operate(ctx context.Context, method string, req []byte) (any, error)
}

func registerAdmin(r grpc.ServiceRegistrar, o operators) {
	desc := grpc.ServiceDesc{ServiceName: adminService, HandlerType: (*operators)(nil)}
	for _, method := range []string{adminTakeIn, adminTemplates, adminRemoveTemplate} {
		handle := func(ctx context.Context, req any) (any, error) {
			m, ok := req.(*wrapperspb.BytesValue)
			if !ok {
				return nil, errors.New("BUG: not a BytesValue")
			}
			v, err := o.operate(ctx, method, m.GetValue())
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
				return intercept(ctx, &req, &grpc.UnaryServerInfo{FullMethod: "/" + adminService + "/" + method}, handle)
			},
		})
	}
	r.RegisterService(&desc, o)
}

func (d *Driver) operate(ctx context.Context, method string, req []byte) (any, error) {
	switch method {
	case adminTakeIn:
		var r TakeInRequest
		if err := json.Unmarshal(req, &r); err != nil {
			return nil, invalidf("not a request: %v", err)
		}
		return d.TakeIn(ctx, r)
	case adminTemplates:
		pool := ""
		if err := json.Unmarshal(req, &pool); err != nil {
			return nil, invalidf("not the name of a pool: %v", err)
		}
		return d.Templates(ctx, pool)
	case adminRemoveTemplate:
		var r [2]string
		if err := json.Unmarshal(req, &r); err != nil {
			return nil, invalidf("not a pool and a template: %v", err)
		}
		return struct{}{}, d.RemoveTemplate(ctx, r[0], r[1])
	}
	return nil, status.Error(codes.Unimplemented, method)
}

// Admin is the operator's client of a node's driver that runs.
type Admin struct {
	// Conn leads to the kubelet's socket.
	Conn grpc.ClientConnInterface
}

// ErrNotServed says that nobody listens on the socket: the request reached nobody.
var ErrNotServed = errors.New("no csi-loop answers there")

// TakeIn is Driver.TakeIn.
func (a Admin) TakeIn(ctx context.Context, r TakeInRequest) (p TakeInProgress, err error) {
	err = a.ask(ctx, adminTakeIn, r, &p)
	return p, err
}

// Templates is Driver.Templates.
func (a Admin) Templates(ctx context.Context, pool string) (all []Template, err error) {
	err = a.ask(ctx, adminTemplates, pool, &all)
	return all, err
}

// RemoveTemplate is Driver.RemoveTemplate.
func (a Admin) RemoveTemplate(ctx context.Context, pool, name string) error {
	return a.ask(ctx, adminRemoveTemplate, [2]string{pool, name}, &struct{}{})
}

func (a Admin) ask(ctx context.Context, method string, req, resp any) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	var m wrapperspb.BytesValue
	var asked peer.Peer // who got the request, if a connection could be made
	err = a.Conn.Invoke(ctx, "/"+adminService+"/"+method, wrapperspb.Bytes(b), &m, grpc.Peer(&asked))
	switch s := status.Convert(err); {
	case err == nil:
		return json.Unmarshal(m.GetValue(), resp)
	case s.Code() == codes.Unavailable && asked.Addr == nil && ctx.Err() == nil:
		return fmt.Errorf("%w: %s", ErrNotServed, s.Message())
	case s.Code() == codes.Unimplemented:
		return fmt.Errorf("what answers there is no csi-loop of this version on a node: %s", s.Message())
	default:
		return errors.New(s.Message())
	}
}
