package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestBusyStaging: somebody works in the staging mount. Unstage says busy, takes nothing away, and
// succeeds when he is gone.
func TestBusyStaging(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs, btrfs, mapped} {
		v := s.volume(k, "busy-"+k.name).up()
		v.step("write", v.write(0))
		v.step("unpublish", v.unpublish(0))
		f, err := os.OpenFile(filepath.Join(v.staging(), "data-0"), os.O_RDWR, 0)
		must(t, err)
		device := v.device()
		wantCode(t, "unstage while a file is open", v.unstage(), codes.Aborted)
		if v.device() != device || len(mountsBelow(v.dir+"/stage")) != 1 {
			t.Errorf("%s: the device was %s and is %q, mounts: %q", k.name, device, v.device(), mountsBelow(v.dir+"/stage"))
		}
		// Not lazily unmounted: the path is still the volume, and it works.
		must(t, compareFile(filepath.Join(v.staging(), "data-0"), v.pattern(0), 0))
		_, err = f.WriteAt([]byte("still here"), 0)
		must(t, errors.Join(err, f.Sync()))
		v.step("stage while it is staged", v.stage())
		v.step("publish while a file is open", v.publish(0, false))
		v.step("unpublish", v.unpublish(0))
		must(t, f.Close())
		v.step("unstage", v.unstage())
		v.step("delete", v.remove())
	}
}

// TestBusyTarget: the same for a target and its unpublishing.
func TestBusyTarget(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(ext4, "busy-target").up()
	v.step("write", v.write(0))
	cmd := exec.Command("sleep", "1000")
	cmd.Dir = v.target(0)
	must(t, cmd.Start())
	wantCode(t, "unpublish while it is a working directory", v.unpublish(0), codes.Aborted)
	v.step("read", v.read(0, 0))
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	v.down()
}

// TestBusyDevice: somebody has the device of a raw volume open, also without a publication.
func TestBusyDevice(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	v := s.volume(block, "busy-device").up()
	v.step("write", v.write(0))
	v.step("unpublish", v.unpublish(0))
	f, err := os.OpenFile(v.device(), os.O_RDWR, 0)
	must(t, err)
	device := v.device()
	wantCode(t, "unstage while the device is open", v.unstage(), codes.Aborted)
	if v.device() != device {
		t.Errorf("the device was %s and is %q", device, v.device())
	}
	_, err = f.WriteAt([]byte("still here"), 0)
	must(t, errors.Join(err, f.Sync()))
	wantCode(t, "delete while the device is open", v.remove(), codes.FailedPrecondition)
	must(t, f.Close())
	v.step("unstage", v.unstage())
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	v.step("size", v.checkSize())
	v.down()
}

// TestBusyDeviceThenKill: the driver dies while a detach waits for the last user.
func TestBusyDeviceThenKill(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	v := s.volume(block, "busy-kill").up()
	v.step("unpublish", v.unpublish(0))
	f, err := os.OpenFile(v.device(), os.O_RDWR, 0)
	must(t, err)
	wantCode(t, "unstage while the device is open", v.unstage(), codes.Aborted)
	s.kill()
	s.start()
	wantCode(t, "delete after a restart", v.remove(), codes.FailedPrecondition)
	if err := v.stage(); err != nil && status.Code(err) != codes.Aborted && status.Code(err) != codes.FailedPrecondition {
		t.Errorf("stage over a device that is running down: %s", explain(err))
	}
	must(t, f.Close())
	v.step("unstage", insist(context.Background(), v.unstage))
	v.step("stage", insist(context.Background(), v.stage))
	v.step("publish", v.publish(0, false))
	v.down()
}

// TestUnstageWhilePublished is refused and changes nothing.
func TestUnstageWhilePublished(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, xfs, btrfs, block, mapped} {
		v := s.volume(k, "published-"+k.name).up()
		v.step("publish read-only", v.publish(1, true))
		wantCode(t, "unstage", v.unstage(), codes.FailedPrecondition, v.target(0))
		wantCode(t, "delete", v.removeOnly(), codes.FailedPrecondition)
		v.step("write", v.write(0))
		v.step("read", v.read(0, 0))
		v.step("unpublish", v.unpublish(0))
		wantCode(t, "unstage with the reader left", v.unstage(), codes.FailedPrecondition, v.target(1))
		s.kill()
		s.start()
		wantCode(t, "unstage with the reader left, after a restart", v.unstage(), codes.FailedPrecondition, v.target(1))
		v.step("read", v.read(0, 1))
		v.step("unpublish", v.unpublish(1))
		v.step("unstage", v.unstage())
		v.step("delete", v.remove())
	}
}

// removeOnly asks for the removal; a mapped volume has none, which is refused here as well.
func (v *volume) removeOnly() error {
	if v.mapped {
		return status.Error(codes.FailedPrecondition, "not a volume of a pool")
	}
	return v.remove()
}

// TestForeignMount: somebody mounted something else at our paths; it is not taken away.
func TestForeignMount(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(ext4, "foreign-mount")
	v.step("create", v.create())
	must(t, os.MkdirAll(v.staging(), 0o750))
	must(t, unix.Mount("tmpfs", v.staging(), "tmpfs", 0, "size=1m"))
	must(t, os.WriteFile(filepath.Join(v.staging(), "precious"), nil, 0o600))
	wantCode(t, "stage over somebody's mount", v.stage(), codes.FailedPrecondition, v.staging())
	if d := v.device(); d != "" {
		t.Errorf("%s is left bound after a refused stage", d)
	}
	wantCode(t, "unstage of somebody's mount", v.unstage(), codes.FailedPrecondition)
	must(t, unix.Unmount(v.staging(), 0))
	v.step("stage", v.stage())
	must(t, os.Mkdir(v.target(0), 0o750))
	must(t, unix.Mount("tmpfs", v.target(0), "tmpfs", 0, "size=1m"))
	must(t, os.WriteFile(filepath.Join(v.target(0), "precious"), nil, 0o600))
	if err := v.publish(0, false); err == nil {
		t.Errorf("publish over somebody's mount succeeds")
	} else if c := status.Code(err); c != codes.FailedPrecondition && c != codes.AlreadyExists {
		t.Errorf("publish over somebody's mount: %s", explain(err))
	}
	wantCode(t, "unpublish of somebody's mount", v.bareUnpublish(0), codes.FailedPrecondition)
	if _, err := os.Stat(filepath.Join(v.target(0), "precious")); err != nil {
		t.Error(err)
	}
	must(t, unix.Unmount(v.target(0), 0))
	v.step("publish", v.publish(0, false))
	v.down()
}

// TestStopWhileCallsRun: SIGTERM lets running calls finish, ends with 0, and leaves volumes mounted.
func TestStopWhileCallsRun(t *testing.T) {
	s := newSite(t, siteConfig{})
	stays := []*volume{s.volume(ext4, "stays-ext4").up(), s.volume(block, "stays-block").up()}
	for _, v := range stays {
		v.step("write", v.write(0))
	}
	for round := range times(1, 4, 20) {
		// Clients create volumes until they are refused.
		var mu sync.Mutex
		var made, refused []*volume
		var wg, begun sync.WaitGroup
		begun.Add(6)
		for i := range 6 {
			wg.Go(func() {
				for n := 0; ; n++ {
					v := s.volume([]kind{xfs, btrfs, ext4}[i%3], fmt.Sprintf("stop-%d-%d-%d", round, i, n))
					err := repeated(v.create)
					if n == 0 {
						begun.Done()
					}
					mu.Lock()
					if err == nil {
						made = append(made, v)
					} else {
						refused = append(refused, v)
					}
					mu.Unlock()
					if code := status.Code(err); err != nil && code != codes.Unavailable {
						t.Errorf("a create during the stop: %s", explain(err))
					}
					if err != nil {
						return
					}
				}
			})
		}
		begun.Wait()
		p := s.process()
		must(t, p.cmd.Process.Signal(syscall.SIGTERM))
		wg.Wait()
		if code := p.ended(t); code != 0 {
			t.Errorf("csi-loop ends with exit code %d\n%s", code, p.tail(10))
		}
		for _, v := range stays {
			v.step("read without a driver", v.read(0, 0))
		}
		s.start()
		have := s.volumes()
		for _, v := range made {
			if !slices.Contains(have, v.id) {
				t.Errorf("volume %q was acknowledged and is lost", v.id)
			}
		}
		if want := len(made) + len(stays); len(have) != want {
			t.Errorf("%d volumes, want %d: a call was carried out and not answered", len(have), want)
		}
		for _, v := range append(made, refused...) {
			v.step("create again", repeated(v.create))
			v.step("delete", repeated(v.remove))
		}
		t.Logf("%d calls finished, %d were refused", len(made), len(refused))
	}
	for _, v := range stays {
		v.step("read", v.read(0, 0))
		v.down()
	}
}

// TestSocketIsPrivate (F17): one socket, for its owner only; a stale one is replaced.
func TestSocketIsPrivate(t *testing.T) {
	s := newSite(t, siteConfig{})
	st, err := os.Stat(s.socket)
	must(t, err)
	if st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket's mode is %s", st.Mode())
	}
	s.kill()
	if _, err := os.Stat(s.socket); err != nil {
		t.Errorf("a killed process leaves its socket: %v", err)
	}
	s.start()
	s.stop()
	if _, err := os.Stat(s.socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a stopped driver leaves its socket: %v", err)
	}
	s.start()
}

// TestNumberIsReused (F1): one loop number shows one filesystem after the other, and
// every stage mounts the right one.
func TestNumberIsReused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	kinds := []kind{{name: "ext4", fs: "ext4", size: 8 * mib}, block, xfs, {name: "ext4", fs: "ext4", size: 8 * mib}, btrfs}
	numbers := map[string]int{}
	for i := range times(50, 200, 1000) {
		k := kinds[i%len(kinds)]
		v := s.volume(k, fmt.Sprint("reuse-", i)).up()
		numbers[v.device()]++
		if !k.block() {
			if got, err := fsMagic(v.target(0)); err != nil || got != k.fs {
				t.Fatalf("cycle %d: %s is mounted, %v, want %s", i, got, err, k.fs)
			}
			names, err := os.ReadDir(v.target(0))
			must(t, err)
			for _, n := range names {
				if n.Name() != "lost+found" {
					t.Fatalf("cycle %d: a new %s holds %q", i, k.fs, n.Name())
				}
			}
		} else if b, err := deviceByte(v.target(0)); err != nil || b != 0 {
			t.Fatalf("cycle %d: a new raw volume holds %d, %v", i, b, err)
		}
		v.step("write", v.write(0))
		v.down()
	}
	t.Logf("cycles by device: %v", numbers)
}
