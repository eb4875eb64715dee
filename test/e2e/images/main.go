// Command images makes the container images that the tests run, without a
// registry and without a container engine: each is one archive that containerd
// imports under the official name, so that manifests need no change.
//
//	images BINARIES [DIRECTORY]
//
// BINARIES is what build printed; the archives go to its directory "images", or
// the one given. An archive that is newer than its programs stays.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) < 1 || len(args) > 2 {
		return errors.New("usage: images BINARIES [DIRECTORY]")
	}
	bin, dir := args[0], filepath.Join(args[0], "images")
	if len(args) == 2 {
		dir = args[1]
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, img := range all(bin) {
		made, err := img.make(ctx, filepath.Join(dir, img.file+".tar"))
		if err != nil {
			return fmt.Errorf("%s: %w", img.file, err)
		}
		if made {
			fmt.Fprintln(os.Stderr, "images:", img.names[0])
		}
	}
	return nil
}

// image is what an archive is made from.
type image struct {
	file    string
	names   []string // repository and tag, as in the registry
	program string   // the binary that it is about; an archive is made if it exists
	config  config
	fill    func(ctx context.Context, t *tree) error
}

// make reports whether it had to.
func (i image) make(ctx context.Context, path string) (bool, error) {
	program, err := os.Stat(i.program)
	if err != nil {
		return false, nil // not built: nobody asked for it
	}
	if old, err := os.Stat(path); err == nil && old.ModTime().After(program.ModTime()) {
		return false, nil
	}
	t := newTree()
	if err := i.fill(ctx, t); err != nil {
		return false, err
	}
	var layer bytes.Buffer
	if err := t.write(&layer); err != nil {
		return false, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".making-")
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // gone by then, or garbage
	if err := archive(f, layer.Bytes(), i.config, i.names); err != nil {
		return false, errors.Join(err, f.Close())
	}
	return true, errors.Join(f.Chmod(0o644), f.Close(), os.Rename(f.Name(), path))
}
