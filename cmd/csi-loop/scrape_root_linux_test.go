package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-loop/csi-loop/internal/roottest"
	"github.com/csi-loop/csi-loop/pkg/image"
	"github.com/csi-loop/csi-loop/pkg/router"
)

// scrapesEnv names a directory where TestScrapes leaves what it was shown: the chart's
// tests hold the dashboard and the alerts against that.
const scrapesEnv = "CSI_LOOP_TEST_SCRAPES"

// twoNodes has a node that should have a link and has none.
type twoNodes struct{ noRoster }

func (twoNodes) Registered() ([]string, bool) { return []string{"n1", "n2"}, true }

// A driver that does something shows what it did.
func TestScrapes(t *testing.T) {
	roottest.Require(t)
	p := newPlace(t)
	address := freeAddress(t)
	args := append(p.args(), "--pool=gone="+p.dir+"/nowhere", "--default-pool=default", "--http-endpoint="+address, "--loop-devices-max=1", "--loop-devices-warm=0")
	s := spawn(t, nil, args...)
	s.waitFor("Serving")
	s.stop()
	spoilt := filepath.Join(p.pool, "volumes", "spoilt")
	if err := errors.Join(os.Mkdir(spoilt, 0o700), os.WriteFile(filepath.Join(spoilt, "volume.json"), []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(spoilt)
	s = spawn(t, nil, args...)
	s.waitFor("Serving")
	v, hurt, holed := p.create(t, "pvc-files", false), p.create(t, "pvc-hurt", true), p.create(t, "pvc-holed", true)
	p.up(t, v)
	defer func() {
		p.down(t, v)
		for _, id := range []string{v.id, hurt.id, holed.id} {
			if _, err := csi.NewControllerClient(dial(t, p.socket)).DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
				t.Error(err)
			}
		}
		s.stop()
	}()
	if err := os.Truncate(filepath.Join(p.pool, "volumes", "pvc-hurt", "disk.img"), 1<<20); err != nil {
		t.Fatal(err)
	}
	punch(t, filepath.Join(p.pool, "volumes", "pvc-holed", "disk.img"))
	golden := filepath.Join(p.dir, "golden.img")
	if err := os.WriteFile(golden, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, trouble, err := run(t, "", "template", "add", "golden", golden, "--raw", "--endpoint="+p.socket); err != nil {
		t.Fatal(out, trouble, err)
	}
	scrape := func(n int) string {
		text := fetch(t, "http://"+address+"/metrics")
		keep(t, fmt.Sprintf("node-%d.txt", n), text)
		return text
	}
	before := scrape(0)
	f, err := os.Create(filepath.Join(v.target, "file"))
	if err == nil {
		_, err = f.Write(bytes.Repeat([]byte("x"), 4<<20))
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	readPast(t, f.Name())
	if _, err := csi.NewControllerClient(dial(t, p.socket)).DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: v.id}); err == nil {
		t.Error("it is in use, and was deleted")
	}
	of := `{name="pvc-files",pool="default",volume="` + v.id + `"} `
	written, read := `csi_loop_volume_written_bytes_total`+of, `csi_loop_volume_read_bytes_total`+of
	var after string
	eventually(t, "what was written and read is counted", func() error {
		after = scrape(1)
		if n := number(t, after, written) - number(t, before, written); n < 4<<20 || n > 6<<20 {
			return fmt.Errorf("%v bytes", n)
		}
		if n := number(t, after, read) - number(t, before, read); n < 1<<20 {
			return fmt.Errorf("%v bytes were read", n)
		}
		return nil
	})
	for _, want := range []string{
		`csi_loop_volume_problem{kind="DataLoss",name="pvc-hurt",pool="default",reason="ImageTruncated",volume="` + hurt.id + `"} 1`,
		`csi_loop_volume_problem{kind="Degraded",name="pvc-holed",pool="default",reason="NotFullyAllocated",volume="` + holed.id + `"} 1`,
		`csi_loop_volume_staged{name="pvc-files",pool="default",volume="` + v.id + `"} 1`,
		`csi_loop_pool_absent{pool="gone"} 1`,
		`csi_loop_pool_problem{kind="Degraded",pool="default",reason="VolumeRefused"} 1`,
		`csi_loop_node_problem{kind="Degraded",reason="LoopDeviceLimit"} 1`,
		`csi_loop_template_size_bytes{pool="default",template="golden"} 2.097152e+06`,
	} {
		if !strings.Contains(after, want) {
			t.Errorf("%s is not in\n%s", want, after)
		}
	}
	if err := os.Truncate(filepath.Join(p.pool, "volumes", "pvc-hurt", "disk.img"), 16<<20); err != nil {
		t.Fatal(err)
	}
	controllerScrapes(t)
	copyScrapes(t)
}

// punch takes the first MiB out of an image.
func punch(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		err = errors.Join(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// readPast reads a MiB of a file from the device below it.
func readPast(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(page) }()
	if _, err := io.ReadFull(f, page); err != nil {
		t.Fatal(err)
	}
}

// copyScrapes has two nodes and a controller, over whose links a snapshot is restored on
// the other node: before and while it is copied.
func copyScrapes(t *testing.T) {
	p := newPairAt(t, [2]string{"xfs", "xfs"}, 4<<20, image.WithRefresh(20*time.Millisecond))
	a, b := p.nodes[0], p.nodes[1]
	const size = 32 << 20
	data := make([]byte, size)
	_, _ = rand.Read(data)
	id, small := a.create("v", "", size, nil, nil), a.create("small", "", 1<<20, nil, nil)
	p.must(os.WriteFile(a.image(id), data, 0o600))
	p.must(os.WriteFile(a.image(small), data[:1<<20], 0o600))
	made, err := p.ctrl.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	p.must(err)
	b.create("cloned", "", 1<<20, source("", small), nil)
	scrape := func() map[string]string {
		all := map[string]string{}
		for name, m := range map[string]*metrics{"sender": a.metrics, "receiver": b.metrics, "linked": p.metrics} {
			_, all[name] = get(t, m.handler(), "/metrics")
		}
		return all
	}
	before := scrape()
	restore := source(made.GetSnapshot().GetSnapshotId(), "")
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		_, _ = b.try("restored", "", size, restore, nil) // it goes on when the call has ended
	}()
	var during map[string]string
	eventually(t, "a copy goes on, and images were looked at", func() error {
		during = scrape()
		for _, want := range []struct{ where, series string }{
			{"sender", "csi_loop_node_copy_done_bytes{"},
			{"receiver", "csi_loop_node_copy_done_bytes{"},
			{"linked", "csi_loop_transfers 1\n"},
			{"sender", `csi_loop_image_extents{`},
			{"receiver", `csi_loop_image_extents{`},
		} {
			if !strings.Contains(during[want.where], "\n"+want.series) {
				return fmt.Errorf("%s does not show %s", want.where, want.series)
			}
		}
		for where, series := range map[string]string{"linked": "csi_loop_transfer_bytes_total ", "receiver": `csi_loop_pool_used_bytes{pool="default"} `} {
			if n := number(t, during[where], series) - number(t, before[where], series); n <= 0 {
				return fmt.Errorf("%s of %s: %v more", series, where, n)
			}
		}
		return nil
	})
	for name, text := range before {
		keep(t, name+"-0.txt", text)
		keep(t, name+"-1.txt", during[name])
	}
	<-asked
	b.create("restored", "", size, restore, nil)
}

// controllerScrapes has a controller with an orphan, refused links and a node that is away.
func controllerScrapes(t *testing.T) {
	m := newMetrics(build{Version: "v1"})
	r := router.New(router.Config{Self: "a", Roster: twoNodes{}, Claims: noClaims{}})
	if _, err := r.Orphans(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.router(r)
	m.links(func() (int, int) { return 1, 2 })
	for n := range 2 {
		m.observe("CreateVolume", "OK", time.Second)
		m.observe("CreateVolume", "Unavailable", time.Millisecond)
		_, body := get(t, m.handler(), "/metrics")
		keep(t, fmt.Sprintf("controller-%d.txt", n), body)
	}
}

// keep leaves a scrape for the chart's tests.
func keep(t *testing.T, name, text string) {
	t.Helper()
	if dir := os.Getenv(scrapesEnv); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// number is the value behind a series of a scrape.
func number(t *testing.T, scrape, series string) float64 {
	t.Helper()
	_, rest, ok := strings.Cut(scrape, "\n"+series)
	var n float64
	if _, err := fmt.Sscan(rest, &n); !ok || err != nil {
		t.Fatalf("%s: %v in\n%s", series, err, scrape)
	}
	return n
}

// fetch gets a page.
func fetch(t *testing.T, url string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", url, response.Status, err, body)
	}
	return string(body)
}
