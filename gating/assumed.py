"""The policy of a user who has none: one threshold for one threat, or two, and of the rest what this file says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dfmcl.common.errors import BadInput
from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.common.text import why_not_local
from dfmcl.gating.criterion import Criterion
from dfmcl.gating.policy import Policy, checked_radius
from dfmcl.robustness.sources import BUILT_IN, Kind
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.radius import SUITED
from dfmcl.robustness.threats.registry import parse_threat
from dfmcl.robustness.threats.threat import Threat

if TYPE_CHECKING:
    from dfmcl.robustness.contract import InputContract

CONFIDENCE = 95
SUITE = "fast"
CHECKED = (
    32  # images that checks look at: a first verdict comes in a quarter of the time, and `--policy` can ask for 128
)
BALL = "4/255"  # Linf, of the checks and the report, where the threat is no ball
EXAMPLE = "--data FOLDER --eps 4/255 --at-least 0.3"


@dataclass(frozen=True)
class Assumed:
    """What was asked. data: a folder, an .npz, a .csv or a known name; norm, eps: the policy's own ball."""

    data: str
    norm: str
    eps: str
    criteria: tuple[Criterion, ...]
    preprocessing: Preprocessing = USUAL

    @staticmethod
    def of(
        data: str | None,
        eps: str | None,
        threat: str | None,
        at_least: str | None,
        preprocessing: Preprocessing = USUAL,
    ) -> Assumed:
        """From the options; BadInput names the one that is missing or wrong.

        threat: in place of eps, or beside it, and then both must hold. The policy's own ball is that of eps, or the
        threat where it is one of Linf or L2.
        """
        given = {"--data": data, "--eps": eps or threat, "--at-least": at_least}
        if missing := [name for name, value in given.items() if value is None]:
            raise BadInput(f"without a policy it needs {EXAMPLE}, and lacks {', '.join(missing)}")
        assert data is not None
        asked = f">= {at_least} at {CONFIDENCE} %"
        try:
            criterion = Criterion.parse(f"robust_accuracy {asked}")
        except BadInput:
            raise BadInput(f"--at-least {at_least}: expected a share of the images, such as 0.3 or '30 %'") from None
        if not criterion.threshold:
            raise BadInput(f"--at-least {at_least}: every model has that; expected more than 0, such as 0.3")
        norm, radius, criteria = "linf", eps or BALL, [criterion] if eps is not None else []
        try:
            checked_radius(radius, norm)
        except ValueError as error:
            raise BadInput(f"--eps {eps}: {error}") from None
        if threat is not None:
            found = _threat(threat)
            if eps is None and isinstance(found, Ball) and found.kind in SUITED:
                norm, radius, criteria = found.kind, found.label, [criterion]
            else:
                criteria.append(Criterion.parse(f"robust_accuracy({found.spelling}) {asked}"))
        if why := why_not_local(data):
            raise BadInput(f"--data {data}: {why}")
        if data not in BUILT_IN and not Path(data).exists():
            raise BadInput(
                f"--data {data}: is not there; name a folder, an .npz, a .csv, or one of {', '.join(BUILT_IN)}"
            )
        return Assumed(data, norm, radius, tuple(criteria), preprocessing)

    def policy(self, contract: InputContract, checked: int | None = CHECKED) -> Policy:
        """The policy for a model that takes such images; every other key has its default.

        checked: images that checks look at; None: the default.
        """
        return Policy.of_text(
            {
                "criteria": [str(criterion) for criterion in self.criteria],
                "threat": {"norm": self.norm, "eps": self.eps},
                "data": self._section(contract),
                "attacks": {"suite": SUITE},
                "checks": {} if checked is None else {"images": checked},
            }
        )

    def _section(self, contract: InputContract) -> dict[str, str | int]:
        """The data as a policy names it; BadInput where a folder cannot be fitted to these images."""
        if self.data in BUILT_IN:
            return {"name": self.data}
        kind = kind_of(Path(self.data))
        if kind == "npz":
            return {"name": kind, "path": self.data}
        if contract.height != contract.width:
            raise BadInput(
                f"--data {self.data}: its images are fitted to a square, the model takes {contract}; save them"
                " as an .npz of x_test and y_test"
            )
        self.preprocessing.require_side(contract.height)
        told = {"preprocessing": str(self.preprocessing)}
        return {"name": kind, "path": self.data, "image_size": contract.height, **told}

    def said(self, policy: Policy, contract: InputContract, file: Path) -> list[str]:
        """What was assumed, in two lines. file: where the policy will lie."""
        side = policy.data.image_size
        fitted = f", brought to {side}x{side} by {policy.data.preprocessing}" if side else ""
        taken = f"{contract} plain, from 0 to 1" if not str(contract.scale) and contract.dtype != "uint8" else contract
        asked, ball = " and ".join(str(criterion) for criterion in self.criteria), policy.parsed_threat
        where = f"in {ball}" if any(not one.eps for one in self.criteria) else f"checks in {ball}"
        joint = ", " if where.startswith("checks") else " "
        return [
            f"assumed: {asked}{joint}{where}, suite {SUITE}, checks on {CHECKED} images; see {file}",
            f"assumed: all test images of {self.data}{fitted}; the model takes {taken} (else say --input)",
        ]


def _threat(text: str) -> Threat:
    """What --threat names; BadInput where it names none, or a ball that no bytes can use."""
    try:
        found = parse_threat(text)
        for part in found.parts:
            if isinstance(part, Ball):
                checked_radius(part.label, part.kind)
    except (BadInput, ValueError) as error:
        raise BadInput(f"--threat {text}: {error}") from None
    return found


def kind_of(path: Path) -> Kind:
    """The kind of data set that a path is: a folder of tables, shards or classes, a CSV file, else an archive."""
    if path.is_dir():
        if any(any(place.glob("*.parquet")) for place in (path, path / "data")):
            return "parquet"
        return (
            "shards" if any(any(place.glob("*.tar")) for place in (path, path / "train", path / "test")) else "folder"
        )
    return "csv" if path.suffix.lower() == ".csv" else "npz"
