package main

import (
	"bytes"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

func TestCPIOIsReadByCPIO(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("cpio is not installed; the virtual machine's kernel reads the archive in make test-vm")
	}
	var b bytes.Buffer
	c := newCPIO(&b)
	c.File("a/b/file", 0o755, []byte("five!"))
	c.Link("/a/link", "b/file")
	c.Dir("a") // a second time
	c.Dir("empty")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	list := exec.Command("cpio", "--quiet", "-it")
	list.Stdin = &b
	out, err := list.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	want := []string{"a", "a/b", "a/b/file", "a/link", "empty"}
	if diff := cmp.Diff(want, strings.Fields(string(out))); diff != "" {
		t.Error(diff)
	}
}

func TestCPIORefusesTheSameNameTwice(t *testing.T) {
	c := newCPIO(&bytes.Buffer{})
	c.File("init", 0o755, nil)
	c.File("/init", 0o755, nil)
	if err := c.Close(); err == nil {
		t.Error("no error")
	}
}

func TestNewestKernel(t *testing.T) {
	packages := []string{
		"linux-image-6.1.0-9-cloud-amd64",
		"linux-image-6.1.0-56-cloud-amd64",
		"linux-image-6.1.0-57-cloud-amd64-unsigned",
		"linux-image-6.1.0-58-amd64",
		"linux-image-6.12.9+deb12-cloud-amd64",
		"linux-image-6.12.117+deb12-cloud-amd64",
		"linux-image-6.12-cloud-amd64",
	}
	for _, c := range []struct {
		series, want string
		ok           bool
	}{
		{"6.1", "linux-image-6.1.0-56-cloud-amd64", true},
		{"6.12", "linux-image-6.12.117+deb12-cloud-amd64", true},
		{"5.15", "", false},
	} {
		got, ok := newest(packages, c.series)
		if got != c.want || ok != c.ok {
			t.Errorf("series %s: %q, %v; want %q, %v", c.series, got, ok, c.want, c.ok)
		}
	}
}

func TestParseModinfo(t *testing.T) {
	info := "license=GPL\x00softdep=pre: crc32c xxhash64 post: zlib\x00depends=libcrc32c,raid6-pq\x00name=btrfs\x00depends=\x00"
	hard, soft := parseModinfo([]byte(info))
	if diff := cmp.Diff([]string{"libcrc32c", "raid6_pq"}, hard); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"crc32c", "xxhash64"}, soft); diff != "" {
		t.Error(diff)
	}
}

func TestParseLDD(t *testing.T) {
	libs, err := parseLDD("\tlinux-vdso.so.1 (0x00007ffd)\n\tlibuuid.so.1 => /lib/x86_64-linux-gnu/libuuid.so.1 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/lib/x86_64-linux-gnu/libuuid.so.1", "/lib64/ld-linux-x86-64.so.2"}, libs); diff != "" {
		t.Error(diff)
	}
	if _, err := parseLDD("\tlibgone.so => not found\n"); err == nil {
		t.Error("a missing library is no error")
	}
}

func TestFollow(t *testing.T) {
	p := plan.Plan{Token: "t0k", Jobs: []plan.Job{{Name: "one"}, {Name: "two"}}}
	line := func(e plan.Event, number, status int) string {
		return plan.Report{Event: e, Number: number, Status: status}.Line(p.Token) + "\n"
	}
	whole := line(plan.Started, 0, 0) + "out" + line(plan.Ended, 0, 0) + line(plan.Started, 1, 0) + "bad\r\n" + line(plan.Ended, 1, 1)
	for _, c := range []struct {
		name, console string
		statuses      []int
		finished      bool
		wantErr       bool
	}{
		{"all jobs ended", whole + line(plan.Finished, 0, 0), []int{0, 1}, true, false},
		{"the guest died after the last job", whole, []int{0, 1}, false, false},
		{"the guest died within a job", line(plan.Started, 0, 0) + "PASS\n", nil, false, false},
		{"the guest says finished too early", line(plan.Finished, 0, 0), nil, false, false},
		{"the guest could not prepare itself", line(plan.Broken, 0, 0), nil, false, true},
		{"a job is missing", line(plan.Ended, 1, 0), nil, false, true},
		{"nothing came", "", nil, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			results, finished, err := follow(strings.NewReader(c.console), p, &out)
			if finished != c.finished || (err != nil) != c.wantErr {
				t.Errorf("finished %v, error %v; want %v, %v", finished, err, c.finished, c.wantErr)
			}
			var statuses []int
			for _, r := range results {
				statuses = append(statuses, r.status)
			}
			if diff := cmp.Diff(c.statuses, statuses); diff != "" {
				t.Error(diff)
			}
		})
	}
	var out bytes.Buffer
	if _, _, err := follow(strings.NewReader(whole), p, &out); err != nil {
		t.Fatal(err)
	}
	if want := "== one\nout\n== two\nbad\n"; out.String() != want {
		t.Errorf("output %q, want %q", out.String(), want)
	}
}

func TestSkippedTests(t *testing.T) {
	p := plan.Plan{Token: "t0k", Terse: true, Jobs: []plan.Job{{Name: "one"}, {Name: "two"}}}
	line := func(e plan.Event, number, status int) string {
		return plan.Report{Event: e, Number: number, Status: status}.Line(p.Token) + "\n"
	}
	known := slices.Sorted(maps.Keys(maySkip))[0]
	console := line(plan.Started, 0, 0) + "=== RUN   TestA\n    a_test.go:1: no such thing\n--- SKIP: TestA (0.00s)\n" +
		"    --- SKIP: TestB/sub#01 (0.00s)\n--- PASS: TestB (0.00s)\nPASS\n" + line(plan.Ended, 0, 0) +
		line(plan.Started, 1, 0) + "    --- PASS: TestC/sub (0.00s)\n    --- SKIP: " + known + " (0.00s)\n--- PASS: TestC (0.00s)\n--- PASS: TestD (0.00s)\nPASS\n" + line(plan.Ended, 1, 0) + line(plan.Finished, 0, 0)
	var out bytes.Buffer
	results, finished, err := follow(strings.NewReader(console), p, &out)
	if err != nil || !finished || len(results) != 2 {
		t.Fatalf("results %+v, finished %v, %v", results, finished, err)
	}
	for i, want := range []struct {
		skipped []string
		passed  int
		ok      bool
	}{{[]string{"TestA", "TestB/sub#01"}, 1, false}, {[]string{known}, 2, true}} {
		if results[i].passed != want.passed {
			t.Errorf("%d tests passed, want %d", results[i].passed, want.passed)
		}
		if diff := cmp.Diff(want.skipped, results[i].skipped); diff != "" {
			t.Error(diff)
		}
		text, ok := verdict("p", "6.1", &results[i])
		if ok != want.ok || !strings.Contains(text, want.skipped[0]) {
			t.Errorf("verdict %q, %v; want %v, and the test's name", text, ok, want.ok)
		}
	}
	if text := out.String(); strings.Contains(text, "=== RUN") || strings.Contains(text, "--- PASS") || !strings.Contains(text, "no such thing") {
		t.Errorf("output:\n%s", text)
	}
}

func TestVerdict(t *testing.T) {
	for _, c := range []struct {
		name string
		r    *result
		ok   bool
	}{
		{"passed", &result{passed: 1}, true},
		{"failed", &result{passed: 1, status: 1}, false},
		{"no test ran", &result{}, false},
		{"did not end", nil, false},
		{"failed, and skipped what it may", &result{passed: 1, status: 1, skipped: slices.Sorted(maps.Keys(maySkip))}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			line, ok := verdict("p", "6.1", c.r)
			if ok != c.ok || strings.HasPrefix(line, "ok  ") != c.ok {
				t.Errorf("verdict %q, %v", line, ok)
			}
		})
	}
}
