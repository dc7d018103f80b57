"""A client of the served model over gRPC: numpy in, logits out, a deadline on every request, no retries.

with Client("127.0.0.1:8001", "digits") as client:
    answer = client.predict(images)  # uint8 (N, H, W, C) -> answer.logits float32 (N, K), answer.version
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from dfmcl.common.errors import AnswerError, BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.common.preprocessing import PARAMETER, USUAL, Preprocessing
from dfmcl.serving.clients.closing import Closing

LOWEST = 2  # priority of a client that gives way; users are 1 by default
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
class Contract:
    """The parts of a model's configuration that requests must fit, and what requests and answers that do look like.

    where: model and endpoint, for messages.
    """

    where: str
    input_name: str
    input_shape: tuple[int, int, int]
    output_name: str
    classes: int
    max_batch_size: int
    priority_levels: int = 0
    preprocessing: Preprocessing = USUAL

    @classmethod
    def of(cls, config: Any, where: str) -> Contract:
        """From Triton's ModelConfig; Rejected where it is no image classifier."""
        image, logits = config.input, config.output
        if len(image) != 1 or len(logits) != 1 or len(image[0].dims) != 3 or len(logits[0].dims) != 1:
            raise Rejected(f"{where}: not one image in and one row of logits out", "invalid")
        height, width, channels = image[0].dims
        try:
            preprocessing = Preprocessing.parse(config.parameters[PARAMETER].string_value)
        except ValueError as error:
            raise Rejected(f"{where}: its configuration's parameter {PARAMETER}: {error}", "invalid") from None
        return cls(
            where,
            image[0].name,
            (height, width, channels),
            logits[0].name,
            logits[0].dims[0],
            max(config.max_batch_size, 1),
            config.dynamic_batching.priority_levels,
            preprocessing,
        )

    def question(self, images: npt.NDArray[np.uint8], *, ranked: bool = False) -> dict[str, Any]:
        """What `infer` is called with for images (N, H, W, C): logits are asked for, or all classes with their labels,
        best first."""
        tensor = triton.InferInput(self.input_name, images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        output = triton.InferRequestedOutput(self.output_name, class_count=self.classes if ranked else 0)
        return {"inputs": [tensor], "outputs": [output]}

    def logits(self, response: Any, images: int) -> npt.NDArray[np.float32]:
        """Float32 (N, K) of a response; Rejected where that is not in it, or not finite."""
        logits, expected = response.as_numpy(self.output_name), (images, self.classes)
        if logits is None or logits.shape != expected or logits.dtype != np.float32:
            found = "nothing" if logits is None else f"{logits.dtype} {logits.shape}"
            raise Rejected(f"{self.where}: expected float32 logits {expected}, received {found}", "bad_output")
        if not np.isfinite(logits).all():
            raise Rejected(f"{self.where}: its logits are not all finite", "bad_output")
        return np.asarray(logits)

    def labels(self, response: Any) -> tuple[str, ...]:
        """K names in logit order, of the response to a ranked question; the index where a class has no name."""
        entries = response.as_numpy(self.output_name).reshape(-1)  # b"score:index:label", best first
        labels = [""] * self.classes
        for entry in entries:
            _, index, *label = entry.decode().split(":", 2)
            labels[int(index)] = label[0] if label else index
        return tuple(labels)


class Client(Closing):
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
        self.triton = triton.InferenceServerClient(url, channel_args=CHANNEL_OPTIONS)
        self._contract: Contract | None = None

    def close(self) -> None:
        """Close the connection; the client cannot be used afterwards."""
        self.triton.close()

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
        black = np.zeros((1, *contract.input_shape), np.uint8)
        response = self._request(contract.question(black, ranked=True))
        version = response.get_response().model_version
        return Served(self.model, version, contract.input_shape, contract.classes, contract.labels(response))

    def give_way(self) -> bool:
        """Ask behind all others from now on, where the model's configuration has levels for that; returns whether.

        Where it has none, Triton would take any priority for the default one, silently.
        """
        self.priority = LOWEST if self._fetch_contract().priority_levels >= LOWEST else 0
        return self.priority > 0

    @property
    def _where(self) -> str:
        return f"model {self.model!r} at {self.url}"

    def _fetch_contract(self) -> Contract:
        if self._contract is None:
            try:
                config = self.triton.get_model_config(
                    self.model, self.version, client_timeout=self.timeout_seconds
                ).config
            except InferenceServerException as error:
                raise answer_error(error, self._where, self.timeout_seconds) from None
            self._contract = Contract.of(config, self._where)
        return self._contract

    def _infer(self, contract: Contract, images: npt.NDArray[np.uint8]) -> Answer:
        response = self._request(contract.question(images))
        return Answer(contract.logits(response, len(images)), response.get_response().model_version)

    def _request(self, question: dict[str, Any]) -> Any:
        try:
            return self.triton.infer(
                self.model,
                **question,
                model_version=self.version,
                priority=self.priority,
                timeout=int(self.timeout_seconds * 1e6),  # in the queue, so that nobody computes for a client that left
                client_timeout=self.timeout_seconds,
            )
        except InferenceServerException as error:
            raise answer_error(error, self._where, self.timeout_seconds) from None


def answer_error(error: Any, where: str, timeout_seconds: float) -> AnswerError:
    """What an InferenceServerException means. where: model and endpoint; timeout_seconds: what the request had."""
    status, detail = (
        str(error.status()).removeprefix("StatusCode."),
        " ".join(str(error.message()).split()),
    )
    if status == "DEADLINE_EXCEEDED" or "timeout expired" in detail:
        return DeadlineExceeded(f"{where}: no answer within {timeout_seconds:g} s", "timeout")
    if "unknown model" in detail or status == "NOT_FOUND":
        return Rejected(f"{where}: not served there: {detail}", "unknown_model")
    if "maximum queue size" in detail:
        return Unavailable(f"{where}: its queue is full: {detail}", "queue_full")
    if status == "UNAVAILABLE":
        return Unavailable(f"{where}: no connection, or the server is stopping: {detail}", "unavailable")
    if status in ("INTERNAL", "UNKNOWN", "CANCELLED"):
        return Unavailable(f"{where}: the server failed: {detail}", "internal")
    return Rejected(f"{where}: refused ({status}): {detail}", "invalid")
