package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// checkAccount compares GetCapacity with what the pool's filesystem and the records
// give: free space, less what volumes may still take, less 1 MiB, and less what is kept
// back of large filesystems (fact 106).
func (c *churn) checkAccount() error {
	var got int64
	err := call(func(ctx context.Context) error {
		r, err := c.controller().GetCapacity(ctx, &csi.GetCapacityRequest{})
		got = r.GetAvailableCapacity()
		return err
	})
	if err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(pool, &fs); err != nil {
		return err
	}
	free := int64(fs.Bavail)*fs.Bsize - max(0, int64(fs.Blocks)*fs.Bsize/200-8*mib)
	for _, record := range glob(pool + "/csi/volumes/*/volume.json") {
		claimed, err := claim(record)
		if err != nil {
			return fmt.Errorf("%s: %w", record, err)
		}
		free -= claimed
	}
	if want := max(0, free-mib) / mib * mib; got > want || got < want-mib {
		return fmt.Errorf("GetCapacity says %d, the pool %d", got, want)
	}
	return nil
}

// claim is what the volume of a record may still take: blocks that it lacks, and those
// that it shares.
func claim(record string) (int64, error) {
	var v struct {
		Size int64 `json:"size"`
	}
	b, err := os.ReadFile(record)
	if err == nil {
		err = json.Unmarshal(b, &v)
	}
	if err != nil {
		return 0, err
	}
	image := filepath.Join(filepath.Dir(record), "disk.img")
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return 0, err
	}
	shared, err := sharedBytes(image)
	return min(v.Size, max(0, v.Size-st.Blocks*512)+shared), err
}

// sharedBytes is how much of an image other files have too.
func sharedBytes(image string) (int64, error) {
	out, err := exec.Command("filefrag", "-v", "-b4096", image).Output()
	if err != nil {
		return 0, fmt.Errorf("filefrag: %w", err)
	}
	var shared int64
	for line := range strings.Lines(string(out)) {
		// number: logical: physical: length: [expected:] flags
		columns := strings.Split(line, ":")
		if len(columns) < 5 || !strings.Contains(columns[len(columns)-1], "shared") {
			continue
		}
		blocks, err := strconv.ParseInt(strings.TrimSpace(columns[3]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("filefrag: %q: %w", line, err)
		}
		shared += blocks * 4096
	}
	return shared, nil
}
