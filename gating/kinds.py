"""The kinds of models that a gate judges: one row each. How each is opened: `gating/subjects/registry.py`."""

from __future__ import annotations

from dataclasses import dataclass

EXPORT = "export it to ONNX, make it a candidate with `dfmcl export`, and gate and sign that."


BY_BATCH = "DynamicQuantizeLinear"  # in the origin of a file's gradients: its scales are of the whole batch
QUANTISE = (
    "A file that chooses its scales by the whole batch is not promoted, and `dfmcl export` refuses it, because its"
    " answer to one user would depend on another's image: quantise it statically, and gate that."
)


@dataclass(frozen=True)
class SubjectKind:
    """One kind.

    said: how a message names it.
    takes: the options of `open_subject` that it knows.
    promote: what to do with one that passed.
    file: whether a path names it.
    code: whether Python that came with it runs in the gate's own process, which it could deceive.
    """

    said: str
    takes: frozenset[str]
    promote: str
    file: bool = True
    code: bool = False


FOREIGN = frozenset({"contract", "labels"})
KINDS = {
    "candidate": SubjectKind(
        "a candidate's directory", frozenset({"run"}), "Signed, this evidence lets you promote the candidate."
    ),
    "onnx": SubjectKind(
        "an ONNX file",
        FOREIGN | {"output"},
        "An ONNX file by itself is not promoted: make it a candidate with `dfmcl export`, and gate and sign that.",
    ),
    "torchscript": SubjectKind("a TorchScript file", FOREIGN, f"A TorchScript file is not promoted: {EXPORT}"),
    # torch.export.load falls back to an unrestricted pickle, and lets sympy evaluate the sizes that it reads.
    "program": SubjectKind("a torch.export file", FOREIGN, f"A torch.export file is not promoted: {EXPORT}", code=True),
    "weights": SubjectKind("a file of weights", FOREIGN | {"arch"}, f"A file of weights is not promoted: {EXPORT}"),
    "module": SubjectKind(
        "module:callable", FOREIGN, f"A module in Python is not promoted: {EXPORT}", file=False, code=True
    ),
    "endpoint": SubjectKind(
        "grpc://HOST:PORT/MODEL",
        frozenset({"budget"}),
        "An endpoint is not promoted: gate and sign the candidate behind it.",
        file=False,
    ),
}
ONE_OF = ", ".join(kind.said for kind in KINDS.values())
