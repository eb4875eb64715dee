package driver

import (
	"context"
	"sync"
	"time"

	"k8s.io/klog/v2"
)

const (
	// jobPatience is how long a call waits for a job before it answers ABORTED, and
	// lets it go on.
	jobPatience = 8 * time.Second
	// jobInterest is how long a job goes on that no call asks about.
	jobInterest = 10 * time.Minute
)

// jobs is work that may take longer than a call: copies. A call starts a job or joins
// the one that an earlier call started, waits a while, and is answered ABORTED when
// that was not enough; whoever repeats it until it succeeds gets what the job made. A
// call that ends does not end the job; that nobody asks any more does.
type jobs struct {
	patience, interest time.Duration

	mu     sync.Mutex
	all    map[string]*job // guarded by mu
	closed bool            // guarded by mu
	wg     sync.WaitGroup  // Add is guarded by mu
	// observers are told of each job that begins and ends; guarded by mu
	observers map[int]func(key, method string, running bool)
	next      int // guarded by mu
}

type job struct {
	method string
	wish   string // what was asked for; another request is not answered by this job
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed

	waiting int         // guarded by jobs.mu
	bored   *time.Timer // ends the job, or forgets its result; guarded by jobs.mu
}

func newJobs() *jobs {
	return &jobs{patience: jobPatience, interest: jobInterest, all: map[string]*job{}}
}

// do runs the job with the key: prepare takes what it needs (locks, which work must
// give back) and returns the work. A job that failed while nobody waited is told to
// the next call that asks the same, once.
func (j *jobs) do(ctx context.Context, key, method, wish string, prepare func() (work func(ctx context.Context) error, err error)) error {
	done, err := j.await(ctx, j.patience, key, method, wish, prepare)
	if err == nil && !done {
		return abortedf("%s of %q goes on: repeat the call until it succeeds", method, key)
	}
	return err
}

// await is do for callers that are told in another way that the job is not done.
func (j *jobs) await(ctx context.Context, patience time.Duration, key, method, wish string, prepare func() (work func(ctx context.Context) error, err error)) (done bool, err error) {
	job, err := j.join(ctx, key, method, wish, prepare)
	if err != nil {
		return false, err
	}
	defer j.leave(key, job)
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-job.done:
		return true, job.err
	case <-timer.C:
		return false, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// end cancels a job, waits until it has taken back what it did, and forgets it.
func (j *jobs) end(key, method, wish string) {
	j.mu.Lock()
	job, ok := j.all[key]
	j.mu.Unlock()
	if ok && job.method == method && job.wish == wish {
		job.cancel()
		<-job.done
		j.mu.Lock()
		defer j.mu.Unlock()
		j.drop(key, job)
	}
}

// forget forgets how a job ended. Who waited for it is told all the same.
func (j *jobs) forget(key, method string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if job, ok := j.all[key]; ok && job.method == method && job.ended() {
		j.drop(key, job)
	}
}

// join finds the job, or starts it.
func (j *jobs) join(ctx context.Context, key, method, wish string, prepare func() (func(ctx context.Context) error, error)) (*job, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if have, ok := j.all[key]; ok {
		switch {
		case have.method == method && have.wish == wish:
			have.waiting++
			have.bored.Stop()
			return have, nil
		case !have.ended():
			return nil, &busyError{key: key, method: have.method}
		}
		j.drop(key, have)
	}
	if j.closed {
		return nil, unavailablef("the driver is stopping")
	}
	work, err := prepare()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	started := &job{method: method, wish: wish, cancel: cancel, done: make(chan struct{}), waiting: 1}
	started.bored = time.AfterFunc(j.interest, func() { j.bored(key, started) })
	started.bored.Stop()
	j.all[key] = started
	j.tell(key, method, true)
	j.wg.Go(func() {
		defer cancel()
		defer close(started.done)
		defer func() {
			j.mu.Lock()
			defer j.mu.Unlock()
			j.tell(key, method, false)
		}()
		started.err = guardedWork(ctx, work)
	})
	return started, nil
}

// tell tells the observers. Precondition: j.mu is held.
func (j *jobs) tell(key, method string, running bool) {
	for _, f := range j.observers {
		f(key, method, running)
	}
}

// observe has f told of the jobs that run, and of each that begins and ends, in order
// for each key, until stop. f must not ask for jobs.
func (j *jobs) observe(f func(key, method string, running bool)) (stop func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.observers == nil {
		j.observers = map[int]func(key, method string, running bool){}
	}
	n := j.next
	j.next++
	j.observers[n] = f
	for key, job := range j.all {
		if !job.ended() {
			f(key, job.method, true)
		}
	}
	return func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(j.observers, n)
	}
}

// guardedWork turns a panic into an error, as the calls do.
func guardedWork(ctx context.Context, work func(ctx context.Context) error) error {
	_, err := guarded(ctx, nil, func(ctx context.Context, _ any) (any, error) { return nil, work(ctx) }, klog.FromContext(ctx))
	return err
}

func (job *job) ended() bool {
	select {
	case <-job.done:
		return true
	default:
		return false
	}
}

// leave ends the waiting of one call. A result that a call has taken is forgotten.
func (j *jobs) leave(key string, job *job) {
	j.mu.Lock()
	defer j.mu.Unlock()
	job.waiting--
	switch {
	case job.waiting > 0:
	case job.ended():
		j.drop(key, job)
	default:
		job.bored.Reset(j.interest)
	}
}

// Precondition: j.mu is held.
func (j *jobs) drop(key string, job *job) {
	job.bored.Stop()
	if j.all[key] == job {
		delete(j.all, key)
	}
}

// bored is called when nobody asked for the interest's time.
func (j *jobs) bored(key string, job *job) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if job.waiting > 0 {
		return
	}
	if !job.ended() {
		job.cancel()
		job.bored.Reset(j.interest) // to forget it
		return
	}
	j.drop(key, job)
}

// stop cancels all jobs and waits for them to take back what they did.
func (j *jobs) stop() {
	j.mu.Lock()
	j.closed = true
	for _, job := range j.all {
		job.cancel()
		job.bored.Stop()
	}
	j.mu.Unlock()
	j.wg.Wait()
}
