package image

// Look is what a look at one image finds, for those who show it.
type Look struct {
	// Allocated is how many bytes of blocks it has, shared ones too.
	Allocated int64
	// Problems are what is wrong with it, worst first. Those of its pool are not among
	// them: Pool.Health has these.
	Problems []Problem
}

// LookAt looks at a volume's image without waiting, in constant time, and reads no
// data. While a call works on the volume nothing is judged, and the blocks are those
// of the last look: what is half done is no problem. Without ok there is no such
// volume.
func (p *Pool) LookAt(id string) (look Look, ok bool) {
	dir, ok := p.dirOf(id)
	if !ok || p.store.enter() != nil {
		return Look{}, false
	}
	defer p.store.leave()
	if _, err := p.get(dir); err != nil {
		return Look{}, false
	}
	unlock, free := p.locks.tryLock(dir)
	if !free {
		return Look{Allocated: p.account.allocatedOf(dir)}, true
	}
	defer unlock()
	r, err := p.get(dir)
	if err != nil { // it may have grown, or be gone
		return Look{}, false
	}
	look.Problems = p.imageHealth(dir, r)
	if st, err := p.imageStat(dir); err == nil {
		look.Allocated = st.Allocated
	}
	return look, true
}

// SnapshotBlocks is how many bytes of blocks a snapshot has, shared ones too; 0 when
// that cannot be told.
func (p *Pool) SnapshotBlocks(id string) int64 {
	dir, ok := p.dirOf(id)
	if !ok || p.store.enter() != nil {
		return 0
	}
	defer p.store.leave()
	if st, err := statAt(p.snapshots, dir+"/"+imageFile); err == nil && st.Mode.IsRegular() {
		return st.Allocated
	}
	return 0
}

// allocatedOf is how many bytes of blocks a volume had at the last look.
func (a *account) allocatedOf(dir string) int64 {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	return a.charges[dir].allocated
}
