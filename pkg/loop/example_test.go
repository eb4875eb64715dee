package loop_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/csi-loop/csi-loop/pkg/loop"
)

// An image is attached, used and detached.
func Example() {
	ctx := context.Background()
	manager, err := loop.New(ctx)
	if err != nil {
		log.Fatal(err) // says what the machine lacks
	}
	defer manager.Close()

	image, err := os.OpenFile("/var/lib/images/disk.img", os.O_RDWR, 0)
	if err != nil {
		log.Fatal(err)
	}
	device, err := manager.Attach(ctx, image, loop.Mapping{
		BlockSize: 4096,
		DirectIO:  loop.DirectIOAuto,
		Tag:       "my disk",
	})
	image.Close() // the device keeps the file
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(device.Path(), device.Size())

	// Closing lets go of the device; detaching ends the binding.
	if err := device.Close(); err != nil {
		log.Fatal(err)
	}
	err = manager.Detach(ctx, device.Ref())
	if errors.Is(err, loop.ErrBusy) {
		log.Print("somebody still uses it; it is unbound when he leaves")
	}
}

// A device for a mount frees itself when it is unmounted, and when the program dies
// before it has mounted it.
func ExampleManager_Attach_mount() {
	ctx := context.Background()
	manager, err := loop.New(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	image, err := os.OpenFile("/var/lib/images/disk.img", os.O_RDWR, 0)
	if err != nil {
		log.Fatal(err)
	}
	defer image.Close()
	device, err := manager.Attach(ctx, image, loop.Mapping{BlockSize: 4096, Autoclear: true})
	if err != nil {
		log.Fatal(err)
	}
	// ... mount device.Path() here; the mount is what holds the device from now on.
	device.Close()
	// ... and after the unmount:
	if err := manager.WaitUnbound(ctx, device.Ref()); err != nil {
		log.Fatal(err)
	}
}

// Two ranges of one file become two devices.
func ExampleManager_Attach_range() {
	ctx := context.Background()
	manager, err := loop.New(ctx, loop.WithMax(16))
	if err != nil {
		log.Fatal(err)
	}
	defer manager.Close()
	for _, offset := range []int64{0, 64 << 20} {
		// Opened anew each time: see the package comment on leases.
		image, err := os.OpenFile("/var/lib/images/two.img", os.O_RDWR, 0)
		if err != nil {
			log.Fatal(err)
		}
		device, err := manager.Attach(ctx, image, loop.Mapping{Offset: offset, SizeLimit: 64 << 20, BlockSize: 512})
		image.Close()
		var conflict *loop.ConflictError
		if errors.As(err, &conflict) {
			log.Fatalf("the range is in use by %v", conflict.Ref)
		} else if err != nil {
			log.Fatal(err)
		}
		defer device.Close()
	}
}
