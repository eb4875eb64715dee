package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	groupv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// snapshotClass is that of values.yaml, for snapshots and for groups of them.
const snapshotClass = "csi-loop"

func (e *env) snapshots() versioned.Interface {
	e.Helper()
	return must[versioned.Interface](e)(versioned.NewForConfig(e.config))
}

// takeSnapshot makes one of a claim and waits until it can be used.
func (e *env) takeSnapshot(name, claimName string) *snapshotv1.VolumeSnapshot {
	e.Helper()
	class := snapshotClass
	api := e.snapshots().SnapshotV1().VolumeSnapshots(e.namespace)
	must[*snapshotv1.VolumeSnapshot](e)(api.Create(e.Context(), &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: snapshotv1.VolumeSnapshotSpec{
			VolumeSnapshotClassName: &class, Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claimName},
		},
	}, metav1.CreateOptions{}))
	var taken *snapshotv1.VolumeSnapshot
	e.eventually("snapshot "+name+" is ready", patience, func(ctx context.Context) error {
		s, err := api.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		taken = s
		return usable(s, e.events(name))
	})
	return taken
}

func usable(s *snapshotv1.VolumeSnapshot, events string) error {
	if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse {
		return fmt.Errorf("it is not: %+v\n%s", s.Status, events)
	}
	return nil
}

// restored is a claim for a copy of a snapshot.
func restored(name, class, size, snapshot string) *corev1.PersistentVolumeClaim {
	c := claim(name, class, size)
	group := snapshotv1.GroupName
	c.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: snapshot}
	return c
}

// cloned is a claim for a copy of another claim's volume.
func cloned(name, class, size, source string) *corev1.PersistentVolumeClaim {
	c := claim(name, class, size)
	c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: source}
	return c
}

// removeSnapshots deletes those of the test, groups first, and waits for them. Where
// there are no snapshots in the cluster there is nothing to do.
func (e *env) removeSnapshots(ctx context.Context) error {
	client, err := versioned.NewForConfig(e.config)
	if err != nil {
		return err
	}
	all := metav1.ListOptions{}
	groups := client.GroupsnapshotV1().VolumeGroupSnapshots(e.namespace)
	single := client.SnapshotV1().VolumeSnapshots(e.namespace)
	if err := ignoreGone(groups.DeleteCollection(ctx, metav1.DeleteOptions{}, all)); err != nil {
		return err
	}
	return poll(ctx, 300*time.Millisecond, func(ctx context.Context) error {
		left, err := groups.List(ctx, all)
		if ignoreGone(err) != nil {
			return err
		}
		if err == nil && len(left.Items) > 0 {
			return fmt.Errorf("%d group snapshots do not go away", len(left.Items))
		}
		if err := ignoreGone(single.DeleteCollection(ctx, metav1.DeleteOptions{}, all)); err != nil {
			return err
		}
		some, err := single.List(ctx, all)
		if ignoreGone(err) != nil {
			return err
		}
		if err == nil && len(some.Items) > 0 {
			return fmt.Errorf("%d snapshots do not go away", len(some.Items))
		}
		return nil
	})
}

// records is a loop that appends numbered lines, each on disk before it is told.
const records = `i=0; while i=$((i+1)); echo "record $i" >> %[1]s/log && sync %[1]s/log; do echo $i > /tmp/said.new && mv /tmp/said.new /tmp/said; done`

// checkRecords fails unless the log has every record up to the one that was told
// before the snapshot, in order and none torn.
func (e *env) checkRecords(pod, dir string, told int64) {
	e.Helper()
	wrong := e.sh(pod, `awk '$0 != "record " NR {print NR ": " $0}' `+dir+`/log | head -n 3`)
	if wrong != "" {
		e.Errorf("%s has records that nobody wrote: %s", pod, wrong)
	}
	if n := e.number(pod, "wc -l < "+dir+"/log"); n < told {
		e.Errorf("%s has %d records, %d were on disk before the snapshot", pod, n, told)
	}
}

func TestSnapshotOfAVolumeInUse(t *testing.T) {
	e := volumes(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		class := e.filesystem(kind)
		e.createClaim(claim(kind, class, "320Mi"))
		e.run(e.shell(kind, "", kind), corev1.PodRunning)
		e.sh(kind, "("+fmt.Sprintf(records, "/data/"+kind)+") >/dev/null 2>&1 &")
		e.eventually(kind+" has records", patience, func(context.Context) error {
			if e.number(kind, "cat /tmp/said 2>/dev/null || echo 0") < 20 {
				return errors.New("too few")
			}
			return nil
		})
		told := e.number(kind, "cat /tmp/said")
		e.takeSnapshot(kind, kind)
		// Larger than its source, and mounted beside it: the filesystem fills it.
		copied := kind + "-copy"
		e.createClaim(restored(copied, class, "640Mi", kind))
		e.run(e.shell(copied, "", copied), corev1.PodRunning)
		e.checkRecords(copied, "/data/"+copied, told)
		if kib := e.number(copied, "df -k /data/"+copied+" | tail -n 1 | awk '{print $2}'"); kib < 500<<10 {
			t.Errorf("%s: a copy of 640Mi has %d KiB", kind, kib)
		}
		before := e.number(kind, "cat /tmp/said")
		e.eventually(kind+" goes on writing", patience, func(context.Context) error {
			if n := e.number(kind, "cat /tmp/said"); n <= before {
				return fmt.Errorf("at %d", n)
			}
			return nil
		})
	}
}

func TestSnapshotOutlivesItsVolume(t *testing.T) {
	e := volumes(t)
	class := e.filesystem("ext4")
	e.createClaim(claim("source", class, "64Mi"))
	e.run(e.shell("writer", "", "source"), corev1.PodRunning)
	e.sh("writer", "echo precious > /data/source/file && sync")
	e.takeSnapshot("kept", "source")
	e.stop("writer")
	if err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Delete(e.Context(), "source", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	e.expectMade(1) // the snapshot
	e.createClaim(restored("copy", class, "64Mi", "kept"))
	e.run(e.shell("reader", "", "copy"), corev1.PodRunning)
	if got := e.sh("reader", "cat /data/copy/file"); got != "precious" {
		t.Errorf("the copy has %q", got)
	}
}

func TestCloneOfAVolumeInUse(t *testing.T) {
	e := volumes(t)
	for _, kind := range []string{"ext4", "xfs"} {
		class := e.filesystem(kind)
		e.createClaim(claim(kind, class, "320Mi"))
		e.run(e.shell(kind, "", kind), corev1.PodRunning)
		e.sh(kind, "echo precious > /data/"+kind+"/file && sync /data/"+kind+"/file")
		name := kind + "-clone"
		e.createClaim(cloned(name, class, "320Mi", kind))
		e.run(e.shell(name, "", name), corev1.PodRunning)
		if got := e.sh(name, "cat /data/"+name+"/file"); got != "precious" {
			t.Errorf("%s: the clone has %q", kind, got)
		}
		e.sh(name, "echo changed > /data/"+name+"/file && sync")
		if got := e.sh(kind, "cat /data/"+kind+"/file"); got != "precious" {
			t.Errorf("%s: writing to the clone changed the source to %q", kind, got)
		}
	}
}

// alternate writes each number to the one volume and then to the other, so that at
// every moment the first has as many as the second, or one more.
const alternate = `i=0; while i=$((i+1)); echo $i >> /data/one/log && sync /data/one/log && echo $i >> /data/two/log && sync /data/two/log; do echo $i > /tmp/said.new && mv /tmp/said.new /tmp/said; done`

func TestGroupSnapshotIsOfOneMoment(t *testing.T) {
	e := volumes(t)
	class := e.filesystem("xfs")
	for _, name := range []string{"one", "two"} {
		c := claim(name, class, "320Mi")
		c.Labels = map[string]string{"group": "pair"}
		e.createClaim(c)
	}
	e.run(e.shell("writer", "", "one", "two"), corev1.PodRunning)
	e.sh("writer", "("+alternate+") >/dev/null 2>&1 &")
	e.eventually("both have numbers", patience, func(context.Context) error {
		if e.number("writer", "cat /tmp/said 2>/dev/null || echo 0") < 20 {
			return errors.New("too few")
		}
		return nil
	})
	told := e.number("writer", "cat /tmp/said")
	groupClass := snapshotClass
	groups := e.snapshots().GroupsnapshotV1().VolumeGroupSnapshots(e.namespace)
	must[*groupv1.VolumeGroupSnapshot](e)(groups.Create(e.Context(), &groupv1.VolumeGroupSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: "pair"},
		Spec: groupv1.VolumeGroupSnapshotSpec{
			VolumeGroupSnapshotClassName: &groupClass,
			Source:                       groupv1.VolumeGroupSnapshotSource{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"group": "pair"}}},
		},
	}, metav1.CreateOptions{}))
	members := map[string]string{} // snapshots by claim
	e.eventually("the group and its two snapshots are ready", patience, func(ctx context.Context) error {
		g, err := groups.Get(ctx, "pair", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if g.Status == nil || g.Status.ReadyToUse == nil || !*g.Status.ReadyToUse {
			return fmt.Errorf("the group is not: %+v\n%s", g.Status, e.events("pair"))
		}
		list, err := e.snapshots().SnapshotV1().VolumeSnapshots(e.namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for i := range list.Items {
			s := &list.Items[i]
			if err := usable(s, ""); err != nil {
				return err
			}
			if s.Spec.Source.PersistentVolumeClaimName != nil {
				members[*s.Spec.Source.PersistentVolumeClaimName] = s.Name
			}
		}
		if members["one"] == "" || members["two"] == "" {
			return fmt.Errorf("there are snapshots of %v", members)
		}
		return nil
	})
	var counts []int64
	for _, name := range []string{"one", "two"} {
		c := name + "-copy"
		e.createClaim(restored(c, class, "320Mi", members[name]))
		e.run(e.shell(c, "", c), corev1.PodRunning)
		counts = append(counts, e.number(c, "wc -l < /data/"+c+"/log"))
		if wrong := e.sh(c, `awk '$0 != NR' /data/`+c+`/log | head -n 3`); strings.TrimSpace(wrong) != "" {
			t.Errorf("%s has what nobody wrote: %s", c, wrong)
		}
	}
	if counts[1] < told || counts[0] != counts[1] && counts[0] != counts[1]+1 {
		t.Errorf("of one moment after %d they have %d", told, counts)
	}
}
