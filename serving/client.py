"""A client of the served model over gRPC: numpy in, logits out, a deadline on every request, no retries.

with Client("127.0.0.1:8001", "digits") as client:
    answer = client.predict(images)  # uint8 (N, H, W, C) -> answer.logits float32 (N, K), answer.version
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from serving.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),  # the model's max_batch_size bounds a message
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # a measurement that retries measures something else
    ("grpc.enable_http_proxy", 0),  # an inference endpoint is never behind a forward proxy
    ("grpc.initial_reconnect_backoff_ms", 100),  # gRPC would wait up to 2 minutes before it sees
    ("grpc.max_reconnect_backoff_ms", 1000),  # that a server is back
    (
        "grpc.use_local_subchannel_pool",
        1,
    ),  # a new client starts with a new connection, not an old one's backoff
]


@dataclass(frozen=True)
class Answer:
    """logits: float32 (N, K), finite; version: the model version that computed all of them."""

    logits: npt.NDArray[np.float32]
    version: str


@dataclass(frozen=True)
class Served:
    """What an endpoint serves. input_shape: (H, W, C) of uint8 images; classes: K; labels: K names in logit order."""

    model: str
    version: str
    input_shape: tuple[int, int, int]
    classes: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Contract:
    """The parts of the model's configuration that requests must fit."""

    input_name: str
    input_shape: tuple[int, int, int]
    output_name: str
    classes: int
    max_batch_size: int


class Client:
    """One model behind one gRPC endpoint. Threads may share it; it reads the model's configuration once."""

    def __init__(
        self, url: str, model: str, *, version: str = "", timeout_seconds: float = 5.0, priority: int = 0
    ) -> None:
        """url: host:port of Triton's gRPC endpoint; version: "" for the one that is served;
        timeout_seconds: of each request, not of a whole `predict`; priority: 0 is the default, 2 gives way to it."""
        host, _, port = url.rpartition(":")
        if not host or "/" in url or not port.isdecimal():
            raise BadInput(f"url {url!r}: expected host:port of the gRPC endpoint, such as 127.0.0.1:8001")
        if timeout_seconds <= 0:
            raise BadInput(f"timeout_seconds is {timeout_seconds}, must be above 0")
        self.url, self.model, self.version = url, model, version
        self.timeout_seconds, self.priority = timeout_seconds, priority
        self._triton = triton.InferenceServerClient(url, channel_args=CHANNEL_OPTIONS)
        self._contract: _Contract | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the client cannot be used afterwards."""
        self._triton.close()

    def predict(self, images: npt.NDArray[np.uint8]) -> Answer:
        """Logits of images, uint8 (N, H, W, C), N >= 1, sent in parts of at most the model's max_batch_size.

        Raises BadInput before anything is sent; Unavailable, DeadlineExceeded or Rejected where any part fails:
        there are no partial answers, and all parts come from one version.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
            found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            raise BadInput(f"images: expected a uint8 array (N, H, W, C) with N >= 1, found {found}")
        contract = self._fetch_contract()
        if images.shape[1:] != contract.input_shape:
            raise BadInput(
                f"images: model {self.model!r} takes (H, W, C) = {contract.input_shape}, found {images.shape[1:]}"
            )
        parts = [
            self._infer(contract, images[start : start + contract.max_batch_size])
            for start in range(0, len(images), contract.max_batch_size)
        ]
        versions = {part.version for part in parts}
        if len(versions) > 1:
            raise Rejected(
                f"{self._where}: the version changed between parts of one request: {sorted(versions)}; ask again",
                "version_changed",
            )
        return Answer(np.concatenate([part.logits for part in parts]), versions.pop())

    def describe(self) -> Served:
        """What the endpoint serves now. Labels come with an inference of one black image, which proves life."""
        contract = self._fetch_contract()
        ranking = triton.InferRequestedOutput(contract.output_name, class_count=contract.classes)
        black = np.zeros((1, *contract.input_shape), np.uint8)
        response = self._request(contract, black, ranking)
        entries = response.as_numpy(contract.output_name).reshape(-1)  # b"score:index:label", best first
        labels = [""] * contract.classes
        for entry in entries:
            _, index, *label = entry.decode().split(":", 2)
            labels[int(index)] = label[0] if label else index
        return Served(
            self.model,
            response.get_response().model_version,
            contract.input_shape,
            contract.classes,
            tuple(labels),
        )

    @property
    def _where(self) -> str:
        return f"model {self.model!r} at {self.url}"

    def _fetch_contract(self) -> _Contract:
        if self._contract is None:
            try:
                config = self._triton.get_model_config(
                    self.model, self.version, client_timeout=self.timeout_seconds
                ).config
            except InferenceServerException as error:
                raise self._translated(error) from None
            self._contract = self._checked_contract(config)
        return self._contract

    def _checked_contract(self, config: Any) -> _Contract:
        image, logits = config.input, config.output
        if len(image) != 1 or len(logits) != 1 or len(image[0].dims) != 3 or len(logits[0].dims) != 1:
            raise Rejected(f"{self._where}: not one image in and one row of logits out", "invalid")
        height, width, channels = image[0].dims
        return _Contract(
            image[0].name,
            (height, width, channels),
            logits[0].name,
            logits[0].dims[0],
            max(config.max_batch_size, 1),
        )

    def _infer(self, contract: _Contract, images: npt.NDArray[np.uint8]) -> Answer:
        response = self._request(contract, images, triton.InferRequestedOutput(contract.output_name))
        logits = response.as_numpy(contract.output_name)
        expected = (len(images), contract.classes)
        if logits is None or logits.shape != expected or logits.dtype != np.float32:
            found = "nothing" if logits is None else f"{logits.dtype} {logits.shape}"
            raise Rejected(f"{self._where}: expected float32 logits {expected}, received {found}", "bad_output")
        if not np.isfinite(logits).all():
            raise Rejected(f"{self._where}: its logits are not all finite", "bad_output")
        return Answer(logits, response.get_response().model_version)

    def _request(self, contract: _Contract, images: npt.NDArray[np.uint8], output: Any) -> Any:
        tensor = triton.InferInput(contract.input_name, images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        try:
            return self._triton.infer(
                self.model,
                [tensor],
                model_version=self.version,
                outputs=[output],
                priority=self.priority,
                timeout=int(self.timeout_seconds * 1e6),  # in the queue, so that nobody computes for a client that left
                client_timeout=self.timeout_seconds,
            )
        except InferenceServerException as error:
            raise self._translated(error) from None

    def _translated(self, error: Any) -> AnswerError:
        status, detail = (
            str(error.status()).removeprefix("StatusCode."),
            " ".join(str(error.message()).split()),
        )
        if status == "DEADLINE_EXCEEDED" or "timeout expired" in detail:
            return DeadlineExceeded(f"{self._where}: no answer within {self.timeout_seconds:g} s", "timeout")
        if "unknown model" in detail or status == "NOT_FOUND":
            return Rejected(f"{self._where}: not served there: {detail}", "unknown_model")
        if "maximum queue size" in detail:
            return Unavailable(f"{self._where}: its queue is full: {detail}", "queue_full")
        if status == "UNAVAILABLE":
            return Unavailable(f"{self._where}: no connection, or the server is stopping: {detail}", "unavailable")
        if status in ("INTERNAL", "UNKNOWN", "CANCELLED"):
            return Unavailable(f"{self._where}: the server failed: {detail}", "internal")
        return Rejected(f"{self._where}: refused ({status}): {detail}", "invalid")
