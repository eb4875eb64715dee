package image

import "fmt"

// reason is a kind of problem.
type reason int

const (
	reasonNotFound reason = iota
	reasonNotChecked
	reasonRecordUnreadable
	reasonRecordNewer
	reasonPoolInaccessible
	reasonImageMissing
	reasonImageUnreadable
	reasonImageTruncated
	reasonImageForeign
	reasonNotFullyAllocated
	reasonCopyOnWrite
	reasonGrowthUnfinished
	reasonVolumeOnFullPool
	reasonPoolNearlyFull
	reasonVolumeUnderQuota
	reasonPoolMissing
	reasonPoolFilesystem
	reasonNoDescriptors
	reasonThinPromises
	reasonReserveUsed
	reasonPoolFull
	reasonQuota
	reasonCannotRemove
	reasonVolumeRefused
	reasonVolumeNewer
	reasonSnapshotRefused
	reasonSnapshotNewer
	reasons // how many there are
)

// Words of reasons that others ask for.
const (
	// GrowthUnfinished: a volume's image is larger than its record says.
	GrowthUnfinished = "GrowthUnfinished"
	// CannotRemove: what an interrupted call left is still there.
	CannotRemove = "CannotRemove"
)

const (
	restoreRecord = `stop csi-loop on the node and restore the record (volume.json) from a backup; the data is in disk.img beside it: see "Recovery by hand" in csi-loop's operations guide`
	newerCSILoop  = "a newer csi-loop wrote it: run that version, or a later one, on the node again"
	moreSpace     = "give the pool's filesystem more space, or delete volumes and snapshots that are not needed"
	brokenImage   = `: see "A volume's image is damaged" in csi-loop's operations guide`
)

// reasonTable has of each reason its word, which never changes, and what a person does
// about it. Some words stand for several reasons, which need something else done.
var reasonTable = [reasons]struct{ word, action string }{
	reasonNotFound: {"NotFound", "if it was deleted on purpose, delete its PersistentVolume; else mount the right disk as its pool, or restore its directory from a backup"},
	reasonNotChecked: {
		"NotChecked", "csi-loop stops, or the kernel could not answer just then: it is looked at again by itself; if it stays so, the log of csi-loop on the node says why",
	},
	reasonRecordUnreadable: {"RecordUnreadable", restoreRecord},
	reasonRecordNewer:      {"RecordUnreadable", newerCSILoop},
	reasonPoolInaccessible: {"PoolInaccessible", "mend the pool first: the kernel log of the node says why its disk failed; then restart csi-loop there"},
	reasonImageMissing: {
		"ImageMissing", "as long as a loop device shows it, its data is there: hold the device open before the pods are deleted, and copy it from there; else restore it from a snapshot or a backup" + brokenImage,
	},
	reasonImageUnreadable:   {"ImageUnreadable", "the kernel log of the node says whether the disk fails: copy what can be read, and restore the rest from a snapshot or a backup"},
	reasonImageTruncated:    {"ImageTruncated", "what was cut off is lost: stop the pods, save what is left, and restore it from a snapshot or a backup" + brokenImage},
	reasonImageForeign:      {"ImageForeign", "put the volume's own file back in its place, of the size of its record and with no other link" + brokenImage},
	reasonNotFullyAllocated: {"NotFullyAllocated", "delete the pods that use it: the rest is allocated when the volume is attached the next time"},
	reasonCopyOnWrite:       {"CopyOnWrite", `keep the pool's filesystem from being full, and make the image anew: see "A volume's image is copy-on-write" in csi-loop's operations guide`},
	reasonGrowthUnfinished:  {GrowthUnfinished, "start csi-loop, or csi-loop doctor --repair"},
	reasonVolumeOnFullPool:  {"PoolFull", "give the pool space, then start the volume's pods anew, so that its filesystem is checked"},
	reasonPoolNearlyFull:    {"PoolNearlyFull", moreSpace},
	reasonVolumeUnderQuota:  {"QuotaUsedUp", "raise the quota of the pool's directory, then start the volume's pods anew, so that its filesystem is checked"},
	reasonPoolMissing:       {"PoolMissing", "mount the pool's disk at its directory again, then restart csi-loop on the node"},
	reasonPoolFilesystem: {
		"PoolFilesystem", "the kernel log of the node says why its disk failed: mend or replace it, mount it for writing, then restart csi-loop there",
	},
	reasonNoDescriptors: {"TooManyOpenFiles", "raise the limit of csi-loop (ulimit -n) or of the node (fs.file-max); it goes on by itself once files can be opened"},
	reasonThinPromises:  {"ThinPromisesUncovered", moreSpace},
	reasonReserveUsed:   {"ReserveUsed", moreSpace},
	reasonPoolFull:      {"PoolFull", moreSpace},
	reasonQuota:         {"QuotaUsedUp", "raise the quota of the pool's directory, or delete volumes and snapshots that are not needed"},
	reasonCannotRemove:  {CannotRemove, "remove what holds it (a mount, an immutable file), and restart csi-loop, which removes it"},
	reasonVolumeRefused: {"VolumeRefused", restoreRecord},
	reasonVolumeNewer:   {"VolumeRefused", newerCSILoop},
	reasonSnapshotRefused: {
		"SnapshotRefused", "stop csi-loop on the node and restore the directory from a backup, or remove it and make another snapshot or template",
	},
	reasonSnapshotNewer: {"SnapshotRefused", newerCSILoop},
}

// problemf makes a problem with that reason.
func (r reason) problemf(kind ProblemKind, format string, args ...any) Problem {
	return Problem{Kind: kind, Reason: reasonTable[r].word, Message: fmt.Sprintf(format, args...), Action: reasonTable[r].action}
}

// ReasonKind is a kind of problem, for people.
type ReasonKind struct{ Word, Action string }

// Reasons lists what problems there can be. A word may be there several times, with
// something else to do.
func Reasons() []ReasonKind {
	all := make([]ReasonKind, reasons)
	for i, r := range reasonTable {
		all[i] = ReasonKind{r.word, r.action}
	}
	return all
}
