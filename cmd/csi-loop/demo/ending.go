package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func (d *demo) stepKill(ctx context.Context) error {
	f, err := os.Open(d.letter())
	if err != nil {
		return err
	}
	defer f.Close()
	files, err := loopOver(d.cast.files.image, false)
	if err != nil {
		return err
	}
	pid := d.driver.cmd.Process.Pid
	if err := d.driver.kill(); err != nil {
		return err
	}
	if err := d.disconnect(); err != nil {
		return err
	}
	d.out.factf("killed", "process %d, %s", pid, d.driver.cmd.ProcessState)
	if err := d.showFile(d.letter()); err != nil {
		return fmt.Errorf("without a driver: %w", err)
	}
	start := time.Now()
	if err := d.startDriver(ctx); err != nil {
		return err
	}
	d.out.factf("process", "%d, ready after %s", d.driver.cmd.Process.Pid, millis(time.Since(start)))
	now, err := d.showLoop(d.cast.files.image, grownSize, false)
	if err != nil {
		return err
	}
	if now.name != files.name {
		return fmt.Errorf("the volume moved from %s to %s", files.node(), now.node())
	}
	stats, err := call(ctx, d.client, "NodeGetVolumeStats", d.client.node.NodeGetVolumeStats, &csi.NodeGetVolumeStatsRequest{
		VolumeId: d.cast.files.id, VolumePath: d.target(d.cast.files, firstPod),
	})
	if err != nil {
		return err
	}
	if len(stats.GetUsage()) == 0 {
		return errors.New("no statistics")
	}
	return writeFile(filepath.Join(d.target(d.cast.files, firstPod), "note"), mib, "again")
}

func (d *demo) stepTearDown(ctx context.Context) error {
	for _, v := range d.cast.all() {
		if err := d.detach(ctx, v); err != nil {
			return err
		}
		if !v.made {
			continue
		}
		if err := d.remove(ctx, v); err != nil {
			return err
		}
	}
	if _, err := os.Stat(d.cast.mapped.image); err != nil {
		return fmt.Errorf("the disk image that was there before: %w", err)
	}
	d.out.factf("kept", "%s, which is not the driver's", d.cast.mapped.image)
	return nil
}

func (d *demo) stepProof(ctx context.Context) error {
	if err := d.disconnect(); err != nil {
		return err
	}
	pid := d.driver.cmd.Process.Pid
	if err := d.driver.stop(ctx); err != nil {
		return fmt.Errorf("the driver: %w", err)
	}
	d.out.factf("process", "%d, %s after SIGTERM", pid, d.driver.cmd.ProcessState)
	if _, err := os.Lstat(d.socket()); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the socket is still there: %w", orNothing(err))
	}
	for _, sub := range []string{"volumes", "snapshots"} {
		entries, err := os.ReadDir(filepath.Join(d.poolDir(), sub))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("the pool still has %s", entries[0].Name())
		}
	}
	left, err := leftovers(d.dir)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %v", left)
	}
	d.out.factf("loop", "no device over a file of the demo")
	d.out.factf("mounts", "none below the demo's directory")
	d.out.factf("pool", "empty")
	if err := d.removeDir(ctx); err != nil {
		return err
	}
	d.out.factf("removed", "%s", d.dir)
	return nil
}
