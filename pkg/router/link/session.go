package link

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"
)

const createVolume = "/csi.v1.Controller/CreateVolume"

var answered = metadata.Pairs(AnswerKey, "1")

// session is the node's end of one link's stream.
type session struct {
	agent *Agent
	ctx   context.Context // of the agent: replicas outlive the link they were heard of on
	sent  string          // token that the controller has
	// prove makes the proof of a pool on this connection.
	prove  func(Pool) PoolProof
	proven map[string]bool // pools whose proof the controller has
}

// sync sends everything, then changes, until the stream or the agent ends.
func (s *session) sync(stream grpc.ServerStream) error {
	sub, updates := s.agent.inventory.subscribe(s.sent)
	defer s.agent.inventory.unsubscribe(sub)
	orders := make(chan Order)
	failed := make(chan error, 1)
	go func() { failed <- s.receive(stream, orders) }()
	for _, u := range updates {
		if err := s.send(stream, u); err != nil {
			return err
		}
	}
	for {
		select {
		case <-sub.wake:
			if err := s.send(stream, s.agent.inventory.take(sub)); err != nil {
				return err
			}
		case o := <-orders:
			s.agent.setReplicas(s.ctx, o.Replicas)
			if !o.Ping {
				continue
			}
			if err := s.send(stream, Update{}); err != nil {
				return err
			}
		case err := <-failed:
			return err
		case <-s.ctx.Done():
			return nil // so that a stop need not wait for the controller
		}
	}
}

// receive passes on what the controller sends. It ends with the stream, at the
// latest when its handler has returned.
func (s *session) receive(stream grpc.ServerStream, orders chan<- Order) error {
	for {
		var m wrapperspb.BytesValue
		if err := stream.RecvMsg(&m); err != nil {
			return err
		}
		var o Order
		if err := decode(m.GetValue(), &o, maxHelloItems); err != nil {
			return fmt.Errorf("not an order: %w", err)
		}
		// At once: it may be why the link ends.
		if o.Notice != "" {
			klog.FromContext(s.ctx).Info("The controller says", "notice", o.Notice)
		}
		select {
		case orders <- o:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// send adds the proofs of pools that came in after the hello.
func (s *session) send(stream grpc.ServerStream, u Update) error {
	for _, change := range u.Pools {
		if change.ID == "" || s.proven[change.ID] {
			continue
		}
		for _, p := range s.agent.inventory.known() {
			if p.ID == change.ID {
				u.Proofs = append(u.Proofs, s.prove(p))
				s.proven[p.ID] = true
			}
		}
	}
	m, err := encode(u)
	if err != nil {
		return err
	}
	return stream.SendMsg(m)
}
