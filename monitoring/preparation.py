"""A watch before its first round: surrogates, plan, clients, evidence and record, refused where they do not fit."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from dfmcl.common.errors import BadInput
from dfmcl.common.progress import Track, silent
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain, why_unread
from dfmcl.gating.signing.trust import follow_trust
from dfmcl.monitoring import mitigation, releases
from dfmcl.monitoring.asker import Stopped
from dfmcl.monitoring.config import QuerySection, WatchConfig
from dfmcl.monitoring.crafted import Crafted, Recipe, load_crafted, prepared_scenes
from dfmcl.monitoring.crafting import Crafter, Pace, require_fit, scenes
from dfmcl.monitoring.probes import query_attack
from dfmcl.monitoring.releases import REPORT, Find
from dfmcl.monitoring.results import GATEWAY, TRITON
from dfmcl.monitoring.round_log import RoundLog
from dfmcl.monitoring.rounds import RoundPlan
from dfmcl.monitoring.snapshot import AttackInfo, Identity
from dfmcl.monitoring.surrogates import Surrogates
from dfmcl.monitoring.threatened import Threatened, threat_of
from dfmcl.release.stores.registry import store_of
from dfmcl.release.stores.store import told
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.provenance import revision, versions
from dfmcl.serving.clients.gateway import GatewayClient

A = TypeVar("A")
R = TypeVar("R")
# Of an interval, in which the next round's images are made; more than a minute of spreading gains nothing.
SPREAD, SPREAD_SECONDS = 0.7, 60.0


def unless_stopped(function: Callable[[A], R], stop: threading.Event) -> Callable[[A], R]:
    """The same function, which raises Stopped once `stop` is set: crafting ends within one forward pass."""

    def guarded(argument: A) -> R:
        if stop.is_set():
            raise Stopped
        return function(argument)

    return guarded


def say(line: str) -> None:
    """Print at once, because what is piped would wait for a full buffer otherwise."""
    print(line, flush=True)


@dataclass(frozen=True)
class Preparation:
    """What a watch prepares once. direct, outside: plans of rounds through Triton and through the gateway.

    prepared: the pool's adversarial images by attack, where they were crafted before.
    """

    recipe: Recipe
    direct: RoundPlan
    outside: RoundPlan | None
    keys: tuple[str, str]
    prepared: Mapping[str, Crafted] | None
    find: Find


def prepare(config: WatchConfig, track: Track = silent) -> Preparation:
    """Data, surrogates, keys and evidence of a watch; BadInput for what cannot be used."""
    recipe = Recipe.of(config, track)
    pool = recipe.pool
    require_fit(pool, config.probe.images, "probe.images")
    require_fit(pool, config.query.images, "query.images")
    height, width, channels = pool.images.shape[1:]
    for attack in recipe.attacks:
        threat_of(attack, recipe.threat).fits((channels, height, width))
    direct = RoundPlan(
        model=config.target.model,
        classes=pool.classes,
        threat=recipe.threat,
        attacks=recipe.attacks,
        images=config.probe.images,
        replay=config.probe.replay,
        tolerance=config.release.tolerance,
    )
    attack = query_attack(config.query.attack)
    outside = replace(direct, attacks=(attack,), images=config.query.images, replay=0) if config.query.gateway else None
    for plan, what in ((direct, "probe"), (outside, "query")):
        if plan is not None and plan.cost > config.budget.images:
            raise BadInput(f"budget.images is {config.budget.images}, a {what} round may need {plan.cost}; raise it")
    key = _key(config.query.key_file)
    keys = key, _key(config.query.clean_key_file) or key
    if outside is not None:
        try:
            gateway_clients(config.query, outside, keys)
        except BadInput as error:
            raise BadInput(f"query: {error}") from None
    return Preparation(
        recipe,
        direct,
        outside,
        keys,
        load_crafted(recipe, Path(config.probe.crafted)) if config.probe.crafted else None,
        _find(config, recipe.surrogates),
    )


def gateway_clients(query: QuerySection, plan: RoundPlan, keys: tuple[str, str]) -> tuple[GatewayClient, GatewayClient]:
    """Of the canary that attacks and of the harmless one; BadInput for a URL or an authority that cannot be used."""
    scores = plan.attacks[0].kind.scores
    attacker, harmless = (
        GatewayClient(
            query.gateway,
            plan.model,
            classes=plan.classes,
            key=key,
            logits=logits,
            timeout_seconds=query.timeout_seconds,
            ca=query.ca,
        )
        for key, logits in zip(keys, (scores, False), strict=True)
    )
    return attacker, harmless


def _find(config: WatchConfig, surrogates: Surrogates) -> Find:
    """Where the evidence is looked up; BadInput where a surrogate holds the weights of a release that lies there.

    Of a repository elsewhere the release that answers is looked at: the others would have to be fetched.
    """
    chosen = config.release
    if chosen.evidence:
        attested = releases.read_report(Path(chosen.evidence))
        surrogates.require_apart(attested.checkpoint_sha256, chosen.evidence)
        return releases.always(Path(chosen.evidence))
    if not chosen.repository:
        return releases.nothing
    trust = follow_trust(Path(chosen.trust), say) if chosen.trust else None
    store = store_of(chosen.repository)
    try:
        store.entries(config.target.model)
    except (FileNotFoundError, NotADirectoryError):
        model = store.where(config.target.model)
        raise BadInput(f"release.repository: {model}: no such directory; name what `dfmcl promote` writes") from None
    except OSError as error:
        raise told(error, f"release.repository: {error.filename}: {error.strerror}") from None
    for report in [] if store.whole else sorted(store.local(config.target.model).glob(f"*/{REPORT}")):
        try:
            checkpoint = releases.read_report(report.parent).checkpoint_sha256
        except BadInput:
            continue  # it is said to be invalid when its version answers
        surrogates.require_apart(checkpoint, str(report.parent))
    return releases.follow(store, config.target.model, trust)


def identity_of(config: WatchConfig, work: Preparation) -> Identity:
    intervals = {TRITON: config.probe.interval_seconds}
    if work.outside:
        intervals[GATEWAY] = config.probe.interval_seconds * config.query.every
    plans = [(work.direct, work.recipe.surrogates), *([(work.outside, None)] if work.outside else [])]

    def info(attack: Attack, surrogates: Surrogates | None) -> AttackInfo:
        own = attack.threat if isinstance(attack, Threatened) else None
        used = surrogates if not isinstance(attack, Threatened) or attack.crafted else None
        threat, source = work.direct.threat, used.sha256 if used else ""
        moved = [threat.norm, threat.eps] if own is None else [own.spelling]
        definition = [attack.name, dict(attack.parameters), *moved, source]
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()
        steps = attack.parameters.get("steps", attack.parameters.get("queries", 1))
        named = () if own is None else (own.kind, own.label)
        return AttackInfo(attack.name, steps, used.name if used else "", digest, named)

    attacks = tuple(info(attack, surrogates) for plan, surrogates in plans for attack in plan.attacks)
    return Identity(
        version=versions().get("dfmcl", "unknown"),
        revision=revision() or "unknown",
        model=work.direct.model,
        norm=work.direct.threat.norm,
        epsilon=work.direct.threat.label,
        attacks=attacks,
        surrogates_sha256=work.recipe.surrogates.sha256,
        interval_seconds=intervals,
        labels=work.recipe.labels,
        gated=work.find is not releases.nothing,
        runbooks=config.listen.runbooks,
    )


def record_of(config: WatchConfig, work: Preparation) -> RoundLog | None:
    if not config.record.path:
        return None
    identity = identity_of(config, work)
    about = [config.target.model, *(attack.params_sha256 for attack in identity.attacks), work.recipe.pool.digest]
    plan = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return RoundLog(Path(config.record.path), config.record.max_bytes, plan)


def actions_of(config: WatchConfig) -> dict[str, mitigation.Act]:
    chosen, actions = config.mitigation, {}
    if chosen.webhook:
        actions["webhook"] = mitigation.webhook(chosen.webhook, chosen.timeout_seconds)
    if chosen.command:
        actions["command"] = mitigation.command(chosen.command, chosen.timeout_seconds)
    return actions


def _key(path: str) -> str:
    if not path:
        return ""
    try:
        key = read_plain(Path(path), TEXT_BYTES, named=True).decode("utf-8").strip()
    except UnicodeDecodeError:
        reason = "not text"
    except (OSError, Unfit) as error:
        reason = why_unread(error)
    else:
        if re.fullmatch(r"[!-~]+", key):
            return key
        reason = "not one word"  # an HTTP library would quote it where it complains
    raise BadInput(f"{path}: {reason}; it should hold an API key, as `dfmcl apikey NAME` prints one")


def crafter_of(
    config: WatchConfig, work: Preparation, stop: threading.Event, first: int, rounds: int | None
) -> Crafter:
    """Of the watch's scenes; with a number of rounds it makes none that nobody will ask about.

    config, work: what is crafted, and from what.
    stop: set, it ends within one forward pass.
    first: number of the first round.
    rounds: how many, None without end.
    """
    probe, recipe, left = config.probe, work.recipe, threading.Event()
    drawn = {"seed": probe.seed, "count": probe.images, "first": first}
    if work.prepared is not None:
        made = prepared_scenes(recipe.pool, recipe.threat, work.prepared, **drawn)
    else:
        # Who looks by hand waits for it.
        pace = Pace(min(SPREAD * probe.interval_seconds, SPREAD_SECONDS), left) if rounds is None else None
        source = unless_stopped(recipe.source(), stop)
        made = scenes(recipe.pool, source, recipe.threat, recipe.attacks, **drawn, pace=pace)
    return Crafter(islice(made, rounds), stop, probe.threads, left)
