"""What a watch is told, as TOML (deploy/watch.toml is a complete example): defaults are the values below.

Relative paths are relative to the file they stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from dfmcl.common.errors import BadInput
from dfmcl.common.toml import EachOnce, LocalPath, Section, Seed, TritonUrl, anchored, read_toml, validated
from dfmcl.monitoring.probes import query_attack
from dfmcl.monitoring.threatened import Threatened
from dfmcl.release.stores.registry import why_unknown
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.sources import DataSource
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.radius import Norm, Radius
from dfmcl.robustness.threats.registry import threat_of

WEEK_SECONDS = 7 * 24 * 3600.0


def _is_http(url: str) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise ValueError("write a URL that begins with http:// or https://")
    return url


def _is(parse: Callable[[str], Any]) -> Callable[[str], str]:
    def check(name: str) -> str:
        try:
            parse(name)
        except BadInput as error:
            raise ValueError(str(error)) from None
        return name

    return check


AttackNames = Annotated[list[Annotated[str, AfterValidator(_is(Attack.parse_transfer))]], EachOnce]


def _are_different(texts: list[str]) -> list[str]:
    names = [Threatened.parse(text).name for text in texts]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"{twice} stands there twice; leave one out")
    return texts


Threats = Annotated[list[Annotated[str, AfterValidator(_is(Threatened.parse))]], AfterValidator(_are_different)]


def _is_store(address: str) -> str:
    if why := why_unknown(address):
        raise ValueError(why)
    return address


Url = Annotated[str, AfterValidator(_is_http)]
Seconds = Annotated[float, Field(gt=0, le=WEEK_SECONDS, allow_inf_nan=False)]


class Target(Section):
    """What is attacked. `timeout_seconds` is the deadline of each request."""

    url: TritonUrl = "127.0.0.1:8001"
    model: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")  # what promotion allows; it becomes a label
    timeout_seconds: float = Field(5.0, gt=0, le=600, allow_inf_nan=False)


class BallSection(Section):
    """How far an adversarial image may be from its original; on the wire eps is rounded down to whole 255ths."""

    norm: Norm = "linf"
    eps: Radius

    @property
    def threat(self) -> Ball:
        """The ball on the uint8 grid."""
        return threat_of(self.norm, self.eps).on_grid()


class Probe(Section):
    """How often, how many fresh images and replayed ones, which attacks, and the seed of both images and attacks.

    threats: of other kinds than the ball, such as `fog@3`, `corruptions`, `rotation:15` or `patch:2%`, each asked with
    one image more for each fresh one. While the file `pause_file` exists, nothing is asked. threads: of crafting.
    crafted: what `dfmcl craft` wrote, so that rounds craft nothing.
    """

    interval_seconds: Seconds = 60.0
    images: int = Field(32, ge=1)
    replay: int = Field(16, ge=0)
    attacks: AttackNames = Field(["mi-fgsm-10", "di-fgsm-10"], min_length=1)
    threats: Threats = Field([])
    seed: Seed = 0
    threads: int = Field(1, ge=1)
    crafted: LocalPath = ""
    pause_file: LocalPath = ""


class QuerySection(Section):
    """Search by queries through the gateway, every so many rounds; without a gateway there is none.

    key_file: holds the API key of the canary that attacks, which for scores must see logits; clean_key_file: of the one
    that asks about clean images (default: the same). ca: who is believed where the gateway speaks HTTPS.
    """

    gateway: Url = ""
    key_file: LocalPath = ""
    clean_key_file: LocalPath = ""
    ca: LocalPath = ""
    attack: Annotated[str, AfterValidator(_is(query_attack))] = "square-100"
    images: int = Field(8, ge=1)
    every: int = Field(5, ge=1)
    timeout_seconds: float = Field(5.0, gt=0, le=600, allow_inf_nan=False)


class BudgetSection(Section):
    """What probing may cost: images in a window, and the share of time in which its requests may be under way."""

    images: int = Field(20_000, ge=1)
    window_seconds: Seconds = 3600.0
    duty: float = Field(0.1, gt=0, le=1)


class Abort(Section):
    """A round ends when answers take so many times as long as usual."""

    latency_factor: float = Field(5.0, ge=1.5, allow_inf_nan=False)


class SurrogatesSection(Section):
    """Run directories of models that were trained apart from the served one."""

    runs: Annotated[list[LocalPath], Field(min_length=1), EachOnce]


class ReleaseSection(Section):
    """The gate's evidence for what is served; without it nothing stands beside the live figures.

    repository: what promotion writes, a path or an address such as s3://bucket/models; the version that answers is
    looked up there, and with trust (a trust file) its signature is verified. evidence: one directory of the gate's, for
    whatever answers. tolerance: of a replayed logit, as a share of the largest one; a GPU with TF32 or TensorRT needs
    more than a CPU.
    """

    repository: Annotated[str, AfterValidator(_is_store)] = ""
    evidence: LocalPath = ""
    trust: LocalPath = ""
    tolerance: float = Field(1e-3, gt=0, le=1)

    @model_validator(mode="after")
    def _one_place(self) -> ReleaseSection:
        if self.repository and self.evidence:
            raise ValueError("name repository or evidence, not both")
        if self.trust and not self.repository:
            raise ValueError("trust needs repository: a signature is about promoted files")
        return self


class RecordSection(Section):
    """Where finished rounds are written down, one JSON line each, and read again at the next start; "" for nowhere."""

    path: LocalPath = ""
    max_bytes: int = Field(64_000_000, ge=100_000)


class MitigationSection(Section):
    """What is done once when a loss is proven for a version: a POST of JSON, a command; by default nothing."""

    webhook: Url = ""
    command: list[str] = Field(default=[])
    timeout_seconds: float = Field(30.0, gt=0, le=600, allow_inf_nan=False)


class ListenSection(Section):
    """Where /metrics is; port 0 means any free one. runbooks: URL of the folder where docs/runbooks is published, as in
    the rules' runbook_url; the page links there, and without it only names the runbook."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(9464, ge=0, le=65535)
    runbooks: Url = ""


class WatchConfig(Section):
    """A whole watch."""

    target: Target
    data: DataSource
    threat: BallSection
    probe: Probe = Probe()
    query: QuerySection = QuerySection()
    budget: BudgetSection = BudgetSection()
    abort: Abort = Abort()
    surrogates: SurrogatesSection
    release: ReleaseSection = ReleaseSection()
    record: RecordSection = RecordSection()
    mitigation: MitigationSection = MitigationSection()
    listen: ListenSection = ListenSection()


def load_config(path: Path | str) -> WatchConfig:
    """A watch from a TOML file, its paths made independent of the working directory. BadInput names file and key."""
    path = Path(path)
    config = validated(WatchConfig, read_toml(path, "name a TOML file such as deploy/watch.toml"), str(path))
    if config.threat.threat.eps == 0:
        raise BadInput(f"{path}: threat.eps: {config.threat.eps} is below one grey level; bytes need at least 1/255")
    if config.threat.norm not in Attack.parse(config.query.attack).kind.threats:
        raise BadInput(f"{path}: query.attack: {config.query.attack} knows Linf only; take square")
    return _anchored(config, path.parent)


PATHS = {
    "data": ("path",),
    "probe": ("crafted", "pause_file"),
    "query": ("key_file", "clean_key_file", "ca"),
    "release": ("repository", "evidence", "trust"),
    "record": ("path",),
}


def _anchored(config: WatchConfig, folder: Path) -> WatchConfig:
    """The same config with every path that is set joined to `folder` (absolute ones stay as they are)."""
    surrogates = SurrogatesSection(runs=[run and str(folder / run) for run in config.surrogates.runs])
    sections = {name: anchored(getattr(config, name), folder, *keys) for name, keys in PATHS.items()}
    return config.model_copy(update={**sections, "surrogates": surrogates})
