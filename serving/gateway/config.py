"""What a gateway is told, as TOML (deploy/gateway.toml is a complete example): defaults are the values below.

Relative paths are relative to the file they stand in.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dfmcl.common.errors import BadInput
from dfmcl.common.text import scheme_of
from dfmcl.common.toml import EachOnce, LocalPath, Section, TritonUrl, anchored, read_toml
from dfmcl.release.layout import MODEL_NAME
from dfmcl.serving.detection.fingerprints import DETECTORS, DetectorName
from dfmcl.serving.gateway.api_keys import Bucket, Caller, Keyring, digest_of, make_key


def _is_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if address and (not host or not port.isdecimal() or not int(port) < 65536):
        raise ValueError("write host:port, such as 127.0.0.1:9465, or leave it out")
    return address


def _is_network(text: str) -> str:
    ipaddress.ip_network(text)  # ValueError says what is wrong
    return text


def _is_origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != text):
        raise ValueError("write an origin such as https://shop.example, without a path, or *")
    return text


Network = Annotated[str, AfterValidator(_is_network)]
Origin = Annotated[str, AfterValidator(_is_origin)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Horizon = Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False)]
Pause = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class ListenSection(Section):
    """Where the gateway is. With tls_certificate and tls_key (PEM files) it speaks HTTPS, and with tls_client_ca it
    asks clients for a certificate too. admin is a second address, for probes and Prometheus, which strangers cannot
    fill: /healthz, /readyz and, then only there, /metrics, over plain HTTP and without keys. root_path is the path that
    a reverse proxy has before all of ours; it may take it off or leave it on. A client's address is its connection's;
    of one from `proxies` (addresses, or networks such as 10.0.0.0/8) the last in X-Forwarded-For that is none of them.
    After SIGTERM it says at
    /readyz that it is going, answers for notice_seconds more, until load balancers have seen that, and then finishes
    what it has begun within drain_seconds."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8080, ge=0, le=65535)  # 0 means any free one
    tls_certificate: LocalPath = ""
    tls_key: LocalPath = ""
    tls_client_ca: LocalPath = ""
    admin: Annotated[str, AfterValidator(_is_address)] = ""  # host:port; port 0 means any free one
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    proxies: Annotated[list[Network], EachOnce] = Field(default=[])
    public_metrics: bool = True  # else /metrics asks for an API key too; without `admin`
    notice_seconds: Pause = 5.0
    drain_seconds: Pause = 20.0

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ListenSection:
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_key):
            raise ValueError("tls_certificate and tls_key go together, and tls_client_ca needs both")
        return self


class Tritons(Section):
    """Who computes. With tls, gRPC is encrypted: tls_ca names who is believed (default: the system's authorities),
    tls_certificate and tls_key are shown to a Triton that asks. An endpoint that nobody asks is asked for one
    inference every check_seconds."""

    endpoints: Annotated[list[TritonUrl], Field(min_length=1), EachOnce]
    model: str = Field(pattern=f"^{MODEL_NAME.pattern}$")
    tls: bool = False
    tls_ca: LocalPath = ""
    tls_certificate: LocalPath = ""
    tls_key: LocalPath = ""
    check_seconds: Seconds = 5.0

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Tritons:
        if not self.tls and (self.tls_ca or self.tls_certificate or self.tls_key):
            raise ValueError("tls_ca, tls_certificate and tls_key need tls = true")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("tls_certificate and tls_key go together")
        return self


class LimitsSection(Section):
    """What a request may cost. One key holds at most eight times as many places of `concurrency` as are free.
    timeout_ms holds where a request names no X-Request-Timeout-Ms, which may go up to max_timeout_ms. Bodies need up to
    concurrency * body_bytes of memory, and each decoder up to 8 bytes a pixel, or for JSON three times the body."""

    body_bytes: int = Field(4_000_000, ge=1)
    pixels: int = Field(16_000_000, ge=1)  # of an image before it is resized
    read_seconds: Seconds = 10.0  # for the headers, and again for the body
    timeout_ms: int = Field(2_000, ge=1)
    max_timeout_ms: int = Field(10_000, ge=1, le=600_000)
    concurrency: int = Field(64, ge=1)  # requests at work at the same time
    decoders: int = Field(2, ge=1)  # threads for large bodies; more than cores are of no use
    connections: int = Field(1_000, ge=1)

    @model_validator(mode="after")
    def _default_is_allowed(self) -> LimitsSection:
        if self.timeout_ms > self.max_timeout_ms:
            raise ValueError(f"timeout_ms is {self.timeout_ms}, above max_timeout_ms {self.max_timeout_ms}")
        return self


class CrossOrigin(Section):
    """Origins whose pages may ask this gateway from a browser (CORS): none, unless they are named; "*" is all
    of them. Keys go in headers, never in cookies."""

    origins: Annotated[list[Origin], EachOnce] = Field(default=[])
    max_age_seconds: int = Field(600, ge=0, le=86_400)  # for which a browser remembers that it may


class ReleaseRecord(Section):
    """Where the gate's record of the served version is, for the page and /v1/model: the repository that promotion
    writes. With trust, a trust file, a key of it must have signed; else the signature is called unchecked."""

    repository: str = ""
    trust: LocalPath = ""

    @model_validator(mode="after")
    def _trust_is_of_something(self) -> ReleaseRecord:
        if self.trust and not self.repository:
            raise ValueError("trust needs repository")
        return self


class Answers(Section):
    """How much an answer tells: so many classes, best first, with so many decimals of their probability."""

    top: int = Field(5, ge=1)
    decimals: int = Field(4, ge=0, le=8)


def _is_web(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("write a URL that begins with http:// or https://")
    return url


class Detection(Section):
    """Attacks by queries, noticed: of each key the last `queries` different images are remembered for `seconds`, and of
    so many keys, the ones that asked last: up to keys * queries * 190 bytes. `matches` near-duplicates among them are a
    campaign, which ends when there was none for quiet_seconds. Up to `queue` images wait to be looked at.

    Answers stay as they are unless throttle_images_per_second is above 0: then a key with a campaign may send only so
    many, until throttle_seconds after its last match. A webhook gets each campaign as JSON, within webhook_seconds."""

    enabled: bool = True
    detectors: Annotated[list[DetectorName], Field(min_length=1), EachOnce] = Field(default=list(DETECTORS))
    queries: int = Field(2_000, ge=2, le=100_000)
    seconds: Horizon = 3600.0
    keys: int = Field(64, ge=1)
    matches: int = Field(50, ge=1)
    quiet_seconds: Horizon = 300.0
    queue: int = Field(256, ge=1)
    throttle_images_per_second: float = Field(0.0, ge=0, allow_inf_nan=False)
    throttle_seconds: Horizon = 600.0
    webhook: Annotated[str, AfterValidator(_is_web)] = ""
    webhook_seconds: Seconds = 5.0

    @model_validator(mode="after")
    def _campaign_can_begin(self) -> Detection:
        if self.matches >= self.queries:
            raise ValueError(f"matches is {self.matches}, must be below queries, {self.queries}")
        return self


class Key(Section):
    """An API key, as `dfmcl apikey` makes one. images_per_second: in the long run; burst_images: at once, but for a
    request that holds more: it passes, and the next one waits until it is paid for. detect: whether its images are
    looked at for attacks. A canary's are only where `probe` says what it sends: "benign", images that are all
    different, or "attack"."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")  # it stands in logs
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    logits: bool = False
    canary: bool = False
    detect: bool = True
    probe: Literal["", "benign", "attack"] = ""
    images_per_second: float = Field(10.0, gt=0, allow_inf_nan=False)
    burst_images: int = Field(64, ge=1)

    @property
    def limits(self) -> tuple[float, int]:
        """Images a second, and at once."""
        return self.images_per_second, self.burst_images

    @model_validator(mode="after")
    def _probe_is_a_canary(self) -> Key:
        if self.probe and not (self.canary and self.detect):
            raise ValueError(f"probe = {self.probe!r} needs canary = true, and detect")
        return self


class GatewayConfig(Section):
    """A whole gateway. open: anyone may ask, without a key; else at least one [[keys]] is needed."""

    open: bool = False
    listen: ListenSection = ListenSection()
    triton: Tritons
    limits: LimitsSection = LimitsSection()
    answers: Answers = Answers()
    release: ReleaseRecord = ReleaseRecord()
    cors: CrossOrigin = CrossOrigin()
    detection: Detection = Detection()
    keys: list[Key] = Field(default=[])

    @model_validator(mode="after")
    def _door_is_decided(self) -> GatewayConfig:
        if self.open == bool(self.keys):
            raise ValueError("either list [[keys]] (`dfmcl apikey NAME` makes one), or write open = true, not both")
        if any(len({getattr(key, part) for key in self.keys}) < len(self.keys) for part in ("name", "sha256")):
            raise ValueError("two [[keys]] have the same name or the same sha256")
        if self.open and self.detection.throttle_images_per_second:
            setting = "detection.throttle_images_per_second"
            raise ValueError(f"{setting} needs [[keys]]: with open = true there is nobody to slow down")
        return self

    def keyring(self, before: GatewayConfig | None = None, keyring: Keyring | None = None) -> Keyring:
        """The keys, with full buckets; with those of the keyring before, where a key and its limits stayed the same."""
        kept = {(key.sha256, *key.limits) for key in before.keys} if before else set()
        callers = []
        for key in self.keys:
            bucket = keyring.bucket(key.sha256) if keyring and (key.sha256, *key.limits) in kept else None
            bucket = bucket or Bucket(*key.limits)
            callers.append((key.sha256, Caller(key.name, key.logits, key.canary, key.detect, key.probe, bucket)))
        return Keyring(callers, open_to_all=self.open)


def new_key(name: str) -> tuple[str, str]:
    """A random key, and the TOML table that lets it in; BadInput for a name that no table may have."""
    secret = make_key()
    try:
        key = Key(name=name, sha256=digest_of(secret))
    except ValidationError as error:
        raise BadInput(f"NAME {_first_complaint(error)}") from None
    values = key.model_dump().items()  # JSON's strings, numbers and booleans are TOML's too
    return secret, "\n".join(["[[keys]]", *(f"{field} = {json.dumps(value)}" for field, value in values)])


def load_config(path: Path | str) -> GatewayConfig:
    """A gateway from a TOML file, its paths made independent of the working directory. BadInput names file and key."""
    path = Path(path)
    try:
        config = GatewayConfig.model_validate(read_toml(path, "name a TOML file such as deploy/gateway.toml"))
    except ValidationError as error:
        raise BadInput(f"{path}: {_first_complaint(error)}") from None
    return config.model_copy(
        update={
            "listen": anchored(config.listen, path.parent, "tls_certificate", "tls_key", "tls_client_ca"),
            "triton": anchored(config.triton, path.parent, "tls_ca", "tls_certificate", "tls_key"),
            "release": anchored(config.release, path.parent, *_local(config.release)),
        }
    )


def _local(release: ReleaseRecord) -> tuple[str, ...]:
    return ("trust",) if scheme_of(release.repository) else ("repository", "trust")


def _first_complaint(error: ValidationError) -> str:
    """One line: the key, and what is wrong with it. Values are left out: one of them may be a key by mistake."""
    first = error.errors(include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; see deploy/gateway.toml for the known ones"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
