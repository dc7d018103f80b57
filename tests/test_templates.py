"""The forms in which issues come in are forms that GitHub shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORMS = sorted((Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", schema]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)


def test_issue_forms_follow_their_schema(tmp_path: Path) -> None:
    """A bug, a false verdict, a threat or an attack; a form without a label for its question is none."""
    assert [path.stem for path in FORMS] == ["bug", "false-verdict", "threat-or-attack"]
    done = check("vendor.github-issue-forms", *FORMS)
    assert done.returncode == 0, done.stdout
    (tmp_path / "form.yml").write_text(FORMS[0].read_text(encoding="utf-8").replace("      label:", "      name:"))
    assert check("vendor.github-issue-forms", tmp_path / "form.yml").returncode == 1
