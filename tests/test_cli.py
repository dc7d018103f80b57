"""The console command: fast help, one-line errors, exit codes that mean something."""

from __future__ import annotations

import inspect
import json
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import typer

import dfmcl.cli
import dfmcl.cli.command
from dfmcl.cli import arguments
from dfmcl.common.errors import Refused
from tests.common.pictures import png
from tests.present import present
from tests.processes import wait_until

ROOT = Path(__file__).parents[1]
TRUST = ["--trust", str(ROOT / "deploy" / "resnet18-cifar10" / "trust.toml")]

COMMAND = Path(sys.executable).with_name("dfmcl")
SUBCOMMANDS = ("train", "presets", "evaluate", "export", "gate", "promote", "push", "pull", "serve", "watch")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_help_is_fast_and_names_every_command() -> None:
    """`dfmcl --help` takes half a second of a core where its libraries take 0.4: a torch or numpy would tell.

    In turns, the best of five of each: other work, or a slow core, must not decide.
    """
    libraries = [sys.executable, "-c", "import typer.rich_utils"]
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(10):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        if turn % 2:
            result = run("--help")
        else:
            subprocess.run(libraries, check=True)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        found[bool(turn % 2)].append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
    assert result.returncode == 0
    assert all(name in result.stdout for name in SUBCOMMANDS)
    assert min(found[True]) < 1.5 * min(found[False]) + 0.05


def bad(tmp_path: Path) -> dict[str, tuple[list[str], int, str]]:
    """Wrong calls: arguments, exit code, and a piece of the message."""
    (tmp_path / "wrong.toml").write_text("[model]\nwidht = 16\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "notes").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "plain").write_text("a file")
    out = str(tmp_path / "out")
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "images" / name / f"{number}.png").write_bytes(png(16, 16, 8, 0, b"\0" * 17 * 16))
    shutil.copytree(tmp_path / "images", tmp_path / "bombs")
    bomb = tmp_path / "bombs" / "train" / "dog" / "big.png"
    bomb.write_bytes(png(20_000, 20_000, 8, 2, b""))
    folder = ["train", "quickstart", "--out", out, "--set", "data.name=folder"]
    few = ("data.heldout_images=1", "data.train_images=2", "optimization.batch_size=2")
    folder += [word for setting in few for word in ("--set", setting)]
    return {
        "images that no memory holds": (
            [*folder, "--set", f"data.path={tmp_path}/images", "--set", "data.image_size=20000000"],
            2,
            "train: not enough memory: Unable to allocate",
        ),
        "no training images": (
            [*folder, "--set", f"data.path={tmp_path}/images/test", "--set", "data.image_size=16"],
            2,
            "images/test: has test images only; training needs",
        ),
        "a bomb among the images": (
            [*folder, "--set", f"data.path={tmp_path}/bombs", "--set", "data.image_size=16"],
            2,
            f"{bomb}: may have up to 89478485 pixels",
        ),
        "no such preset": (["train", "papre", "--out", out], 2, "papre: No such file or directory; name a TOML file"),
        "unknown key": (["train", f"{tmp_path}/wrong.toml", "--out", out], 2, "unknown key model.widht"),
        "taken directory": (["train", "quickstart", "--out", f"{tmp_path}/taken"], 2, "exists and is not empty"),
        "missing data": (["train", "paper", "--set", "data.path=no.npz", "--out", out], 2, "no.npz: no such file"),
        "out below a file": (["train", "quickstart", "--out", f"{tmp_path}/plain/run"], 2, "cannot be written"),
        "pack to the root": (["pack", f"{tmp_path}/nothing", "--out", "/"], 2, "--out /: is the root of all files"),
        "no run": (["evaluate", f"{tmp_path}/nothing"], 2, "nothing: is no run"),
        "suite and attacks": (
            ["evaluate", f"{tmp_path}/nothing", "--suite", "fast", "--attack", "fgsm"],
            2,
            "brings its own attacks; leave --attack out",
        ),
        "a directory as record": (
            ["evaluate", f"{tmp_path}/nothing", "--out", str(tmp_path)],
            2,
            "is a directory; name a file",
        ),
        "a record in place of notes": (
            ["evaluate", f"{tmp_path}/nothing", "--out", f"{tmp_path}/notes"],
            2,
            "notes: is there, and this command did not write it",
        ),
        "a record in place of a pipe": (
            ["evaluate", f"{tmp_path}/nothing", "--out", f"{tmp_path}/pipe"],
            2,
            "pipe: is no regular file, and would be replaced by one",
        ),
        "a record in no directory": (["evaluate", f"{tmp_path}/nothing", "--out", f"{out}/no/x"], 2, "is not there"),
        "no such device": (["evaluate", f"{tmp_path}/nothing", "--device", "gpu"], 2, "choose cpu, cuda or cuda:N"),
        "no such GPU": (["evaluate", f"{tmp_path}/nothing", "--device", "cuda:99"], 2, "no cuda:99 here: torch finds"),
        "a device of another kind": (["evaluate", f"{tmp_path}/nothing", "--device", "meta"], 2, "is not supported"),
        "no such suite": (["evaluate", f"{tmp_path}/nothing", "--suite", "quick"], 2, "choose fast or standard"),
        "no run to export": (["export", f"{tmp_path}/nothing", "--out", out], 2, "nothing: is no run"),
        "no candidate": (
            [
                "gate",
                f"{tmp_path}/no",
                "--run",
                f"{tmp_path}/no",
                "--policy",
                "deploy/quickstart/gate.toml",
                "--out",
                out,
            ],
            2,
            "names no model; expected one of: a candidate",
        ),
        "nothing to promote": (
            ["promote", f"{tmp_path}/no", "--evidence", f"{tmp_path}/no", "--repository", out, "--name", "m", *TRUST],
            2,
            "manifest.json",
        ),
        "promote without trust": (
            ["promote", f"{tmp_path}/no", "--evidence", f"{tmp_path}/no", "--repository", out, "--name", "m"],
            2,
            "--trust",
        ),
        "no evidence": (["verdict", f"{tmp_path}/no"], 2, "report.json: No such file"),
        "empty repository": (["serve", "--repository", f"{tmp_path}/taken"], 2, "no promoted model"),
        "no watch config": (["watch", "--config", f"{tmp_path}/none.toml"], 2, "none.toml: No such file"),
        "nowhere to craft to": (["craft", "--config", "deploy/watch.toml"], 2, "probe.crafted is not set; name"),
        "nothing to craft on": (["craft", "--config", "deploy/watch.toml", "--device", "gpu"], 2, "choose cpu, cuda"),
    }


CASES = [
    "no such preset", "unknown key", "taken directory", "missing data", "out below a file", "no run",
    "pack to the root",
    "no run to export", "no candidate", "nothing to promote", "promote without trust", "no evidence",
    "empty repository", "no watch config", "images that no memory holds", "a bomb among the images",
    "suite and attacks", "no such suite", "no such device", "no such GPU", "a device of another kind",
    "no training images",
    "nowhere to craft to", "nothing to craft on", "a directory as record", "a record in no directory",
    "a record in place of notes", "a record in place of a pipe",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_call_gives_one_line_and_its_exit_code(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What, where and what to do, on stderr, nothing on stdout, nothing written."""
    calls = bad(tmp_path)
    assert set(calls) == set(CASES), "a wrong call that nobody makes"
    arguments, code, message = calls[case]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["dfmcl", *arguments])  # in here: a process each would import torch each, 3 s
    niceness = os.nice(0)
    with signals_put_back(), pytest.raises(SystemExit) as ended:
        dfmcl.cli.main()
    assert os.nice(0) == niceness, "what comes after it in this process would starve"
    out, err = capfd.readouterr()
    assert ended.value.code == code, err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("dfmcl: ")
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def signals_put_back() -> Iterator[None]:
    """The command takes SIGINT and SIGTERM for itself; pytest needs its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("case", ["no such device", "no run to export", "nothing to craft on"])
def test_nothing_on_the_way_to_a_wrong_call_has_anything_to_say(tmp_path: Path, case: str) -> None:
    """As a user runs it: what is imported before keeps silent."""
    arguments, code, message = bad(tmp_path)[case]
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train paper", "Missing option '--out'"),
        ("frobnicate", "No such command"),
        ("serve --port 3", "No such option"),
    ],
)
def test_usage_error_is_2(line: str, message: str) -> None:
    """A missing option, an unknown command or option: one line."""
    result = run(*line.split())
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def as_user_sees(allocate: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the line of an error that is raised for real."""
    try:
        allocate()
    except Exception as error:  # noqa: BLE001  # which one is what the test is about
        return dfmcl.cli.command.explain(error, "evaluate"), capfd.readouterr().err
    raise AssertionError("a petabyte was there")


# More than 47 bits of addresses: no machine has it, however its kernel overcommits.
PETABYTE = 1 << 50
LACKS: dict[str, tuple[Callable[[], object], str]] = {
    "Python": (lambda: bytearray(PETABYTE), "not enough memory; take fewer"),
    "numpy": (lambda: np.empty(PETABYTE, np.uint8), "not enough memory: Unable to allocate 1.00 PiB"),
    "numpy, past its sizes": (lambda: np.empty((1 << 40, 1 << 40)), "not enough memory: array is too big"),
    "torch": (
        lambda: torch.empty(PETABYTE),
        "not enough memory: can't allocate memory: you tried to allocate 450359962",
    ),
    "torch, past its sizes": (lambda: torch.empty(1 << 62), "not enough memory: Storage size calculation overflowed"),
    "the system": (lambda: mmap.mmap(-1, PETABYTE), "not enough memory: [Errno 12]"),
    "CUDA": (
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...")),
        "not enough memory: CUDA out of memory. Tried to allocate 2.00 GiB; take fewer",
    ),
}


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("library", LACKS)
def test_a_lack_of_memory_is_no_bug_of_ours(library: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whichever library ran out of it: 2, one line, what to do; never "internal error ... report it"."""
    code, line = as_user_sees(LACKS[library][0], capfd)
    assert code == 2
    assert line.startswith("dfmcl: evaluate: ")
    assert LACKS[library][1] in line
    assert len(line.splitlines()) == 1


def test_a_bug_of_ours_stays_one(capfd: pytest.CaptureFixture[str]) -> None:
    """And what a room raises keeps its own exit code, whatever its words are."""
    assert as_user_sees(lambda: [][0], capfd)[0] == 5
    assert as_user_sees(lambda: raised(Refused("the server is out of memory")), capfd)[0] == 1


def test_verbose_adds_the_traceback(tmp_path: Path) -> None:
    """--verbose, anywhere on the line, shows where the error came from; the last line stays the same."""
    call = ("train", "no_such_preset", "--out", str(tmp_path / "out"))
    plain = run(*call)
    loud = run(*call, "--verbose")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
    assert run("--verbose", *call).stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("x"), 5),
        (SystemError(), 5),
        (ModuleNotFoundError("no", name="torch"), 2),
        (OSError(28, "full"), 5),
    ],
)
def test_an_uncaught_exception_is_never_1(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """1 means that the answer is no; a bug is 5, a missing extra is 2 and says which."""

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        dfmcl.cli.command.guarded(fail)()
    assert caught.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("called", "code"), [(0, 5), (1, 5), (None, 5), (143, 143)])
def test_code_that_exits_decides_nothing(called: int | None, code: int) -> None:
    """A model's own code may call sys.exit(0), which would read as passed; a signal's code stays."""
    with pytest.raises(SystemExit) as caught:
        dfmcl.cli.command.guarded(lambda: sys.exit(called))()
    assert caught.value.code == code


def test_interrupted_evaluation_is_130_not_1(tmp_path: Path, standard_run: Path) -> None:
    """Ctrl-C in a command without state ends it with 130."""
    arguments = ["evaluate", str(standard_run), "--attack", "pgd-1000000"]
    process = subprocess.Popen([COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: listening_to_signals(process), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def listening_to_signals(process: subprocess.Popen[str]) -> bool:
    """Whether Python has put its SIGTERM handler in place and works (6 s of processor time: imports take 2)."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > 6


def test_terminated_export_leaves_nothing(tmp_path: Path, standard_run: Path) -> None:
    """SIGTERM in the middle of an export clears its staging directory and exits with 143."""
    process = subprocess.Popen([COMMAND, "export", str(standard_run), "--out", str(tmp_path / "candidate")])
    wait_until(lambda: list(tmp_path.glob(".candidate.*")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_bug(tmp_path: Path) -> None:
    """Output into a closed pipe ends quietly."""
    process = subprocess.Popen([COMMAND, "presets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() != 0


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, standard_run: Path) -> None:
    """A file stands where the directory should be."""
    blocked = tmp_path / "models"
    blocked.write_text("a file")
    result = run("export", str(standard_run), "--out", str(blocked / "candidate"))
    assert result.returncode == 2
    assert "cannot be written" in result.stderr
    assert shutil.which("dfmcl", path=COMMAND.parent)


COMMANDS = {
    present(command.name): inspect.unwrap(present(command.callback))
    for command in dfmcl.cli.command.app.registered_commands
}


def path_options() -> list[tuple[str, str]]:
    """Every command with each of its parameters that is a path."""
    hints = {name: get_type_hints(function, include_extras=True) for name, function in COMMANDS.items()}
    return [(name, key) for name, found in hints.items() for key, hint in found.items() if is_path(hint)]


def is_path(hint: Any) -> bool:
    """A Path, or the text of one or of an address."""
    about = getattr(hint, "__metadata__", [None])[0]
    return "Path" in str(hint) or getattr(about, "parser", None) is arguments.path


def call_with(name: str, option: str, value: str) -> list[str]:
    """A call of a command with this value, and something for everything else that it must be given."""
    words, rest = [name], []
    hints = get_type_hints(COMMANDS[name], include_extras=True)
    for key, parameter in inspect.signature(COMMANDS[name]).parameters.items():
        about = getattr(hints[key], "__metadata__", [None])[0]
        given = value if key == option else "1" if "float" in str(hints[key]) else "here"
        if isinstance(about, typer.models.ArgumentInfo):
            rest.append(given)
        elif key == option or parameter.default is inspect.Parameter.empty:
            words += [(about.param_decls or [f"--{key.replace('_', '-')}"])[0], given]
    return [*words, "--", *rest] if rest else words


def called(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    monkeypatch.setattr(sys, "argv", ["dfmcl", *arguments])
    with signals_put_back(), pytest.raises(SystemExit) as ended:
        dfmcl.cli.main()
    return ended.value.code, *capfd.readouterr()


@pytest.mark.parametrize(("command", "option"), path_options())
def test_no_path_of_any_command_is_an_address(
    command: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bucket's name must not become a folder ./s3: and exit code 0: it is bad input, and nothing is made of it."""
    monkeypatch.chdir(tmp_path)
    store = getattr(get_type_hints(COMMANDS[command], include_extras=True)[option], "__metadata__", [None])[0]
    elsewhere = "hf" if getattr(store, "parser", None) is arguments.path else "s3"
    for url in (f"{elsewhere}://bucket/models", "models:/digits/1", "file:///tmp/models"):
        code, out, err = called(call_with(command, option, url), monkeypatch, capfd)
        assert (code, out) == (2, ""), err
        assert err.startswith(f"dfmcl: {url}: {url.partition(':')[0]}: is no folder here")
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf", "az", "https", "abfss", "hdfs", "S3", "x-new+one.2"])
def test_any_scheme_is_an_address_but_where_it_is_a_folder(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder of this machine may be called so; what is written as a URL is one all the same."""
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_CONFIG_FILE": "none", "AWS_SHARED_CREDENTIALS_FILE": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # so that s3:// finds no credentials, and asks nobody
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "none")  # nor gs://; az:// knows no account
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    assert called(["status", "--repository", f"{scheme}:models"], monkeypatch, capfd)[0] == 2
    assert called(["history", f"--repository={scheme}://b/models"], monkeypatch, capfd)[0] == 2
    (tmp_path / f"{scheme}:" / "models").mkdir(parents=True)
    code, out, _ = called(["status", "--repository", f"{scheme}:/models"], monkeypatch, capfd)
    assert (code, out) == (1, f"{scheme}:/models: holds no promoted model; `dfmcl promote` adds one\n")
    assert called(["status", "--repository", f"{scheme}://models"], monkeypatch, capfd)[0] == 2


@pytest.mark.parametrize("path", ["s3://b/x.npz", "gs:b", "hf://datasets/x"])
def test_no_path_of_a_configuration_is_an_address(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error names the key, before anything is made."""
    monkeypatch.chdir(tmp_path)
    code, _, err = called(["train", "quickstart", "--out", "run", "--set", f"data.path={path}"], monkeypatch, capfd)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "data.path: " in err
    assert "is no folder here" in err


def test_what_others_wrote_does_not_act_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names of files and reasons in a history that came from elsewhere are shown, with their signs written out."""
    evil = "\x1b[2J\u202egpj\n::error::pwned"
    (tmp_path / evil).mkdir()
    code, out, err = called(["status", "--repository", str(tmp_path / evil)], monkeypatch, capfd)
    assert code == 1
    assert out == f"{tmp_path}/\\x1b[2J\\u202egpj\\n::error::pwned: holds no promoted model; `dfmcl promote` adds one\n"
    code, _, err = called(["verdict", str(tmp_path / f"{evil}-none")], monkeypatch, capfd)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "\\x1b[2J\\u202egpj" in err
    event = {"time": "2026-01-01T00:00:00+00:00", "model": "digits", "event": "promoted", "version": 1, "before": None}
    lines = [json.dumps({**event, "sha256": None, "actor": evil, "reason": evil})]
    lines += [
        json.dumps({**event, "sha256": None, "actor": "a", "model": "\n::error::model"}),
        "\udcff\x1b]0;title\x07",
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    code, out, err = called(["history", "--repository", str(tmp_path)], monkeypatch, capfd)
    assert code == 1
    assert len(out.splitlines()) == 1
    assert out.count("\\x1b[2J\\u202egpj\\n::error::pwned") == 2
    assert "line 2: " in err.splitlines()[0]
    assert "line 3: " in err.splitlines()[1]
    assert all(line.isprintable() and not line.startswith("::") for line in (out + err).splitlines())


@pytest.mark.parametrize("reason", ["\x1b[31mred", "right\u202eleft", "a\x00b", "bell\x07", "mark\u200fed"])
@pytest.mark.parametrize("change", [["rollback", *TRUST], ["retire"]])
def test_a_reason_that_would_act_on_a_terminal_is_refused(
    change: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would be read for years."""
    call = [*change, "--repository", str(tmp_path), "--name", "digits", "--reason", reason]
    code, out, err = called(call, monkeypatch, capfd)
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert err.startswith("dfmcl: --reason: holds ")


QUESTIONS = {
    "status": ["status"],
    "history": ["history"],
    "repair": ["repair", *TRUST],
    "prune": ["prune", "--name", "digits"],
    "retire": ["retire", "--name", "digits"],
    "rollback": ["rollback", "--name", "digits", *TRUST],
    "card": ["card", "run", "--name", "digits"],
    "serve": ["serve"],
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_where_nothing_is_no_command_is_silent(
    question: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An empty repository is told from a missing one, and neither looks like success."""
    for path, codes, told in ((tmp_path / "none", {2}, "no"), (tmp_path, {1, 2}, "no")):
        code, out, err = called([*QUESTIONS[question], "--repository", str(path)], monkeypatch, capfd)
        assert code in codes
        assert len((out + err).splitlines()) == 1
        assert str(path) in out + err
        assert told in out + err


def test_status_as_json_of_nothing_is_an_empty_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Machines read stdout; the exit code says that nothing is served."""
    code, out, err = called(["status", "--json", "--repository", str(tmp_path)], monkeypatch, capfd)
    assert (code, json.loads(out)) == (1, [])
    assert "holds no promoted model" in err


def test_a_repository_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    """It is not an empty one. As root, without the privileges that see through modes."""
    (tmp_path / "models" / "digits").mkdir(parents=True)
    (tmp_path / "models" / "digits" / "config.pbtxt").touch()
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if without and not shutil.which("setpriv"):
        pytest.skip("setpriv (util-linux) is missing")
    for closed, code, told in (
        (tmp_path / "models", 2, "not readable"),
        (tmp_path / "models" / "digits", 1, "not readable"),
    ):
        closed.chmod(0o000)
        try:
            result = subprocess.run(
                [*without, COMMAND, "status", "--repository", tmp_path / "models"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        finally:
            closed.chmod(0o755)
        assert result.returncode == code, result.stderr
        assert told in result.stdout + result.stderr
        assert "internal error" not in result.stderr
