package loop

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// linux is the running kernel.
type linux struct {
	hostFiles
	sysBlock string
	control  *os.File
}

// newKernel opens loop-control at dev, or by a node of its own made in nodeDir.
func newKernel(dev, sysfs, nodeDir string) (kernel, error) {
	k := &linux{sysBlock: filepath.Join(sysfs, "block")}
	path := filepath.Join(dev, "loop-control")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		var id string
		if id, err = readAttr(filepath.Join(sysfs, "class/misc/loop-control/dev")); err != nil {
			return nil, unix.ENODEV // no such driver in this kernel
		}
		path = filepath.Join(nodeDir, "loop-control")
		if err = makeNode(path, id, unix.S_IFCHR); err == nil {
			fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	k.control = os.NewFile(uintptr(fd), path)
	return k, nil
}

// newReader is a kernel without loop-control.
func newReader(sysfs string) (kernel, error) {
	return &linux{sysBlock: filepath.Join(sysfs, "block")}, nil
}

func (k *linux) Close() error { return k.control.Close() }

// ctl is an ioctl that takes a number by value and returns one; x/sys has no wrapper
// for such.
func (k *linux) ctl(request uintptr, number int) (result int, err error) {
	err = withFD(k.control, func(fd int) error {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(number))
		if errno != 0 {
			return errno
		}
		result = int(r)
		return nil
	})
	return result, err
}

func (k *linux) GetFree() (int, error) { return k.ctl(unix.LOOP_CTL_GET_FREE, 0) }

func (k *linux) Add(number int) (int, error) { return k.ctl(unix.LOOP_CTL_ADD, number) }

func (k *linux) Remove(number int) error {
	_, err := k.ctl(unix.LOOP_CTL_REMOVE, number)
	return err
}

func (k *linux) Numbers() ([]int, error) {
	d, err := os.Open(k.sysBlock)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	numbers := make([]int, 0, len(names))
	for _, name := range names {
		if rest, ok := strings.CutPrefix(name, "loop"); ok {
			if n, err := strconv.Atoi(rest); err == nil {
				numbers = append(numbers, n)
			}
		}
	}
	return numbers, nil
}

func (k *linux) attr(number int, name string) string {
	return k.sysBlock + "/loop" + strconv.Itoa(number) + "/" + name
}

func (k *linux) Attr(number int, name string) (string, error) { return readAttr(k.attr(number, name)) }

// readAttr reads a sysfs file by bare system calls: half the cost of os.ReadFile,
// and an Attach reads several.
func readAttr(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var small [512]byte
	buf := small[:]
	for n := 0; ; {
		r, err := unix.Read(fd, buf[n:])
		if err != nil {
			return "", err
		}
		if n += r; r == 0 || n < len(buf) {
			return strings.TrimSuffix(string(buf[:n]), "\n"), nil
		}
		buf = append(buf, make([]byte, os.Getpagesize())...)
	}
}

func (k *linux) SetAttr(number int, name, value string) error {
	fd, err := unix.Open(k.attr(number, name), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(value))
	return err
}

func (k *linux) Open(path, id string, how access) (handle, error) {
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK
	switch how {
	case forReading:
		flags |= unix.O_RDONLY
	case forWriting:
		flags |= unix.O_RDWR
	case forClaim:
		flags |= unix.O_RDONLY | unix.O_EXCL
	}
	// Another device is not even opened: that alone may do something to it, or fail as if
	// it were ours that is not there.
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, err
	} else if !isNode(&st, id) {
		return nil, errNotNode
	}
	var fd int
	for {
		var err error
		if fd, err = unix.Open(path, flags, 0); err == nil {
			break
		} else if !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
	err := unix.Fstat(fd, &st)
	if err == nil && !isNode(&st, id) { // replaced meanwhile
		err = errNotNode
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return linuxHandle(fd), nil
}

func isNode(st *unix.Stat_t, id string) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFBLK && deviceID(st.Rdev) == id
}

func deviceID(rdev uint64) string {
	return strconv.Itoa(int(unix.Major(rdev))) + ":" + strconv.Itoa(int(unix.Minor(rdev)))
}

func (k *linux) MakeNode(path, id string) error { return makeNode(path, id, unix.S_IFBLK) }

// makeNode makes the node beside its place and renames it there, so that nobody
// ever sees a wrong or missing node.
func makeNode(path, id string, kind uint32) error {
	major, minor, _ := strings.Cut(id, ":")
	a, aerr := strconv.ParseUint(major, 10, 32)
	b, berr := strconv.ParseUint(minor, 10, 32)
	if aerr != nil || berr != nil {
		return unix.EINVAL
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(filepath.Dir(path), ".new-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(temp) }()
	node := filepath.Join(temp, "node")
	if err := unix.Mknod(node, kind|0o600, int(unix.Mkdev(uint32(a), uint32(b)))); err != nil {
		return err
	}
	return os.Rename(node, path)
}

// linuxHandle is a file descriptor of a loop device.
type linuxHandle int

func (h linuxHandle) Close() error { return unix.Close(int(h)) }

func (h linuxHandle) Configure(c config) error {
	arg := unix.LoopConfig{Fd: ^uint32(0), Size: c.BlockSize}
	arg.Info.Offset, arg.Info.Sizelimit, arg.Info.Flags = c.Offset, c.SizeLimit, c.Flags
	copy(arg.Info.File_name[:maxTag], c.Tag)
	if c.NoDiscard {
		arg.Info.Encrypt_key_size = 1
	}
	if c.File == nil {
		return unix.IoctlLoopConfigure(int(h), &arg)
	}
	return withFD(c.File, func(fd int) error {
		arg.Fd = uint32(fd)
		return unix.IoctlLoopConfigure(int(h), &arg)
	})
}

func (h linuxHandle) Status() (status, error) {
	info, err := unix.IoctlLoopGetStatus64(int(h))
	if err != nil {
		return status{}, err
	}
	return status{
		Image:     FileID{Dev: info.Device, Ino: info.Inode},
		Offset:    info.Offset,
		SizeLimit: info.Sizelimit,
		Number:    int(info.Number),
		Flags:     info.Flags,
		Tag:       unix.ByteSliceToString(info.File_name[:]),
	}, nil
}

func (h linuxHandle) get64(request uint) (value uint64, err error) {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(h), uintptr(request), uintptr(unsafe.Pointer(&value)))
	if errno != 0 {
		return 0, errno
	}
	return value, nil
}

func (h linuxHandle) Geometry() (int64, int, error) {
	size, err := h.get64(unix.BLKGETSIZE64)
	if err != nil {
		return 0, 0, err
	}
	block, err := unix.IoctlGetInt(int(h), unix.BLKSSZGET)
	return int64(size), block, err
}

func (h linuxHandle) DiskSeq() (uint64, error) { return h.get64(unix.BLKGETDISKSEQ) }

func (h linuxHandle) Clear() error { return unix.IoctlSetInt(int(h), unix.LOOP_CLR_FD, 0) }

func (h linuxHandle) DropCache() error { return unix.IoctlSetInt(int(h), unix.BLKFLSBUF, 0) }

func (h linuxHandle) Sync() error {
	for {
		if err := unix.Fsync(int(h)); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (h linuxHandle) SetCapacity() error {
	return unix.IoctlSetInt(int(h), unix.LOOP_SET_CAPACITY, 0)
}

// Discards asks for a discard of one byte at byte 1, which no device does. The kernel looks
// first whether the device discards at all.
func (h linuxHandle) Discards() (bool, error) {
	odd := [2]uint64{1, 1}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(h), unix.BLKDISCARD, uintptr(unsafe.Pointer(&odd)))
	if errno != 0 && errno != unix.EINVAL && errno != unix.EOPNOTSUPP {
		return false, errno
	}
	return errno != unix.EOPNOTSUPP, nil
}
