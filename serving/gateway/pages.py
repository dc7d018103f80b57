"""The gateway's two pages for humans. Each is one file that asks nobody else for anything, and its policy says so."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

INDEX = Path(__file__).with_name("index.html")
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; }
code, pre { font: 0.9em ui-monospace, monospace; }
pre { padding: 0.8rem; overflow: auto; background: color-mix(in srgb, currentColor 7%, transparent); }
table { border-collapse: collapse; }
td, th { padding: 0.2rem 1rem 0.2rem 0; text-align: left; vertical-align: top; }
"""


@dataclass(frozen=True)
class Page:
    """html: the whole page; policy: its Content-Security-Policy, which lets only what stands in it run."""

    html: str
    policy: str


def index(model: str, *, needs_key: bool) -> Page:
    """A page to drop images on: what the model is, and what it says about them."""
    values = {"{{model}}": escape(model), "{{keyless}}": "" if needs_key else "hidden", "{{root}}": ""}
    return _sealed(re.sub(r"\{\{\w+\}\}", lambda found: values[found[0]], INDEX.read_text(encoding="utf-8")))


def docs(description: dict[str, Any]) -> Page:
    """An OpenAPI document, to read."""
    operations = "".join(
        _operation(method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f"<h2 id='{escape(name)}'>{escape(name)}</h2><pre>{escape(json.dumps(schema, indent=2))}</pre>"
        for name, schema in description["components"]["schemas"].items()
    )
    title = escape(description["info"]["title"])
    return _sealed(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><h1>{title}</h1>'
        f"<p>{escape(description['info']['description'])} The same for programs: "
        f'<a href="/openapi.json">/openapi.json</a>.</p>{operations}<h1>Schemas</h1>{schemas}</html>\n'
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(parameter['name'])}</code><td>{parameter['in']}<td>{escape(parameter['description'])}"
        for parameter in operation.get("parameters", [])
    )
    bodies = "".join(
        f"<tr><td><code>{escape(kind)}</code>" for kind in operation.get("requestBody", {}).get("content", {})
    )
    responses = "".join(
        f"<tr><td>{status}<td>{escape(response['description'])}" for status, response in operation["responses"].items()
    )
    return (
        f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation['summary'])} "
        f"{escape(operation.get('description', ''))}</p>{_table('Parameters', rows)}{_table('Bodies', bodies)}"
        f"{_table('Responses', responses)}"
    )


def _table(title: str, rows: str) -> str:
    return f"<table><tr><th>{title}</tr>{rows}</table>" if rows else ""


def _sealed(html: str) -> Page:
    """A page with a policy that names its scripts and styles by digest, and lets it speak to this server only."""
    digests = {
        tag: " ".join(_digest(text) for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)) or "'none'"
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {digests['script']}; style-src {digests['style']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
