package image

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"time"
)

// Remove makes the volume not exist; an ID that is unknown here is success. When
// it returns nil the removal is on disk. The blocks are free by then, or, for large
// images, soon after: Usage tells the truth, and Close waits for it. Errors:
// ErrDamaged for a volume whose record cannot be read, ErrPool, ctx's.
//
// Precondition: nothing uses the image (fact 37).
func (p *Pool) Remove(ctx context.Context, id string) error {
	dir, ok := p.dirOf(id)
	if !ok {
		return nil
	}
	leave, err := p.enter(ctx, dir)
	if err != nil {
		return err
	}
	defer leave()
	r, err := p.get(dir)
	switch {
	case errors.Is(err, ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	p.log(ctx).Info("Removing a volume, as asked", "volume", id, "size", r.Size)
	gone := gonePrefix + dir + "-" + rand.Text()[:8]
	err = renameNew(p.volumes, dir, p.root, gone)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // removed by hand: then only forget it
		return opError("remove", dir, err)
	}
	p.store.kill("remove: renamed")
	if err := p.volumes.Sync(); err != nil {
		// If that fails too it is still known, so that the next call syncs before it answers.
		_ = renameNew(p.root, gone, p.volumes, dir)
		return opError("sync", volumesDir, err)
	}
	p.store.kill("remove: committed")
	p.forget(dir)
	shared := p.account.sharedOf(dir) > 0
	p.account.drop(dir)
	await(ctx, p.eraseAll(gone))
	if shared {
		p.endClaims(ctx, p.near(Source{Volume: id}, p.volumeOf(r.Source)))
		// Others may have shared with it by what is gone. They may be many.
		p.recountSoon(p.account.sharedDirs())
	}
	return nil
}

// lag waits for removed volumes' blocks to be seen free: a large image is still being
// erased, XFS frees them in the background and btrfs with its next commit, up to 30 s
// after the unlink. False when waiting (more) is of no use.
func (p *Pool) lag(ctx context.Context, attempt int) bool {
	erasing := attempt == 0 && p.erasers.wait(ctx)
	if p.recount(ctx) {
		return true // what is not shared any more is not needed twice
	}
	if p.fsType == "xfs" && attempt <= 1 && len(p.account.sharedDirs()) > 0 && freeSpeculative(p.root) == nil {
		return true
	}
	freed := p.freed.Load()
	if freed == 0 || p.store.now().Sub(time.Unix(0, freed)) > time.Minute {
		return erasing
	}
	switch {
	case p.fsType == "btrfs" && attempt <= 1: // 1 when sharing was looked at before
		return commitBtrfs(p.root) == nil
	case p.fsType == "xfs" && attempt <= 10:
		t := time.NewTimer(10 * time.Millisecond)
		defer t.Stop()
		select {
		case <-t.C:
			return true
		case <-ctx.Done():
		}
	}
	return erasing || attempt == 0 // the erasing may have ended after the look at the space
}
