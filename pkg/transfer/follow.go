package transfer

// Follower is written what passes by of a stream, and knows whether it came to its end. It
// judges nothing, and keeps no more than the header of a frame.
type Follower struct {
	skip int64 // bytes of the magic or of a payload that are still to come
	head [headerSize]byte
	have int // bytes of head
	kind byte
}

// NewFollower begins to follow a stream.
func NewFollower() *Follower { return &Follower{skip: int64(len(magic))} }

// Write never fails.
func (f *Follower) Write(b []byte) (int, error) {
	all := len(b)
	for len(b) > 0 {
		if f.skip > 0 {
			n := min(f.skip, int64(len(b)))
			f.skip -= n
			b = b[n:]
			continue
		}
		n := copy(f.head[f.have:], b)
		b = b[n:]
		if f.have += n; f.have == headerSize {
			h := decodeHeader(f.head)
			f.kind, f.skip, f.have = h.kind, int64(h.stored), 0
		}
	}
	return all, nil
}

// Ended says whether the last frame was the end, which the sender of a whole stream sends
// and one that failed does not, and whether all of it came.
func (f *Follower) Ended() bool { return f.kind == kindEnd && f.skip == 0 && f.have == 0 }
