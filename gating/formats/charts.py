"""Drawings of a report as inline SVG: no script, no font, colours from the page's style sheet, so light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# Drawn at the width of a phone's column, and stretched from there: text stays legible when the page is narrow.
WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 40


@dataclass(frozen=True)
class Reading:
    """An accuracy with its bounds, all in [0, 1], at a place x. kind: `robust`, `clean` or `transfer`."""

    x: float
    value: float
    lower: float
    upper: float
    label: str
    kind: str = "robust"


@dataclass(frozen=True)
class Known:
    """What was known after so many images: bounds in [0, 1]."""

    images: int
    lower: float
    upper: float


@dataclass(frozen=True)
class Plane:
    """x from 0 to `most` and y from 0 to 1, on a drawing of WIDTH times HEIGHT. left: pixels before x = 0."""

    most: float
    left: int = LEFT

    def x(self, value: float) -> float:
        return round(self.left + (WIDTH - self.left - RIGHT) * value / self.most, 1)

    def y(self, share: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)


def accuracy_over_eps(points: Sequence[Reading], thresholds: Sequence[tuple[float, float]]) -> Markup:
    """Accuracy against the radius, with intervals; thresholds are (radius, share) that the policy asks for."""
    plane = Plane(1.08 * max(point.x for point in points) or 1.0, LEFT + 20)  # a dot at 0 stays clear of the scale
    line = sorted((point for point in points if point.kind != "transfer"), key=lambda point: point.x)
    parts = [*_frame(plane, "radius of the perturbation"), _labels(plane, line)]
    upper = [(plane.x(point.x), plane.y(point.upper)) for point in line]
    lower = [(plane.x(point.x), plane.y(point.lower)) for point in line]
    parts.append(_shape("polygon", "band", [*upper, *reversed(lower)]))
    parts.append(_shape("polyline", "line", [(plane.x(point.x), plane.y(point.value)) for point in line]))
    for point in points:
        x, y = plane.x(point.x), plane.y(point.value)
        parts.append(_line("whisker", x, plane.y(point.lower), x, plane.y(point.upper)))
        title = _title(
            f"{point.label}: {100 * point.value:.1f} %, {100 * point.lower:.1f} to {100 * point.upper:.1f} %"
        )
        parts.append(Markup('<circle class="dot {}" cx="{}" cy="{}" r="5">{}</circle>').format(point.kind, x, y, title))
    for x, share in thresholds:
        title = _title(f"threshold {100 * share:.1f} %")
        parts.append(_line("threshold", plane.x(x) - 13, plane.y(share), plane.x(x) + 13, plane.y(share), title))
    return _drawing(parts, "Accuracy over the radius of the perturbation")


def bounds_over_images(history: Sequence[Known], threshold: float) -> Markup:
    """The bounds of a criterion as images came in, against its threshold."""
    most = max(bounds.images for bounds in history)
    plane = Plane(1.02 * most)
    parts = list(_frame(plane, "images attacked"))
    parts += [
        _text("tick", plane.x(images), HEIGHT - BOTTOM + 16, f"{images:,}", "middle") for images in _round_steps(most)
    ]
    steps = [Known(0, 0.0, 1.0), *history]
    upper = [(plane.x(one.images), plane.y(one.upper)) for one in steps]
    lower = [(plane.x(one.images), plane.y(one.lower)) for one in steps]
    parts.append(_shape("polygon", "band", [*upper, *reversed(lower)]))
    parts += [_shape("polyline", "line", upper), _shape("polyline", "line", lower)]
    y = plane.y(threshold)
    parts.append(_line("threshold", LEFT, y, WIDTH - RIGHT, y))
    parts.append(_text("tick threshold-text", LEFT + 6, y - 6, f"threshold {100 * threshold:.1f} %", "start"))
    for bound, away in ((steps[-1].upper, -6), (steps[-1].lower, 15)):  # above the band, and below it
        beside = plane.y(bound) + away
        if beside - 14 < y < beside + 5:  # the text would lie on the threshold
            beside = y + away
        beside = min(max(beside, TOP), HEIGHT - BOTTOM - 4)
        parts.append(_text("tick strong", WIDTH - RIGHT - 4, beside, f"{100 * bound:.1f} %", "end"))
    return _drawing(parts, "Bounds of the criterion over the images attacked")


def interval(lower: float, upper: float, value: float | None, threshold: float | None) -> Markup:
    """A bar from 0 to 1 with bounds, the measured share and the threshold: one row of a table."""
    parts = [Markup('<rect class="track" width="100" height="12"/>'), _bar("bounds", lower, upper)]
    if value is not None:
        parts.append(_mark("value", value))
    if threshold is not None:
        parts.append(_mark("threshold", threshold))
    return _strip(parts)


def remains(left: float, lost: float) -> Markup:
    """A bar from 0 to 1: what is still right after an attack, and what that attack took."""
    return _strip(
        [
            Markup('<rect class="track" width="100" height="12"/>'),
            _bar("left", 0, left),
            _bar("lost", left, left + lost),
        ]
    )


def _frame(plane: Plane, below: str) -> Iterable[Markup]:
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = plane.y(share)
        yield _line("grid", LEFT, y, WIDTH - RIGHT, y)
        yield _text("tick", LEFT - 6, y + 4, f"{100 * share:.0f} %", "end")
    yield _text("tick", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, below, "middle")


def _labels(plane: Plane, line: Sequence[Reading]) -> Markup:
    """The radii under the axis; one that would touch its neighbour is left out."""
    parts, free = [], float("-inf")
    for point in line:
        half = 3.8 * len(point.label)
        if plane.x(point.x) - half > free:
            parts.append(_text("tick", plane.x(point.x), HEIGHT - BOTTOM + 16, point.label, "middle"))
            free = plane.x(point.x) + half
    return Markup("").join(parts)


def _round_steps(most: int) -> list[int]:
    """Some three to six round numbers from 0 to `most`."""
    size = next(
        base * 10**power
        for power in range(12)
        for base in (1, 2, 5)
        if most <= 5 * base * 10**power
    )  # fmt: skip  # read as: the first of 1, 2, 5, 10, 20, 50 ...
    return list(range(0, most + 1, size))


def _drawing(parts: Iterable[Markup], name: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, name, Markup("").join(parts)
    )


def _strip(parts: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg class="strip" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">{}</svg>'
    ).format(Markup("").join(parts))


def _bar(kind: str, begin: float, end: float) -> Markup:
    return Markup('<rect class="{}" x="{:.2f}" width="{:.2f}" height="12"/>').format(
        kind, 100 * begin, 100 * max(end - begin, 0)
    )


def _mark(kind: str, share: float) -> Markup:
    return Markup('<line class="{0}" x1="{1:.2f}" x2="{1:.2f}" y1="0" y2="12"/>').format(kind, 100 * share)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, title: str = "") -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>').format(kind, x1, y1, x2, y2, title)


def _shape(tag: str, kind: str, corners: Sequence[tuple[float, float]]) -> Markup:
    return Markup('<{} class="{}" points="{}"/>').format(tag, kind, " ".join(f"{x},{y}" for x, y in corners))


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(escape(text))
