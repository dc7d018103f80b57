"""Whether the sidecar's bounds are true while an accuracy changes, and how soon they follow: `make bench-bounds`.

Streams of rounds are judged as `dfmcl.monitoring.bounds` judges them, and each bound is compared with the very mean it
is about: drops and rises of several sizes and times, drifts, an accuracy that alternates. No model is involved. Beside
it, what was published before: an e-detector's two bounds "of now", whose stakes are never dropped.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from scipy.stats import beta

from benchmarks.result import write_result
from dfmcl.monitoring.bounds import RISK, WINDOWS, least_rejected, limit, rejects, undivided, windows_of

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]

IMAGES, POOL = 24, 450  # a round draws so many of so many
MONTH = 43_200  # rounds of one a minute
FIGURES = 5  # of a watch with two transfer attacks and a query attack
CHANGES = ((0.90, 0.85), (0.90, 0.60), (0.90, 0.10), (0.60, 0.90), (0.30, 0.50))
TIMES = (5, 50, 500)  # round after which it changes
HORIZON = 250  # rounds afterwards
SLACK = 0.02  # the bar below the better accuracy: 2 points, as about 2,000 images of 90 % at the gate leave
# A limit at which bounds would be seen to err in a simulation, were they to: a promise of 20 %, not of 1 % in a month.
SEEN = 0.2
FORMER_RATIOS: Floats = np.exp(-0.08 * 2 ** (np.arange(9) / 2))
FORMER_ENOUGH = 10.0
WIDTHS = (10, 100, 1000)  # rounds of a steady accuracy after which widths are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = scenarios()
    rows = []
    for number, (name, truth, change) in enumerate(track(kinds, "kinds of streams")):
        right = drawn(np.random.default_rng([arguments.seed, number]), truth, arguments.streams)
        bar = max(truth) - SLACK
        new, old = now_judged(right, truth, bar), formerly_judged(right, truth, bar)
        rows.append({"stream": name, "changes_after": change, **figures(new, old, truth, bar, change)})
    rows += [steady(np.random.default_rng([arguments.seed, 99]), accuracy, 20) for accuracy in (0.9, 0.75)]
    worst = {
        "streams_wrong": max(row.get("wrong", 0.0) for row in rows),
        "streams_wrong_where_20_percent_are_allowed": max(row.get("wrong_of_20_percent", 0.0) for row in rows),
        "streams_lower_above_upper": max(row.get("lower_above_upper", 0.0) for row in rows),
        "former_streams_wrong_about_now": max(row.get("former_wrong", 0.0) for row in rows),
        "former_streams_lower_above_upper": max(row.get("former_lower_above_upper", 0.0) for row in rows),
        "rounds_to_page_vs_former": max(row.get("page_vs_former", 0.0) for row in rows),
        **{
            f"width_after_{rounds}_rounds_vs_former": max(row.get(f"width_{rounds}_vs_former", 0.0) for row in rows)
            for rounds in WIDTHS
        },
    }
    conditions = {
        "n": f"{arguments.streams} streams of each kind; 20 of widths",
        "seed": arguments.seed,
        "note": f"rounds of {IMAGES} of {POOL} images; limit of a month of {MONTH:,} rounds and {2 * FIGURES} bounds;"
        " shares are of streams in which it ever happened; wrong: about the mean over the window, or about a stretch;"
        f" wrong_of_20_percent: the same with a limit that allows it in {SEEN:.0%} of the streams; until_now: round"
        " after the change from which on the interval holds the accuracy of now, median and nine in ten; pages: rounds"
        f" from the change until a loss is proven, {100 * SLACK:.0f} points below the better accuracy; page_ends: from"
        " a rise until it is no more; pages_by_mean: were the upper bound over the whole window what pages;"
        " binomial_width: of exact binomial intervals of all windows together; page_lost: a page"
        " that was there was gone in a round while nothing had changed;"
        " former_wrong: one of the former bounds excluded the accuracy of now; former bounds on a grid of 1 point, of"
        " 0.2 for widths; ratios are the largest of all rows",
    }
    write_result("bounds", "The sidecar's bounds while an accuracy changes", rows, worst, conditions)


def scenarios() -> list[tuple[str, Floats, int | None]]:
    """Name, accuracy of each round `(T,)`, and the round after which it changes, if there is one."""
    found: list[tuple[str, Floats, int | None]] = [
        (f"{before:.2f} to {after:.2f}", np.r_[np.full(at, before), np.full(HORIZON, after)], at)
        for before, after in CHANGES
        for at in TIMES
    ]
    third = np.full(200, 1.0)
    return [
        *found,
        ("drift, 0.90 to 0.60 in 400 rounds", np.r_[0.9 * third, np.linspace(0.9, 0.6, 400), 0.6 * third], None),
        ("drift, 0.60 to 0.90 in 400 rounds", np.r_[0.6 * third, np.linspace(0.6, 0.9, 400), 0.9 * third], None),
        ("0.90 and 0.60 in turn, each round", np.tile([0.9, 0.6], 400), None),
        ("0.90 and 0.60 in turn, 50 rounds each", np.tile(np.repeat([0.9, 0.6], 50), 8), None),
        ("0.90, an outage of 20 rounds, 0.90", np.r_[np.full(200, 0.9), np.zeros(20), np.full(580, 0.9)], None),
        ("0.75 throughout", np.full(800, 0.75), None),
    ]


def drawn(stream: np.random.Generator, truth: Floats, count: int) -> Counts:
    """How many of a round's images are right, `(count, T)`, and the truth that a pool of whole images has, in place."""
    good = np.round(truth * POOL).astype(np.int64)
    truth[:] = good / POOL
    return np.stack([stream.hypergeometric(k, POOL - k, IMAGES, count) for k in good], axis=1)


@dataclass
class Judged:
    """By stream and round `(N, T)`.

    outside: the interval does not hold the accuracy of now; paged_by_mean: its upper bound alone proves the loss.
    """

    wrong: Flags
    wrong_of_seen: Flags
    inverted: Flags
    outside: Flags
    paged: Flags
    paged_by_mean: Flags


def now_judged(right: Counts, truth: Floats, bar: float, seen: float = SEEN) -> Judged:
    """By `dfmcl.monitoring.bounds`, round after round. seen: the promise of wrong_of_seen, of these streams' own
    rounds."""
    strict, loose = limit(MONTH, 2 * FIGURES), 2 * right.shape[1] / seen
    found = Judged(*(np.zeros(right.shape, bool) for _ in range(6)))
    for at in range(right.shape[1]):
        asked = IMAGES * np.arange(1, at + 2)  # in the last 1, 2, ... rounds; right ones of them; their mean accuracy
        held = right[:, at::-1].cumsum(axis=1)
        means = truth[at::-1].cumsum() / np.arange(1, at + 2)
        chosen = chosen_windows(held, asked)
        for window in np.unique(chosen):
            those = chosen == window
            starts = held[those, :window], np.broadcast_to(asked[:window], (those.sum(), window))
            found.outside[those, at] = excluded(*starts, truth[at], strict)
            for wrong, enough in ((found.wrong_of_seen, loose), (found.wrong, strict)):
                wrong[those, at] = excluded(*starts, means[window - 1], enough)
                wrong[those, at] |= proven_below(*starts, means[:window].min(), enough)
                if not wrong[those, at].any():
                    break  # neither is one by a stricter limit
            found.paged[those, at] = proven_below(*starts, bar, strict)
            found.paged_by_mean[those, at] = proven_below(starts[0][:, -1:], starts[1][:, -1:], bar, strict)
        if at % 10 == 0:  # it cannot be; looked at now and then
            lower, upper = interval(held, chosen, strict)
            found.inverted[:, at] = lower > upper
    return found


def chosen_windows(held: Counts, asked: Counts) -> Counts:
    """In rounds, `(N,)`. held: right ones of the last 1, 2, ... rounds, `(N, T)`; asked: images in these, `(T,)`."""
    windows = windows_of(held.shape[1])
    counts = held[:, windows - 1]
    return np.asarray(windows[undivided(counts, np.broadcast_to(asked[windows - 1], counts.shape))])


def proven_below(right: Counts, images: Counts, accuracy: float, limit: float) -> Flags:
    """Whether stakes `(N, S)` reject an accuracy together."""
    return rejects(right, images, np.full(len(right), accuracy), limit)


def excluded(right: Counts, images: Counts, accuracy: float, limit: float) -> Flags:
    """Whether the oldest of these stakes `(N, S)`, or that of the failures, rejects an accuracy by itself."""
    right, images = right[:, -1:], images[:, -1:]
    return proven_below(right, images, accuracy, limit) | proven_below(images - right, images, 1 - accuracy, limit)


def interval(held: Counts, chosen: Counts, limit: float) -> tuple[Floats, Floats]:
    """Lower and upper bound over the last `chosen (N,)` rounds; held: right ones of the last 1, 2, ..., `(N, T)`."""
    right, images = held[np.arange(len(held)), chosen - 1][:, None], IMAGES * chosen[:, None]
    return 1 - least_rejected(images - right, images, limit), least_rejected(right, images, limit)


class Former:
    """The e-detector whose bounds were published before: of one side, against the accuracies of a grid."""

    def __init__(self, streams: int, grid: Floats, limit: float) -> None:
        self.grid, self.limit = grid, limit
        self.prices = np.log1p(-grid[:, None] * (1 - FORMER_RATIOS))
        self.owned = np.full((streams, len(grid), len(FORMER_RATIOS)), -np.inf)

    def after(self, right: Counts) -> Floats:
        """The bound after a round, `(streams,)`."""
        bet = right[:, None, None] * np.log(FORMER_RATIOS) - IMAGES * self.prices
        most = np.log(self.limit * len(FORMER_RATIOS) * FORMER_ENOUGH)
        self.owned = np.minimum(np.log1p(np.exp(self.owned)) + bet, most)
        rejected = np.exp(self.owned).mean(axis=-1) >= self.limit
        return np.asarray(np.where(rejected.any(axis=-1), self.grid[rejected.argmax(axis=-1)], 1.0))


def formerly_judged(right: Counts, truth: Floats, bar: float) -> Judged:
    """By the bounds that were published before, as they were read: of now."""
    found = Judged(*(np.zeros(right.shape, bool) for _ in range(6)))
    below, above = (Former(len(right), np.linspace(0, 1, 101), MONTH * 2 * FIGURES / RISK) for _ in range(2))
    for at in range(right.shape[1]):
        upper, lower = below.after(right[:, at]), 1 - above.after(IMAGES - right[:, at])
        found.outside[:, at] = (upper < truth[at] - 1e-9) | (lower > truth[at] + 1e-9)
        found.inverted[:, at] = lower > upper + 1e-9
        found.paged[:, at] = upper <= bar + 1e-9
    return found


def figures(new: Judged, old: Judged, truth: Floats, bar: float, change: int | None) -> dict[str, Any]:
    """Of all streams of a kind."""
    row: dict[str, Any] = {
        "wrong": ever(new.wrong),
        "wrong_of_20_percent": ever(new.wrong_of_seen),
        "lower_above_upper": ever(new.inverted),
        "rounds_that_hold_now": float(1 - new.outside.mean()),
    }
    if change is not None:
        until = last(new.outside[:, change:])
        row |= {"until_now_median": float(np.median(until)), "until_now_p90": float(np.quantile(until, 0.9))}
        if truth[-1] < truth[0]:
            pages, formerly = (first(judged.paged[:, change:]) for judged in (new, old))
            row |= {"pages_median": float(np.median(pages)), "pages_p90": float(np.quantile(pages, 0.9))}
            row |= {"pages_by_mean_median": float(np.median(first(new.paged_by_mean[:, change:])))}
            row |= {"former_pages_median": float(np.median(formerly))}
            row |= {"page_vs_former": row["pages_median"] / row["former_pages_median"]}
            row |= {"page_lost": lost(new.paged[:, change:]), "former_page_lost": lost(old.paged[:, change:])}
        else:
            row |= {"page_ends_median": float(np.median(last(new.paged[:, change:])))}
            row |= {"former_page_ends_median": float(np.median(last(old.paged[:, change:])))}
    formerly_until = (
        {} if change is None else {"former_until_now_median": float(np.median(last(old.outside[:, change:])))}
    )
    return row | {"former_wrong": ever(old.outside), "former_lower_above_upper": ever(old.inverted)} | formerly_until


def steady(stream: np.random.Generator, accuracy: float, streams: int) -> dict[str, Any]:
    """How wide the interval is while nothing changes, beside the former one's."""
    right = drawn(stream, np.full(max(WIDTHS), accuracy), streams)
    below, above = (Former(streams, np.linspace(0, 1, 501), MONTH * 2 * FIGURES / RISK) for _ in range(2))
    row: dict[str, Any] = {"stream": f"{accuracy:.2f}, widths"}
    for number in range(1, max(WIDTHS) + 1):
        former = below.after(right[:, number - 1]) - 1 + above.after(IMAGES - right[:, number - 1])
        if number in WIDTHS:
            held = right[:, number - 1 :: -1].cumsum(axis=1)
            chosen = chosen_windows(held, IMAGES * np.arange(1, number + 1))
            lower, upper = interval(held, chosen, limit(MONTH, 2 * FIGURES))
            now = upper - lower
            row |= {f"width_{number}": float(now.mean()), f"former_width_{number}": float(former.mean())}
            row[f"binomial_width_{number}"] = float(exact_width(held, chosen).mean())
            row[f"width_{number}_vs_former"] = row[f"width_{number}"] / row[f"former_width_{number}"]
    return row


def exact_width(held: Counts, chosen: Counts) -> Floats:
    """Of exact binomial intervals (Clopper & Pearson 1934) of the same rounds, were all windows' promised together."""
    risk = RISK / (MONTH * 2 * FIGURES * len(WINDOWS))
    right, images = held[np.arange(len(held)), chosen - 1], IMAGES * chosen
    upper = np.where(right < images, beta.isf(risk, right + 1, images - right), 1.0)
    return np.asarray(upper - np.where(right > 0, beta.ppf(risk, right, images - right + 1), 0.0))


def ever(flags: Flags) -> float:
    """Share of streams in which it happened."""
    return float(flags.any(axis=1).mean())


def lost(flags: Flags) -> float:
    """Share of streams in which it ended."""
    return ever(flags[:, :-1] & ~flags[:, 1:])


def first(flags: Flags) -> Counts:
    """Rounds until it happened, as many as there are where it did not."""
    return np.asarray(np.where(flags.any(axis=1), flags.argmax(axis=1) + 1, flags.shape[1]))


def last(flags: Flags) -> Counts:
    """Rounds until it happened for the last time; 0 where it did not."""
    return np.asarray(np.where(flags.any(axis=1), flags.shape[1] - flags[:, ::-1].argmax(axis=1), 0))


if __name__ == "__main__":
    main()
