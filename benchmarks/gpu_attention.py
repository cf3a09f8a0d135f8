"""What on_gpu.py's slice `attention` measures: ways to compute causal attention with masked keys, forward and backward in bfloat16.

Each way sees the same queries, keys and values as the model has them, [B, T, H, d] in memory, and the same masked keys. Results and
gradients are compared with attention written out in float32. What builds a mask is timed apart, since all layers share it.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import Budget, time_in_turn
from st_ar.errors import cause
from st_ar.presets import get_preset

MASKED = 0.25
"""Share of the keys that are masked. Key 0, the condition, never is."""
CALLS = 10
"""In a row, timed together."""
TOLERANCE = 0.02
"""Largest relative distance of the result and of each gradient from float32's."""


@dataclass(frozen=True)
class Way:
    """A way to compute attention."""

    prepare: Callable[[Tensor, int], Any]
    """What a step computes once: key mask bool [B, T] and number of heads -> mask."""
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """q, k, v [B, H, T, d] and the mask -> [B, H, T, d]."""
    masks_keys: bool = True
    last: bool = False
    """Whether to try it after all others, since an error in a kernel ends all CUDA work of the process."""


def full_mask(hidden: Tensor, _heads: int) -> Tensor:
    """The additive mask [B, 1, T, T] in bfloat16."""
    future = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool, device=hidden.device).triu(1)
    mask = (future | hidden[:, None])[:, None]
    return torch.zeros(mask.shape, dtype=torch.bfloat16, device=hidden.device).masked_fill_(mask, float("-inf"))


def key_bias(hidden: Tensor, heads: int) -> Tensor:
    """The keys' additive mask, [B, 1, 1, T] in memory, as [B, H, T, T]."""
    bias = torch.zeros(hidden.shape, dtype=torch.bfloat16, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return bias[:, None, None].expand(-1, heads, hidden.shape[1], -1)


def efficient_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The memory-efficient kernel, causal and with a bias, which scaled_dot_product_attention does not offer together."""
    scale = q.shape[-1] ** -0.5
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, True, scale=scale)[0]


def key_column(hidden: Tensor, heads: int) -> Tensor:
    """Eight more features of each key [B, H, T, 8]: the first is very negative where the key is masked."""
    column = torch.zeros(*hidden.shape, 8, dtype=torch.bfloat16, device=hidden.device)
    column[..., 0] = torch.where(hidden, -(2.0**15), 0.0)
    return column[:, None].expand(-1, heads, -1, -1)


def widened(q: Tensor, k: Tensor, v: Tensor, column: Tensor) -> Tensor:
    """Heads eight features wider, in which the queries are 1 where the keys have their mask; causal, without a mask."""
    one = torch.zeros_like(column[..., :1]) + 1
    q = torch.cat([q, one, torch.zeros_like(column[..., 1:])], dim=-1)
    k, v = torch.cat([k, column], dim=-1), F.pad(v, (0, 8))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(q.shape[-1] - 8) ** -0.5)[..., :-8]


def block_mask(hidden: Tensor, _heads: int) -> Any:
    """FlexAttention's mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ~hidden[b, j]

    count, length = hidden.shape
    return create_block_mask(visible, count, None, length, length, device=str(hidden.device), BLOCK_SIZE=128)


def flex() -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, mask: compiled(q, k, v, block_mask=mask)


def sdpa(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """PyTorch's function with one kernel, or with the one that it chooses; causal without a mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    return attend


def no_mask(_hidden: Tensor, _heads: int) -> None:
    """Return None: some ways mask no keys."""


def ways(device: torch.device) -> dict[str, Way]:
    """All of them; on a CPU those that run there."""
    found = {
        "mask T x T": Way(full_mask, sdpa(None)),
        "widened head": Way(key_column, widened),
        "unmasked, causal": Way(no_mask, sdpa(None), masks_keys=False),
    }
    if device.type == "cuda":
        cudnn = sdpa(SDPBackend.CUDNN_ATTENTION)
        found |= {
            "causal and key bias": Way(key_bias, efficient_causal),
            "unmasked, causal, memory-efficient": Way(no_mask, sdpa(SDPBackend.EFFICIENT_ATTENTION), masks_keys=False),
            "FlexAttention": Way(block_mask, flex(), last=True),
            "unmasked, causal, cuDNN": Way(no_mask, cudnn, masks_keys=False, last=True),
            "mask T x T, cuDNN": Way(full_mask, cudnn, last=True),
        }
    return found


def written_out(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """The reference."""
    length = q.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if hidden is not None:
        mask = mask | hidden[:, None, None]
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(mask, float("-inf")).softmax(-1) @ v


def with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Mapping[str, Tensor], slope: Tensor
) -> dict[str, Tensor]:
    """The result and the gradients of q, k and v, in float32."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    result = attend(*(leaf.transpose(1, 2) for leaf in leaves.values()))
    found = torch.autograd.grad(result, list(leaves.values()), slope.to(result.dtype))
    return {"result": result.detach().float(), **{f"d{name}": g.float() for name, g in zip(leaves, found, strict=True)}}


def agreement(way: Way, inputs: Mapping[str, Tensor], hidden: Tensor, slope: Tensor) -> dict[str, Any]:
    """Relative distances from the reference."""
    mask = way.prepare(hidden, slope.shape[1])
    ours = with_gradients(lambda q, k, v: way.attend(q, k, v, mask), inputs, slope)
    exact = {name: tensor.float() for name, tensor in inputs.items()}
    true = with_gradients(lambda q, k, v: written_out(q, k, v, hidden if way.masks_keys else None), exact, slope)
    apart = {name: ((ours[name] - true[name]).norm() / true[name].norm()).item() for name in true}
    finite = all(tensor.isfinite().all() for tensor in ours.values())
    passed = finite and all(value <= TOLERANCE for value in apart.values())
    return {"apart": apart, "finite": bool(finite), "tolerance": TOLERANCE, "passed": passed}


def measure(
    batch: int,
    heads: int,
    width: int,
    length: int,
    chosen: dict[str, Way],
    rounds: int,
    device: torch.device,
    budget: Budget,
) -> dict[str, Any]:
    """Milliseconds of forward and backward, TFLOP/s, and agreement, of each chosen way. The FLOPs are those of causal attention."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, length, heads, width)
    inputs = {name: torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for name in "qkv"}
    slope = torch.randn(batch, heads, length, width, generator=generator, device=device, dtype=torch.bfloat16)
    hidden = torch.rand(batch, length, generator=generator, device=device) < MASKED
    hidden[:, 0] = False
    flops = 0.5 * 3.5 * 4 * batch * heads * length**2 * width
    found: dict[str, Any] = {}
    for name, way in budget.cases(chosen.items(), named=lambda item: f"{heads} heads, {item[0]}"):
        try:
            found[name] = agreement(way, inputs, hidden, slope)
            mask = way.prepare(hidden, heads)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]

            def call(way: Way = way, mask: Any = mask, leaves: list[Tensor] = leaves) -> None:
                for _ in range(CALLS):
                    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
                    result = way.attend(q, k, v, mask)
                    torch.autograd.grad(result, leaves, slope)

            actions = {"call": call, "mask": lambda way=way: way.prepare(hidden, heads)}
            times = time_in_turn(actions, rounds=rounds, warmup=2, device=device)
            seconds = statistics.median(times["call"]) / CALLS
            found[name] |= {"ms": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12}
            found[name] |= {"ms of making the mask": 1e3 * statistics.median(times["mask"])}
        except Exception as error:
            found[name] = {"passed": False, "failed": cause(error)}
    return found


def attention(
    device: torch.device, small: bool, budget: Budget, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """At the heads of B, L and XL, 256 sequences of 256 tokens each, so that the GPU and not the host sets the pace."""
    found, every = dict[str, Any](), ways(device)
    presets = ("b",) if small else ("b", "l", "xl")
    for last, preset in product((False, True), presets):
        model = get_preset(f"llamagen-{preset}").model
        sizes = (2, 2, 16, 32) if small else (256, model.n_heads, model.head_dim, model.sequence_length)
        name = "{} sequences, {} heads of width {}, T = {}".format(*sizes)
        chosen = {name: way for name, way in every.items() if way.last == last}
        measured = measure(*sizes, chosen, rounds=2 if small else 10, device=device, budget=budget)
        found[name] = found.get(name, {}) | measured
        keep(found)
    return found
