"""What a watch is told, as TOML (deploy/watch.toml is a complete example): defaults are the values below.

Relative paths are relative to the file they stand in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from monitoring.probes import transfer_attack
from robustness.config import Radius, Section, read_toml, validated
from robustness.errors import BadInput
from robustness.threat import Threat

WEEK_SECONDS = 7 * 24 * 3600.0


def _is_endpoint(url: str) -> str:
    host, _, port = url.rpartition(":")
    if not host or "/" in url or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("write host:port of Triton's gRPC endpoint, such as 127.0.0.1:8001")
    return url


def _is_attack(name: str) -> str:
    try:
        transfer_attack(name)
    except BadInput as error:
        raise ValueError(str(error)) from None
    return name


def _is_set(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError("names something twice")
    return names


AttackNames = Annotated[list[Annotated[str, AfterValidator(_is_attack)]], AfterValidator(_is_set)]


class Target(Section):
    """What is attacked. `timeout_seconds` is the deadline of each request."""

    url: Annotated[str, AfterValidator(_is_endpoint)] = "127.0.0.1:8001"
    model: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")  # what promotion allows; it becomes a label
    timeout_seconds: float = Field(5.0, gt=0, le=600, allow_inf_nan=False)


class Data(Section):
    """Where the images come from: the test part of a data set."""

    name: Literal["digits", "cifar10", "npz", "folder"]
    path: str = ""
    image_size: int = Field(0, ge=0)


class Ball(Section):
    """How far an adversarial image may be from its original; on the wire eps is rounded down to whole 255ths."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Radius

    @property
    def threat(self) -> Threat:
        """The ball on the uint8 grid."""
        return Threat.parse(self.norm, self.eps).on_grid()


class Probe(Section):
    """How often, how many images, which attacks, and the seed of both images and attacks."""

    interval_seconds: float = Field(300.0, gt=0, le=WEEK_SECONDS, allow_inf_nan=False)
    images: int = Field(64, ge=1)
    attacks: AttackNames = Field(["mi-fgsm-10", "pgd-10"], min_length=1)
    seed: int = Field(0, ge=0)


class Surrogates(Section):
    """Run directories of models that were trained apart from the served one."""

    runs: Annotated[list[str], Field(min_length=1), AfterValidator(_is_set)]


class Release(Section):
    """The gate's evidence for what is served; without it no gate figures are exported."""

    evidence: str = ""


class Listen(Section):
    """Where /metrics is; port 0 means any free one."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(9464, ge=0, le=65535)


class WatchConfig(Section):
    """A whole watch."""

    target: Target
    data: Data
    threat: Ball
    probe: Probe = Probe()
    surrogates: Surrogates
    release: Release = Release()
    listen: Listen = Listen()


def load_config(path: Path | str) -> WatchConfig:
    """A watch from a TOML file, its paths made independent of the working directory. BadInput names file and key."""
    path = Path(path)
    config = validated(WatchConfig, read_toml(path, "name a TOML file such as deploy/watch.toml"), str(path))
    if config.threat.norm == "linf" and config.threat.threat.eps == 0:
        raise BadInput(f"{path}: threat.eps: {config.threat.eps} is below one grey level; bytes need at least 1/255")
    return _anchored(config, path.parent)


def _anchored(config: WatchConfig, folder: Path) -> WatchConfig:
    """The same config with every path that is set joined to `folder` (absolute ones stay as they are)."""

    def join(text: str) -> str:
        return str(folder / text) if text else ""

    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"path": join(config.data.path)}),
            "surrogates": Surrogates(runs=[join(run) for run in config.surrogates.runs]),
            "release": Release(evidence=join(config.release.evidence)),
        }
    )
