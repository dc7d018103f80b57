"""The checks of a report from others: each says what follows from its figures, and each that could run did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dfmcl.gating.contradiction import contradiction, difference, require
from dfmcl.gating.record import GateRecord
from dfmcl.gating.roster import absent_checks, is_early
from dfmcl.gating.signing.report import CheckEntry
from dfmcl.robustness.attacks.suites import RELAXED
from dfmcl.robustness.reasons import REASONS

OUTCOMES = {"clear", "raised", "not_run"}
BALL_FREE = "cw-l2"  # this attack looks beyond the ball


def require_checks(record: GateRecord, path: Path, *, remote: bool) -> None:
    """Refuse checks, read from `path`, that contradict themselves, each other or the record.

    remote: whether only answers of a server could be had.
    """
    early, checks = is_early(record.policy), {check.check: check for check in record.checks}
    require(path, "checks: outcomes", sorted({check.outcome for check in record.checks} - OUTCOMES), [])
    names = [check.check for check in record.checks]
    require(path, "checks: absent", absent_checks(names, early=early), [])
    outside = sum(one.outside for one in record.main.attacks if not one.name.startswith(BALL_FREE))
    require(path, "checks: outside_ball", checks["outside_ball"].outcome, "raised" if outside else "clear")
    known = [check for check in record.checks if check.check in REASONS]
    for check in known:
        if not early:  # some spoke otherwise
            reason = REASONS[check.check]
            require(path, f"checks: {check.check}: when", check.when, reason.when)
            require(path, f"checks: {check.check}: do", check.do, reason.do)
        if check.outcome != "not_run":
            _require_outcome(check, path)
    idle = [check for check in known if check.outcome == "not_run"]
    ought = [check.check for check in idle if not _may_idle(check, checks, record, remote)]
    require(path, "checks: not run", ought, [])
    if record.no_gradients is not None:
        ran = [check.check for check in known if check.outcome != "not_run" and _needs_gradients(check)]
        require(path, "checks: run without gradients", ran, [])


def _require_outcome(check: CheckEntry, path: Path) -> None:
    """The outcome, and the chance in the figures, follow from the other figures."""
    rule = REASONS[check.check].rule
    try:
        raised, chance = rule.raised(check.figures), rule.chance(check.figures)
    except KeyError as error:
        raise contradiction(
            path, f"checks: {check.check}: outcome", check.outcome, f"nothing without {error}"
        ) from None
    require(path, f"checks: {check.check}: outcome", check.outcome, "raised" if raised else "clear")
    if chance is not None and (found := difference(check.figures.get("p"), chance, f"checks: {check.check}: p")):
        raise contradiction(path, *found)


def _needs_gradients(check: CheckEntry) -> bool:
    return "gradients" in REASONS[check.check].needs


def _may_idle(check: CheckEntry, checks: Mapping[str, CheckEntry], record: GateRecord, remote: bool) -> bool:
    """Whether a check of this record could have nothing to look at."""
    right = any(record.main.correct[: record.policy.checks.images])
    lacks = {"gradients": record.no_gradients is not None, "images": not right, "record": False}
    if any(lacks[need] for need in REASONS[check.check].needs):
        return True
    match check.check:
        case "gradients_mislead":  # no image has a gradient
            return checks["bad_gradients"].outcome == "raised"
        case "black_box_stronger":  # PGD left none: images that it left and made progress on are counted elsewhere
            return record.no_gradients is not None or checks["loss_still_rising"].figures.get("images") == 0
        case "cr_is_blind":
            return not any(_left_by_relaxation(record)[: record.policy.checks.images])
        case "found_and_dropped":
            return not any(any(one.tried) for one in record.main.attacks if not one.transferred)
        case "resists_only_here":  # no training images, which the other check would have counted
            return "training" not in checks["only_these_images"].figures
        case "state_changes":
            return remote
    return check.check == "seen_images"  # nobody says whether the model was trained on these data


def _left_by_relaxation(record: GateRecord) -> list[bool]:
    """Which images that were right constraint relaxation left `(N,)`; none where it did not run."""
    relaxed = next((one for one in record.main.attacks if one.name.startswith(RELAXED)), None)
    if relaxed is None:
        return []
    return [held and right for held, right in zip(relaxed.held, record.main.correct, strict=True)]
