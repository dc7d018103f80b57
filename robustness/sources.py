"""Where images come from, as policies and configurations name it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.common.toml import LocalPath, Section

Kind = Literal["digits", "cifar10", "npz", "folder", "csv", "shards", "parquet"]
KINDS: tuple[str, ...] = get_args(Kind)
BUILT_IN = ("digits", "cifar10")  # these need no path
FITTED = ("folder", "csv", "shards", "parquet")  # files of any size: they need a side to be fitted to


def _whole(text: str) -> str:
    return str(Preprocessing.parse(text))


class DataSource(Section):
    """A data set. image_size, preprocessing: the side that files of FITTED kinds are brought to, and how."""

    name: Kind
    path: LocalPath = ""
    image_size: int = Field(0, ge=0)
    preprocessing: Annotated[str, AfterValidator(_whole)] = str(USUAL)

    @property
    def named(self) -> tuple[str, str, int]:
        """What a data set is opened by: name, path, image_size."""
        return self.name, self.path, self.image_size
