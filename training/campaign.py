"""Many runs under a time budget: each is trained and measured in one stretch, and leaves one small record.

OUT/records/NAME.json     a finished or failed run; enough to skip it, and to make the tables, anywhere
OUT/partial/NAME.json     what is measured so far of the run that was cut
OUT/runs/NAME/            its training: checkpoint, manifest, metrics, and the state it resumes from
OUT/weights/NAME.*        networks that others are attacked from, in float16: they travel with the records
OUT/table.md, *.svg       rewritten from the records after each run
"""

from __future__ import annotations

import csv
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dfmcl.common.errors import BadInput, DfmclError, Interrupted, lacks_memory, unwritable, without_memory
from dfmcl.common.files import clear_parts, dump_json, read_json, write_bytes, write_text
from dfmcl.common.locks import LOCK, held
from dfmcl.common.progress import Track, silent
from dfmcl.robustness.data import Dataset, open_dataset
from dfmcl.robustness.models import Classifier, ModelSpec
from dfmcl.robustness.provenance import now, provenance
from dfmcl.robustness.records import Evaluation
from dfmcl.robustness.runs import load_run, parse_device
from dfmcl.training.limits import EndedAtOnce, Limits
from dfmcl.training.measurement import Partial, chosen_images, measure
from dfmcl.training.plan import Campaign, PlannedRun, runs, source_of
from dfmcl.training.plots import draw
from dfmcl.training.run_record import RunRecord, entry_of, read_record, write_record
from dfmcl.training.table import table
from dfmcl.training.train import train

FOLDERS = ("records", "partial", "runs", "weights")


@dataclass(frozen=True)
class CampaignProgress:
    """How far a campaign is. code: of what failed; 2 where all of it is for the user to repair, else 5."""

    total: int
    done: int
    failed: int
    cut: bool
    code: int = 0

    @property
    def exit_code(self) -> int:
        return 130 if self.cut else self.code

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        advice = (
            "; repeat the command to continue" if self.cut else "; repeat the command to try again" if failed else ""
        )
        return f"{self.done} of {self.total} runs done{failed}{advice}"


def run_campaign(
    campaign: Campaign,
    source: str,
    out: Path,
    *,
    overrides: Sequence[str] = (),
    limits: Limits | None = None,
    device: str = "",
    command: str = "",
    track: Track = silent,
    log: Callable[[str], None] = print,
) -> CampaignProgress:
    """Do what is not done yet of a campaign, and rewrite its tables after each run.

    source: the campaign's file or name, for messages. overrides: for every run, such as where the data lie. A run that
    fails is recorded as such, and tried again by the next call, after the runs that were never tried. BadInput where
    `out` holds a record that another config or other measurements made.
    """
    limits = limits or Limits()
    device = str(parse_device(device))
    all_runs = runs(campaign, source, overrides)
    records = read_records(campaign, all_runs, out)
    load = load_once(track)
    waiting = [run for run in all_runs if not (run.name in records and records[run.name].done)]
    if waiting and any(run.measured for run in all_runs):
        chosen_images(load(waiting[0]), campaign)  # missing or too small data are known before hours of training
    for folder in FOLDERS:
        make_directory(out / folder)
    cut, code = False, 0
    # What failed before comes last, but sources come first in any case: the others are attacked from them.
    for run in sorted(waiting, key=lambda run: (run.method not in campaign.sources, run.name in records)):
        try:
            limits.check()
            log(f"{run.name}: {sum(record.done for record in records.values())} of {len(all_runs)} runs done")
            record = perform(run, campaign, all_runs, out, load, limits, device, command, track, log)
        except EndedAtOnce:
            raise
        except Interrupted:
            cut = True
            break
        except Exception as error:  # noqa: BLE001  # one run's failure, whatever it is, must not cost the others
            message, code = described(error), max(code, code_of(error))
            log(f"{run.name}: failed: {message}")
            about = {"command": command, "created": now(), **provenance()}
            record = RunRecord(
                **entry_of(run), identity=run.identity(campaign), status="failed", message=message, about=about
            )
        records[run.name] = record
        write_record(out / "records" / f"{run.name}.json", record)
        write_tables(campaign, all_runs, records, out)
    write_tables(campaign, all_runs, records, out)
    done = sum(record.done for record in records.values())
    return CampaignProgress(len(all_runs), done, len(records) - done, cut, code)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep other campaigns out of `out`, and remove what killed ones left half written there.

    BadInput where another process has it; EndedAtOnce, which says what is kept, for a second signal.
    """
    with held(out / LOCK, out):
        for folder in (out, *(out / name for name in FOLDERS)):
            clear_parts(folder)
        try:
            yield
        except (KeyboardInterrupt, EndedAtOnce):
            count = len(list((out / "records").glob("*.json")))
            kept = f"{count} records and what was saved of the run that was cut are kept"
            raise EndedAtOnce(f"{out}: ended at once; {kept}; repeat the command to continue") from None


def read_records(campaign: Campaign, all_runs: Sequence[PlannedRun], out: Path) -> dict[str, RunRecord]:
    """The records in `out`, by name, in the campaign's order. A failed run of another config counts as never tried."""
    found = {}
    for run in all_runs:
        path = out / "records" / f"{run.name}.json"
        if not path.exists():
            continue
        record = read_record(path)
        if record.identity == run.identity(campaign):
            found[run.name] = record
        elif record.done:
            raise BadInput(
                f"{path}: was made with another config or other measurements; use another --out, or remove it"
            )
    return found


def write_tables(
    campaign: Campaign, all_runs: Sequence[PlannedRun], records: Mapping[str, RunRecord], out: Path
) -> None:
    """OUT/table.md and the plots, from the records only; plots only where matplotlib is there."""
    plots = draw(campaign, list(records.values()), out)
    write_text(out / "table.md", table(campaign, [run.name for run in all_runs], list(records.values()), plots))


def perform(
    run: PlannedRun,
    campaign: Campaign,
    all_runs: Sequence[PlannedRun],
    out: Path,
    load: Callable[[PlannedRun], Dataset],
    limits: Limits,
    device: str,
    command: str,
    track: Track,
    log: Callable[[str], None],
) -> RunRecord:
    """Train and measure one run, from wherever it was cut."""
    directory = out / "runs" / run.name
    manifest = train(run.config, directory, resume=True, limits=limits, track=track, log=log)
    shutil.rmtree(directory / "state", ignore_errors=True)  # a finished run needs none; 130 MB at full width
    trained = load_run(directory, device, code=run.config.model.code)
    if run.method in campaign.sources:
        write_weights(out / "weights" / f"{run.name}.safetensors", trained.model)
    evaluations: tuple[Evaluation, ...] = ()
    missing: tuple[dict[str, str], ...] = ()
    if run.measured:
        partial = Partial(out / "partial" / f"{run.name}.json", run.identity(campaign) + trained.checkpoint_sha256)
        sources = {
            name: find_source(source_of(run, measurement, all_runs), out, device)
            for name, measurement in campaign.measurements.items()
            if measurement.source
        }
        with partial.kept(), asking(trained.model, limits):
            evaluations, missing = measure(run.name, trained.model, load(run), campaign, sources, partial, track)
    record = RunRecord(
        **entry_of(run),
        identity=run.identity(campaign),
        status="done",
        training=summary(manifest, directory),
        evaluations=evaluations,
        not_measured=missing,
        about={"command": command, "created": now(), "device": device, **provenance()},
    )
    (out / "partial" / f"{run.name}.json").unlink(missing_ok=True)
    return record


def code_of(error: Exception) -> int:
    """As what a run's failure counts: 2 where a file, a setting or the machine's memory is in the way, else 5."""
    return 2 if lacks_memory(error) or isinstance(error, BadInput) else 5


def described(error: Exception) -> str:
    """One line: an error of ours says all itself, of any other its kind and place too."""
    message = " ".join(str(error).split())
    if lacks_memory(error):
        return without_memory(message)
    if isinstance(error, DfmclError):
        return message
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message} ({Path(where.filename).name}:{where.lineno})"


def summary(manifest: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """What a record keeps of a training. Time is that of the epochs' steps, so that cuts and kills do not count."""
    with (directory / "metrics.csv").open(encoding="utf-8") as file:
        history = [{key: number(text) for key, text in row.items()} for row in csv.DictReader(file)]
    speeds = [float(row["images_per_second"]) for row in history]
    images = manifest["config"]["optimization"]["batch_size"] * history[-1]["step"] / len(history)
    return {
        "result": manifest["result"],
        "history": history,
        "minutes": sum(images / speed for speed in speeds) / 60,
        "images_per_second": median(speeds),
        "model": manifest["model"],
        "data_sha256": manifest["data"]["sha256"],
        "checkpoint_sha256": next(iter(manifest["files"].values())),
        "hardware": manifest["hardware"],
    }


def number(text: str) -> int | float | str:
    """A cell of metrics.csv as JSON can hold it: what is not finite stays text."""
    for kind in (int, float):
        try:
            value: int | float = kind(text)
        except ValueError:
            continue
        return value if np.isfinite(value) else text
    return text


@contextmanager
def asking(model: Classifier, limits: Limits) -> Iterator[None]:
    """Inside: every forward pass asks first whether time is over; a batch of a long attack takes minutes."""
    handle = model.register_forward_pre_hook(lambda module, inputs: limits.check())
    try:
        yield
    finally:
        handle.remove()


def make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def load_once(track: Track) -> Callable[[PlannedRun], Dataset]:
    """A loader that keeps the last data set: the runs of a campaign share one."""
    kept: dict[tuple[str, str, int, str], Dataset] = {}

    def load(run: PlannedRun) -> Dataset:
        chosen = run.config.data
        key = (*chosen.named, chosen.preprocessing)
        if key not in kept:
            kept.clear()
            kept[key] = open_dataset(*chosen.named, track, preprocessing=chosen.preprocessing)
        return kept[key]

    return load


def write_weights(path: Path, model: Classifier) -> None:
    """A network in float16, and beside it the description to build it from."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    write_bytes(path, save(tensors))
    write_text(path.with_suffix(".json"), dump_json(model.spec.to_json()))


def find_source(run: PlannedRun | None, out: Path, device: str) -> Classifier | str:
    """The network to craft on, or why there is none."""
    if run is None:
        return "it would be its own source"
    path = out / "weights" / f"{run.name}.safetensors"
    if not path.exists():
        return f"the weights of {run.name} are missing; once they are there, remove this run's record to measure again"
    try:
        spec = ModelSpec.from_json(read_json(path.with_suffix(".json")))
        model = Classifier(spec, code=run.config.model.code)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    except (BadInput, RuntimeError, SafetensorError) as error:
        return f"the weights of {run.name} are not readable: {str(error).splitlines()[0]}"
    return model.eval().to(device)


if __name__ == "__main__":  # `python -m dfmcl.training.campaign FILE --out DIR`, also where nothing is installed
    import runpy
    import sys

    sys.argv.insert(1, "campaign")
    runpy.run_module("dfmcl", run_name="__main__")
