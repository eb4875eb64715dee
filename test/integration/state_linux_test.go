package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// loseState removes the stage records while no driver runs, as a restart of a
// container whose state directory is not the host's does.
func (s *site) loseState() {
	s.t.Helper()
	s.kill()
	must(s.t, os.RemoveAll(s.state))
	s.start()
}

// lostKinds are volumes that can be staged when the state gets lost.
var lostKinds = []kind{ext4, xfs, btrfs, block, mapped, {name: "mapped-block", size: 16 * mib, mapped: true}, {name: "ephemeral", fs: "ext4", size: 32 * mib, ephemeral: true}}

// TestLostStateThenEnd (F15): without records, published volumes go on, and the CO's next calls end them.
func TestLostStateThenEnd(t *testing.T) {
	for _, k := range lostKinds {
		t.Run(k.name, func(t *testing.T) {
			s := newSite(t, siteConfig{})
			v := s.lostVolume(k)
			v.step("write", v.write(0))
			s.loseState()
			v.step("read without a record", v.read(0, 0))
			if err := v.remove(); !k.mapped && !k.ephemeral && status.Code(err) != codes.FailedPrecondition {
				t.Errorf("delete of a volume in use without a record: %s", explain(err))
			}
			v.step("unpublish without a record", v.unpublish(0))
			v.step("unstage without a record", v.unstage())
			v.step("delete", v.remove())
		})
	}
}

// TestLostStateThenAgain: without records, the CO repeats stage and publish, and goes on.
func TestLostStateThenAgain(t *testing.T) {
	for _, k := range lostKinds {
		t.Run(k.name, func(t *testing.T) {
			s := newSite(t, siteConfig{})
			v := s.lostVolume(k)
			v.step("write", v.write(0))
			s.loseState()
			v.step("stage again", v.stage())
			v.step("publish again", v.publish(0, false))
			v.step("read", v.read(0, 0))
			v.down()
		})
	}
}

// TestLostStateWithReader: of a raw volume there may be two devices.
func TestLostStateWithReader(t *testing.T) {
	s := newSite(t, siteConfig{})
	v := s.volume(block, "reader").up()
	v.step("publish read-only", v.publish(1, true))
	s.loseState()
	v.step("unpublish read-only", v.unpublish(1))
	v.down()
}

// lostVolume brings a volume up; of a mapped raw one the image is made first.
func (s *site) lostVolume(k kind) *volume {
	v := s.volume(k, "lost-"+k.name)
	if k.mapped && k.block() {
		v.fs = "ext4"
		v.step("create", v.create())
		v.fs = ""
		v.context["exposeImage"] = "true"
	} else {
		v.step("create", v.create())
	}
	v.step("stage", v.stage())
	v.step("publish", v.publish(0, false))
	return v
}

// TestDamagedRecords: records that are cut short, empty or nonsense are hints that are not there.
func TestDamagedRecords(t *testing.T) {
	s := newSite(t, siteConfig{})
	for i, damage := range [][]byte{nil, []byte("{"), []byte("null"), []byte(`{"volumeID":"x"}`)} {
		v := s.volume(ext4, fmt.Sprint("damaged-record-", i)).up()
		v.step("write", v.write(0))
		s.kill()
		records, _ := filepath.Glob(s.state + "/*/*.json")
		for _, r := range records {
			must(t, os.WriteFile(r, damage, 0o600))
		}
		s.start()
		v.step("read", v.read(0, 0))
		v.down()
	}
}

// TestReboot: nothing is mounted and no device is bound, but records are there (a state directory that is on a disk).
func TestReboot(t *testing.T) {
	s := newSite(t, siteConfig{})
	for _, k := range []kind{ext4, block} {
		v := s.volume(k, "reboot-"+k.name).up()
		v.step("write", v.write(0))
		saved := filepath.Join(s.dir, "saved")
		must(t, os.CopyFS(saved, os.DirFS(s.state)))
		v.step("unpublish", v.unpublish(0))
		v.step("unstage", v.unstage())
		s.stop()
		must(t, os.RemoveAll(s.state))
		must(t, os.Rename(saved, s.state))
		s.start()
		v.step("stage", v.stage())
		v.step("publish", v.publish(0, false))
		v.step("read", v.read(0, 0))
		v.down()
	}
}
