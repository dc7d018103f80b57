"""Text from outside, before it is shown or taken for a path: a name, a reason, a label or a log line must not act."""

from __future__ import annotations

import re
from pathlib import Path

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that does not print as its escape, such as \x1b, \n or \u202e.

    That is whatever moves a cursor, ends a line, turns the direction of reading, or cannot be encoded. keep: characters
    that stay all the same.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode() for sign in text
    )


def as_markdown(sentence: str) -> str:
    """A sentence with names from outside in it: on one line, and what could begin markup escaped."""
    text = printable(" ".join(sentence.split())).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for sign in "`*[]|":
        text = text.replace(sign, f"\\{sign}")
    return text


def is_line(text: str) -> bool:
    """Whether a text can be one line of a file in UTF-8: a folder's name may be any bytes, and hold a line's end."""
    return text.splitlines() == [text] and text.encode(errors="ignore").decode() == text


def scheme_of(address: str) -> str:
    """The scheme of an address such as s3://bucket/models; empty where it may be a path of this machine."""
    found = SCHEME.match(address)
    if found is None or ("://" not in address and Path(address.partition("/")[0]).exists()):
        return ""
    return found[1]


def why_not_local(path: str) -> str:
    """Why a path is none of this machine's; empty where it may be one."""
    if not (scheme := scheme_of(path)):
        return ""
    return f"{scheme}: is no folder here, and neither buckets nor URLs can be used; name a path of this machine"


def first_line(error: BaseException) -> str:
    """Of a message that fills a screen, what fits in one of ours."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
