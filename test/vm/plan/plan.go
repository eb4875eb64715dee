// Package plan is what the host side of the virtual machine harness and the
// init process inside the machine agree on: what to run, and how the guest
// reports on the serial line that also carries the tests' own output.
package plan

import (
	"fmt"
	"strconv"
	"strings"
)

// Path is where the guest finds its Plan, as JSON.
const Path = "/plan.json"

// Disk is the guest's device with the scratch file system, and Scratch where it
// is mounted: the tests' TMPDIR.
const (
	Disk    = "/dev/vda"
	Scratch = "/scratch"
)

// Plan tells the guest what to do before it powers off.
type Plan struct {
	// Token marks report lines, so that no test's output can be taken for one.
	Token string `json:"token"`
	// Modules are paths of kernel modules inside the guest, in loading order.
	Modules []string `json:"modules"`
	// Env is added to the environment of every job.
	Env []string `json:"env"`
	// Jobs run one after the other; a failing one does not stop the rest.
	Jobs []Job `json:"jobs"`
	// Terse leaves out lines about tests that run and pass.
	Terse bool `json:"-"`
}

// Job is one program to run as root.
type Job struct {
	Name string   `json:"name"`
	Dir  string   `json:"dir"`
	Argv []string `json:"argv"`
}

// Event is what a report line says happened in the guest.
type Event string

// The events, in the order in which a healthy guest reports them.
const (
	Started  Event = "started"  // Number is the job's index
	Ended    Event = "ended"    // Number is the job's index, Status how it ended
	Finished Event = "finished" // all jobs ran
	Broken   Event = "broken"   // the guest could not do its work; Text says why
)

// Report is one line from the guest's init.
type Report struct {
	Event  Event
	Number int
	Status int // exit status, or 128 and the signal's number
	Text   string
}

// Line spells the report as Parse reads it, without the newline.
func (r Report) Line(token string) string {
	return fmt.Sprintf("@@%s %s %d %d %s", token, r.Event, r.Number, r.Status, strings.ReplaceAll(r.Text, "\n", "; "))
}

// Parse reads a line of the serial console. It finds a report also behind the
// unfinished line of a test that printed no newline; before is what the test
// wrote. ok is false if the line is none of ours.
func Parse(token, line string) (before string, r Report, ok bool) {
	before, rest, found := strings.Cut(line, "@@"+token+" ")
	if !found {
		return line, Report{}, false
	}
	fields := strings.SplitN(rest, " ", 4)
	if len(fields) < 4 {
		return line, Report{}, false
	}
	number, err := strconv.Atoi(fields[1])
	if err != nil {
		return line, Report{}, false
	}
	status, err := strconv.Atoi(fields[2])
	if err != nil {
		return line, Report{}, false
	}
	return before, Report{Event: Event(fields[0]), Number: number, Status: status, Text: fields[3]}, true
}
