"""The training loop, top to bottom. Plain and self-guided training are the same loop."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from st_ar.config import TrainConfig, WatchConfig
from st_ar.distributed import Ranks, all_gather, all_reduce_max, all_reduce_mean, get_rank, stop_on_signal
from st_ar.hardware import choose_compile, choose_dtype, to_device
from st_ar.model.transformer import Transformer
from st_ar.model.weights import exported_step
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_generator, torch_seed
from st_ar.selfguided.guidance import EMATeacher, GuidanceSample, make_teacher
from st_ar.selfguided.objective import Losses, SelfGuided
from st_ar.training.checkpoint import CheckpointExporter, State, not_finite, require_finite
from st_ar.training.graph import GraphedPasses, Passes, require_graph
from st_ar.training.inputs import DataPaths, Inputs
from st_ar.training.optim import adamw, clip_gradients, learning_rate, set_learning_rate
from st_ar.training.parallel import choose_parallel, gradient_sync, parallelize, unwrap
from st_ar.training.plan import note_shortage
from st_ar.training.run import Run, training_session
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
    """Train on the token store `tokens` into the run folder `out`; returns `out`.

    Sets torch's global seed. The weights depend only on the config, the stores and `init`: a run that is stopped at any time and
    resumed ends with the same weights, bit for bit on a CPU. Under torchrun all ranks call this function and share each batch.
    Without dropout the result equals that of one rank up to rounding; with dropout each rank draws its own.

    Args:
        config: every setting of the run.
        tokens: the token store.
        out: the run's folder.
        text: captions of the token store's images, only for a text model.
        validation: a token store to measure the EMA weights on at each checkpoint; the best weights are kept in best/.
        init: a model to start from instead of random weights, for student and teacher; any that `load_model` takes. AdamW's
            moments, the projector and the step count start fresh.
        init_ema: start from its EMA weights instead of the live ones.
        watching: trackers, samples and probes. They have no effect on the weights. TensorBoard only if None.
        resume: continue the run in `out` from its newest checkpoint.
        preset: the preset's name, for the record.

    Raises:
        UserError: stores, captions or initial weights do not fit the model, `out` holds a run already, a resume changes settings
            or data, the disk is full, memory runs out, a loss is not finite, or ranks do not fit or are lost.
        Interrupted: any rank received SIGINT or SIGTERM; a checkpoint of the last finished step was written.
    """
    out = out.expanduser()
    with training_session(config) as (ranks, device), Run(out, config, ranks, preset=preset, resume=resume) as run:
        # Open everything and refuse what cannot work before the run begins.
        parallel, dtype = choose_parallel(config, ranks.world), choose_dtype(config.dtype, device)
        compiled = choose_compile(config.compile, device)  # refuses a missing compiler
        if config.cuda_graph:
            require_graph(device, ranks.world)
        paths = DataPaths(tokens=tokens, text=text, validation=validation, init=init, init_ema=init_ema)
        inputs = Inputs(paths, config, out / "best", ranks)
        total = config.total_steps(len(inputs.store))
        watch = Watch(watching or WatchConfig(), config, out, inputs, device, dtype)
        if device.type == "cuda" and run.writes:
            note_shortage(config, parallel, dtype, ranks.world, device, compiled=compiled)
        run.open(inputs.describe, dtype, images=len(inputs.store), exported=exported_step(out / "export"))

        # Build the student, its teacher and the optimizer, and restore them.
        torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
        model = Transformer(config.model)
        inputs.initial.load_into(model)
        teacher = make_teacher(model, config.selfguided)
        student = SelfGuided(model, config.selfguided, seed=config.seed).train()
        module = parallelize(student, teacher, config, parallel, device, dtype)
        learner = Learner(module, teacher, config.accumulate, dtype)
        passes: Passes = partial(forward_backward, learner)
        if config.cuda_graph:
            passes = GraphedPasses(passes, device, hooked=watch.reads_features)
        optimizer = adamw(student, config.optim)
        state = State({"student": student, "ema": teacher.model}, student, optimizer)
        exporter = CheckpointExporter(out, config, state, inputs.validation, inputs.describe_export(preset))
        checkpoints = exporter.checkpoints
        start = exporter.restore()
        skipped = run.start(start)

        shape = (config.batch_size, config.views, config.model.sequence_length)
        clock, clock_step = time.perf_counter(), start
        with (
            stop_on_signal() as signals,  # outermost, so that an error is reported even if torchrun sends SIGTERM because of it
            progress(out.name, total, unit="steps", done=start, shown=run.writes) as bar,
            watch.follow(student, run.record, start),
            checkpoints,
        ):
            for step in range(start + 1, total + 1):
                # Data and all random choices, each a function of the seed and the step.
                log = watch.start_step(step, total)
                batch, labels = (to_device(tensor, device) for tensor in inputs.batches.batch(step - 1))
                labels = drop_labels(labels, model.cls_embedding.null(labels), config, step=step, ranks=ranks)
                sample = student.sample(shape, step, total=total, images=ranks.share(config.batch_size))
                torch.manual_seed(torch_seed(config.seed, RandomStream.DROPOUT, step, ranks.rank))

                # Forward and backward, optimizer step, EMA.
                losses = passes(batch, labels, sample)
                norm = clip_gradients(student.parameters(), config.optim.grad_clip)
                terms = {"loss": losses.total, "gradient norm": norm}
                skip = not_finite(terms) if skipped < config.skip_nonfinite else ""
                rate, decay = learning_rate(config.optim, step, total), 0.0
                if not skip:
                    set_learning_rate(rate, optimizer)
                    optimizer.step()
                    decay = teacher.update(model, step)
                optimizer.zero_grad(set_to_none=not config.cuda_graph)

                # Log.
                checkpoints.check()
                if skip:
                    skipped += 1
                    run.log({"step": step, "skipped": skip})
                    bar.note(f"step {step} skipped: {skip}")
                elif log or config.skip_nonfinite or device.type == "cpu":  # reading a loss waits for a GPU
                    require_finite(terms, step, checkpoints, skipping=config.skip_nonfinite)
                if log and not skip:
                    speed = batch.numel() * ranks.world * (step - clock_step) / (time.perf_counter() - clock)
                    numbers = losses.numbers()
                    rates = {"lr": rate, "grad_norm": norm.item(), "ema_decay": decay, "tokens_per_second": speed}
                    run.log(watch.log_step(step, {"step": step, **numbers, **rates}))
                    shown = [f"{name.removeprefix('loss_')} {value:.2f}" for name, value in numbers.items() if value]
                    bar.note(f"{' '.join(shown[1:])}, {speed / 1000:.1f}k tokens/s")
                    clock, clock_step = time.perf_counter(), step

                # Save if due; stop if asked, all ranks together.
                signum = all_reduce_max(signals[0] if signals else 0)
                due = step % config.checkpoint_every == 0 or step == total
                if due or signum:
                    if not skip:
                        require_finite(terms, step, checkpoints, skipping=config.skip_nonfinite)
                    measured: dict[str, float] = {}
                    # Not on interruption: measuring takes time, and best/ would depend on when the run was stopped.
                    if due:
                        gathered = dtype if parallel == "fsdp" else torch.float32
                        measured = inputs.validation.measure(teacher.model, len(batch) // config.accumulate, gathered)
                    if measured:
                        run.log({"step": step, **measured})
                        watch.track(step, measured)
                    exporter.save(step, measured)
                bar.advance(1)
                if signum and step < total:
                    checkpoints.wait()
                    raise run.interrupted(step, total, signum)
    return out


@dataclass(frozen=True)
class Learner:
    """Student and teacher, and how they compute a batch."""

    student: nn.Module
    """A SelfGuided, or what `parallelize` made of it."""
    teacher: EMATeacher[Transformer]
    micro_batches: int
    """Number of micro-batches that a rank splits its batch into."""
    dtype: torch.dtype
    """Type of matrix products."""


def forward_backward(learner: Learner, tokens: Tensor, labels: Tensor, sample: GuidanceSample) -> Losses:
    """Add the gradients of this rank's batch, tokens [B, M, T] and labels [B, ..]; returns its losses.

    The teacher reads the whole batch first. Every micro-batch then has all images as negatives, and the gradients are those of
    the large batch. Over several ranks the gradients and losses are averaged and the negatives are gathered.
    """
    student, teacher = unwrap(learner.student), learner.teacher
    device, size = tokens.device, len(tokens) // learner.micro_batches
    starts = range(0, len(tokens), size)
    key_mask, positions = (None if each is None else to_device(each, device) for each in sample)
    autocast = torch.autocast(device.type, dtype=learner.dtype, enabled=learner.dtype != torch.float32)
    with autocast:
        features = [student.teach(teacher, tokens[i : i + size], labels[i : i + size], positions) for i in starts]
    candidates, offset = None, get_rank() * len(tokens)
    middles = [each.middle for each in features if each.middle is not None]
    if student.config.negatives == "global" and middles:
        candidates = all_gather(torch.cat(middles))
    terms: list[Tensor] = []
    for start, targets in zip(starts, features, strict=True):
        rows, first = slice(start, start + size), 0
        if candidates is not None:
            targets, first = targets._replace(middle=candidates), offset + start
        micro_sample = GuidanceSample(None if key_mask is None else key_mask[rows], positions)
        with gradient_sync(learner.student, last=start == starts[-1]):
            with autocast:
                losses = learner.student(tokens[rows], labels[rows], micro_sample, targets, first)
            (losses.total / learner.micro_batches).backward()
        terms.append(torch.stack([term.detach() for term in losses]))
    return Losses(*all_reduce_mean(torch.stack(terms).sum(0) / learner.micro_batches))


def drop_labels(
    labels: Tensor, null: Tensor | int, config: TrainConfig, *, step: int, ranks: Ranks | None = None
) -> Tensor:
    """Replace a random share of this rank's labels [B, ..] by the null condition, which has their shape or is one class.

    The images are drawn from the batch of all ranks (classifier-free guidance, arXiv 2207.12598).
    """
    ranks = ranks or Ranks()
    generator = torch_generator(config.seed, RandomStream.LABEL_DROPOUT, step)
    dropped = torch.rand(len(labels) * ranks.world, generator=generator) < config.class_dropout
    dropped = to_device(dropped[ranks.share(len(dropped))], labels.device)
    return torch.where(dropped.view(-1, *[1] * (labels.dim() - 1)), null, labels)
