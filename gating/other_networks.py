"""Other networks that a gate crafts attacks on: surrogates, all of them together, and a substitute of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dfmcl.common.errors import Broken
from dfmcl.common.progress import Track
from dfmcl.gating.block import Source
from dfmcl.gating.case import Case
from dfmcl.gating.resumption import State
from dfmcl.robustness.attacks.transfer import ensemble, ensemble_sha256
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.image_set import held_at_once
from dfmcl.robustness.ranks import Ranks
from dfmcl.robustness.records import Evaluation, joined
from dfmcl.robustness.seeds import derived_seed
from dfmcl.robustness.substitute import Learnt, learnt

SUBSTITUTE = "substitute"


def sources_of(case: Case, state: State, ranks: Ranks, track: Track) -> tuple[tuple[Source, ...], dict[str, str]]:
    """The other networks that attacks are crafted on, and the record's words about the gate's own substitute."""
    found = [Source(name, surrogate.model, case.carried) for name, surrogate in case.surrogates.items()]
    if len(found) > 1:
        together = ensemble([source.model for source in found])
        found.append(Source("+".join(case.surrogates), together, case.carried))
    if not case.policy.attacks.substitute:
        return tuple(found), {"substitute": "none: the policy asks for none"}
    if case.subject.kind == "endpoint":
        return tuple(found), {"substitute": "none: an endpoint's queries are the attacks'"}
    made = substitute_of(case, state, ranks, track)
    said = f"learnt from {made.answers} answers, agrees with {100 * made.agreement:.1f} % of them"
    return (*found, Source(SUBSTITUTE, made.model, case.carried)), {"substitute": said}


def substitute_of(case: Case, state: State, ranks: Ranks, track: Track) -> Learnt:
    """Learnt by the first process, and by none after an interruption: all attack with the same one."""
    if ranks.first and state.load(SUBSTITUTE, 0) is None:
        # Not the judged images, where there are others: their order must not decide the network that attacks them.
        images = case.data.x_train if len(case.data.x_train) else case.data.x_test
        made = learnt(
            case.subject.decide,
            images,
            case.policy.parsed_threat,
            answers=case.policy.attacks.substitute,
            seed=case.seed,
            device=ranks.device,
            track=track,
        )
        state.save(SUBSTITUTE, 0, made.to_bytes())
    ranks.gather(None)
    saved = state.load(SUBSTITUTE, 0)
    if saved is None:
        raise Broken(f"{state.directory}: the substitute that was saved there is gone")
    return Learnt.from_bytes(saved, ranks.device)


def transferred(case: Case, index: NDArray[np.int64], track: Track) -> list[Evaluation]:
    """What of the test images at `index` holds against images crafted on each surrogate, and on all of them as one:
    upper bounds, with which production compares itself."""
    groups = [{name: surrogate} for name, surrogate in case.surrogates.items()]
    found = []
    for group in [*groups, *([dict(case.surrogates)] if len(groups) > 1 else [])]:
        digest = ensemble_sha256([surrogate.origin_sha256 for surrogate in group.values()])
        source = ensemble([surrogate.model for surrogate in group.values()])
        parts = [
            evaluate(
                case.subject.model,
                *case.test(part),
                case.policy.parsed_threat,
                case.carried,
                decide=case.subject.decide,
                source=source,
                grid=case.grid,
                seed=derived_seed(case.seed, "part", number) if number else case.seed,
                about={"kind": "transfer", "surrogate": "+".join(group), "surrogate_sha256": digest},
                track=track,
            ).evaluation
            for number, part in enumerate(held_at_once(case.data.x_test, index))
        ]
        found.append(joined(parts))
    return found
