"""Where a release lies in an OCI registry: oci://HOST/NAME, with a tag or the digest of its manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dfmcl.common.errors import BadInput

SCHEME = "oci://"
DIGEST = r"sha256:[0-9a-f]{64}"
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_FORM = re.compile(
    rf"{SCHEME}(?P<host>(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-f:]+\])(?::[0-9]{{1,5}})?)/(?P<name>{_PART}(?:/{_PART})*)"
    rf"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?(?:@(?P<digest>{DIGEST}))?"
)
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")


@dataclass(frozen=True)
class Reference:
    """host: with its port, if one is named; name: of the repository there; tag, digest: "" where there is none."""

    host: str
    name: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"{SCHEME}{self.host}/{self.name}{tag}{digest}"

    @property
    def is_loopback(self) -> bool:
        """Whether its registry is one of this machine."""
        return _LOOPBACK.fullmatch(self.host) is not None

    def pinned(self, digest: str) -> Reference:
        """The same place, by the digest of a manifest."""
        return replace(self, tag="", digest=digest)


def parse_reference(text: str) -> Reference:
    """The inverse of `str`; BadInput for another form."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise BadInput(f"{text}: write {SCHEME}HOST/NAME:TAG or {SCHEME}HOST/NAME@sha256:DIGEST, NAME in lower case")
    return Reference(**{key: value or "" for key, value in found.groupdict().items()})
