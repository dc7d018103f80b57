"""What a gate's report cannot lack: each attack that its policy implies, and each check. An absent one found nothing.

A policy that says nothing of a substitute is of a gate before there was one: it had fewer checks and shorter suites,
and an attack from another network did not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from dfmcl.gating.policy import Policy
from dfmcl.robustness.attacks.suites import AUTOATTACK, FROM, SUITES, WITHOUT_GRADIENTS
from dfmcl.robustness.reasons import REASONS

SUBSTITUTE = "substitute"
LATER = {
    "cr_is_blind",
    "grad_mode_matters",
    "unaccounted",
    "only_these_images",
    "resists_only_here",
    "state_changes",
    "answers_change",
}
SHORTER: dict[str, tuple[str, ...]] = {"fast": ("apgd-ce", "apgd-t"), "standard": AUTOATTACK}


def is_early(policy: Policy) -> bool:
    """Whether a policy, as its report has it, is of a gate before there was a substitute."""
    return SUBSTITUTE not in policy.attacks.model_fields_set


def absent_checks(found: Sequence[str], *, early: bool) -> list[str]:
    """The checks that a gate ran and that are not among these names; a name twice is one too few."""
    return [name for name in REASONS if found.count(name) != 1 and not (early and name in LATER)]


def attacks_of(policy: Policy, kind: str, *, blind: bool, sources: Sequence[str]) -> list[str]:
    """Names of all attacks on each image in a threat of a kind, in their order, by a policy as its report has it.

    Those that only drawn images meet come last.
    blind: the model gave no gradients. sources: other networks that attacks were crafted on.
    """
    own = policy.attacks.by_kind(kind)
    if own is not None:
        return [name for name in own if not blind or name.startswith(WITHOUT_GRADIENTS)]
    asked, suites = policy.attacks, SHORTER if is_early(policy) else SUITES
    whole: list[str] = []
    suite = list(suites[asked.suite] if isinstance(asked.suite, str) else asked.suite)
    if blind:
        queried = [name for name in suite if name.startswith(WITHOUT_GRADIENTS)]
        suite = queried + [name for name in asked.black_box if name not in queried]
    elif asked.chance != 1:
        suite, whole = list(SUITES["fast"]), [name for name in suite if name not in SUITES["fast"]]
    if is_early(policy):
        return suite
    return suite + [f"{name}{FROM}{source}" for source in sources for name in asked.transfer] + whole


def sources_of(policy: Policy, kind: str, surrogates: Sequence[str]) -> list[str]:
    """The networks that attacks were crafted on: surrogates, by name, and the substitute, but for an endpoint's."""
    learnt = kind != "endpoint" and not is_early(policy) and policy.attacks.substitute > 0
    return [*surrogates, *([SUBSTITUTE] if learnt else [])]
