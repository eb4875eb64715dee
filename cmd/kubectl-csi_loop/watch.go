package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// watched is what is looked at over and over.
type watched struct {
	// look makes a picture; done: it is the last one.
	look func(ctx context.Context) (p picture, done bool, err error)
	// draw shows it. Without fresh it is the last one again, with another note.
	draw func(p picture, fresh bool) error
	// strict: a look that fails is the end.
	strict bool
}

// watch looks at once and then at every tick, until done, or ctx ends, which is the error
// then. A look that fails leaves the last picture with a note, unless the next one would
// fail as well, or there is none yet.
func (o *options) watch(ctx context.Context, w watched) error {
	ticks, stop := o.tick(o.every)
	defer stop()
	var last picture
	var at time.Time
	for {
		p, done, err := o.lookInTime(ctx, w)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && (at.IsZero() || w.strict || lasting(err)):
			return err
		case err != nil:
			p = last
			p.notes = append(slices.Clone(last.notes), fmt.Sprintf("nothing new since %s: %v", at.Format(time.TimeOnly), err))
			err = w.draw(p, false)
		default:
			last, at = p, time.Now()
			err = w.draw(p, true)
		}
		if err != nil || done {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticks:
		}
	}
}

func (o *options) lookInTime(ctx context.Context, w watched) (picture, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	return w.look(ctx)
}

// lasting tells whether asking again is of no use.
func lasting(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) }
