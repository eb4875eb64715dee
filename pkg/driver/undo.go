package driver

import (
	"context"
	"os"
	"path"
	"regexp"
	"strconv"
	"time"

	"github.com/csi-loop/csi-loop/pkg/mount"
)

// undoTime bounds how long a call takes back what it did after its own context
// has ended.
const undoTime = 15 * time.Second

// undoContext is a context for taking back what a call did: it keeps the values
// of ctx (the logger) but not its end.
func undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}

var loopNode = regexp.MustCompile(`^loop(0|[1-9][0-9]*)$`)

// loopNumber finds the number of the loop device behind a mount: by its source
// when a filesystem is mounted (a btrfs mount has a device number of its own),
// by its root when a device node is bind-mounted. It is a hint: whoever acts on
// it asks the device which image it shows.
func loopNumber(m mount.Mount) (int, bool) {
	match := loopNode.FindStringSubmatch(path.Base(m.Source))
	if match == nil && isNodeMount(m) {
		match = loopNode.FindStringSubmatch(path.Base(m.Root))
	}
	if match == nil {
		return 0, false
	}
	n, err := strconv.Atoi(match[1])
	return n, err == nil
}

// isNodeMount says whether a mount whose root is named like a loop device's
// node is one, and not a directory that somebody named so.
func isNodeMount(m mount.Mount) bool {
	if !loopNode.MatchString(path.Base(m.Root)) {
		return false
	}
	if m.FSType == "devtmpfs" {
		return true
	}
	st, err := os.Stat(m.Path)
	return err == nil && st.Mode()&os.ModeDevice != 0
}
