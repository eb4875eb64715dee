package image

import (
	"context"
	"errors"
	"slices"
	"time"

	"k8s.io/klog/v2"
)

// AbsentPool is a pool that is configured and cannot be used now.
type AbsentPool struct {
	Name string
	Path string
	Err  error // why, as last seen; wraps ErrPool
}

// member is a configured pool.
type member struct {
	config Config
	pool   *Pool // nil while it is absent
	err    error // why it is absent
	said   map[string]bool
}

// poolSet is what readers see of the members. It never changes; publish puts
// another in its place.
type poolSet struct {
	pools  []*Pool      // in the order of their configuration
	absent []AbsentPool // too
	byID   map[string]*Pool
	byName map[string]*Pool
}

// publish shows the members to readers.
func (s *Store) publish() {
	set := &poolSet{byID: map[string]*Pool{}, byName: map[string]*Pool{}}
	for _, m := range s.members {
		if m.pool == nil {
			set.absent = append(set.absent, AbsentPool{Name: m.config.Name, Path: m.config.Path, Err: m.err})
			continue
		}
		set.pools = append(set.pools, m.pool)
		set.byID[m.pool.ID()], set.byName[m.pool.Name()] = m.pool, m.pool
	}
	s.set.Store(set)
}

// Absent returns the pools that are configured and cannot be used now, in the
// order of their configuration. Each is tried again at every refresh, and is one
// of Pools from when it opens. A pool that was open and fails later stays open;
// Pool.Health tells of it.
func (s *Store) Absent() []AbsentPool { return slices.Clone(s.set.Load().absent) }

// Configured tells whether a pool of that name is configured, open or absent.
func (s *Store) Configured(name string) bool {
	return slices.ContainsFunc(s.members, func(m *member) bool { return m.config.Name == name })
}

// openAll opens those that can be opened; an error is one for all of them.
func (s *Store) openAll(ctx context.Context) error {
	var all []error
	for _, m := range s.members {
		m.err = s.try(ctx, m, false)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if _, ok := errors.AsType[*conflictError](m.err); ok {
			return m.err
		}
		s.publish()
		if m.err != nil {
			all = append(all, m.err)
		}
	}
	if len(all) > 0 && len(all) == len(s.members) && !s.mayBeNone {
		return errors.Join(all...)
	}
	for _, m := range s.members {
		s.tellAbsent(m)
	}
	s.settle(ctx)
	return nil
}

// settle finishes what pools that were opened cannot do one by one.
func (s *Store) settle(ctx context.Context) {
	s.settleGroups(ctx)
	for _, p := range s.set.Load().pools {
		if !p.settled {
			p.settled = true
			p.separateAll()
		}
	}
}

// try opens a pool as a whole, or not at all. That it is late is for pools that
// are opened while others are served.
func (s *Store) try(ctx context.Context, m *member, late bool) error {
	p := &Pool{
		config: m.config, store: s, logger: s.logger.WithValues("pool", m.config.Name), late: late, said: m.said, erasers: newErasers(s.background), //nolint:contextcheck // they outlive the call
		records: map[string]record{}, damaged: map[string]error{}, problems: map[string]Problem{},
		cuts: map[string]snapshotRecord{}, unsettled: map[string]snapshotRecord{}, groupRecords: map[string]groupRecord{}, templateRecords: map[string]templateRecord{},
		damagedCut: map[string]error{}, recounts: map[string]time.Time{}, looks: map[string]look{},
	}
	if err := p.open(ctx); err != nil {
		return errors.Join(err, p.close())
	}
	p.said, m.said = nil, nil
	m.pool = p
	return nil
}

// retry opens the absent pools that have become usable. Nobody else changes the
// members.
func (s *Store) retry(ctx context.Context) {
	for _, m := range s.members {
		if m.pool != nil {
			continue
		}
		err := s.try(ctx, m, true)
		switch {
		case err == nil:
			s.logger.Info("An absent pool is there now", "pool", m.config.Name, "path", m.config.Path,
				"poolID", m.pool.ID(), "volumes", len(m.pool.list()))
			m.err = nil
			s.publish()
			s.settle(ctx)
		case ctx.Err() != nil:
			return
		case err.Error() != m.err.Error(): // what a person would read; nothing is decided by it
			m.err = err
			s.publish()
			s.tellAbsent(m)
		}
	}
}

// tellAbsent logs that a pool is absent: at the start, and when the reason changes.
func (s *Store) tellAbsent(m *member) {
	if m.err != nil {
		s.logger.Error(m.err, "A pool is absent; its volumes are not served until it can be opened", "pool", m.config.Name, "path", m.config.Path)
	}
}

// once is the logger for a line of opening the pool. It is silent when an earlier
// attempt has logged that line.
func (p *Pool) once(line string) klog.Logger {
	if p.said[line] {
		return klog.Logger{}
	}
	p.said[line] = true
	return p.logger
}

// ledger is the free space of the filesystem with that key.
func (s *Store) ledger(key string) *ledger {
	if s.ledgers[key] == nil {
		s.ledgers[key] = newLedger()
	}
	return s.ledgers[key]
}

// WithoutPools lets Open succeed when no pool can be used now: all are absent then,
// and tried again. It is for a node that has volumes to let go of.
func WithoutPools() Option { return func(s *Store) { s.mayBeNone = true } }
