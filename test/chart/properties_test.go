package chart

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	storage "k8s.io/api/storage/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

func TestCSIDriver(t *testing.T) {
	want := storage.CSIDriverSpec{
		AttachRequired: new(false), PodInfoOnMount: new(true), StorageCapacity: new(true), SELinuxMount: new(true), RequiresRepublish: new(false),
		FSGroupPolicy:        ptr.To(storage.FileFSGroupPolicy),
		VolumeLifecycleModes: []storage.VolumeLifecycleMode{storage.VolumeLifecyclePersistent, storage.VolumeLifecycleEphemeral},
	}
	d := find[*storage.CSIDriver](t, render(t, ""), "csi-loop.io")
	if diff := cmp.Diff(want, d.Spec); diff != "" {
		t.Error(diff)
	}
	if d.Annotations["helm.sh/resource-policy"] != "keep" {
		t.Error("uninstalling would delete it under pods that use volumes")
	}
	d = find[*storage.CSIDriver](t, render(t, everything), "csi-loop.io")
	want.PreventPodSchedulingIfMissing = new(true)
	if diff := cmp.Diff(want, d.Spec); diff != "" {
		t.Error(diff)
	}
	if _, ok := d.Annotations["helm.sh/resource-policy"]; ok || d.Labels["security.kubernetes.io/csi-ephemeral-volume-profile"] != "restricted" {
		t.Errorf("annotations %v, labels %v", d.Annotations, d.Labels)
	}
}

func TestNodePod(t *testing.T) {
	ds := find[*apps.DaemonSet](t, render(t, ""), "csi-loop-node")
	if got := *ds.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable; got != intstr.FromString("10%") {
		t.Errorf("an update stops %v of the nodes at once", got)
	}
	if got := *ds.Spec.UpdateStrategy.RollingUpdate.MaxSurge; got != intstr.FromInt32(0) {
		t.Errorf("maxSurge is %v: the kubelet refuses a second driver of one name", got)
	}
	pod := ds.Spec.Template.Spec
	if pod.HostPID || pod.HostNetwork || pod.HostIPC || ptr.Deref(pod.AutomountServiceAccountToken, true) || len(pod.Containers) != 1 || len(pod.InitContainers) != 0 {
		t.Errorf("the pod has more than it needs: %+v", pod)
	}
	if pod.PriorityClassName != "system-node-critical" || *pod.TerminationGracePeriodSeconds != 45 || pod.ServiceAccountName != "csi-loop-node" {
		t.Errorf("priority %s, grace %d, account %s", pod.PriorityClassName, *pod.TerminationGracePeriodSeconds, pod.ServiceAccountName)
	}
	if diff := cmp.Diff([]core.Toleration{{Operator: core.TolerationOpExists}}, pod.Tolerations); diff != "" {
		t.Error(diff)
	}
	c := pod.Containers[0]
	want := core.SecurityContext{Privileged: new(true), ReadOnlyRootFilesystem: new(true), RunAsUser: ptr.To[int64](0)}
	if diff := cmp.Diff(want, *c.SecurityContext); diff != "" {
		t.Error(diff)
	}
	if c.LivenessProbe.HTTPGet.Path != "/healthz" || c.ReadinessProbe.HTTPGet.Path != "/readyz" || c.Image != "ghcr.io/csi-loop/csi-loop:0.1.0" {
		t.Errorf("%+v", c)
	}
	if strings.HasPrefix(c.TerminationMessagePath, "/dev") || c.TerminationMessagePath == "" {
		t.Errorf("the kubelet makes %q on the node", c.TerminationMessagePath)
	}
	// What is mounted, from where, and how mounts travel.
	type mount struct {
		Path, Host, Propagation string
		Type                    core.HostPathType
	}
	var got []mount
	for _, m := range c.VolumeMounts {
		v := volume(t, pod, m.Name)
		if v.HostPath == nil {
			if !m.ReadOnly && m.MountPath != "/run/cryptsetup" { // locks, in memory
				t.Errorf("%s can be written to", m.MountPath)
			}
			continue
		}
		got = append(got, mount{m.MountPath, v.HostPath.Path, string(ptr.Deref(m.MountPropagation, "")), *v.HostPath.Type})
	}
	if diff := cmp.Diff([]mount{
		{"/var/lib/kubelet", "/var/lib/kubelet", "Bidirectional", core.HostPathDirectory},
		{"/dev", "/dev", "", core.HostPathDirectory},
		{"/run/csi-loop", "/run/csi-loop", "", core.HostPathDirectoryOrCreate},
		{"/host/cgroup", "/sys/fs/cgroup", "", core.HostPathDirectory},
		{"/var/lib/csi-loop", "/var/lib/csi-loop", "HostToContainer", core.HostPathDirectoryOrCreate},
	}, got); diff != "" {
		t.Error(diff)
	}
	link := volume(t, pod, "link").Projected
	if diff := cmp.Diff([]core.VolumeProjection{
		{ServiceAccountToken: &core.ServiceAccountTokenProjection{Audience: "csi-loop.io", ExpirationSeconds: ptr.To[int64](3600), Path: "token"}},
		{ConfigMap: &core.ConfigMapProjection{
			LocalObjectReference: core.LocalObjectReference{Name: "csi-loop-link-ca"}, Items: []core.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}},
		}},
	}, link.Sources); diff != "" {
		t.Error(diff)
	}
}

func volume(t *testing.T, pod core.PodSpec, name string) core.Volume {
	t.Helper()
	i := slices.IndexFunc(pod.Volumes, func(v core.Volume) bool { return v.Name == name })
	if i < 0 {
		t.Fatalf("there is no volume %s", name)
	}
	return pod.Volumes[i]
}

// A changed pool starts the nodes' pods anew; the chart's version alone does not.
func TestConfigurationStartsPodsAnew(t *testing.T) {
	template := func(values string) core.PodTemplateSpec {
		return find[*apps.DaemonSet](t, render(t, values), "csi-loop-node").Spec.Template
	}
	before := template("")
	if diff := cmp.Diff(before, template("log: {level: 4}")); diff == "" {
		t.Error("a changed verbosity reaches no pod")
	}
	for _, m := range []map[string]string{before.Labels, before.Annotations} {
		for key := range m {
			if strings.Contains(key, "version") || strings.Contains(key, "chart") {
				t.Errorf("%s changes with every version of the chart", key)
			}
		}
	}
}

func TestGroups(t *testing.T) {
	all := render(t, cases["groups"])
	nvme, plain := find[*apps.DaemonSet](t, all, "csi-loop-node-nvme"), find[*apps.DaemonSet](t, all, "csi-loop-node-plain")
	sets := 0
	for _, o := range all {
		if _, ok := o.(*apps.DaemonSet); ok {
			sets++
		}
	}
	if sets != 2 {
		t.Errorf("%d DaemonSets", sets)
	}
	if diff := cmp.Diff(map[string]string{"disk": "nvme", "kubernetes.io/os": "linux"}, nvme.Spec.Template.Spec.NodeSelector); diff != "" {
		t.Error(diff)
	}
	for _, ds := range []*apps.DaemonSet{nvme, plain} {
		for key, want := range ds.Spec.Selector.MatchLabels {
			if ds.Spec.Template.Labels[key] != want {
				t.Errorf("%s does not select its pods by %s", ds.Name, key)
			}
		}
	}
	if cmp.Equal(nvme.Spec.Selector, plain.Spec.Selector) {
		t.Error("the groups select each other's pods")
	}
	if c := find[*core.ConfigMap](t, all, "csi-loop-node-nvme"); !strings.Contains(c.Data["config.yaml"], `defaultPool: "slow"`) || !strings.Contains(c.Data["config.yaml"], "path: /hdd") {
		t.Error(c.Data)
	}
	if c := find[*core.ConfigMap](t, all, "csi-loop-node-plain"); strings.Contains(c.Data["config.yaml"], "defaultPool") || !strings.Contains(c.Data["config.yaml"], "path: /var/lib/csi-loop") {
		t.Error(c.Data)
	}
}

// Names that look like numbers, or like true, are names. That no object is refused for one
// is seen by TestObjectsAreValid.
func TestNamesAreStrings(t *testing.T) {
	all := render(t, cases["names that look like something else"])
	for _, name := range []string{"1", "on", "0x1"} {
		set := find[*apps.DaemonSet](t, all, "on-node-"+name)
		if got := set.Spec.Selector.MatchLabels["csi-loop.io/group"]; got != name || set.Spec.Template.Labels["csi-loop.io/group"] != got {
			t.Errorf("group %s is %q", name, got)
		}
	}
	for _, name := range []string{"1", "null", "0x1"} {
		find[*storage.StorageClass](t, all, name)
	}
	pod := find[*apps.Deployment](t, all, "on-controller").Spec.Template.Spec
	if got := volume(t, pod, "tls").Secret.SecretName; got != "1" || pod.PriorityClassName != "no" {
		t.Errorf("secret %q, priority class %q", got, pod.PriorityClassName)
	}
	rendered, err := Render(parse(t, cases["names that look like something else"]), "Helm")
	if err != nil || !strings.Contains(rendered["NOTES.txt"], `storageClassName: "1"`) {
		t.Errorf("%v, %s", err, rendered["NOTES.txt"])
	}
}

func TestControllerPod(t *testing.T) {
	for name, values := range map[string]string{"made": "", "given": everything} {
		t.Run(name, func(t *testing.T) {
			all := render(t, values)
			prefix := map[string]string{"made": "csi-loop", "given": "storage"}[name]
			d := find[*apps.Deployment](t, all, prefix+"-controller")
			pod := d.Spec.Template.Spec
			if !*pod.SecurityContext.RunAsNonRoot || pod.HostNetwork || pod.SecurityContext.SeccompProfile.Type != core.SeccompProfileTypeRuntimeDefault {
				t.Errorf("%+v", pod.SecurityContext)
			}
			for _, c := range pod.Containers {
				s := c.SecurityContext
				if *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []core.Capability{"ALL"}) {
					t.Errorf("%s: %+v", c.Name, s)
				}
				if c.LivenessProbe == nil || len(c.Ports) == 0 {
					t.Errorf("%s has no probe or no port", c.Name)
				}
			}
			args := strings.Join(container(t, pod, "csi-loop").Args, " ")
			secret, dir := strings.Contains(args, "--link-secret=csi-loop-link "), strings.Contains(args, "--link-tls-dir=/tls ")
			if secret != (name == "made") || dir != (name == "given") {
				t.Error(args)
			}
			for _, want := range []string{
				"--leader-election", "--enable-capacity", "--capacity-ownerref-level=2", "--strict-topology", "--immediate-topology=false", "--extra-create-metadata",
				"--timeout=60s", "--retry-interval-max=15s", "--kube-api-capacity-qps=50", "--feature-gates=ReleaseLeaderElectionOnExit=true",
			} {
				if !slices.Contains(container(t, pod, "csi-provisioner").Args, want) {
					t.Errorf("csi-provisioner lacks %s", want)
				}
			}
			if !slices.Contains(container(t, pod, "csi-resizer").Args, "--handle-volume-inuse-error=false") {
				t.Error("csi-resizer watches pods")
			}
			// The nodes dial what the Service offers.
			service := find[*core.Service](t, all, prefix+"-controller")
			for key, want := range service.Spec.Selector {
				if d.Spec.Template.Labels[key] != want {
					t.Errorf("the Service does not select the pods by %s", key)
				}
			}
			config := find[*core.ConfigMap](t, all, prefix+"-node").Data["config.yaml"]
			if !strings.Contains(config, "- "+prefix+"-controller.csi-loop.svc:9808\n") || service.Spec.Ports[0].Port != 9808 {
				t.Error(config)
			}
			budget := find[*policy.PodDisruptionBudget](t, all, prefix+"-controller")
			if *budget.Spec.MaxUnavailable != intstr.FromInt32(1) || *budget.Spec.UnhealthyPodEvictionPolicy != policy.AlwaysAllow {
				t.Error(budget.Spec)
			}
			if diff := cmp.Diff(d.Spec.Selector, pod.TopologySpreadConstraints[0].LabelSelector); diff != "" {
				t.Error(diff)
			}
		})
	}
	one := render(t, "controller: {replicas: 1}")
	if has[*policy.PodDisruptionBudget](one) {
		t.Error("a budget for one replica stops every drain")
	}
	if got := *find[*apps.Deployment](t, one, "csi-loop-controller").Spec.Strategy.RollingUpdate.MaxUnavailable; got != intstr.FromInt32(0) {
		t.Errorf("the only replica is stopped before its successor is there: %v", got)
	}
}

func TestClasses(t *testing.T) {
	plain := find[*storage.StorageClass](t, render(t, ""), "csi-loop")
	if *plain.VolumeBindingMode != storage.VolumeBindingWaitForFirstConsumer || !*plain.AllowVolumeExpansion || *plain.ReclaimPolicy != core.PersistentVolumeReclaimDelete ||
		plain.Provisioner != "csi-loop.io" || !cmp.Equal(plain.Parameters, map[string]string{"csi.storage.k8s.io/fstype": "ext4"}) {
		t.Errorf("%+v", plain)
	}
	all := render(t, everything)
	a, b := find[*storage.StorageClass](t, all, "a"), find[*storage.StorageClass](t, all, "b")
	if diff := cmp.Diff(map[string]string{
		"allocation": "thin", "encrypted": "true", "encryptedDiscard": "true", "csi.storage.k8s.io/fstype": "ext4",
		"csi.storage.k8s.io/node-stage-secret-name": "${pvc.name}", "csi.storage.k8s.io/node-stage-secret-namespace": "${pvc.namespace}",
	}, find[*storage.StorageClass](t, all, "c").Parameters); diff != "" {
		t.Errorf("encrypted class: %s", diff)
	}
	// csi-loop takes more than one word for true.
	one := find[*storage.StorageClass](t, render(t, `storageClasses: [{name: one, parameters: {encrypted: "1"}, nodeStageSecretRef: {name: s, namespace: x}}]`), "one")
	if one.Parameters["encrypted"] != "1" {
		t.Errorf("%v", one.Parameters)
	}
	if diff := cmp.Diff(map[string]string{
		"csi.storage.k8s.io/fstype": "xfs", "pool": "fast", "allocation": "thin", "directIO": "on", "blockSize": "512", "mkfsOptions": "-K", "sourceNode": "required", "readBandwidth": "104857600", "copyInUse": "true", "template": "golden",
	}, a.Parameters); diff != "" {
		t.Error(diff)
	}
	if a.Annotations["storageclass.kubernetes.io/is-default-class"] != "true" || b.Annotations["storageclass.kubernetes.io/is-default-class"] != "" {
		t.Error("the default class is another")
	}
	if *b.VolumeBindingMode != storage.VolumeBindingImmediate || *b.AllowVolumeExpansion || *b.ReclaimPolicy != core.PersistentVolumeReclaimRetain || b.Parameters != nil {
		t.Errorf("%+v", b)
	}
	slow := find[*storage.VolumeAttributesClass](t, all, "slow")
	if diff := cmp.Diff(map[string]string{"readIOPS": "500", "writeBandwidth": "10Mi", "readAhead": "0", "trim": "false"}, slow.Parameters); diff != "" || slow.DriverName != "csi-loop.io" || slow.Labels["tier"] != "slow" {
		t.Error(slow, diff)
	}
	s := find[*snapshot.VolumeSnapshotClass](t, all, "s")
	if s.Driver != "csi-loop.io" || s.DeletionPolicy != snapshot.VolumeSnapshotContentRetain || s.Parameters["p"] != "v" || s.Annotations["snapshot.storage.kubernetes.io/is-default-class"] != "true" {
		t.Errorf("%+v", s)
	}
}

// What is not asked for is not there: its API may be missing.
func TestOptionalObjects(t *testing.T) {
	for name, c := range map[string]struct {
		values string
		want   bool
	}{"default": {"", false}, "everything": {everything, true}} {
		all := render(t, c.values)
		for what, got := range map[string]bool{
			"PodMonitor": has[*monitoring.PodMonitor](all), "PrometheusRule": has[*monitoring.PrometheusRule](all), "NetworkPolicy": has[*networking.NetworkPolicy](all),
			"CRD": has[*apiextensions.CustomResourceDefinition](all), "VolumeSnapshotClass": has[*snapshot.VolumeSnapshotClass](all),
			"VolumeAttributesClass": has[*storage.VolumeAttributesClass](all),
		} {
			if got != c.want {
				t.Errorf("%s: %s is %v", name, what, got)
			}
		}
	}
}

func TestNotesHaveThreeSteps(t *testing.T) {
	for name, values := range cases {
		rendered, err := Render(parse(t, values), "Helm")
		if err != nil {
			t.Fatal(err)
		}
		notes := rendered["NOTES.txt"]
		for _, want := range []string{"\n1. ", "\n2. ", "\n3. ", "kubectl -n csi-loop rollout status daemonset/", "storageClassName: ", "kubectl label namespace csi-loop"} {
			if strings.Count(notes, want) != 1 {
				t.Errorf("%s: %q is there %d times in\n%s", name, want, strings.Count(notes, want), notes)
			}
		}
		if strings.Contains(notes, "<no value>") || strings.Contains(notes, "nil") {
			t.Errorf("%s:\n%s", name, notes)
		}
	}
}
