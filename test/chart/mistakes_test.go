package chart

import (
	"strings"
	"testing"
)

// Wrong values are refused, in words that say where and why.
func TestMistakesAreExplained(t *testing.T) {
	for values, want := range map[string]string{
		// The schema.
		"polls: []":                                "additional properties 'polls' not allowed",
		"tracing: {endpoint: collector}":           "at '/tracing/endpoint': 'collector' does not match pattern",
		"tracing: {sampling: 2}":                   "at '/tracing/sampling': maximum: got 2, want 1",
		"log: {format: xml}":                       "at '/log/format': value must be one of 'text', 'json'",
		"controller: {replicas: 0}":                "at '/controller/replicas': minimum: got 0, want 1",
		"node: {httpPort: 80}":                     "at '/node/httpPort': minimum: got 80, want 1,024",
		"node: {resource: {}}":                     "at '/node': additional properties 'resource' not allowed",
		"pools: []":                                "at '/pools': minItems: got 0, want 1",
		"pools: [{name: a}]":                       "at '/pools/0': missing property 'path'",
		"image: {digest: abc}":                     "at '/image/digest': 'abc' does not match pattern",
		"image: {pullPolicy: Sometimes}":           "value must be one of 'Always', 'IfNotPresent', 'Never'",
		"storageClasses: [{name: Up}]":             "at '/storageClasses/0/name'",
		"storageClasses: [{fsType: ext4}]":         "at '/storageClasses/0': missing property 'name'",
		"storageClasses: [{name: a, fsType: zfs}]": "at '/storageClasses/0/fsType'",
		"storageClasses: [{name: a, parameters: {alocation: thin}}]":         "additional properties 'alocation' not allowed",
		"storageClasses: [{name: a, parameters: {blockSize: 8192}}]":         "at '/storageClasses/0/parameters/blockSize'",
		"volumeAttributesClasses: [{name: a}]":                               "at '/volumeAttributesClasses/0': missing property 'parameters'",
		"volumeAttributesClasses: [{name: a, parameters: {iops: 5}}]":        "additional properties 'iops' not allowed",
		"pools: [{name: a, path: /a, expect: {mountPoint: true}}]":           "additional properties 'mountPoint' not allowed",
		"pools: [{name: a, path: /a, overcommit: 0.5}]":                      "at '/pools/0/overcommit': minimum: got 0.5, want 1",
		"nodeGroups: [{name: a}]":                                            "missing property 'nodeSelector'",
		"controller: {tls: {secretName: Not a name}}":                        "at '/controller/tls/secretName'",
		"metrics: {prometheusRule: {poolFullPercent: 101}}":                  "maximum: got 101, want 100",
		"provisioner: {workers: 0}":                                          "at '/provisioner/workers'",
		"imagePullSecrets: [mine]":                                           "at '/imagePullSecrets/0': got string, want object",
		"fullnameOverride: a-name-that-is-much-longer-than-what-labels-take": "at '/fullnameOverride'",
		// The templates.
		"pools: [{name: Up, path: /a}]":                       `pools[0].name: "Up" is not a name of lower-case letters, digits and '-'`,
		"pools: [{name: a, path: var}]":                       `pools[0].path: "var" is not an absolute path`,
		"pools: [{name: a, path: /a b}]":                      `pools[0].path: "/a b" is not an absolute path`,
		"pools: [{name: a, path: /}]":                         "pools[0].path",
		"pools: [{name: a, path: /a/../b}]":                   `pools[0].path: write "/a/../b" as "/b"`,
		"pools: [{name: a, path: /a/}]":                       "pools[0].path",
		"pools: [{name: a, path: /usr/lib}]":                  "/usr/lib is no place for it, because csi-loop's container or the system needs /usr",
		"pools: [{name: a, path: /var}]":                      "/var is no place for it",
		"pools: [{name: a, path: /var/lib/kubelet/pools}]":    "needs /var/lib/kubelet",
		"pools: [{name: a, path: /a}, {name: a, path: /b}]":   "pools[1].name: there are two pools with the name a",
		"pools: [{name: a, path: /a}, {name: b, path: /a}]":   "pools a and b overlap",
		"pools: [{name: a, path: /d}, {name: b, path: /d/e}]": "pools a and b overlap",
		"pools: [{name: a, path: /a}, {name: b, path: /b}]":   "defaultPool: which pool is the default? Name one of: a, b",
		"defaultPool: fast":                                   `defaultPool: there is no pool "fast"; there are: default`,
		"pools: [{name: a, path: /a, reserve: some}]":         `pools[0].reserve: "some" is not a size such as 10Gi`,
		"pools: [{name: a, path: /a, reserve: 100%}]":         `pools[0].reserve: "100%" is not a percentage below 100`,
		"imageDirs: [images]":                                 `imageDirs[0]: "images" is not an absolute path`,
		"imageDirs: [/var/lib/csi-loop/volumes]":              "imageDirs[0]: /var/lib/csi-loop/volumes overlaps with pool default",
		"volumeAttributesClasses: [{name: a, parameters: {readIOPS: 9}}, {name: a, parameters: {readIOPS: 9}}]": "volumeAttributesClasses[1].name: there are two classes with the name a",
		"transfer: {nodeRate: fast}":                                                     `transfer.nodeRate: "fast" is not a size such as 10Gi`,
		"trim: {interval: 1d}":                                                           `trim.interval: "1d" is not a time such as 30s`,
		"trim: {jitter: -1h}":                                                            `trim.jitter: "-1h" is not a time`,
		"controller: {eventInterval: often}":                                             `controller.eventInterval: "often" is not a time`,
		"encryption: {time: long}":                                                       `encryption.time: "long" is not a time`,
		"encryption: {memory: much}":                                                     `encryption.memory: "much" is not a size such as 10Gi`,
		"commonLabels: {app.kubernetes.io/name: a}":                                      "commonLabels: app.kubernetes.io/name is set by the chart",
		"node: {podLabels: {helm.sh/chart: a}}":                                          "node.podLabels: helm.sh/chart is set by the chart",
		"controller: {podLabels: {app.kubernetes.io/component: a}}":                      "controller.podLabels: app.kubernetes.io/component is set by the chart",
		"ephemeral: {maxSize: big}":                                                      `ephemeral.maxSize: "big" is not a size such as 10Gi`,
		"ephemeral: {pools: [fast]}":                                                     `ephemeral.pools: there is no pool "fast"`,
		"loopDevices: {warm: 300}":                                                       "loopDevices.warm: 300 is more than loopDevices.max, 256",
		"node: {maxUnavailable: half}":                                                   `node.maxUnavailable: "half" is neither a number above 0 nor a percentage`,
		"controller: {httpPort: 9811}":                                                   "9811 is controller.httpPort too",
		"provisioner: {timeout: soon}":                                                   `provisioner.timeout: "soon" is not a time such as 30s`,
		"controller: {tls: {secretName: a}}":                                             "secretName and caConfigMapName go together",
		"controller: {tls: {caConfigMapName: a}}":                                        "secretName and caConfigMapName go together",
		"storageClasses: [{name: a}, {name: a}]":                                         "storageClasses[1].name: there are two classes with the name a",
		"storageClasses: [{name: a, default: true}, {name: b, default: true}]":           "storageClasses[1].default: a is the default class already",
		"storageClasses: [{name: a, parameters: {pool: fast}}]":                          `storageClasses[0].parameters.pool: no node has a pool "fast"; there are: default`,
		"storageClasses: [{name: a, parameters: {encrypted: true}}]":                     "storageClasses[0]: encrypted volumes need nodeStageSecretRef",
		`storageClasses: [{name: a, parameters: {encrypted: "1"}}]`:                      "storageClasses[0]: encrypted volumes need nodeStageSecretRef",
		"storageClasses: [{name: a, parameters: {encrypted: sure}}]":                     "at '/storageClasses/0/parameters/encrypted': value must be one of",
		"storageClasses: [{name: a, nodeStageSecretRef: {name: s, namespace: x}}]":       `storageClasses[0].nodeStageSecretRef: set parameters.encrypted to "true" too`,
		"storageClasses: [{name: a, nodeStageSecretRef: {name: s}}]":                     "missing property 'namespace'",
		"encryption: {pbkdf: scrypt}":                                                    "at '/encryption/pbkdf'",
		"volumeSnapshotClasses: [{name: a}]":                                             "set snapshots.enabled too",
		"kubeletDir: var/lib/kubelet":                                                    `kubeletDir: "var/lib/kubelet" is not an absolute path`,
		"kubeletDir: /" + strings.Repeat("long/", 20) + "end":                            "a UNIX socket's can have 107",
		"nodeGroups: [{name: a, nodeSelector: {}}]":                                      "nodeGroups[0].nodeSelector: it is empty",
		"nodeGroups: [{name: a, nodeSelector: {d: x}}, {name: a, nodeSelector: {d: z}}]": "nodeGroups[1].name: there are two groups with the name a",
		"nodeGroups: [{name: a, nodeSelector: {d: x}, pools: [{name: A, path: /a}]}]":    "nodeGroups[0].pools[0].name",
		"nodeGroups: [{name: a, nodeSelector: {d: x}, defaultPool: b}]":                  "nodeGroups[0].defaultPool",
	} {
		_, err := Render(parse(t, values), "Helm")
		switch {
		case err == nil:
			t.Errorf("%s is taken", values)
		case !strings.Contains(err.Error(), want):
			t.Errorf("%s: %v\nwant %q in it", values, err, want)
		}
	}
}
