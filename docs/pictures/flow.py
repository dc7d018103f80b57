"""The picture of README: the line, and the files that pass from room to room."""

from __future__ import annotations

from xml.sax.saxutils import escape

# A stage, the sentence below it, and what it hands to the next one.
STAGES = (
    ("train", "masks, harder attacks", "run/"),
    ("evaluate", "what holds under attack", "table"),
    ("export", "ONNX, masks off", "candidate/"),
    ("gate", "attacked until decided", "evidence/, signed"),
    ("promote", "only what passed", "repository/"),
    ("serve", "Triton, gateway", "answers"),
    ("watch", "attacks the live endpoint", "metrics, pages"),
)
COLOURS = {
    "light": {"ink": "#1f2328", "soft": "#59636e", "line": "#8c959f", "box": "#f6f8fa", "gate": "#cf222e"},
    "dark": {"ink": "#f0f6fc", "soft": "#9198a1", "line": "#656c76", "box": "#151b23", "gate": "#ff7b72"},
}
ROWS = ((0, 1, 2), (3, 4), (5, 6))  # short ones, so that it can be read on a telephone
WIDE, HIGH, GAP, ROW = 190, 70, 40, 132


def text(x: float, y: float, said: str, colour: str, size: int, weight: int = 400) -> str:
    style = f'fill="{colour}" font-size="{size}" font-weight="{weight}" text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(said)}</text>'


def flow(name: str) -> str:
    """The picture in one of COLOURS, as SVG."""
    colour = COLOURS[name]
    width = max(len(row) for row in ROWS) * (WIDE + GAP) + 10
    parts = []
    for number, row in enumerate(ROWS):
        for place, stage in enumerate(row):
            word, below, hands = STAGES[stage]
            x, y = 10 + place * (WIDE + GAP), 14 + number * ROW
            edge = colour["gate"] if word == "gate" else colour["line"]
            parts.append(
                f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="8" fill="{colour["box"]}" stroke="{edge}"/>'
            )
            parts.append(text(x + WIDE / 2, y + 30, word, colour["ink"], 21, 600))
            parts.append(text(x + WIDE / 2, y + 54, below, colour["soft"], 14))
            if stage < len(STAGES) - 1:
                begin, middle = x + WIDE, y + HIGH / 2
                way = f"M{begin + 4} {middle:g}h{GAP - 14}m-6 -5l7 5l-7 5"
                parts.append(f'<path d="{way}" fill="none" stroke="{colour["ink"]}"/>')
            parts.append(text(x + WIDE / 2, y + HIGH + 22, hands, colour["ink"], 15))
    height = 14 + (len(ROWS) - 1) * ROW + HIGH + 34
    said = "train, evaluate, export, gate, promote, serve, watch"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{said}"'
    return "\n".join([f'{head} font-family="system-ui, sans-serif">', *parts, "</svg>"]) + "\n"
