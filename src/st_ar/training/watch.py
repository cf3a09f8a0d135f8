"""Numbers, collapse indicators, sample grids and quick probes during training, for log.jsonl and trackers.

Nothing here changes a weight. Collapse indicators read the features of the training step; samples and probes use a copy of the
model.
"""

import contextlib
import math
import resource
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import SampleSettings, TrainConfig, WatchConfig
from st_ar.data.store import TokenStore
from st_ar.distributed import all_gather, get_rank
from st_ar.errors import UserError, cause, require
from st_ar.evaluation.probe import accuracies, require_classes
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import read_features
from st_ar.figures import save_png, strip
from st_ar.hardware import peak_flops, training_flops_per_token
from st_ar.model.transformer import Transformer
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.sampling import sample_images
from st_ar.selfguided.guidance import Features, GuidanceSample
from st_ar.selfguided.objective import SelfGuided
from st_ar.tokenizer import load_tokenizer, open_tokenizer
from st_ar.training.checkpoint import gather_weights
from st_ar.training.inputs import Inputs
from st_ar.training.run import read_log
from st_ar.training.track import SafeTracker, open_trackers, require_trackers, warn


class Watch:
    """Watches one run. It checks before the run that trackers are installed and that tokenizer, labels and test store fit."""

    def __init__(
        self,
        config: WatchConfig,
        training: TrainConfig,
        out: Path,
        inputs: Inputs,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.training, self.out = config, training, out
        self.device, self.dtype = device, dtype
        self.total = training.total_steps(len(inputs.store))
        require_trackers(config.track)
        self.periodic: dict[str, tuple[int, Callable[[Transformer, int], dict[str, float]]]] = {}
        if config.sample_tokenizer is not None:
            settings = SampleSettings(cfg_scale=config.sample_cfg_scale, seed=training.seed)
            settings = settings.resolved(training.model, training.class_dropout)
            self.samples = SampleGrid(config.sample_tokenizer, inputs, config.sample_labels, settings, device)
            self.periodic["samples"] = config.sample_every, self._sample
        if config.probe_test_tokens is not None:
            probe = RidgeProbe(inputs.store, TokenStore(config.probe_test_tokens), training)
            self.periodic["probe"] = config.probe_every, lambda model, _: {"ridge_probe_top1": probe.accuracy(model)}
        entries = read_log(out / "log.jsonl")
        self.logged = entries[-1]["step"] if entries else 0
        self.peak = peak_flops(device, dtype)
        self.trackers: list[SafeTracker] = []

    @contextlib.contextmanager
    def follow(self, student: SelfGuided, record: dict[str, Any], start: int) -> Generator[None]:
        """Watch the steps after `start` within the block; `record` is the run's config.json."""
        self.model, self.features = student.model, CollapseMonitor(student)
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if get_rank() == 0 and start < self.total:  # a finished run has nothing to track
            self.trackers = open_trackers(self.config.track, self.out, record, start=start, logged=self.logged)
        try:
            yield
        finally:
            self.features.close()
            for tracker in self.trackers:
                tracker.close()

    def start_step(self, step: int, total: int) -> bool:
        """Prepare for step `step` of `total`; returns whether every rank must call `log_step` after it."""
        log = step % self.training.log_every == 0 or step == total or self.config.looks_at(step)
        seldom = COLLAPSE_EVERY * self.training.log_every if self.device.type == "cuda" else 1
        self.features.start_step(log and (step % seldom == 0 or step == total))
        self.guided = step <= int(self.training.selfguided.until * total)
        return log

    def reads_features(self) -> bool:
        """Whether hooks read the features of the current step."""
        return self.features.active

    def log_step(self, step: int, entry: dict[str, float]) -> dict[str, float]:
        """Add all other numbers to a step's entry and send it to the trackers; returns the entry for log.jsonl."""
        entry = entry | self.features.measure() | self._machine(entry["tokens_per_second"]) | self._run_periodic(step)
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}
        self.track(step, {name: value for name, value in entry.items() if name != "step"})
        return entry

    def track(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        """Send the numbers and images of a step to the trackers."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def _machine(self, tokens_per_second: float) -> dict[str, float]:
        """Return this process's peak memory in GB, and the share of the device's peak FLOP/s that the model uses (MFU)."""
        if self.device.type == "cuda":
            numbers = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            numbers = {"memory_gb": resident * (1 if sys.platform == "darwin" else 1024) / 1e9}
        if self.peak is not None and self.training.model.condition == "class":  # FLOPs do not count captions' positions
            flops = training_flops_per_token(self.training, until=float(self.guided))
            numbers["mfu"] = tokens_per_second * flops / (self.peak * self.ranks)
        return numbers

    def _run_periodic(self, step: int) -> dict[str, float]:
        """Draw samples and fit the probe, if due. Failures are reported; training continues."""
        if not self.config.looks_at(step):
            return {}
        numbers: dict[str, float] = {}
        copy = copy_on_rank0(self.model)
        if copy is None:
            return numbers
        for name, (every, action) in list(self.periodic.items()):
            if step % every == 0:
                try:
                    numbers |= action(copy.to(self.device, self.dtype), step)
                except Exception as error:  # such as too little memory
                    warn(f"{name} switched off: {cause(error)}; training continues")
                    del self.periodic[name]
        return numbers

    def _sample(self, network: Transformer, step: int) -> dict[str, float]:
        grid = self.samples.draw(network, self.out / "samples" / f"step_{step:08d}.png")
        self.track(step, {"samples": grid})
        return {}


GRID_IMAGES = 16
"""Samples of a grid by default."""
PROBE_IMAGES = 4000
"""Maximum number of training and of test images of a quick probe."""
BATCH_SIZE = 64
"""Images that a network reads at once."""


@torch.no_grad()
def copy_on_rank0(model: Transformer) -> Transformer | None:
    """Copy the model to the host in evaluation mode; returns the copy on rank 0. All ranks must call it: weights may be sharded.

    The model in training does not change, and no random number of the run is drawn.
    """
    weights = model.state_dict()
    weights |= gather_weights(weights, keep=get_rank() == 0)
    if get_rank() > 0:
        return None
    with torch.random.fork_rng(devices=[]):
        copy = Transformer(model.config).eval()
    copy.load_state_dict(weights)
    return copy


class SampleGrid:
    """A grid of samples with the same labels and random numbers each time."""

    def __init__(
        self,
        tokenizer: Path,
        inputs: Inputs,
        labels: Sequence[int],
        settings: SampleSettings,
        device: torch.device,
    ) -> None:
        store, captions, model = inputs.store, inputs.captions, inputs.config.model
        codes = load_tokenizer(tokenizer)
        store.check_model(model, codes.fingerprint if store.meta.tokenizer else None)
        if codes.vocab_size != store.meta.vocab_size:
            raise UserError(
                f"--sample-tokenizer {tokenizer} has {codes.vocab_size} codes, {store.folder} has {store.meta.vocab_size}: "
                "give the tokenizer that made the store"
            )
        filled = [label for label in range(model.num_classes) if label not in store.empty_classes]
        known = model.num_classes if captions is None else len(captions)
        if wrong := [label for label in labels if not 0 <= label < known]:
            raise UserError(f"--sample-labels {wrong[0]} is out of range: give 0 to {known - 1}")
        self.tokenizer, self.captions, self.settings, self.device = tokenizer, captions, settings, device
        self.labels = labels or spread_labels(filled if captions is None else range(known), GRID_IMAGES)

    def draw(self, network: Transformer, path: Path) -> np.ndarray:
        """Draw the grid and write it as a PNG; returns it, uint8 [H, W, 3]."""
        tokenizer = open_tokenizer(self.tokenizer, self.device.type, "float32")  # not kept, to free its memory
        images = sample_images(network, tokenizer, self.labels, self.settings, self.captions, batch_size=BATCH_SIZE)
        grid = strip(images, columns=min(8, len(self.labels)))
        save_png(path, grid)
        return grid


def spread_labels(known: Sequence[int], count: int) -> list[int]:
    """Return `count` labels, evenly spread over the known ones."""
    return [known[index * len(known) // count] for index in range(count)]


class RidgeProbe:
    """Ridge regression on the features at the last position, which takes seconds. It is not the MAE protocol.

    The images are chosen once, with the seed, from the training store and the test store. Both are read at their centre crops.
    """

    def __init__(self, train: TokenStore, test: TokenStore, training: TrainConfig) -> None:
        require("sklearn")
        test.check_model(training.model, train.meta.tokenizer or None)
        require_classes(train, test)
        self.stores = train, test
        self.layer = training.selfguided.layer(training.model.n_layers)
        rng = numpy_generator(training.seed, RandomStream.PROBE)
        self.images = [np.sort(rng.permutation(len(store))[:PROBE_IMAGES]) for store in self.stores]

    def accuracy(self, network: Transformer) -> float:
        """Return the accuracy on the test images."""
        (train, train_labels), (test, test_labels) = (
            (self._read(network, store, images), torch.from_numpy(store.labels[images]))
            for store, images in zip(self.stores, self.images, strict=True)
        )
        classes = len(self.stores[0].meta.class_names)
        classify = ShallowClassifiers(train, train_labels, classes, "ridge", 1.0, mean_over_steps=False)
        return accuracies(classify, test, test_labels, [1])[1][0]

    def _read(self, network: Transformer, store: TokenStore, images: np.ndarray) -> np.ndarray:
        """Read features at the last position, float32 [n, 1, D]."""
        rows: list[Tensor] = []
        for batch in np.split(images, range(BATCH_SIZE, len(images), BATCH_SIZE)):
            tokens = torch.from_numpy(store.center_codes(batch).astype(np.int64))
            rows.append(read_features(network, tokens, [self.layer], tokens.shape[1:])[self.layer])
        return torch.cat(rows).numpy()


COLLAPSE_EVERY = 10
"""Logged steps from one measurement of the collapse indicators to the next on a GPU, which waits for it."""
COLLAPSE_IMAGES = 256
"""Maximum number of a batch's images, each with its first view, that the collapse indicators read."""


def feature_spread(features: Tensor) -> float:
    """Return the standard deviation over images of L2-normalised features [n, P, D], mean over positions and features.

    It is 0 if all images have the same features and 1 / sqrt(D) for isotropic ones (SimSiam, arXiv 2011.10566, Fig. 2).
    """
    return F.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean().item()


def effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values of L2-normalised features [n, P, D], mean over P.

    It is 1 if all features are collinear and at most min(n, D). RankMe (arXiv 2210.02885, Eq. 2) does not normalise the
    features; here they have length 1, as in the cosine similarities.
    """
    x = F.normalize(features.double(), dim=-1).transpose(0, 1)  # (P, n, D)
    gram = x @ x.mT if x.shape[1] < x.shape[2] else x.mT @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp().mean().item()


class CollapseMonitor:
    """Collects the student's and the teacher's features of a training step with hooks on the student.

    At the positions of Eq. 5 it reads both networks' features at the contrast layer and the student's projected ones; without
    contrast, the teacher's last layer.
    """

    def __init__(self, student: SelfGuided) -> None:
        self.active = False
        self.features: dict[str, list[Tensor]] = {}
        self.hooks = [student.register_forward_pre_hook(self._read_teacher)]
        if student.projector is not None:
            self.hooks.append(student.projector.register_forward_hook(self._read_student))

    def start_step(self, active: bool) -> None:
        """Drop the last step's features, and collect this step's if `active`."""
        self.active, self.features = active, {}

    def measure(self) -> dict[str, float]:
        """Return std_NAME and rank_NAME of the step's features on rank 0. All ranks must call it."""
        names, parts = list(self.features), list(self.features.values())
        features = [all_gather(torch.cat(each)[:COLLAPSE_IMAGES])[:COLLAPSE_IMAGES].float() for each in parts]
        self.features = {}
        if get_rank() > 0 or not names:
            return {}
        on_host = torch.cat([each.flatten() for each in features]).cpu().split([each.numel() for each in features])
        numbers: dict[str, float] = {}
        for name, shaped, flat in zip(names, features, on_host, strict=True):
            rows = flat.view(shaped.shape)
            numbers |= {f"std_{name}": feature_spread(rows), f"rank_{name}": effective_rank(rows)}
        return numbers

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _add(self, name: str, features: Tensor) -> None:
        self.features.setdefault(name, []).append(features.detach()[:, 0])

    def _read_teacher(self, _student: nn.Module, args: tuple[Tensor, Tensor, GuidanceSample, Features, int]) -> None:
        if not self.active:
            return
        tokens, _, sample, teacher, offset = args
        if teacher.middle is not None:  # may be of the whole batch
            self._add("teacher", teacher.middle[offset : offset + len(tokens)])
        elif teacher.last is not None and sample.positions is not None:
            self._add("teacher_last", teacher.last[:, :, sample.positions])

    def _read_student(self, _projector: nn.Module, args: tuple[Tensor, ...], projected: Tensor) -> None:
        if self.active:
            self._add("student", args[0])
            self._add("projected", projected)
