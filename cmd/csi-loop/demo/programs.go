package demo

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
)

// checkPrograms names the Debian packages of programs that the driver will want
// and that are missing.
func checkPrograms(n needs) error {
	packages := map[string]string{"mkfs.ext4": "e2fsprogs"}
	if n.fsType() == "xfs" {
		packages["mkfs.xfs"], packages["xfs_growfs"] = "xfsprogs", "xfsprogs"
	} else {
		packages["resize2fs"] = "e2fsprogs"
	}
	var programs, wanted []string
	for program, pkg := range packages {
		if _, err := exec.LookPath(program); err != nil {
			programs = append(programs, program)
			wanted = append(wanted, pkg)
		}
	}
	if len(programs) == 0 {
		return nil
	}
	slices.Sort(programs)
	slices.Sort(wanted)
	return fmt.Errorf("missing %s: install %s (apt-get install %[2]s)", strings.Join(programs, ", "), strings.Join(slices.Compact(wanted), " "))
}
