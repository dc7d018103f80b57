"""The page for a human who opens the sidecar in a browser: one file, no script, readable without the network.

It renews itself, and says how old each of its figures is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np
from PIL import Image

from dfmcl.monitoring.bounds import Bounds
from dfmcl.monitoring.further import further, gated_threats, how
from dfmcl.monitoring.journal import OUTAGES, Journal, Point, VersionTotals
from dfmcl.monitoring.releases import Release
from dfmcl.monitoring.results import GATEWAY, Example, Round, RoundFailure, RoundResult
from dfmcl.monitoring.snapshot import Identity, Snapshot
from dfmcl.robustness.data import Bytes

LINKS = {"/metrics": "for Prometheus", "/rounds.json": "the rounds below, per image", "/-/healthy": "liveness"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 260, 44, 14, 12, 30
LETTER = 26  # height of a line of the curve's largest letters, in its own units
REFRESH_SECONDS = 15
SIDE = 64  # pixels of an example
AMPLIFIED = 8
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#667;--line:#0b62c4;--band:#0b62c433;--bad:#b3261e;
--good:#156f3b;--rule:#8886}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#15181c;--soft:#9aa3ad;--line:#6cb0ff;--band:#6cb0ff33;
--bad:#ff8a80;--good:#7bd69a}}
body{font:16px/1.45 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:var(--ink);
background:var(--paper)}h1{font-size:1.3em}h2{font-size:1.05em;margin-top:2em}
.verdict{color:var(--ink);font-size:1.25em;font-weight:600;padding:.6em .8em;margin:1em 0;
border-left:.4em solid var(--soft)}
.verdict.bad{border-color:var(--bad);color:var(--bad)}.verdict.good{border-color:var(--good)}
.healed{border-left:.4em solid var(--good);padding:.2em .8em;margin:1em 0}time{white-space:nowrap}
a{color:var(--line)}h1,p,figcaption{overflow-wrap:anywhere}table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:56em}
.scroll{overflow-x:auto}
td,th{padding:.25em 1.2em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
tr.failed td{color:var(--bad)}tr.skipped td{color:var(--soft)}p,figcaption,small{color:var(--soft)}
td:nth-child(-n+3){white-space:nowrap}td:nth-child(4){min-width:8em}svg{width:100%;height:auto}.band{fill:var(--band)}
svg text{font-size:12px;fill:var(--soft);paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.curve{fill:none;stroke:var(--line);stroke-width:2}.axis{stroke:var(--rule)}
.asked{stroke:var(--bad);stroke-dasharray:6 4}.gated{stroke:var(--soft);stroke-dasharray:2 4}
@media(max-width:40em){svg text{font-size:21px}}
.examples{display:flex;flex-wrap:wrap;gap:1.2em}figure{margin:0}
figure img{width:64px;height:64px;image-rendering:pixelated}
"""


def render(target: str, identity: Identity, seen: Snapshot, *, now: float) -> str:
    """HTML: what is known of the version that answers, how it came to be known, and the rounds, newest first.

    now: unix seconds.
    """
    journal = seen.journal
    links = " · ".join(f'<a href="{path}">{path}</a> {escape(what)}' for path, what in LINKS.items())
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
        f'<title>dfmcl watch</title><link rel="icon" href="data:,"><style>{STYLE}</style>',
        f"<h1>{escape(target)}</h1>",
        "<p>Attacked round after round without its weights. So each figure under attack is an upper bound of robust "
        "accuracy: the gate, which has the weights, breaks more images.</p>",
        _state(identity, seen),
        _healed(journal, now),
        _ages(identity, journal, now),
    ]
    if journal.current is not None:
        release = seen.releases.get(journal.current.version, Release())
        parts += [_figures(identity, journal.current, release), _curve(journal, release)]
        parts.append(_examples(journal.examples, identity.labels))
    rows = (
        "".join(_row(outcome, now) for outcome in reversed(journal.history)) or '<tr><td colspan="5">none yet</td></tr>'
    )
    parts += [
        "<h2>Rounds</h2><p>Failures stay longer than successes.</p>",
        '<div class="scroll"><table><tr><th>round<th>by<th>begun (UTC)<th>outcome<th>what was found</tr>',
        f"{rows}</table></div><p>{links}</p></html>\n",
    ]
    return "".join(parts)


def _state(identity: Identity, seen: Snapshot) -> str:
    """One sentence that answers the question for which the page was opened, and where to read on if it is bad news."""
    totals = seen.journal.current
    if totals is None:
        return '<p class="verdict">No round has been measured yet.</p>'
    lost = sorted(seen.losses.get(totals.version, ()))
    down = [via for via in identity.interval_seconds if seen.journal.paths[via].up is False]
    release = seen.releases.get(totals.version, Release())
    why = f": {escape(release.why)}" if release.why else ""
    if lost:
        kind, text, runbook = "bad", f"Robustness is lost for certain: {', '.join(lost)}.", "RobustnessLost"
    elif release.state != "passed":
        kind, text = "bad", f"What answers has not passed the gate: {release.state}{why}."
        runbook = "RobustnessUngatedModelServing"
    elif down:
        kind, text = "bad", f"No answer in the last round by {' and by '.join(down)}."
        runbook = "RobustnessTargetDown"
    elif seen.stale:
        kind, text = "bad", "No round has been measured for three intervals: what stands here is old."
        runbook = "RobustnessProbeStale"
    elif seen.paused:
        kind, text = "", "Paused: the kill switch is on, and nothing is known of now."
        runbook = "RobustnessProbePaused"
    else:
        kind, text, runbook = "good", "Nothing speaks against what the gate found.", ""
    signed = "signature verified" if release.verified else "signature not verified"
    return (
        f'<p class="verdict {kind}">Version {escape(totals.version)}. {text} <small>({signed})</small></p>'
        + _runbook(runbook, identity.runbooks)
    )


def _runbook(name: str, folder: str) -> str:
    if not name:
        return ""
    if not folder:
        return f"<p>What to do: docs/runbooks/{name}.md</p>"
    return f'<p>What to do: <a href="{escape(folder.rstrip("/"))}/{name}">{name}</a></p>'


def _healed(journal: Journal, now: float) -> str:
    """That a service is well again: an outage among the recent rounds, and measured rounds since; of each path."""
    said = []
    for via in journal.paths:
        rounds = [outcome for outcome in journal.recent if outcome.via == via]
        failed = [place for place, outcome in enumerate(rounds) if _is_outage(outcome)]
        after = [outcome for outcome in rounds[failed[-1] + 1 :] if isinstance(outcome, RoundResult)] if failed else []
        if after:
            times = "once" if len(after) == 1 else f"{len(after)} times"
            said.append(
                f'<p class="healed">Well again by {_way(via)} since {_moment(after[0].started, now)}: measured {times}'
                f" after the last round without an answer, {_moment(rounds[failed[-1]].started, now)}.</p>"
            )
    return "".join(said)


def _is_outage(outcome: Round) -> bool:
    return isinstance(outcome, RoundFailure) and outcome.reason in OUTAGES


def _ages(identity: Identity, journal: Journal, now: float) -> str:
    """When this was written, and how old its newest figures are."""
    found = [
        f"by {_way(via)} {_moment(journal.paths[via].last_success, now)}"
        for via in identity.interval_seconds
        if journal.paths[via].last_success
    ]
    last = f" Last measured {', '.join(found)}." if found else ""
    return f"<p>As of {_time(now)} UTC; renews itself every {REFRESH_SECONDS} s.{last}</p>"


def _figures(identity: Identity, totals: VersionTotals, release: Release) -> str:
    attested = release.attested
    gated: dict[str, str] = {}
    if attested is not None:
        gated = {
            attack: str(one)
            for (source, attack), one in attested.transfer.items()
            if source == identity.surrogates_sha256
        }
        gated |= {name: str(share) + _asked(threshold) for name, share, threshold in gated_threats(identity, attested)}
        gated["clean"] = str(attested.clean) + _asked(attested.clean_threshold)
        gated["worst_case"] = f"{attested.robust}, with the weights{_asked(attested.robust_threshold)}"
    names = {"clean": "clean", "worst_case": f"worst case, {identity.norm} {identity.epsilon}"}
    names |= {attack.name: f"{attack.name} {how(attack)}" for attack in identity.attacks}
    rows = [
        f"<tr><td>{escape(name)}<td>{_lately(totals, of)}{_proven(totals.bounds[of])}"
        f"<td>{escape(gated.get(of, 'not recorded'))}</tr>"
        for of, name in names.items()
        if of in totals.bounds
    ]
    replayed = (
        f"<p>Asked about {totals.replayed} times, the gate's own images got the recorded answer "
        f"{totals.replayed - totals.mismatches} times; in the last round logits were off by {totals.difference:.2g} of "
        "what is tolerated.</p>"
        if totals.integrity is not None
        else "<p>Nothing is replayed: there is no evidence with the gate's answers.</p>"
    )
    return (
        '<h2>Accuracy</h2><div class="scroll"><table><tr><th><th>live, recent rounds'
        "<th>mean over the last W rounds, proven<th>W, since (UTC)<th>mean over some last rounds, W at most, proven"
        f"<th>at the gate [95 %]</tr>{''.join(rows)}</table></div>{replayed}{further(totals, attested)}"
    )


def _lately(totals: VersionTotals, of: str) -> str:
    share = totals.lately(of)
    return _percent(share.value) if share.n else "not in recent rounds"


def _proven(bounds: Bounds) -> str:
    return (
        f"<td>{_percent(bounds.lower)} to {_percent(bounds.upper)}<td>{bounds.rounds:,}, {_time(bounds.start)}"
        f"<td>below {_percent(bounds.stretch_upper)}"
    )


def _asked(threshold: float | None) -> str:
    return "" if threshold is None else f", asked for {_percent(threshold)}"


def _curve(journal: Journal, release: Release) -> str:
    """Live worst case over time with its bounds, the policy's threshold and the gate's own figure."""
    points = journal.points
    if len(points) < 2:
        return ""
    first, span = points[0].time, max(points[-1].time - points[0].time, 1e-9)

    def x(point: Point) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(max((point.time - first) / span, 0.0), 1.0), 1)

    def y(share: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)

    def line(kind: str, share: float, text: str, baseline: float) -> str:
        return (
            f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(share)}" y2="{y(share)}"/>'
            f'<text x="{WIDTH - RIGHT}" y="{baseline}" text-anchor="end">{escape(text)}</text>'
        )

    around = [*((x(p), y(p.upper)) for p in points), *((x(p), y(p.lower)) for p in reversed(points))]
    parts = [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(s)}" y2="{y(s)}"/>'
        f'<text x="{LEFT - 6}" y="{y(s) + 4}" text-anchor="end">{round(100 * s)}</text>'
        for s in (0, 0.25, 0.5, 0.75, 1)
    ]
    parts.append(f'<polygon class="band" points="{_joined(around)}"/>')
    parts.append(f'<polyline class="curve" points="{_joined([(x(p), y(p.value)) for p in points])}"/>')
    if (attested := release.attested) is not None:
        lines = [("gated", attested.robust.value, "the gate, with the weights")]
        if attested.robust_threshold is not None:
            lines.append(("asked", attested.robust_threshold, "the policy's threshold"))
        lines.sort(key=lambda one: -one[1])
        baselines = _baselines([y(share) for _, share, _ in lines])
        parts += [line(*one, baseline) for one, baseline in zip(lines, baselines, strict=True)]
    times = [(LEFT, "start", points[0]), (WIDTH - RIGHT, "end", points[-1])]
    parts += [
        f'<text x="{at}" y="{HEIGHT - BOTTOM + 5}" dy="1em" text-anchor="{how}">{_date(p.time)}</text>'
        for at, how, p in times
    ]
    return (
        '<h2>Worst case over time, %</h2><figure><svg viewBox="0 0 '
        f'{WIDTH} {HEIGHT}" role="img" aria-label="worst case over time">{"".join(parts)}</svg><figcaption>'
        "An upper bound of robust accuracy. Line: recent rounds; band: what was proven then of its mean over the last "
        "W rounds.</figcaption></figure>"
    )


def _baselines(lines: Sequence[float]) -> list[float]:
    """Where the words of one or two lines stand, so that they meet neither each other nor the frame's edges.

    lines: heights, the upper one first. Its words stand above it, the lower one's below, unless there is no room.
    """
    top, bottom = TOP + LETTER - 4, HEIGHT - BOTTOM - 4
    above = lines[0] - 4 if lines[0] - 4 >= top else lines[0] + LETTER
    if len(lines) == 1:
        return [round(above, 1)]
    below = max(lines[1] + LETTER - 4, above + LETTER)
    if below > bottom:
        below = min(lines[1] - 4, bottom)
        above = min(above, below - LETTER)
    return [round(above, 1), round(below, 1)]


def _examples(examples: Sequence[Example], labels: Sequence[str]) -> str:
    if not examples:
        return ""
    shown = "".join(
        f"<figure>{_img(one.image)} {_img(one.adversarial)} {_img(_difference(one))}<figcaption>{escape(one.attack)}: "
        f"{escape(labels[one.label])}, taken for {escape(labels[one.answer]) if one.answer >= 0 else 'another'}"
        "</figcaption></figure>"
        for one in reversed(examples)
    )
    return (
        "<h2>What got through</h2><p>An image that was right, the attacked one that was not, and "
        f'{AMPLIFIED} times their difference.</p><div class="examples">{shown}</div>'
    )


def _difference(one: Example) -> Bytes:
    moved = one.adversarial.astype(np.int16) - one.image
    shown: Bytes = np.clip(128 + AMPLIFIED * moved, 0, 255).astype(np.uint8)
    return shown


def _img(image: Bytes) -> str:
    buffer = io.BytesIO()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.thumbnail((4 * SIDE, 4 * SIDE))
    picture.save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _row(outcome: Round, now: float) -> str:
    label = "measured" if isinstance(outcome, RoundResult) else "skipped"
    if isinstance(outcome, RoundFailure):
        label = "failed"
    _, _, found = str(outcome).partition(": ")
    begun = f"{_time(outcome.started)} <small>{_ago(now - outcome.started)}</small>"
    by = _way(outcome.via)
    return f'<tr class="{label}"><td>{outcome.number}<td>{by}<td>{begun}<td>{label}<td>{escape(found)}</tr>'


def _way(via: str) -> str:
    return "gateway" if via == GATEWAY else "gRPC"


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _time(seconds: float) -> str:
    """A date that does not wrap, and that programs can read."""
    machine = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f'<time datetime="{machine}">{_date(seconds)}</time>'


def _moment(seconds: float, now: float) -> str:
    return f"{_time(seconds)} ({_ago(now - seconds)})"


def _ago(seconds: float) -> str:
    """An age in its largest whole unit; a clock that fell back makes nothing older than now."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit} ago"
    return f"{int(seconds)} s ago" if seconds >= 1 else "just now"
