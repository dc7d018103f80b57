"""One definition of an image: training's loader and the gateway make the same bytes of a file, or refuse it alike."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dfmcl.common.errors import BadInput
from dfmcl.common.pictures import Unusable, opened, upright
from dfmcl.common.preprocessing import FILTERS, USUAL, Preprocessing
from dfmcl.robustness import folder
from dfmcl.robustness.data import load_dataset
from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway import images
from dfmcl.serving.gateway.problems import Problem
from tests.common.pictures import ORIENTATION, TURNED, Array, drawn, oriented, other, readable, saved, unreadable

SIDE = 16
GATEWAY_PIXELS = 16_000_000
READABLE, UNREADABLE, OTHER = readable(), unreadable(), other()


def trained(directory: Path, data: bytes, suffix: str = "png", side: int = SIDE, preprocessing: str = "") -> Array:
    """What a network that trains on a folder with this file is shown, (side, side, 3)."""
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (directory / place).mkdir(parents=True)
        (directory / place / "plain.png").write_bytes(READABLE["RGB"])
    (directory / "train" / "a" / f"odd.{suffix}").write_bytes(data)
    loaded = load_dataset("folder", str(directory), side, preprocessing=preprocessing)
    assert len(loaded.x_train) == 3
    return loaded.x_train[0]  # odd before plain


def asked(
    data: bytes, side: int = SIDE, channels: int = 3, *, resize: bool = True, preprocessing: Preprocessing = USUAL
) -> Array:
    """What Triton is sent for a request with this body, (side, side, channels)."""
    contract = Contract("", "images", (side, side, channels), "logits", 10, 64, preprocessing=preprocessing)
    return images.pixels(images.open_image(data, "", GATEWAY_PIXELS), contract, resize=resize)[0]


@pytest.mark.parametrize("name", READABLE)
def test_both_rooms_see_the_same_bytes(tmp_path: Path, name: str) -> None:
    """EXIF, alpha, palettes, grey, CMYK, any shape, brought to the size by any rule: equal, pixel by pixel."""
    for words in ("", "squash lanczos", "resize=20 bicubic"):
        seen = trained(tmp_path / words, READABLE[name], preprocessing=words)
        np.testing.assert_array_equal(seen, asked(READABLE[name], preprocessing=Preprocessing.parse(words)))


@pytest.mark.parametrize("name", UNREADABLE)
def test_both_rooms_refuse_in_the_same_words(tmp_path: Path, name: str) -> None:
    """16 bits, several frames, cut off, no image, a bomb: never an image; training names the file."""
    data, words = UNREADABLE[name]
    with pytest.raises(BadInput) as at_training:
        trained(tmp_path, data)
    with pytest.raises(Problem) as at_gateway:
        asked(data)
    assert str(at_training.value).startswith(f"{tmp_path / 'train' / 'a' / 'odd.png'}: ")
    assert words in str(at_training.value)
    assert words in str(at_gateway.value)
    assert at_gateway.value.reason in ("bad_image", "too_large", "wrong_input")


def test_a_bomb_is_one_line(tmp_path: Path) -> None:
    """Pillow's own warning, which names no file, does not stand beside ours; a warning as an error changes nothing."""
    code = "import sys; from dfmcl.robustness.folder import read_image; read_image(sys.argv[1], 16)"
    (tmp_path / "odd.png").write_bytes(UNREADABLE["a bomb below Pillow's own bound"][0])
    for options in ((), ("-W", "error")):
        command = [sys.executable, *options, "-c", code, str(tmp_path / "odd.png")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Warning" not in ended.stderr
        assert ended.stderr.splitlines()[-1].startswith("dfmcl.common.errors.BadInput: ")
        assert "odd.png: has 12000 x 12000 pixels, may have up to" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("suffix", OTHER)
def test_training_reads_more_than_strangers_may_send(tmp_path: Path, suffix: str) -> None:
    """GIF, BMP, TIFF and more, whatever the case of the suffix; the gateway has fewer decoders, and names them."""
    found, expected = trained(tmp_path, OTHER[suffix], suffix, side=20), drawn()[:, 8:28]
    loss = 40 if suffix in ("gif", "jp2") else 0  # of a palette, and of wavelets
    assert np.abs(found.astype(int) - expected).mean() <= loss
    with pytest.raises(Problem, match="is no readable PNG or JPEG or WEBP file"):
        asked(OTHER[suffix])


@pytest.mark.skipif("AVIF" not in folder._readable(), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    """As phones and the web have it; an animated one is refused."""
    rgb = Image.fromarray(drawn())
    found = trained(tmp_path / "one", saved(rgb, "AVIF", quality=100), "avif", side=20)
    assert np.abs(found.astype(int) - drawn()[:, 8:28]).mean() < 10  # of its colours at half the resolution
    with pytest.raises(BadInput, match="has 2 frames"):
        trained(tmp_path / "two", saved(rgb, "AVIF", save_all=True, append_images=[rgb.rotate(180)]), "avif")


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_several_frames_or_pages_are_no_image(tmp_path: Path, kind: str) -> None:
    """Which of them is meant is not ours to guess."""
    rgb = Image.fromarray(drawn())
    data = saved(rgb, kind, save_all=True, append_images=[rgb.rotate(180), rgb.rotate(90)])
    with pytest.raises(BadInput, match=r"odd\.png: has 3 frames or pages; save one of them"):
        trained(tmp_path, data)


@pytest.mark.parametrize(("head", "words"), [("P6 20 20 65535", 2), ("P6 20 20 1023", 2), ("P3 20 20 65535", 0)])
def test_a_deep_ppm_is_refused_as_a_deep_png_is(tmp_path: Path, head: str, words: int) -> None:
    """Pillow halves its numbers without a word; up to 255 it is an image."""
    body = b"\0\1" * (20 * 20 * 3) if words else b"1 " * (20 * 20 * 3)
    with pytest.raises(BadInput, match=r"odd\.ppm: has more than 8 bits a channel; save it with 8"):
        trained(tmp_path / "deep", head.encode() + b"\n" + body, "ppm")
    shallow = head.rpartition(" ")[0].encode() + b" 100\n" + body
    assert trained(tmp_path / "shallow", shallow, "ppm", side=20).shape == (20, 20, 3)


@pytest.mark.parametrize("orientation", TURNED)
def test_an_image_is_upright(orientation: int) -> None:
    """By EXIF's own table, at the image's own size."""
    expected = TURNED[orientation](drawn())
    height, width, _ = expected.shape
    contract = Contract("", "images", (height, width, 3), "logits", 10, 64)
    opened_one = images.open_image(oriented(orientation), "image/png", GATEWAY_PIXELS)
    np.testing.assert_array_equal(images.pixels(opened_one, contract, resize=False)[0], expected)


@pytest.mark.parametrize("orientation", TURNED)
def test_a_tiff_is_turned_once(orientation: int) -> None:
    """Pillow turns it while it decodes, and takes the entry out."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = opened(io.BytesIO(saved(Image.fromarray(drawn()), "TIFF", exif=exif)), ("TIFF",), 10_000)
    np.testing.assert_array_equal(np.asarray(upright(picture, "RGB")), TURNED[orientation](drawn()))


def test_alpha_lies_on_white() -> None:
    """c a + 255 (1 - a), within one level of rounding; the hidden colour of a clear pixel never shows."""
    colours, alpha = drawn(SIDE, SIDE), drawn(SIDE, SIDE, 4)[..., 3:]
    alpha[:4], alpha[4:8] = 0, 255
    found = asked(saved(Image.fromarray(np.concatenate([colours, alpha], axis=2)), "PNG"), resize=False)
    share = alpha / 255
    assert np.abs(found - (colours * share + 255 * (1 - share))).max() <= 1
    assert (found[:4] == 255).all()
    np.testing.assert_array_equal(found[4:8], colours[4:8])


def test_a_grey_model_sees_the_grey_of_the_same_image() -> None:
    """One channel: alpha on white first, then ITU-R 601 luma."""
    for name in ("RGB", "RGBA", "palette with alpha", "grey with alpha"):
        luma = asked(READABLE[name]).astype(float) @ [0.299, 0.587, 0.114]
        assert np.abs(asked(READABLE[name], channels=1)[..., 0] - luma).max() <= 2  # luma is rounded before the resize


@pytest.mark.parametrize(
    ("height", "width", "side"), [(20, 30, 20), (60, 40, 20), (64, 64, 32), (33, 33, 32), (12, 20, 18), (300, 100, 50)]
)
def test_the_middle_is_kept_as_torchvision_keeps_it(height: int, width: int, side: int) -> None:
    """Resize(side), CenterCrop(side) is the oracle where it need not round the longer side, or the cut, to a pixel."""
    picture = Image.fromarray(drawn(height, width))
    oracle = np.asarray(Compose([Resize(side), CenterCrop(side)])(picture))
    found = np.asarray(USUAL.applied(picture, side, side)).astype(int)
    assert np.abs(found - oracle).max() <= 1  # level: Pillow's weights are whole numbers, of another origin


def test_a_long_strip_costs_nothing() -> None:
    """Fitting its shorter side first would make an image of gigabytes."""
    strip = Image.new("L", (8_000_000, 1))
    for words in ("", "squash", "resize=256"):
        assert Preprocessing.parse(words).applied(strip, 224, 224).size == (224, 224)


FILTERS_OF_TORCHVISION = {"bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos": "LANCZOS", "nearest": "NEAREST"}


@given(st.integers(8, 90), st.integers(8, 90), st.integers(24, 40), st.sampled_from(sorted(FILTERS_OF_TORCHVISION)))
def test_a_resized_picture_is_torchvisions(height: int, width: int, resize: int, name: str) -> None:
    """Resize(R), CenterCrop(24), as torchvision and timm evaluate: byte for byte, of any shape, up and down."""
    picture = Image.fromarray(drawn(height, width))
    by = InterpolationMode[FILTERS_OF_TORCHVISION[name]]
    oracle = Compose([Resize(resize, interpolation=by), CenterCrop(24)])(picture)
    found = Preprocessing.parse(f"resize={resize} {name}").applied(picture, 24, 24)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(oracle))


def test_words_of_preprocessing_are_read_back() -> None:
    """All rules with all filters; other words, two of a kind and sides that are none are refused."""
    for rule in ("fit", "squash", "resize=256"):
        for name in FILTERS:
            told = Preprocessing.parse(f"{name} {rule}")
            assert (str(told), Preprocessing.parse(str(told))) == (f"{rule} {name}", told)
    assert Preprocessing.parse("") == USUAL == Preprocessing.parse("fit bilinear")
    for wrong in ("crop", "fit squash", "bilinear box", "resize=0", "resize=-3", "resize=1e3", "resize=256px", "Fit"):
        with pytest.raises(ValueError, match="is no preprocessing; expected 'fit', 'squash' or"):
            Preprocessing.parse(wrong)
    with pytest.raises(BadInput, match="resize=20 bilinear: is smaller than the network's 24 pixels"):
        Preprocessing.parse("resize=20").require_side(24)


def test_an_image_of_the_models_size_is_taken_as_it_is_where_nobody_asks_to_resize() -> None:
    """Its sender has preprocessed it; with ?resize=true it is brought there as every other."""
    data = saved(Image.fromarray(drawn(SIDE, SIDE)), "PNG")
    larger = Preprocessing.parse("resize=20")
    np.testing.assert_array_equal(asked(data, resize=False, preprocessing=larger), drawn(SIDE, SIDE))
    expected = np.asarray(larger.applied(Image.fromarray(drawn(SIDE, SIDE)), SIDE, SIDE))
    np.testing.assert_array_equal(asked(data, preprocessing=larger), expected)
    assert (expected != drawn(SIDE, SIDE)).any()


def test_only_the_named_formats_are_tried() -> None:
    """A PostScript file never reaches the program that Pillow would start for it."""
    with pytest.raises(Unusable, match="is no readable PNG file"):
        opened(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("PNG",), 100)
    assert "EPS" not in folder.FORMATS


def test_memory_that_ran_out_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """By training it is told as itself, by the gateway as overload."""

    def load(self: Image.Image) -> None:
        raise MemoryError

    picture = opened(io.BytesIO(READABLE["RGB"]), ("PNG",), 10_000)
    monkeypatch.setattr(type(picture), "load", load)
    with pytest.raises(MemoryError):
        upright(picture, "RGB")
    with pytest.raises(Problem) as refused:
        asked(READABLE["RGB"])
    assert (refused.value.reason, refused.value.retry_seconds) == ("overloaded", 1)
