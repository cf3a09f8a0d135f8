"""What a run shows while it trains: numbers, collapse indicators, sample grids and quick probes, for log.jsonl and trackers.

Nothing here changes a weight. Features come from passes that the step makes anyway, samples and probes from a copy of the model.
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
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from st_ar.config import SampleSettings, TrainConfig, WatchConfig
from st_ar.data.store import TokenStore
from st_ar.distributed import all_gather
from st_ar.errors import UserError, cause, require
from st_ar.evaluation.probe import accuracies, require_classes
from st_ar.evaluation.probe_classifiers import ShallowClassifiers
from st_ar.evaluation.probe_features import read_features
from st_ar.figures import strip
from st_ar.files import atomic_write
from st_ar.hardware import peak_flops, training_flops_per_token
from st_ar.model.transformer import Transformer
from st_ar.randomness import RandomStream, numpy_generator
from st_ar.sampling import Sampler
from st_ar.selfguided.guidance import Features, GuidanceSample
from st_ar.selfguided.objective import SelfGuided
from st_ar.tokenizer import load_tokenizer, open_tokenizer
from st_ar.training.inputs import Inputs
from st_ar.training.run import read_log
from st_ar.training.track import SafeTracker, open_trackers, require_trackers, warn


class Watch:
    """What is shown of one run. Whatever could not be shown later is refused here, before the run begins.

    Args:
        config: what to show.
        training: the run's settings.
        out: the run's folder, as it was left.
        inputs: what the run trains on.
        device: where the model is.
        dtype: type of its matrix products.

    Raises:
        UserError: a tracker's package is missing, or a tokenizer, labels or test store do not fit the run.
    """

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
        require_trackers(config.track)
        self.glances: dict[str, tuple[int, Callable[[Transformer, int], dict[str, float]]]] = {}
        if config.sample_tokenizer is not None:
            settings = SampleSettings(cfg_scale=config.sample_cfg_scale, seed=training.seed)
            self.samples = SampleGrid(config.sample_tokenizer, inputs, config.sample_labels, settings, device)
            self.glances["samples"] = config.sample_every, self._sample
        if config.probe_test_tokens is not None:
            self.probe = RidgeProbe(inputs.store, TokenStore(config.probe_test_tokens), training)
            self.glances["probe"] = config.probe_every, self._probe
        logged = read_log(out / "log.jsonl")
        self.logged = logged[-1]["step"] if logged else 0
        self.peak = peak_flops(device, dtype)
        self.flops = [training_flops_per_token(training, until=share) for share in (0.0, 1.0)]
        self.trackers: list[SafeTracker] = []

    @contextlib.contextmanager
    def follow(self, student: SelfGuided, record: dict[str, Any], start: int) -> Generator[None]:
        """Follow the steps after `start` within the block; `record` is the run's config.json."""
        self.model, self.features = student.model, CollapseMonitor(student)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.is_first:
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
        self.features.start_step(log)
        self._flops = self.flops[step <= int(self.training.selfguided.until * total)]
        return log

    def log_step(self, step: int, entry: dict[str, float]) -> dict[str, float]:
        """Add what else there is to a step's numbers, and send all to the trackers; returns the entry for log.jsonl."""
        entry = entry | self.features.measure() | self._machine(entry["tokens_per_second"]) | self._glance(step)
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}
        self.log_scalars(step, {name: value for name, value in entry.items() if name != "step"})
        return entry

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send numbers of a step to the trackers."""
        for tracker in self.trackers:
            tracker.log(step, scalars)

    def _machine(self, tokens_per_second: float) -> dict[str, float]:
        """Peak memory of this process so far in GB, and the share of the device's peak that the model's operations make (MFU)."""
        if self.device.type == "cuda":
            found = {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        else:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = {"memory_gb": resident * (1 if sys.platform == "darwin" else 1024) / 1e9}
        if self.peak is not None and self.training.model.condition == "class":  # captions' positions are not counted
            found["mfu"] = tokens_per_second * self._flops / (self.peak * self.ranks)
        return found

    def _glance(self, step: int) -> dict[str, float]:
        """Samples and the probe, if due. Failures are reported; training continues."""
        if not self.config.looks_at(step):
            return {}

        found: dict[str, float] = {}
        copy = copy_on_rank0(self.model)
        if copy is None:
            return found
        for name, (every, work) in list(self.glances.items()):
            if step % every == 0:
                try:
                    found |= work(copy.to(self.device, self.dtype), step)
                except Exception as error:  # such as no memory for them: no reason to end a run
                    warn(f"{name} switched off: {cause(error)}; training continues")
                    del self.glances[name]
        return found

    def _sample(self, network: Transformer, step: int) -> dict[str, float]:
        grid = self.samples.draw(network, self.out / "samples" / f"step_{step:08d}.png")
        for tracker in self.trackers:
            tracker.images(step, "samples", grid)
        return {}

    def _probe(self, network: Transformer, _step: int) -> dict[str, float]:
        return {"ridge_probe_top1": self.probe.accuracy(network)}


GRID_IMAGES = 16
"""Samples, unless their labels are given."""
PROBED = 4000
"""Images that a quick probe is trained on at most, and tested on."""
AT_ONCE = 64
"""Images in the network at once."""


@torch.no_grad()
def copy_on_rank0(model: Transformer) -> Transformer | None:
    """A copy in evaluation mode, on the host, for rank 0; every rank has to call it, for weights may lie in parts on all.

    Nothing of the model in training is touched, and no random number of its own is drawn.
    """
    copy = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        with torch.random.fork_rng(devices=[]):
            copy = Transformer(model.config).eval()
    places = {} if copy is None else copy.state_dict()
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # one at a time: memory
        if name in places:
            places[name].copy_(whole)
    return copy


class SampleGrid:
    """A grid of images of the same labels, drawn with the same numbers each time.

    Raises:
        UserError: a label that the model does not know, or a tokenizer of other codes.
    """

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
        known = model.num_classes if captions is None else len(captions)
        if wrong := [label for label in labels if not 0 <= label < known]:
            raise UserError(f"--sample-labels {wrong[0]} is out of range: give 0 to {known - 1}")
        self.tokenizer, self.captions, self.settings, self.device = tokenizer, captions, settings, device
        self.labels = labels or spread_labels(known, GRID_IMAGES)

    def draw(self, network: Transformer, path: Path) -> np.ndarray:
        """Write the grid as a PNG; returns it, uint8 [H, W, 3]."""
        tokenizer = open_tokenizer(self.tokenizer, self.device.type, "float32")  # no memory is held between two grids
        sampler = Sampler(network, tokenizer, self.settings, self.captions)
        starts = range(0, len(self.labels), AT_ONCE)
        numbers = [range(start, min(start + AT_ONCE, len(self.labels))) for start in starts]
        pictures = [sampler.pictures(sampler.tokens(some, self.labels)) for some in numbers]
        grid = strip(np.concatenate(pictures), columns=min(8, len(self.labels)))
        with atomic_write(path) as aside:
            Image.fromarray(grid).save(aside, format="PNG")
        return grid


def spread_labels(known: int, count: int) -> list[int]:
    """`count` labels in ascending order, as evenly spread over 0 .. known - 1 as can be."""
    return [index * known // count for index in range(count)]


class RidgeProbe:
    """Ridge regression on the last step's features of some images: not the MAE protocol, but seconds.

    Which images is drawn once, with the seed: of the centre crops of the training store, and of the test store.

    Raises:
        UserError: stores that do not belong together or have no classes, or scikit-learn is missing.
    """

    def __init__(self, train: TokenStore, test: TokenStore, training: TrainConfig) -> None:
        try:
            require("sklearn")
        except UserError as error:
            raise UserError(
                "--probe-every fits scikit-learn's ridge regression: pip install 'st-ar[quickstart]', or leave it out"
            ) from error
        test.check_model(training.model, train.meta.tokenizer or None)
        require_classes(train, test)
        self.stores = train, test
        self.layer = training.selfguided.layer(training.model.n_layers)
        rng = numpy_generator(training.seed, RandomStream.PROBE)
        self.images = [np.sort(rng.permutation(len(store))[:PROBED]) for store in self.stores]

    def accuracy(self, network: Transformer) -> float:
        """Share of the test images whose class is guessed right."""
        (train, train_labels), (test, test_labels) = (
            (self._read(network, store, images), torch.from_numpy(store.labels[images]))
            for store, images in zip(self.stores, self.images, strict=True)
        )
        classes = len(self.stores[0].meta.class_names)
        classify = ShallowClassifiers(train, train_labels, classes, "ridge", 1.0, mean_over_steps=False)
        return accuracies(classify, test, test_labels, [1])[1][0]

    def _read(self, network: Transformer, store: TokenStore, images: np.ndarray) -> np.ndarray:
        """Features at the last position, float32 [n, 1, D]."""
        rows: list[Tensor] = []
        for some in np.split(images, range(AT_ONCE, len(images), AT_ONCE)):
            tokens = torch.from_numpy(store.center_codes(some).astype(np.int64))
            rows.append(read_features(network, tokens, [self.layer], tokens.shape[1:])[self.layer])
        return torch.cat(rows).numpy()


COLLAPSE_IMAGES = 256
"""The indicators are of at most so many of a batch's images, and of their first views."""


def feature_spread(features: Tensor) -> float:
    """Standard deviation over images of L2-normalised features [n, P, D], mean over P places and D features.

    0 if all images have the same features; 1 / sqrt(D) if they point everywhere alike (SimSiam, arXiv 2011.10566, Fig. 2).
    """
    return F.normalize(features.float(), dim=-1).std(dim=0, correction=0).mean().item()


def effective_rank(features: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values of L2-normalised features [n, P, D], mean over P.

    1 if all images lie on one line, at most min(n, D) (RankMe, arXiv 2210.02885, Eq. 2, which takes them as they are; here
    they have length 1, which is all that cosine similarities see).
    """
    x = F.normalize(features.double(), dim=-1).transpose(0, 1)  # (P, n, D)
    small = x @ x.mT if x.shape[1] < x.shape[2] else x.mT @ x
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1).exp().mean().item()


class CollapseMonitor:
    """Collects the student's and the teacher's features from a step's passes, by hooks on the student.

    At the positions of Eq. 5: both networks' features at the contrast layer, and the student's projected ones. Without contrast,
    the teacher's last layer.
    """

    def __init__(self, student: SelfGuided) -> None:
        self.wanted = False
        self.seen: dict[str, list[Tensor]] = {}
        self.hooks = [student.register_forward_pre_hook(self._see_teacher)]
        if student.projector is not None:
            self.hooks.append(student.projector.register_forward_hook(self._see_student))

    def start_step(self, wanted: bool) -> None:
        """Forget the last step's features, and collect this one's or not."""
        self.wanted, self.seen = wanted, {}

    def measure(self) -> dict[str, float]:
        """std_NAME and rank_NAME of the step's features. Every rank calls it and gets the same."""
        found: dict[str, float] = {}
        for name, parts in self.seen.items():
            features = all_gather(torch.cat(parts)[:COLLAPSE_IMAGES])[:COLLAPSE_IMAGES]
            found |= {f"std_{name}": feature_spread(features), f"rank_{name}": effective_rank(features)}
        self.seen = {}
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _add(self, name: str, features: Tensor) -> None:
        self.seen.setdefault(name, []).append(features.detach()[:, 0])

    def _see_teacher(self, _student: nn.Module, args: tuple[Tensor, Tensor, GuidanceSample, Features, int]) -> None:
        if not self.wanted:
            return
        tokens, _, sample, teacher, offset = args
        if teacher.middle is not None:  # it may hold the whole batch's
            self._add("teacher", teacher.middle[offset : offset + len(tokens)])
        elif teacher.last is not None and sample.positions is not None:
            self._add("teacher_last", teacher.last[:, :, sample.positions])

    def _see_student(self, _projector: nn.Module, args: tuple[Tensor, ...], projected: Tensor) -> None:
        if self.wanted:
            self._add("student", args[0])
            self._add("projected", projected)
