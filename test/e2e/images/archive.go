package main

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// config is the part of an image's configuration that says how to run it.
type config struct {
	Entrypoint []string `json:"Entrypoint,omitempty"` //nolint:tagliatelle // the image format's names
	Cmd        []string `json:"Cmd,omitempty"`        //nolint:tagliatelle // the image format's names
	Env        []string `json:"Env,omitempty"`        //nolint:tagliatelle // the image format's names
	User       string   `json:"User,omitempty"`       //nolint:tagliatelle // the image format's names
}

// archive writes an image of one layer in the form of "docker save". Equal input
// makes equal archives.
func archive(w io.Writer, layer []byte, cfg config, names []string) error {
	sum := sha256.Sum256(layer)
	type history struct {
		Created time.Time `json:"created"`
	}
	type rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	description, err := json.Marshal(struct {
		Architecture string    `json:"architecture"`
		OS           string    `json:"os"`
		Created      time.Time `json:"created"`
		Config       config    `json:"config"`
		Rootfs       rootfs    `json:"rootfs"`
		History      []history `json:"history"`
	}{
		runtime.GOARCH, "linux", time.Unix(0, 0).UTC(), cfg,
		rootfs{"layers", []string{"sha256:" + hex.EncodeToString(sum[:])}},
		[]history{{time.Unix(0, 0).UTC()}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]map[string]any{
		{"Config": "config.json", "RepoTags": names, "Layers": []string{"layer.tar"}},
	})
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	for _, f := range []struct {
		name    string
		content []byte
	}{{"manifest.json", manifest}, {"config.json", description}, {"layer.tar", layer}} {
		header := &tar.Header{Name: f.name, Mode: 0o644, Size: int64(len(f.content)), ModTime: time.Unix(0, 0)}
		if err := t.WriteHeader(header); err != nil {
			return err
		}
		if _, err := t.Write(f.content); err != nil {
			return err
		}
	}
	return t.Close()
}

// tree is the file system of an image.
type tree struct {
	nodes map[string]node // by absolute path
}

type node struct {
	mode   fs.FileMode // with the type
	text   []byte      // of a small file
	source string      // else where the content is
	link   string      // of a symbolic link
}

func newTree() *tree { return &tree{nodes: map[string]node{}} }

// dir makes a directory and its parents.
func (t *tree) dir(name string, mode fs.FileMode) {
	if name = path.Clean(name); name == "/" {
		return
	}
	if _, ok := t.nodes[name]; !ok {
		t.dir(path.Dir(name), 0o755)
		t.nodes[name] = node{mode: fs.ModeDir | mode}
	}
}

// file, program and link replace what is there.
func (t *tree) file(name, text string) {
	t.dir(path.Dir(name), 0o755)
	t.nodes[path.Clean(name)] = node{mode: 0o644, text: []byte(text)}
}

func (t *tree) program(name, source string) {
	t.dir(path.Dir(name), 0o755)
	t.nodes[path.Clean(name)] = node{mode: 0o755, source: source}
}

func (t *tree) link(name, to string) {
	t.dir(path.Dir(name), 0o755)
	t.nodes[path.Clean(name)] = node{mode: fs.ModeSymlink | 0o777, link: to}
}

func (t *tree) has(name string) bool {
	_, ok := t.nodes[path.Clean(name)]
	return ok
}

func (t *tree) remove(name string) { delete(t.nodes, path.Clean(name)) }

// write is sorted, owned by root and undated.
func (t *tree) write(w io.Writer) error {
	names := make([]string, 0, len(t.nodes))
	for name := range t.nodes {
		names = append(names, name)
	}
	slices.Sort(names)
	out := tar.NewWriter(w)
	for _, name := range names {
		if err := t.nodes[name].write(out, strings.TrimPrefix(name, "/")); err != nil {
			return err
		}
	}
	return out.Close()
}

func (n node) write(out *tar.Writer, name string) error {
	header := &tar.Header{Name: name, Mode: int64(n.mode.Perm()), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
	switch {
	case n.mode.IsDir():
		header.Typeflag, header.Name = tar.TypeDir, name+"/"
		if n.mode&fs.ModeSticky != 0 {
			header.Mode |= 0o1000
		}
		return out.WriteHeader(header)
	case n.mode&fs.ModeSymlink != 0:
		header.Typeflag, header.Linkname = tar.TypeSymlink, n.link
		return out.WriteHeader(header)
	case n.source == "":
		header.Size = int64(len(n.text))
		if err := out.WriteHeader(header); err != nil {
			return err
		}
		_, err := out.Write(n.text)
		return err
	}
	f, err := os.Open(filepath.Clean(n.source))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	header.Size = info.Size()
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	written, err := io.Copy(out, f)
	if err == nil && written != info.Size() {
		err = errors.New(n.source + " changed while it was read")
	}
	return err
}
