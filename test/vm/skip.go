package main

import (
	"regexp"
	"slices"
	"strings"
)

// A test that is skipped says that something is missing here. In the guest nothing is:
// its kernel, its tools and its rights are those that the tests are for. So each skip
// fails its package, whatever the test thinks, but for those that are known.

// maySkip are the tests that may be skipped in the guest, with the reason.
var maySkip = map[string]string{
	"TestDeadFilesystem/btrfs": "btrfs cannot be shut down on these kernels",
}

var (
	skipLine = regexp.MustCompile(`^\s*--- SKIP: (\S+) \(`)
	// logLine is what a driver in a test logs while all is well.
	logLine = regexp.MustCompile(`^\s+\S+\.go:\d+: I\d{4} `)
)

// skippedTest reads what a test binary says of a test that was skipped.
func skippedTest(line string) (name string, ok bool) {
	m := skipLine.FindStringSubmatch(line)
	if m == nil {
		return "", false
	}
	return m[1], true
}

// wrongly leaves of the skipped tests those that should have run.
func wrongly(skipped []string) []string {
	return slices.DeleteFunc(slices.Clone(skipped), func(name string) bool { return maySkip[name] != "" })
}

// isNoise tells the lines that are there only because the tests have to name those that
// were skipped.
func isNoise(line string) bool {
	if logLine.MatchString(line) {
		return true
	}
	line = strings.TrimLeft(line, " ")
	return slices.ContainsFunc([]string{"=== RUN ", "=== PAUSE ", "=== CONT ", "=== NAME ", "--- PASS: "}, func(p string) bool { return strings.HasPrefix(line, p) })
}
