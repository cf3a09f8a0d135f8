"""Attention on a CPU in bfloat16, forward and backward: PyTorch's fused kernel against the same written out.

This is why `st_ar.model.transformer.attend` writes it out there.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from common import ratio, save, summarise, time_in_turn
from st_ar.model.transformer import attend, attention_bias

SHAPES = {"photos preset (128 x 4 heads x 64 x 32)": (128, 4, 64, 32), "B (4 x 12 heads x 256 x 64)": (4, 12, 256, 64)}


def main() -> None:
    """Measure, print, save."""
    device = torch.device("cpu")
    results = {}
    for name, (batch, heads, length, width) in SHAPES.items():
        q, k, v = (torch.randn(batch, heads, length, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias = attention_bias(None, length, torch.bfloat16, device)

        def fused(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        def written(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v, bias: torch.Tensor = bias) -> None:
            attend(q, k, v, bias).sum().backward()

        actions: dict[str, Callable[[], object]] = {"fused": fused, "written out": written}
        times = time_in_turn(actions, rounds=20, warmup=3, device=device)
        results[name] = {n: summarise(t) for n, t in times.items()} | {
            "ratio": ratio(times["fused"], times["written out"])
        }
        print(f"{name}: fused takes {results[name]['ratio']['median']:.1f} times as long")
    save("attention-cpu", results)


if __name__ == "__main__":
    main()
