"""How often the sequential gate errs, and how many images it needs: `make bench-gate`.

10,000 images, threshold 0.45, alpha 5 %, a look after every image. For each true number of successes, random orders are
drawn and judged as `dfmcl.robustness.sequential` judges them, until it decides; beside the simulation stands the exact
distribution, by dynamic programming over all orders. Three other rules at the same alpha, exact only, for comparison:
an exact fixed-sample bound looked at after every image (which is not valid), betting on a uniform prior over all
counts, and a single bet that knows the true share (which no rule can know). No model and no data set is involved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.special import gammaln
from scipy.stats import beta, hypergeom

from benchmarks.result import write_result
from dfmcl.robustness.sequential import ConfidenceSequence, Counts, log_wealth

POPULATION, THRESHOLD, ALPHA = 10_000, 0.45, 0.05
NEEDED = round(THRESHOLD * POPULATION)  # the smallest count that meets the threshold
EFFECTS = (-1000, -500, -200, -1, 0, 200, 500, 1000)  # images above the threshold; 100 are one point
NEVER = POPULATION + 1  # a boundary that no order reaches
CHUNK = 100  # orders in memory at once

# (successes, seen, population, null) to whether the null is rejected, all counts (T,). Successes only help.
Rejects = Callable[[Counts, Counts, int, int], NDArray[np.bool_]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=10_000, help="simulated orders for each true share")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    limits = both_boundaries(betting)
    found: dict[tuple[str, int], Stops] = {}
    for number, effect in enumerate(EFFECTS):
        stream = np.random.default_rng([arguments.seed, number])
        label = f"{effect:+d} images"
        found["gate, simulated", effect] = simulated(stream, NEEDED + effect, arguments.orders, *limits, label)
        found["gate, exact", effect] = exact(NEEDED + effect, *limits)
    others: dict[str, Rejects] = {"Clopper-Pearson, peeking": peeking, "uniform prior": uniform_prior}
    for effect in (-1, 500, 1000):
        for name, rejects in others.items():
            found[name, effect] = exact(NEEDED + effect, *both_boundaries(rejects))
    for effect in (200, 500, 1000):
        passes, fails = boundary(single_bet(NEEDED + effect), POPULATION, NEEDED - 1), np.full(POPULATION, NEVER)
        found["one bet, share known", effect] = exact(NEEDED + effect, passes, fails)
    rows = [described(rule, effect, stops) for (rule, effect), stops in sorted(found.items(), key=lambda item: item[0])]
    median = {key: stops.quantile(0.5) for key, stops in found.items()}
    ratios = {
        "false_pass_rate_at_threshold": found["gate, simulated", -1].before_the_end[0],
        "false_pass_rate_at_threshold_exact": found["gate, exact", -1].before_the_end[0],
        "false_fail_rate_at_threshold": found["gate, simulated", 0].before_the_end[1],
        "false_fail_rate_at_threshold_exact": found["gate, exact", 0].before_the_end[1],
        "median_images_at_plus_5_points": median["gate, simulated", 500],
        "median_images_at_plus_10_points": median["gate, simulated", 1000],
        "median_images_at_plus_5_points_vs_share_known": median["gate, exact", 500]
        / median["one bet, share known", 500],
        "median_images_at_plus_5_points_vs_uniform_prior": median["gate, exact", 500] / median["uniform prior", 500],
        "ms_for_a_look_at_100_more_images": 1000 * seconds_a_look(),
    }
    conditions = {
        "n": f"{arguments.orders} random orders of {POPULATION} images for each true share; exact: all orders",
        "seed": arguments.seed,
        "note": f"threshold {THRESHOLD}, alpha {ALPHA} for each side, looks after every image; passed and failed:"
        " shares of the orders, decided before the last image (with it the share is known); images: over all orders;"
        " information_limit: mean images of the best test, with replacement, log(1 / alpha) over the Kullback-Leibler"
        " divergence from the nearest share on the other side of the threshold",
    }
    write_result("gate", "Sequential gate", rows, ratios, conditions)


@dataclass(frozen=True)
class Stops:
    """How often it ended how, after how many images: probabilities `(N + 1,)` of passing and failing after t = 0..N."""

    passed: NDArray[np.float64]
    failed: NDArray[np.float64]

    @property
    def before_the_end(self) -> tuple[float, float]:
        """Shares of the orders that passed and failed before the last image."""
        return float(self.passed[:-1].sum()), float(self.failed[:-1].sum())

    def quantile(self, q: float) -> int:
        """Images that a share q of the orders needs at most; N where that share is not decided before."""
        return int(np.searchsorted(np.cumsum(self.passed + self.failed)[:-1], q))


def boundary(rejects: Rejects, population: int, null: int) -> Counts:
    """The fewest successes among t = 1..N that reject `null`, `(N,)`; t + 1 where no number does."""
    seen = np.arange(1, population + 1)
    low, high = np.zeros_like(seen), seen + 1
    while (low < high).any():
        middle = (low + high) // 2
        enough = rejects(np.minimum(middle, seen), seen, population, null) | (middle > seen)
        low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
    return high


def both_boundaries(rejects: Rejects) -> tuple[Counts, Counts]:
    """Of successes to pass, and of failures to fail, at the threshold."""
    return boundary(rejects, POPULATION, NEEDED - 1), boundary(rejects, POPULATION, POPULATION - NEEDED)


def exact(count: int, passes: Counts, fails: Counts) -> Stops:
    """The distribution over all orders of `count` successes among N = len(passes) images, step by step.

    State: the number of successes so far, of those orders that nothing has stopped; the next one succeeds with
    probability (count - S) / (N - t). `passes` and `fails` are boundaries of successes and of failures.
    """
    population = len(passes)
    alive = np.zeros(count + 2)
    alive[0] = 1.0
    passed, failed = np.zeros(population + 1), np.zeros(population + 1)
    for t in range(1, population + 1):
        window = slice(max(0, t - 1 - (population - count)), min(t - 1, count) + 2)
        successes = np.arange(window.start, window.stop)
        succeeds = np.clip((count - successes) / (population - t + 1), 0, 1)
        step = alive[window] * (1 - succeeds)
        step[1:] += (alive[window] * succeeds)[:-1]
        stop, fall = successes >= passes[t - 1], t - successes >= fails[t - 1]
        passed[t], failed[t] = step[stop].sum(), step[fall & ~stop].sum()
        alive[window] = np.where(stop | fall, 0, step)
    return Stops(passed, failed)


def simulated(
    stream: np.random.Generator, count: int, orders: int, passes: Counts, fails: Counts, label: str = ""
) -> Stops:
    """The same from random orders."""
    population = len(passes)
    passed, failed = np.zeros(population + 1), np.zeros(population + 1)
    for size in track(list(chunks(orders)), description=label):
        outcomes = np.broadcast_to(np.arange(population) < count, (size, population))
        successes = np.cumsum(stream.permuted(outcomes, axis=1), axis=1, dtype=np.int32)
        above = successes >= passes
        below = np.arange(1, population + 1) - successes >= fails
        stopped = above | below
        first = stopped.argmax(axis=1)
        rows = np.arange(size)
        decided = stopped[rows, first]
        np.add.at(passed, first[decided & above[rows, first]] + 1, 1 / orders)
        np.add.at(failed, first[decided & ~above[rows, first]] + 1, 1 / orders)
    return Stops(passed, failed)


def chunks(orders: int) -> Iterator[int]:
    while orders > 0:
        yield min(CHUNK, orders)
        orders -= CHUNK


def betting(successes: Counts, seen: Counts, population: int, null: int) -> NDArray[np.bool_]:
    """The gate's rule."""
    return np.asarray(log_wealth(successes, seen, population, null) >= -np.log(ALPHA))


def peeking(successes: Counts, seen: Counts, population: int, null: int) -> NDArray[np.bool_]:
    """Clopper & Pearson's lower bound for a fixed number of images above the null, at whichever look."""
    bound = np.where(successes > 0, beta.ppf(ALPHA, np.maximum(successes, 1), seen - successes + 1), 0)
    return np.asarray(bound > null / population)


def uniform_prior(successes: Counts, seen: Counts, population: int, null: int) -> NDArray[np.bool_]:
    """Prior over posterior of the null, all counts equally likely before. Waudby-Smith & Ramdas 2020, section 2."""
    ratio = -np.log(seen + 1) - hypergeom.logpmf(successes, population, null, seen)
    return np.asarray((successes > seen * null / population) & (ratio >= -np.log(ALPHA)))


def single_bet(count: int) -> Rejects:
    """The likelihood ratio of one count to the null: Wald's test, best possible if that count is the true one."""

    def rejects(successes: Counts, seen: Counts, population: int, null: int) -> NDArray[np.bool_]:
        def likelihood(k: int) -> NDArray[np.float64]:
            gone, left = np.minimum(successes, k), np.minimum(seen - successes, population - k)
            found = gammaln(k + 1) - gammaln(k - gone + 1) + gammaln(population - k + 1)
            return np.asarray(found - gammaln(population - k - left + 1))

        ratio = np.where(seen - successes > population - count, -np.inf, likelihood(count) - likelihood(null))
        return np.asarray((successes > null) | (ratio >= -np.log(ALPHA)))

    return rejects


def described(rule: str, effect: int, stops: Stops) -> dict[str, Any]:
    """A row of the table."""
    passed, failed = stops.before_the_end
    return {
        "rule": rule,
        "above": effect,
        "passed": passed,
        "failed": failed,
        "images_median": stops.quantile(0.5),
        "images_p90": stops.quantile(0.9),
        "information_limit": information_limit(effect) if abs(effect) > 1 else None,
    }


def information_limit(effect: int) -> float:
    """Images that the best test needs in the mean, with replacement. Wald 1945."""
    p, q = (NEEDED + effect) / POPULATION, (NEEDED - (effect > 0)) / POPULATION
    return float(np.log(1 / ALPHA) / (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))))


def seconds_a_look() -> float:
    """What the gate waits for its bounds when another 100 images are through, after 5,000; median of ten."""
    order = np.random.default_rng(0).permutation(np.arange(POPULATION) < NEEDED)
    known = ConfidenceSequence(POPULATION, 1 - ALPHA).after(order[:5000])
    seconds = []
    for _ in range(10):
        begun = time.perf_counter()
        known.after(order[5000:5100])
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds))


if __name__ == "__main__":
    main()
