package cgroup

import "golang.org/x/sys/unix"

// errNoDevice is what reading and writing a file of a removed cgroup gives.
const errNoDevice = unix.ENODEV

// isUnified asks for the filesystem's type.
func isUnified(dir string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false, err
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}
