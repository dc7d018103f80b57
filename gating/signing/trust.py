"""The trust file: whose signature lets a model pass, how many of them, by which policies and for how long (TOML)."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dfmcl.common.errors import BadInput
from dfmcl.common.providers import PROVIDERS
from dfmcl.common.toml import Days, Section, read_toml, validated
from dfmcl.gating.policy import load_policy
from dfmcl.gating.signing.attestation import NEEDS, Trust
from dfmcl.gating.signing.keys import read_public
from dfmcl.gating.signing.model_signature import can_sign_models
from dfmcl.gating.signing.signer import PublicKey


class TrustFile(Section):
    """Paths are relative to the file. keys: public ones, whose attestation is asked for; list old and new while they
    rotate. model_keys: those of which one must have signed model.sig (ECDSA). At least one of the two lists.

    policies: files or SHA-256 digests of those that may let a model pass; without it any may. data: SHA-256 of the data
    sets that may be judged on, as reports give it; without it any may. drawn: whether one of the keys must have drawn
    the order of the images, so that an author cannot try files until an order flatters one. providers: execution
    providers that may decide; without it any may.
    """

    threshold: int = Field(1, ge=1)
    keys: list[str] | None = Field(None, min_length=1)
    model_keys: list[str] | None = Field(None, min_length=1)
    policies: list[str] | None = Field(None, min_length=1)
    max_age_days: Days | None = None
    drawn: bool = False
    providers: list[Annotated[str, Field(pattern=f"^({'|'.join(PROVIDERS)})$")]] | None = Field(None, min_length=1)
    data: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] | None = Field(None, min_length=1)


def load_trust(path: Path) -> Trust:
    """A trust file with the keys and policies it names; BadInput names the file and what is wrong."""
    parsed = validated(TrustFile, read_toml(path, "name a trust file (TOML)"), str(path))
    keys, model_keys = _keys(path, parsed.keys), _keys(path, parsed.model_keys)
    if not keys and not model_keys:
        raise BadInput(
            f"{path}: trusts nobody; list keys, whose attestation counts, or model_keys, whose model.sig does"
        )
    if not keys and (parsed.threshold > 1 or parsed.drawn):
        raise BadInput(
            f"{path}: {'drawn' if parsed.drawn else 'threshold'} is about keys, and none is listed; list some"
        )
    if other := [key for key in model_keys.values() if not can_sign_models(key)]:
        raise BadInput(f"{path}: model_keys: key {other[0].keyid[:12]} is {other[0].scheme}; model.sig {NEEDS}")
    if keys and len(keys) < parsed.threshold:
        raise BadInput(f"{path}: threshold is {parsed.threshold}, but {len(keys)} different keys are listed; list more")
    return Trust(
        keys=tuple(keys.values()),
        model_keys=tuple(model_keys.values()),
        threshold=parsed.threshold,
        policies=None if parsed.policies is None else frozenset(_digest(path, name) for name in parsed.policies),
        data=None if parsed.data is None else frozenset(parsed.data),
        drawn=parsed.drawn,
        providers=None if parsed.providers is None else frozenset(parsed.providers),
        max_age=None if parsed.max_age_days is None else timedelta(days=parsed.max_age_days),
    )


def follow_trust(path: Path, say: Callable[[str], None]) -> Callable[[], Trust]:
    """What a trust file says whenever it is asked, read anew with its keys and policies: a few tenths of a millisecond.

    Keys are revoked by what a file says, not by its absence: while it cannot be read, its last content holds, and
    `say` is told once. BadInput where it cannot be read now.
    """
    last, trouble = load_trust(path), ""

    def now() -> Trust:
        nonlocal last, trouble
        try:
            last, found = load_trust(path), ""
        except BadInput as error:
            found = str(error)
        if found and found != trouble:
            say(f"{found}; until it can be read, what the trust file said before holds")
        elif trouble and not found:
            say(f"{path}: can be read again")
        trouble = found
        return last

    return now


def _keys(trust: Path, names: list[str] | None) -> dict[str, PublicKey]:
    return {key.keyid: key for key in (read_public(trust.parent / name) for name in names or ())}


def _digest(trust: Path, policy: str) -> str:
    return policy if re.fullmatch(r"[0-9a-f]{64}", policy) else load_policy(trust.parent / policy).digest
