package chart

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
)

// The rights of the controller, and who of its pod needs each. A right that is not
// here is not granted, and one that is needs a reason here.
var clusterRights = map[string]string{
	"authentication.k8s.io/tokenreviews: create":             "csi-loop: whose token a link shows",
	"storage.k8s.io/csinodes: list watch":                    "csi-loop: the nodes that have the driver; csi-provisioner: topology",
	"/nodes: list watch":                                     "csi-provisioner: the labels that topology is in",
	"/persistentvolumes: get list watch create patch delete": "csi-provisioner: makes, protects and deletes them, gets the source of a clone; csi-resizer: patches their size",
	"/persistentvolumeclaims: list watch update":             "csi-provisioner: selected node and the finalizer of a clone's source; csi-resizer: watches",
	"/persistentvolumeclaims/status: patch":                  "csi-resizer: the new size and conditions",
	"storage.k8s.io/storageclasses: list watch":              "csi-provisioner: parameters, capacity of each class",
	"storage.k8s.io/volumeattributesclasses: get list watch": "csi-provisioner: that of a new claim; csi-resizer: that of a claim to be changed",
	"/events: create patch":                                  "csi-loop: what is wrong with volumes; csi-provisioner and csi-resizer: what a person must know; leader elections",
}

var snapshotRights = map[string]string{
	"snapshot.storage.k8s.io/volumesnapshots: get list watch update":                 "csi-provisioner: the source of a restore, its finalizer",
	"snapshot.storage.k8s.io/volumesnapshotcontents: get list watch patch":           "csi-snapshotter: makes what they describe; csi-provisioner gets the source of a restore",
	"snapshot.storage.k8s.io/volumesnapshotcontents/status: update patch":            "csi-snapshotter: handle, size, readiness",
	"snapshot.storage.k8s.io/volumesnapshotclasses: list watch":                      "csi-snapshotter: parameters",
	"groupsnapshot.storage.k8s.io/volumegroupsnapshotcontents: get list watch patch": "csi-snapshotter: the same for groups",
	"groupsnapshot.storage.k8s.io/volumegroupsnapshotcontents/status: update patch":  "csi-snapshotter: the same for groups",
	"groupsnapshot.storage.k8s.io/volumegroupsnapshotclasses: list watch":            "csi-snapshotter: the same for groups",
}

var namespaceRights = map[string]string{
	"coordination.k8s.io/leases: get list create update delete":            "the sidecars: leader elections; csi-loop: the addresses of replicas, under names that are not known before",
	"storage.k8s.io/csistoragecapacities: list watch create update delete": "csi-provisioner: the free space of nodes",
	"/pods: get":            "csi-provisioner: finds the Deployment, which owns the capacity objects",
	"apps/replicasets: get": "csi-provisioner: finds the Deployment, which owns the capacity objects",
}

var certificateRights = map[string]string{
	"/secrets csi-loop-link: get update":       "csi-loop: the certificate of the links",
	"/configmaps csi-loop-link-ca: get update": "csi-loop: its CA, for the nodes",
	"/secrets: create":                         "csi-loop: the certificate at first; to create cannot be allowed by name",
	"/configmaps: create":                      "csi-loop: its CA at first; to create cannot be allowed by name",
}

func TestRights(t *testing.T) {
	for name, c := range map[string]struct {
		values             string
		cluster, namespace []map[string]string
	}{
		"default":   {"", []map[string]string{clusterRights}, []map[string]string{namespaceRights, certificateRights}},
		"snapshots": {"snapshots: {enabled: true}", []map[string]string{clusterRights, snapshotRights}, []map[string]string{namespaceRights, certificateRights}},
		"given certificate": {
			"controller: {tls: {secretName: a, caConfigMapName: b}}", []map[string]string{clusterRights}, []map[string]string{namespaceRights},
		},
	} {
		t.Run(name, func(t *testing.T) {
			all := render(t, c.values)
			if diff := cmp.Diff(keys(c.cluster), rights(find[*rbac.ClusterRole](t, all, "csi-loop-controller").Rules)); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(keys(c.namespace), rights(find[*rbac.Role](t, all, "csi-loop-controller").Rules)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A viewer reads, one Service's report among it, and has nobody bound to it.
func TestViewerReads(t *testing.T) {
	all := render(t, "viewer: {create: true}")
	want := []string{
		"/persistentvolumes: list", "/pods: list", "/services/proxy http:csi-loop-controller:http: get", "snapshot.storage.k8s.io/volumesnapshotcontents: list",
	}
	if diff := cmp.Diff(want, rights(find[*rbac.ClusterRole](t, all, "csi-loop-viewer").Rules)); diff != "" {
		t.Error(diff)
	}
	for _, o := range all {
		if b, ok := o.(*rbac.ClusterRoleBinding); ok && b.RoleRef.Name == "csi-loop-viewer" {
			t.Errorf("%s binds it", b.Name)
		}
	}
}

func keys(all []map[string]string) []string {
	var out []string
	for _, m := range all {
		for key, reason := range m {
			if reason != "" {
				out = append(out, key)
			}
		}
	}
	slices.Sort(out)
	return out
}

// rights writes rules as one line for each resource.
func rights(rules []rbac.PolicyRule) []string {
	var out []string
	for _, r := range rules {
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				names := ""
				if len(r.ResourceNames) > 0 {
					names = " " + strings.Join(r.ResourceNames, " ")
				}
				out = append(out, fmt.Sprintf("%s/%s%s: %s", group, resource, names, strings.Join(r.Verbs, " ")))
			}
		}
	}
	slices.Sort(out)
	return out
}

// The nodes' pods have no rights at all, and no token that the API server takes.
func TestNodesHaveNoRights(t *testing.T) {
	for name, values := range cases {
		all := render(t, values)
		nodes := map[string]bool{}
		for _, o := range all {
			if ds, ok := o.(*apps.DaemonSet); ok {
				nodes[ds.Spec.Template.Spec.ServiceAccountName] = true
				for _, v := range ds.Spec.Template.Spec.Volumes {
					if v.Projected == nil {
						continue
					}
					for _, s := range v.Projected.Sources {
						if s.ServiceAccountToken != nil && s.ServiceAccountToken.Audience != "csi-loop.io" {
							t.Errorf("%s: a token for %q", name, s.ServiceAccountToken.Audience)
						}
					}
				}
			}
		}
		accounts := map[string]bool{}
		for _, o := range all {
			var role rbac.RoleRef
			var subjects []rbac.Subject
			switch x := o.(type) {
			case *rbac.ClusterRoleBinding:
				role, subjects = x.RoleRef, x.Subjects
			case *rbac.RoleBinding:
				role, subjects = x.RoleRef, x.Subjects
			case *core.ServiceAccount:
				accounts[x.Name] = true
				continue
			default:
				continue
			}
			for _, s := range subjects {
				if nodes[s.Name] || s.Kind != "ServiceAccount" || s.Namespace != Namespace {
					t.Errorf("%s: %s %s/%s has the rights of %s", name, s.Kind, s.Namespace, s.Name, role.Name)
				}
			}
		}
		for account := range nodes {
			if !accounts[account] {
				t.Errorf("%s: there is no account %s", name, account)
			}
		}
	}
}
