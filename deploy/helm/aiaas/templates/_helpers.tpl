{{- define "aiaas.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "aiaas.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "aiaas.name" .) .Release.Name -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name (include "aiaas.name" .) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* What never changes of a component's labels: (list root component). */}}
{{- define "aiaas.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "aiaas.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "aiaas.labels" -}}
{{- $root := index . 0 -}}
{{ include "aiaas.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{- define "aiaas.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end }}

{{/* The gRPC target of a service: the name of all its ready pods, which channels balance over. (list root service port) */}}
{{- define "aiaas.target" -}}
{{- $root := index . 0 -}}
dns:///{{ include "aiaas.fullname" $root }}-{{ index . 1 }}.{{ $root.Release.Namespace }}.svc.{{ $root.Values.clusterDomain }}:{{ index . 2 }}
{{- end }}

{{- define "aiaas.priority" -}}
{{- $root := index . 0 -}}
{{- if $root.Values.priorityClasses.create }}
priorityClassName: {{ $root.Release.Namespace }}-{{ include "aiaas.fullname" $root }}-{{ index . 1 }}
{{- end }}
{{- end }}

{{- define "aiaas.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "aiaas.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "aiaas.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "aiaas.secretEnv" -}}
{{- $secret := index . 0 }}
{{- range $variable, $key := index . 1 }}
- name: {{ $variable }}
  valueFrom: {secretKeyRef: {name: {{ $secret }}, key: {{ $key }}}}
{{- end }}
{{- end }}

{{/* What every service is told; (list root service). */}}
{{- define "aiaas.commonEnv" -}}
{{- $root := index . 0 -}}
{{- $own := index $root.Values (index . 1) -}}
- {name: AIAAS_LOG_LEVEL, value: {{ $root.Values.logLevel }}}
{{- with $root.Values.tracing.endpoint }}
- {name: AIAAS_OTLP_ENDPOINT, value: {{ . | quote }}}
- {name: AIAAS_TRACE_RATIO, value: {{ $root.Values.tracing.ratio | quote }}}
{{- end }}
{{- if eq $root.Values.tls.mode "mesh" }}
- {name: AIAAS_TLS, value: "off"}
{{- else }}
- {name: AIAAS_TLS_CERTIFICATE_PATH, value: /etc/aiaas/tls/tls.crt}
- {name: AIAAS_TLS_KEY_PATH, value: /etc/aiaas/tls/tls.key}
- {name: AIAAS_TLS_CA_PATH, value: /etc/aiaas/tls/ca.crt}
{{- end }}
{{- with $root.Values.trustedProxies }}
- {name: AIAAS_TRUSTED_PROXIES, value: {{ join "," . | quote }}}
{{- end }}
{{- range $variable, $value := $own.settings }}
- {name: {{ $variable }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}

{{- define "aiaas.env.identity" -}}
{{- with .Values.identity -}}
{{ include "aiaas.secretEnv" (list .existingSecret (dict "AIAAS_IDENTITY_DATABASE_URL" "database-url" "AIAAS_IDENTITY_AMQP_URL" "amqp-url" "AIAAS_IDENTITY_REDIS_URL" "redis-url" "AIAAS_IDENTITY_AUDIT_KEY" "audit-key" "AIAAS_IDENTITY_SECRET_KEY" "secret-key")) }}
{{- if .mail.enabled }}
{{- include "aiaas.secretEnv" (list .existingSecret (dict "AIAAS_IDENTITY_SMTP_URL" "smtp-url")) }}
- {name: AIAAS_IDENTITY_MAIL_FROM, value: {{ .mail.from | quote }}}
{{- end }}
- {name: AIAAS_IDENTITY_PUBLIC_URL, value: {{ .publicUrl | quote }}}
- {name: AIAAS_IDENTITY_GRPC_ADDRESS, value: "0.0.0.0:7001"}
{{- if $.Values.ingress.grpc.enabled }}
- {name: AIAAS_IDENTITY_PUBLIC_GRPC_ADDRESS, value: "0.0.0.0:7021"}
{{- end }}
- {name: AIAAS_IDENTITY_OPS_ADDRESS, value: "0.0.0.0:7011"}
- {name: AIAAS_IDENTITY_DRAIN_S, value: {{ .drainSeconds | quote }}}
{{- if .configurationConfigMap }}
- {name: AIAAS_IDENTITY_CONFIGURATION_PATH, value: /etc/aiaas/organizations}
{{- end }}
{{- end }}
{{ include "aiaas.commonEnv" (list . "identity") }}
{{- end }}

{{- define "aiaas.env.router" -}}
{{- with .Values.router -}}
{{ include "aiaas.secretEnv" (list .existingSecret (dict "AIAAS_ROUTER_DATABASE_URL" "database-url" "AIAAS_ROUTER_AMQP_URL" "amqp-url" "AIAAS_ROUTER_REDIS_URL" "redis-url")) }}
- {name: AIAAS_ROUTER_IDENTITY_TARGET, value: {{ include "aiaas.target" (list $ "identity" 7001) | quote }}}
- {name: AIAAS_ROUTER_JOURNAL_PATH, value: /var/lib/aiaas/journal}
- {name: AIAAS_ROUTER_JOURNAL_LIMIT_BYTES, value: {{ .journal.limitBytes | int64 | quote }}}
- {name: AIAAS_ROUTER_GRPC_ADDRESS, value: "0.0.0.0:7003"}
{{- if $.Values.ingress.grpc.enabled }}
- {name: AIAAS_ROUTER_PUBLIC_GRPC_ADDRESS, value: "0.0.0.0:7023"}
{{- end }}
- {name: AIAAS_ROUTER_OPS_ADDRESS, value: "0.0.0.0:7013"}
- {name: AIAAS_ROUTER_DRAIN_S, value: {{ .drainSeconds | quote }}}
{{- end }}
{{- range $name, $engine := .Values.engines }}
{{- with $engine.keySecret }}
- name: AIAAS_ENGINE_{{ $name | upper | replace "-" "_" }}
  valueFrom: {secretKeyRef: {name: {{ . }}, key: key}}
{{- end }}
{{- end }}
{{ include "aiaas.commonEnv" (list . "router") }}
{{- end }}

{{- define "aiaas.env.analytics" -}}
{{- with .Values.analytics -}}
{{ include "aiaas.secretEnv" (list .existingSecret (dict "AIAAS_ANALYTICS_DATABASE_URL" "database-url" "AIAAS_ANALYTICS_AMQP_URL" "amqp-url" "AIAAS_ANALYTICS_REDIS_URL" "redis-url" "AIAAS_ANALYTICS_SECRET_KEY" "secret-key")) }}
{{- if .exports.enabled }}
{{- include "aiaas.secretEnv" (list .existingSecret (dict "AIAAS_ANALYTICS_S3_ACCESS_KEY" "s3-access-key" "AIAAS_ANALYTICS_S3_SECRET_KEY" "s3-secret-key")) }}
- {name: AIAAS_ANALYTICS_S3_URL, value: {{ .exports.url | quote }}}
- {name: AIAAS_ANALYTICS_S3_BUCKET, value: {{ .exports.bucket | quote }}}
- {name: AIAAS_ANALYTICS_S3_REGION, value: {{ .exports.region | quote }}}
{{- end }}
- {name: AIAAS_ANALYTICS_IDENTITY_TARGET, value: {{ include "aiaas.target" (list $ "identity" 7001) | quote }}}
- {name: AIAAS_ANALYTICS_ROUTER_TARGET, value: {{ include "aiaas.target" (list $ "router" 7003) | quote }}}
- {name: AIAAS_ANALYTICS_GRPC_ADDRESS, value: "0.0.0.0:7005"}
{{- if $.Values.ingress.grpc.enabled }}
- {name: AIAAS_ANALYTICS_PUBLIC_GRPC_ADDRESS, value: "0.0.0.0:7025"}
{{- end }}
- {name: AIAAS_ANALYTICS_OPS_ADDRESS, value: "0.0.0.0:7015"}
- {name: AIAAS_ANALYTICS_DRAIN_S, value: {{ .drainSeconds | quote }}}
{{- end }}
{{ include "aiaas.commonEnv" (list . "analytics") }}
{{- end }}

{{- define "aiaas.env.edge" -}}
- {name: AIAAS_EDGE_ADDRESS, value: "0.0.0.0:8080"}
- {name: AIAAS_EDGE_WORKERS, value: {{ .Values.edge.workers | quote }}}
- {name: AIAAS_EDGE_IDENTITY_TARGET, value: {{ include "aiaas.target" (list . "identity" 7001) | quote }}}
- {name: AIAAS_EDGE_ROUTER_TARGET, value: {{ include "aiaas.target" (list . "router" 7003) | quote }}}
- {name: AIAAS_EDGE_ANALYTICS_TARGET, value: {{ include "aiaas.target" (list . "analytics" 7005) | quote }}}
- {name: AIAAS_EDGE_MAX_BODY_BYTES, value: {{ .Values.edge.maxBodyBytes | int64 | quote }}}
- {name: AIAAS_EDGE_REQUEST_TIMEOUT_S, value: {{ .Values.edge.requestTimeoutSeconds | quote }}}
- {name: AIAAS_EDGE_DRAIN_S, value: {{ .Values.edge.drainSeconds | quote }}}
{{ include "aiaas.commonEnv" (list . "edge") }}
{{- end }}

{{- define "aiaas.tlsSecret" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.tls.mode "secrets" -}}
{{ index $root.Values.tls.secrets (index . 1) }}
{{- else -}}
{{ include "aiaas.fullname" $root }}-{{ index . 1 }}-tls
{{- end -}}
{{- end }}

{{/* The pod of a service: (dict "root" . "service" "router" "grpc" 7003 "ops" 7013 "public" 7023). Ops answers probes. */}}
{{- define "aiaas.pod" -}}
{{- $root := .root -}}
{{- $service := .service -}}
{{- $own := index $root.Values $service -}}
metadata:
  labels:
    {{- include "aiaas.labels" (list $root $service) | nindent 4 }}
  {{- if and (eq $root.Values.tls.mode "mesh") $root.Values.tls.meshAnnotations }}
  annotations:
    {{- toYaml $root.Values.tls.meshAnnotations | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "aiaas.fullname" $root }}-{{ $service }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "aiaas.pullSecrets" $root | nindent 2 }}
  {{- include "aiaas.priority" (list $root "serving") | nindent 2 }}
  # What was running ends by itself within the drain; only what hangs is killed.
  terminationGracePeriodSeconds: {{ add $root.Values.preStopSeconds $own.drainSeconds 20 }}
  securityContext:
    {{- include "aiaas.podSecurity" $root | nindent 4 }}
  topologySpreadConstraints:
    {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ $key }}
      whenUnsatisfiable: {{ $root.Values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "aiaas.selector" (list $root $service) | nindent 10 }}
    {{- end }}
  {{- with $own.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $own.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $service }}
      image: {{ include "aiaas.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python, -m, {{ $service }}, serve]
      env:
        {{- if eq $service "router" }}
        - name: POD_NAME
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: AIAAS_ROUTER_ADVERTISED_ADDRESS
          value: "$(POD_NAME).{{ include "aiaas.fullname" $root }}-router.{{ $root.Release.Namespace }}.svc.{{ $root.Values.clusterDomain }}:7003"
        {{- end }}
        {{- include (printf "aiaas.env.%s" $service) $root | trim | nindent 8 }}
      ports:
        {{- if .grpc }}
        - {name: grpc, containerPort: {{ .grpc }}}
        {{- if $root.Values.ingress.grpc.enabled }}
        - {name: grpc-public, containerPort: {{ .public }}}
        {{- end }}
        {{- end }}
        - {name: {{ if .grpc }}ops{{ else }}http{{ end }}, containerPort: {{ .ops }}}
      startupProbe:
        httpGet: {path: /health, port: {{ if .grpc }}ops{{ else }}http{{ end }}}
        periodSeconds: 1
        failureThreshold: 60
      # Of the process alone: restarting it repairs no dependency.
      livenessProbe:
        httpGet: {path: /health, port: {{ if .grpc }}ops{{ else }}http{{ end }}}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /ready, port: {{ if .grpc }}ops{{ else }}http{{ end }}}
        periodSeconds: 5
        timeoutSeconds: 4
        failureThreshold: 2
      lifecycle:
        preStop: {sleep: {seconds: {{ $root.Values.preStopSeconds }}}}
      resources:
        {{- toYaml $own.resources | nindent 8 }}
      securityContext:
        {{- include "aiaas.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if ne $root.Values.tls.mode "mesh" }}
        - {name: tls, mountPath: /etc/aiaas/tls, readOnly: true}
        {{- end }}
        {{- if eq $service "router" }}
        - {name: journal, mountPath: /var/lib/aiaas}
        {{- end }}
        {{- if and (eq $service "identity") $own.configurationConfigMap }}
        - {name: organizations, mountPath: /etc/aiaas/organizations, readOnly: true}
        {{- end }}
  volumes:
    - {name: tmp, emptyDir: {sizeLimit: 256Mi}}
    {{- if ne $root.Values.tls.mode "mesh" }}
    - name: tls
      secret: {secretName: {{ include "aiaas.tlsSecret" (list $root $service) }}, defaultMode: 0440}
    {{- end }}
    {{- if and (eq $service "identity") $own.configurationConfigMap }}
    - name: organizations
      configMap: {name: {{ $own.configurationConfigMap }}}
    {{- end }}
{{- end }}
