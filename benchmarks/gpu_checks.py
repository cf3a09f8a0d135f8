"""What on_gpu.py's slice `check` compares: a GPU's results with those of the CPU in float32, and a run with what it has saved.

    PYTHONPATH=src python benchmarks/gpu_checks.py GROUP [--small]

Prints each number as a line of JSON: its name, value, tolerance, and whether it passed. A value passes up to its tolerance. What
fails does not stop the rest. Each group is a process of its own, since an error in a kernel ends all CUDA work of its process.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from st_ar import load_model
from st_ar.config import PLAIN, VQ_16, VQ_PRESETS, ModelConfig, SampleSettings, SelfGuidedConfig, TrainConfig, VQConfig
from st_ar.data.llamagen import import_tokens
from st_ar.errors import Interrupted, cause
from st_ar.hardware import choose_device, full_precision
from st_ar.model import transformer
from st_ar.model.generate import TokenSampler, generate
from st_ar.model.transformer import Transformer
from st_ar.presets import get_preset
from st_ar.selfguided.guidance import make_teacher, sample_guidance
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.checkpoint import CheckpointExporter
from st_ar.training.checkpoint_files import TENSORS, read_tensors
from st_ar.training.loop import Learner, forward_backward, train
from st_ar.training.parallel import parallelize
from st_ar.training.vqgan import VQLearner
from tokenizing import random_tokenizer

CPU = torch.device("cpu")
EXACT, FAST = torch.float32, torch.bfloat16
Numbers = dict[str, tuple[float, float]]
"""Name -> value and tolerance."""
Cases = Iterator[tuple[str, Callable[[], Numbers]]]
"""Name -> what computes some numbers."""


@dataclass(frozen=True)
class Place:
    """Where to compute, and how much."""

    device: torch.device
    small: bool

    @property
    def compiles(self) -> bool:
        """On CPUs compilation takes too long for --small."""
        return self.device.type == "cuda"


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from b."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def not_finite(tensors: dict[str, Tensor]) -> tuple[float, float]:
    """Number of values that are NaN or infinite, and the tolerance 0."""
    return float(sum((~tensor.isfinite()).sum().item() for tensor in tensors.values())), 0.0


# Losses and gradients

METHODS = {
    "AR": PLAIN,
    "ST-AR": SelfGuidedConfig(projector_hidden=256),
    "ST-AR, own position visible": SelfGuidedConfig(projector_hidden=256, mask_own_position=False),
    "ST-AR, 95 % masked": SelfGuidedConfig(projector_hidden=256, mask_ratio=0.95),  # few keys are visible to a query
}
TOLERANCES = {
    EXACT: {"loss": 3e-4, "gradient": 2e-3, "worst": 1e-2},
    FAST: {"loss": 0.02, "gradient": 0.15, "worst": 0.3},
}
"""Relative, to float32 on the CPU: each loss, the whole gradient, and the parameter whose gradient differs most."""


def settings(method: str, grid: int, condition: str, small: bool) -> TrainConfig:
    """A network of four blocks, as wide in its heads as LlamaGen's, without dropout."""
    width = {"dim": 32, "n_heads": 2} if small else {"dim": 256, "n_heads": 4}
    kind: dict[str, Any] = {"num_classes": 10} if condition == "class" else {"text_tokens": 16, "text_dim": 64}
    none = {"token_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    model = ModelConfig(n_layers=4, vocab_size=512, grid=grid, condition=condition, **width, **kind, **none)  # pyright: ignore[reportArgumentType]
    return TrainConfig(model=model, selfguided=METHODS[method], batch_size=4 if small else 8, views=2, steps=1)


def random_network(config: ModelConfig) -> Transformer:
    """A network on the CPU whose head is not zeros, which would hide the gradients of all else."""
    torch.manual_seed(0)
    model = Transformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def conditions(config: ModelConfig, count: int) -> Tensor:
    """Classes, or captions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    if config.condition == "class":
        return torch.randint(config.num_classes, (count,), generator=generator)
    features = torch.randn(count, config.text_tokens, config.text_dim, generator=generator)
    for index, caption in enumerate(features):
        caption[: index % config.text_tokens] = 0  # padding in front
    return features


def losses_and_gradients(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of Eq. 8 and every gradient of a training step, on the CPU."""
    config, model = replace(config, compile=compiled), random_network(config.model)
    teacher = make_teacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).train()
    called = parallelize(student, teacher, config, "none", device, dtype)
    shape = (config.batch_size, config.views, config.model.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(2))
    labels = conditions(config.model, config.batch_size)
    guidance = sample_guidance(config.selfguided, shape, seed=0, step=1)
    losses = forward_backward(Learner(called, teacher, 1, dtype), tokens.to(device), labels.to(device), guidance)
    gradients = {name: p.grad.cpu() for name, p in student.named_parameters() if p.grad is not None}
    return torch.stack(losses).cpu(), gradients


@cache
def expected(config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float32 on the CPU."""
    return losses_and_gradients(config, CPU, EXACT, False)


def compare_gradients(config: TrainConfig, place: Place, dtype: torch.dtype, compiled: bool) -> Numbers:
    """How far losses and gradients are from the CPU's."""
    (true_losses, true), within = expected(config), TOLERANCES[dtype]
    losses, gradients = losses_and_gradients(config, place.device, dtype, compiled)
    if gradients.keys() != true.keys():
        raise ValueError(f"other parameters have gradients: {sorted(gradients.keys() ^ true.keys())}")
    worst = max(apart(gradients[name], gradient) for name, gradient in true.items())
    whole = apart(
        torch.cat([gradients[name].flatten() for name in true]), torch.cat([g.flatten() for g in true.values()])
    )
    return {
        "losses": (((losses - true_losses) / true_losses.abs().clamp_min(1e-6)).abs().max().item(), within["loss"]),
        "gradient": (whole, within["gradient"]),
        "worst parameter": (worst, within["worst"]),
        "not finite": not_finite({"losses": losses, **gradients}),
    }


def compare_one_row(config: TrainConfig, place: Place, dtype: torch.dtype, compiled: bool) -> Numbers:
    """The same with the mask of Eq. 3 as one row of keys."""
    expected(config)  # on the CPU, whose mask is square in any case
    with mock.patch.object(transformer, "CAUSAL_KEY_BIAS", True):
        return compare_gradients(config, place, dtype, compiled)


def gradients(place: Place, grid: int, condition: str) -> Cases:
    """Each method in both types; then compiled in bfloat16, and ST-AR also in float32."""
    ways = [(method, dtype, False) for method in METHODS for dtype in (EXACT, FAST)]
    if place.compiles:
        ways += [(method, FAST, True) for method in METHODS] + [("ST-AR", EXACT, True)]
    for method, dtype, compiled in ways:
        config = settings(method, grid, condition, place.small)
        name = f"{condition}, T = {grid**2}, {method}, {_short(dtype)}{', compiled' if compiled else ''}"
        yield name, partial(compare_gradients, config, place, dtype, compiled)
        guided = METHODS[method]
        if place.device.type == "cuda" and condition == "class" and guided.mask_ratio and guided.mask_own_position:
            yield f"{name}, mask as one row", partial(compare_one_row, config, place, dtype, compiled)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Forward passes and decoding


def decoding(place: Place) -> Cases:
    """Logits with and without a key mask, and greedy tokens with guidance, of class and text models."""
    for condition in ("class", "text"):
        config = settings("AR", 8, condition, place.small).model
        model, labels = random_network(config).eval(), conditions(config, 8)
        yield f"{condition}, logits", partial(compare_logits, model, labels, place)
        for compiled in (False, True) if place.compiles else (False,):
            name = f"{condition}, greedy tokens{', compiled' if compiled else ''}"
            yield name, partial(compare_tokens, model, labels, place, compiled)


def compare_logits(model: Transformer, labels: Tensor, place: Place) -> Numbers:
    """Relative distances of the logits."""
    generator, found = torch.Generator().manual_seed(3), Numbers()
    tokens = torch.randint(
        model.config.vocab_size, (len(labels), model.config.sequence_length - 1), generator=generator
    )
    key_mask = torch.rand(len(labels), model.config.sequence_length, generator=generator) < 0.25
    key_mask[:, 0] = False
    for name, mask in (("causal", None), ("masked", key_mask)):
        with torch.no_grad():
            true = model.cpu()(tokens, labels, key_mask=mask).logits
            moved = None if mask is None else mask.to(place.device)
            for dtype, tolerance in ((EXACT, 1e-3), (FAST, 0.03)):
                with torch.autocast(place.device.type, dtype=dtype, enabled=dtype == FAST):
                    logits = model.to(place.device)(
                        tokens.to(place.device), labels.to(place.device), key_mask=moved
                    ).logits
                found[f"{name}, {_short(dtype)}"] = apart(logits.float(), true), tolerance
    return found


def compare_tokens(model: Transformer, labels: Tensor, place: Place, compiled: bool) -> Numbers:
    """Shares of the tokens that differ. Rounding may change a token between two that are as likely, and then those after it."""
    greedy = generate(model.cpu(), labels, cfg_scale=2.0, greedy=True)
    moved, numbers, found = model.to(place.device), np.arange(len(labels)), Numbers()
    sampler = TokenSampler(moved, len(labels), SampleSettings(cfg_scale=2.0), greedy=True, compiled=compiled)
    for batch in ("first batch", "second batch"):  # the second replays what the first has recorded
        drawn = sampler.draw(labels.to(place.device), numbers, 0).cpu()
        found[f"{batch}, share that differs"] = (drawn != greedy).float().mean().item(), 0.15
    return found


# Tokenizers


def tokenizer(place: Place) -> Cases:
    """VQ-16's codes and reconstructions, and a VQ-GAN's training with codebook revival."""
    tiny = VQConfig(channels=32, multipliers=(1, 2), codebook_size=64)
    yield "VQ", partial(compare_codes, tiny if place.small else VQ_16, 32 if place.small else 128, place)
    yield "VQ-GAN training", partial(compare_revival, place)


def compare_codes(config: VQConfig, side: int, place: Place) -> Numbers:
    """Codes and decoded images. Random weights have many near-ties, which rounding decides."""
    model = random_tokenizer(config)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(4)) * 2 - 1
    found = Numbers()
    with full_precision():  # without TF32
        exact = model.to(CPU, EXACT)
        codes = exact.encode(images)
        true = exact.decode(codes)
        for dtype, share, distance in ((EXACT, 0.03, 1e-3), (FAST, 0.3, 0.1)):
            moved = model.to(place.device, dtype)
            found[f"codes that differ, {_short(dtype)}"] = (moved.encode(images) != codes).float().mean().item(), share
            found[f"reconstruction, {_short(dtype)}"] = apart(moved.decode(codes), true), distance
    return found


def compare_revival(place: Place) -> Numbers:
    """Six steps with the adversary, after each second of which idle codes are replaced. Only the first can be compared number by number."""
    preset = VQ_PRESETS["vq-cifar10"]()
    model = replace(
        preset.model, channels=32, multipliers=(1, 2), codebook_size=2048
    )  # more codes than a batch has features
    adversary = replace(preset.adversary, start=1)
    preset = replace(preset, model=model, adversary=adversary, perceptual_weight=0.0, dtype="float32", revive_after=2)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    learners = [VQLearner(preset, device) for device in (CPU, place.device)]
    firsts: list[Tensor] = []
    revived, numbers = 0.0, dict[str, Tensor]()
    with full_precision():
        for learner in learners:
            learner.share()
            moved = images.to(learner.device).contiguous(memory_format=learner.layout)
            numbers = learner.step(moved, 1, 1e-4)
            firsts.append(learner.network.codebook.detach().cpu().clone())
        learner = learners[1]
        for step in range(2, 7):
            numbers = learner.step(images.to(learner.device).contiguous(memory_format=learner.layout), step, 1e-4)
            revived += (learner.network.idle == -1).sum().item()  # just now
    codebook = learner.network.codebook.detach()
    return {
        "codebook of the first batch's features": (apart(firsts[1], firsts[0]), 1e-3),
        "no code was revived": (float(revived == 0), 0.0),
        "not finite": not_finite({**numbers, "codebook": codebook}),
        "length of the codes": ((codebook.norm(dim=1) - 1).abs().max().item(), 0.05),
    }


# Runs

STEPS, EVERY = 60, 10


def random_store(folder: Path, config: ModelConfig) -> Path:
    """A token store of 64 images in two crops."""
    rng = np.random.default_rng(0)
    for name in ("codes", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(64):
        codes = rng.integers(0, config.vocab_size, (1, 2, config.sequence_length))
        np.save(folder / "codes" / f"{index}.npy", codes)
        np.save(folder / "labels" / f"{index}.npy", np.array([index % config.num_classes]))
    folders = (folder / name for name in ("codes", "labels", "store"))
    return import_tokens(*folders, vocab_size=config.vocab_size, num_classes=config.num_classes).folder


def runs(place: Place) -> Cases:
    """Saving while training goes on, resuming, and `st-ar train`."""
    yield "checkpoints", partial(compare_checkpoints, place)
    if place.device.type == "cuda":
        yield "CUDA graph", compare_graph
    yield f"st-ar train, {STEPS} steps", partial(command_line, place)


def compare_graph() -> Numbers:
    """A run whose passes are replayed as a CUDA graph, and the same without."""
    config = replace(get_preset("st-ar-photos"), steps=STEPS, log_every=EVERY, batch_size=16, compile=False)
    config = replace(config, selfguided=replace(config.selfguided, every=2))  # two graphs
    weights: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        store = random_store(Path(folder), config.model)
        for graphed in (False, True):
            run = train(replace(config, cuda_graph=graphed), store, Path(folder) / str(graphed))
            weights.append(torch.cat([p.flatten() for p in load_model(run).cpu().parameters()]))
    return {"weights at the end": (apart(weights[1], weights[0]), 0.01), "not finite": not_finite({"all": weights[1]})}


def compare_checkpoints(place: Place) -> Numbers:
    """A run of 60 steps, and the same one interrupted while it saves step 40 and then resumed."""
    config = replace(get_preset("st-ar-photos"), steps=STEPS, log_every=EVERY, checkpoint_every=20, keep=9)
    config = replace(config, batch_size=16, compile=False)
    if place.small:
        config = replace(config, batch_size=4, model=replace(config.model, dim=32, n_layers=2))
    copies: dict[int, dict[str, Tensor]] = {}
    save, restore = CheckpointExporter.save, CheckpointExporter.restore
    interrupting, restored = False, [-1.0]

    def different(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
        assert some.keys() == others.keys()
        return float(sum((some[name].cpu() != others[name]).sum().item() for name in some))

    def save_and_copy(self: CheckpointExporter, step: int, measured: Any) -> None:
        copies[step] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.state.tensors().items()}
        save(self, step, measured)
        if interrupting and step == 40:
            signal.raise_signal(signal.SIGTERM)  # stops the run after the next step

    def restore_and_compare(self: CheckpointExporter) -> int:
        step = restore(self)
        restored[0] = different(self.state.tensors(), copies[step]) if step else -1.0
        return step

    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(CheckpointExporter, "save", save_and_copy),
        mock.patch.object(CheckpointExporter, "restore", restore_and_compare),
    ):
        folder = Path(name)
        store = random_store(folder, config.model)
        run = train(config, store, folder / "whole")
        files = {
            step: {name: torch.empty_like(tensor) for name, tensor in copy.items()} for step, copy in copies.items()
        }
        for step, tensors in files.items():
            read_tensors(run / "checkpoints" / f"step_{step:08d}" / TENSORS, tensors)
        written = sum(different(tensors, copies[step]) for step, tensors in files.items())
        missing = len({20, 40, 60} - set(files))
        end, interrupting = copies[STEPS], True
        try:
            train(config, store, folder / "parted")
        except Interrupted:
            missing += 41 not in copies
        else:
            raise RuntimeError("SIGTERM did not interrupt the run")
        train(config, store, folder / "parted", resume=True)
        live = [name for name in end if name.startswith("student.")]
        whole, parted = (torch.cat([tensors[name].flatten() for name in live]) for tensors in (end, copies[STEPS]))
    return {
        "values on the disk that are not the state's": (written, 0.0),
        "values of the resumed state that are not the saved one's": (abs(restored[0]), 0.0),
        "checkpoints that are missing": (float(missing), 0.0),
        "weights of the resumed run": (apart(parted, whole), 0.0 if place.device.type == "cpu" else 0.01),
    }


WITHOUT_TYRO = """
import sys; from dataclasses import replace; from pathlib import Path
from st_ar.presets import get_preset; from st_ar.training.loop import train
config = replace(get_preset("st-ar-photos"), steps={steps}, log_every={every}, batch_size=16)
train(config, Path(sys.argv[1]), Path(sys.argv[2]))
"""


def command_line(place: Place) -> Numbers:
    """A run in a process of its own: by the command line, or where its package tyro is missing, by the function that it calls."""
    steps = 2 * EVERY if place.small else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = get_preset("st-ar-photos").model
        store, out = random_store(folder, config), folder / "run"
        given = ["--steps", str(steps), "--log-every", str(EVERY), "--batch-size", "16"]
        command = ["-m", "st_ar", "train", "st-ar-photos", "--tokens", str(store), "--out", str(out), *given]
        if find_spec("tyro") is None:
            print("tyro is not installed: the run starts without the command line", file=sys.stderr)
            command = ["-c", WITHOUT_TYRO.format(steps=steps, every=EVERY), str(store), str(out)]
        path = os.pathsep.join([str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        # standard output is for lines of JSON, and a process that outlives this one must not hold it open
        done = subprocess.run([sys.executable, *command], env=environment, stdout=2, timeout=240)
        log = out / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
        lines = [line for line in lines if "loss" in line]
        exported = (out / "export" / "config.json").is_file()
    numbers = {
        str(index): torch.tensor([v for v in line.values() if isinstance(v, float)]) for index, line in enumerate(lines)
    }
    return {
        "exit status": (float(abs(done.returncode)), 0.0),
        "log lines that are missing": (float(steps // EVERY - len(lines)), 0.0),
        "not finite": not_finite(numbers),
        "last loss over that of a uniform guess": (lines[-1]["loss_ar"] / math.log(config.vocab_size), 1.01),
        "exports that are missing": (float(not exported), 0.0),
    }


GROUPS: dict[str, Callable[[Place], Cases]] = {
    "gradients-64": partial(gradients, grid=8, condition="class"),
    "gradients-256": partial(gradients, grid=16, condition="class"),
    "gradients-text": partial(gradients, grid=8, condition="text"),
    "decoding": decoding,
    "tokenizer": tokenizer,
    "runs": runs,
}


def report(name: str, value: float | None, tolerance: float | None, seconds: float, **more: str) -> None:
    """Print a line of JSON. NaN fails."""
    passed = value is not None and tolerance is not None and value <= tolerance
    line = {
        "name": name,
        "value": value,
        "tolerance": tolerance,
        "passed": passed,
        "seconds": round(seconds, 1),
        **more,
    }
    print(json.dumps(line), flush=True)


def run_cases(cases: Cases) -> None:
    """Run each case of a group, whatever happens to those before it."""
    for name, case in cases:
        begun = time.perf_counter()
        try:
            numbers = case()
        except Exception as error:
            traceback.print_exc()
            report(name, None, None, time.perf_counter() - begun, failed=cause(error))
            continue
        for what, (value, tolerance) in numbers.items():
            report(f"{name}: {what}", value, tolerance, time.perf_counter() - begun)


def main() -> None:
    """Run a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=list(GROUPS))
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    run_cases(GROUPS[given.group](Place(choose_device("auto"), given.small)))


if __name__ == "__main__":
    main()
