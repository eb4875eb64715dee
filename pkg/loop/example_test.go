package loop_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// An image is attached, used and detached.
func Example() {
	attach := func(ctx context.Context) error {
		manager, err := loop.New(ctx)
		if err != nil {
			return err // says what the machine lacks
		}
		defer manager.Close()

		image, err := os.OpenFile("/var/lib/images/disk.img", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer image.Close() // the device keeps the file
		device, err := manager.Attach(ctx, image, loop.Mapping{
			BlockSize: 4096,
			DirectIO:  loop.DirectIOAuto,
			Tag:       "my disk",
		})
		if err != nil {
			return err
		}
		fmt.Println(device.Path(), device.Size())

		// Closing lets go of the device; detaching ends the binding.
		if err := device.Close(); err != nil {
			return err
		}
		err = manager.Detach(ctx, device.Ref())
		if errors.Is(err, loop.ErrBusy) {
			fmt.Println("somebody still uses it; it is unbound when he leaves")
		}
		return err
	}
	_ = attach
}

// A device for a mount frees itself when it is unmounted, and when the program dies
// before it has mounted it.
func ExampleManager_Attach_mount() {
	use := func(ctx context.Context, manager *loop.Manager, image *os.File) error {
		device, err := manager.Attach(ctx, image, loop.Mapping{BlockSize: 4096, Autoclear: true})
		if err != nil {
			return err
		}
		// ... mount device.Path() here; the mount is what holds the device from now on.
		if err := device.Close(); err != nil {
			return err
		}
		// ... and after the unmount:
		return manager.WaitUnbound(ctx, device.Ref())
	}
	_ = use
}

// Two ranges of one file become two devices.
func ExampleManager_Attach_range() {
	attach := func(ctx context.Context, manager *loop.Manager, path string, offset int64) (*loop.Device, error) {
		// Opened anew for each Attach: see the package comment on leases.
		image, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		defer image.Close()
		device, err := manager.Attach(ctx, image, loop.Mapping{Offset: offset, SizeLimit: 64 << 20, BlockSize: 512})
		if conflict, ok := errors.AsType[*loop.ConflictError](err); ok {
			return nil, fmt.Errorf("the range is in use by %v", conflict.Ref)
		}
		return device, err
	}
	_ = attach
}
