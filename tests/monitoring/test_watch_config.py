"""The watch's configuration: paths are anchored, and every mistake is one line that names file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmcl.common.errors import BadInput
from dfmcl.monitoring.config import load_config
from dfmcl.robustness.attacks.registry import ATTACKS

ROOT = Path(__file__).parents[2]
GOOD = """
[target]
model = "digits"
[data]
name = "digits"
[threat]
eps = "38/255"
[surrogates]
runs = ["a"]
"""

MISTAKES = {
    "unknown key": ("[listen]\nprot = 1", "unknown key listen.prot; known are host, port, runbooks"),
    "unknown section": (
        "[sniff]\nx = 1",
        "unknown key sniff; known are target, data, threat, probe, query, budget, abort, surrogates, release, record, "
        "mitigation, listen",
    ),
    "not TOML": ("[probe", "not TOML: Expected ']' at the end of a table declaration (at end of document)"),
    "port": ("[listen]\nport = 70000", "listen.port: Input should be less than or equal to 65535 (found 70000)"),
    "interval": (
        "[probe]\ninterval_seconds = 0",
        "probe.interval_seconds: Input should be greater than 0 (found 0)",
    ),
    "endless interval": (
        "[probe]\ninterval_seconds = inf",
        "probe.interval_seconds: Input should be a finite number (found inf)",
    ),
    "images": ("[probe]\nimages = 0", "probe.images: Input should be greater than or equal to 1 (found 0)"),
    "wrong type": ('[probe]\nimages = "64"', "probe.images: Input should be a valid integer (found '64')"),
    "no attacks": (
        "[probe]\nattacks = []",
        "probe.attacks: List should have at least 1 item after validation, not 0 (found [])",
    ),
    "unknown attack": (
        '[probe]\nattacks = ["pdg-10"]',
        f"probe.attacks.0: attack: 'pdg-10' is unknown; choose from {', '.join(ATTACKS)}, with "
        "-STEPS or -STEPSxRESTARTS (found 'pdg-10')",
    ),
    "attack that does not transfer": (
        '[probe]\nattacks = ["cw-l2"]',
        "probe.attacks.0: attack: 'cw-l2' does not transfer; choose one of fgsm, pgd, margin-pgd, mi-fgsm, "
        "di-fgsm, ti-fgsm, vmi-fgsm (found 'cw-l2')",
    ),
    "restarts": (
        '[probe]\nattacks = ["pgd-10x5"]',
        "probe.attacks.0: attack: 'pgd-10x5': restarts are chosen by looking at the target; leave them out "
        "(found 'pgd-10x5')",
    ),
    "attack twice": (
        '[probe]\nattacks = ["fgsm", "fgsm"]',
        "probe.attacks: names something twice (found ['fgsm', 'fgsm'])",
    ),
    "gateway": (
        '[query]\ngateway = "localhost:8080"',
        "query.gateway: write a URL that begins with http:// or https:// (found 'localhost:8080')",
    ),
    "search that needs gradients": (
        '[query]\nattack = "pgd-10"',
        "query.attack: attack: 'pgd-10' is no search by queries; choose one of square, rays (found 'pgd-10')",
    ),
    "search without a budget": (
        '[query]\nattack = "rays"',
        "query.attack: attack: 'rays': a live endpoint needs a budget; write rays-100 for 100 queries an image"
        " (found 'rays')",
    ),
    "every": ("[query]\nevery = 0", "query.every: Input should be greater than or equal to 1 (found 0)"),
    "budget": ("[budget]\nimages = 0", "budget.images: Input should be greater than or equal to 1 (found 0)"),
    "window": (
        "[budget]\nwindow_seconds = 1e9",
        "budget.window_seconds: Input should be less than or equal to 604800 (found 1000000000.0)",
    ),
    "duty": ("[budget]\nduty = 1.5", "budget.duty: Input should be less than or equal to 1 (found 1.5)"),
    "no duty": ("[budget]\nduty = 0", "budget.duty: Input should be greater than 0 (found 0)"),
    "factor": (
        "[abort]\nlatency_factor = 1.0",
        "abort.latency_factor: Input should be greater than or equal to 1.5 (found 1.0)",
    ),
    "endless factor": (
        "[abort]\nlatency_factor = inf",
        "abort.latency_factor: Input should be a finite number (found inf)",
    ),
    "tolerance": ("[release]\ntolerance = 0", "release.tolerance: Input should be greater than 0 (found 0)"),
    "record": (
        "[record]\nmax_bytes = 10",
        "record.max_bytes: Input should be greater than or equal to 100000 (found 10)",
    ),
    "webhook": (
        '[mitigation]\nwebhook = "ftp://x"',
        "mitigation.webhook: write a URL that begins with http:// or https:// (found 'ftp://x')",
    ),
    "command as one text": (
        '[mitigation]\ncommand = "dfmcl rollback"',
        "mitigation.command: Input should be a valid list (found 'dfmcl rollback')",
    ),
}
CHANGES = {
    "url": (
        'model = "digits"',
        'model = "digits"\nurl = "http://x/"',
        "target.url: write host:port of Triton's gRPC endpoint, such as 127.0.0.1:8001 (found 'http://x/')",
    ),
    "model name": (
        'model = "digits"',
        'model = "../digits"',
        "target.model: String should match pattern '^[A-Za-z][A-Za-z0-9_-]{0,63}$' (found '../digits')",
    ),
    "timeout": (
        'model = "digits"',
        'model = "digits"\ntimeout_seconds = -1.0',
        "target.timeout_seconds: Input should be greater than 0 (found -1.0)",
    ),
    "missing section": ('[surrogates]\nruns = ["a"]', "", "surrogates: Field required (found {TABLE})"),
    "no surrogates": (
        'runs = ["a"]',
        "runs = []",
        "surrogates.runs: List should have at least 1 item after validation, not 0 (found [])",
    ),
    "data name": (
        'name = "digits"',
        'name = "mnist"',
        "data.name: Input should be 'digits', 'cifar10', 'npz', 'folder', 'csv', 'shards' or 'parquet' (found 'mnist')",
    ),
    "eps in grey levels": (
        '"38/255"',
        '"38"',
        "threat.eps: '38' is 38; a radius in pixel units lies in (0, 1] (found '38')",
    ),
    "search that knows one norm": (
        'eps = "38/255"',
        'norm = "l2"\neps = "1.0"\n[query]\nattack = "rays-100"',
        "query.attack: rays-100 knows Linf only; take square",
    ),
    "eps below a grey level": (
        '"38/255"',
        '"0.5/255"',
        "threat.eps: 0.5/255 is below one grey level; bytes need at least 1/255",
    ),
}


def refusal(tmp_path: Path, text: str) -> str:
    """The message without the file's name, after checking that it is one line with that name, and the exit code."""
    path = tmp_path / "watch.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("extra", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_each_mistake_has_its_message(tmp_path: Path, extra: str, expected: str) -> None:
    """A mistake is refused with a line that names the key and the reason."""
    assert refusal(tmp_path, GOOD + extra) == expected


@pytest.mark.parametrize(("old", "new", "expected"), CHANGES.values(), ids=CHANGES)
def test_each_wrong_value_has_its_message(tmp_path: Path, old: str, new: str, expected: str) -> None:
    """A required value that is wrong or missing is refused in the same form."""
    message = refusal(tmp_path, GOOD.replace(old, new))
    assert message == expected or (message.startswith(expected.partition("{TABLE}")[0]) and "{TABLE}" in expected)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    """A file that is not there is named, with an example of what to name instead."""
    path = tmp_path / "none.toml"
    with pytest.raises(BadInput) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: No such file or directory; name a TOML file such as deploy/watch.toml"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    """Relative paths are joined to the file's folder, absolute and empty ones are not."""
    path = tmp_path / "watch.toml"
    sections = {
        "release": 'repository = "models"\ntrust = "keys/trust.toml"',
        "query": 'key_file = "k"\nclean_key_file = "c"\nca = "/ca.pem"',
        "record": 'path = "rounds.jsonl"',
        "probe": 'pause_file = "pause"',
    }
    more = "".join(f"[{name}]\n{text}\n" for name, text in sections.items())
    path.write_text(GOOD.replace('["a"]', '["a", "/b"]') + more)
    config = load_config(path)
    assert config.surrogates.runs == [str(tmp_path / "a"), "/b"]
    assert config.release.repository == str(tmp_path / "models")
    assert config.release.trust == str(tmp_path / "keys/trust.toml")
    assert config.query.key_file == str(tmp_path / "k")
    assert config.query.clean_key_file == str(tmp_path / "c")
    assert config.query.ca == "/ca.pem"
    assert config.record.path == str(tmp_path / "rounds.jsonl")
    assert config.probe.pause_file == str(tmp_path / "pause")
    assert (config.data.path, config.release.evidence) == ("", "")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ('repository = "m"\nevidence = "e"', "name repository or evidence, not both"),
        ('evidence = "e"\ntrust = "t"', "trust needs repository: a signature is about promoted files"),
    ],
)
def test_evidence_is_looked_for_in_one_place(tmp_path: Path, section: str, reason: str) -> None:
    """Two sources might disagree, and an unpromoted report is signed about other files."""
    assert refusal(tmp_path, f"{GOOD}[release]\n{section}").startswith(f"release: {reason}")


def test_a_webhook_is_kept_letter_for_letter(tmp_path: Path) -> None:
    """A slash at its end may be part of the path."""
    path = tmp_path / "watch.toml"
    path.write_text(GOOD + '[mitigation]\nwebhook = "https://x/hook/"')
    assert load_config(path).mitigation.webhook == "https://x/hook/"


def test_eps_is_rounded_down_to_the_grid(tmp_path: Path) -> None:
    """0.08, i.e. 20.4/255, is attacked and labelled as 20/255."""
    path = tmp_path / "watch.toml"
    path.write_text(GOOD.replace("38/255", "0.08"))
    assert load_config(path).threat.threat.label == "20/255"


def test_the_example_in_deploy_is_complete() -> None:
    """deploy/watch.toml sets every key there is, so that one can read them all there."""
    config = load_config(ROOT / "deploy" / "watch.toml")
    for name in type(config).model_fields:
        section = getattr(config, name)
        assert section.model_fields_set == set(type(section).model_fields), name


PATHS = [
    *("data.path", "probe.crafted", "probe.pause_file", "query.key_file", "query.clean_key_file", "query.ca"),
    *("release.repository", "release.evidence", "record.path", "surrogates.runs"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("url", ["s3://bucket/models", "models:/digits/1", "file:///srv/models"])
def test_no_path_is_an_address(tmp_path: Path, path: str, url: str) -> None:
    """It would become a folder beside the file; a repository may lie in a bucket."""
    if path == "release.repository" and url.startswith("s3://"):
        (tmp_path / "watch.toml").write_text(f'{GOOD}\n[release]\nrepository = "{url}"')
        assert load_config(tmp_path / "watch.toml").release.repository == url
        return
    section, key = path.split(".")
    value = f'["{url}"]' if key == "runs" else f'"{url}"'
    if f"[{section}]" in GOOD:
        text = GOOD.replace('runs = ["a"]', "") if key == "runs" else GOOD
        text = text.replace(f"[{section}]", f"[{section}]\n{key} = {value}")
    else:
        text = f"{GOOD}\n[{section}]\n{key} = {value}"
    (tmp_path / "watch.toml").write_text(text)
    with pytest.raises(BadInput, match=rf"{path}(\.0)?: \w+: is no folder here"):
        load_config(tmp_path / "watch.toml")
