{{- /* ConfigMaps' data, once for the object and once for the checksum that makes a changed file a rollout. */}}
{{- define "dfmcl.triton-files" -}}
{{- include "dfmcl.require-trust" . -}}
{{- toYaml .Values.trust.files -}}
{{- end -}}

{{- define "dfmcl.gateway-files" -}}
{{- toYaml (dict "gateway.toml" (required "gateway.config: give the text of gateway.toml (--set-file gateway.config=gateway.toml)" .Values.gateway.config)) -}}
{{- end -}}

{{- define "dfmcl.watch-files" -}}
{{- include "dfmcl.require-trust" . -}}
{{- $config := required "watch.config: give the text of watch.toml (--set-file watch.config=watch.toml), or watch.enabled=false" .Values.watch.config -}}
{{- toYaml (merge (dict "watch.toml" $config) .Values.trust.files) -}}
{{- end -}}

{{- define "dfmcl.require-trust" -}}
{{- if not (hasKey (.Values.trust.files | default dict) "trust.toml") -}}
{{- fail "trust.files: give trust.toml and the files that it names (--set-file 'trust.files.trust\\.toml=trust.toml'); without it nothing is verified" -}}
{{- end -}}
{{- end -}}

{{- /* An OCI image, or a volume of your own, such as a claim or a bucket that a CSI driver mounts. */}}
{{- define "dfmcl.model-volume" -}}
{{- if .Values.model.volume -}}
{{- toYaml .Values.model.volume -}}
{{- else -}}
image:
  reference: {{ required "model.image: name the OCI image of the model, or model.volume" .Values.model.image }}
  pullPolicy: IfNotPresent
{{- end -}}
{{- end -}}

{{- /* What reads a bucket: the command, who it is, and the account that a cloud gives a role. */}}
{{- define "dfmcl.sync-command" -}}
- dfmcl
- sync
- --repository
- {{ .Values.model.bucket.repository }}
- --into
- /models
- --trust
- /etc/dfmcl/trust.toml
{{- end -}}

{{- define "dfmcl.bucket-environment" -}}
{{- with .Values.model.bucket -}}
{{- if .repository -}}
{{- with .secret -}}
envFrom: [{ secretRef: { name: {{ . }} } }]
{{- end }}
{{- with .environment }}
env:
  {{- range $name, $value := . }}
  - { name: {{ $name }}, value: {{ $value | quote }} }
  {{- end }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dfmcl.bucket-account" -}}
{{- if and .Values.model.bucket.repository .Values.model.bucket.serviceAccount -}}
serviceAccountName: {{ .Values.model.bucket.serviceAccount }}
{{- end -}}
{{- end -}}
