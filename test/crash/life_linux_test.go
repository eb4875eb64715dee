package crash

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// step is one step in the life of a volume.
type step struct {
	name string
	do   func(v *volume) error
	// free steps are not RPCs, or are there to prove something: nothing happens in
	// them.
	free bool
	// ends says that the step takes something away.
	ends bool
}

func rpc(name string, do func(v *volume) error) step { return step{name: name, do: do} }

func free(name string, do func(v *volume) error) step { return step{name: name, do: do, free: true} }

func end(name string, do func(v *volume) error) step { return step{name: name, do: do, ends: true} }

// life is the whole life of a volume of kind k. To add an RPC to the tests, add it
// here, and what it makes to leftovers.
func (k kind) life() []step {
	publish, unpublish := func(v *volume) error { return v.publish(0) }, func(v *volume) error { return v.unpublish(0) }
	if k.ephemeral { // its data goes with its one publication
		return []step{rpc("publish", publish), free("write", (*volume).write), end("unpublish", unpublish)}
	}
	switch {
	case k.copied && k.fs == "xfs":
		return stagedCopyLife()
	case k.copied:
		return copiedLife()
	}
	var life []step
	if k.mapped {
		life = append(life, free("make image", (*volume).makeImage))
	} else {
		life = append(life, rpc("create", (*volume).create))
	}
	life = append(life,
		rpc("stage", (*volume).stage),
		rpc("publish", publish),
		free("write", (*volume).write))
	readOnly := !k.encrypted || k.fs != "" // a second device would need the passphrase again
	if readOnly {
		life = append(life, rpc("publish read-only", func(v *volume) error { return v.publish(1) }))
	}
	if k.grown > 0 {
		life = append(life, rpc("modify", (*volume).modify), rpc("expand image", (*volume).expandImage), rpc("expand", (*volume).expand))
	}
	if readOnly {
		life = append(life, end("unpublish read-only", func(v *volume) error { return v.unpublish(1) }))
	}
	life = append(life,
		end("unpublish", unpublish),
		end("unstage", (*volume).unstage),
		free("prove", prove))
	if k.mapped {
		return life
	}
	return append(life, end("delete", (*volume).remove))
}

// prove shows that a volume that is not staged has its data.
func prove(v *volume) error {
	for _, do := range []func(v *volume) error{
		(*volume).stage, func(v *volume) error { return v.publish(0) }, func(v *volume) error { return v.read(0) },
		func(v *volume) error { return v.unpublish(0) }, (*volume).unstage,
	} {
		if err := insist(func() error { return do(v) }); err != nil {
			return err
		}
	}
	return nil
}

// uncertain are the codes after which a CO repeats a call as it is (fact 57).
var uncertain = []codes.Code{codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded, codes.ResourceExhausted}

// untilHit does a step. On a slow machine it can be answered before it is over ("repeat
// the call"), and goes on: it is repeated then, unless the trap has sprung.
func (v *volume) untilHit(st step) error {
	end := time.Now().Add(patience)
	for {
		err := st.do(v)
		if err == nil || !slices.Contains(uncertain, status.Code(err)) || !v.trap.waits() || time.Now().After(end) {
			return err
		}
		time.Sleep(3 * time.Millisecond)
	}
}

// insist repeats a step as a CO does, until it succeeds; codes that are final are
// returned.
func insist(do func() error) error {
	end := time.Now().Add(patience)
	tick := time.NewTicker(3 * time.Millisecond)
	defer tick.Stop()
	for try := 1; ; try++ {
		err := do()
		if err == nil || !slices.Contains(uncertain, status.Code(err)) {
			return err
		}
		if try >= leastTries && time.Now().After(end) {
			return fmt.Errorf("no end in sight: %w", err)
		}
		<-tick.C
	}
}
