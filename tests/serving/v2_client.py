"""A program for an environment with tritonclient[http]: it asks an address, and says in JSON what came."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException


def main() -> None:
    """ADDRESS MODEL KEY IMAGES.npy"""
    address, model, key, path = sys.argv[1:]
    images, headers = np.load(path), {"X-API-Key": key} if key else {}
    client = http.InferenceServerClient(address, network_timeout=30, connection_timeout=30)
    found: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(),
        "metadata": client.get_model_metadata(model, headers=headers),
    }
    version = found["metadata"]["versions"][0]

    def asked(batch: Any, *, binary: bool = True, classes: int = 0, sent: bool = True, **options: Any) -> Any:
        tensor = http.InferInput("images", batch.shape, options.pop("datatype", "UINT8"))
        tensor.set_data_from_numpy(batch, binary_data=sent)
        output = http.InferRequestedOutput("logits", binary_data=binary, class_count=classes)
        return client.infer(model, [tensor], outputs=[output], headers=dict(headers), **options)  # it writes into them

    for name, options in {
        "binary": {},
        "json": {"binary": False, "sent": False},
        "version": {"model_version": version, "request_id": "question-7"},
    }.items():
        response = asked(images, **options)
        found[name] = {"logits": response.as_numpy("logits").tolist(), "about": response.get_response()}
    tensor = http.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    found["no outputs"] = {"logits": client.infer(model, [tensor], headers=dict(headers)).as_numpy("logits").tolist()}
    for name, binary in (("classes", True), ("classes in JSON", False)):
        rows = asked(images, classes=3, binary=binary).as_numpy("logits")
        found[name] = [[text if isinstance(text, str) else text.decode() for text in row] for row in rows]
    wrong: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("another size", images[:, :8], {}),
        ("another type", images.astype(np.float32), {"datatype": "FP32"}),
        ("too many", np.repeat(images[:1], 65, axis=0), {}),
        ("another version", images, {"model_version": "99"}),
    )
    for name, batch, options in wrong:
        try:
            asked(batch, **options)
            found[name] = None
        except InferenceServerException as error:
            found[name] = [error.status(), error.message()]
    print(json.dumps(found))


main()
