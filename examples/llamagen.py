"""Train LlamaGen's own transformer, unmodified and from your checkout of it, with self-guidance on a token store.

    git clone https://github.com/FoundationVision/LlamaGen
    python examples/llamagen.py --llamagen LlamaGen --tokens tokens --model GPT-B --steps 1000 --out guided.pt

The step is that of its train_c2i.py with self-guidance added. Printed are the next-token loss and the three losses of self-guidance.
The file has LlamaGen's format, with the teacher as its EMA weights: both LlamaGen's scripts and `st-ar sample`, `st-ar probe` and
others read it. docs/own-model.md shows the same as a change to train_c2i.py, for several GPUs.
"""

import argparse
import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import st_ar
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.errors import UserError
from st_ar.hardware import choose_device, to_device


def run(
    model: nn.Module, tokens: Tensor, labels: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the next-token loss of tokens [B, M, T] and labels [B], and the features [B, M, T, D]."""
    rows, classes = tokens.flatten(0, 1).contiguous(), labels.repeat_interleave(tokens.shape[1])
    places = torch.arange(rows.shape[1], device=rows.device)  # its forward needs them in evaluation mode only
    mask = None if key_mask is None else st_ar.attention_mask(key_mask.flatten(0, 1))  # None is causal
    layers: Any = model.layers
    with st_ar.capture(model, {"mid": layers[len(layers) // 2 - 1], "last": layers[-1]}) as features:
        _, loss = model(idx=rows[:, :-1], cond_idx=classes, targets=rows, mask=mask, input_pos=places)
    return loss, {name: each.unflatten(0, tokens.shape[:2]) for name, each in features.items()}


def train_step(
    model: nn.Module,
    guidance: st_ar.SelfGuidance,
    teacher: st_ar.EMATeacher[nn.Module],
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    labels: Tensor,
    step: int,
) -> dict[str, float]:
    """Take one step on tokens [B, M, T] and labels [B]; returns the losses."""
    sample = guidance.sample(tokens.shape, step)
    bf16 = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
    with torch.no_grad(), bf16:
        _, target = run(teacher.model, tokens, labels)
    with bf16:
        loss, features = run(model, tokens, labels, sample.key_mask)
        losses = guidance(features, target, sample)
    (loss + losses.total).backward()
    nn.utils.clip_grad_norm_([*model.parameters(), *guidance.parameters()], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    teacher.update(model, step)
    return {"next token": loss.item(), "mim": losses.mim.item(), "step": losses.step.item(), "view": losses.view.item()}


def check(model: nn.Module, tokens: Tensor) -> None:
    """Check that the model honours a key mask, on tokens [B, T]."""
    model.eval()
    labels = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    st_ar.require_key_mask(lambda rows, mask: run(model, rows[:, None], labels, mask[:, None])[1]["last"][:, 0], tokens)
    model.train()  # with dropout of classes and tokens


def make_model(checkout: Path, name: str, store: TokenStore) -> nn.Module:
    """LlamaGen's model for a store's tokens and classes."""
    if not (checkout / "autoregressive/models/gpt.py").exists():
        raise UserError(f"{checkout} is not a checkout of LlamaGen: it has no autoregressive/models/gpt.py")
    sys.path.insert(0, str(checkout))
    models: dict[str, Any] = importlib.import_module("autoregressive.models.gpt").GPT_models
    if name not in models:
        raise UserError(f"LlamaGen has no model {name!r}: give one of {', '.join(models)}")
    meta = store.meta
    return models[name](
        vocab_size=meta.vocab_size, block_size=meta.grid**2, num_classes=len(meta.class_names), cls_token_num=1
    )


def main(arguments: list[str] | None = None) -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamagen", type=Path, required=True, help="a checkout of LlamaGen")
    parser.add_argument("--tokens", type=Path, required=True, help="a token store with several crops of each image")
    parser.add_argument("--model", default="GPT-B")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step, of which each gives two crops")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="file for the weights, .pt")
    given = parser.parse_args(arguments)
    device, store = choose_device("auto"), TokenStore(given.tokens)
    batches = TokenBatches(store, batch_size=given.batch_size, views=2, seed=given.seed)
    torch.manual_seed(given.seed)
    model = make_model(given.llamagen, given.model, store).to(device)
    config: Any = model.config
    guidance = st_ar.SelfGuidance(config.dim, seed=given.seed).to(device)
    teacher = st_ar.EMATeacher(model)
    check(model, to_device(batches.batch(0)[0][:2, 0], device))
    every = [parameter for part in (model, guidance) for parameter in part.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in every if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=given.lr, betas=(0.9, 0.95))
    for step in range(1, given.steps + 1):
        tokens, labels = (to_device(each, device) for each in batches.batch(step - 1))
        losses = train_step(model, guidance, teacher, optimizer, tokens, labels, step)
        if step in (1, given.steps) or step % 50 == 0:
            print(f"step {step}", *(f"  {name} {loss:.3f}" for name, loss in losses.items()), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "ema": teacher.model.state_dict(), "steps": given.steps}, given.out)


if __name__ == "__main__":
    main()
