package sanity

// skips are the only specs that may be skipped, by a part of their full text,
// each with the reason. All of them are optional RPCs.
var skips = []struct{ text, reason string }{
	{"ControllerPublishVolume", "nothing is attached over a network: attachRequired is false"},
	{"ControllerUnpublishVolume", "as ControllerPublishVolume"},
	{"ListSnapshots", "snapshots come later"},
	{"GetSnapshot", "snapshots come later"},
	{"CreateSnapshot", "snapshots come later"},
	{"DeleteSnapshot", "snapshots come later"},
	{"should create volume from an existing source snapshot", "snapshots come later"},
	{"should fail when the volume source snapshot is not found", "snapshots come later"},
	{"should create volume from an existing source volume", "clones come later"},
	{"should fail when the volume source volume is not found", "clones come later"},
	{"GroupController", "group snapshots come later"},
	{"CreateVolumeGroupSnapshot", "group snapshots come later"},
	{"DeleteVolumeGroupSnapshot", "group snapshots come later"},
	{"GetVolumeGroupSnapshot", "group snapshots come later"},
	{"ModifyVolume", "changes of a volume's parameters come later"},
	{"volume attribute class", "changes of a volume's parameters come later"},
	{"Controller Server] volume lifecycle", "it is the life over ControllerPublishVolume; the node service's is run"},
}
