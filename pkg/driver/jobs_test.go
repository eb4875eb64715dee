package driver

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
)

// slow is a job that ends when told to, or is cancelled.
type slow struct {
	started int
	end     chan error

	mu    sync.Mutex
	ended error // guarded by mu
}

func (s *slow) prepare() (func(ctx context.Context) error, error) {
	s.started++
	return func(ctx context.Context) error {
		var err error
		select {
		case err = <-s.end:
		case <-ctx.Done():
			err = ctx.Err()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ended = err
		return err
	}, nil
}

func (s *slow) result() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

func TestJobsGoOnWithoutTheCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, s := newJobs(), &slow{end: make(chan error)}
		defer j.stop()
		ask := func(ctx context.Context) error { return j.do(ctx, "k", "M", "p", s.prepare) }
		start := time.Now()
		if err := ask(t.Context()); codeOf(err) != codes.Aborted || time.Since(start) >= 10*time.Second {
			t.Fatalf("%v after %v", err, time.Since(start))
		}
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		if err := ask(canceled); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if err := j.do(t.Context(), "k", "M", "other", s.prepare); codeOf(err) != codes.Aborted {
			t.Fatal(err)
		}
		for range 100 { // asked again and again, it goes on for long
			time.Sleep(9 * time.Minute)
			if err := ask(t.Context()); codeOf(err) != codes.Aborted {
				t.Fatal(err)
			}
		}
		s.end <- nil
		if err := ask(t.Context()); err != nil || s.started != 1 {
			t.Fatal(err, s.started)
		}
		if len(j.all) != 0 {
			t.Error("a result that was taken is kept")
		}
	})
}

func TestJobsFailureIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, s := newJobs(), &slow{end: make(chan error)}
		defer j.stop()
		ask := func(wish string) error { return j.do(t.Context(), "k", "M", wish, s.prepare) }
		_ = ask("p")
		failed := errors.New("failed")
		s.end <- failed
		synctest.Wait()
		if err := ask("p"); !errors.Is(err, failed) {
			t.Fatal(err)
		}
		_ = ask("p")
		s.end <- failed
		synctest.Wait()
		if err := ask("another"); codeOf(err) != codes.Aborted || s.started != 3 {
			t.Fatalf("another request got the result: %v, %d started", err, s.started)
		}
	})
}

func TestJobsEndWhenNobodyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, s := newJobs(), &slow{end: make(chan error)}
		_ = j.do(t.Context(), "k", "M", "p", s.prepare)
		time.Sleep(jobInterest - time.Second)
		if s.result() != nil {
			t.Fatal("ended early")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !errors.Is(s.result(), context.Canceled) {
			t.Fatal("goes on")
		}
		time.Sleep(jobInterest)
		synctest.Wait()
		if len(j.all) != 0 {
			t.Error("a result that nobody wants is kept")
		}
		j.stop()
		if err := j.do(t.Context(), "k", "M", "p", s.prepare); codeOf(err) != codes.Unavailable {
			t.Error(err)
		}
	})
}

func TestJobsStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j, s := newJobs(), &slow{end: make(chan error)}
		_ = j.do(t.Context(), "k", "M", "p", s.prepare)
		j.stop()
		if !errors.Is(s.result(), context.Canceled) {
			t.Error("stop does not wait")
		}
	})
}
