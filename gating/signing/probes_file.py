"""probes.npz: the images that a gate attacked, what the attacks made of them, and the logits that decided.

It keeps `change`, what was added, in place of the adversarial images, which hardly compress; and pixels only of the
first images of the order, as many as PIXELS has room for. Those of the others are the data set's, and what the attacks
made of them a gate finds again; labels and logits, from which the verdict follows, are there for all.

Of each further threat it keeps the same of the first images, as many as OTHERS has room for: `change1` and
`adversarial_logits1` are of the first of the report's `radii`, and so on. Archives of earlier gates have none of them.
"""

from __future__ import annotations

import io
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.reader import opened
from dfmcl.gating.signing.faults import refusal

# What numpy.load raises, depending on which byte is another.
DAMAGED = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, SyntaxError, TypeError, NotImplementedError, OverflowError,
    zipfile.BadZipFile, lzma.LZMAError, zlib.error,
)  # fmt: skip
ANSWERS = ("labels", "clean_logits", "adversarial_logits")
MEMBERS = ("images", "change", *ANSWERS)
FURTHER = ("change", "adversarial_logits")  # with the number of the threat
MOST_BYTES = 2**32  # unpacked
PIXELS = 2**25  # bytes of images that are kept: 222 of 224 x 224, 10,922 of CIFAR-10
OTHERS = (
    2**24
)  # bytes of changes in further threats: in one of them 111 images of 224 x 224, in 75 corruptions one each


def kept(images: int, shape: Sequence[int]) -> int:
    """Of how many of so many images `(H, W, C)` the pixels are kept: at least of one."""
    return min(images, max(1, PIXELS // math.prod(shape)))


def kept_in(images: int, shape: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """The same in each further threat, by their kinds: of the first of `images`, and at least of one.

    Kinds have equal parts of OTHERS, and so have the threats of a kind: 75 corruptions leave a patch its own half.
    """
    parts = [OTHERS // len(set(kinds)) // kinds.count(kind) // math.prod(shape) for kind in kinds]
    return [min(images, max(1, part)) for part in parts]


def further(arrays: Mapping[str, NDArray[Any]]) -> list[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """Of each further threat, what the attacks made of the first images `(Q, H, W, C)`, and the logits `(Q, K)`."""
    found: list[tuple[NDArray[np.uint8], NDArray[np.float32]]] = []
    while (change := arrays.get(f"change{len(found) + 1}")) is not None:
        logits = arrays[f"adversarial_logits{len(found) + 1}"]
        found.append((arrays["images"][: len(change)] + change, logits))
    return found


def as_npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """An archive for `numpy.load`, compressed by LZMA: photographs take a sixth less, changes two thirds of zlib's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # without today's date: the same arrays are the same bytes
            archive.writestr(entry, member.getbuffer(), zipfile.ZIP_LZMA)
    return buffer.getvalue()


def read_probes(path: Path) -> dict[str, NDArray[Any]]:
    """The images that a gate attacked and whose pixels it kept, and `adversarial`, what the attacks made of them.

    BadEvidence for no such file. images, change, adversarial: uint8 `(P, H, W, C)`; labels: `(P,)`; clean_logits,
    adversarial_logits: float32 `(P, K)`. What there is of further threats, `further` takes from it.
    """
    found = _arrays(path, True, None)
    part = {name: array[: len(found["images"])] for name, array in found.items()}
    return {**part, "adversarial": part["images"] + part["change"]}  # modulo 256


def read_answers(path: Path, shape: tuple[int, int, int, int, int]) -> dict[str, NDArray[Any]]:
    """Labels and logits of all images, and what was added to them; BadEvidence also for an archive of another shape.

    shape: images, height, width, channels and classes of the report that the probes belong to.
    """
    return _arrays(path, False, shape)


def _arrays(path: Path, pixels: bool, shape: tuple[int, int, int, int, int] | None) -> dict[str, NDArray[Any]]:
    """The members, once the headers of all fit together; no byte beyond the sizes in them is unpacked.

    pixels: those of images, too.
    """
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            numbers = range(1, (len(archive.namelist()) - len(MEMBERS)) // 2 + 1)
            changes, logits = ([f"{name}{number}" for number in numbers] for name in FURTHER)
            members = [*MEMBERS, *changes, *logits]
            if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in members):  # nor one of them twice
                raise refusal("probes", f"{path}: its members are not {', '.join(MEMBERS)}")
            shapes = {entry.filename.removesuffix(".npy"): _header(archive, entry) for entry in archive.infolist()}
            said = ", ".join(f"{name} {dtype} {sizes}" for name, (sizes, dtype) in shapes.items())
            if not _fit(shapes, shape):
                raise refusal("probes", f"{path}: its members do not fit together ({said[:400]})")
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > MOST_BYTES:
                raise refusal("probes", f"{path}: unpacks to {unpacked:,} bytes, and at most {MOST_BYTES:,} are read")
            return {name: _member(archive, name) for name in members if pixels or name != "images"}
    except DAMAGED as error:
        raise refusal("probes", f"{path}: not the gate's probes ({error})") from None


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type that a member says it has; ValueError where its size is another."""
    with archive.open(entry) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        sizes, _, dtype = read(member, max_header_size=1000)
        begin = member.tell()
    if dtype.hasobject or math.prod(sizes) * dtype.itemsize != entry.file_size - begin:
        raise ValueError(f"{entry.filename[:40]} holds no {dtype} {sizes}")
    return sizes, dtype


def _member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _fit(
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], expected: tuple[int, int, int, int, int] | None
) -> bool:
    """Whether the members are the gate's for the same images."""
    (images, bytes_), (change, same), (labels, integer) = shapes["images"], shapes["change"], shapes["labels"]
    (clean, one), (adversarial, other) = shapes["clean_logits"], shapes["adversarial_logits"]
    typed = (bytes_ == same == np.uint8) and integer.kind in "iuf" and one.kind == other.kind == "f"
    if not typed or len(images) != 4 or len(labels) != 1 or images != change or clean != adversarial:
        return False
    whole = (*labels, *images[1:], *clean[1:])
    for number in range(1, (len(shapes) - len(MEMBERS)) // 2 + 1):
        (changed, pixels), (answered, logits) = (shapes[f"{name}{number}"] for name in FURTHER)
        if pixels != np.uint8 or logits.kind != "f" or not changed or not answered or changed[0] > images[0]:
            return False
        if (*changed[1:], *answered) != (*images[1:], changed[0], *clean[1:]):
            return False
    return (
        len(clean) == 2 and clean[:1] == labels and images[0] == kept(*labels, images[1:]) and expected in (None, whole)
    )
