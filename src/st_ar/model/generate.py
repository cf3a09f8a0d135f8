"""Sampling images' tokens with a key-value cache, classifier-free guidance, and top-k and top-p filters.

The rule is LlamaGen's: guided logits, then temperature, then top-k, then top-p.
"""

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
from st_ar.model.decoder import CachedDecoder
from st_ar.model.transformer import Transformer


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set all but the likely tokens' logits [B, V] to -inf.

    Args:
        top_k: keep the k largest (ties with the k-th too); 0 keeps all.
        top_p: then keep the smallest set of the likeliest whose probabilities exceed p, the token that passes p included.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0  # the first token is always kept
        removed = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def uniforms(seed: int, images: np.ndarray, count: int) -> Tensor:
    """Numbers in [0, 1), float32 [B, count]: those of image n are a function of (seed, n) alone.

    Counter-based (Philox), so that no image's depend on how many others there are.
    """
    keys = [np.array([seed, n], np.uint64) for n in images.tolist()]
    drawn = [np.random.Generator(np.random.Philox(key=key)).random(count, np.float32) for key in keys]
    return torch.from_numpy(np.stack(drawn))


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token [B] from each row of logits [B, V], given a number in [0, 1) for each [B]: the inverse of the
    cumulative distribution. Nothing waits for the device. Logits that are not finite give some token, never one outside the codebook.
    """
    # In whole numbers sums are exact in any order, so that a token without mass is never drawn, on a GPU neither.
    mass = (logits.float().softmax(dim=-1) * 2**40).long().cumsum(dim=-1)
    place = (uniform[:, None].double() * mass[:, -1:]).long()
    return torch.searchsorted(mass, place, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class TokenSampler:
    """Draws the tokens of many batches of one size: memory and, on a GPU, CUDA graphs are made once.

    Args:
        model: in evaluation mode, in any floating type.
        batch: images of a batch.
        settings: how to draw; their seed is not used.
        greedy: take the likeliest token instead of drawing.
        compiled: see `Decoder`.
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
        self.tokens = torch.zeros(batch, total, dtype=torch.int64, device=device)
        self.noise = torch.zeros(batch, total, device=device)
        scales = [guidance_scale(self.settings, position, total) for position in range(total)]
        self.scales = torch.tensor(scales, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # whether all logits of a draw were
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the token to be drawn
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        self.turn = 0  # of draws that have begun

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
        """Tokens int64 [batch, num_tokens] for conditions on the model's device; all tokens if None.

        Args:
            images: the images' numbers, whole [batch].
            on_token: called with how many tokens each image has, after every one; `tokens` holds them.

        Raises:
            UserError: a label, the seed or num_tokens out of range, or a model whose logits are not finite.
        """
        drawn = 0
        for drawn in self.steps(labels, images, seed, num_tokens=num_tokens):
            if on_token:
                on_token(drawn)
        return self.tokens[:, :drawn].clone()

    @torch.no_grad()
    def steps(
        self, labels: Tensor, images: np.ndarray, seed: int, *, num_tokens: int | None = None
    ) -> Generator[int, None, None]:
        """What `draw` does, token by token: yields how many tokens each image has, and `tokens` [batch, T] holds them.

        It may be left at any token, and is over when another draw of this sampler begins. Arguments and errors are `draw`'s.
        """
        count = self.model.config.sequence_length if num_tokens is None else num_tokens
        _check_request(self.model, labels, images, seed, count)
        assert len(labels) == len(self.tokens)
        self.turn = turn = self.turn + 1
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
            assert turn == self.turn, "another draw of this sampler has begun"
            guided = self.is_guided and not (interval > -1 and position > interval + 1)
            self.position.fill_(position)
            length = self.decoder.seek(position - 1)
            if labels.device.type == "cuda":
                self._replay(guided, length)
            else:
                self._advance(guided, length)
        yield count
        if not self.finite:  # read once, at the end, since the host waits for it
            raise UserError("the model's logits are not finite: its training has diverged, or it needs --dtype float32")

    def _advance(self, guided: bool, length: int) -> None:
        """Read the last token and draw the next; nothing waits for the device."""
        last = self.tokens.index_select(1, self.position - 1)[:, 0]
        self._choose(self.decoder.read(last.repeat(2) if guided else last, length), guided)

    def _choose(self, logits: Tensor, guided: bool) -> None:
        logits = logits.float()
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + self.scales.index_select(0, self.position) * (conditional - null)
        self.finite.logical_and_(logits.isfinite().all())
        if self.greedy:
            chosen = logits.argmax(dim=-1)
        else:
            how = self.settings
            logits = filter_logits(logits / how.temperature, top_k=how.top_k, top_p=how.top_p)
            chosen = choose(logits, self.noise.index_select(1, self.position)[:, 0])
        self.tokens.index_copy_(1, self.position, chosen[:, None])

    def _replay(self, guided: bool, length: int) -> None:
        """`_advance` as a CUDA graph, recorded when its kind of step first comes."""
        key = guided, length
        with torch.cuda.device(self.tokens.device):
            if key in self.graphs:
                self.graphs[key].replay()
            else:
                self.graphs[key] = self._record(guided, length)

    def _record(self, guided: bool, length: int) -> torch.cuda.CUDAGraph:
        """Do the step, and record it as it is done a second time, which changes nothing."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        # The fused kernel that takes a mask; cuDNN's is left out, as in training
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._advance(guided, length)
            torch.cuda.current_stream().wait_stream(stream)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            # Another thread may be decoding pictures meanwhile
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
        model: in evaluation mode, on the same device, in any floating type.
        labels: classes int64 [B], or captions' features [B, N, width] for a text model, as for `Transformer.forward`;
            `model.null_condition(B)` samples without a condition.
        cfg_scale: guidance scale s: logits = null + s (conditional - null). 1 is none and costs nothing.
        temperature: the (guided) logits are divided by it.
        top_k: draw from the k likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that together hold more than p; 1 for all.
        cfg_interval: guide the first token and this many decode steps + 1 after it, then no more (LlamaGen's
            meaning); -1 guides all.
        cfg_schedule: constant; linear or power-cosine: from 1 up to cfg_scale over the tokens (see `guidance_scale`).
        cfg_power: the power of power-cosine.
        seed: of the draws. The tokens of an image depend on the seed, its number, its label and the settings alone, but for
            rounding: products of another batch size may differ in the last bit. None draws afresh.
        images: the images' numbers [B]; 0, 1, .. if None.
        greedy: take the likeliest token instead of drawing.
        num_tokens: stop after this many tokens [B, num_tokens]; all T if None.

    Raises:
        UserError: a label, a setting or num_tokens out of range, or a model whose logits are not finite.
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
    """The scale for the token at `position` of an image's `total`.

    Linear: 1 + (s - 1) (t + 1) / T (as MAR has it, arXiv 2406.11838). Power-cosine: 1 + (s - 1) (1 - cos(pi (t / T)^p)) / 2
    (RAR, arXiv 2411.00776), with t counted from 0.
    """
    rise = 1.0
    if guidance.cfg_schedule == "linear":
        rise = (position + 1) / total
    elif guidance.cfg_schedule == "power-cosine":
        rise = (1 - math.cos(math.pi * (position / total) ** guidance.cfg_power)) / 2
    assert guidance.cfg_scale is not None
    return 1 + (guidance.cfg_scale - 1) * rise


def _check_request(model: Transformer, labels: Tensor, numbers: np.ndarray, seed: int, total: int) -> None:
    config = model.config
    model.cls_embedding.check(labels)
    if not 1 <= total <= config.sequence_length:
        raise UserError(
            f"{total} tokens asked for; an image of this model has {config.sequence_length}: give 1 to that many"
        )
    if numbers.shape != (len(labels),) or numbers.dtype.kind not in "iu" or numbers.min() < 0:
        raise UserError(f"images must be {len(labels)} whole numbers of 0 or more, one for each label, not {numbers}")
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed must lie in [0, {2**64 - 1}], not {seed}")
