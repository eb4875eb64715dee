package driver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
)

// detach is Detach of the loop devices, and says who holds a device that stays busy.
func (d *Driver) detach(ctx context.Context, b binding) error {
	return d.sayHolders(d.loops.Detach(ctx, b.ref()), fmt.Sprintf("loop%d", b.Number))
}

// sayHolders adds to the error of a device that stays busy, named as in /sys/block, what the
// node has built on it. A raw block volume may hold what LVM or md of the node take for
// theirs; they do not let go by themselves.
func (d *Driver) sayHolders(err error, device string) error {
	if err == nil || codeOf(err) != codes.Aborted {
		return err
	}
	holders := holdersOf(d.sys, device)
	if len(holders) == 0 {
		return err
	}
	return fmt.Errorf("%w; the node has built on it: %s", err, strings.Join(holders, ", "))
}

// holdersOf lists what lies over a block device and its partitions, below sys, with what ends
// it. Mappings of ours are left out.
func holdersOf(sys, device string) []string {
	block := filepath.Join(sys, "block")
	whole, _ := filepath.Glob(filepath.Join(block, device, "holders", "*"))
	parts, _ := filepath.Glob(filepath.Join(block, device, device+"p*", "holders", "*"))
	var all []string
	for _, path := range append(whole, parts...) {
		holder := filepath.Base(path)
		attr := func(name string) string {
			b, _ := os.ReadFile(filepath.Join(block, holder, "dm", name))
			return strings.TrimSpace(string(b))
		}
		name, uuid := attr("name"), attr("uuid")
		switch {
		case strings.HasPrefix(name, MappingPrefix):
		case strings.HasPrefix(uuid, "LVM-"):
			all = append(all, fmt.Sprintf("%s (LVM volume %s: deactivate its volume group with vgchange -an)", holder, name))
		case name != "":
			all = append(all, fmt.Sprintf("%s (device-mapper device %s: dmsetup remove %s)", holder, name, name))
		case strings.HasPrefix(holder, "md"):
			all = append(all, fmt.Sprintf("%s (mdadm --stop /dev/%s)", holder, holder))
		default:
			all = append(all, holder)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}
