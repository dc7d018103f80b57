"""The pages that are shown: the gate's report about the shipped model, and the sidecar's page while it watches.

`shows` of each is a digest of what can be seen; a picture with another one is out of date.
"""

from __future__ import annotations

import ast
import hashlib
import json
import queue
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from benchmarks.endurance import MODEL, REPOSITORY, ROOT, served
from dfmcl.gating.formats.html import html
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.probes_file import read_probes
from dfmcl.monitoring import sidecar
from dfmcl.monitoring.config import WatchConfig, load_config

RELEASE = REPOSITORY / MODEL / "1"
SURROGATES = sorted((REPOSITORY / MODEL / "surrogates").iterdir())
PAGE = ROOT / "monitoring" / "page.py"
POOL, ROUNDS = 128, 30  # of the gate's thousand images; crafting them takes two minutes, asking about them seconds
WATCH = """
[target]
url = "{grpc}"
model = "{model}"
timeout_seconds = 60.0
[data]
name = "npz"
path = "pool.npz"
[threat]
eps = "8/255"
[probe]
interval_seconds = 1.0
images = 32
attacks = ["mi-fgsm-10", "di-fgsm-10"]
[budget]
images = 1000000
duty = 1.0
[abort]
latency_factor = 1000.0
[surrogates]
runs = {runs}
[release]
repository = "{repository}"
trust = "{trust}"
[listen]
port = 0
"""


def report(folder: Path) -> dict[str, str]:
    """The page that `dfmcl gate` wrote about the shipped model, as it is written now; folder: not needed."""
    return {"well": html(read_report(RELEASE / "report.json")[0], read_probes(RELEASE / "probes.npz"))}


def report_shows() -> str:
    """Of the page without its images, which an encoder may write otherwise, and of these as they are published."""
    words = re.sub(r"data:image/png;base64,[\w+/=]+", "", report(Path())["well"])
    return _digest(words.encode(), (RELEASE / "probes.npz").read_bytes())


def watch(folder: Path) -> dict[str, str]:
    """The sidecar's page after ROUNDS rounds, the shipped model behind a real Triton: `well`; and `failure`, once that
    Triton is gone. folder: empty, for its files."""
    probes = read_probes(RELEASE / "probes.npz")
    images, labels = probes["images"][:POOL], probes["labels"][:POOL]
    classes = (RELEASE / "labels.txt").read_text(encoding="utf-8").splitlines()
    np.savez(folder / "pool.npz", x_train=images[:1], y_train=labels[:1], x_test=images, y_test=labels, classes=classes)
    with ExitStack() as triton:
        grpc = triton.enter_context(served(folder))
        runs, trust = json.dumps([str(path) for path in SURROGATES]), ROOT / "deploy" / MODEL / "trust.toml"
        told = WATCH.format(grpc=grpc, model=MODEL, runs=runs, repository=REPOSITORY, trust=trust)
        (folder / "watch.toml").write_text(told, encoding="utf-8")
        return _watched(load_config(folder / "watch.toml"), triton)


def _watched(config: WatchConfig, triton: ExitStack) -> dict[str, str]:
    """The pages of a watch in this process, which has no users to give way to as `dfmcl watch` would."""
    stop, said = threading.Event(), queue.SimpleQueue[str]()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(sidecar.watch, config, stop=stop, log=said.put)
        try:
            lines = _lines(said, ended)
            url = next(found for line in lines if (found := line.partition("metrics at ")[2].removesuffix("metrics")))
            for _ in range(ROUNDS):
                next(line for line in lines if " images, clean " in line)
            well = _read(url)
            triton.close()
            next(line for line in lines if ": failed (unavailable)" in line)
            return {"well": well, "failure": _read(url)}
        finally:
            stop.set()
            ended.result()


def _lines(said: queue.SimpleQueue[str], ended: Future[int]) -> Iterator[str]:
    """What a watch says, for as long as it runs."""
    while not ended.done():
        with suppress(queue.Empty):
            line = said.get(timeout=1)
            print(line, flush=True)
            yield line
    raise SystemExit(f"the watch ended: {ended.exception()}")


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def watch_shows() -> str:
    """Of the page's words and styles, of the watch that is made for the picture, of its target and its questions."""
    shown = (RELEASE / "report.json", *(path / "manifest.json" for path in SURROGATES))
    written = words(PAGE.read_text(encoding="utf-8"))
    return _digest(written.encode(), f"{WATCH} {POOL} {ROUNDS}".encode(), *(path.read_bytes() for path in shown))


def words(program: str) -> str:
    """Every constant of a Python program that is no docstring: the words it writes, not their explanation."""
    found = [
        repr(child.value)
        for node in ast.walk(ast.parse(program))
        for child in ast.iter_child_nodes(node)
        if isinstance(child, ast.Constant) and not isinstance(node, ast.Expr)
    ]
    return "\n".join(sorted(found))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
