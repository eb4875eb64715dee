// Command generate writes what is made from the chart: the table of values in its
// README and in docs/reference, the plain manifests of deploy/, and the chart's copy of the CRDs of
// snapshots.
package main

import (
	"fmt"
	"os"
)

func main() {
	for _, step := range []func() error{crds, readme, reference, manifests} {
		if err := step(); err != nil {
			fmt.Fprintln(os.Stderr, "generate:", err)
			os.Exit(1)
		}
	}
}
