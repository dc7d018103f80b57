"""The gateway's two pages for humans. Each is one file that asks nobody else for anything, and its policy says so."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dfmcl.serving.gateway.images import FORM

HEAD, INDEX, DOCS = (Path(__file__).with_name(name) for name in ("head.html", "index.html", "docs.html"))
# Of an operation, for curl; the page puts its own address in the place of $URL.
CURL = {
    "/v1/classify": "curl -F image=@a.jpg -F image=@b.png{key} '$URL/v1/classify?resize=true'",
}

CHOSEN = (
    "<input class='files' type='file' multiple aria-label='images'> "
    "<label><input class='resize' type='checkbox' checked> resize</label> "
)


@dataclass(frozen=True)
class Page:
    """html: the whole page; policy: its Content-Security-Policy, which lets only what stands in it run."""

    html: str
    policy: str


def index(model: str, *, needs_key: bool, root: str = "") -> Page:
    """A page to drop images on: the model, and its answers about them. root: path before all others."""
    return _filled(INDEX, root, needs_key=needs_key, title=escape(model))


def docs(description: dict[str, Any], *, needs_key: bool, root: str = "") -> Page:
    """An OpenAPI document, to read, to try and to copy from."""
    found = [
        (method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = "".join(
        f"<details id='{escape(name)}'><summary><code>{escape(name)}</code></summary>{_json(schema)}</details>"
        for name, schema in description["components"]["schemas"].items()
    )
    return _filled(
        DOCS,
        root,
        needs_key=needs_key,
        title=escape(description["info"]["title"]),
        about=escape(description["info"]["description"]),
        nav="".join(
            f"<li><a href='#{operation['operationId']}'><code>{method} {escape(path)}</code></a>"
            for method, path, operation in found
        ),
        operations="".join(_operation(*one) for one in found),
        schemas=schemas,
    )


def _filled(template: Path, root: str, *, needs_key: bool, **values: str) -> Page:
    """A template with its values, which are HTML already."""
    known = {**values, "keyless": "" if needs_key else "hidden", "root": root}
    text = template.read_text(encoding="utf-8").replace("{{head}}", HEAD.read_text(encoding="utf-8"))
    return _sealed(re.sub(r"\{\{(\w+)\}\}", lambda found: known[found[1]], text))


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(parameter['name'])}</code><td>{parameter['in']}<td>{escape(parameter['description'])}"
        for parameter in operation.get("parameters", [])
    )
    asked = operation.get("requestBody", {}).get("content", {})
    place = path
    for parameter in operation.get("parameters", []):
        place = place.replace(f"{{{parameter['name']}}}", str(parameter.get("example")))
    kinds = ", ".join(f"<code>{escape(kind)}</code>" for kind in asked)
    bodies = f"<tr><td>{kinds}" if kinds else ""
    responses = "".join(
        f"<tr><td>{status}<td>{escape(response['description'])}" for status, response in operation["responses"].items()
    )
    answers = [content for response in operation["responses"].values() for content in response["content"].values()]
    key = ' -H "X-API-Key: $DFMCL_API_KEY"' if operation.get("security") else ""
    sent = " -H 'Content-Type: application/json' -d @request.json" if asked else ""
    curl = CURL.get(path, f"curl{sent}{{key}} '$URL{place}'").format(key=key)
    chosen = CHOSEN if FORM in asked else "<span class='soft'>With a black image:</span> " if asked else ""
    return (
        f"<section id='{operation['operationId']}' data-method='{method}' data-path='{escape(place)}'>"
        f"<h2><code>{method} {escape(path)}</code></h2><p>{escape(operation['summary'])} "
        f"{escape(operation.get('description', ''))}</p>{_table('Parameters', rows)}{_table('Bodies', bodies)}"
        f"{_table('Responses', responses)}{_examples('Request', asked.values())}{_examples('Response', answers)}"
        f"<pre class='curl'>{escape(curl)}</pre>"
        f"<p><button type='button' class='copy'>Copy</button> {chosen}"
        "<button type='button' class='try'>Try</button> <span class='said soft' role='status'></span></p>"
        "<pre class='result' hidden></pre></section>"
    )


def _examples(title: str, contents: Iterable[dict[str, Any]]) -> str:
    found = {name: example for content in contents for name, example in content.get("examples", {}).items()}
    return "".join(
        f"<details class='example'><summary>{title}: {escape(example['summary'])}</summary>{_json(example['value'])}"
        "</details>"
        for example in found.values()
    )


def _json(value: Any) -> str:
    """Indented, but a short list of plain values on one line."""
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", _on_one_line, json.dumps(value, indent=2))
    return f"<pre>{escape(text)}</pre>"


def _on_one_line(found: re.Match[str]) -> str:
    joined = re.sub(r"\n\s+", " ", found[1])
    return f"[{joined}]" if len(joined) <= 80 else found[0]


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
