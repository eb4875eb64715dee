package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-loop/csi-loop/test/vm/plan"
)

// qemuOf makes a qemu that says what it is told in the console and on the second line,
// boot for boot; the last two are repeated.
func qemuOf(t *testing.T, said ...[2]string) (m machine, runs func() int) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("qemu-system-x86_64", `#!/bin/sh
cd "$(dirname "$0")" || exit
for a; do case $a in file:*) console=${a#file:} ;; esac; done
echo >>runs
n=$(wc -l <runs)
while [ ! -e "line$n" ]; do n=$((n - 1)); done
cat "console$n" >"$console"
cat "line$n"
`, 0o700)
	for i, s := range said {
		n := string(rune('1' + i))
		write("console"+n, s[0], 0o600)
		write("line"+n, s[1], 0o600)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return machine{disk: filepath.Join(dir, "disk"), timeout: time.Minute}, func() int {
		b, err := os.ReadFile(filepath.Join(dir, "runs"))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Count(b, []byte("\n"))
	}
}

// What the emulator does to a kernel that has not begun is no result of a test; all else
// is.
func TestBootsAgainOnlyWhenMisled(t *testing.T) {
	p := plan.Plan{Token: "token", Jobs: []plan.Job{{Name: "a"}}}
	line := func(r plan.Report) string { return r.Line(p.Token) + "\n" }
	started := line(plan.Report{Event: plan.Started})
	whole := started + line(plan.Report{Event: plan.Ended}) + line(plan.Report{Event: plan.Finished})
	const oops = "[    3.003163] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n"
	for _, c := range []struct {
		name string
		said [][2]string
		runs int
		ok   bool
	}{
		{"well", [][2]string{{"", whole}}, 1, true},
		{"misled once", [][2]string{{oops, ""}, {"", whole}}, 2, true},
		{"misled for ever", [][2]string{{oops, ""}}, boots, false},
		{"misled in a test", [][2]string{{oops, started}, {"", whole}}, 1, false},
		{"another death", [][2]string{{"Oops: general protection fault\n", ""}, {"", whole}}, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, runs := qemuOf(t, c.said...)
			var out bytes.Buffer
			results, err := m.boot(t.Context(), p, &out)
			if (err == nil) != c.ok || runs() != c.runs || c.ok != (len(results) == 1) {
				t.Errorf("boot = %v, %v after %d boots; want %d boots, all well: %v", results, err, runs(), c.runs, c.ok)
			}
			if got := strings.Count(out.String(), againWords); got != c.runs-1 {
				t.Errorf("said %d times that it boots again: %s", got, &out)
			}
		})
	}
}
