package router

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// dueContext has a deadline whose timer has not gone off.
type dueContext struct {
	context.Context

	deadline time.Time
}

func (d dueContext) Deadline() (time.Time, bool) { return d.deadline, true }

// A node may see the deadline of a call, and end its stream, before the timer of the
// controller goes off: the call is late, and the link is not to blame.
func TestDeadlineBeforeItsTimer(t *testing.T) {
	s := &session{id: Identity{Node: "a"}}
	for _, c := range []struct {
		left time.Duration
		link codes.Code
		want codes.Code
	}{
		{time.Millisecond, codes.Canceled, codes.DeadlineExceeded},
		{-time.Millisecond, codes.DeadlineExceeded, codes.DeadlineExceeded}, // gRPC looked at the clock
		{-time.Millisecond, codes.Unavailable, codes.Unavailable},
		{time.Hour, codes.Canceled, codes.Unavailable},
		{time.Hour, codes.DeadlineExceeded, codes.Unavailable},
	} {
		ctx := dueContext{t.Context(), time.Now().Add(c.left)}
		err := s.translate(ctx, "CreateVolume", status.Error(c.link, "stream terminated by RST_STREAM with error code: CANCEL"), false)
		if got := status.Code(err); got != c.want {
			t.Errorf("%s, the deadline in %s: got %s (%v), want %s", c.link, c.left, got, err, c.want)
		}
	}
}
