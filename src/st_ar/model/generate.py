"""Sampling the tokens of images: key-value cache, classifier-free guidance, temperature, top-k and top-p, in LlamaGen's order."""

import math
import secrets
from collections.abc import Callable, Generator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from st_ar.config import SampleSettings
from st_ar.errors import UserError
from st_ar.model.decoder import CachedDecoder, copy_function
from st_ar.model.transformer import Transformer


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits [B, V] of unlikely tokens to -inf.

    Args:
        top_k: keep the k largest logits and ties with the k-th; 0 keeps all.
        top_p: then keep the smallest set of most likely tokens whose total probability exceeds p.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the first token is always kept
        removed = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def uniforms(seed: int, images: np.ndarray, count: int) -> Tensor:
    """Return random numbers in [0, 1), float32 [B, count]. Those of image n depend only on (seed, n)."""
    keys = [np.array([seed, n], np.uint64) for n in images.tolist()]
    rows = [np.random.Generator(np.random.Philox(key=key)).random(count, np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token from each row of logits [B, V] by inverting its cumulative distribution at uniform [B], in [0, 1).

    Logits that are not finite give some token of the codebook.
    """
    # Integer sums are exact in any order, so that a token without mass is never drawn, not even on a GPU.
    mass = (logits.float().softmax(dim=-1) * 2**40).long().cumsum(dim=-1)
    target = (uniform[:, None].double() * mass[:, -1:]).long()
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def choose_tokens(
    logits: Tensor, scale: Tensor | None, uniform: Tensor | None, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Return the next tokens int64 [B], and whether all logits are finite.

    Args:
        logits: [B, V], or with guidance [2 B, V], the conditional ones first.
        scale: guidance scale [1]; None for no guidance.
        uniform: random numbers [B] in [0, 1); None takes the most likely tokens.
    """
    logits = logits.float()
    if scale is not None:
        conditional, null = logits.chunk(2)
        logits = null + scale * (conditional - null)
    finite = logits.isfinite().all()
    if uniform is None:
        return logits.argmax(dim=-1), finite
    return draw_tokens(filter_logits(logits / temperature, top_k=top_k, top_p=top_p), uniform), finite


class TokenSampler:
    """Draws the tokens of batches of one size. Memory and CUDA graphs are reused.

    Args:
        model: a model in evaluation mode, in any floating dtype.
        batch: images of a batch.
        settings: sampling settings; their seed is not used.
        greedy: take the most likely token instead of drawing.
        compiled: see `CachedDecoder`. On a GPU guidance, filters and the draw are compiled too.
    """

    def __init__(
        self, model: Transformer, batch: int, settings: SampleSettings, *, greedy: bool = False, compiled: bool = False
    ) -> None:
        assert not model.training, "call model.eval() first: dropout is for training"
        config, device = model.config, model.output.weight.device
        self.model, self.settings, self.greedy = model, settings.resolved(config), greedy
        assert self.settings.cfg_scale is not None
        self.is_guided = self.settings.cfg_scale > 1
        total = config.sequence_length
        self.decoder = CachedDecoder(model, 2 * batch if self.is_guided else batch, compiled=compiled)
        fused = compiled and device.type == "cuda"
        self.choose = torch.compile(copy_function(choose_tokens)) if fused else choose_tokens
        self.tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)
        self.noise = torch.zeros(batch, total, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all logits of a draw were
        scales = [guidance_scale(self.settings, position, total) for position in range(total)]
        self.scales = torch.tensor(scales, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the token to draw
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        self.stream = (
            torch.cuda.Stream(device) if device.type == "cuda" else None
        )  # torch has 32, which it hands out in turn
        self.draws = 0

    @torch.no_grad()
    def draw(
        self,
        labels: Tensor,
        images: np.ndarray,
        seed: int,
        *,
        num_tokens: int | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw tokens int64 [batch, num_tokens], all if None, for labels on the model's device.

        Args:
            images: the images' numbers, integers [batch].
            on_token: called after each token with the number of tokens per image; `tokens` holds them.

        Raises:
            UserError: a label, the seed or num_tokens is out of range, or logits are not finite.
        """
        count = 0
        for count in self.steps(labels, images, seed, num_tokens=num_tokens):
            if on_token:
                on_token(count)
        return self.tokens[:, :count].clone()

    @torch.no_grad()
    def steps(
        self, labels: Tensor, images: np.ndarray, seed: int, *, num_tokens: int | None = None
    ) -> Generator[int, None, None]:
        """Draw token by token: yield the number of tokens per image after each; `tokens` [batch, T] holds them.

        The caller may stop at any token. Starting another batch with this sampler ends this one. Arguments and errors are those of `draw`.
        """
        count = self.tokens.shape[1] if num_tokens is None else num_tokens
        self.model.cls_embedding.check(labels)
        if not 1 <= count <= self.tokens.shape[1]:
            raise UserError(f"num_tokens must be 1 to {self.tokens.shape[1]}, the tokens of an image, not {count}")
        if images.shape != (len(labels),) or images.dtype.kind not in "iu" or images.min() < 0:
            raise UserError(
                f"images must be {len(labels)} whole numbers of 0 or more, one for each label, not {images}"
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"the seed must be in [0, {2**64 - 1}], not {seed}")
        assert len(labels) == len(self.tokens)
        self.draws = this_draw = self.draws + 1
        if not self.greedy:
            self.noise.copy_(uniforms(seed, images, self.noise.shape[1]))
        null = [self.model.cls_embedding.null(labels)] if self.is_guided else []
        logits = self.decoder.begin(torch.cat([labels, *null]))
        self.finite.fill_(True)
        self.position.zero_()
        self._choose(logits, self.is_guided)
        interval = self.settings.cfg_interval
        for position in range(1, count):
            yield position
            assert this_draw == self.draws, "another draw of this sampler has begun"
            guided = self.is_guided and not (interval > -1 and position > interval + 1)
            self.position.fill_(position)
            length = self.decoder.seek(position - 1)
            if labels.device.type == "cuda":
                self._replay(guided, length)
            else:
                self._advance(guided, length)
        yield count
        if not self.finite:  # only here, since the host waits
            raise UserError("the model's logits are not finite: its training has diverged, or it needs --dtype float32")

    def _advance(self, guided: bool, length: int) -> None:
        """Read the last token and draw the next. The host does not wait for the device."""
        last = self.tokens.index_select(1, self.position - 1)[:, 0]
        self._choose(self.decoder.read(last.repeat(2) if guided else last, length), guided)

    def _choose(self, logits: Tensor, guided: bool) -> None:
        settings = self.settings
        chosen, finite = self.choose(
            logits,
            self.scales.index_select(0, self.position) if guided else None,
            None if self.greedy else self.noise.index_select(1, self.position)[:, 0],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )
        self.finite.logical_and_(finite)
        self.tokens.index_copy_(1, self.position, chosen[:, None])

    def _replay(self, guided: bool, length: int) -> None:
        """Run `_advance` as a CUDA graph, recording it at first use."""
        with torch.cuda.device(self.tokens.device):
            if graph := self.graphs.get((guided, length)):
                graph.replay()
            else:
                self.graphs[guided, length] = self._record(guided, length)

    def _record(self, guided: bool, length: int) -> torch.cuda.CUDAGraph:
        """Run the step and record it as a CUDA graph."""
        stream, graph = self.stream, torch.cuda.CUDAGraph()
        assert stream is not None
        # The fused kernel that takes a mask. cuDNN's is left out, as in training.
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._advance(guided, length)
            torch.cuda.current_stream().wait_stream(stream)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            # Another thread may be decoding images at the same time.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._advance(guided, length)
        return graph


def generate(
    model: Transformer,
    labels: Tensor,
    *,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    cfg_interval: int = -1,
    cfg_schedule: Literal["constant", "linear", "power-cosine"] = "constant",
    cfg_power: float = 1.0,
    seed: int | None = None,
    images: Sequence[int] | np.ndarray | None = None,
    greedy: bool = False,
    num_tokens: int | None = None,
) -> Tensor:
    """Sample tokens int64 [B, T] for classes or captions, on the labels' device.

    Args:
        model: a model in evaluation mode, on the same device, in any floating dtype.
        labels: the labels of `Transformer.forward`: classes int64 [B], or captions' features [B, N, width] for a text model.
            `model.null_condition(B)` samples without a condition.
        cfg_scale: guidance scale s: logits = null + s (conditional - null). 1 turns guidance off.
        temperature: divides the (guided) logits.
        top_k: draw from the k most likely tokens; 0 for all.
        top_p: draw from the most likely tokens whose total probability exceeds p; 1 for all.
        cfg_interval: guide the first token and the next cfg_interval + 1 only, as in LlamaGen; -1 guides all.
        cfg_schedule: constant, or rising from 1 to cfg_scale over the tokens (see `guidance_scale`).
        cfg_power: the power of power-cosine.
        seed: seed of the draws; a random one if None. The tokens of an image depend only on the seed, its number, its label and
            the settings, up to rounding, which can change with the batch size.
        images: the images' numbers [B]; 0, 1, .. if None.
        greedy: take the most likely token instead of drawing.
        num_tokens: number of tokens to draw; all T if None.

    Raises:
        UserError: a label, a setting or num_tokens is out of range, or logits are not finite.
    """
    settings = SampleSettings(
        cfg_scale=cfg_scale,
        cfg_interval=cfg_interval,
        cfg_schedule=cfg_schedule,
        cfg_power=cfg_power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    numbers = np.arange(len(labels)) if images is None else np.asarray(images)
    seed = secrets.randbits(63) if seed is None else seed
    sampler = TokenSampler(model, len(labels), settings, greedy=greedy)
    return sampler.draw(labels, numbers, seed, num_tokens=num_tokens)


def guidance_scale(guidance: SampleSettings, position: int, total: int) -> float:
    """Return the guidance scale of the token at `position` of `total`.

    Linear: 1 + (s - 1) (t + 1) / T (MAR, arXiv 2406.11838). Power-cosine: 1 + (s - 1) (1 - cos(pi (t / T)^p)) / 2 (RAR,
    arXiv 2411.00776). t counts from 0.
    """
    rise = 1.0
    if guidance.cfg_schedule == "linear":
        rise = (position + 1) / total
    elif guidance.cfg_schedule == "power-cosine":
        rise = (1 - math.cos(math.pi * (position / total) ** guidance.cfg_power)) / 2
    assert guidance.cfg_scale is not None
    return 1 + (guidance.cfg_scale - 1) * rise
