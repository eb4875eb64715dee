package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// numbered is name.yaml for 1, and name-2.yaml and so on for what follows.
func numbered(name string, n int) string {
	if n == 1 {
		return name + ".yaml"
	}
	return fmt.Sprintf("%s-%d.yaml", name, n)
}

// createNumbered creates the first of name.yaml, name-2.yaml and so on that is not there.
func createNumbered(name string) (*os.File, error) {
	for n := 1; ; n++ {
		f, err := createNew(numbered(name, n))
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
	}
}

// createNew creates a file that only its owner can read. One that is there is an error,
// fs.ErrExist.
func createNew(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// existing lists name.yaml and name-N.yaml, those that are there.
func existing(name string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		n, yaml := strings.CutSuffix(e.Name(), ".yaml")
		n, ours := strings.CutPrefix(n, filepath.Base(name))
		if yaml && ours && strings.Trim(n, "-0123456789") == "" {
			all = append(all, filepath.Join(filepath.Dir(name), e.Name()))
		}
	}
	return all, nil
}

// syncDir makes what was created or renamed in the directory of a file last.
func syncDir(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
