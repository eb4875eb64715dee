package e2e

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A claim that is restored from a snapshot, or cloned from a claim in use, on one node,
// and whose pod runs on another, just works: the scheduler's choice is honoured, and
// what was written before is there.
func TestCopiesOnAnotherNode(t *testing.T) {
	e := volumes(t)
	nodes := e.nodes()
	if len(nodes) < 2 {
		t.Skip("there is one node only")
	}
	from, to := nodes[0], nodes[1]
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		class := e.filesystem(kind)
		e.createClaim(claim(kind, class, "320Mi"))
		e.run(e.shell(kind, from, kind), corev1.PodRunning)
		sum := e.sh(kind, "cd /data/"+kind+" && head -c 20971520 /dev/urandom > file && sync file && sha256sum file")
		e.takeSnapshot(kind, kind)
		e.sh(kind, "echo later > /data/"+kind+"/later && sync /data/"+kind+"/later")

		restoredName, clonedName := kind+"-restored", kind+"-cloned"
		e.createClaim(restored(restoredName, class, "640Mi", kind))
		e.createClaim(cloned(clonedName, class, "320Mi", kind))
		for name, later := range map[string]bool{restoredName: false, clonedName: true} {
			e.run(e.shell(name, to, name), corev1.PodRunning)
			e.wantOnNode(name, to)
			if got := e.sh(name, "cd /data/"+name+" && sha256sum file"); got != sum {
				t.Errorf("%s has %q, its source %q", name, got, sum)
			}
			if got := e.sh(name, "test -e /data/"+name+"/later && echo yes || echo no"); (got == "yes") != later {
				t.Errorf("%s, what was written after the snapshot is there: %s", name, got)
			}
			if got := e.sh(name, "echo own > /data/"+name+"/own && cat /data/"+name+"/own"); got != "own" {
				t.Errorf("%s cannot be written to: %q", name, got)
			}
		}
		if mib := e.number(restoredName, "df -m /data/"+restoredName+" | awk 'NR==2 {print $2}'"); mib < 500 {
			t.Errorf("%s has a filesystem of %d MiB", restoredName, mib)
		}
	}
}

// wantOnNode fails unless the claim's volume is on that node.
func (e *env) wantOnNode(name, node string) {
	e.Helper()
	affinity := e.volumeOf(name).Spec.NodeAffinity
	if affinity == nil || affinity.Required == nil || !strings.Contains(affinity.Required.String(), node) {
		e.Errorf("the volume of %s is not on node %s: %v", name, node, affinity)
	}
}

// A raw block volume arrives as it is.
func TestRawCopyOnAnotherNode(t *testing.T) {
	e := volumes(t)
	nodes := e.nodes()
	if len(nodes) < 2 {
		t.Skip("there is one node only")
	}
	class := e.class(nil)
	source := claim("raw", class, "64Mi")
	source.Spec.VolumeMode = new(corev1.PersistentVolumeBlock)
	e.createClaim(source)
	e.run(e.shell("writer", nodes[0], "raw"), corev1.PodRunning)
	e.sh("writer", "head -c 5M /dev/urandom | dd of=/dev/raw bs=1M seek=7 conv=fsync 2>/dev/null")
	sum := e.sh("writer", "sha256sum < /dev/raw")
	e.stop("writer")
	copied := cloned("copied", class, "64Mi", "raw")
	copied.Spec.VolumeMode = new(corev1.PersistentVolumeBlock)
	e.createClaim(copied)
	e.run(e.shell("reader", nodes[1], "copied"), corev1.PodRunning)
	e.wantOnNode("copied", nodes[1])
	if got := e.sh("reader", "sha256sum < /dev/copied"); got != sum {
		t.Errorf("the copy has %q, its source %q", got, sum)
	}
}
