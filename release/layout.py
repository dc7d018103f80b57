"""The model repository that Triton reads: names, layout, and the config.pbtxt of a promoted model.

<repository>/<model>/config.pbtxt                      which version is served, and how: on CPUs
<repository>/<model>/configs/gpu.pbtxt                 the same on a GPU, for --model-config-name=gpu
<repository>/<model>/<N>/{model.onnx, labels.txt, manifest.json}                       immutable, as are
<repository>/<model>/<N>/{report.json, probes.npz, attestation.intoto.jsonl}           what vouches for them
<repository>/<model>/README.md                         model card, where `dfmcl card` wrote one
<repository>/<model>/surrogates/<name>/                packed runs to attack it with, where some were shipped
<repository>/aliases.json                              {"<model>": {"champion": N, "previous": M, "candidate": K}}
<repository>/history.jsonl                             every change, one a line
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dfmcl.common.errors import BadInput, Refused
from dfmcl.common.preprocessing import PARAMETER
from dfmcl.common.reader import TEXT_BYTES, Unfit, read_plain, why_unread
from dfmcl.release.candidate import INPUT, LABELS, MANIFEST, MODEL, OUTPUT, Manifest

CONFIG = "config.pbtxt"
GPU_CONFIG = "configs/gpu.pbtxt"
ALIASES = "aliases.json"
HISTORY = "history.jsonl"
STAGING = ".staging-"
SHADOW = "-shadow"
REPORT = "report.json"
PROBES = "probes.npz"
ATTESTATION = "attestation.intoto.jsonl"
CARD = "README.md"
SURROGATES = "surrogates"
EVIDENCE = frozenset({REPORT, PROBES, ATTESTATION})
VERSION_FILES = EVIDENCE | {MODEL, LABELS, MANIFEST}

MAX_BATCH_SIZE = 64
PROBE_PRIORITY = 2  # for a Triton whose config has priority levels: there users go first; ours ignores it

# A letter first: what starts with a dot or a dash is a hidden file or a flag to other programs.
MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# As promotion writes them: Triton takes 004 for version 4, and two directories for one version are one too many.
VERSION = re.compile(r"[1-9][0-9]{0,17}")
MEND = "`dfmcl repair` mends it"


def checked_name(name: str) -> str:
    """The name if it is safe as a directory, a URL segment and a metric label; BadInput otherwise."""
    if not MODEL_NAME.fullmatch(name):
        raise BadInput(f"model name {name!r}: use a letter, then up to 63 letters, digits, '_' or '-'")
    return name


def configs(manifest: Manifest, name: str, version: int, *, threads: int = 0) -> dict[str, str]:
    """The files, by path in the model's directory, that serve exactly `version`; config.pbtxt, the commit, comes last.

    threads: ONNX Runtime's threads per inference on a CPU; 0: one a core, its own choice, which sees no container's CPU
    limit: name the limit there.
    """
    return {
        GPU_CONFIG: _config(manifest, name, version, 0, GPU),
        CONFIG: _config(manifest, name, version, threads, CPU),
    }


# The count is always written: without it the python backend starts two instances on a CPU.
CPU = "instance_group [ { count: 1 kind: KIND_CPU } ]"
# Two, so that one copies while the other computes. FP32, as half precision is another model with another robustness:
# `dfmcl parity` measures it.
GPU = """\
instance_group [ { count: 2 kind: KIND_GPU } ]
optimization { execution_accelerators { gpu_execution_accelerator : [
  {
    name: "tensorrt"
    parameters { key: "precision_mode" value: "FP32" }
    parameters { key: "trt_engine_cache_enable" value: "1" }
    parameters { key: "trt_engine_cache_path" value: "/cache" }
  },
  { name: "cuda" parameters { key: "cudnn_conv_use_max_workspace" value: "1" } }
] } }"""


def _config(manifest: Manifest, name: str, version: int, threads: int, instances: str) -> str:
    """The same text for NVIDIA's image and for the pip runtime."""
    dims = ", ".join(str(size) for size in manifest.input_shape)
    warmup = "\n".join(_warmup(size, dims) for size in (1, MAX_BATCH_SIZE))
    return f"""\
# Written by promotion; do not edit: the next promotion replaces it.
name: "{checked_name(name)}"
backend: "onnxruntime"
default_model_filename: "{MODEL}"
max_batch_size: {MAX_BATCH_SIZE}
input [ {{ name: "{INPUT}" data_type: TYPE_UINT8 format: FORMAT_NHWC dims: [ {dims} ] }} ]
output [
  {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {len(manifest.labels)} ] label_filename: "{version}/{LABELS}" }}
]
version_policy {{ specific {{ versions: [ {version} ] }} }}
{instances}
# No queue delay: batches form behind a running one. And no queue policy or priority levels: with either, Triton 2.51
# lets one request in some hundred wait 500 ms for its batcher to wake up, and a client alone lost half its throughput.
dynamic_batching {{ }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "{threads}" }} }}
parameters {{ key: "inter_op_thread_count" value {{ string_value: "1" }} }}
# How the gateway brings a picture to this size: as the images were that the model was judged on.
parameters {{ key: "{PARAMETER}" value {{ string_value: "{manifest.preprocessing}" }} }}
# Probes must reach the model, not a cache of its answers.
response_cache {{ enable: false }}
{warmup}
metric_tags {{ key: "sha" value: "{manifest.model_sha256[:12]}" }}
"""


def _warmup(batch_size: int, dims: str) -> str:
    return f"""\
model_warmup {{
  name: "batch{batch_size}" batch_size: {batch_size} count: 1
  inputs {{ key: "{INPUT}" value {{ data_type: TYPE_UINT8 dims: [ {dims} ] random_data: true }} }}
}}"""


def parse_config(text: str, where: str | Path) -> Any:
    """A config.pbtxt through Triton's own protobuf, as a ModelConfig; BadInput where Triton could not read it."""
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise BadInput(f"{where}: not a Triton model configuration ({error}); {MEND}") from None
    return config


def read_config(path: Path) -> Any:
    """A config.pbtxt of a repository, as a ModelConfig; BadInput where it cannot be read."""
    try:
        text = read_plain(path, TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not readable (not text); {MEND}") from None
    except (OSError, Unfit) as error:
        raise BadInput(f"{path}: not readable ({why_unread(error)}); {MEND}") from None
    return parse_config(text, path)


def served_version(model: Path, config: str = CONFIG) -> int | None:
    """The one version that a model directory's config.pbtxt serves; None where there is no config."""
    path = model / config
    if not _lies_there(path):
        return None
    versions = read_config(path).version_policy.specific.versions
    if len(versions) != 1 or not VERSION.fullmatch(str(versions[0])):
        raise BadInput(f"{path}: serves versions {list(versions)}, expected exactly one, from 1 on; {MEND}")
    return int(versions[0])


def threads_of(model: Path) -> int:
    """The threads per inference that a model directory's config.pbtxt asks for; 0 where it says nothing of them."""
    text = read_config(model / CONFIG).parameters["intra_op_thread_count"].string_value
    return int(text) if text.isdecimal() else 0


def require_ours(path: Path, manifest: Manifest, name: str, version: int) -> None:
    """Refuse a config that is not, letter for letter, what promotion writes for that version.

    What else Triton may be told to run, to load or to answer from is too much to list.
    """
    kind = CONFIG if path.name == CONFIG else GPU_CONFIG
    threads = read_config(path).parameters["intra_op_thread_count"].string_value
    expected = configs(manifest, name, version, threads=int(threads) if threads.isdecimal() else 0)[kind]
    if path.read_text(encoding="utf-8") != expected:
        raise Refused(f"{path}: is not what promotion writes for version {version}; {MEND}")


def is_version(path: Path) -> bool:
    """Whether a path is a version's directory as promotion names them: 4, but not 004, +4 or a link."""
    return bool(VERSION.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()


def version_numbers(model: Path) -> list[int]:
    """The versions on disk, ascending, served or not."""
    return sorted(int(path.name) for path in model.glob("*") if is_version(path))


def strangers(model: Path) -> list[Path]:
    """Paths in a model's directory that promotion did not write.

    A library beside the model would replace the backend itself: docs of triton-inference-server/backend. Triton reads
    neither the card nor the surrogates, as it takes only numbered directories for versions.
    """
    return sorted(stranger for path in model.iterdir() for stranger in _strangers_at(path))


def _strangers_at(path: Path) -> list[Path]:
    gpu = Path(GPU_CONFIG)
    if path.name.startswith(STAGING):  # what a promotion left that died; Triton reads no such name
        return []
    if path.name in (CONFIG, CARD):
        return [] if path.is_file() else [path]
    if path.name == gpu.parent.name and path.is_dir():
        return [file for file in path.iterdir() if file.name != gpu.name and not file.name.startswith(STAGING)]
    if is_version(path):
        return [file for file in path.iterdir() if file.name not in VERSION_FILES]
    return [] if path.is_dir() and path.name == SURROGATES else [path]


def model_names(repository: Path) -> list[str]:
    """The promoted models: directories with a config.pbtxt, whatever stands in it."""
    return [name for name in folders(repository) if _lies_there(repository / name / CONFIG)]


def folders(repository: Path) -> list[str]:
    """Directories that may be a model's by their names; none where there is no repository."""
    return sorted(path.name for path in repository.glob("*") if MODEL_NAME.fullmatch(path.name) and path.is_dir())


def _lies_there(path: Path) -> bool:
    """Whether a file is there, also where its directory may not be entered: what is unreadable is not retired."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
