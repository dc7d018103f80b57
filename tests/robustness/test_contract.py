"""What a model takes, in words, in JSON, and on the wire."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.contract import DTYPES, LAYOUTS, InputContract
from dfmcl.robustness.scale import PLAIN, PRESETS, Scale

# Presets, by hand: what each makes of one pixel's bytes R, G, B.
BYTES = np.array([10, 100, 250])
EXPECTED = {
    "plain": BYTES / 255,
    "0..255": BYTES,
    "BGR": BYTES[::-1] / 255,
    "imagenet": (BYTES / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225],
    "imagenet BGR": ((BYTES / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])[::-1],
    "inception": BYTES / 127.5 - 1,
    "caffe": BYTES[::-1] - [103.939, 116.779, 123.68],
    "clip": (BYTES / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711],
    "0..255 mean=127 std=128": (BYTES - 127) / 128,
    "0..1 mean=0.1,0.2,0.3 std=2,3,4 BGR": (BYTES[::-1] / 255 - [0.1, 0.2, 0.3]) / [2, 3, 4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("words", EXPECTED)
def test_words_say_which_numbers_the_network_is_sent(words: str, layout: str) -> None:
    """Of one pixel of three colours, in floats; `relaxed`, which attacks climb through, is the same with a gradient."""
    contract = InputContract.parse(f"float32 {layout} 1x2x3 {words}")
    assert str(contract) == f"float32 {layout} 1x2x3 {words}".removesuffix(" plain")
    pixel = torch.tensor(BYTES / 255, dtype=torch.float32).view(1, 3, 1, 1)
    x = pixel.expand(2, 3, 1, 2).clone().requires_grad_()
    sent = contract.wire(x.detach()).numpy()
    assert sent.shape == (2, *contract.dims)
    first = sent.reshape(2, 3, 1, 2).transpose(0, 2, 3, 1)
    colours = first if contract.channels_first else sent.reshape(2, 1, 2, 3)
    np.testing.assert_allclose(colours[1, 0, 1], EXPECTED[words], rtol=1e-5, atol=1e-5)
    climbed = contract.relaxed(x)
    np.testing.assert_array_equal(climbed.detach().numpy(), sent)
    (slope,) = torch.autograd.grad(climbed.sum(), x)
    step = np.array(contract.scale.applied(pixel + 1 / 255) - contract.scale.applied(pixel)).sum() * 255
    assert float(slope[0, :, 0, 0].sum()) == pytest.approx(step, rel=1e-3)
    torch.testing.assert_close(contract.scale.undone(contract.scale.applied(pixel)), pixel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_type_is_the_last_thing_to_change(dtype: str) -> None:
    """Half precision rounds what was computed in float32; bytes have an order and no other scale."""
    words = "BGR" if dtype == "uint8" else "imagenet BGR"
    contract = InputContract.parse(f"{dtype} NCHW 1x1x3 {words}")
    sent = contract.wire(torch.tensor(BYTES / 255, dtype=torch.float32).view(1, 3, 1, 1))
    assert sent.dtype == DTYPES[dtype]
    expected = BYTES[::-1] if dtype == "uint8" else EXPECTED["imagenet BGR"]
    rounding = 2.0**-10 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(sent.double().numpy().ravel(), expected, rtol=rounding)


VALUES = st.lists(st.floats(-300, 300).filter(bool), min_size=3, max_size=3).map(tuple)
SCALES = st.builds(Scale, st.sampled_from((1, 255)), VALUES, VALUES, st.sampled_from(("RGB", "BGR")))


@given(SCALES | st.sampled_from([*PRESETS.values(), *(preset.turned() for preset in PRESETS.values())]))
def test_words_and_json_say_all_of_a_contract(scale: Scale) -> None:
    """What is written can be read, to the last digit; a plain scale leaves manifests as they were."""
    contract = InputContract(4, 6, 3, "NCHW", "float32", scale)
    assert InputContract.parse(str(contract)) == contract
    assert InputContract.from_json({"name": "images", **contract.to_json()}) == contract
    assert ("mean" in contract.to_json()) == (scale != PLAIN)


def test_a_file_says_what_the_words_leave_out() -> None:
    """Type, layout and size come from the graph; nothing is guessed where it leaves two readings."""
    parse = InputContract.parse
    assert str(parse("", (None, 3, 32, 48), "float16")) == "float16 NCHW 32x48x3"
    assert str(parse("caffe", (1, 32, 48, 3), "float32")) == "float32 NHWC 32x48x3 caffe"
    assert str(parse("28x28x1 grey", (None, 1, None, None), "float32")) == "float32 NCHW 28x28x1"
    assert str(parse("uint8 NHWC 4x4x3 0..255 BGR")) == "uint8 NHWC 4x4x3 BGR"
    assert str(parse("flat 28x28x1", (None, 784), "float32")) == "float32 flat-HWC 28x28x1"
    assert parse("flat-CHW 4x5x3 imagenet", (None, None), "float32").dims == (60,)
    for dims in ((None, 3, 3, 3), (None, None, None, None), ()):
        with pytest.raises(BadInput, match="expected DTYPE LAYOUT HxWxC"):
            parse("", dims, "float32")


@pytest.mark.parametrize(
    ("words", "dims", "message"),
    [
        ("", (None, 784), "the model takes 784 numbers an image; say how they are made of it"),
        ("flat 28x28x1", (None, 768), "the model takes 768 numbers an image, 28x28x1 are 784"),
        ("flat 16x16x3", (None, 768), "say the size and in which order they lie, such as 'flat-HWC 32x32x3'"),
        ("flat", (None, 784), "say the size and in which order"),
        ("flat-HWC", (None, 784), "the size is open; add it, such as 'float32 flat-HWC 32x32x3'"),
        ("flat-HWC 4x4x3", (None, 3, 4, 4), "the model takes 4 dimensions, flat images have 2"),
        ("NCHW 4x4x3", (None, 48), "the model takes 2 dimensions, images have 4"),
        ("flat-HWC flat-CHW 4x4x3", (None, 48), "exclude each other"),
    ],
)
def test_rows_of_numbers_need_their_order(words: str, dims: tuple[int | None, ...], message: str) -> None:
    """A file of rows says nothing of height, width and colours, and none is guessed."""
    with pytest.raises(BadInput, match=message):
        InputContract.parse(words, dims, "float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("imagenett", "'imagenett' is not known; .* SCALE of plain, imagenet, inception, caffe, clip, with RGB"),
        ("imagenet clip", "imagenet and clip exclude each other"),
        ("imagenet 0..255", "imagenet says its own range, mean and std"),
        ("clip mean=1", "clip says its own range, mean and std"),
        ("RGB BGR", "RGB and BGR exclude each other"),
        ("grey", "grey takes 1 of an image's channels, there are 3"),
        ("mean=1,2", "mean has 2 values, the number of channels is 3"),
        ("mean=a", "'mean=a': expected numbers, commas and no spaces"),
        ("mean=nan", "mean .nan,.: expected finite numbers"),
        ("std=0,1,2", "expected finite numbers, none of them 0"),
        ("0..2", "'0..2' is not known"),
        ("NHWC", "NHWC and NCHW exclude each other|NCHW and NHWC exclude each other"),
        ("uint8", "float32 and uint8 exclude each other"),
        ("8x8x3", "'8x8x3' is not known"),
    ],
)
def test_words_that_say_nothing_are_named(words: str, message: str) -> None:
    """One line names the word, and what may stand there."""
    with pytest.raises(BadInput, match=message):
        InputContract.parse(f"float32 NCHW 32x32x3 {words}")


def test_bytes_and_grey_images_have_no_colours_to_scale() -> None:
    """A uint8 model is sent bytes; one channel has no order."""
    with pytest.raises(BadInput, match="uint8 images come as bytes; leave the scale out"):
        InputContract.parse("uint8 NHWC 32x32x3 imagenet")
    with pytest.raises(BadInput, match="BGR takes 3 of an image's channels, there are 1"):
        InputContract.parse("float32 NCHW 28x28x1 BGR")
    with pytest.raises(BadInput, match="mean has 3 values, the number of channels is 1"):
        InputContract.parse("float32 NCHW 28x28x1 imagenet")
