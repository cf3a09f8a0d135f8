"""What a run shows of itself while it trains: numbers, samples and probes, in log.jsonl, in samples/ and in trackers.

Nothing here changes a weight: features are read off passes that are made anyway, samples and probes come from a copy.
"""

import contextlib
import math
import resource
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from st_ar.config import TrainConfig
from st_ar.cost import training_flops_per_token
from st_ar.data.store import TokenStore
from st_ar.data.text import TextStore
from st_ar.hardware import peak_flops
from st_ar.model.transformer import Transformer
from st_ar.sample_config import SampleSettings
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.collapse import Features
from st_ar.training.log import read_log
from st_ar.training.track import Background, close_all, open_trackers, reason, require_trackers, warn
from st_ar.watch_config import WatchConfig


class Watch:
    """Watches one run. Everything that could not be shown later is refused here, before the run begins.

    Args:
        out: the run's folder, as it was left.
        store, captions: what is trained on.

    Raises:
        UserError: a tracker's package is missing, or a tokenizer, labels or test store do not suit the run.
    """

    def __init__(
        self,
        config: WatchConfig,
        training: TrainConfig,
        out: Path,
        store: TokenStore,
        captions: TextStore | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.training, self.out = config, training, out
        self.device, self.dtype = device, dtype
        require_trackers(config.track)
        self.glances: dict[str, tuple[int, Callable[[Transformer, int], dict[str, float]]]] = {}
        if config.sample_tokenizer is not None:
            from st_ar.training.glances import Samples

            settings = SampleSettings(cfg_scale=config.sample_cfg_scale, seed=training.seed)
            self.samples = Samples(
                config.sample_tokenizer, store, captions, config.sample_labels, settings, training, device
            )
            self.glances["samples"] = config.sample_every, self._sample
        if config.probe_test_tokens is not None:
            from st_ar.training.glances import QuickProbe

            self.probe = QuickProbe(store, TokenStore(config.probe_test_tokens), training)
            self.glances["probe"] = config.probe_every, self._probe
        logged = read_log(out / "log.jsonl")
        self.logged = logged[-1]["step"] if logged else 0
        self.peak = peak_flops(device, dtype)
        self.flops = [training_flops_per_token(training, until=share) for share in (0.0, 1.0)]
        self.trackers: list[Background] = []

    @contextlib.contextmanager
    def follow(self, student: SelfGuided, record: dict[str, Any], start: int) -> Generator[None]:
        """Within the block the run's steps after `start` are followed; `record` is what config.json says."""
        self.model, self.features = student.model, Features(student)
        self.is_first = not dist.is_initialized() or dist.get_rank() == 0
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        if self.is_first:
            self.trackers = open_trackers(self.config.track, self.out, record, start=start, logged=self.logged)
        try:
            yield
        finally:
            self.features.close()
            close_all(self.trackers)

    def begin(self, step: int, total: int) -> bool:
        """Before step `step` of `total`: whether it is to be logged, and `look` called after it, by every rank."""
        log = step % self.training.log_every == 0 or step == total or self.config.looks_at(step)
        self.features.begin(log)
        self._flops = self.flops[step <= int(self.training.selfguided.until * total)]
        return log

    def look(self, step: int, entry: dict[str, float]) -> dict[str, float]:
        """Add to a step's numbers what else there is to see, and give all to the trackers; returns what log.jsonl keeps."""
        entry = entry | self.features.measure() | self._machine(entry["tokens_per_second"]) | self._glance(step)
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}
        self.send(step, {name: value for name, value in entry.items() if name != "step"})
        return entry

    def send(self, step: int, scalars: Mapping[str, float]) -> None:
        """Give the trackers numbers of a step."""
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
        """Samples and the probe, where they are due. Trouble with them is said, and the run goes on without them."""
        if not self.config.looks_at(step):
            return {}
        from st_ar.training.glances import whole_copy

        found: dict[str, float] = {}
        copy = whole_copy(self.model)
        if copy is None:
            return found
        for name, (every, work) in list(self.glances.items()):
            if step % every == 0:
                try:
                    found |= work(copy.to(self.device, self.dtype), step)
                except Exception as error:  # such as no memory for them: no reason to end a run
                    warn(f"{name} switched off: {reason(error)}; the run goes on")
                    del self.glances[name]
        return found

    def _sample(self, network: Transformer, step: int) -> dict[str, float]:
        grid = self.samples.draw(network, self.out / "samples" / f"step_{step:08d}.png")
        for tracker in self.trackers:
            tracker.images(step, "samples", grid)
        return {}

    def _probe(self, network: Transformer, _step: int) -> dict[str, float]:
        return {"ridge_probe_top1": self.probe.accuracy(network)}
