package chart

import (
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	loader3 "helm.sh/helm/v3/pkg/chart/loader"
	common3 "helm.sh/helm/v3/pkg/chartutil"
	engine3 "helm.sh/helm/v3/pkg/engine"
)

// everything switches on all that is optional.
const everything = `
fullnameOverride: storage
commonLabels: {team: storage}
commonAnnotations: {owner: me}
image: {registry: "", repository: csi-loop, tag: e2e, pullPolicy: Never}
imagePullSecrets: [{name: mine}]
kubeletDir: /var/snap/microk8s/common/var/lib/kubelet
pools:
  - {name: default, path: /var/lib/csi-loop, reserve: 10Gi, overcommit: 1.5}
  - {name: fast, path: /mnt/nvme, reserve: 5%, expect: {filesystem: xfs, uuid: 2f2e6a0c-5a0c-4f49-8f0b-0c8f4b8d8f10, poolID: plpwivhsnryfcn4ykk35, existing: true}}
defaultPool: fast
imageDirs: [/srv/images, /srv/more]
ephemeral: {maxSize: 10Gi, maxVolumes: 5, pools: [default]}
transfer: {nodeRate: 100Mi, controllerRate: 1Gi}
loopDevices: {warm: 0, max: 1024}
encryption: {pbkdf: pbkdf2, memory: 128Mi, time: 500ms}
storageClasses:
  - {name: a, default: true, fsType: xfs, parameters: {pool: fast, allocation: thin, directIO: "on", blockSize: 512, mkfsOptions: -K, sourceNode: required, readBandwidth: 104857600, copyInUse: true, template: golden}, mountOptions: [noatime]}
  - {name: c, fsType: ext4, parameters: {encrypted: true, encryptedDiscard: "true", allocation: thin}, nodeStageSecretRef: {name: "${pvc.name}", namespace: "${pvc.namespace}"}}
  - {name: b, reclaimPolicy: Retain, volumeBindingMode: Immediate, allowVolumeExpansion: false, labels: {tier: slow}, annotations: {n: "1"}}
volumeAttributesClasses: [{name: slow, parameters: {readIOPS: 500, writeBandwidth: 10Mi, readAhead: 0, trim: false}, labels: {tier: slow}, annotations: {n: "1"}}]
snapshots: {enabled: true}
volumeSnapshotClasses: [{name: s, default: true, deletionPolicy: Retain, parameters: {p: v}}]
volumeGroupSnapshotClasses: [{name: g}]
snapshotController: {enabled: true, installCRDs: true}
csiDriver: {keep: false, preventPodSchedulingIfMissing: true, labels: {security.kubernetes.io/csi-ephemeral-volume-profile: restricted}}
log: {format: json, level: 4, sidecarLevel: 5}
tracing: {endpoint: "http://collector.monitoring:4317", sampling: 0.25}
node: {maxUnavailable: 1, stopTimeoutSeconds: 60, podLabels: {p: l}, podAnnotations: {a: b}, extraEnv: [{name: GOGC, value: "50"}], affinity: {nodeAffinity: {}}}
controller:
  replicas: 3
  tls: {secretName: given, caConfigMapName: given-ca, serverName: storage.example.com}
  podLabels: {p: l}
  podAnnotations: {a: b}
  extraEnv: [{name: GOGC, value: "50"}]
provisioner: {extraArgs: [--worker-threads=7], image: {digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000"}}
networkPolicy: {enabled: true}
viewer: {create: true}
metrics:
  podMonitor: {enabled: true, interval: 30s, labels: {release: prometheus}, relabelings: [{action: labeldrop, regex: x}], metricRelabelings: [{action: labeldrop, regex: z}]}
  prometheusRule: {enabled: true, labels: {release: prometheus}, extraRules: [{alert: Mine, expr: vector(1)}]}
  grafanaDashboard: {enabled: true, annotations: {grafana_folder: Storage}}
`

// cases are the values that the tests render.
var cases = map[string]string{
	"default":    "",
	"everything": everything,
	"one replica": `
controller: {replicas: 1}`,
	"groups": `
pools: [{name: default, path: /var/lib/csi-loop}]
nodeGroups:
  - {name: nvme, nodeSelector: {disk: nvme}, pools: [{name: fast, path: /nvme}, {name: slow, path: /hdd}], defaultPool: slow, imageDirs: [/images], resources: {limits: {memory: 1Gi}}}
  - {name: plain, nodeSelector: {disk: plain}, tolerations: [{key: x, operator: Exists}]}
storageClasses: [{name: fast, parameters: {pool: fast}}, {name: default, parameters: {pool: default}}]`,
	"no classes": `
storageClasses: []`,
	// What is read from a file, and what Helm stores, has numbers of floating point.
	"numbers": `
pools: [{name: default, path: /var/lib/csi-loop, reserve: 10737418240, overcommit: 2}]
ephemeral: {maxSize: 21474836480, maxVolumes: 100000}
transfer: {nodeRate: 104857600, controllerRate: 1073741824}
encryption: {memory: 134217728}
loopDevices: {warm: 1000000, max: 1048576}
node: {maxUnavailable: 1000000}
metrics: {volumes: 2000000}
storageClasses: [{name: a, parameters: {readBandwidth: 104857600}}]`,
	"names that look like something else": `
fullnameOverride: "on"
image: {tag: "1"}
imagePullSecrets: [{name: "1"}]
pools: [{name: "1", path: /a}, {name: "on", path: /b}]
defaultPool: "on"
ephemeral: {pools: ["1"]}
nodeGroups: [{name: "1", nodeSelector: {disk: "1"}}, {name: "on", nodeSelector: {disk: "off"}}, {name: "0x1", nodeSelector: {disk: "null"}}]
storageClasses: [{name: "1", parameters: {pool: "1"}}, {name: "null", parameters: {pool: "on"}}, {name: "0x1", nodeStageSecretRef: {name: "1", namespace: "2"}, parameters: {encrypted: true}}]
volumeAttributesClasses: [{name: "2026-11-29", parameters: {readIOPS: 500}}]
snapshots: {enabled: true}
volumeSnapshotClasses: [{name: "1.5"}]
volumeGroupSnapshotClasses: [{name: "true"}]
snapshotController: {enabled: true, priorityClassName: "1"}
node: {priorityClassName: "1", podLabels: {a: "1"}}
controller: {priorityClassName: "no", podLabels: {a: "on"}, tls: {secretName: "1", caConfigMapName: "2", serverName: "3"}}`,
	"nothing optional": `
storageClasses: [{name: plain}]
node: {nodeSelector: null, tolerations: [], resources: null}
controller: {nodeSelector: null, tolerations: [], topologySpreadConstraints: [], resources: null}`,
}

// Every object of every case is one that the API server's types know, in full.
func TestObjectsAreValid(t *testing.T) {
	for name, values := range cases {
		t.Run(name, func(t *testing.T) {
			seen := map[string]bool{}
			for _, o := range render(t, values) {
				kind := o.GetObjectKind().GroupVersionKind()
				id := kind.String() + " " + o.GetNamespace() + "/" + o.GetName()
				if seen[id] {
					t.Errorf("%s is there twice", id)
				}
				seen[id] = true
				cluster := slices.Contains([]string{
					"ClusterRole", "ClusterRoleBinding", "CSIDriver", "StorageClass", "VolumeAttributesClass", "VolumeSnapshotClass", "VolumeGroupSnapshotClass", "CustomResourceDefinition",
				}, kind.Kind)
				want := Namespace
				if cluster {
					want = ""
				}
				if o.GetNamespace() != want {
					t.Errorf("%s: its namespace is not %q", id, want)
				}
				if kind.Kind == "CustomResourceDefinition" {
					continue // none is a template, see TestCRDsAreThereBeforeTheirClasses
				}
				for label, want := range map[string]string{
					"app.kubernetes.io/name": "csi-loop", "app.kubernetes.io/instance": "csi-loop", "app.kubernetes.io/managed-by": "Helm",
				} {
					if o.GetLabels()[label] != want {
						t.Errorf("%s: label %s is %q", id, label, o.GetLabels()[label])
					}
				}
				if name == "everything" && (o.GetLabels()["team"] != "storage" || o.GetAnnotations()["owner"] != "me") {
					t.Errorf("%s lacks the common labels or annotations: %v, %v", id, o.GetLabels(), o.GetAnnotations())
				}
			}
		})
	}
}

// Helm 3 is still in use; its template functions are fewer.
func TestHelm3RendersTheSame(t *testing.T) {
	for name, values := range cases {
		t.Run(name, func(t *testing.T) {
			want, err := Render(parse(t, values), "Helm")
			if err != nil {
				t.Fatal(err)
			}
			c, err := loader3.Load(Dir())
			if err != nil {
				t.Fatal(err)
			}
			if err := common3.ProcessDependencies(c, parse(t, values)); err != nil {
				t.Fatal(err)
			}
			all, err := common3.ToRenderValues(c, parse(t, values), common3.ReleaseOptions{Name: "csi-loop", Namespace: Namespace, Revision: 1, IsInstall: true}, nil)
			if err != nil {
				t.Fatal(err)
			}
			rendered, err := engine3.Render(c, all)
			if err != nil {
				t.Fatal(err)
			}
			got := byName(rendered)
			for _, crd := range c.CRDObjects() {
				got["crds.yaml"] += "---\n" + string(crd.File.Data)
			}
			if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
				t.Fatal(diff)
			}
			for file := range want {
				if file == "NOTES.txt" {
					continue
				}
				if diff := cmp.Diff(decode(t, file, want[file]), decode(t, file, got[file])); diff != "" {
					t.Errorf("%s: %s", file, diff)
				}
			}
		})
	}
}
