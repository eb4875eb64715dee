package transfer

import (
	"bytes"
	"testing"
)

// A stream is seen to its end in whatever pieces it comes, and one that was cut, or ends
// with a failure, is not.
func TestFollower(t *testing.T) {
	b, _, d := stream(t)
	var failed bytes.Buffer
	w := NewWriter(&failed)
	must(t, w.Head(d))
	must(t, w.Data(0, []byte("some")))
	must(t, w.Fail(SenderError{Code: 9, Message: "in use"}))
	for name, c := range map[string]struct {
		stream []byte
		ended  bool
	}{
		"whole":                   {b, true},
		"cut before the end":      {b[:len(b)-headerSize-32], false},
		"cut in the end's header": {b[:len(b)-33], false},
		"cut in the end":          {b[:len(b)-1], false},
		"goes on":                 {append(bytes.Clone(b), 0), false},
		"failed":                  {failed.Bytes(), false},
		"nothing":                 {nil, false},
		"only the magic":          {b[:len(magic)], false},
	} {
		for _, piece := range []int{1, 7, headerSize, 4096, len(b) + 1} {
			f := NewFollower()
			for at := 0; at < len(c.stream); at += piece {
				part := c.stream[at:min(at+piece, len(c.stream))]
				if n, err := f.Write(part); n != len(part) || err != nil {
					t.Fatal(n, err)
				}
			}
			if f.Ended() != c.ended {
				t.Errorf("%s in pieces of %d: %t", name, piece, f.Ended())
			}
		}
	}
}
