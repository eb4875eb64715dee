package sanity

// skips are the only specs that may be skipped, by a part of their full text,
// each with the reason. All of them are optional RPCs.
var skips = []struct{ text, reason string }{
	{"ControllerPublishVolume", "nothing is attached over a network: attachRequired is false"},
	{"ControllerUnpublishVolume", "as ControllerPublishVolume"},
	{"creating a snapshot with accessibility requirements", "snapshots are not bound to a topology"},
	{"Controller Server] volume lifecycle", "it is the life over ControllerPublishVolume; the node service's is run"},
}
