package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/csi-loop/csi-loop/pkg/loop"
	"github.com/csi-loop/csi-loop/pkg/report"
)

// deviceRoom tells how many loop devices there may be, and are; *loop.Manager does.
type deviceRoom interface {
	Limit() int
	Attached() int
}

// numberShortFor is how long a node counts as one without free loop device numbers after
// it was refused one. A CO repeats what was refused within a few minutes.
const numberShortFor = 5 * time.Minute

// numberShortage remembers that the kernel gave no loop device number. That it would give
// one can only be learnt by asking for one, which makes it.
type numberShortage struct {
	mu   sync.Mutex
	text string    // guarded by mu
	at   time.Time // guarded by mu
}

// note takes in how an attach ended.
func (s *numberShortage) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, loop.ErrLimit) && errors.Is(err, syscall.ENOSPC):
		s.text, s.at = err.Error(), time.Now()
	case err == nil:
		s.text = ""
	}
}

// now is what the kernel said, or "".
func (s *numberShortage) now() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) > numberShortFor {
		return ""
	}
	return s.text
}

// attach is Attach of the loop devices, and remembers what they lack.
func (d *Driver) attach(ctx context.Context, backing *os.File, m loop.Mapping) (attached, error) {
	dev, err := d.loops.Attach(ctx, backing, m)
	d.numbers.note(err)
	return dev, err
}

// shortages are what this node has too little of now, whatever pool or volume it is for.
// What is in use goes on.
func (d *Driver) shortages() []report.Problem {
	var all []report.Problem
	add := func(r reason, message string) {
		all = append(all, report.Problem{Kind: report.Degraded, Reason: reasonTable[r].word, Message: withAction(message, reasonTable[r].action)})
	}
	if have, most := d.table.Attached(), d.table.Limit(); have >= most {
		add(reasonDeviceLimit, fmt.Sprintf("%d of %d loop devices are attached: no more volumes can be staged", have, most))
	}
	if text := d.numbers.now(); text != "" {
		add(reasonNoNumber, text)
	}
	return all
}
