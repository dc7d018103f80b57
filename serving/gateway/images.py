"""What a client sends, as the uint8 batch that the model takes: image files, alone or together, or a JSON tensor.

The bytes come from strangers: sizes are checked before anything of that size is made, and whatever a decoder trips
over is the sender's problem, told with a reason.
"""

from __future__ import annotations

import binascii
import io
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from dfmcl.common import pictures
from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway.problems import RETRY_SECONDS, Problem

FIELD = "image"  # of a form
# Each type that says what an image file is, to Pillow's name; other names for JPEG and PNG are in wide use.
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
FORMATS |= {"image/jpg": "JPEG", "image/pjpeg": "JPEG", "image/x-png": "PNG"}
# What says nothing about an image: the content tells. curl sends the last one where it is told nothing.
UNTOLD = ("", "application/octet-stream", "image/*", "application/x-www-form-urlencoded")
FORM, TENSOR = "multipart/form-data", "application/json"
TYPES = (*FORMATS, *filter(None, UNTOLD), FORM, TENSOR)  # all that a request may say; it may say nothing too
MODES = {1: "L", 3: "RGB"}  # of Pillow, by the number of channels
PARTS = 16  # of a form, besides its images
DATA = re.compile(rb'"data"\s*:\s*\[')
NUMBERS = b"0123456789,[] \t\r\n"  # all that a list of whole numbers from 0 on may hold, nested or not
# json.loads lets no other thread run until it returns, which for 64 small images is as long as an answer takes. So JSON
# is read in pieces of so many bytes, in less than half a millisecond each; there may be so many without the numbers.
PIECE, REST = 16_384, 65_536

LIST, TAIL = re.compile(rb'\s*\{\s*"images"\s*:\s*\['), re.compile(rb"\]\s*\}\s*\Z")

Batch = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class File:
    """An image file of a request. data: None where it is none; kind: its content type, "" where nothing is said."""

    data: bytes | None
    kind: str


def open_image(data: bytes, kind: str, max_pixels: int) -> Image.Image:
    """An image file whose header was read, and no more. kind: its content type, one of FORMATS or UNTOLD.

    Problem: bad_image, too_large where it has more than max_pixels, wrong_input where it has several frames or more
    than 8 bits a channel.
    """
    formats = (FORMATS[kind],) if kind in FORMATS else tuple(dict.fromkeys(FORMATS.values()))
    with _told():
        return pictures.opened(io.BytesIO(data), formats, max_pixels)


def require_size(image: Image.Image, contract: Contract) -> None:
    """A Problem where an image would have to be resized, whichever way it is turned."""
    height, width, _ = contract.input_shape
    if image.size not in ((width, height), (height, width)):
        raise _wrong_size(image, width, height)


def pixels(image: Image.Image, contract: Contract, *, resize: bool) -> Batch:
    """An opened image as (1, H, W, C), as training reads it: upright, alpha on white, and where allowed preprocessed.

    Where it is not, an image of the model's size is taken as it is: its sender has preprocessed it.

    Problem: bad_image where the file is cut off or broken, wrong_input where it does not fit the model.
    """
    height, width, channels = contract.input_shape
    if channels not in MODES:
        raise Problem("wrong_input", f"image: the model takes {channels} channels, which no image file has; send JSON")
    with _told():
        image = pictures.upright(image, MODES[channels])
        if image.size != (width, height) and not resize:
            raise _wrong_size(image, width, height)
        return pictures.to_array(contract.preprocessing.applied(image, width, height) if resize else image)[None]


def tensor(body: bytes, contract: Contract) -> Batch:
    """The one input of a KServe v2 JSON request as (N, H, W, C), 1 <= N <= max_batch_size; data flat or nested.

    Problem: bad_request where it is no such JSON, wrong_input where it is not what the model takes, too_large where
    there are too many images.
    """
    return tensor_of(*document_of(body), contract)


def tensor_of(document: dict[str, Any], numbers: bytes, contract: Contract) -> Batch:
    """The same of what `document_of` found."""
    (entry,) = document["inputs"]
    shape = require_tensor(entry, contract)
    data = entry.get("data")
    try:
        values = _bytes_of(numbers if data == [] and numbers else data)
    except (TypeError, ValueError, OverflowError):
        raise Problem("bad_request", "inputs: data must be a list of whole numbers from 0 to 255") from None
    if len(values) != math.prod(shape):
        raise Problem("bad_request", f"inputs: data holds {len(values)} numbers, the shape says {math.prod(shape)}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def require_tensor(entry: dict[str, Any], contract: Contract) -> tuple[int, ...]:
    """The shape of an input that the model takes; a Problem otherwise."""
    shape = entry["shape"]
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise Problem("bad_request", "inputs: shape must be a list of whole numbers")
    told = (entry["name"], entry["datatype"], tuple(shape[1:]))
    if told != (contract.input_name, "UINT8", contract.input_shape) or shape[0] < 1:
        takes = ", ".join(map(str, contract.input_shape))
        raise Problem("wrong_input", f"inputs: the model takes {contract.input_name!r}, UINT8, of shape [N, {takes}]")
    if shape[0] > contract.max_batch_size:
        raise Problem("too_large", f"inputs: holds {shape[0]} images, may hold up to {contract.max_batch_size}")
    return tuple(shape)


def form_files(body: bytes, content_type: str, most: int) -> list[File]:
    """The fields `image` of a multipart form, in their order. most: images. Problem: bad_request, too_large."""
    form = _Form(PARTS + most)
    try:
        boundary = parse_options_header(content_type)[1][b"boundary"]
        parser = MultipartParser(boundary, form.callbacks)
        parser.write(body)
        parser.finalize()
    except (KeyError, FormParserError):
        raise Problem("bad_request", "form: is no readable multipart/form-data") from None
    if not form.ended:
        raise Problem("bad_request", "form: is cut off")
    found = [part for part in form.parts if part.name == FIELD.encode()]
    if not found:
        raise Problem("bad_request", f"form: needs a field {FIELD!r}, has none")
    _require_few(len(found), most)
    return [
        File(bytes(part.data), media_type(part.headers.get(b"content-type", b"").decode("latin-1"))) for part in found
    ]


def is_list(body: bytes) -> bool:
    """Whether a JSON body is {"images": ["BASE64", ...]}, and no tensor."""
    return LIST.match(body) is not None


def listed_files(body: bytes, most: int) -> list[File]:
    """The files of such a body, in their order; data is None of an entry that is no base64.

    Taken apart without a JSON parser, which would build whatever a stranger nests. most: images. Problem: bad_request,
    too_large.
    """
    head, tail = LIST.match(body), TAIL.search(body, max(0, len(body) - REST))
    if head is None or tail is None or tail.start() < head.end():
        raise _no_list()
    inner = body[head.end() : tail.start()]
    _require_few(inner.count(b",") + 1, most)
    entries = [entry.strip(b" \t\r\n") for entry in inner.split(b",")]
    if not all(len(entry) > 2 and entry[:1] == entry[-1:] == b'"' for entry in entries):
        raise _no_list()
    return [File(_unpacked(entry[1:-1]), "") for entry in entries]


def _unpacked(text: bytes) -> bytes | None:
    try:
        return binascii.a2b_base64(text.replace(b"\\/", b"/"), strict_mode=True)
    except binascii.Error:
        return None


def _no_list() -> Problem:
    return Problem("bad_request", 'body: expected {"images": ["BASE64", ...]}, each without data:...;base64, before it')


def _require_few(images: int, most: int) -> None:
    if images > most:
        raise Problem("too_large", f"holds {images} images, may hold up to {most}")


def media_type(content_type: str) -> str:
    """A content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


@contextmanager
def _told() -> Iterator[None]:
    """What becomes no image is told to the sender; memory that ran out is no fault of theirs."""
    try:
        yield
    except pictures.Unusable as error:
        raise Problem(error.reason, f"image: {error}") from None
    except MemoryError:
        message = "image: no memory is left to decode it; try again later"
        raise Problem("overloaded", message, retry_seconds=RETRY_SECONDS) from None


def _wrong_size(image: Image.Image, width: int, height: int) -> Problem:
    found = f"{image.width} x {image.height}"
    return Problem("wrong_input", f"image: is {found} pixels, the model takes {width} x {height}; or say ?resize=true")


def _bytes_of(data: Any) -> bytes:
    """A list of numbers, or of lists of them. numpy would guess a type, and strings may cost it gigabytes."""
    if isinstance(data, bytes):
        return _bytes_in_pieces(data)
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = list(itertools.chain.from_iterable(data))
    if not isinstance(data, list):
        raise TypeError("no list")
    return bytes(data)


def document_of(body: bytes) -> tuple[dict[str, Any], bytes]:
    """A KServe v2 request with one input, and the numbers that were taken out of it, where these were many.

    Only the places of name, shape and datatype are checked.
    """
    try:
        rest, numbers = _without_numbers(body)
        if len(rest) > REST:
            raise ValueError("what is that?")
        document = json.loads(rest)
        (entry,) = document["inputs"]
        for key in ("name", "shape", "datatype"):
            entry[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Problem(
            "bad_request",
            'body: expected {"inputs": [{"name", "shape", "datatype", "data"}]} with one input, its data whole numbers',
        ) from None
    return document, numbers


def _without_numbers(body: bytes) -> tuple[bytes, bytes]:
    """A request with an empty list as its data, and what stood in there, where it is long and its data are numbers."""
    found = DATA.search(body, 0, PIECE)
    if found is None or len(body) <= PIECE:
        return body, b""
    begin = end = found.end()
    while end < len(body) and not (other := body[end : end + PIECE].translate(None, NUMBERS)):
        end += PIECE
    stop = len(body) if end >= len(body) else body.index(other[:1], end)
    end = body.rfind(b"]", begin, stop)
    return (body, b"") if end < 0 else (body[:begin] + body[end:], body[begin:end])


def _bytes_in_pieces(numbers: bytes) -> bytes:
    """What stands in a list of numbers, or of lists of them, whose brackets are only counted."""
    if numbers.count(b"[") != numbers.count(b"]") or numbers.rstrip().endswith(b","):
        raise ValueError("no list")
    flat, found, begin = numbers.replace(b"[", b" ").replace(b"]", b" "), bytearray(), 0
    while begin < len(flat):
        end = flat.find(b",", begin + PIECE)
        end = len(flat) if end < 0 else end
        found += bytes(json.loads(b"[" + flat[begin:end] + b"]"))
        begin = end + 1
    return bytes(found)


class _Part:
    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.data = bytearray()

    @property
    def name(self) -> bytes:
        return parse_options_header(self.headers.get(b"content-disposition", b""))[1].get(b"name", b"")


class _Form:
    """The parts of a form, in memory; the body's limit is theirs."""

    def __init__(self, most: int) -> None:
        self.parts: list[_Part] = []
        self.most = most
        self.ended = False
        self._field, self._value = bytearray(), bytearray()
        self.callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_end": self._end,
            "on_part_data": lambda data, start, end: self.parts[-1].data.extend(data[start:end]),
        }

    def _begin(self) -> None:
        if len(self.parts) == self.most:
            raise Problem("bad_request", f"form: has more than {self.most} fields")
        self.parts.append(_Part())

    def _end(self) -> None:
        self.ended = True

    def _header(self) -> None:
        self.parts[-1].headers[bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()
