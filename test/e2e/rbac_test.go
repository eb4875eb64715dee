package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// auditLog is where the API servers of the test clusters write what csi-loop asks for.
const auditLog = "/var/log/kubernetes/audit.log"

// right is one thing that a service account may do, or has done.
type right struct{ account, scope, group, resource, verb string }

func (r right) String() string {
	return fmt.Sprintf("%s: %s %s in %s", r.account, r.verb, strings.TrimPrefix(r.group+"/"+r.resource, "/"), r.scope)
}

// rare are rights that a healthy run need not use, with what they are for.
var rare = map[string]string{
	"events patch":                  "an event that comes again",
	"persistentvolumes get":         "a volume that the cache has late",
	"persistentvolumeclaims update": "the node of a claim is taken back when a pool is full",
	"leases delete":                 "a replica's lease at its stop",
	"secrets update":                "the certificate of the links is renewed after months",
	"configmaps update":             "its CA, too",
	"secrets get":                   "the certificate, when there is one",
	"configmaps get":                "its CA, too",
	"volumegroupsnapshots patch":    "a group snapshot whose finalizers are to go while its status changes",

	"volumegroupsnapshotcontents/status patch": "a group snapshot that failed",
}

// TestRightsAreThoseThatAreUsed needs the other tests and the suite to have run: it
// compares what csi-loop asked the API for with what the chart grants.
func TestRightsAreThoseThatAreUsed(t *testing.T) {
	if os.Getenv("CSI_LOOP_E2E_AUDIT") == "" {
		t.Skip("it is for the end of a run: make e2e sets CSI_LOOP_E2E_AUDIT")
	}
	e := setup(t)
	probes(e)
	granted := e.granted()
	used, denied := e.audited()
	for _, r := range sorted(denied) {
		// What is granted was refused while the chart was uninstalled.
		here := r
		here.scope = installed
		if !granted[r] && !granted[here] {
			t.Errorf("not granted, and asked for: %s", r)
		}
	}
	for _, r := range sorted(granted) {
		watched := r
		watched.verb = "watch"
		if used[r] || r.verb == "list" && used[watched] { // a watch begins with a list where the API server is older
			continue
		}
		if reason, ok := rare[r.resource+" "+r.verb]; ok {
			t.Logf("not used by this run: %s (%s)", r, reason)
			continue
		}
		t.Errorf("granted, and never used: %s", r)
	}
	for _, r := range sorted(used) {
		if strings.HasSuffix(r.account, "-node") {
			t.Errorf("the nodes use the API: %s", r)
		}
	}
	if len(used) < 20 {
		t.Errorf("the audit log knows of %d rights only: is it of a whole run?", len(used))
	}
}

func sorted(rights map[right]bool) []right {
	return slices.SortedFunc(maps.Keys(rights), func(a, b right) int { return strings.Compare(a.String(), b.String()) })
}

// granted are the rights by roles of the chart.
func (e *env) granted() map[right]bool {
	e.Helper()
	rights := map[right]bool{}
	add := func(subjects []rbacv1.Subject, scope string, rules []rbacv1.PolicyRule) {
		for _, s := range subjects {
			for _, rule := range rules {
				for _, group := range rule.APIGroups {
					for _, resource := range rule.Resources {
						for _, verb := range rule.Verbs {
							rights[right{s.Name, scope, group, resource, verb}] = true
						}
					}
				}
			}
		}
	}
	ours := metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=csi-loop"}
	api := e.client.RbacV1()
	for _, b := range must[*rbacv1.ClusterRoleBindingList](e)(api.ClusterRoleBindings().List(e.Context(), ours)).Items {
		role := must[*rbacv1.ClusterRole](e)(api.ClusterRoles().Get(e.Context(), b.RoleRef.Name, metav1.GetOptions{}))
		add(b.Subjects, "the cluster", role.Rules)
	}
	for _, b := range must[*rbacv1.RoleBindingList](e)(api.RoleBindings(installed).List(e.Context(), ours)).Items {
		role := must[*rbacv1.Role](e)(api.Roles(installed).Get(e.Context(), b.RoleRef.Name, metav1.GetOptions{}))
		add(b.Subjects, installed, role.Rules)
	}
	if len(rights) == 0 {
		e.Fatal("no role of the chart is there")
	}
	return rights
}

// auditEvent is what is of use here in one line of the log.
type auditEvent struct {
	Verb string `json:"verb"`
	User struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef struct {
		APIGroup    string `json:"apiGroup"`
		Resource    string `json:"resource"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
	Annotations map[string]string `json:"annotations"`
}

// audited are the rights that were used, and those that were denied.
func (e *env) audited() (used, denied map[right]bool) {
	e.Helper()
	used, denied = map[right]bool{}, map[right]bool{}
	for _, node := range e.controlPlanes() {
		log := e.onNode(node, "cat "+auditLog+" | grep -F '\"resource\"'; true")
		lines := strings.Split(strings.TrimSpace(log), "\n")
		for i, line := range lines {
			var event auditEvent
			if err := json.Unmarshal([]byte(line), &event); err != nil {
				if i == len(lines)-1 {
					break // it is being written
				}
				e.Fatal(err)
			}
			account, ok := strings.CutPrefix(event.User.Username, "system:serviceaccount:"+installed+":")
			if !ok {
				continue
			}
			o := event.ObjectRef
			resource := o.Resource
			if o.Subresource != "" {
				resource += "/" + o.Subresource
			}
			// "RBAC: allowed by RoleBinding ..." tells by which kind of role.
			scope := "the cluster"
			if strings.Contains(event.Annotations["authorization.k8s.io/reason"], "by RoleBinding") {
				scope = installed
			}
			r := right{account, scope, o.APIGroup, resource, event.Verb}
			if event.Annotations["authorization.k8s.io/decision"] == "forbid" {
				denied[r] = true
				continue
			}
			used[r] = true
		}
	}
	return used, denied
}

// controlPlanes are the nodes with API servers.
func (e *env) controlPlanes() []string {
	e.Helper()
	list := must[*corev1.NodeList](e)(e.client.CoreV1().Nodes().List(e.Context(), metav1.ListOptions{
		LabelSelector: "node-role.kubernetes.io/control-plane",
	}))
	var names []string
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return names
}
