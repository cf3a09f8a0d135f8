"""The training loop, top to bottom: plain autoregressive and self-guided training are the same loop."""

import contextlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from st_ar.config import TrainConfig, WatchConfig
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.data.text import open_text
from st_ar.distributed import (
    Ranks,
    all_gather,
    all_reduce_max,
    all_reduce_mean,
    broadcast_from_rank0,
    get_rank,
    process_group,
    stop_on_signal,
)
from st_ar.errors import Interrupted, UserError
from st_ar.files import write_json
from st_ar.hardware import choose_dtype, freed_memory_kept, require_compiler, to_device
from st_ar.model.transformer import Transformer
from st_ar.model.weights import exported_step
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_generator, torch_seed
from st_ar.selfguided.objective import NO_GUIDANCE, EMATeacher, GuidanceSample, Losses, SelfGuided, sample_guidance
from st_ar.training.checkpoint import CheckpointExporter, State, not_finite, require_finite
from st_ar.training.inputs import Initial, Validation
from st_ar.training.optim import adamw, clip_gradients, learning_rate
from st_ar.training.parallel import choose_parallel, gradient_sync, parallelize, unwrap
from st_ar.training.run import (
    append_log,
    describe_run,
    explain_out_of_memory,
    lock_run,
    open_run,
    rewind_log,
    skipped_steps,
)
from st_ar.training.watch import Watch


def train(
    config: TrainConfig,
    tokens: Path,
    out: Path,
    *,
    text: Path | None = None,
    validation: Path | None = None,
    init: Path | None = None,
    init_ema: bool = False,
    watching: WatchConfig | None = None,
    resume: bool = False,
    preset: str = "",
) -> Path:
    """Train on the token store `tokens` and keep everything in the run folder `out`; returns `out`.

    Sets torch's global seed. The run is a function of the config, the stores and `init`: stopped at any instant and resumed, it
    ends with the same weights, bit for bit on a CPU. Under torchrun all ranks call this and share each batch; without
    dropout the result is that of one, but for rounding (with dropout inside the network, each rank draws its own).

    Args:
        text: the captions of the token store's images, for a text model and no other.
        validation: a token store to measure the averaged weights on at each checkpoint; the best are kept in best/.
        init: a model whose weights to begin with instead of random ones, for student and teacher; any that `open_model` takes.
            AdamW's moments, the projector, the average and the count of steps begin anew.
        init_ema: begin with its averaged instead of its live weights.
        watching: what is shown of the run; it has no part in the weights. TensorBoard's curves alone if None.

    Raises:
        UserError: a store, captions or their absence, or weights to begin with that do not suit the model, a run already
            there, a resume with other settings or data, a full disk, too little memory, a loss that is not finite, ranks
            that do not suit the settings or are lost.
        Interrupted: SIGINT or SIGTERM came to this rank or another; a checkpoint of the last finished step was written.
    """
    given = (tokens, text, validation, init)
    with (
        process_group(config.device, config.rank_timeout) as (ranks, device),
        explain_out_of_memory(config, ranks.world),
        freed_memory_kept(),
        contextlib.ExitStack() as held,
    ):
        watching = watching or WatchConfig()
        return _train(
            config, *given, out, ranks, device, watching, held, init_ema=init_ema, resume=resume, preset=preset
        )


def _train(
    config: TrainConfig,
    tokens: Path,
    text: Path | None,
    validation: Path | None,
    init: Path | None,
    out: Path,
    ranks: Ranks,
    device: torch.device,
    watching: WatchConfig,
    held: contextlib.ExitStack,
    *,
    init_ema: bool,
    resume: bool,
    preset: str,
) -> Path:
    parallel = choose_parallel(config, ranks.world)
    first = ranks.rank == 0
    store = TokenStore(tokens)
    store.check_model(config.model)
    initial = Initial(init, ema=init_ema, config=config.model, trained_on=store)
    captions = open_text(text, config.model, initial.encoder)
    if captions is not None:
        captions.check_tokens(store)
    if config.selfguided.contrast and config.batch_size > len(store):
        raise UserError(
            f"--batch-size {config.batch_size} is more than the {len(store)} images of {tokens}, which would be negatives of themselves: "
            f"give at most {len(store)}"
        )
    dtype = choose_dtype(config.dtype, device)
    if config.compile:
        require_compiler(device)
    total = config.total_steps(len(store))
    conditions = None if captions is None else partial(captions.features, text_tokens=config.model.text_tokens)
    views = TokenBatches(
        store, batch_size=config.batch_size, views=config.views, seed=config.seed, conditions=conditions, ranks=ranks
    )
    validated = Validation(validation, store, config, out / "best")

    def begin() -> dict[str, Any]:
        for read in filter(None, (store, captions, validated.store)):
            read.verify()
        data = {"tokens": store.describe()} | ({} if captions is None else {"text": captions.describe()})
        data |= validated.describe() | initial.describe()
        record = describe_run(config, data, dtype, preset)
        open_run(out, record, config, len(store), resume=resume, exported=exported_step(out / "export"))
        held.enter_context(lock_run(out))
        return record

    watch = Watch(watching, config, out, store, captions, device, dtype)
    record = broadcast_from_rank0(begin)

    torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
    model = Transformer(config.model)
    initial.give(model)
    teacher = EMATeacher(model, config.selfguided)
    student = SelfGuided(model, config.selfguided).train()
    called = parallelize(student, teacher, config, parallel, device, dtype)
    optimizer = adamw(student, config.optim)
    state = State({"student": student, "ema": teacher.model}, student, optimizer)
    about = {"preset": preset, "class_names": store.meta.class_names, "tokenizer": store.meta.tokenizer}
    about |= {"class_dropout": config.class_dropout} | ({} if captions is None else {"encoder": captions.encoder})
    keeper = CheckpointExporter(out, config, state, validated, about)
    start, checkpoints = keeper.restore(), keeper.checkpoints
    if first:
        write_json(out / "config.json", record)
        rewind_log(out / "log.jsonl", start)
    skipped = broadcast_from_rank0(lambda: skipped_steps(out / "log.jsonl"))

    tokens_per_step = config.batch_size * config.views * config.model.sequence_length
    clock, clock_step = time.perf_counter(), start
    remedy = f"train with --dtype float32, or skip more such steps than --skip-nonfinite {config.skip_nonfinite}"
    mine = ranks.share(config.batch_size)
    with (
        stop_on_signal() as stop,  # around all, so that what ends a run is told though torchrun ends this rank for it too
        progress(out.name, total, unit="steps", done=start, shown=first) as bar,
        watch.follow(student, record, start),
        checkpoints,
    ):
        for step in range(start + 1, total + 1):
            log = watch.begin(step, total)
            batch, labels = views.batch(step - 1)
            batch, labels = to_device(batch, device), to_device(labels, device)
            null = model.cls_embedding.null(labels)
            labels = drop_labels(labels, null, config.class_dropout, seed=config.seed, step=step, ranks=ranks)
            choices = {"images": config.batch_size, "views": config.views, "seed": config.seed, "step": step}
            guided = config.selfguided.guides(step, total)
            draws = sample_guidance(config.selfguided, config.model, **choices, mine=mine) if guided else NO_GUIDANCE
            torch.manual_seed(torch_seed(config.seed, RandomStream.DROPOUT, step, ranks.rank))

            losses = backward(called, teacher, batch, labels, draws, config.accumulate, dtype)
            norm = clip_gradients(student.parameters(), config.optim.grad_clip)
            terms = {"loss": losses.total, "gradient norm": norm}
            skipping = not_finite(terms) if skipped < config.skip_nonfinite else ""
            rate, decay = learning_rate(config.optim, step, total), 0.0
            if not skipping:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                decay = teacher.update(model, step)
            optimizer.zero_grad()

            checkpoints.check()
            if skipping:
                skipped += 1
                if first:
                    append_log(out / "log.jsonl", {"step": step, "skipped": skipping})
                bar.note(f"step {step} skipped: {skipping}")
            elif log or config.skip_nonfinite or device.type == "cpu":  # reading a loss makes the host wait for a GPU
                require_finite(terms, step, checkpoints, remedy=remedy)
            if log and not skipping:
                speed = tokens_per_step * (step - clock_step) / (time.perf_counter() - clock)
                parts = {name if name == "total" else f"loss_{name}": x.item() for name, x in losses._asdict().items()}
                rates = {"lr": rate, "grad_norm": norm.item(), "ema_decay": decay, "tokens_per_second": speed}
                entry = watch.look(step, {"step": step, "loss": parts.pop("total"), **parts, **rates})
                if first:
                    append_log(out / "log.jsonl", entry)
                shown = " ".join(f"{name.removeprefix('loss_')} {value:.2f}" for name, value in parts.items() if value)
                bar.note(f"{shown}, {speed / 1000:.1f}k tokens/s")
                clock, clock_step = time.perf_counter(), step
            stopping = all_reduce_max(stop[0] if stop else 0)  # all ranks stop together
            due = step % config.checkpoint_every == 0 or step == total
            if due or stopping:
                if not skipping:
                    require_finite(terms, step, checkpoints, remedy=remedy)
                # Not on interruption: that would be late, and the best would depend on it.
                shards = dtype if parallel == "fsdp" else torch.float32
                measured = validated.measure(teacher.model, len(batch) // config.accumulate, shards) if due else {}
                if measured and first:
                    append_log(out / "log.jsonl", {"step": step, **measured})
                    watch.send(step, measured)
                keeper.save(step, measured)
            bar.advance(1)
            if stopping:
                checkpoints.wait()
                raise Interrupted(
                    f"stopped at step {step} of {total}; the run is saved: the same command with --resume continues it",
                    stopping,
                )
    return out


def drop_labels(
    labels: Tensor, null: Tensor | int, share: float, *, seed: int, step: int, ranks: Ranks | None = None
) -> Tensor:
    """Replace a share of the labels [B, ..] by the null condition, which has their shape or is one class.

    Drawn per image for the batch of all ranks, of which these are this one's.
    """
    ranks = ranks or Ranks()
    drawn = (
        torch.rand(len(labels) * ranks.world, generator=torch_generator(seed, RandomStream.LABEL_DROPOUT, step)) < share
    )
    dropped = to_device(drawn[ranks.share(len(drawn))], labels.device)
    return torch.where(dropped.view(-1, *[1] * (labels.dim() - 1)), null, labels)


def backward(
    student: nn.Module,
    teacher: EMATeacher,
    tokens: Tensor,
    labels: Tensor,
    draws: GuidanceSample,
    pieces: int,
    dtype: torch.dtype,
) -> Losses:
    """Add the gradients of the batch, tokens [B, M, T] and labels [B, ..], in `pieces` micro-batches; returns its losses.

    The teacher goes first over the whole batch, so that each micro-batch has all its images as negatives and the
    gradients are those of the large batch. On several ranks each gives its part of the batch; gradients and losses are
    averaged over them, and the negatives are all ranks'.

    Args:
        student: a SelfGuided, or what `parallelize` has made of it.
    """
    bare = unwrap(student)
    device, size = tokens.device, len(tokens) // pieces
    starts = range(0, len(tokens), size)
    positions = None if draws.positions is None else to_device(draws.positions, device)
    key_mask = None if draws.key_mask is None else to_device(draws.key_mask, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    with autocast:
        targets = [bare.teach(teacher, tokens[i : i + size], labels[i : i + size], positions) for i in starts]
    mids = [target.mid for target in targets if target.mid is not None]
    whole, before = None, 0
    if mids and bare.config.negatives == "global":
        whole, before = all_gather(torch.cat(mids)), get_rank() * len(tokens)
    sums: list[Tensor] = []
    for start, target in zip(starts, targets, strict=True):
        here = slice(start, start + size)
        candidates, offset = (target.mid, 0) if whole is None else (whole, before + start)
        piece = GuidanceSample(None if key_mask is None else key_mask[here], positions)
        with gradient_sync(student, last=start == starts[-1]):
            with autocast:
                losses = student(tokens[here], labels[here], piece, target, candidates, offset)
            (losses.total / pieces).backward()
        sums.append(torch.stack([term.detach() for term in losses]))
    return Losses(*all_reduce_mean(torch.stack(sums).sum(0) / pieces))
