"""From a request's body to the images that the model sees: small ones on the spot, large ones in one of few threads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import numpy.typing as npt

from dfmcl.serving.clients.triton import Contract
from dfmcl.serving.gateway import images, v2
from dfmcl.serving.gateway.exchange import Exchange, Sent, Wish
from dfmcl.serving.gateway.problems import Problem

# Decoded on the spot, in about a millisecond at most; larger ones go to a thread and let others pass.
SPOT_PIXELS, SPOT_BYTES = 65_536, 65_536

Batch = npt.NDArray[np.uint8]


class Decoder:
    """threads: for large bodies; pixels: most of an image; unseen: hears why an image of a list is unreadable."""

    def __init__(self, threads: Executor, pixels: int, unseen: Callable[[str], None]) -> None:
        self._threads, self._pixels, self._unseen = threads, pixels, unseen

    async def question(self, body: bytes, header: str | None, contract: Contract) -> v2.Question:
        """A request of KServe's protocol. header: its Inference-Header-Content-Length."""
        found: v2.Question = await self._worked(len(body) <= SPOT_BYTES, v2.question, body, header, contract)
        return found

    async def batch(
        self, body: bytes, content_type: str, contract: Contract, exchange: Exchange, wish: Wish
    ) -> tuple[Batch, Sent]:
        """The body as uint8 (N, H, W, C), and how it came.

        body: of a request, whole.
        content_type: its header, "" where there is none.
        contract: of the model.
        exchange: takes note of the number of images in a list.
        wish: whether to resize.
        """
        kind, spot, most = images.media_type(content_type), len(body) <= SPOT_BYTES, contract.max_batch_size
        if kind == images.TENSOR:
            if not images.is_list(body):
                return await self._worked(spot, images.tensor, body, contract), Sent()
            files = await self._worked(spot, images.listed_files, body, most)
            return await self._each(exchange, files, contract, wish)
        if kind == images.FORM:
            files = await self._worked(spot, images.form_files, body, content_type, most)
            if len(files) > 1:
                return await self._each(exchange, files, contract, wish)
            body, kind = files[0].data or b"", files[0].kind
        return await self._image(body, kind, contract, wish), Sent(single=True)

    async def _each(
        self, exchange: Exchange, files: list[images.File], contract: Contract, wish: Wish
    ) -> tuple[Batch, Sent]:
        """The images of a list; one that the model cannot see has its problem, and stops no other."""
        exchange.sent, found, problems = len(files), [], list[Problem | None]()
        for file in files:
            await asyncio.sleep(0)  # others have their turn between two images
            try:
                if file.data is None:
                    raise Problem("bad_image", "image: is no base64")
                found.append(await self._image(file.data, file.kind, contract, wish))
                problems.append(None)
            except Problem as problem:
                if problem.status >= 500:  # ours, and no fault of the image
                    raise
                self._unseen(problem.reason)
                problems.append(problem)
        batch = np.concatenate(found) if found else np.empty((0, *contract.input_shape), np.uint8)
        return batch, Sent(problems=tuple(problems))

    async def _image(self, data: bytes, kind: str, contract: Contract, wish: Wish) -> Batch:
        """An image file as (1, H, W, C). kind: its content type."""
        if kind not in images.FORMATS and kind not in images.UNTOLD:
            raise Problem("unsupported_type", f"Content-Type: expected none, or one of {', '.join(images.TYPES)}")
        spot = len(data) <= SPOT_BYTES
        image = await self._worked(spot, images.open_image, data, kind, self._pixels)
        if not wish.resize:
            images.require_size(image, contract)
        spot = spot and image.width * image.height <= SPOT_PIXELS
        pixels: Batch = await self._worked(spot, images.pixels, image, contract, resize=wish.resize)
        return pixels

    async def _worked(self, spot: bool, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The result of some work on a stranger's bytes."""
        if spot:
            return work(*arguments, **options)
        call = functools.partial(work, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
