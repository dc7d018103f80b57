"""What a load needs, against sums that can be done by hand; and the page, against the command."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.errors import BadInput
from dfmcl.serving.capacity import (
    CASE,
    MAX_SURGE,
    MIN_REPLICAS,
    Load,
    Replica,
    capacity,
    measured_images_per_second,
    rollout_waves,
    table,
)

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes" / "base"


def test_by_hand() -> None:
    """900 requests of 2 images at 500 a second and 60 %: 6 replicas carry 1,800, a seventh may go; 4 waves of 20 s."""
    found = capacity(Load(900, images_per_request=2, probes=0), Replica(500, 0.6, ready_seconds=20, hourly=0.36))
    assert found.replicas == 7
    assert found.utilisation == pytest.approx(1800 / 3500)
    assert found.after_loss == pytest.approx(0.6)
    assert found.probe_share == 0
    assert found.rollout_seconds == 4 * 20
    assert found.per_million == pytest.approx(7 * 0.36 / 3600 / 900 * 1e6)


def test_a_trickle_still_has_two() -> None:
    """One request a minute: as many as the autoscaler's minimum, and probes are most of what comes in."""
    found = capacity(Load(1 / 60), Replica(1000))
    assert found.replicas == MIN_REPLICAS == 2
    assert found.probe_share == pytest.approx(1.9 / 2000)


@given(
    st.floats(0.01, 1e6),
    st.integers(1, 64),
    st.floats(0, 1e3),
    st.floats(1, 1e5),
    st.floats(0.05, 0.95),
)
def test_one_replica_may_always_go(requests: float, images: int, probes: float, speed: float, target: float) -> None:
    """With one replica gone the rest still stays at the planned utilisation, and two fewer would not."""
    load, replica = Load(requests, images, probes), Replica(speed, target)
    found = capacity(load, replica)
    assert found.after_loss <= target * (1 + 1e-9)
    assert found.utilisation < found.after_loss
    if found.replicas > MIN_REPLICAS:
        assert load.images_per_second > (found.replicas - 2) * speed * target * (1 - 1e-9)
    assert capacity(Load(2 * requests, images, probes), replica).replicas >= found.replicas


@pytest.mark.parametrize(("replicas", "waves"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (8, 4), (13, 4), (1000, 4)])
def test_waves(replicas: int, waves: int) -> None:
    """A quarter at a time, rounded up as Kubernetes does: four waves at most, however many replicas."""
    assert rollout_waves(replicas) == waves
    assert math.ceil(replicas * MAX_SURGE) * waves >= replicas


def test_the_plan_is_the_manifests() -> None:
    """Surge and minimum are those that are deployed; the sidecar's load is that of its configuration."""
    triton = next(yaml.safe_load_all((BASE / "triton.yaml").read_text()))
    assert triton["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": f"{100 * MAX_SURGE:.0f}%"}
    scaler = next(yaml.safe_load_all((BASE / "autoscaling.yaml").read_text()))
    assert scaler["spec"]["minReplicas"] == MIN_REPLICAS
    from dfmcl.monitoring.config import load_config

    probe = load_config(ROOT / "deploy" / "resnet18-cifar10" / "watch.toml").probe
    images = 1 + probe.replay + probe.images * (1 + len(probe.attacks))
    assert Load(1).probes == pytest.approx(images / probe.interval_seconds, rel=0.01)


def test_the_measured_figure_comes_from_the_record(tmp_path: Path) -> None:
    """The row of its name; a record without it is bad input that says what to give instead."""
    path = tmp_path / "serving.json"
    path.write_text(json.dumps({"rows": [{"case": "other"}, {"case": CASE, "images_per_s": 1234.5}]}))
    assert measured_images_per_second(path) == 1234.5
    for text in ("", "{}", '{"rows": [{"case": "other", "images_per_s": 1}]}', json.dumps({"rows": [{"case": CASE}]})):
        path.write_text(text)
        with pytest.raises(BadInput, match="give --images-per-second-per-replica"):
            measured_images_per_second(path)
    with pytest.raises(BadInput, match=r"none\.json"):
        measured_images_per_second(tmp_path / "none.json")


def test_the_price_has_a_column_only_where_there_is_one() -> None:
    """Seven columns with a price, six without; every line has as many."""
    for hourly, columns in ((None, 6), (0.1, 7)):
        text = table([capacity(Load(requests), Replica(100, hourly=hourly)) for requests in (1, 1e6)])
        assert {line.count("|") - 1 for line in text.splitlines()} == {columns}
    assert "1,000,000" in text


def test_the_page_shows_what_its_commands_print() -> None:
    """docs/capacity.md: after each `dfmcl capacity` comes its output, word for word."""
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    shown = re.findall(r"```sh\n(dfmcl capacity .*?)```\n\n(.*?)\n\n(A replica answers .*?)\n", page, flags=re.DOTALL)
    assert shown
    for command, rows, line in shown:
        words = shlex.split(command.replace("\\\n", " "))
        made = subprocess.run(
            [Path(sys.executable).with_name("dfmcl"), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert made.stdout == f"{rows}\n\n{line}\n", made.stderr
