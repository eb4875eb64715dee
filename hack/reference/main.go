// Command reference writes the pages of docs/reference that are about parameters and
// errors, from pkg/driver's tables and from the source of what answers calls.
//
//	go run ./hack/reference docs/reference
package main

import (
	"fmt"
	"os"
)

//go:generate go run . ../../docs/reference

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "reference: name the directory")
		os.Exit(2)
	}
	for _, write := range []func(dir string) error{parameters, errorPage} {
		if err := write(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "reference:", err)
			os.Exit(1)
		}
	}
}
