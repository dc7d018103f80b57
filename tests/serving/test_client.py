"""The client against a real Triton, and against servers that are not there or do not answer."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import numpy as np
import pytest

from dfmcl.common.errors import BadInput, DeadlineExceeded, Rejected, Unavailable
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.clients.triton import Client
from tests.serving.workshop import Served, onnx_logits, run_python


@pytest.mark.parametrize("images", [1, 64, 150])
def test_served_logits_are_those_of_onnx_runtime(served: Served, candidate: Path, images: int) -> None:
    """One image, a full batch and more than two of them come back as ONNX Runtime computes them here."""
    x = load_dataset("digits").x_test[:images]
    with Client(served.ready["grpc"], "digits") as client:
        answer = client.predict(x)
    expected = onnx_logits(candidate / "model.onnx", x)
    assert answer.version == "1"
    assert answer.logits.shape == (images, 10)
    np.testing.assert_allclose(answer.logits, expected, atol=1e-5)  # batches of another size sum in another order


def test_every_other_image_is_sent_as_it_is(served: Served, candidate: Path) -> None:
    """A strided view is answered as the array that it shows."""
    x = load_dataset("digits").x_test[:20:2]
    with Client(served.ready["grpc"], "digits", priority=2) as client:
        answer = client.predict(x)
    np.testing.assert_allclose(answer.logits, onnx_logits(candidate / "model.onnx", x), atol=1e-5)


def test_describe_tells_the_interface(served: Served) -> None:
    """Shape, classes and labels come from the server, in the order of the logits."""
    with Client(served.ready["grpc"], "digits") as client:
        description = client.describe()
    assert (description.model, description.version) == ("digits", "1")
    assert description.input_shape == (16, 16, 3)
    assert (description.classes, description.labels) == (10, tuple("0123456789"))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((1, 3, 16, 16), np.uint8),
        np.zeros((1, 16, 16, 1), np.uint8),
        [[1]],
    ],
    ids=["float", "no-batch", "empty", "channels-first", "grey", "list"],
)
def test_wrong_images_are_bad_input(served: Served, images: np.ndarray) -> None:
    """They are refused here, with what is expected and what was found."""
    with (
        Client(served.ready["grpc"], "digits") as client,
        pytest.raises(BadInput, match=r"images: .* found"),
    ):
        client.predict(images)


@pytest.mark.parametrize(("model", "version"), [("nobody", ""), ("digits", "9")])
def test_unknown_model_or_version_is_rejected(served: Served, model: str, version: str) -> None:
    """The server is there and says no."""
    with (
        Client(served.ready["grpc"], model, version=version) as client,
        pytest.raises(Rejected) as caught,
    ):
        client.predict(np.zeros((1, 16, 16, 3), np.uint8))
    assert caught.value.reason == "unknown_model"


def test_server_that_is_down_is_unavailable() -> None:
    """Nobody listens: the error comes at once and names model and address."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{closed.getsockname()[1]}"
    started = time.monotonic()
    with Client(url, "digits") as client, pytest.raises(Unavailable, match=f"'digits' at {url}") as caught:
        client.describe()
    assert (caught.value.reason, caught.value.exit_code) == ("unavailable", 5)
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value)


def test_server_that_does_not_answer_exceeds_the_deadline() -> None:
    """A port that accepts and stays silent costs the deadline, not more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with (
            Client(f"127.0.0.1:{silent.getsockname()[1]}", "digits", timeout_seconds=0.3) as client,
            pytest.raises(DeadlineExceeded, match=r"within 0\.3 s"),
        ):
            client.predict(np.zeros((1, 16, 16, 3), np.uint8))
        assert 0.2 < time.monotonic() - started < 2


def test_deadline_holds_for_an_inference(served: Served) -> None:
    """A live server that is too slow for the caller is a missed deadline too."""
    with Client(served.ready["grpc"], "digits") as client:
        client.describe()
        client.timeout_seconds = 1e-4
        with pytest.raises(DeadlineExceeded):
            client.predict(np.zeros((64, 16, 16, 3), np.uint8))


@pytest.mark.parametrize("url", ["", "localhost", "http://127.0.0.1:8000", "127.0.0.1:http"])
def test_url_that_is_no_grpc_endpoint_is_bad_input(url: str) -> None:
    """The message says what an endpoint looks like."""
    with pytest.raises(BadInput, match="host:port"):
        Client(url, "digits")


def test_client_needs_no_torch() -> None:
    """A caller installs numpy and tritonclient only."""
    output, _ = run_python("import sys, dfmcl.serving.clients.triton; print(*sys.modules)").communicate()
    assert "dfmcl.serving.clients.triton" in output.split()
    assert not {"torch", "onnxruntime", "pydantic", "dfmcl.robustness", "dfmcl.release"} & set(output.split())
