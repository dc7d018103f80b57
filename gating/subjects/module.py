"""What `module:callable` returns as a subject: code that is run, and trusted."""

from __future__ import annotations

from functools import partial

from dfmcl.gating.afresh import asked_afresh
from dfmcl.gating.subject import Subject
from dfmcl.gating.subjects.network import declared, network_subject
from dfmcl.robustness.user_code import imported


def module_subject(text: str, contract: str | None, labels: tuple[str, ...] | None = None) -> Subject:
    """What `module:callable` returns: an nn.Module from float images to logits (N, K).

    contract: its images' size, layout, dtype and scale. The module is looked for beside the user first, in the current
    directory.
    """
    taken = declared(contract, text)
    afresh = partial(asked_afresh, text)
    return network_subject(imported(text), taken, labels, kind="module", name=text, afresh=afresh)
