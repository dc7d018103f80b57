"""The report as Markdown: a step summary on GitHub, a comment, a terminal. The verdict first."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from dfmcl.common.text import as_markdown, printable
from dfmcl.gating.formats import summary
from dfmcl.gating.formats.corruptions import CorruptionRow, corruption_rows
from dfmcl.gating.formats.summary import percent
from dfmcl.gating.signing.report import BaselineEntry, Report
from dfmcl.robustness.corruptions.severities import LEVELS
from dfmcl.robustness.statistics import Share

# A comment on GitHub holds 65,536 characters (a step's summary 1 MiB), and the poster adds some.
# Bytes here; a character takes one or more.
LIMIT = 60_000
ROOM = 12_000  # bytes for one table; five of them and all the rest are below LIMIT
NEWLY_BROKEN = 50
NAME = 160  # characters of a name from outside


def markdown(report: Report, *, details: bool = True) -> str:
    """The page, below LIMIT bytes. Without details: what fits a terminal."""
    page = "\n".join(_top(report)) + "\n"
    if not details:
        return page
    for title, lines in _sections(report):
        section = f"\n<details><summary>{title}</summary>\n\n" + "\n".join(lines) + "\n\n</details>\n"
        if len((page + section).encode()) > LIMIT:
            page += f"\n{title}: no room left on this page; see report.html or report.json.\n"
        else:
            page += section
    return page


def _top(report: Report) -> Iterator[str]:
    candidate, evaluation = report.candidate, report.evaluation
    yield f"### {summary.headline(report)}"
    yield ""
    yield from (f"- {as_markdown(sentence)}" for sentence in summary.decided(report))
    yield ""
    yield summary.advice(report)
    yield ""
    yield (
        f"Model {_code(candidate.name)} {_short(candidate.model_sha256)},"
        f" policy {_short(report.policy.sha256)}, {summary.threat(evaluation)}."
        f" {as_markdown(summary.claim(report))}"
    )
    yield ""
    yield from _table(
        ("criterion", "measured", "bounds", "outcome"),
        (
            (
                _code(row.criterion),
                f"{percent(row.value)} ({row.k}/{row.n}{'' if row.answers is None else ' answers'})",
                f"{percent(row.lower)} to {percent(row.upper)}",
                row.outcome,
            )
            for row in summary.by_weight(report.criteria)
        ),
        "criteria",
    )
    yield ""
    yield from _table(
        ("attack, in order", "tried", "flipped", "still right", "time"),
        (
            (_code(row.name), row.tried, row.flipped, percent(row.left / row.images), summary.duration(row.seconds))
            for row in summary.attack_rows(evaluation)
        ),
        "attacks",
    )
    if report.findings:
        yield ""
        yield from _table(
            ("check raised", "why", "what to do"),
            ((_code(row.check), as_markdown(row.why), as_markdown(row.do)) for row in report.findings),
            "checks",
        )
    if report.baseline is not None:
        yield ""
        yield baseline(report.baseline)


def baseline(record: BaselineEntry) -> str:
    """How the candidate compares with the baseline on the images that both were shown."""
    broken = record.newly_broken
    named = f" Newly broken: images {summary.listed(broken, NEWLY_BROKEN)}." if broken else ""
    return (
        f"Against the baseline model {_short(record.model_sha256)} on the same {record.images:,} images:"
        f" {record.only_baseline} held only there, {record.only_candidate} hold only now"
        f" (exact one-sided McNemar p = {record.p:.3g}).{named}"
        + "".join(f" {sentence}" for sentence in summary.compared(record))
    )


def _sections(report: Report) -> Iterator[tuple[str, list[str]]]:
    yield "Radii and transfer", list(_radii(report))
    if rows := corruption_rows(report):
        yield "Corruptions", list(_corruptions(rows))
    yield "Classes", list(_classes(report))
    yield "Checks", list(_checks(report))
    yield "Provenance", list(_provenance(report))


def _radii(report: Report) -> Iterator[str]:
    main = report.evaluation
    rows = [("clean", main.clean), *((summary.threat(one), one.robust) for one in (main, *summary.others(report)))]
    rows += [
        (f"{summary.threat(one)}, transfer from {_code(one.about.surrogate)} (upper bound)", one.robust)
        for one in report.transfer
    ]
    shares = [(name, Share(share.k, share.n)) for name, share in rows]
    shares += [(f"{_code(name)}, the worst of them for each image", share) for name, share in summary.unions(report)]
    yield from _table(
        ("threat", "accuracy", "k/n", "95 % interval of one look"),
        (
            (name, percent(share.value), f"{share.k}/{share.n}", " to ".join(map(percent, share.bounds)))
            for name, share in shares
        ),
        "threats",
    )


def _corruptions(rows: Sequence[CorruptionRow]) -> Iterator[str]:
    yield from _table(
        ("corruption", *(f"severity {level}" for level in LEVELS), "mean"),
        ((row.kind, *map(percent, row.shares), percent(row.mean)) for row in rows),
        "corruptions",
    )


def _classes(report: Report) -> Iterator[str]:
    yield from _table(
        ("class", "images", "right", "held", "95 % interval of held", "criterion"),
        (
            (
                _code(row.name),
                row.images,
                row.right,
                row.held,
                f"{percent(row.lower)} to {percent(row.upper)}",
                "" if row.outcome is None else f"at least {percent(row.threshold)}: {row.outcome}",
            )
            for row in summary.classes_by_weight(report)
        ),
        "classes",
    )


def _checks(report: Report) -> Iterator[str]:
    yield from _table(
        ("check", "outcome", "raised when", "found"),
        (
            (_code(row.check), row.outcome.replace("_", " "), as_markdown(row.when), as_markdown(row.why))
            for row in summary.checks_by_weight(report)
        ),
        "checks",
    )


def _provenance(report: Report) -> Iterator[str]:
    facts = {
        "model": report.candidate.model_sha256,
        **({"decided by": str(report.decided)} if report.decided else {}),
        "policy": report.policy.sha256,
        "data": report.data.sha256,
        "order of the images": summary.order(report),
        "created": report.created,
        "code": report.code.revision,
        "seed": report.evaluation.seed,
        "wall time": summary.duration(report.seconds),
        "processes": report.processes,
        **{key: value for key, value in report.hardware.items() if value is not None},
        **report.versions,
    }
    yield from _table(("what", "value"), ((as_markdown(name), _code(value)) for name, value in facts.items()), "facts")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], what: str) -> Iterator[str]:
    """The first rows, as many as ROOM holds, and how many more there are."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    ends = list(accumulate(len(line.encode()) + 1 for line in lines))
    shown = bisect_right(ends, ROOM)
    yield from lines[:shown]
    if shown < len(lines):
        yield ""
        yield f"and {len(lines) - shown:,} more {what}: report.html"


def _code(name: object) -> str:
    """A name from outside as a code span: nothing in it is markup."""
    return "`" + printable(summary.shortened(name, NAME)).replace("`", "'").replace("|", "\\|") + "`"


def _short(digest: str) -> str:
    return f"`{digest[:12]}`"
