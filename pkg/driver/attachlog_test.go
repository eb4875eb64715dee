package driver

import (
	"strings"
	"testing"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// Whoever left direct I/O to the kernel can read in the log, at any verbosity, that it
// was not granted.
func TestDirectIOThatWasNotGrantedIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		wish loop.DirectIO
		got  bool
		said bool
	}{
		"auto and granted":     {wish: loop.DirectIOAuto, got: true},
		"auto and not granted": {wish: loop.DirectIOAuto, said: true},
		"off as asked for":     {wish: loop.DirectIOOff},
	} {
		t.Run(name, func(t *testing.T) {
			log := ktesting.NewLogger(t, ktesting.NewConfig(ktesting.Verbosity(0), ktesting.BufferLogs(true)))
			sayAttached(klog.NewContext(t.Context(), log), loop.Mapping{DirectIO: c.wish}, loop.Info{Path: "/dev/loop9", DirectIO: c.got})
			sink, ok := log.GetSink().(ktesting.Underlier)
			if !ok {
				t.Fatal("the logger does not buffer")
			}
			text := sink.GetBuffer().String()
			if said := strings.Contains(text, "/dev/loop9") && strings.Contains(text, "without direct I/O"); said != c.said || (text != "") != c.said {
				t.Errorf("said %q", text)
			}
		})
	}
}
