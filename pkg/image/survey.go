package image

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"time"
)

// A surveyor looks for what has to change in a filesystem that gets another identity.
// It refuses whatever it does not fully understand.
type surveyor struct {
	*blocks
	plan
	uuids       []uuid
	begun, done time.Time // when mkfs ran
	err         error     // the first
}

// survey makes the plan for a filesystem that mkfs made between begun and done, and
// returns its identity (without a time). An error is the reason why there is none.
func survey(filesystem string, c *blocks, begun, done time.Time) (*plan, fsIdentity, error) {
	s := &surveyor{blocks: c, begun: begun, done: done}
	switch filesystem {
	case "xfs":
		s.xfs()
	case "btrfs":
		s.btrfs()
	default:
		s.ext()
	}
	if s.err == nil {
		s.nothingForgotten()
	}
	if s.err != nil {
		return nil, fsIdentity{}, s.err
	}
	id := fsIdentity{uuids: s.uuids}
	again := bytes.Clone(c.data)
	if s.stamp(again, id); !bytes.Equal(again, c.data) {
		return nil, fsIdentity{}, errors.New("a checksum is not what it should be")
	}
	return &s.plan, id, nil
}

func (s *surveyor) refusef(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf(format, args...)
	}
}

// bytes returns a range of the image; nil, and an error of the survey, if some of it
// is not there.
func (s *surveyor) bytes(offset int64, n int) []byte {
	if at, ok := s.find(offset, n); ok {
		return s.data[at : at+n]
	}
	s.refusef("nothing at %d", offset)
	return nil
}

// place is where a range of the image is in data.
func (s *surveyor) place(offset int64, n int) int32 {
	at, ok := s.find(offset, n)
	if !ok {
		s.refusef("nothing at %d", offset)
	}
	return int32(at)
}

// add notes a place of the image that holds a UUID, or what is made of one.
func (s *surveyor) add(offset int64, kind fieldKind, which int) {
	s.fields = append(s.fields, field{at: s.place(offset, kind.width()), kind: kind, which: uint8(which)})
}

// clockSteps is what the clock may have been set by while mkfs ran.
const clockSteps = time.Minute

// time notes a place that holds when mkfs ran. One that is 0 stays; anything else is
// no time.
func (s *surveyor) time(offset int64, kind fieldKind) {
	b := s.bytes(offset, kind.width())
	if b == nil {
		return
	}
	switch t := kind.time(b); {
	case t.Unix() == 0 || allZero(b):
	case t.Before(s.begun.Add(-clockSteps)) || t.After(s.done.Add(clockSteps)):
		s.refusef("%v at %d is not between %v and %v, when it was made", t, offset, s.begun, s.done)
	default:
		s.add(offset, kind, 0)
	}
}

// nothingForgotten: a UUID is random, so each place where its bytes are holds it.
func (s *surveyor) nothingForgotten() {
	for i, u := range s.uuids {
		if u == (uuid{}) {
			s.refusef("UUID %d is zero", i)
		}
		known := 0
		for _, x := range s.fields {
			if x.kind == wholeUUID && int(x.which) == i {
				known++
			}
		}
		if n := bytes.Count(s.data, u[:]); n != known {
			s.refusef("UUID %d is in %d places, and %d are known", i, n, known)
		}
	}
	if len(s.data) > math.MaxInt32 {
		s.refusef("too large")
	}
}
