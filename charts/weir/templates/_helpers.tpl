{{- define "weir.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* Not empty where the platform chooses the users of pods, and refuses those that ask for one. */ -}}
{{- define "weir.arbitraryUser" -}}
{{- $there := .Capabilities.APIVersions.Has "security.openshift.io/v1" }}
{{- if or (eq (toString .Values.openshift) "true") (and (eq (toString .Values.openshift) "auto") $there) }}true{{ end }}
{{- end }}

{{- define "weir.operator" -}}
{{ .Release.Name }}-operator
{{- end }}

{{- define "weir.labels" -}}
app.kubernetes.io/name: weir-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: weir
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "weir.selector" -}}
app.kubernetes.io/name: weir-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
