"""docs/results.md and its pages say what the raw records say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from benchmarks.attacks import SHIPPED, Counted, shipped, torchattacks_square
from dfmcl.gating.signing.evidence import read_report
from dfmcl.gating.signing.report import Report
from dfmcl.robustness.models import to_float
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.statistics import clopper_pearson
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.plan import load_campaign, runs
from dfmcl.training.run_record import read_record
from dfmcl.training.table import table
from tests.present import present

ROOT = Path(__file__).parents[1]
MODEL = "resnet18-cifar10"
NUMBER = r"\d+(?:[.,]\d+)*"


def page(name: str) -> str:
    """A page of docs/, as it is written."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_each_finding_stands_on_the_page_that_it_links_to() -> None:
    """Every number of a finding is on a page behind one of its links, so that no finding outlives its record."""
    findings = re.findall(r"^\* (.*?)(?=^\*|^$)", page("results"), flags=re.DOTALL | re.MULTILINE)
    assert len(findings) > 20
    for finding in findings:
        links = re.findall(r"\]\(([\w/-]+)\.md", finding)
        assert links, finding
        known = set(re.findall(NUMBER, "".join(map(page, links))))
        said = set(re.findall(NUMBER, re.sub(r"\]\(.*?\)", "]", finding)))
        assert said - known == set(), finding


def shipped_report() -> Report:
    """The gate's, on the model of the repository."""
    return read_report(ROOT / "model_repository" / MODEL / "1" / "report.json")[0]


def test_speed_on_the_page_is_the_records() -> None:
    """Each ratio of results/training.json stands on the page; PGD-10 training is at least twice the plain loop's."""
    text = page("results/training")
    record = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8"))
    assert record["ratios"]["pgd10_images_per_s_vs_plain_loop"] >= 2
    assert [name for name, value in record["ratios"].items() if f"| {name} | {value:.2f} |" not in text] == []


def test_sequential_figures_on_the_page_are_the_records() -> None:
    """False verdicts stay below 5 % on each side; 5 points above the threshold 800 images do, 10 points above 160."""
    text = page("results/gate")
    ratios = json.loads((ROOT / "benchmarks" / "results" / "gate.json").read_text(encoding="utf-8"))["ratios"]
    for name, limit in (("false_pass_rate_at_threshold_exact", 0.05), ("false_fail_rate_at_threshold_exact", 0.05)):
        assert ratios[name] <= limit
        assert f"| {name} | {ratios[name]:.3f} |" in text
    for name, limit in (("median_images_at_plus_5_points", 800), ("median_images_at_plus_10_points", 160)):
        assert ratios[name] <= limit
        assert f"| {name} | {ratios[name]} |" in text


def test_figures_of_the_shipped_model_are_the_reports() -> None:
    """The gate's cascade, attack by attack, and its bounds."""
    text = " ".join(page("results/shipped-model").split())
    report = shipped_report()
    bounds = {
        row.metric: f"{100 * present(row.lower):.1f} to {100 * present(row.upper):.1f}" for row in report.criteria
    }
    evaluation = report.evaluation
    measured = [evaluation.clean, *(attack.accuracy for attack in evaluation.attacks)]
    shares = [100 * share.value for share in measured]
    assert f"| clean | {shares[0]:.1f} | {bounds['clean_accuracy']} |" in text
    assert f"| APGD-CE | {shares[1]:.1f} | |" in text
    assert f"| and APGD-T | {shares[2]:.1f} | {bounds['robust_accuracy']} |" in text
    assert f"Of the {evaluation.images:,} images" in text
    wanted = {row.metric: f"{100 * present(row.threshold):.0f} %" for row in report.criteria}
    assert f"({wanted['robust_accuracy']} right at 8/255, {wanted['clean_accuracy']} clean)" in text


def test_the_gate_and_the_table_of_all_agree_image_by_image() -> None:
    """Robust on the same images; clean on all but those that the page counts. The table's order is that of seed 0."""
    text = page("results/shipped-model")
    record = json.loads((ROOT / "benchmarks" / "results" / "resnet18_fast_10000.json").read_text(encoding="utf-8"))
    table = Evaluation.from_json(record["evaluations"][0])
    report = shipped_report()
    gate = Evaluation.from_json(report.evaluation.to_json())
    place = np.argsort(np.random.default_rng(0).permutation(len(table.correct)))[list(report.per_image.index)]
    assert (np.array(table.robust_images)[place] == np.array(gate.robust_images)).all()
    assert f"the same {gate.robust.k} hold under attack, and clean one more is right there" in " ".join(text.split())
    differ = np.array(table.correct)[place].astype(int) - np.array(gate.correct).astype(int)
    assert sorted(set(differ.tolist())) == [0, 1]
    assert differ.sum() == 1


def test_transfer_on_the_page_is_the_reports() -> None:
    """From all surrogates together with its interval, from each alone."""
    text = " ".join(page("results/shipped-model").split())
    report = shipped_report()
    for entry in report.transfer:
        shares = [attack.accuracy for attack in entry.attacks]
        if "+" not in entry.about.surrogate:
            mi, di = (f"{100 * share.value:.1f}" for share in shares)
            assert f"| `{entry.about.surrogate}` | {mi} | {di} |" in text
            continue
        for share in shares:
            low, high = 100 * share.lower_95, 100 * share.upper_95
            assert f"{100 * share.value:.1f} % [{low:.1f}, {high:.1f}]" in text


def test_figures_of_all_test_images_are_the_records() -> None:
    """Clean and worst case with their exact intervals, on the page, in the README and in the model's card."""
    text = page("results/shipped-model")
    record = json.loads((ROOT / "benchmarks" / "results" / "resnet18_fast_10000.json").read_text(encoding="utf-8"))
    (evaluation,) = (Evaluation.from_json(entry) for entry in record["evaluations"])
    manifest = json.loads((ROOT / "model_repository" / MODEL / "1" / "manifest.json").read_text(encoding="utf-8"))
    assert record["run"]["checkpoint_sha256"] == manifest["run"]["checkpoint_sha256"]
    assert len(evaluation.correct) == 10_000
    for name, share in (
        ("clean", evaluation.clean),
        ("APGD-CE (100 steps)", evaluation.attacks[0].accuracy),
        ("and APGD-T (9 targets, 100 steps each)", evaluation.robust),
    ):
        low, high = (100 * bound for bound in clopper_pearson(share.k, share.n, 0.95))
        assert f"| {name} | {100 * share.value:.1f} [{low:.1f}, {high:.1f}] |" in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{100 * evaluation.clean.value:.1f} % of all 10,000 test images right" in readme
    assert f"{100 * evaluation.robust.value:.1f} % [{low:.1f}, {high:.1f}] under APGD-CE and APGD-T" in readme
    assert f"value: {evaluation.robust.value}" in (ROOT / "model_repository" / MODEL / "README.md").read_text()


@pytest.mark.parametrize(
    ("where", "record", "said"),
    [
        ("attacks", "attacks", "**{pgd20_images_per_s_vs_fastest_peer:.2f} times the fastest"),
        ("attacks", "attacks", "and ours {pgd20_images_per_s_vs_fastest_peer_with_frozen_weights:.2f} times that"),
        ("attacks", "attacks", "In float32 {pgd20_float32_images_per_s_vs_fastest_peer:.2f} times"),
        ("attacks", "attacks", "the ratio is {pgd20_only_right_images_per_s_vs_fastest_peer:.1f}, at"),
        ("attacks", "attacks", "**{square_queries_vs_art:.2f} of ART's**"),
        ("attacks", "attacks_eps4", "it was {pgd20_images_per_s_vs_fastest_peer:.1f} times (`attacks_eps4.json`)"),
        ("gate", "checks", "fewer than {honest_runs_that_raise_upper_95:.1%} of such runs would"),
        ("shipped-model", "standard", "attacks at most {all_four_at_most:.1f}% of the 1,000 hold"),
        ("shipped-model", "standard", "no more than a fall to {all_four_at_least:.1f}%"),
        ("serving", "serving_avx2", "classify_ms | {single_image_added_by_v2_over_classify_ms:.2f} |"),
        (
            "serving",
            "serving_avx2",
            "| concurrent16_v2_throughput_vs_classify | {concurrent16_v2_throughput_vs_classify:.2f} |",
        ),
        ("attacks", "strength", "with {forward_passes_vs_autoattack:.2f} times as many forward passes"),
        ("attacks", "strength", "in {seconds_vs_autoattack:.2f} times the time"),
        (
            "watching",
            "watch_crafted",
            "cores | {p50:+.0%} | {p99:+.0%} | {throughput:+.0%} | {sidecar_share_of_a_core:.1%}",
        ),
        (
            "watching",
            "watch",
            "| {p50_sharing_cores:+.0%} | {p99_sharing_cores:+.0%} | {throughput_sharing_cores:+.0%} |"
            " {sidecar_share_of_a_core_sharing_cores:.1%} |",
        ),
        ("watching", "watch", "core | {p50:+.0%} | {p99:+.0%} | {throughput:+.0%} | {sidecar_share_of_a_core:.1%} |"),
        ("watching", "watch", "at most {sidecar_memory_mib:.0f} MiB"),
        ("watching", "alarms", "RobustnessIntegrityMismatch | {rounds_to_integrity_alert:.0f} rounds"),
        ("watching", "alarms", "with nothing replayed {rounds_to_proven_loss_without_replay:.0f} |"),
        ("watching", "endurance", "earlier, narrower model) {rss_at_1000_vs_100:.2f} times the memory"),
    ],
)
def test_what_benchmarks_found_stands_on_the_pages(where: str, record: str, said: str) -> None:
    """The figures that text names, as they are in the records."""
    ratios = json.loads((ROOT / "benchmarks" / "results" / f"{record}.json").read_text(encoding="utf-8"))["ratios"]
    changes = {name.removeprefix("user_").replace("_with_probes_vs_without", ""): r - 1 for name, r in ratios.items()}
    text = " ".join(page(f"results/{where}").split())
    assert said.format_map(changes | ratios).replace("%", " %") in text


def recorded(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_the_shipped_model_under_all_threats_is_the_reports() -> None:
    """Each criterion's count, share and bounds; the best and the worst corruption."""
    text = page("results/threats")
    report, _ = read_report(ROOT / "benchmarks" / "results" / "resnet18_threats_gate.json")
    assert report.candidate.model_sha256 == shipped_report().candidate.model_sha256
    kinds = {row.criterion.rpartition(", ")[2]: row for row in report.criteria if "each" in row.criterion}
    shares = {name: present(row.k) / present(row.n) for name, row in kinds.items()}
    assert (shares["contrast"], shares["pixelate"]) == (min(shares.values()), max(shares.values()))
    rows = [row for row in report.criteria if "each" not in row.criterion]
    for row in [*rows, kinds["contrast"], kinds["pixelate"]]:
        values = (present(row.k) / present(row.n), present(row.lower), present(row.upper))
        share, low, high = (f"{100 * value:.1f}" for value in values)
        assert f" | {share} | {low} to {high} |" in text, row.criterion
    assert f"all {len(report.criteria)} of them together" in text


def test_pools_stand_on_the_page_of_threats() -> None:
    """Each threat's share with its bounds under the three pools, and the pairs that the text names."""
    text, rows = page("results/threats"), recorded("pools_16")
    found = {(row["threat"], row["pool"]): row for row in rows}
    pools = ("clean", "linf", "mixed")
    for threat in {row["threat"] for row in rows}:
        cells = (found[threat, pool] for pool in pools)
        assert " | ".join(f"{row['right']:.1f} [{row['low']:.1f}, {row['high']:.1f}]" for row in cells) in text
    assert " | ".join(f"{found['clean', pool]['mean corruptions']:.1f}" for pool in pools) in text
    named = [
        ("l2:0.5", "linf"),
        ("l1:12", "linf"),
        ("patch:2%", "linf"),
        ("rotation:30", "linf"),
        ("shift:10%", "linf"),
    ]
    named += [("4/255", "mixed"), ("patch:2%", "mixed"), ("rotation:30", "mixed")]
    for where in named:
        more, fewer = found[where]["more"], found[where]["fewer"]
        assert f"{more} and {fewer}" in text or f"{more} only it holds and {fewer}" in text, where


def test_who_decides_stands_on_the_page_of_the_shipped_model() -> None:
    """A row for each provider and precision, as bench-providers left it."""
    text, rows = page("results/shipped-model"), recorded("providers")
    assert [(row["provider"], row["precision"]) for row in rows] == [
        ("cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("cpu", "int8"), ("openvino", "int8")
    ]  # fmt: skip
    for row in rows:
        held = f"{row['replayed']:.1f} [{row['lower']:.1f}, {row['upper']:.1f}]"
        moved = f"{row['difference']:+.1f} [{row['difference_lower']:+.1f}, {row['difference_upper']:+.1f}]"
        anew = f"{row['attacked']:.1f} ({row['attacked_lost']} lost, {row['attacked_won']} won)"
        cells = [row["provider"], row["precision"], f"{row['clean']:.1f}", held, moved, f"{row['agree']:.1f}", anew]
        assert f"| {' | '.join(cells)} |" in text


def test_the_sidecars_delays_stand_on_its_page() -> None:
    """A row for each number of images a round and at the gate, as bench-paging left it."""

    def pair(row: dict[str, Any], points: int) -> str:
        median, most = row[f"minutes_to_page_{points}_points"], row[f"p90_{points}_points"]
        return f"{median:,.0f}, {'over a week' if most >= 7 * 24 * 60 else f'{most:,.0f}'}"

    text = page("sre")
    for row in recorded("paging"):
        delays = " | ".join(pair(row, points) for points in (5, 10, 20))
        assert f"| {row['images_a_round']} | {row['gate_images']} | {delays} |" in text
    worst = max(row["false_pages_a_month"] for row in recorded("paging"))
    assert f"False pages, simulated: {100 * worst:.1f} % of 200 months at most" in text
    assert f"simulated, {100 * worst:.1f} % of 200 at most" in text


def test_how_soon_bounds_follow_stands_on_the_page_of_watching() -> None:
    """A row for each change after 500 rounds, as bench-bounds left it; in no stream was a bound wrong about its mean,
    or lower above upper, and fewer than were allowed to are where it could be seen."""
    text = page("results/watching")
    rows = recorded("bounds")
    for row in rows:
        if row.get("changes_after") == 500:
            now = f"{row['until_now_median']:.0f} ({row['until_now_p90']:.0f})"
            page_in = f"{row['pages_median']:.0f}" if "pages_median" in row else ""
            ends = f"{row['page_ends_median']:.0f}" if "page_ends_median" in row else ""
            assert f"| {row['stream']} | {now} | {row['former_until_now_median']:.0f} | {page_in} | {ends} |" in text
    assert not any(row.get("wrong") or row.get("lower_above_upper") for row in rows)
    assert all(row["wrong_of_20_percent"] < 0.2 for row in rows if "wrong_of_20_percent" in row)
    assert max(row["width_1000_vs_former"] for row in rows if "width_1000_vs_former" in row) < 1.15


def test_peers_are_compared_on_the_network_that_is_shipped() -> None:
    """What bench-attacks rebuilds from the file answers as the file does."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    (expected,) = ort.InferenceSession(SHIPPED, providers=["CPUExecutionProvider"]).run(None, {"images": images})
    with torch.no_grad():
        found = shipped(SHIPPED)(to_float(torch.from_numpy(images))).numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_peers_leave_the_network_as_it_was() -> None:
    """torchattacks puts back the mode that it met; in training mode the network would be another one for ART."""
    network = shipped(SHIPPED)
    x, y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    search = torchattacks_square(Counted(network), x, y, threat_of("linf", "8/255"), queries=2, seed=0)
    assert search is not None
    search()
    assert not any(module.training for module in network.modules())


def test_what_transfers_is_what_the_gate_recorded() -> None:
    """Both attacks from all surrogates together, with their intervals."""
    text = page("results/shipped-model")
    report = shipped_report()
    together = report.transfer[-1]
    assert "+" in together.about.surrogate
    text = " ".join(text.split())
    for share in (attack.accuracy for attack in together.attacks):
        low, high = (100 * bound for bound in clopper_pearson(share.k, share.n, 0.95))
        assert f"{100 * share.value:.1f} % [{low:.1f}, {high:.1f}]" in text


@pytest.mark.parametrize(("name", "heading"), [("table1_small", "## Claimed"), ("alpha_small", "## The sweep")])
def test_campaign_tables_are_made_from_their_records(name: str, heading: str) -> None:
    """The whole table is what the records give now; of every section on the page, each row stands in it."""
    text = page("results/table1")
    folder, campaign = ROOT / "benchmarks" / "results" / name, load_campaign(name)
    planned = [run.name for run in runs(campaign, name)]
    records = [read_record(folder / "records" / f"{run}.json") for run in planned]
    whole = (folder / "table.md").read_text(encoding="utf-8")
    plots = re.findall(r"!\[(.*?)\]", whole)
    assert plots
    assert all((folder / plot).is_file() for plot in plots)
    assert table(campaign, planned, records, plots) == whole
    part = text[text.index(heading) :]
    part = part[: part.index("\n!")]
    rows = [line for line in part.splitlines() if line.startswith(("|", "###"))]
    assert len(rows) > 30
    assert [row for row in rows if row.removeprefix("#") not in whole.splitlines()] == []
