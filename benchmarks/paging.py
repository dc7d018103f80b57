"""How often the sidecar's bounds page for nothing, and how soon they page for something: `make bench-paging`.

Months of rounds of a model whose accuracies are exactly those that the gate recorded, and days in which one falls,
judged as `dfmcl.monitoring.bounds` judges them: a page is a look at which the mean over some of the last rounds is
proven to be below the recorded accuracy. Images of a round are drawn without replacement from a pool, as the sidecar
draws them.
No model is involved. Beside it, what looking at a 95 % interval of the last six hours would do, which is no such bound.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import norm

from benchmarks.bounds import chosen_windows, proven_below
from benchmarks.result import write_result
from dfmcl.monitoring.bounds import LONGEST, MONTH_SECONDS, RATIOS, RISK, limit
from dfmcl.robustness.statistics import lower_bound

POOL = 10_000
INTERVAL_SECONDS = 60.0
BUDGETS = (8, 32, 128)  # fresh images a round
FIGURES = (
    5  # of a watch with two transfer attacks and a query attack: clean, worst case, and theirs; each has two bounds
)
DROPS = (0.05, 0.10, 0.20)
TRANSFER = 2  # attacks that the gate recorded too
GATE_IMAGES = (1_000, 10_000)
WARM_UP = 24 * 60  # rounds before an accuracy falls: what was before must not make the new slower
LONGEST_DELAY = 7 * 24 * 60
WINDOW = 6 * 60  # rounds of the interval that is looked at for comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--months", type=int, default=1000, help="simulated months at the recorded accuracy")
    parser.add_argument("--falls", type=int, default=400, help="simulated falls of each size")
    parser.add_argument("--recorded", type=float, default=0.75, help="accuracy that the gate recorded")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    month = round(MONTH_SECONDS / INTERVAL_SECONDS)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for number, images in enumerate(BUDGETS):
        stream = np.random.default_rng([arguments.seed, number])
        false, naive = false_pages(stream, arguments.recorded, images, arguments.months, month)
        row: dict[str, Any] = {
            "images_a_round": images,
            "images_a_day": images * round(86_400 / INTERVAL_SECONDS),
            "false_pages_a_month": false,
            "false_pages_a_month_of_an_interval": naive,
        }
        ratios[f"false_pages_a_month_{images}_images"] = false
        for gate, bar in {"exact": arguments.recorded, **bars(arguments.recorded)}.items():
            row = {**row, "gate_images": gate, "bar": bar}
            for drop in DROPS:
                minutes = delays(stream, arguments.recorded, bar, drop, images, arguments.falls) * INTERVAL_SECONDS / 60
                points = round(100 * drop)
                row[f"minutes_to_page_{points}_points"] = float(np.median(minutes))
                row[f"p90_{points}_points"] = float(np.quantile(minutes, 0.9))
                if gate == "exact":
                    ratios[f"median_minutes_to_page_{points}_points_{images}_images"] = float(np.median(minutes))
            rows.append(row)
    months = f"{arguments.months} months of {month:,} rounds of {FIGURES} figures"
    conditions = {
        "n": f"{months}, {arguments.falls} falls of each size",
        "seed": arguments.seed,
        "note": f"a round a minute, recorded accuracy {arguments.recorded}, pool of {POOL:,}; at most {RISK} false"
        f" pages a month are allowed, all {2 * FIGURES} bounds together (simulated as independent, the worst); falls"
        " come after a day at the recorded accuracy; a delay of more than a week counts as a week;"
        " bar: where losses.py pages, by the images of the gate's figure; _of_an_interval:"
        " upper end of a two-sided 95 % Wilson interval over the last six hours, looked at every ten minutes, of one",
    }
    write_result("paging", "False pages and delays of the sidecar", rows, ratios, conditions)


def false_pages(
    stream: np.random.Generator, recorded: float, images: int, months: int, rounds: int
) -> tuple[float, float]:
    """Share of months with a page although nothing changed, of all bounds together, and of the naive interval.

    No stake is dropped here, as the sidecar drops those from before a change: so the first share is an upper bound.
    """
    most, paid = limit(rounds, 2 * FIGURES), payments(recorded, images)
    owned = np.zeros((months * FIGURES, len(RATIOS)))
    paged, naively = np.zeros(months * FIGURES, bool), np.zeros(months * FIGURES, bool)
    recent = np.zeros((WINDOW, months * FIGURES), np.int32)
    for number in track(range(rounds), f"{months} months, {images} images a round"):
        right = drawn(stream, recorded, images, months * FIGURES)
        owned = (owned + 1) * paid[right]
        paged |= owned.mean(axis=1) >= most
        recent[number % WINDOW] = right
        if number + 1 >= WINDOW and number % 10 == 0:  # every tenth minute is enough to show it
            naively |= wilson_upper(recent.sum(axis=0), WINDOW * images) < recorded
    return float(paged.reshape(months, FIGURES).any(axis=1).mean()), float(naively.mean())


def bars(recorded: float) -> dict[str, float]:
    """Where the sidecar pages, by how many images the gate's figure is from; see dfmcl.monitoring.lost."""
    figures = 1 + TRANSFER
    return {f"{n:,}": lower_bound(round(recorded * n), n, 1 - RISK / figures) for n in GATE_IMAGES}


def delays(
    stream: np.random.Generator, recorded: float, bar: float, drop: float, images: int, falls: int
) -> NDArray[np.int64]:
    """Rounds from the fall to the page, `(falls,)`."""
    most, paid = limit(MONTH_SECONDS / INTERVAL_SECONDS, 2 * FIGURES), payments(bar, images)
    right = np.zeros((falls, WARM_UP + LONGEST_DELAY), np.int64)
    owned, waited = np.zeros((falls, len(RATIOS))), np.full(falls, LONGEST_DELAY)
    for number in range(right.shape[1]):
        right[:, number] = drawn(stream, recorded - drop * (number >= WARM_UP), images, falls)
        owned = np.minimum((owned + 1) * paid[right[:, number]], 1e200)
        if number < WARM_UP:
            continue
        # All stakes together own no less than those that are left, whose window is looked for only where it may matter.
        near = np.flatnonzero((waited == LONGEST_DELAY) & (owned.mean(axis=1) >= most))
        waited[near[paged(right[near, : number + 1], images, bar, most)]] = number + 1 - WARM_UP
        if (waited < LONGEST_DELAY).all():
            break
    return waited


def paged(right: NDArray[np.int64], images: int, bar: float, most: float) -> NDArray[np.bool_]:
    """Whether the sidecar pages after such rounds, `(N, T)`, as `dfmcl.monitoring.bounds` decides it."""
    held = right[:, ::-1][:, :LONGEST].cumsum(axis=1)
    asked, found = images * np.arange(1, held.shape[1] + 1), np.zeros(len(held), bool)
    chosen = chosen_windows(held, asked)
    for window in np.unique(chosen):
        those = chosen == window
        found[those] = proven_below(
            held[those, :window], np.broadcast_to(asked[:window], (those.sum(), window)), bar, most
        )
    return found


def payments(accuracy: float, images: int) -> NDArray[np.float64]:
    """What each bet against an accuracy pays for 0, 1, ... right of the images of a round, `(images + 1, RATIOS)`."""
    return np.asarray(RATIOS ** np.arange(images + 1)[:, None] / (1 - accuracy * (1 - RATIOS)) ** images)


def drawn(stream: np.random.Generator, accuracy: float, images: int, count: int) -> NDArray[np.int64]:
    """How many of a round's images are right, `(count,)`."""
    good = round(accuracy * POOL)
    return np.asarray(stream.hypergeometric(good, POOL - good, images, count))


def wilson_upper(right: NDArray[Any], images: int) -> NDArray[np.float64]:
    """Upper end of the two-sided 95 % interval. Wilson 1927."""
    z, share = norm.ppf(0.975), right / images
    spread = z * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return np.asarray((share + z**2 / (2 * images) + spread) / (1 + z**2 / images))


if __name__ == "__main__":
    main()
