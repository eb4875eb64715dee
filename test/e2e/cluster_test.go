package e2e

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// What the other tests take for granted, so that a cluster's fault is not taken
// for the driver's.

func TestEveryNodeRunsPods(t *testing.T) {
	e := setup(t)
	nodes := e.nodes()
	if len(nodes) == 0 {
		t.Fatal("no node is ready")
	}
	for _, node := range nodes {
		e.run(pod("version-"+node, node, agnhost, "--version"), corev1.PodSucceeded)
	}
}

func TestServicesAreReachedByNameFromEveryNode(t *testing.T) {
	e := setup(t)
	nodes := e.nodes()
	server := pod("server", nodes[len(nodes)-1], agnhost, "netexec", "--http-port=8080")
	e.run(server, corev1.PodRunning)
	for name, clusterIP := range map[string]string{"plain": "", "headless": corev1.ClusterIPNone} {
		_, err := e.client.CoreV1().Services(e.namespace).Create(t.Context(), &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.ServiceSpec{
				Selector: server.Labels, ClusterIP: clusterIP,
				Ports: []corev1.ServicePort{{Port: 8080, TargetPort: intstr.FromInt32(8080)}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, node := range nodes {
		for _, service := range []string{"plain", "headless"} {
			p := pod(service+"-from-"+node, node, agnhost, "connect", service+":8080", "--timeout=5s")
			p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure // rules and names arrive a moment later
			e.run(p, corev1.PodSucceeded)
		}
	}
}
