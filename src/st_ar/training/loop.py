"""The training loop, top to bottom: plain autoregressive and self-guided training are the same loop."""

import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from st_ar.config import TrainConfig
from st_ar.data.store import TokenStore
from st_ar.data.text import open_text
from st_ar.data.views import Views
from st_ar.errors import Interrupted
from st_ar.files import write_json
from st_ar.hardware import choose_device, choose_dtype, require_compiler
from st_ar.model.transformer import Transformer
from st_ar.model.weights import exported_step, save_export
from st_ar.progress import progress
from st_ar.randomness import Purpose, torch_generator, torch_seed
from st_ar.selfguided.objective import Draws, Losses, SelfGuided, draw
from st_ar.selfguided.teacher import Teacher
from st_ar.training.checkpoint import Checkpoints
from st_ar.training.log import append_log, rewind_log
from st_ar.training.optim import adamw, learning_rate
from st_ar.training.run import claim, describe_run, require_finite
from st_ar.training.stopping import stop_on_signal
from st_ar.training.watch import Watch
from st_ar.watch_config import WatchConfig


def train(
    config: TrainConfig,
    tokens: Path,
    out: Path,
    *,
    text: Path | None = None,
    watching: WatchConfig | None = None,
    resume: bool = False,
    preset: str = "",
) -> Path:
    """Train on the token store `tokens` and keep everything in the run folder `out`; returns `out`.

    Sets torch's global seed. The run is a function of the config and the stores: stopped at any instant and resumed, it
    ends with the same weights, bit for bit on a CPU.

    Args:
        text: the captions of the token store's images, for a text model and no other.
        watching: what is shown of the run; it has no part in the weights. TensorBoard's curves alone if None.

    Raises:
        UserError: a store, captions or their absence that do not suit the model, a run already there, a resume with other
            settings or captions, a full disk, or a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint of the last finished step was written.
    """
    store = TokenStore(tokens)
    store.check_model(config.model)
    captions = open_text(text, config.model)
    if captions is not None:
        captions.check_tokens(store)
    store.verify()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if config.compile:
        require_compiler(device)
    total = config.total_steps(len(store))
    conditions = None if captions is None else partial(captions.features, text_tokens=config.model.text_tokens)
    views = Views(store, batch_size=config.batch_size, views=config.views, seed=config.seed, conditions=conditions)
    data = {"tokens": store.describe()} | ({} if captions is None else {"text": captions.describe()})
    record = describe_run(config, data, dtype, preset)
    watch = Watch(watching or WatchConfig(), config, out, store, captions, device, dtype)
    claim(out, record, config, len(store), resume=resume)

    torch.manual_seed(torch_seed(config.seed, Purpose.INITIALISATION))
    model = Transformer(config.model).to(device)
    teacher = Teacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).to(device).train()
    optimizer = adamw(student, config.optim)
    checkpoints = Checkpoints(
        out / "checkpoints", {"student": student, "ema": teacher.model}, student, optimizer, config.keep
    )
    start = checkpoints.restore()
    write_json(out / "config.json", record)
    rewind_log(out / "log.jsonl", start)
    if config.compile:
        for block in [*model.layers, *teacher.model.layers]:
            block.compile()

    def export(step: int) -> None:
        info = {"preset": preset, "class_names": store.meta.class_names, "tokenizer": store.meta.tokenizer}
        encoder = {} if captions is None else {"encoder": captions.encoder}
        known = {"step": step, **info, "class_dropout": config.class_dropout, **encoder}
        save_export(out / "export", model, teacher.model, known)

    if start and exported_step(out / "export") != start:  # the run was killed between its checkpoint and its export
        export(start)

    tokens_per_step = config.batch_size * config.views * config.model.sequence_length
    clock, clock_step = time.perf_counter(), start
    with (
        progress(out.name, total, unit="steps", done=start) as bar,
        watch.follow(student, record, start),
        stop_on_signal() as stop,
    ):
        for step in range(start + 1, total + 1):
            log = watch.begin(step, total)
            batch, labels = views.batch(step - 1)
            labels = labels.to(device)
            null = model.cls_embedding.null(labels)
            labels = drop_labels(labels, null, config.class_dropout, seed=config.seed, step=step)
            draws = draw(
                config.selfguided, config.model, images=len(batch), views=config.views, seed=config.seed, step=step
            )
            torch.manual_seed(torch_seed(config.seed, Purpose.DROPOUT, step))

            losses = backward(student, teacher, batch.to(device), labels, draws, config.accumulate, dtype)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.optim.grad_clip or math.inf)
            rate = learning_rate(config.optim, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            decay = teacher.update(model, step)

            if log or device.type == "cpu":  # reading a loss makes the host wait for a GPU
                require_finite({"loss": losses.total, "gradient norm": norm}, step, out)
            if log:
                speed = tokens_per_step * (step - clock_step) / (time.perf_counter() - clock)
                terms = {name if name == "total" else f"loss_{name}": x.item() for name, x in losses._asdict().items()}
                state = {"lr": rate, "grad_norm": norm.item(), "ema_decay": decay, "tokens_per_second": speed}
                entry = {"step": step, "loss": terms.pop("total"), **terms, **state}
                append_log(out / "log.jsonl", watch.look(step, entry))
                shown = " ".join(f"{name.removeprefix('loss_')} {value:.2f}" for name, value in terms.items() if value)
                bar.note(f"{shown}, {speed / 1000:.1f}k tokens/s")
                clock, clock_step = time.perf_counter(), step
            stopping = stop[0] if stop else 0
            if step % config.checkpoint_every == 0 or step == total or stopping:
                require_finite({"loss": losses.total, "gradient norm": norm}, step, out)
                checkpoints.save(step)
                export(step)
            bar.advance(1)
            if stopping:
                raise Interrupted(
                    f"stopped at step {step} of {total}; the run is saved: the same command with --resume continues it",
                    stopping,
                )
    return out


def drop_labels(labels: Tensor, null: Tensor | int, share: float, *, seed: int, step: int) -> Tensor:
    """Replace a share of the labels [B, ..] by the null condition, which has their shape or is one class; drawn per image."""
    dropped = torch.rand(len(labels), generator=torch_generator(seed, Purpose.LABEL_DROPOUT, step)) < share
    return torch.where(dropped.to(labels.device).view(-1, *[1] * (labels.dim() - 1)), null, labels)


def backward(
    student: SelfGuided, teacher: Teacher, tokens: Tensor, labels: Tensor, draws: Draws, pieces: int, dtype: torch.dtype
) -> Losses:
    """Add the gradients of the batch, tokens [B, M, T] and labels [B, ..], in `pieces` micro-batches; returns its losses.

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
