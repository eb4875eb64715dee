package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

const uid = "0a1b2c3d-1111-2222-3333-444455556666"

// tree makes a hierarchy of plain files: what the kubelet makes, without the kernel's
// part in it.
func tree(t *testing.T, pod string) *Pods {
	t.Helper()
	root := t.TempDir()
	dir := filepath.Join(root, pod)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{filepath.Join(root, "cgroup.controllers"): "cpu io memory\n", filepath.Join(dir, "io.max"): ""} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := NewPods(root)
	p.unified = func(string) (bool, error) { return true, nil }
	return p
}

const systemdUID = "0a1b2c3d_1111_2222_3333_444455556666"

var layouts = []struct{ name, dir string }{
	{"systemd, guaranteed", "kubepods.slice/kubepods-pod" + systemdUID + ".slice"},
	{"systemd, burstable", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + systemdUID + ".slice"},
	{"systemd, best effort", "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + systemdUID + ".slice"},
	{"systemd, below another slice", "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + systemdUID + ".slice"},
	{"cgroupfs, guaranteed", "kubepods/pod" + uid},
	{"cgroupfs, burstable", "kubepods/burstable/pod" + uid},
	{"cgroupfs, best effort", "kubepods/besteffort/pod" + uid},
	{"cgroupfs, below another cgroup", "kubelet/kubepods/besteffort/pod" + uid},
}

func TestPodsAreFound(t *testing.T) {
	for _, c := range layouts {
		t.Run(c.name, func(t *testing.T) {
			p := tree(t, c.dir)
			if err := p.Limit(uid, Device{7, 3}, Limits{ReadIOPS: new(int64(100)), WriteBandwidth: new(int64(0))}); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join(p.root, c.dir, "io.max"))
			if err != nil || string(got) != "7:3 riops=100" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestWhatIsSoIsNotWritten(t *testing.T) {
	p := tree(t, "kubepods/pod"+uid)
	file := filepath.Join(p.root, "kubepods/pod"+uid, "io.max")
	const have = "7:4 rbps=1 wbps=max riops=max wiops=max\n7:3 rbps=65536 wbps=max riops=max wiops=10\n"
	if err := os.WriteFile(file, []byte(have), 0o600); err != nil {
		t.Fatal(err)
	}
	same := Limits{ReadBandwidth: new(int64(65536)), WriteIOPS: new(int64(10)), WriteBandwidth: new(int64(0))}
	if err := p.Limit(uid, Device{7, 3}, same); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(file); string(got) != have {
		t.Errorf("written: %q", got)
	}
	if err := p.Limit(uid, Device{7, 3}, Limits{}); err != nil {
		t.Fatal(err)
	}
}

func TestWhatCannotBeLimited(t *testing.T) {
	l := Limits{ReadIOPS: new(int64(100))}
	for _, c := range []struct {
		name    string
		uid     string
		prepare func(t *testing.T, p *Pods)
		want    error
	}{
		{"version 1", uid, func(_ *testing.T, p *Pods) { p.unified = func(string) (bool, error) { return false, nil } }, ErrUnsupported},
		{"nothing is mounted", uid, func(_ *testing.T, p *Pods) { p.unified = func(string) (bool, error) { return false, os.ErrNotExist } }, ErrUnsupported},
		{"no io controller", uid, func(t *testing.T, p *Pods) {
			if err := os.WriteFile(filepath.Join(p.root, "cgroup.controllers"), []byte("cpu hugetlb\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, ErrUnsupported},
		{"the controller is not on for pods", uid, func(t *testing.T, p *Pods) {
			if err := os.Remove(filepath.Join(p.root, "kubepods/pod"+uid, "io.max")); err != nil {
				t.Fatal(err)
			}
		}, ErrUnsupported},
		{"another pod", "0a1b2c3d-1111-2222-3333-444455556667", nil, ErrNoPod},
		{"no UID", "", nil, ErrNoPod},
		{"a way out", "../../etc", nil, ErrNoPod},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := tree(t, "kubepods/pod"+uid)
			if c.prepare != nil {
				c.prepare(t, p)
			}
			if err := p.Limit(c.uid, Device{7, 3}, l); !errors.Is(err, c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}
