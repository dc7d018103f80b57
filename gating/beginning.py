"""The files that a repository begins with: a policy, a trust file, labels, and a pipeline that runs the gate."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dfmcl.common.errors import BadInput
from dfmcl.common.files import write_text
from dfmcl.common.preprocessing import USUAL, Preprocessing
from dfmcl.gating.policy import Policy

POLICY, TRUST, LABELS, KEY = "gate.toml", "trust.toml", "labels.txt", "release"
PIPELINES = {"github": ".github/workflows/robustness.yml", "gitlab": ".gitlab-ci.yml"}

GATE_TOML = """\
# What {model} must prove before it is promoted. Every key and its default: evidence/policy.toml of any gate.
criteria = [
{criteria}
    # "clean_accuracy >= 0.9 at 95 %", # right without an attack
    # "class_robust_accuracy >= 0.1 at 95 %", # each class by itself
    # "corruption_accuracy >= 0.6 at 95 %", # mean over fifteen kinds of noise, blur, weather ... at five severities
    # "no_regression at 95 %", # against the report.json that --baseline names
]

[threat]
norm = "{norm}"
eps = {eps} # how far each pixel may be moved, of 0 to 255

[data] # the claim is about its test part
{data}

[attacks]
suite = "fast" # "standard" is AutoAttack's protocol, for a comparison with the literature; it takes much longer
"""
TRUST_TOML = f"""\
# Whose signature lets a model be promoted. `dfmcl keygen {KEY}` makes a pair: commit {KEY}.pub, keep {KEY}.key secret.
keys = ["{KEY}.pub"]
policies = ["{POLICY}"] # verdicts by another policy do not count
drawn = true # the key drew the order of the images, so that no author can choose it
max_age_days = 90
"""
GITHUB = """\
# Blocks every pull request whose model misses gate.toml. The secret DFMCL_KEY holds the text of {key}.key; without it
# (pull requests from forks) the model is judged, and the evidence is not signed.
name: robustness
on: [push, pull_request]
permissions: {{ contents: read }}
jobs:
  gate:
    runs-on: ubuntu-latest
    timeout-minutes: 120
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {{ python-version: "3.12" }}
      - run: pip install 'dfmcl[train]'
      - env: {{ DFMCL_KEY: "${{{{ secrets.DFMCL_KEY }}}}" }}
        run: |
{steps}
      - if: always()
        uses: actions/upload-artifact@v4
        with: {{ name: evidence, path: evidence }}
"""
GITLAB = """\
# Blocks every pipeline whose model misses gate.toml. The variable DFMCL_KEY (masked, protected) holds the text of
# {key}.key; without it the model is judged, and the evidence is not signed.
robustness:
  image: python:3.12
  script:
    - pip install 'dfmcl[train]'
    - |
{steps}
  artifacts:
    when: always
    paths: [evidence/]
    reports: {{ junit: evidence/junit.xml, metrics: evidence/robustness.prom }}
"""


@dataclass(frozen=True)
class Shown:
    """The model that the files are about, as a command names it.

    model: a file or module:callable. contract: the words of --input. output: of an ONNX file with several.
    labels: the file that names its classes; None: LABELS is written. preprocessing: of its pictures.
    kind: of gating/kinds.py. arch: of a file of weights.
    """

    model: str
    contract: str
    output: str | None
    labels: Path | None
    preprocessing: Preprocessing = USUAL
    kind: str = "onnx"
    arch: str | None = None


def require_free(out: Path, service: str, shown: Shown) -> None:
    """BadInput where a file stands in the way, or a service is unknown: nothing is ever written over."""
    if service not in PIPELINES:
        raise BadInput(f"--ci {service}: choose {' or '.join(PIPELINES)}")
    if not out.is_dir():
        raise BadInput(f"--out {out}: is no directory; make it first")
    names = [POLICY, TRUST, PIPELINES[service], *([] if shown.labels else [LABELS])]
    if there := [name for name in names if (out / name).exists()]:
        raise BadInput(f"{out / there[0]}: is there already, and would be lost; move it, or choose another --out")


def written(shown: Shown, policy: Policy, classes: tuple[str, ...], service: str) -> dict[str, str]:
    """Each file's text by its name."""
    steps = "\n".join(_script(shown))
    indent = " " * {"github": 10, "gitlab": 6}[service]
    template = {"github": GITHUB, "gitlab": GITLAB}[service]
    texts = {
        POLICY: _policy(shown, policy),
        TRUST: TRUST_TOML,
        PIPELINES[service]: template.format(key=KEY, steps="\n".join(indent + line for line in steps.split("\n"))),
    }
    return texts | ({} if shown.labels else {LABELS: "".join(f"{name}\n" for name in classes)})


def write(out: Path, texts: Mapping[str, str]) -> None:
    """Write them all below a directory."""
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(out / name, text)


def _policy(shown: Shown, policy: Policy) -> str:
    section = policy.data.model_dump(exclude_defaults=True)
    data = "\n".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in section.items())
    criteria, eps = "\n".join(f"    {json.dumps(one)}," for one in policy.criteria), json.dumps(policy.threat.eps)
    return GATE_TOML.format(model=shown.model, criteria=criteria, norm=policy.threat.norm, eps=eps, data=data)


def _script(shown: Shown) -> list[str]:
    """Lines of a shell: the model becomes a candidate where it can, and is judged."""
    told = ["--labels", str(shown.labels or LABELS), "--input", shown.contract]
    told += ["--output", shown.output] if shown.output else []
    told += ["--arch", shown.arch] if shown.arch else []
    fitted = [] if shown.preprocessing == USUAL else ["--preprocessing", str(shown.preprocessing)]
    judged, lines = shlex.join(["candidate"]), []
    if shown.kind == "onnx":
        lines.append(shlex.join(["dfmcl", "export", shown.model, *told, *fitted, "--out", "candidate"]))
    else:
        judged = shlex.join([shown.model, *told])
    key = f"{KEY}.key"
    return [
        *lines,
        "set --",
        f"""[ -z "$DFMCL_KEY" ] || {{ (umask 077; printf '%s\\n' "$DFMCL_KEY" > {key}); set -- --key {key}; }}""",
        f'dfmcl gate {judged} --policy {POLICY} --out evidence "$@"',
    ]
