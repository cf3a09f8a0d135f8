"""The demo's models, loaded on first use, and the single thread in which they compute."""

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from st_ar.config import SampleSettings
from st_ar.errors import UserError
from st_ar.files import sha256
from st_ar.hardware import choose_device, choose_dtype
from st_ar.model.transformer import Transformer
from st_ar.model.weights import EMA, LIVE, ModelInfo, name_models, open_model
from st_ar.sampling import Sampler, require_own_tokenizer
from st_ar.tokenizer import Tokenizer, open_tokenizer
from st_ar.tokenizer.vq import VQTokenizer

Item = TypeVar("Item")


class LoadedModel:
    """A model in memory with its sampler. `dtype` is the type for sampling; everything else is computed in float32."""

    def __init__(self, name: str, info: ModelInfo, network: Transformer, dtype: torch.dtype) -> None:
        self.name, self.info, self.network, self.dtype = name, info, network, dtype
        self.sha256 = sha256(info.source)
        self.sampler: Sampler | None = None

    @cached_property
    def sampling_network(self) -> Transformer:
        """The network in the type for sampling."""
        return self.network if self.dtype == torch.float32 else copy.deepcopy(self.network).to(self.dtype)

    def sampler_for(self, tokenizer: Tokenizer, settings: SampleSettings) -> Sampler:
        """Return a sampler with these settings. It reuses the last one's memory if only the seed differs."""
        settings = settings.resolved(self.network.config, self.info.class_dropout)
        last, self.sampler = self.sampler, Sampler(self.sampling_network, tokenizer, settings)
        if last is not None and replace(last.settings, seed=settings.seed) == self.sampler.settings:
            self.sampler.token_sampler = last.token_sampler
        return self.sampler


class ModelPool:
    """The live and EMA weights of one or more models, and their tokenizer.

    Args:
        paths: of models, as for `open_model`. names: one each, or none for the default names.
        device, dtype: as for `choose_device` and `choose_dtype`.

    Raises:
        UserError: a model or the tokenizer is missing or damaged, a text model, or models of another tokenizer.
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
        self.preview_tokenizer = self.tokenizer
        """The tokenizer in the type for sampling: faster, and accurate enough for previews."""
        if isinstance(self.tokenizer, VQTokenizer):
            self.preview_tokenizer = self.tokenizer.to(self.tokenizer.device, self.dtype)
        self.weights: dict[str, ModelInfo] = {}
        """Name -> the model's file. Models without names of classes get their numbers."""
        self.loaded: dict[str, LoadedModel] = {}
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="models")
        for name, path in zip(name_models(paths, names), paths, strict=True):
            network, info = open_model(path)
            own = f"{name} (EMA)" if info.ema else name
            self._add(own, info)
            self._load(own, network)
            ema = info.source.with_name(EMA)
            if info.source.name == LIVE and ema.exists():
                self._add(f"{name} (EMA)", replace(info, source=ema, ema=True))

    def _add(self, name: str, info: ModelInfo) -> None:
        if name in self.weights:
            raise UserError(f"two models are called {name}: give different --names, and each model once")
        info.config.require_classes("st-ar demo")
        require_own_tokenizer(info, info.source, self.tokenizer, self.tokenizer_path)
        if self.tokenizer.vocab_size != info.config.vocab_size:
            raise UserError(
                f"{info.source} has {info.config.vocab_size} codes, {self.tokenizer_path} has {self.tokenizer.vocab_size}: "
                "give the tokenizer that made the model's token store"
            )
        names = info.class_names or [str(label) for label in range(info.config.num_classes)]
        self.weights[name] = replace(info, class_names=names)

    def _load(self, name: str, network: Transformer) -> None:
        self.loaded[name] = LoadedModel(name, self.weights[name], network.to(self.device), self.dtype)

    @property
    def names(self) -> list[str]:
        """Names of all weights, the live ones first."""
        return sorted(self.weights, key=lambda name: self.weights[name].ema)

    def find(self, name: object) -> ModelInfo:
        """Return the weights with this name; UserError if there are none."""
        if not isinstance(name, str) or name not in self.weights:
            raise UserError(f"no weights are called {name!r}: choose one of {', '.join(self.names)}")
        return self.weights[name]

    def open(self, name: str) -> LoadedModel:
        """Return the model in memory. Call it in the models' thread."""
        source = self.find(name).source
        if name not in self.loaded:
            network, info = open_model(source)
            if info.config != self.weights[name].config:
                raise UserError(f"{source} has changed since the demo started: restart the demo")
            self.weights[name] = replace(info, class_names=self.weights[name].class_names)
            self._load(name, network)
        return self.loaded[name]

    def run(self, work: Callable[[], Item]) -> Item:
        """Return the result of `work`, computed in the models' thread."""
        return self.thread.submit(work).result()

    def iterate(self, items: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Yield the items of a generator, each computed in the models' thread. Closing this generator closes that one."""
        end = object()
        try:
            while (item := self.thread.submit(next, items, end).result()) is not end:
                yield item  # pyright: ignore[reportReturnType] -- `end` is never yielded
        finally:
            with contextlib.suppress(RuntimeError):  # the thread has ended
                self.thread.submit(items.close).result()

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(cancel_futures=True)
