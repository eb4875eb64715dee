package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// idle is a command that does nothing and ends at once when asked.
var idle = []string{"sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"}

// class makes a StorageClass for the test. Parameters are pairs of key and value.
func (e *env) class(change func(*storagev1.StorageClass), parameters ...string) string {
	e.Helper()
	c := &storagev1.StorageClass{
		ObjectMeta:  metav1.ObjectMeta{GenerateName: "csi-loop-e2e-", Labels: map[string]string{mark: ""}},
		Provisioner: driver, Parameters: map[string]string{}, AllowVolumeExpansion: new(true),
		VolumeBindingMode: new(storagev1.VolumeBindingWaitForFirstConsumer),
	}
	for pair := range slices.Chunk(parameters, 2) {
		c.Parameters[pair[0]] = pair[1]
	}
	if change != nil {
		change(c)
	}
	classes := e.client.StorageV1().StorageClasses()
	made := must[*storagev1.StorageClass](e)(classes.Create(e.Context(), c, metav1.CreateOptions{}))
	e.Cleanup(func() {
		if err := classes.Delete(context.Background(), made.Name, metav1.DeleteOptions{}); err != nil {
			e.Error(err)
		}
	})
	return made.Name
}

// filesystem makes a class for one.
func (e *env) filesystem(kind string) string {
	e.Helper()
	return e.class(nil, "csi.storage.k8s.io/fstype", kind)
}

func immediate(c *storagev1.StorageClass) {
	c.VolumeBindingMode = new(storagev1.VolumeBindingImmediate)
}

// claim is one of a volume with a filesystem for one node.
func claim(name, class, size string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: &class,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}},
		},
	}
}

func (e *env) createClaim(c *corev1.PersistentVolumeClaim) {
	e.Helper()
	must[*corev1.PersistentVolumeClaim](e)(e.client.CoreV1().PersistentVolumeClaims(e.namespace).Create(e.Context(), c, metav1.CreateOptions{}))
}

// pod is one container that ends by itself.
func pod(name, node, image string, args ...string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{
			NodeName: node, RestartPolicy: corev1.RestartPolicyNever,
			TerminationGracePeriodSeconds: new(int64(1)),
			Containers: []corev1.Container{{
				Name: "main", Image: image, Args: args, ImagePullPolicy: corev1.PullIfNotPresent,
			}},
		},
	}
}

// shell is a pod that idles on a node, or on any if there is none given, and has
// the claims mounted below /data, or as devices /dev/NAME. The scheduler places
// it, as it does every pod with volumes.
func (e *env) shell(name, node string, claims ...string) *corev1.Pod {
	e.Helper()
	p := pod(name, "", busybox)
	p.Spec.Containers[0].Command = idle
	p.Spec.RestartPolicy = corev1.RestartPolicyAlways
	if node != "" {
		p.Spec.NodeSelector = map[string]string{hostname: node}
		p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoSchedule}}
	}
	for _, c := range claims {
		e.attach(p, c)
	}
	return p
}

// attach gives the pod a claim.
func (e *env) attach(p *corev1.Pod, name string) {
	e.Helper()
	c := must[*corev1.PersistentVolumeClaim](e)(e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(e.Context(), name, metav1.GetOptions{}))
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name},
	}})
	main := &p.Spec.Containers[0]
	if c.Spec.VolumeMode != nil && *c.Spec.VolumeMode == corev1.PersistentVolumeBlock {
		main.VolumeDevices = append(main.VolumeDevices, corev1.VolumeDevice{Name: name, DevicePath: "/dev/" + name})
		return
	}
	main.VolumeMounts = append(main.VolumeMounts, corev1.VolumeMount{Name: name, MountPath: "/data/" + name})
}

// start creates a pod and does not wait.
func (e *env) start(p *corev1.Pod) {
	e.Helper()
	must[*corev1.Pod](e)(e.client.CoreV1().Pods(e.namespace).Create(e.Context(), p, metav1.CreateOptions{}))
}

// run creates a pod and waits for a phase; it fails with what the pod says.
func (e *env) run(p *corev1.Pod, want corev1.PodPhase) *corev1.Pod {
	e.Helper()
	e.start(p)
	return e.waitPhase(p.Name, want)
}

func (e *env) waitPhase(name string, want corev1.PodPhase) *corev1.Pod {
	e.Helper()
	var last *corev1.Pod
	e.eventually(fmt.Sprintf("pod %s is %s", name, want), patience, func(ctx context.Context) error {
		p, err := e.client.CoreV1().Pods(e.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		last = p
		if p.Status.Phase == corev1.PodFailed && want != corev1.PodFailed {
			e.Fatalf("pod %s failed: %s", name, e.logs(name))
		}
		if p.Status.Phase != want || want == corev1.PodRunning && !running(p) {
			return fmt.Errorf("it is %s\n%s", p.Status.Phase, e.events(name))
		}
		return nil
	})
	return last
}

// running reports whether a pod's containers are, and are to stay.
func running(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// stop deletes a pod and waits until it is gone.
func (e *env) stop(name string) {
	e.Helper()
	pods := e.client.CoreV1().Pods(e.namespace)
	if err := pods.Delete(e.Context(), name, metav1.DeleteOptions{}); err != nil {
		e.Fatal(err)
	}
	e.eventually("pod "+name+" is gone", patience, func(ctx context.Context) error {
		_, err := pods.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(errors.New("it is still there"), err)
	})
}

// restartPods deletes pods and waits until as many others are ready.
func (e *env) restartPods(namespace, selector string) {
	e.Helper()
	pods := e.client.CoreV1().Pods(namespace)
	options := metav1.ListOptions{LabelSelector: selector}
	old, want := map[string]bool{}, 0
	for _, p := range must[*corev1.PodList](e)(pods.List(e.Context(), options)).Items {
		old[string(p.UID)] = true
		if p.DeletionTimestamp == nil { // the last of an upgrade may be on their way out
			want++
		}
	}
	if want == 0 {
		e.Fatalf("no pod in %s has %s", namespace, selector)
	}
	if err := pods.DeleteCollection(e.Context(), metav1.DeleteOptions{}, options); err != nil {
		e.Fatal(err)
	}
	e.waitPods(namespace, selector, want, func(p *corev1.Pod) bool { return !old[string(p.UID)] })
}

// waitPods waits for so many ready pods, and no others but such as are on their way
// out.
func (e *env) waitPods(namespace, selector string, want int, counts func(*corev1.Pod) bool) {
	e.Helper()
	e.eventually(fmt.Sprintf("%d pods with %s are ready", want, selector), patience, func(ctx context.Context) error {
		list, err := e.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
		if err != nil {
			return err
		}
		var have, staying int
		for i := range list.Items {
			p := &list.Items[i]
			if p.DeletionTimestamp == nil {
				staying++
			}
			if running(p) && counts(p) {
				have++
			}
		}
		if have != want || staying != want {
			return fmt.Errorf("%d of %d are", have, staying)
		}
		return nil
	})
}

// driverPods are the driver's on the nodes.
const driverPods = "app.kubernetes.io/name=csi-loop,app.kubernetes.io/component=node"

// controllerPods are the controller's.
const controllerPods = "app.kubernetes.io/name=csi-loop,app.kubernetes.io/component=controller"

// volumeOf is the volume that is bound to a claim.
func (e *env) volumeOf(name string) *corev1.PersistentVolume {
	e.Helper()
	var volume *corev1.PersistentVolume
	e.eventually("claim "+name+" is bound", patience, func(ctx context.Context) error {
		c, err := e.client.CoreV1().PersistentVolumeClaims(e.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if c.Status.Phase != corev1.ClaimBound {
			return fmt.Errorf("it is %s\n%s", c.Status.Phase, e.events(name))
		}
		volume, err = e.client.CoreV1().PersistentVolumes().Get(ctx, c.Spec.VolumeName, metav1.GetOptions{})
		return err
	})
	return volume
}
