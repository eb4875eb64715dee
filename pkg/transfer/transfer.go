package transfer

import (
	"context"
	"io"
	"time"
)

const (
	// BeatEvery is the pause between beats of a sender that has nothing else to send.
	BeatEvery = 10 * time.Second
	// IdleTime is how long one end waits for the other: for a frame, or that one is
	// taken.
	IdleTime = time.Minute
)

// Request is which content one node shall send.
type Request struct {
	// Snapshot and Volume are IDs; one of them is "".
	Snapshot string `json:"snapshot,omitempty"`
	Volume   string `json:"volume,omitempty"`
	// Parameters are those of the new volume's class that concern its source.
	Parameters map[string]string `json:"parameters,omitempty"`
}

// String names the source, for people.
func (r Request) String() string {
	if r.Snapshot != "" {
		return "snapshot " + r.Snapshot
	}
	return "volume " + r.Volume
}

// ID is the source's.
func (r Request) ID() string { return r.Snapshot + r.Volume }

// Description is what a source is.
type Description struct {
	Size        int64    `json:"size"` // bytes
	Filesystem  string   `json:"filesystem,omitempty"`
	BlockSize   int      `json:"blockSize"`
	MkfsOptions []string `json:"mkfsOptions,omitempty"`
	// Encryption is how the content is encrypted, "" if it is not. It travels as it is.
	Encryption string `json:"encryption,omitempty"`
	// Bytes is how much data there is to send; known when it is sent.
	Bytes int64 `json:"bytes,omitempty"`
}

// SenderError is why the sender cannot send.
type SenderError struct {
	// Code is a gRPC code.
	Code    uint32 `json:"code"`
	Message string `json:"message"`
}

func (f *SenderError) Error() string { return "the source's node: " + f.Message }

// Offer lets a node that makes a copy read the source, which another node has.
type Offer struct {
	Source Description
	// Open connects to the source, and returns what a Writer there writes. It can be
	// used once. The stream ends with ctx.
	Open func(ctx context.Context) (io.ReadCloser, error)
}

type offerKey struct{}

// WithOffer puts an offer into the context of the call that it came with.
func WithOffer(ctx context.Context, o *Offer) context.Context {
	return context.WithValue(ctx, offerKey{}, o)
}

// OfferOf returns the offer that came with a call, or nil.
func OfferOf(ctx context.Context) *Offer {
	o, _ := ctx.Value(offerKey{}).(*Offer)
	return o
}
