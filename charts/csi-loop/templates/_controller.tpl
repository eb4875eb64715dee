{{- /* What all sidecars are told. */}}
{{- define "csi-loop.sidecarArgs" -}}
- --csi-address=/csi/csi.sock
- --timeout={{ .sidecar.timeout }}
- --retry-interval-max=15s
# A volume is about five requests; the API server defends itself.
- --kube-api-qps=200
- --kube-api-burst=400
- --leader-election
- --feature-gates=ReleaseLeaderElectionOnExit=true
- --http-endpoint=:{{ .sidecar.httpPort }}
- --v={{ .root.Values.log.sidecarLevel }}
{{- end }}

{{- define "csi-loop.sidecarPort" -}}
ports:
  - name: {{ .port }}
    containerPort: {{ .sidecar.httpPort }}
livenessProbe:
  httpGet:
    path: /healthz/leader-election
    port: {{ .port }}
  initialDelaySeconds: 10
  periodSeconds: 20
  timeoutSeconds: 5
{{- end }}

{{- /* The end of a container of the controller; volumeMounts last, so that more can follow. */}}
{{- define "csi-loop.controllerContainer" -}}
terminationMessagePolicy: FallbackToLogsOnError
{{- with .resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: socket
    mountPath: /csi
{{- end }}
