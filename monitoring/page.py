"""One small page for a human who opens the sidecar in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from monitoring.rounds import Round, RoundResult

LINKS = {"/metrics": "for Prometheus", "/rounds.json": "the rounds below, per image", "/-/healthy": "liveness"}


def render(target: str, history: Sequence[Round]) -> str:
    """HTML: the links, the target, and the rounds of the history, newest first."""
    links = "".join(f'<li><a href="{path}">{path}</a> {escape(what)}</li>' for path, what in LINKS.items())
    rows = "".join(_row(outcome) for outcome in reversed(history)) or '<tr><td colspan="4">none yet</td></tr>'
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>dfmcl watch</title>'
        "<style>body{font:16px sans-serif;margin:2em}td,th{padding:.2em 1em .2em 0;text-align:left}"
        "tr.failed{color:#b00}</style>"
        f"<h1>dfmcl watch</h1><p>Attacks {escape(target)} with adversarial images crafted on surrogates. "
        f"The accuracies are upper bounds of robust accuracy.</p><ul>{links}</ul>"
        "<h2>Last rounds</h2><table><tr><th>round<th>started (UTC)<th>outcome<th>what was found</tr>"
        f"{rows}</table></html>\n"
    )


def _row(outcome: Round) -> str:
    label = "measured" if isinstance(outcome, RoundResult) else "failed"
    started = datetime.fromtimestamp(outcome.started, UTC).strftime("%Y-%m-%d %H:%M:%S")
    _, _, found = str(outcome).partition(": ")
    return f'<tr class="{label}"><td>{outcome.number}<td>{started}<td>{label}<td>{escape(found)}</tr>'
