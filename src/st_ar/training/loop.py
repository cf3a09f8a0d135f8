"""The training loop, top to bottom: plain autoregressive and self-guided training are the same loop."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from st_ar.config import TrainConfig, differences, to_dict
from st_ar.data.store import TokenStore
from st_ar.data.views import Views
from st_ar.errors import Interrupted, UserError
from st_ar.files import read_json, write_json
from st_ar.hardware import choose_device, choose_dtype, describe
from st_ar.model.transformer import Transformer
from st_ar.model.weights import save_export
from st_ar.progress import progress
from st_ar.randomness import Purpose, torch_generator, torch_seed
from st_ar.selfguided.objective import Draws, Losses, SelfGuided, draw
from st_ar.selfguided.teacher import Teacher
from st_ar.training.checkpoint import Checkpoints, list_checkpoints
from st_ar.training.log import append_log, rewind_log
from st_ar.training.optim import adamw, learning_rate

FORMAT_VERSION = 1
MAY_CHANGE = ("steps", "epochs", "log_every", "checkpoint_every", "keep", "device", "compile")
"""Settings that a resumed run may change: none of them alters a step already taken."""


def train(config: TrainConfig, tokens: Path, out: Path, *, resume: bool = False, preset: str = "") -> Path:
    """Train on the token store `tokens` and keep everything in the run folder `out`; returns `out`.

    Sets torch's global seed. The run is a function of the config and the store: stopped at any instant and resumed, it
    ends with the same weights, bit for bit on a CPU.

    Raises:
        UserError: a store that does not suit the model, a run already there, a resume with other settings, a full disk,
            or a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last finished step was written.
    """
    store = TokenStore(tokens)
    store.check_model(config.model)
    store.verify()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    total = config.total_steps(len(store))
    views = Views(store, batch_size=config.batch_size, views=config.views, seed=config.seed)
    _claim(out, config, store, dtype, resume=resume, preset=preset)

    torch.manual_seed(torch_seed(config.seed, Purpose.INITIALISATION))
    model = Transformer(config.model).to(device)
    teacher = Teacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).to(device).train()
    optimizer = adamw(student, config.optim)
    checkpoints = Checkpoints(
        out / "checkpoints", {"student": student, "ema": teacher.model}, student, optimizer, config.keep
    )
    start = checkpoints.restore()
    rewind_log(out / "log.jsonl", start)
    if config.compile:
        for block in [*model.layers, *teacher.model.layers]:
            block.compile()

    def save(step: int) -> None:
        checkpoints.save(step)
        info = {
            "step": step,
            "preset": preset,
            "class_names": store.meta.class_names,
            "tokenizer": store.meta.tokenizer,
        }
        save_export(out / "export", model, teacher.model, info)

    tokens_per_step = config.batch_size * config.views * config.model.sequence_length
    clock, clock_step = time.perf_counter(), start
    with progress(out.name, total, unit="steps", done=start) as bar, _stop_on_signal() as stop:
        for step in range(start + 1, total + 1):
            batch, labels = views.batch(step - 1)
            labels = drop_labels(labels, config.model.null_class, config.class_dropout, seed=config.seed, step=step)
            draws = draw(
                config.selfguided, config.model, images=len(batch), views=config.views, seed=config.seed, step=step
            )
            torch.manual_seed(torch_seed(config.seed, Purpose.DROPOUT, step))

            losses = backward(student, teacher, batch.to(device), labels.to(device), draws, config.accumulate, dtype)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.grad_clip or math.inf)
            rate = learning_rate(config.optim, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            decay = teacher.update(model, step)

            log = step % config.log_every == 0 or step == total
            checkpoint = step % config.checkpoint_every == 0 or step == total or bool(stop)
            if log or checkpoint or device.type == "cpu":  # reading a loss makes the host wait for a GPU
                _require_finite(losses, norm, step, out)
            if log:
                speed = tokens_per_step * (step - clock_step) / (time.perf_counter() - clock)
                clock, clock_step = time.perf_counter(), step
                terms = {
                    f"loss_{name}" if name != "total" else "loss": value.item()
                    for name, value in losses._asdict().items()
                }
                append_log(
                    out / "log.jsonl",
                    {
                        "step": step,
                        **terms,
                        "lr": rate,
                        "grad_norm": norm.item(),
                        "ema_decay": decay,
                        "tokens_per_second": speed,
                    },
                )
                bar.note(
                    " ".join(f"{name} {value:.3f}" for name, value in terms.items() if value)
                    + f" {speed:,.0f} tokens/s"
                )
            if checkpoint:
                save(step)
            bar.advance(1)
            if stop:
                raise Interrupted(
                    f"stopped at step {step} of {total}; the run is saved: the same command with --resume continues it",
                    stop[0],
                )
    return out


def drop_labels(labels: Tensor, null_class: int, share: float, *, seed: int, step: int) -> Tensor:
    """Replace a share of the labels [B] by the null class, drawn per image."""
    dropped = torch.rand(len(labels), generator=torch_generator(seed, Purpose.LABEL_DROPOUT, step)) < share
    return labels.masked_fill(dropped, null_class)


def backward(
    student: SelfGuided, teacher: Teacher, tokens: Tensor, labels: Tensor, draws: Draws, pieces: int, dtype: torch.dtype
) -> Losses:
    """Add the gradients of the batch, tokens [B, M, T] and labels [B], in `pieces` micro-batches; returns its losses.

    The teacher goes first over the whole batch, so that each micro-batch has all its images as negatives and the
    gradients are those of the large batch.
    """
    device, size = tokens.device, len(tokens) // pieces
    starts = range(0, len(tokens), size)
    positions = draws.positions.to(device)
    key_mask = None if draws.key_mask is None else draws.key_mask.to(device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with autocast:
        targets = [student.teach(teacher, tokens[i : i + size], labels[i : i + size], positions) for i in starts]
    mids = [target.mid for target in targets if target.mid is not None]
    whole = torch.cat(mids) if mids else None
    sums: list[Tensor] = []
    for start, target in zip(starts, targets, strict=True):
        here = slice(start, start + size)
        candidates, offset = (whole, start) if student.config.negatives == "global" else (target.mid, 0)
        piece = Draws(None if key_mask is None else key_mask[here], positions)
        with autocast:
            losses = student(tokens[here], labels[here], piece, target, candidates, offset)
        (losses.total / pieces).backward()
        sums.append(torch.stack([term.detach() for term in losses]))
    return Losses(*(torch.stack(sums).sum(0) / pieces))


def _claim(out: Path, config: TrainConfig, store: TokenStore, dtype: torch.dtype, *, resume: bool, preset: str) -> None:
    """Begin a run in `out`, or make sure that this is the run to be continued there."""
    file = out / "config.json"
    now: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "preset": preset,
        "config": to_dict(config),
        "tokens": {
            "source": store.meta.source,
            "tokenizer": store.meta.tokenizer,
            "images": len(store),
            "crops": store.meta.crops,
        },
        "dtype": str(dtype).removeprefix("torch."),
        "environment": describe(),
    }
    if not resume:
        if file.exists():
            done = list_checkpoints(out / "checkpoints")
            state = f"with a checkpoint of step {done[-1][0]}" if done else "without a checkpoint yet"
            raise UserError(
                f"{out} holds a run already, {state}: give --resume to continue it, or choose another --out"
            )
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise UserError(f"{out} exists already and is no run of ours: choose another --out")
        write_json(file, now)
        return
    if not file.exists():
        raise UserError(f"{out} holds no run to resume: leave out --resume to begin one, or check --out")
    begun = read_json(file, "a run")
    if begun.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {begun.get('format_version')}; this st-ar continues {FORMAT_VERSION}"
        )
    changed = {
        name: values
        for part in ("config", "tokens")
        for name, values in differences(begun.get(part, {}), now[part]).items()
        if name not in MAY_CHANGE
    }
    if begun.get("dtype") != now["dtype"]:
        changed["dtype"] = (begun.get("dtype"), now["dtype"])
    if changed:
        listed = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in changed.items())
        raise UserError(
            f"{out} was begun with other settings: {listed}. Give the old ones to resume it, or choose another --out"
        )
    write_json(file, now)


def _require_finite(losses: Losses, norm: Tensor, step: int, out: Path) -> None:
    if torch.isfinite(losses.total) & torch.isfinite(norm):
        return
    done = list_checkpoints(out / "checkpoints")
    good = f"the last good checkpoint is {done[-1][1]}" if done else "there is no checkpoint yet"
    raise UserError(
        f"the loss or its gradient is not finite at step {step} (loss {losses.total.item()}, gradient norm {norm.item()}): "
        f"{good}; lower --optim.lr, or train with --dtype float32"
    )


@contextlib.contextmanager
def _stop_on_signal() -> Generator[list[int]]:
    """A list that SIGINT and SIGTERM write their number into; a second one interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for number, old in previous.items():
            signal.signal(number, old)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
