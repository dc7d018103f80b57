"""A metric's name is one constant, in full: grep leads from an alert, a panel or a page to the line that makes it."""

from __future__ import annotations

import ast
import re
from collections import Counter

from tests.deploying import ROOT

NAME = re.compile(r"(?<![\w:/])(?:robustness|gateway|nv)_[a-z0-9_]+(?![\w:/])")
MAKERS = (
    "common/metric_names.py",
    "gating/formats/openmetrics.py",
    "monitoring/metrics.py",
    "serving/gateway/metrics.py",
)
TRITONS = {  # as a real Triton names them: tests/test_deploy_commands.py asks one
    *("nv_inference_queue_duration_us", "nv_inference_request_success", "nv_inference_pending_request_count"),
    "nv_cache_num_hits_per_model",
}
FOLDERS = ("deploy/prometheus", "deploy/grafana", "deploy/kubernetes", "docs")
READERS = [
    *(ROOT / "README.md", ROOT / "quickstart.py"),
    *(
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.*"))
        if path.suffix not in (".png", ".svg", ".jpg")
    ),
]


def made() -> Counter[str]:
    """How often each name stands as a string of its own where metrics are made."""
    trees = [ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in MAKERS]
    strings = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return Counter(text for text in strings if isinstance(text, str) and NAME.fullmatch(text))


def unknown(text: str) -> set[str]:
    """The metrics that a text names and nothing makes. Of a histogram all three series count; `a_...` is all of a_."""
    known = {*made(), *TRITONS}

    def found(name: str) -> bool:
        if name.endswith("_"):
            return any(one.startswith(name) for one in known)
        return name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known

    return {name for name in NAME.findall(text) if not found(name)}


def test_each_name_is_written_once() -> None:
    """A rename is one line; about 90 names in all, so the count does not look past them."""
    names = made()
    assert {name for name, times in names.items() if times > 1} == set()
    assert len(names) > 90


def test_what_is_named_is_made() -> None:
    """Each metric in rules, dashboards, pages and the quickstart is made by a line of code; an unknown one is found."""
    assert {str(path.relative_to(ROOT)): names for path in READERS if (names := unknown(path.read_text("utf-8")))} == {}
    assert sum(len(NAME.findall(path.read_text("utf-8"))) for path in READERS) > 300
    assert unknown("rate(robustness_probe_rounds[5m]) + robustness_probe_round_duration_seconds_sum") == {
        "robustness_probe_rounds"
    }
    assert unknown("`gateway_detections_...`, `gateway_detection_...`") == {"gateway_detections_"}


def test_no_name_is_put_together() -> None:
    """A name with a hole is one that grep cannot find."""
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in MAKERS)
    assert re.findall(r"(?:robustness|gateway)_\w*\{", text) == []
