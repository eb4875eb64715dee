// Command blocks prints what the pages say about tests, for those that cannot import
// package docs: test/e2e is another module.
//
//	blocks of TEST         the blocks that it is said to run, as JSON
//	blocks tests DIR       a pattern of the tests in a directory that are named, for go test -run
//	blocks packages DIR    the packages with such tests that are not below the directory
//	blocks others DIR      a pattern of the tests in these
//
// It is run in the repository's root.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/csi-loop/csi-loop/test/docs"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "blocks:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: blocks of TEST | tests DIR | packages DIR | others DIR")
	}
	if args[0] == "of" {
		found, err := docs.RunBy(".", args[1])
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(found)
	}
	var inside, outside, packages []string
	all, err := docs.Read(".")
	if err != nil {
		return err
	}
	for _, b := range all {
		runs, err := b.Runs()
		if err != nil {
			return err
		}
		for _, r := range runs {
			if strings.HasPrefix(r.File, args[1]+"/") {
				inside = append(inside, r.Test)
				continue
			}
			outside, packages = append(outside, r.Test), append(packages, "./"+path.Dir(r.File))
		}
	}
	switch args[0] {
	case "tests":
		fmt.Println(pattern(inside))
	case "others":
		fmt.Println(pattern(outside))
	case "packages":
		slices.Sort(packages)
		fmt.Println(strings.Join(slices.Compact(packages), " "))
	default:
		return fmt.Errorf("%s is no command", args[0])
	}
	return nil
}

// pattern matches the names. It has nothing that make or a shell would take for its own
// within quotes.
func pattern(names []string) string {
	slices.Sort(names)
	return strings.Join(slices.Compact(names), "|")
}
