// Package crypt puts dm-crypt over a block device: LUKS2, by the program cryptsetup.
//
// It knows nothing of loop devices or volumes. A mapping is named by its caller, shows
// itself as /dev/dm-N, and holds the device below it open, so that the device lasts as
// long as the mapping. What exists is asked of the kernel whenever it is needed.
//
// Passphrases go to the program on its standard input and nowhere else. The volume's key
// stays in the kernel: in the table of the mapping, which only root can read, and not in
// a keyring, where a resize would look for it with the rights of whoever asks.
package crypt
