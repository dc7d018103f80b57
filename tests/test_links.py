"""Every relative link of a page leads to a file, and every anchor to a heading of it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_repository/**/*.md"))
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")


def prose(path: Path) -> str:
    """A page without its code, where brackets mean something else."""
    return re.sub(
        r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(path: Path) -> set[str]:
    """What headings are called in links: lower case, no punctuation, hyphens for spaces; repeated ones numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", heading).lower()).strip().replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in (one or other for one, other in LINK.findall(prose(page))):
        where, _, anchor = link.partition("#")
        target = page.parent / where if where else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def test_links_lead_somewhere() -> None:
    """On every page, to a file of the repository and to a heading in it."""
    assert {str(page.relative_to(ROOT)): links for page in PAGES if (links := broken(page))} == {}
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 100


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    """A missing file, a missing heading, a missing picture; not what stands in code, or elsewhere in the world."""
    (tmp_path / "other.md").write_text("# One\n\n## What `fast` stands for\n\n## One\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#what-fast-stands-for) [b](other.md#two) [c](none.md) [d](#here) [e](#there)\n"
        '<img src="gone.png">\n`[f](code.md)` [g](https://example.org/x) [h](other.md#one-1)\n\n    [i](code.md)\n'
    )
    assert broken(page) == ["other.md#two", "none.md", "#there", "gone.png"]
