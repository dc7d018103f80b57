"""The model repository that Triton reads: names, layout, and the config.pbtxt of a promoted model.

<repository>/<model>/config.pbtxt                      which version is served, and how: by the provider that decided
<repository>/<model>/configs/gpu.pbtxt                 what --model-config-name=gpu asks for
<repository>/<model>/<N>/{model.onnx, labels.txt, manifest.json}                       immutable, as are
<repository>/<model>/<N>/{report.json, probes.npz, attestation.intoto.jsonl}           what vouches for them
<repository>/<model>/<N>/model.sig                     one signature over all of these, where a key for it was given
<repository>/<model>/README.md                         model card, where `dfmcl card` wrote one
<repository>/<model>/surrogates/<name>/                packed runs to attack it with, where some were shipped
<repository>/aliases.json                              {"<model>": {"champion": N, "previous": M, "candidate": K}}
<repository>/history.jsonl                             every change, one a line
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dfmcl.common.batch import most_served
from dfmcl.common.errors import BadInput, Refused
from dfmcl.common.preprocessing import PARAMETER, USUAL
from dfmcl.common.providers import FULL, TF32_VARIABLE, WHOLE, Decider
from dfmcl.common.reader import RECORD_BYTES, TEXT_BYTES, Unfit, parse_object, why_unread
from dfmcl.release.candidate import INPUT, LABELS, MANIFEST, MODEL, OUTPUT, Manifest, manifest_at
from dfmcl.release.stores.store import Item, Store

CONFIG = "config.pbtxt"
GPU_CONFIG = "configs/gpu.pbtxt"
ALIASES = "aliases.json"
HISTORY = "history.jsonl"
SHADOW = "-shadow"
REPORT = "report.json"
PROBES = "probes.npz"
ATTESTATION = "attestation.intoto.jsonl"
SIGNATURE = "model.sig"  # where a key was given that can sign one
CARD = "README.md"
SURROGATES = "surrogates"
EVIDENCE = frozenset({REPORT, PROBES, ATTESTATION})
VERSION_FILES = EVIDENCE | {MODEL, LABELS, MANIFEST}
CONFIGS = (CONFIG, GPU_CONFIG)
REPLACED = (*CONFIGS, CARD)  # of a model; what else lies there is immutable

DEFAULT = Decider()
PROVIDERS = "execution_providers"  # of our backend, in a config's parameters: [[name, options], ...] as JSON

# A letter first: what starts with a dot or a dash is a hidden file or a flag to other programs.
MODEL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# As promotion writes them: Triton takes 004 for version 4, and two directories for one version are one too many.
VERSION = re.compile(r"[1-9][0-9]{0,17}")
MEND = "`dfmcl repair` mends it"
REMOVE = "remove that and repair again"


def files_in(version: Path) -> tuple[str, ...]:
    """The files of a version that lies in a directory: VERSION_FILES, and model.sig where there is one."""
    signature = (SIGNATURE,) if (version / SIGNATURE).is_file() else ()
    return (*sorted(VERSION_FILES), *signature)


def checked_name(name: str) -> str:
    """The name if it is safe as a directory, a URL segment and a metric label; BadInput otherwise."""
    if not MODEL_NAME.fullmatch(name):
        raise BadInput(f"model name {name!r}: use a letter, then up to 63 letters, digits, '_' or '-'")
    return name


def configs(
    manifest: Manifest, name: str, version: int, *, threads: int = 0, decider: Decider = DEFAULT
) -> dict[str, str]:
    """The files, by path in the model's directory, that serve exactly `version`; config.pbtxt, the commit, comes last.

    threads: ONNX Runtime's threads per inference on a CPU; 0: one a core, its own choice, which sees no container's CPU
    limit: name the limit there.
    decider: by whom the version was judged. What another than the CPU judged is served by that one alone.
    """
    if decider.provider == DEFAULT.provider:
        return {
            GPU_CONFIG: _config(manifest, name, version, 0, GPU),
            CONFIG: _config(manifest, name, version, threads, CPU),
        }
    text = _config(manifest, name, version, threads, instances(decider, threads))
    return {GPU_CONFIG: text, CONFIG: text}


def decider_at(store: Store, folder: str) -> Decider:
    """By whom the version in a folder was judged, as its report says; the CPU, where it says nothing.

    BadInput where it cannot be read.
    """
    name = f"{folder}/{REPORT}"
    try:
        told = parse_object(store.read(name, RECORD_BYTES)).get("decided")
        found = DEFAULT if told is None else Decider(told["provider"], told["precision"], told["tf32"])
        trouble = found.trouble or ("" if isinstance(found.tf32, bool) else "tf32")
    except (OSError, Unfit) as error:
        raise BadInput(f"{store.where(name)}: not readable ({why_unread(error)}); {MEND}") from None
    except (KeyError, TypeError):
        trouble = "decided"
    if trouble:
        raise BadInput(f"{store.where(name)}: decided names no provider that there is; {MEND}")
    return found


def instances(decider: Decider, threads: int) -> str:
    """How a version is served by the provider that judged it.

    The accelerator is for NVIDIA's backend, the parameter is for ours. OpenVINO's accelerator has no precision there:
    a name that it does not know stops it, because float32 in place of bfloat16 was not judged.
    """
    told = json.dumps(json.dumps(decider.asked(threads)))
    if decider.kind.gpu:
        tf32 = f'parameters {{ key: "use_tf32" value: "{int(decider.tf32)}" }}'
        cuda = f'  {{ name: "cuda" {tf32} }}'
        rows = [cuda] if decider.provider == "cuda" else [_tensorrt(decider), cuda]
        group, where = "instance_group [ { count: 2 kind: KIND_GPU } ]", "gpu_execution_accelerator"
    else:
        known = decider.precision in (FULL, WHOLE)
        rows = [f'  {{ name: "{decider.provider if known else f"{decider.provider}-{decider.precision}"}" }}']
        group, where = "instance_group [ { count: 1 kind: KIND_CPU } ]", "cpu_execution_accelerator"
    accelerators = ",\n".join(rows)
    return f"""\
# Judged by {decider}: nothing else may serve it.
{group}
optimization {{ execution_accelerators {{ {where} : [
{accelerators}
] }} }}
parameters {{ key: "{PROVIDERS}" value {{ string_value: {told} }} }}"""


def _tensorrt(decider: Decider) -> str:
    off = "" if decider.tf32 else f"  # it rounds to TF32 unless Triton runs with {TF32_VARIABLE}=0\n"
    return f"""\
{off}  {{
    name: "tensorrt"
    parameters {{ key: "precision_mode" value: "{decider.precision.upper()}" }}
    parameters {{ key: "trt_engine_cache_enable" value: "1" }}
    parameters {{ key: "trt_engine_cache_path" value: "/cache" }}
  }}"""


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
    dims, most = ", ".join(str(size) for size in manifest.input_shape), most_served(prod(manifest.input_shape))
    warmup = "\n".join(_warmup(size, dims) for size in sorted({1, most}))
    return f"""\
# Written by promotion; do not edit: the next promotion replaces it.
name: "{checked_name(name)}"
backend: "onnxruntime"
default_model_filename: "{MODEL}"
max_batch_size: {most}
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
{_preprocessing(manifest)}# Probes must reach the model, not a cache of its answers.
response_cache {{ enable: false }}
{warmup}
metric_tags {{ key: "sha" value: "{manifest.model_sha256[:12]}" }}
"""


def _preprocessing(manifest: Manifest) -> str:
    """How the gateway brings a picture to this size, where it is not as usual."""
    if manifest.preprocessing == USUAL:
        return ""
    return f'parameters {{ key: "{PARAMETER}" value {{ string_value: "{manifest.preprocessing}" }} }}\n'


def _warmup(batch_size: int, dims: str) -> str:
    return f"""\
model_warmup {{
  name: "batch{batch_size}" batch_size: {batch_size} count: 1
  inputs {{ key: "{INPUT}" value {{ data_type: TYPE_UINT8 dims: [ {dims} ] random_data: true }} }}
}}"""


def parse_config(text: str, where: str) -> Any:
    """A config.pbtxt through Triton's own protobuf, as a ModelConfig; BadInput where Triton could not read it."""
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise BadInput(f"{where}: not a Triton model configuration ({error}); {MEND}") from None
    return config


def config_bytes(store: Store, name: str, config: str = CONFIG) -> bytes:
    """A model's config as it lies there; BadInput where it cannot be read."""
    try:
        return store.read(f"{name}/{config}", TEXT_BYTES)
    except (OSError, Unfit) as error:
        where = store.where(f"{name}/{config}")
        with suppress(OSError):  # what keeps the config from being read may hide the folder, too
            if f"{name}/{config}" in strangers(store, name):
                raise BadInput(f"{where}: promotion did not write this; {REMOVE}") from None
        raise BadInput(f"{where}: not readable ({why_unread(error)}); {MEND}") from None


def read_config(store: Store, name: str, config: str = CONFIG) -> Any:
    """The same as a ModelConfig; BadInput where it is none."""
    where = store.where(f"{name}/{config}")
    try:
        return parse_config(config_bytes(store, name, config).decode("utf-8"), where)
    except UnicodeDecodeError:
        raise BadInput(f"{where}: not readable (not text); {MEND}") from None


def served_version(store: Store, name: str, config: str = CONFIG) -> int | None:
    """The one version that a model's config.pbtxt serves; None where there is no config."""
    if not lies_there(store, f"{name}/{config}"):
        return None
    versions = read_config(store, name, config).version_policy.specific.versions
    if len(versions) != 1 or not VERSION.fullmatch(str(versions[0])):
        where = store.where(f"{name}/{config}")
        raise BadInput(f"{where}: serves versions {list(versions)}, expected exactly one, from 1 on; {MEND}")
    return int(versions[0])


def threads_of(store: Store, name: str, config: str = CONFIG) -> int:
    """The threads per inference that a model's config asks for; 0 where it says nothing of them."""
    text = read_config(store, name, config).parameters["intra_op_thread_count"].string_value
    return int(text) if text.isdecimal() else 0


def require_ours(store: Store, name: str, config: str, manifest: Manifest, version: int) -> None:
    """Refuse a config that is not, letter for letter, what promotion writes for that version.

    What else Triton may be told to run, to load or to answer from is too much to list.
    """
    decider = decider_at(store, f"{name}/{version}")
    expected = configs(manifest, name, version, threads=threads_of(store, name, config), decider=decider)[config]
    if config_bytes(store, name, config).decode("utf-8") != expected:
        where = store.where(f"{name}/{config}")
        raise Refused(f"{where}: is not what promotion writes for version {version}; {MEND}")


def is_version(entry: Item) -> bool:
    """Whether an entry is a version's folder as promotion names them: 4, but not 004, +4 or a link."""
    return bool(VERSION.fullmatch(entry.name)) and entry.folder and not entry.link


def version_numbers(store: Store, name: str) -> list[int]:
    """The versions of a model that lie there, ascending, served or not."""
    return sorted(int(entry.name) for entry in entries(store, name) if is_version(entry))


def manifest_of(store: Store, name: str, version: int | None) -> Manifest:
    """The manifest of a version that lies there; BadInput where there is none."""
    return manifest_at(store, f"{name}/{version}/{MANIFEST}")


def strangers(store: Store, name: str) -> list[str]:
    """Names of what lies in a model's folder and promotion did not write.

    A library beside the model would replace the backend itself: docs of triton-inference-server/backend. Triton reads
    neither the card nor the surrogates, as it takes only numbered directories for versions.
    """
    return sorted(found for entry in store.entries(name) for found in _strangers_at(store, name, entry))


def _strangers_at(store: Store, model: str, entry: Item) -> list[str]:
    name, (gpu_folder, gpu_file) = f"{model}/{entry.name}", GPU_CONFIG.split("/")
    if entry.name in (CONFIG, CARD):
        return [] if entry.file else [name]
    if is_version(entry) or (entry.name == gpu_folder and entry.folder):
        known = {gpu_file} if entry.name == gpu_folder else VERSION_FILES | {SIGNATURE}
        return [f"{name}/{file.name}" for file in store.entries(name) if file.name not in known]
    return [] if entry.folder and entry.name == SURROGATES else [name]


def model_names(store: Store) -> list[str]:
    """The promoted models: folders with a config.pbtxt, whatever stands in it."""
    return [name for name in folders(store) if lies_there(store, f"{name}/{CONFIG}")]


def folders(store: Store) -> list[str]:
    """Folders that may be a model's by their names; none where there is no repository."""
    return [entry.name for entry in entries(store) if MODEL_NAME.fullmatch(entry.name) and entry.folder]


def entry_at(store: Store, name: str) -> Item:
    """What has a name; an entry that is neither file nor folder where nothing has it."""
    folder, _, last = name.rpartition("/")
    return next((entry for entry in entries(store, folder) if entry.name == last), Item(last))


def entries(store: Store, folder: str = "") -> list[Item]:
    """What lies in a folder; nothing where it is not there, or may not be entered."""
    try:
        return store.entries(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def taken(store: Store, name: str) -> bool:
    """Whether something has a folder's name, whatever it is."""
    folder, _, last = name.rpartition("/")
    return any(entry.name == last for entry in entries(store, folder))


def lies_there(store: Store, name: str) -> bool:
    """Whether a file is there, also where its folder may not be entered: what is unreadable is not retired."""
    try:
        store.etag(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
