"""Kinds of data sets, as policies and configurations name them."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["digits", "cifar10", "npz", "folder", "csv", "shards"]
KINDS: tuple[str, ...] = get_args(Kind)
BUILT_IN = ("digits", "cifar10")  # these need no path
FITTED = ("folder", "csv", "shards")  # files of any size: they need a side to be fitted to
