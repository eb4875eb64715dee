package mount

import (
	"bytes"
	"os"
)

// expeditedFile switches the kernel to grace periods of RCU that interrupt all
// processors instead of waiting for them to come by. FIFREEZE waits for three of them,
// some 10 ms each; expedited they take a fraction of that (fact 102). The switch is one
// for the whole machine, as it is for what else waits for RCU meanwhile. A kernel
// that was told rcu_normal, as those for real time are, pays it no heed.
const expeditedFile = "/sys/kernel/rcu_expedited"

// CanExpedite says whether Freeze can be expedited: the kernel has the switch, and it is
// off. Where somebody has it on already there is nothing to do, nor to undo.
func CanExpedite() bool {
	b, err := os.ReadFile(expeditedFile)
	return err == nil && bytes.Equal(bytes.TrimSpace(b), []byte("0"))
}

// EndExpedite takes back what an expedited Freeze of a process that was killed left.
// Again is harmless. Where the switch is off nothing is written: a process that may not
// write it has not switched it on either.
func EndExpedite() error {
	if CanExpedite() {
		return nil
	}
	return expedite(false)
}

func expedite(on bool) error {
	f, err := os.OpenFile(expeditedFile, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	value := "0"
	if on {
		value = "1"
	}
	// One write, and no more: sysfs takes a value as a whole.
	_, err = f.WriteString(value)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
