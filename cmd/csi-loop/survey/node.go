package survey

import (
	"slices"
	"strings"
)

// Node is what a machine is like, as far as csi-loop needs it.
type Node struct {
	Root    bool
	Release string // of the kernel
	// Calls are kernel interfaces that the driver cannot do without, and the error
	// of trying each.
	Calls []Probe
	// Loop is the error of the loop driver's own check.
	Loop error
	// Encryption is why encrypted volumes cannot be used.
	Encryption error
	// MaxPart is the loop module's parameter: above 0 the kernel looks for partitions
	// in every image.
	MaxPart int
	// Devtmpfs: /dev is the kernel's own, where new devices appear by themselves.
	Devtmpfs bool
	// Filesystems are those that the kernel has loaded.
	Filesystems  []string
	Capabilities uint64 // effective
	Tools        []Tool
	// KubeletDir is where the kubelet keeps pods' volumes, "" if it is not here, and
	// Propagation what mountinfo says of the mount that it is on: "shared:1",
	// "master:1", or nothing.
	KubeletDir  string
	Propagation string
	// Endpoint is where the driver answers, and Serving whether it does.
	Endpoint string
	Serving  bool
	// Freezes are the records of filesystems that somebody began to freeze, and
	// Expedited whether the kernel hurries, as it is made to meanwhile.
	Freezes   []string
	Expedited bool
}

// Probe is something that was tried.
type Probe struct {
	Name, Since string
	Err         error
}

// Tool is a program that the driver calls.
type Tool struct {
	Name, Package string
	Path, Version string // "" when it is not there
	For           string // what is impossible without it
	Needed        bool   // by default
}

// Numbers of capabilities.
const (
	capSysAdmin    = 21
	capSysResource = 24
	capMknod       = 27
)

// CheckNode judges a machine.
func CheckNode(n Node) []Finding {
	var f findings
	if !n.Root {
		f.addf(Problem, "node", "sudo csi-loop doctor, or run it in csi-loop's container", "not root: much of what follows could not be looked at")
	}
	f.kernel(n)
	f.capabilities(n)
	for _, t := range n.Tools {
		switch {
		case t.Path != "":
			f.addf(OK, "program "+t.Name, "", "%s (%s)", t.Version, t.Path)
		case t.Needed:
			f.addf(Problem, "program "+t.Name, "install the package "+t.Package, "it is not there: no %s", t.For)
		default:
			f.addf(Warning, "program "+t.Name, "install the package "+t.Package, "it is not there: no %s", t.For)
		}
	}
	switch {
	case n.KubeletDir == "":
	case strings.Contains(n.Propagation, "shared:"):
		f.addf(OK, "kubelet", "", "mounts below %s are seen by the node and its pods", n.KubeletDir)
	default:
		f.addf(Problem, "kubelet", "in a pod: mountPropagation: Bidirectional for that directory; on the node: mount --make-rshared /",
			"%s is on a mount that is not shared (%s): what csi-loop mounts there no pod would see", n.KubeletDir, or(n.Propagation, "private"))
	}
	switch {
	case n.Endpoint == "":
	case n.Serving:
		f.addf(OK, "csi-loop", "", "it answers on %s", n.Endpoint)
	default:
		f.addf(Note, "csi-loop", "", "nobody answers on %s: it does not run, or not here", n.Endpoint)
	}
	f.freezes(n)
	return f
}

// freezes looks for what a driver that ended left behind. One that serves takes back
// itself what it did.
func (f *findings) freezes(n Node) {
	if n.Serving {
		return
	}
	for _, path := range n.Freezes {
		f.addf(Problem, "frozen filesystem", "start csi-loop, which thaws them; or fsfreeze -u the mounts of the volumes that the record names, and remove it",
			"%s is left: who writes to these filesystems may hang", path)
	}
	if len(n.Freezes) > 0 && n.Expedited {
		f.addf(Warning, "kernel", "start csi-loop; or echo 0 > /sys/kernel/rcu_expedited",
			"rcu_expedited is on, as while a filesystem is frozen: all processors are interrupted more often")
	}
}

func (f *findings) kernel(n Node) {
	f.addf(OK, "kernel", "", "Linux %s", n.Release)
	for _, p := range n.Calls {
		if p.Err != nil {
			f.addf(Problem, "kernel", "use Linux 5.15 or later, and a seccomp profile that allows the call", "%s (Linux %s): %v", p.Name, p.Since, p.Err)
		}
	}
	if n.Loop != nil {
		f.addf(Problem, "loop driver", "modprobe loop; a container needs the host's /dev", "%v", n.Loop)
	} else {
		f.addf(OK, "loop driver", "", "binds in one step, and numbers its bindings")
	}
	if n.Encryption != nil {
		f.addf(Note, "encryption", "install cryptsetup; modprobe dm-crypt; a container needs the host's /dev", "no encrypted volumes: %v", n.Encryption)
	} else {
		f.addf(OK, "encryption", "", "cryptsetup and dm-crypt are there")
	}
	if n.MaxPart > 0 {
		f.addf(Warning, "loop driver", "echo options loop max_part=0 > /etc/modprobe.d/loop.conf, and restart the node",
			"max_part is %d: the kernel reads the partition tables of tenants' images", n.MaxPart)
	}
	if !n.Devtmpfs {
		f.addf(Note, "/dev", "give the container the host's /dev", "it is not the kernel's own: csi-loop makes the nodes of loop devices itself, below /dev/csi-loop")
	}
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		if n.Filesystems != nil && !slices.Contains(n.Filesystems, fs) {
			f.addf(Note, "kernel", "modprobe "+fs, "%s is not loaded; the first mount loads it if there is a module", fs)
		}
	}
}

func (f *findings) capabilities(n Node) {
	for _, c := range []struct {
		bit     int
		name    string
		level   Level
		without string
	}{
		{capSysAdmin, "CAP_SYS_ADMIN", Problem, "nothing can be attached or mounted"},
		{capSysResource, "CAP_SYS_RESOURCE", Warning, "a mounted ext4 cannot grow"},
		{capMknod, "CAP_MKNOD", Note, "device nodes that /dev lacks cannot be made"},
	} {
		if n.Capabilities&(1<<c.bit) == 0 {
			f.addf(c.level, "capabilities", "run csi-loop with "+c.name+" (a privileged container has it, unless the container's host has not)", "no %s: %s", c.name, c.without)
		} else {
			f.addf(OK, "capabilities", "", "%s", c.name)
		}
	}
}

func or(s, instead string) string {
	if s == "" {
		return instead
	}
	return s
}

// tools are the programs that the driver calls, not looked for yet.
func tools() []Tool {
	var all []Tool
	for _, fs := range []string{"ext4", "ext3", "ext2", "xfs", "btrfs"} {
		pkg := map[string]string{"xfs": "xfsprogs", "btrfs": "btrfs-progs"}[fs]
		all = append(all, Tool{Name: "mkfs." + fs, Package: or(pkg, "e2fsprogs"), For: "new volumes with " + fs, Needed: fs == "ext4"})
	}
	return append(all,
		Tool{Name: "e2fsck", Package: "e2fsprogs", For: "check of ext filesystems that ask for one", Needed: true},
		Tool{Name: "tune2fs", Package: "e2fsprogs", For: "restores and clones of ext filesystems", Needed: true},
		Tool{Name: "resize2fs", Package: "e2fsprogs", For: "restores and clones of ext filesystems that are larger than their source", Needed: true},
		Tool{Name: "btrfstune", Package: "btrfs-progs", For: "restores and clones of btrfs"},
	)
}
