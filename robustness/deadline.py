"""A question to an ONNX file, and how long its answer may take: a Loop of 2^40 turns would never give one."""

from __future__ import annotations

import threading
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from dfmcl.common.errors import BadInput

SECONDS = 120.0  # an image; the largest networks take some seconds on one core


def answered(
    session: ort.InferenceSession,
    images: NDArray[Any],
    where: object,
    options: ort.RunOptions | None = None,
    seconds: float = SECONDS,
) -> list[Any]:
    """All outputs of a session with one input.

    BadInput where they are not there within `seconds` an image: ONNX Runtime then stops before the next operator, also
    in the body of a Loop or a Scan. One operator that computes is not interrupted, but it ends: what it computes on
    must fit into memory.

    where: for the message.
    options: of this call.
    """
    told, late = options or ort.RunOptions(), threading.Event()

    def stop() -> None:
        late.set()
        told.terminate = True

    most = seconds * max(1, len(images))
    timer = threading.Timer(most, stop)
    timer.daemon = True  # an interrupted command need not wait for it
    timer.start()
    try:
        found: list[Any] = session.run(None, {session.get_inputs()[0].name: images}, told)
    except Exception:  # ONNX Runtime says that it was stopped by an error as any other
        if not late.is_set():
            raise
        count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
        raise BadInput(
            f"{where}: gave no answer to {count} within {most:g} s; export a smaller model, or one whose loops end"
        ) from None
    finally:
        timer.cancel()
    return found
