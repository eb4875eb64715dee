package crypt

import "errors"

var (
	// ErrUnavailable says that this machine cannot do it; the message names what is missing.
	ErrUnavailable = errors.New("encryption is not available here")
	// ErrPassphrase says that no key slot opens with the passphrase.
	ErrPassphrase = errors.New("wrong passphrase")
	// ErrNoHeader says that neither copy of a LUKS2 header is whole.
	ErrNoHeader = errors.New("no LUKS2 header")
	// ErrForeign says that there is a LUKS header which is not of the layout that is made here.
	ErrForeign = errors.New("a LUKS header of another layout")
	// ErrBusy says that a mapping has users and stays.
	ErrBusy = errors.New("the mapping is in use")
	// ErrGone says that a mapping ended meanwhile.
	ErrGone = errors.New("the mapping is gone")
)
