// Package e2e tests csi-loop in a Kubernetes cluster.
package e2e

// The snapshot CRDs that the cluster installs come from this module's
// directory; importing a package of it keeps it in go.mod, at the version of the
// sidecars.
import _ "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
