{{- define "csi-loop.name" -}}
{{ .Values.fullnameOverride | default "csi-loop" }}
{{- end }}

{{- /* A whole number, or a string: numbers of a file are floats in Helm, which writes 1e+06 for a million. */}}
{{- define "csi-loop.amount" -}}
{{ if kindIs "string" . }}{{ . }}{{ else }}{{ int64 . }}{{ end }}
{{- end }}

{{- /* Names are written with toYaml or quote: one such as 1 or on is no string otherwise. */}}
{{- define "csi-loop.selector" -}}
app.kubernetes.io/name: csi-loop
app.kubernetes.io/instance: {{ toYaml .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* Labels of a pod: nothing that changes with the chart's version alone. */}}
{{- define "csi-loop.podLabels" -}}
{{ include "csi-loop.selector" . }}
{{- with merge (dict) (.labels | default dict) (.root.Values.commonLabels | default dict) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* Labels of an object; of root, and component where there is one. */}}
{{- define "csi-loop.labels" -}}
app.kubernetes.io/name: csi-loop
app.kubernetes.io/instance: {{ toYaml .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
app.kubernetes.io/part-of: csi-loop
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- if eq .root.Release.Service "Helm" }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* metadata of an object: root, name, and component, cluster, labels, annotations as needed. */}}
{{- define "csi-loop.metadata" -}}
metadata:
  name: {{ toYaml .name }}
  {{- if not .cluster }}
  namespace: {{ toYaml .root.Release.Namespace }}
  {{- end }}
  labels:
    {{- include "csi-loop.labels" . | nindent 4 }}
    {{- with .labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (dict) (.annotations | default dict) (.root.Values.commonAnnotations | default dict) }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- /* image of a container: root, image. */}}
{{- define "csi-loop.image" -}}
{{- $name := list .image.registry .image.repository | compact | join "/" -}}
image: {{ if .image.digest }}{{ $name }}@{{ .image.digest }}{{ else }}{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .image.pullPolicy }}
{{- end }}

{{- define "csi-loop.linkSecret" -}}
{{ include "csi-loop.name" . }}-link
{{- end }}

{{- define "csi-loop.linkCA" -}}
{{ .Values.controller.tls.caConfigMapName | default (printf "%s-link-ca" (include "csi-loop.name" .)) }}
{{- end }}

{{- define "csi-loop.serverName" -}}
{{ .Values.controller.tls.serverName | default "csi-loop-controller" }}
{{- end }}

{{- /* The groups of nodes, as JSON: those of the values, or one for all nodes. */}}
{{- define "csi-loop.groups" -}}
{{- $v := .Values -}}
{{- $groups := list -}}
{{- range $v.nodeGroups | default (list dict) -}}
{{- $g := dict "name" (.name | default "") "nodeSelector" (merge (dict) (.nodeSelector | default dict) ($v.node.nodeSelector | default dict)) -}}
{{- $_ := set $g "pools" (.pools | default $v.pools) -}}
{{- $_ := set $g "defaultPool" (.defaultPool | default $v.defaultPool) -}}
{{- $_ := set $g "imageDirs" (.imageDirs | default $v.imageDirs) -}}
{{- $_ := set $g "affinity" (.affinity | default $v.node.affinity) -}}
{{- $_ := set $g "tolerations" (.tolerations | default $v.node.tolerations) -}}
{{- $_ := set $g "resources" (.resources | default $v.node.resources) -}}
{{- $groups = append $groups $g -}}
{{- end -}}
{{ $groups | toJson }}
{{- end }}

{{- define "csi-loop.groupName" -}}
{{ include "csi-loop.name" .root }}-node{{ with .group.name }}-{{ . }}{{ end }}
{{- end }}

{{- /* csi-loop's configuration file on the nodes of a group. */}}
{{- define "csi-loop.nodeConfig" -}}
{{- $v := .root.Values -}}
mode: node
endpoint: unix://{{ $v.kubeletDir }}/plugins/csi-loop.io/csi.sock
registrationDir: {{ $v.kubeletDir }}/plugins_registry
pools:
  {{- toYaml .group.pools | nindent 2 }}
{{- with .group.defaultPool }}
defaultPool: {{ . | quote }}
{{- end }}
{{- with .group.imageDirs }}
imageDirs:
  {{- toYaml . | nindent 2 }}
{{- end }}
stateDir: /run/csi-loop
cgroupRoot: /host/cgroup
loopDevicesWarm: {{ int64 $v.loopDevices.warm }}
loopDevicesMax: {{ int64 $v.loopDevices.max }}
ephemeralMaxSize: {{ include "csi-loop.amount" $v.ephemeral.maxSize | quote }}
ephemeralMaxVolumes: {{ $v.ephemeral.maxVolumes }}
{{- with $v.ephemeral.pools }}
ephemeralPools:
  {{- toYaml . | nindent 2 }}
{{- end }}
trimInterval: {{ $v.trim.interval | quote }}
trimJitter: {{ $v.trim.jitter | quote }}
expediteFreezes: {{ $v.snapshots.expediteFreezes }}
luksPbkdf: {{ $v.encryption.pbkdf }}
luksPbkdfMemory: {{ include "csi-loop.amount" $v.encryption.memory | quote }}
luksPbkdfTime: {{ $v.encryption.time | quote }}
stopTimeout: {{ $v.node.stopTimeoutSeconds }}s
transferRate: {{ include "csi-loop.amount" $v.transfer.nodeRate | quote }}
loggingFormat: {{ $v.log.format }}
verbosity: {{ $v.log.level }}
httpEndpoint: ":{{ $v.node.httpPort }}"
volumeMetrics: {{ int64 $v.metrics.volumes }}
{{- with $v.tracing.endpoint }}
tracingEndpoint: {{ . | quote }}
tracingSampling: {{ $v.tracing.sampling | toString | quote }}
{{- end }}
controllerAddress:
  - {{ include "csi-loop.name" .root }}-controller.{{ .root.Release.Namespace }}.svc:{{ $v.controller.linkPort }}
controllerName: {{ include "csi-loop.serverName" .root | toYaml }}
controllerCA: /var/run/secrets/csi-loop.io/ca.crt
linkTokenFile: /var/run/secrets/csi-loop.io/token
{{- end }}
