"""The InferenceService of a version that was promoted, pinned to its bytes: `dfmcl promote --print-kserve`."""

from __future__ import annotations

import re

from dfmcl.common.errors import BadInput
from dfmcl.release.verification import Promoted

# registry:port/path:tag@sha256:digest, as Kubernetes takes an image; nothing that YAML reads otherwise.
REFERENCE = re.compile(r"[a-z0-9]([a-z0-9._/-]|:(?=[0-9]+/))*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")


def inference_service(promoted: Promoted, reference: str) -> str:
    """deploy/kserve's InferenceService for this version, as YAML. reference: of the OCI image that holds the model.

    Its init container refuses every model.onnx but the promoted one, so that neither a tag that moved nor another
    release of a trusted key is served in its place. BadInput for what is no image's reference.
    """
    checked_reference(reference)
    name = promoted.model
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name.lower().replace("_", "-")}
  annotations:
    serving.kserve.io/deploymentMode: RawDeployment
    dfmcl.dev/model-sha256: {promoted.sha256}
    dfmcl.dev/version: "{promoted.version}"
spec:
  predictor:
    minReplicas: 2
    maxReplicas: 20
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: 60
    securityContext:
      runAsNonRoot: true
      runAsUser: 1000
      runAsGroup: 1000
      fsGroup: 1000
      seccompProfile: {{ type: RuntimeDefault }}
    initContainers:
      - name: verify
        image: dfmcl-serve:0.1.0
        command: [dfmcl, verify, /models/{name}, --trust, /etc/dfmcl/trust.toml, --sha256, {promoted.sha256}]
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities:
            drop: [ALL]
        resources:
          requests: {{ cpu: 100m, memory: 128Mi }}
          limits: {{ memory: 256Mi }}
        volumeMounts:
          - {{ name: model, mountPath: /models/{name}, subPath: {name}, readOnly: true }}
          - {{ name: trust, mountPath: /etc/dfmcl, readOnly: true }}
    model:
      modelFormat: {{ name: dfmcl, version: "1" }}
      runtime: dfmcl-triton
      protocolVersion: grpc-v2
    volumes:
      - name: model
        image:
          reference: "{reference}"
          pullPolicy: IfNotPresent
      - name: trust
        configMap: {{ name: trust }}
"""


def checked_reference(reference: str) -> str:
    """The reference of an image; BadInput for another text."""
    if not REFERENCE.fullmatch(reference):
        raise BadInput(f"--print-kserve {reference}: is no image, such as registry.example/dfmcl-model@sha256:...")
    return reference
