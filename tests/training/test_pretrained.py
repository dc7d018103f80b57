"""Fine-tuning: what a run begins with, what of it moves and how fast, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from dfmcl.common.errors import BadInput, Interrupted
from dfmcl.common.files import sha256_of
from dfmcl.robustness.data import Dataset
from dfmcl.robustness.models import Classifier, ModelSpec, to_float
from dfmcl.robustness.runs import CHECKPOINT, load_run
from dfmcl.robustness.scale import Scale
from dfmcl.robustness.weights import PREFIXES, fitted, read_weights
from dfmcl.training.config import load_config
from dfmcl.training.limits import Limits
from dfmcl.training.optimizer import blocks_of
from dfmcl.training.pretrained import read_pretrained, scale_of
from dfmcl.training.train import begin, in_pixels, train
from tests.training.workshop import NARROW, PLAIN, StopAfter, batch, learner, quiet

TINY = [*NARROW, "data.train_images=180", "optimization.epochs=2", "heldout.images=20", "heldout.attack_steps=1"]


def network(classes: int, seed: int = 0) -> Classifier:
    """A narrow ResNet-18 that something else trained, as far as these tests are concerned."""
    torch.manual_seed(seed)
    return Classifier(ModelSpec("resnet18", 4, classes, (16, 16, 3), (0.0,) * 3, (1.0,) * 3)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The weights of a network for 7 classes."""
    path = tmp_path / "weights.safetensors"
    save_file(network(7).net.state_dict(), path)
    return path


def test_a_run_begins_with_the_weights_and_a_head_of_its_own(saved: Path, digits: Dataset, tmp_path: Path) -> None:
    """Features of the data are the source's, bit for bit, on the scale that was named; the manifest tells it all."""
    options = [*TINY, f"model.weights={saved}", "model.scale=0..255 mean=127 std=128"]
    model, entry = begin(load_config("quickstart", options), digits, quiet)
    assert entry == {"source": str(saved), "sha256": sha256_of(saved), "fresh": ["fc.weight", "fc.bias"]}
    x = to_float(batch(digits)[0])
    expected, scaled = network(7).features, Scale(255, (127.0,), (128.0,)).applied(x)
    assert torch.allclose(model.eval().features(x), expected(scaled), atol=1e-4)
    said: list[str] = []
    manifest = train(load_config("quickstart", options), tmp_path / "run", log=said.append)
    assert manifest["weights"] == entry
    assert said[0] == f"begins with {saved}, which expects 0..255 mean=127 std=128; fc.weight, fc.bias begin anew"
    assert load_run(tmp_path / "run").model.spec.mean == pytest.approx([127 / 255] * 3)


def test_a_run_goes_on_where_it_began(saved: Path, tmp_path: Path) -> None:
    """Bit for bit, from a finished run's own checkpoint too; other weights under the same name are refused."""
    config = load_config("quickstart", [*TINY, f"model.weights={saved}", "model.scale=plain"])
    train(config, tmp_path / "uncut", log=quiet)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", log=quiet, limits=Limits(StopAfter(7)))
    whole = saved.read_bytes()
    save_file(network(7, seed=1).net.state_dict(), saved)
    with pytest.raises(BadInput, match="began with other weights than"):
        train(config, tmp_path / "cut", log=quiet, resume=True)
    saved.write_bytes(whole)
    train(config, tmp_path / "cut", log=quiet, resume=True)
    assert sha256_of(tmp_path / "cut" / CHECKPOINT) == sha256_of(tmp_path / "uncut" / CHECKPOINT)
    ours = load_config("quickstart", [*TINY, f"model.weights={tmp_path / 'cut' / CHECKPOINT}", "model.scale=plain"])
    manifest = train(ours, tmp_path / "further", log=quiet)
    assert manifest["weights"]["fresh"] == []


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_that_wrappers_prefix_are_the_same(prefix: str) -> None:
    """So are states in the containers of training scripts, and counters that are not there."""
    source, target = network(7), network(7, seed=1)
    weights = {prefix + name: value for name, value in source.net.state_dict().items() if "num_batches" not in name}
    state, head = fitted(weights, target.net, "w")
    target.net.load_state_dict(state)
    x = torch.rand(2, 3, 16, 16)
    assert head == ()
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("container", ["", "state_dict", "model", "model_ema"])
def test_states_of_training_scripts_are_read(tmp_path: Path, container: str) -> None:
    """With what else they keep there."""
    state = network(7).net.state_dict()
    torch.save({container: state, "epoch": 3, "args": {"lr": 0.1}} if container else state, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == state.keys()


class Opens:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_files_that_are_no_weights_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing that a file asks for is run."""
    torch.save(network(7), tmp_path / "module.pth")
    torch.save({"a": Opens()}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    for name, message in (
        ("module.pth", "holds more than weights .*, which only code could read"),
        ("code.pth", "holds more than weights .*, which only code could read"),
        ("pickle.pth", "holds more than weights|holds no state dict .a."),
        ("none.pth", "holds no state dict .epoch."),
        ("list.pth", "holds no state dict .list."),
        ("text.pth", "not readable as weights|holds more than weights"),
        ("empty.pth", "not readable as weights"),
        ("cut.safetensors", "not readable as weights|holds more than weights"),
        ("nowhere.pth", "not readable as weights: No such file"),
        (".", "not readable as weights: Is a directory"),
    ):
        with pytest.raises(BadInput, match=message):
            read_weights(tmp_path / name)
    assert "run" not in capfd.readouterr().out


def test_weights_that_do_not_fit_are_named(saved: Path, digits: Dataset) -> None:
    """Another width, another architecture, a missing layer, no scale, one that training cannot give, unknown names."""
    for options, message in (
        (["model.width=8", "model.scale=plain"], r"conv1\.weight is \(4, 3, 3, 3\), the network's \(8, 3, 3, 3\)"),
        (["model.arch=torchvision:mobilenet_v3_small", "model.scale=plain"], r"has no features\.0\.0\.weight"),
        ([], "what scale do they expect"),
        (["model.scale=imagenet BGR"], "training gives RGB"),
        (["model.scale=nonsense"], "model.scale: 'nonsense'"),
        (["model.scale=mean=1,2"], "mean has 2 values"),
        (["model.weights=torchvision:resnet_of_nobody"], "cannot be had here"),
        (["model.weights=timm:no_such_network"], "cannot be had here|needs timm"),
        (["model.weights=s3://bucket/w.pth", "model.scale=plain"], "s3: is no folder here"),
    ):
        with pytest.raises(BadInput, match=message):
            begin(load_config("quickstart", [*TINY, f"model.weights={saved}", *options]), digits, quiet)
    weights = read_weights(saved)
    del weights["layer2.0.conv1.weight"]
    with pytest.raises(BadInput, match=r"w: has no layer2\.0\.conv1\.weight \(1 of the network's"):
        fitted(weights, network(7).net, "w")


def test_a_scale_is_a_library_s_where_it_says_one(saved: Path) -> None:
    """The config's words go before it; without weights nothing need be said."""
    known = read_pretrained(str(saved))
    assert scale_of("", None) is None
    assert scale_of("clip", known) == Scale.parse(["clip"])
    told = copy.replace(known, scale=Scale.parse(["imagenet"])) if hasattr(copy, "replace") else None
    assert told is None or scale_of("", told) == Scale.parse(["imagenet"])
    assert in_pixels(Scale.parse(["inception"]), 3) == ((0.5,) * 3, (0.5,) * 3)


def test_frozen_modules_stay(digits: Dataset) -> None:
    """Weights and batch norms, also where weights are perturbed; all else moves. Unknown names, or all: refused."""
    one = learner(digits, *PLAIN, "model.frozen=['conv1', 'bn1', 'layer1']", "optimization.awp=0.01")
    before = copy.deepcopy(one.model.net.state_dict())
    for step in (1, 2):
        one.update(*batch(digits, step), step)
    moved = {name for name, value in one.model.net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if not name.startswith(("conv1", "bn1", "layer1"))}
    with pytest.raises(BadInput, match=r"model\.frozen: the network has no layer 'stem'"):
        learner(digits, *PLAIN, "model.frozen=['stem']")
    everything = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    with pytest.raises(BadInput, match=r"model\.frozen: conv1, .* are all there is"):
        learner(digits, *PLAIN, f"model.frozen={everything}")


def test_blocks_learn_the_slower_the_earlier_they_are(digits: Dataset) -> None:
    """The head at the full rate, each block before it at half of the one after; every weight in one group."""
    one = learner(digits, *PLAIN, "optimization.layer_decay=0.5", "optimization.optimizer=sgd", "optimization.lr=0.1")
    one.update(*batch(digits), 1)
    shares = {id(p): group["share"] for group in one.optimizer.param_groups for p in group["params"]}
    named = {name: shares.pop(id(p)) for name, p in one.model.net.named_parameters()}
    assert len(shares) == 1  # alpha's
    assert (named["fc.weight"], named["layer4.1.conv1.weight"], named["layer4.0.conv1.weight"]) == (1, 0.5, 0.25)
    assert named["conv1.weight"] == 0.5**10  # before it: batch norm, eight blocks, the head
    for group in one.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["share"])


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_blocks_are_all_parts_once_in_their_order(sizes: list[int]) -> None:
    """Sequences are opened at any depth."""
    parts = [nn.Linear(1, 1) for size in sizes for _ in range(size)]
    rest, nested = list(parts), nn.Sequential()
    for size in sizes:
        nested.append(nn.Sequential(*(rest.pop(0) for _ in range(size))))
    assert blocks_of(nn.ModuleList([nested])) == parts


@pytest.mark.parametrize("objective", ["ce", "trades"])
def test_a_batch_in_parts_is_the_batch(digits: Dataset, objective: str) -> None:
    """With frozen batch norm: attack, masks, weight perturbation, views. In float64, where sums of parts agree."""
    options = ["model.batch_norm=frozen", "optimization.awp=0.01", f"objective.name={objective}", "objective.views=1"]
    options += ["masking.rule=ranked", "curriculum.schedule=constant", "data.augmentation=crop"]
    whole, parts = (
        learner(digits, *options, f"optimization.accumulate={number}", dtype=torch.float64) for number in (1, 3)
    )
    for step in range(1, 4):
        losses = [one.update(*batch(digits, step), step).item() for one in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, parts.model.state_dict()[name], rtol=0, atol=1e-9), name
    with pytest.raises(BadInput, match=r"optimization\.batch_size: 12 is no multiple of 5"):
        learner(digits, "optimization.accumulate=5")


@pytest.mark.parametrize("name", ["finetune", "finetune_fast", "finetune_32"])
def test_presets_of_fine_tuning_train(tmp_path: Path, name: str) -> None:
    """Two steps from weights of other classes, on a stand-in of the right shape."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"x_{part}": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in (("train", 60), ("test", 10))
    }
    np.savez(tmp_path / "data.npz", **arrays, y_train=np.arange(60) % 10, y_test=np.arange(10))
    options = ["data.name=npz", f"data.path={tmp_path / 'data.npz'}", "data.heldout_images=20", "data.train_images=32"]
    options += ["optimization.batch_size=16", "optimization.epochs=1", "heldout.images=4", "heldout.attack_steps=1"]
    options += [f"model.weights={tmp_path / 'w.pth'}", "model.scale=imagenet", "model.width=4"]
    if name != "finetune_32":
        options.append("model.arch=torchvision:mobilenet_v3_small")
    spec = load_config(name, options).model
    torch.save(Classifier(ModelSpec(spec.arch, 4, 3, (32, 32, 3), (0.0,), (1.0,))).net.state_dict(), tmp_path / "w.pth")
    manifest = train(load_config(name, options), tmp_path / "run", log=quiet)
    assert manifest["result"]["step"] == 2
    assert len(manifest["weights"]["fresh"]) == 2
