"""PGD-20 and Square beside foolbox, torchattacks and ART: `make bench-attacks`.

Long, because each peer is called in its own way.

One full-width ResNet-18, the same images, the same run, all libraries in turn. PGD-20: images a second and robust
accuracy, on test images as they come, decided by the network in float32, whatever the library says; ours leaves
out what is wrong already and what has fallen, so it is also timed on images that the network gets right. Square, on
those: queries an image, counted as images that went through the network, and how many fell, over several seeds. Peers
are called as their documentation does.

With --shipped it is the network in model_repository/, whose run is not: what the export folded into its convolutions is
put back as batch norms, so that every library works on what training makes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich.progress import track
from torch import Tensor, nn

from benchmarks.result import write_result
from dfmcl.robustness.attacks.registry import Attack
from dfmcl.robustness.attacks.square import SHORTEST
from dfmcl.robustness.data import Dataset, load_dataset
from dfmcl.robustness.evaluate import evaluate
from dfmcl.robustness.models import Classifier, ModelSpec, frozen, to_bytes, to_float
from dfmcl.robustness.records import AttackRecord
from dfmcl.robustness.runs import load_run
from dfmcl.robustness.threats.ball import Ball
from dfmcl.robustness.threats.registry import threat_of
from dfmcl.training.config import load_config
from dfmcl.training.train import train

SHIPPED = Path(__file__).parents[1] / "model_repository" / "resnet18-cifar10" / "1" / "model.onnx"
EPS_OF_NORM = 1e-5  # that a batch norm adds to the variance, unless told otherwise
STEPS = 20
OURS = "dfmcl"
PEERS = ("foolbox", "torchattacks", "ART")
FROZEN = ", weights frozen for it"
RIGHT = "dfmcl, only images that the network gets right"
AT_SUCCESS, ART_STOPPED = "dfmcl, until ART's success", "ART, until its success"
GROUP = 8  # images in a call of a peer's Square
ART_SENDS = 3  # queries a step, at most: it asks anew whom it has fooled, and for the loss before and after


class Counted(nn.Module):
    """The network, and how many images went through it.

    seen: of each search that says so, and whenever it looked, the images it had sent and those that had fallen.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0
        self.seen: list[list[tuple[int, int]]] = []
        self.eval()  # a new module trains, and torchattacks puts that back afterwards, on the network as well

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        logits: Tensor = self.network(x)
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", type=Path, help="a run of full width; default: one is trained on digits, a minute")
    which.add_argument("--shipped", action="store_true", help="the network that is shipped, on CIFAR-10")
    parser.add_argument("--data", default="", help="where the data set lies")
    parser.add_argument("--eps", nargs="+", help="such as 4/255 8/255; default: what the run was trained for")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="searches of Square, each with another seed")
    arguments = parser.parse_args()
    if ART_SENDS * (arguments.queries + 1) > SHORTEST:
        parser.error(f"--queries: at most {SHORTEST // ART_SENDS - 1}; a longer search of ours begins otherwise")
    if arguments.shipped:
        model, data, radius = shipped(SHIPPED), load_dataset("cifar10", arguments.data), "8/255"
    else:
        with tempfile.TemporaryDirectory() as folder:
            run = load_run(arguments.run or small_run(Path(folder) / "run"))
        model, radius = run.model, run.manifest["config"]["curriculum"]["beta"]
        data = load_dataset(run.data["name"], arguments.data or run.data["path"], run.data["image_size"])
    radii = arguments.eps or [radius]
    model.eval()
    x, y = test_images(data, arguments.images)
    right = got_right(model, x, y)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for number, radius in enumerate(radii):
        threat = threat_of("linf", radius)
        found = pgd_rows(model, x, y, right, threat, arguments.rounds)
        if number == 0:
            with frozen(model):
                found += square_rows(model, x[right], y[right], threat, arguments.queries, arguments.seeds)
        rows += [{"attack": row["attack"], "threat": str(threat), **row} for row in found]
        ratios |= {f"{name}, {threat}" if number else name: ratio for name, ratio in ratios_of(found).items()}
    network = f"{model.spec.arch} of width {model.spec.width} on {data.name}"
    rounds = f"median of {arguments.rounds} rounds after one to warm up"
    conditions = {
        "n": f"the first {len(x)} test images, one batch; the network gets {int(right.sum())} of them right; PGD:"
        f" {rounds}; Square: the latter, mean of {arguments.seeds} searches",
        "seed": f"0; Square: 0 to {arguments.seeds - 1}, of peers one a call",
        "note": f"{network}; peers as they are documented, and given a network with frozen weights, which spares them a"
        f" third of the work; foolbox has no Square; PGD-{STEPS}: steps of 2.5 eps / {STEPS} from a random start; ours"
        " with what it costs to make the fast copy, to prove it, and to decide in float32, as bytes; it leaves out what"
        " is wrong already and what has fallen, with which peers go on; Square: images sent through the network, in"
        f" {arguments.queries} steps (of ART: of up to {ART_SENDS} queries; ours: the beginning of a longer search),"
        f" peers called on {GROUP} images at a time, as all of a call get the same patches, each with another seed;"
        " until ART's success: both stopped as soon as so many images have fallen as fall to ART in the end, all seeds"
        " together",
    }
    write_result("attacks", "Attacks beside their peers", rows, ratios, conditions)


def small_run(out: Path) -> Path:
    """Full width on digits, where no run is at hand."""
    overrides = ["model.width=64", "optimization.epochs=2", "curriculum.steps=2", "curriculum.beta=16/255"]
    train(load_config("quickstart_surrogate", [*overrides, "optimization.precision=bfloat16"]), out, log=print)
    return out


def shipped(path: Path) -> Classifier:
    """The network behind an exported ONNX file of full width."""
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    weights = {name.removeprefix("classifier.").removesuffix(".float16"): array for name, array in found.items()}
    mean, std = (tuple(weights[name].ravel().tolist()) for name in ("mean", "std"))
    model = Classifier(ModelSpec("resnet18", 64, len(weights["net.fc.bias"]), (32, 32, 3), mean, std, "silu")).eval()
    state = model.state_dict()
    for name in state:
        if name.endswith("running_var"):
            state[name].fill_(1 - EPS_OF_NORM)  # so that it divides by one
        elif ".bn" in name or ".downsample.1." in name:
            if name.endswith(".bias"):  # the export added it to the convolution before
                norm = name.replace(".bn", ".conv").replace(".downsample.1", ".downsample.0")
                state[name] = torch.from_numpy(weights[norm].copy()).float()
        else:
            state[name] = torch.from_numpy(weights[name].copy()).float()
    model.load_state_dict(state)
    return model


def test_images(data: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """The first test images `(N, C, H, W)` in [0, 1] and their labels."""
    return to_float(torch.from_numpy(data.x_test[:count])).contiguous(), torch.from_numpy(data.y_test[:count])


def got_right(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Which images the network gets right, `(N,)` bool."""
    with frozen(model), torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in x.split(128)]) == y


def pgd_rows(model: Classifier, x: Tensor, y: Tensor, right: Tensor, threat: Ball, rounds: int) -> list[dict[str, Any]]:
    """Images a second and robust accuracy of each library's PGD-20. right: `(N,)` bool, see RIGHT."""
    step = 2.5 * threat.eps / STEPS
    made: dict[str, Callable[[], Tensor] | None] = {
        OURS: our_pgd(model, x, y, threat),
        "dfmcl, float32": our_pgd(model, x, y, threat, precision="float32"),
        RIGHT: our_pgd(model, x[right], y[right], threat),
    }
    makers = {"foolbox": foolbox_pgd, "torchattacks": torchattacks_pgd, "ART": art_pgd}
    for name in PEERS:
        made[name] = attack = makers[name](model, x, y, threat, step)
        made[f"{name}{FROZEN}"] = attack and with_frozen(model, attack)
    attacked = {name: (x[right], y[right]) if name == RIGHT else (x, y) for name in made}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    held: dict[str, float] = {}
    for number in track(range(1 + rounds), description="PGD"):
        for name, attack in made.items():
            if attack is None:
                continue
            begun = time.perf_counter()
            x_adv = attack()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
            held[name] = share_that_holds(model, x_adv, *attacked[name], threat)
    return [
        {
            "attack": f"PGD-{STEPS}",
            "library": name,
            "images_per_s": len(attacked[name][0]) / float(np.median(seconds[name])) if attack else "not installed",
            "robust_accuracy": held.get(name),
        }
        for name, attack in made.items()
    ]


def with_frozen(model: nn.Module, attack: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The attack without gradients of the weights, which nobody needs and no peer leaves out by itself."""

    def run() -> Tensor:
        with frozen(model):
            return attack()

    return run


def share_that_holds(model: Classifier, x_adv: Tensor, x: Tensor, y: Tensor, threat: Ball) -> float:
    """Of all N images, in float32: right, and not fooled inside the ball."""
    fooled = ~got_right(model, x_adv, y) & threat.contains(x_adv, x)
    return float((got_right(model, x, y) & ~fooled).float().mean())


def our_pgd(model: Classifier, x: Tensor, y: Tensor, threat: Ball, precision: str = "auto") -> Callable[[], Tensor]:
    images, labels = to_bytes(x).numpy(), y.numpy()

    def attack() -> Tensor:
        suite = [Attack.parse(f"pgd-{STEPS}")]
        outcome = evaluate(model, images, labels, threat, suite, grid=True, batch_size=len(x), precision=precision)
        return to_float(torch.from_numpy(outcome.adversarial))

    return attack


def foolbox_pgd(model: Classifier, x: Tensor, y: Tensor, threat: Ball, step: float) -> Callable[[], Tensor] | None:
    try:
        import foolbox
    except ModuleNotFoundError:
        return None
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=step, random_start=True)

    def run() -> Tensor:
        x_adv: Tensor = attack(wrapped, x, y, epsilons=threat.eps)[1]
        return x_adv

    return run


def torchattacks_pgd(model: Classifier, x: Tensor, y: Tensor, threat: Ball, step: float) -> Callable[[], Tensor] | None:
    try:
        import torchattacks
    except ModuleNotFoundError:
        return None
    attack = torchattacks.PGD(model, eps=threat.eps, alpha=step, steps=STEPS, random_start=True)
    return lambda: attack(x, y)


def art_classifier(model: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    classes = model(x[:1]).shape[1]
    shape = tuple(x.shape[1:])
    return PyTorchClassifier(
        model, loss=nn.CrossEntropyLoss(), input_shape=shape, nb_classes=classes, clip_values=(0.0, 1.0)
    )


def art_pgd(model: Classifier, x: Tensor, y: Tensor, threat: Ball, step: float) -> Callable[[], Tensor] | None:
    try:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
    except ModuleNotFoundError:
        return None
    attack = ProjectedGradientDescentPyTorch(
        art_classifier(model, x),
        norm=np.inf,
        eps=threat.eps,
        eps_step=step,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return lambda: torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def square_rows(
    model: Classifier, x: Tensor, y: Tensor, threat: Ball, queries: int, seeds: int
) -> list[dict[str, Any]]:
    """Queries an image and success of Square, means of several seeds: ours, torchattacks', ART's, and at ART's success.

    The peers give all images of a call the same patches, so that one call says little: they are called on a few images
    at a time, each time with another seed. Ours and ART are also stopped as soon as so many images have fallen as fall
    to ART in the end.
    """
    images, labels, attack = to_bytes(x).numpy(), y.numpy(), Attack.parse(f"square-{ART_SENDS * (queries + 1)}")
    found: list[AttackRecord] = []
    for seed in track(range(seeds), description=f"Square, {OURS}"):
        outcome = evaluate(model, images, labels, threat, [attack], batch_size=len(x), seed=seed)
        found += outcome.evaluation.attacks
    costs = np.array([record.forward for record in found])
    fell = ~np.array([record.held for record in found])
    rows = [square_row(OURS, *stopped(costs, fell, queries))]
    makers = {"torchattacks": torchattacks_square, "ART": art_square}
    for name, make in makers.items():
        counted = Counted(model)
        groups = [group for _ in range(seeds) for group in zip(x.split(GROUP), y.split(GROUP), strict=True)]
        searches = [make(counted, *group, threat, queries, seed) for seed, group in enumerate(groups)]
        if None in searches:
            rows.append({"attack": "Square", "library": name, "queries_per_image": "not installed"})
            continue
        counted.images = 0
        shown = track(searches, description=f"Square, {name}")
        x_adv = torch.cat([search() for search in shown if search])
        fallen = 1 - share_that_holds(model, x_adv, x.repeat(seeds, 1, 1, 1), y.repeat(seeds), threat)
        sent = counted.images / costs.size
        rows.append(square_row(name, fallen, sent))
        if name == "ART":
            rows += rows_at_arts_success(counted.seen, sent, costs, fell, round(fallen * costs.size))
    return rows


def rows_at_arts_success(
    seen: list[list[tuple[int, int]]], sent: float, costs: Any, fell: Any, target: int
) -> list[dict[str, Any]]:
    """Queries an image until `target` images have fallen in all searches together, of ART and of ours.

    seen: of ART, see `Counted`; sent: queries an image in all of its search; costs, fell: see `stopped`.
    """
    if not target:
        return []  # nothing to reach
    longest = max(map(len, seen))
    steps = np.sum([np.pad(one, ((0, longest - len(one)), (0, 0)), mode="edge") for one in seen], axis=0)
    enough = [images for images, fallen in steps if fallen >= target]
    rows = [square_row(ART_STOPPED, target / fell.size, float(enough[0]) / fell.size if enough else sent)]
    limits = [n for n in range(1, int(costs.max()) + 1) if (fell & (costs <= n)).sum() >= target]
    if limits:
        return [*rows, square_row(AT_SUCCESS, *stopped(costs, fell, limits[0]))]
    return [*rows, {**square_row(AT_SUCCESS, float(fell.mean()), 0), "queries_per_image": "not reached"}]


def square_row(library: str, success: float, queries: float) -> dict[str, Any]:
    return {"attack": "Square", "library": library, "success": success, "queries_per_image": queries}


def stopped(costs: Any, fell: Any, queries: int) -> tuple[float, float]:
    """Success and queries an image of searches that are stopped after so many.

    costs: queries until an image fell, or all that were sent; fell: which did. Of one shape.
    """
    return float((fell & (costs <= queries)).mean()), float(np.minimum(costs, queries).mean())


def torchattacks_square(
    model: nn.Module, x: Tensor, y: Tensor, threat: Ball, queries: int, seed: int
) -> Callable[[], Tensor] | None:
    try:
        import torchattacks
    except ModuleNotFoundError:
        return None
    attack = torchattacks.Square(model, norm="Linf", eps=threat.eps, n_queries=queries, seed=seed)
    return lambda: attack(x, y)


def art_square(
    model: Counted, x: Tensor, y: Tensor, threat: Ball, queries: int, seed: int
) -> Callable[[], Tensor] | None:
    try:
        from art.attacks.evasion import SquareAttack
    except ModuleNotFoundError:
        return None
    seen: list[tuple[int, int]] = []

    def fallen(answers: Any, labels: Any) -> Any:
        """ART's own criterion, which it asks once a step."""
        wrong = answers.argmax(axis=1) != labels.argmax(axis=1)
        seen.append((model.images - begun[0], int(wrong.sum())))
        return wrong

    begun: list[int] = []
    classifier = art_classifier(model, x)
    attack = SquareAttack(
        classifier,
        adv_criterion=fallen,
        norm=np.inf,
        eps=threat.eps,
        max_iter=queries,
        batch_size=len(x),
        verbose=False,
    )

    def run() -> Tensor:
        np.random.seed(seed)  # ART draws from numpy's global stream
        begun.append(model.images)
        x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
        model.seen.append(seen)
        return x_adv

    return run


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over theirs, for the libraries that are installed."""
    found = {}
    pgd = {row["library"]: row["images_per_s"] for row in rows if row["attack"].startswith("PGD")}
    for mine, name in (
        (OURS, "pgd20_images_per_s_vs"),
        ("dfmcl, float32", "pgd20_float32_images_per_s_vs"),
        (RIGHT, "pgd20_only_right_images_per_s_vs"),
    ):
        for how, suffix in (("", ""), (FROZEN, "_with_frozen_weights")):
            peers = [pgd[f"{peer}{how}"] for peer in PEERS if isinstance(pgd[f"{peer}{how}"], float)]
            if peers:
                found[f"{name}_fastest_peer{suffix}"] = pgd[mine] / max(peers)
    square = {row["library"]: row["queries_per_image"] for row in rows if row["attack"] == "Square"}
    if isinstance(square.get(AT_SUCCESS), float):
        found["square_queries_vs_art"] = square[AT_SUCCESS] / square[ART_STOPPED]
    return found


if __name__ == "__main__":
    main()
