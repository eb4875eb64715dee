package link

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/csi-loop/csi-loop/pkg/report"
)

// ReportService and ReportMethod name what a node answers about itself: a page of its
// report, JSON in a BytesValue as all of a link's own messages.
const (
	ReportService = "/csiloop.link.v1.Report/"
	ReportMethod  = "Report"
)

// reporter answers on the node.
type reporter interface {
	page(ctx context.Context, next string) (report.Page, error)
}

// reporterFunc makes a reporter of what Config has.
type reporterFunc func(context.Context) (report.Machine, error)

func (f reporterFunc) page(ctx context.Context, next string) (report.Page, error) {
	m, err := f(ctx)
	if err != nil {
		return report.Page{}, status.FromContextError(err).Err()
	}
	p, ok := m.Page(next)
	if !ok {
		return p, status.Errorf(codes.InvalidArgument, "%.100q is no page", next)
	}
	return p, nil
}

// registerReport adds the report to a node's server.
func registerReport(r grpc.ServiceRegistrar, source reporter) {
	handle := func(ctx context.Context, req any) (any, error) {
		m, ok := req.(*wrapperspb.BytesValue)
		if !ok {
			return nil, status.Error(codes.Internal, "BUG: not a BytesValue")
		}
		p, err := source.page(ctx, string(m.GetValue()))
		if err != nil {
			return nil, err
		}
		return encode(p)
	}
	r.RegisterService(&grpc.ServiceDesc{
		ServiceName: ReportService[1 : len(ReportService)-1],
		HandlerType: (*reporter)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: ReportMethod,
			Handler: func(_ any, ctx context.Context, decode func(any) error, intercept grpc.UnaryServerInterceptor) (any, error) {
				var req wrapperspb.BytesValue
				if err := decode(&req); err != nil {
					return nil, err
				}
				return intercept(ctx, &req, &grpc.UnaryServerInfo{FullMethod: ReportService + ReportMethod}, handle)
			},
		}},
	}, source)
}

// maxPageItems bounds the items of a page: some hundred for each of its volumes.
const maxPageItems = 256 * report.PageSize

// FetchReport asks a node for a page of its report; "" is the first. It returns how many
// bytes the page came in.
func FetchReport(ctx context.Context, conn grpc.ClientConnInterface, next string, opts ...grpc.CallOption) (p report.Page, size int, err error) {
	var m wrapperspb.BytesValue
	if err := conn.Invoke(ctx, ReportService+ReportMethod, wrapperspb.Bytes([]byte(next)), &m, opts...); err != nil {
		return p, 0, err
	}
	if err := decode(m.GetValue(), &p, maxPageItems); err != nil {
		return report.Page{}, 0, fmt.Errorf("not a page of a report: %w", err)
	}
	if n := max(len(p.Volumes), len(p.Snapshots), len(p.Templates)); n > report.PageSize {
		return report.Page{}, 0, fmt.Errorf("not a page of a report: %d entries", n)
	}
	return p, len(m.GetValue()), nil
}
