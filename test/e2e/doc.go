// Package e2e tests csi-loop in a Kubernetes cluster. The tests need a KUBECONFIG
// for an administrator and nothing else; the README says how to get a cluster.
package e2e

import (
	// The snapshot CRDs that a cluster needs are in this module's directory; importing
	// a package of it keeps it in go.mod, at the version of the sidecars.
	_ "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
)
