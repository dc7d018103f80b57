"""The policy of a user who has none: one threshold at one radius, and of the rest what this file says."""

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

if TYPE_CHECKING:
    from dfmcl.robustness.contract import InputContract

CONFIDENCE = 95
SUITE = "fast"
CHECKED = (
    32  # images that checks look at: a first verdict comes in a quarter of the time, and `--policy` can ask for 128
)
OPTIONS = ("--data", "--eps", "--at-least")
EXAMPLE = "--data FOLDER --eps 4/255 --at-least 0.3"


@dataclass(frozen=True)
class Assumed:
    """What was asked. data: a folder, an .npz, a .csv or a known name; eps: in Linf, as a policy writes it."""

    data: str
    eps: str
    criterion: Criterion
    preprocessing: Preprocessing = USUAL

    @staticmethod
    def of(data: str | None, eps: str | None, at_least: str | None, preprocessing: Preprocessing = USUAL) -> Assumed:
        """From the three options; BadInput names the one that is missing or wrong."""
        given = dict(zip(OPTIONS, (data, eps, at_least), strict=True))
        if missing := [name for name, value in given.items() if value is None]:
            raise BadInput(f"without --policy it needs {EXAMPLE}, and lacks {', '.join(missing)}")
        assert data is not None
        assert eps is not None
        try:
            criterion = Criterion.parse(f"robust_accuracy >= {at_least} at {CONFIDENCE} %")
        except BadInput:
            raise BadInput(f"--at-least {at_least}: expected a share of the images, such as 0.3 or '30 %'") from None
        if not criterion.threshold:
            raise BadInput(f"--at-least {at_least}: every model has that; expected more than 0, such as 0.3")
        try:
            checked_radius(eps, "linf")
        except ValueError as error:
            raise BadInput(f"--eps {eps}: {error}") from None
        if why := why_not_local(data):
            raise BadInput(f"--data {data}: {why}")
        if data not in BUILT_IN and not Path(data).exists():
            raise BadInput(
                f"--data {data}: is not there; name a folder, an .npz, a .csv, or one of {', '.join(BUILT_IN)}"
            )
        return Assumed(data, eps, criterion, preprocessing)

    def policy(self, contract: InputContract, checked: int | None = CHECKED) -> Policy:
        """The policy for a model that takes such images; every other key has its default.

        checked: images that checks look at; None: the default.
        """
        return Policy.of_text(
            {
                "criteria": [str(self.criterion)],
                "threat": {"norm": "linf", "eps": self.eps},
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
        return [
            f"assumed: {self.criterion} in Linf {self.eps}, suite {SUITE}, checks on {CHECKED} images; see {file}",
            f"assumed: all test images of {self.data}{fitted}; the model takes {taken} (else say --input)",
        ]


def kind_of(path: Path) -> Kind:
    """The kind of data set that a path is: a folder of tables, shards or classes, a CSV file, else an archive."""
    if path.is_dir():
        if any(any(place.glob("*.parquet")) for place in (path, path / "data")):
            return "parquet"
        return (
            "shards" if any(any(place.glob("*.tar")) for place in (path, path / "train", path / "test")) else "folder"
        )
    return "csv" if path.suffix.lower() == ".csv" else "npz"
