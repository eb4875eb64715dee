{{- /* What the schema cannot say, or not in words that a person understands. */}}

{{- define "csi-loop.checkPath" -}}
{{- $path := .path -}}
{{- if not (regexMatch "^(/[A-Za-z0-9_.@+-]+)+$" $path) -}}
{{- fail (printf "%s: %q is not an absolute path of letters, digits and _.@+-, as in /var/lib/csi-loop" .at $path) -}}
{{- end -}}
{{- if ne (clean $path) $path -}}
{{- fail (printf "%s: write %q as %q" .at $path (clean $path)) -}}
{{- end -}}
{{- end }}

{{- /* A directory of the node that the container gets under its own path must not hide what the container needs. */}}
{{- define "csi-loop.checkDirectory" -}}
{{- include "csi-loop.checkPath" . -}}
{{- $path := .path -}}
{{- range list "/bin" "/boot" "/dev" "/etc" "/host" "/lib" "/lib64" "/proc" "/run/csi-loop" "/run/cryptsetup" "/sbin" "/sys" "/usr" "/var/run/secrets" .kubeletDir -}}
{{- if or (eq $path .) (hasPrefix (printf "%s/" .) $path) (hasPrefix (printf "%s/" $path) .) -}}
{{- fail (printf "%s: %s is no place for it, because csi-loop's container or the system needs %s" $.at $path .) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "csi-loop.checkDuration" -}}
{{- if not (regexMatch (ternary "^(0|([0-9]+(\\.[0-9]+)?(ms|s|m|h))+)$" "^([0-9]+(\\.[0-9]+)?(ms|s|m|h))+$" (.zero | default false)) .value) -}}
{{- fail (printf "%s: %q is not a time such as 30s" .at .value) -}}
{{- end -}}
{{- end }}

{{- define "csi-loop.checkSize" -}}
{{- $size := include "csi-loop.amount" .value -}}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?([KMGTPE]i|[kMGTPE])?$" $size) -}}
{{- fail (printf "%s: %q is not a size such as 10Gi" .at $size) -}}
{{- end -}}
{{- end }}

{{- /* Labels that the selectors of the chart's own objects need. */}}
{{- define "csi-loop.checkLabels" -}}
{{- $at := .at -}}
{{- range $key, $_ := .labels -}}
{{- if has $key (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/part-of" "app.kubernetes.io/managed-by" "app.kubernetes.io/version" "helm.sh/chart") -}}
{{- fail (printf "%s: %s is set by the chart, which finds its pods by such labels" $at $key) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "csi-loop.checkName" -}}
{{- if not (regexMatch "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$" .value) -}}
{{- fail (printf "%s: %q is not a name of lower-case letters, digits and '-', with a letter or digit at both ends" .at .value) -}}
{{- end -}}
{{- end }}

{{- /* Pools of one group: at is where they are said. */}}
{{- define "csi-loop.checkPools" -}}
{{- $root := .root -}}
{{- $at := .at -}}
{{- $names := list -}}
{{- $dirs := dict -}}
{{- range $i, $p := .group.pools -}}
{{- $here := printf "%spools[%d]" $at $i -}}
{{- include "csi-loop.checkName" (dict "at" (printf "%s.name" $here) "value" $p.name) -}}
{{- include "csi-loop.checkDirectory" (dict "at" (printf "%s.path" $here) "path" $p.path "kubeletDir" $root.Values.kubeletDir) -}}
{{- if has $p.name $names -}}
{{- fail (printf "%s.name: there are two pools with the name %s" $here $p.name) -}}
{{- end -}}
{{- $names = append $names $p.name -}}
{{- range $other, $path := $dirs -}}
{{- if or (eq $path $p.path) (hasPrefix (printf "%s/" $path) $p.path) (hasPrefix (printf "%s/" $p.path) $path) -}}
{{- fail (printf "%s.path: pools %s and %s overlap: give each a directory of its own" $here $other $p.name) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $dirs $p.name $p.path -}}
{{- if hasKey $p "reserve" -}}
{{- $reserve := include "csi-loop.amount" $p.reserve -}}
{{- if hasSuffix "%" $reserve -}}
{{- if not (regexMatch "^[0-9]{1,2}(\\.[0-9]+)?%$" $reserve) -}}
{{- fail (printf "%s.reserve: %q is not a percentage below 100" $here $reserve) -}}
{{- end -}}
{{- else -}}
{{- include "csi-loop.checkSize" (dict "at" (printf "%s.reserve" $here) "value" $reserve) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .group.defaultPool -}}
{{- if not (has . $names) -}}
{{- fail (printf "%sdefaultPool: there is no pool %q; there are: %s" $at . (join ", " $names)) -}}
{{- end -}}
{{- else -}}
{{- if and (gt (len $names) 1) (not (has "default" $names)) -}}
{{- fail (printf "%sdefaultPool: which pool is the default? Name one of: %s" $at (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- range .root.Values.ephemeral.pools -}}
{{- if not (has . $names) -}}
{{- fail (printf "ephemeral.pools: there is no pool %q; there are: %s" . (join ", " $names)) -}}
{{- end -}}
{{- end -}}
{{- range $i, $dir := .group.imageDirs -}}
{{- $here := printf "%simageDirs[%d]" $at $i -}}
{{- include "csi-loop.checkDirectory" (dict "at" $here "path" $dir "kubeletDir" $root.Values.kubeletDir) -}}
{{- range $name, $path := $dirs -}}
{{- if or (eq $path $dir) (hasPrefix (printf "%s/" $path) $dir) (hasPrefix (printf "%s/" $dir) $path) -}}
{{- fail (printf "%s: %s overlaps with pool %s: whoever may write one must not reach the other" $here $dir $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "csi-loop.validate" -}}
{{- $v := .Values -}}
{{- $root := . -}}
{{- if and .Release.IsUpgrade $v.snapshotController.installCRDs (not (.Capabilities.APIVersions.Has "snapshot.storage.k8s.io/v1")) -}}
{{- fail "snapshotController.installCRDs: Helm installs CRDs at an install only, not at an upgrade: first kubectl apply -f charts/csi-loop/charts/snapshot-crds/crds" -}}
{{- end -}}
{{- include "csi-loop.checkPath" (dict "at" "kubeletDir" "path" $v.kubeletDir) -}}
{{- $socket := printf "%s/plugins/csi-loop.io/csi.sock" $v.kubeletDir -}}
{{- if gt (len $socket) 107 -}}
{{- fail (printf "kubeletDir: the socket %s would have a path of %d bytes, and a UNIX socket's can have 107" $socket (len $socket)) -}}
{{- end -}}
{{- $groups := include "csi-loop.groups" . | fromJsonArray -}}
{{- $seen := list -}}
{{- $pools := list -}}
{{- range $i, $g := $groups -}}
{{- $at := "" -}}
{{- if $v.nodeGroups -}}
{{- $at = printf "nodeGroups[%d]." $i -}}
{{- include "csi-loop.checkName" (dict "at" (printf "%sname" $at) "value" $g.name) -}}
{{- if has $g.name $seen -}}
{{- fail (printf "%sname: there are two groups with the name %s" $at $g.name) -}}
{{- end -}}
{{- if not (index $v.nodeGroups $i).nodeSelector -}}
{{- fail (printf "%snodeSelector: it is empty: say which nodes group %s is for; no node may be in two groups" $at $g.name) -}}
{{- end -}}
{{- $seen = append $seen $g.name -}}
{{- end -}}
{{- include "csi-loop.checkPools" (dict "root" $root "group" $g "at" $at) -}}
{{- range $g.pools -}}
{{- $pools = append $pools .name -}}
{{- end -}}
{{- end -}}
{{- if gt (int $v.loopDevices.warm) (int $v.loopDevices.max) -}}
{{- fail (printf "loopDevices.warm: %v is more than loopDevices.max, %v" $v.loopDevices.warm $v.loopDevices.max) -}}
{{- end -}}
{{- range $at, $labels := dict "commonLabels" $v.commonLabels "node.podLabels" $v.node.podLabels "controller.podLabels" $v.controller.podLabels -}}
{{- include "csi-loop.checkLabels" (dict "at" $at "labels" $labels) -}}
{{- end -}}
{{- range $at, $value := dict "trim.interval" $v.trim.interval "trim.jitter" $v.trim.jitter "controller.eventInterval" $v.controller.eventInterval -}}
{{- include "csi-loop.checkDuration" (dict "at" $at "value" (toString $value) "zero" true) -}}
{{- end -}}
{{- include "csi-loop.checkDuration" (dict "at" "encryption.time" "value" (toString $v.encryption.time)) -}}
{{- include "csi-loop.checkSize" (dict "at" "encryption.memory" "value" $v.encryption.memory) -}}
{{- include "csi-loop.checkSize" (dict "at" "ephemeral.maxSize" "value" $v.ephemeral.maxSize) -}}
{{- include "csi-loop.checkSize" (dict "at" "transfer.nodeRate" "value" $v.transfer.nodeRate) -}}
{{- include "csi-loop.checkSize" (dict "at" "transfer.controllerRate" "value" $v.transfer.controllerRate) -}}
{{- if not (regexMatch "^([1-9][0-9]*|([1-9][0-9]?|100)%)$" (include "csi-loop.amount" $v.node.maxUnavailable)) -}}
{{- fail (printf "node.maxUnavailable: %q is neither a number above 0 nor a percentage" (include "csi-loop.amount" $v.node.maxUnavailable)) -}}
{{- end -}}
{{- $ports := dict -}}
{{- range $name, $port := dict "controller.linkPort" $v.controller.linkPort "controller.httpPort" $v.controller.httpPort "provisioner.httpPort" $v.provisioner.httpPort "resizer.httpPort" $v.resizer.httpPort "snapshotter.httpPort" $v.snapshotter.httpPort -}}
{{- $key := toString $port -}}
{{- if hasKey $ports $key -}}
{{- fail (printf "%s: %s is %s too; the containers of the controller share their ports" $name $key (get $ports $key)) -}}
{{- end -}}
{{- $_ := set $ports $key $name -}}
{{- end -}}
{{- range $name := list "provisioner" "resizer" "snapshotter" -}}
{{- include "csi-loop.checkDuration" (dict "at" (printf "%s.timeout" $name) "value" (index $v $name).timeout) -}}
{{- end -}}
{{- $tls := $v.controller.tls -}}
{{- if ne (empty $tls.secretName) (empty $tls.caConfigMapName) -}}
{{- fail "controller.tls: secretName and caConfigMapName go together: the controller shows the certificate, and the nodes check it by the CA" -}}
{{- end -}}
{{- $classes := list -}}
{{- $default := "" -}}
{{- range $i, $c := $v.storageClasses -}}
{{- $at := printf "storageClasses[%d]" $i -}}
{{- if has $c.name $classes -}}
{{- fail (printf "%s.name: there are two classes with the name %s" $at $c.name) -}}
{{- end -}}
{{- $classes = append $classes $c.name -}}
{{- if $c.default -}}
{{- with $default -}}
{{- fail (printf "%s.default: %s is the default class already" $at .) -}}
{{- end -}}
{{- $default = $c.name -}}
{{- end -}}
{{- with ($c.parameters | default dict).pool -}}
{{- if not (has . $pools) -}}
{{- fail (printf "%s.parameters.pool: no node has a pool %q; there are: %s" $at . (join ", " (uniq $pools))) -}}
{{- end -}}
{{- end -}}
{{- /* What csi-loop takes for true. */ -}}
{{- $encrypted := has (toString ($c.parameters | default dict).encrypted) (list "true" "True" "TRUE" "t" "T" "1") -}}
{{- if and $encrypted (not $c.nodeStageSecretRef) -}}
{{- fail (printf "%s: encrypted volumes need nodeStageSecretRef, the secret with their passphrase" $at) -}}
{{- end -}}
{{- if and $c.nodeStageSecretRef (not $encrypted) -}}
{{- fail (printf "%s.nodeStageSecretRef: set parameters.encrypted to \"true\" too, or the volumes are not encrypted" $at) -}}
{{- end -}}
{{- end -}}
{{- $attributes := list -}}
{{- range $i, $c := $v.volumeAttributesClasses -}}
{{- if has $c.name $attributes -}}
{{- fail (printf "volumeAttributesClasses[%d].name: there are two classes with the name %s" $i $c.name) -}}
{{- end -}}
{{- $attributes = append $attributes $c.name -}}
{{- end -}}
{{- if and (or $v.volumeSnapshotClasses $v.volumeGroupSnapshotClasses) (not $v.snapshots.enabled) -}}
{{- fail "volumeSnapshotClasses: set snapshots.enabled too, or nothing makes the snapshots" -}}
{{- end -}}
{{- end }}
