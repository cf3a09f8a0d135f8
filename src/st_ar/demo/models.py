"""The weights that the page offers, opened when they are first wanted, and the one thread in which they all compute."""

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from st_ar.config import ModelConfig, SampleSettings
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.hardware import choose_device, choose_dtype
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EMA, LIVE, ModelInfo, call_models, open_model
from st_ar.sampling import Sampler, require_own_tokenizer
from st_ar.tokenizer import Tokenizer, open_tokenizer
from st_ar.tokenizer.vq import VQTokenizer

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights that can be chosen on the page."""

    name: str
    path: Path
    """The file."""
    ema: bool
    config: ModelConfig
    class_names: tuple[str, ...]
    """What the model calls its classes; their numbers, if its files do not say."""
    knows_no_class: bool
    """Whether it has been trained without its class too, so that it can be asked for none."""


class LoadedModel:
    """Weights in memory, and what draws from them.

    Args:
        network: in evaluation mode, float32, where it computes.
        dtype: in which images are drawn; everything else is computed in float32.
    """

    def __init__(self, weights: Weights, network: Transformer, info: ModelInfo, dtype: torch.dtype) -> None:
        self.weights, self.network, self.info, self.dtype = weights, network, info, dtype
        self.sha256 = sha256(info.source)
        """Of the file of weights."""
        self.sampler: Sampler | None = None

    @cached_property
    def drawer(self) -> Transformer:
        """The network in the type in which images are drawn."""
        return self.network if self.dtype == torch.float32 else copy.deepcopy(self.network).to(self.dtype)

    def sampler_for(self, tokenizer: Tokenizer, settings: SampleSettings) -> Sampler:
        """One with these settings; what the last one has laid out in memory serves it, if only the seed is another."""
        last, self.sampler = self.sampler, Sampler(self.drawer, tokenizer, settings)
        if last is not None and replace(last.settings, seed=settings.seed) == self.sampler.settings:
            self.sampler.drawer = last.drawer
        return self.sampler


class ModelPool:
    """The weights of some models, live and averaged, and their tokenizer.

    Args:
        paths: of models, as for `open_model`. names: one each, or none for their own.
        device, dtype: as for `choose_device` and `choose_dtype`.

    Raises:
        UserError: a model or the tokenizer is missing or damaged, is drawn for captions, or they do not belong together.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Path,
        *,
        names: Sequence[str] = (),
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.tokenizer, self.tokenizer_path = open_tokenizer(tokenizer, device, "float32"), tokenizer
        self.previewer = self.tokenizer
        """The tokenizer in the type in which images are drawn: quicker, and near enough for what is soon replaced."""
        if isinstance(self.tokenizer, VQTokenizer):
            self.previewer = self.tokenizer.to(self.tokenizer.device, self.dtype)
        self.weights: dict[str, Weights] = {}
        self.opened: dict[str, LoadedModel] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="models")
        for name, path in zip(call_models(paths, names), paths, strict=True):
            network, info = open_model(path)
            offered = self._offer(f"{name} (EMA)" if info.ema else name, info)
            self.opened[offered.name] = self._opened(offered, network, info)
            beside = info.source.with_name(EMA)
            if info.source.name == LIVE and beside.exists():
                self._offer(f"{name} (EMA)", replace(info, source=beside, ema=True))

    def _offer(self, name: str, info: ModelInfo) -> Weights:
        if name in self.weights:
            raise UserError(f"two models are called {name}: give different --names, and each model once")
        info.config.require_classes("st-ar demo")
        require_own_tokenizer(info, info.source, self.tokenizer, self.tokenizer_path)
        if self.tokenizer.vocab_size != info.config.vocab_size:
            raise UserError(
                f"{info.source} speaks of {info.config.vocab_size} codes, {self.tokenizer_path} has {self.tokenizer.vocab_size}: "
                "give the tokenizer that made the model's token store"
            )
        self.weights[name] = Weights(
            name=name,
            path=info.source,
            ema=info.ema,
            config=info.config,
            class_names=tuple(info.class_names or map(str, range(info.config.num_classes))),
            knows_no_class=info.class_dropout != 0,
        )
        return self.weights[name]

    def _opened(self, weights: Weights, network: Transformer, info: ModelInfo) -> LoadedModel:
        return LoadedModel(weights, network.to(self.device), info, self.dtype)

    @property
    def names(self) -> list[str]:
        """Of all weights; the live ones first."""
        return sorted(self.weights, key=lambda name: self.weights[name].ema)

    def find(self, name: object) -> Weights:
        """The weights of this name; UserError: none are called so."""
        if not isinstance(name, str) or name not in self.weights:
            raise UserError(f"no weights are called {name!r}: choose one of {', '.join(self.names)}")
        return self.weights[name]

    def open(self, name: str) -> LoadedModel:
        """The weights in memory; call it in the models' thread."""
        if name not in self.opened:
            weights = self.find(name)
            network, info = open_model(weights.path)
            if info.config != weights.config:
                raise UserError(f"{weights.path} is another model than when the page was started: start it again")
            self.opened[name] = self._opened(weights, network, info)
        return self.opened[name]

    def run(self, work: Callable[[], Item]) -> Item:
        """What the work gives, done in the models' thread."""
        return self.thread.submit(work).result()

    def each(self, steps: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """The items of some work, each made in the models' thread; the work ends with this generator."""
        end = object()
        try:
            while (item := self.thread.submit(next, steps, end).result()) is not end:
                yield item  # pyright: ignore[reportReturnType] -- only the end is no item
        finally:
            with contextlib.suppress(RuntimeError):  # the thread was given back
                self.thread.submit(steps.close).result()

    def close(self) -> None:
        """Give the thread back."""
        self.thread.shutdown(cancel_futures=True)
