"""Nothing that a stranger wrote acts where it is shown, and no address is taken for a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfmcl.common.text import printable, why_not_local


@given(st.text(st.characters(codec=None)))
def test_what_is_shown_prints(text: str) -> None:
    """Whatever the text, lone surrogates too: one line that can be encoded; what prints is shown as it is."""
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode().decode() == shown
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("p99 doubled; größer, 精度, 😀", "p99 doubled; größer, 精度, 😀"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\n::error::b\r", r"a\n::error::b\r"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("\u2066\u200f\ufeff\u2028", r"\u2066\u200f\ufeff\u2028"),
        ("\udcff\x9b31m", r"\udcff\x9b31m"),
    ],
)
def test_signs_that_act_are_written_out(text: str, shown: str) -> None:
    """Controls, line ends, marks that turn the direction of reading, bytes of a file's name that are no text."""
    assert printable(text) == shown
    assert printable(f"1\n{text}", keep="\n") == f"1\n{shown}".replace(r"a\n", "a\n")


def test_an_address_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme makes one, unless a folder or file of that name is there; times and names after a slash do not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:1").mkdir()
    for path in ("s3://b", "models:/m/1", "hf:org/model", "C:\\models", "s3:", "run:1://x", "git+ssh://h/p"):
        assert "is no folder here" in why_not_local(path)
    for path in (
        "",
        ".",
        "models",
        "/srv/models",
        "run:1",
        "run:1/models",
        "out/2026-11-29T12:30",
        "12:30",
        "~/a",
        "a b",
    ):
        assert why_not_local(path) == ""
