// Command report prints what came out of the storage suite, as a table of groups
// and a list of the reasons for what was skipped.
//
//	report FILE.json...
//
// It exits 1 if a spec failed, or if nothing was run.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/onsi/ginkgo/v2/types"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(files []string, out io.Writer) error {
	var passed, failed int
	for _, name := range files {
		r, err := read(name)
		if err != nil {
			return err
		}
		r.print(out)
		all := r.total()
		passed, failed = passed+all.passed, failed+all.failed
	}
	switch {
	case failed > 0:
		return fmt.Errorf("%d specs failed", failed)
	case passed == 0:
		return errors.New("no spec was run")
	}
	return nil
}

// counts are of the specs of one group.
type counts struct {
	passed, failed, skipped int
	seconds                 float64
}

type results struct {
	name     string
	groups   map[string]counts
	reasons  map[string]int // of specs that were begun and skipped
	failures []string
}

var group = regexp.MustCompile(`\[Testpattern: [^\]]*\]+ ([\w-]+)`)

func read(name string) (*results, error) {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var reports []types.Report
	if err := json.Unmarshal(content, &reports); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r := &results{
		name:   strings.TrimSuffix(filepath.Base(name), ".json"),
		groups: map[string]counts{}, reasons: map[string]int{},
	}
	for _, report := range reports {
		for _, spec := range report.SpecReports {
			r.add(spec)
		}
	}
	return r, nil
}

// add counts a spec. Those that the focus left out are none of ours.
func (r *results) add(spec types.SpecReport) {
	found := group.FindStringSubmatch(spec.FullText())
	if found == nil {
		return
	}
	c := r.groups[found[1]]
	switch {
	case spec.State == types.SpecStatePassed:
		c.passed++
	case spec.State == types.SpecStateSkipped && spec.Failure.Message == "":
		return
	case spec.State == types.SpecStateSkipped:
		c.skipped++
		r.reasons[found[1]+": "+spec.Failure.Message]++
	default:
		c.failed++
		r.failures = append(r.failures, spec.FullText()+": "+spec.Failure.Message)
	}
	c.seconds += spec.RunTime.Seconds()
	r.groups[found[1]] = c
}

func (r *results) total() counts {
	var all counts
	for _, c := range r.groups {
		all = counts{all.passed + c.passed, all.failed + c.failed, all.skipped + c.skipped, all.seconds + c.seconds}
	}
	return all
}

func (r *results) print(out io.Writer) {
	fmt.Fprintf(out, "\n%s\n\n| group | run | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|\n", r.name)
	row := func(name string, c counts) {
		fmt.Fprintf(out, "| %s | %d | %d | %d | %d | %.0f |\n", name, c.passed+c.failed, c.passed, c.failed, c.skipped, c.seconds)
	}
	for _, name := range slices.Sorted(maps.Keys(r.groups)) {
		row(name, r.groups[name])
	}
	row("all", r.total())
	for _, reason := range slices.SortedFunc(maps.Keys(r.reasons), cmp.Compare[string]) {
		fmt.Fprintf(out, "skipped %d: %s\n", r.reasons[reason], reason)
	}
	for _, f := range r.failures {
		fmt.Fprintln(out, "FAILED:", f)
	}
}
