"""Records are small, come back equal, and a foreign one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.robustness.records import AttackRecord, Evaluation
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.plan import load_campaign, runs
from dfmcl.training.run_record import RunRecord, pack, read_record, unpack, write_record
from tests.training.workshop import first_of, synthetic


@given(st.lists(st.booleans(), max_size=50))
def test_packed_bits_come_back(flags: list[bool]) -> None:
    """pack and unpack are inverse for any length."""
    bits = "".join("01"[flag] for flag in flags)
    assert unpack(pack(bits), len(bits)) == bits


def test_one_radius_written_in_two_ways_is_one() -> None:
    """0.08 and 20.4/255 differ in their last bit as floats."""
    record = synthetic("x", 0, {"20.4/255": first_of(100, 7)})
    flags = record.flags("pgd-2", threat_of("linf", "0.08"))
    assert flags is not None
    assert flags.sum() == 7


@pytest.mark.parametrize(("name", "limit"), [("table1", 400_000), ("table1_small", 60_000), ("alpha_small", 60_000)])
def test_records_are_small(tmp_path: Path, name: str, limit: int) -> None:
    """With bits that nothing compresses, a record of the whole plan stays below the limit and comes back equal."""
    campaign = load_campaign(name)
    n = campaign.images or 10_000
    stream = np.random.default_rng(0)

    def bits(count: int) -> tuple[bool, ...]:
        return tuple((stream.random(count) < 0.5).tolist())

    evaluations = []
    for key, entry in campaign.measurements.items():
        for threat in entry.threats:
            count = entry.images or n
            correct = bits(count)
            attacks = tuple(
                AttackRecord(a.label, {"steps": 5}, bits(count), bits(count) if entry.cascade else correct, 0, 1 / 3)
                for a in entry.attacks
            )
            about = {"measurement": key, "black_box": entry.black_box, "source": "", "cascade": entry.cascade}
            evaluations.append(Evaluation(threat, False, 0, correct, attacks, 1 / 3, about))
    plain = synthetic("x", 0, {})
    epochs = runs(campaign, name)[-1].config.optimization.epochs
    row = {f"column{column}": stream.random() for column in range(14)} | {"p_counts": "12345 " * 10}
    config = runs(campaign, name)[-1].config.model_dump()
    training = {**plain.training, "history": [row] * epochs}
    record = RunRecord(**{**vars(plain), "config": config, "training": training, "evaluations": tuple(evaluations)})
    write_record(tmp_path / "x.json", record)
    assert (tmp_path / "x.json").stat().st_size < limit
    assert read_record(tmp_path / "x.json") == record


def test_a_foreign_record_is_named(tmp_path: Path) -> None:
    """A file that is no record is bad input with its name, not a traceback."""
    (tmp_path / "x.json").write_text('{"format": "other"}')
    with pytest.raises(BadInput, match=r"x.json: format is 'other'"):
        read_record(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"format": "dfmcl.campaign.record/1"}')
    with pytest.raises(BadInput, match=r"x.json: malformed record"):
        read_record(tmp_path / "x.json")
