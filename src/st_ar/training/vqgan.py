"""Training of a VQ-GAN tokenizer: network and codebook, discriminator, losses, and the loop.

After LlamaGen (arXiv 2406.06525) and VQGAN (arXiv 2012.09841). B: images, d: width of a code, h, w: codes per side,
V: codebook entries. Images are RGB in [-1, 1], channels first.
"""

import copy
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import AdversaryConfig, VQConfig, VQTrainConfig
from st_ar.data.loading import CropLoader
from st_ar.data.source import ImageSource
from st_ar.distributed import (
    all_gather,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    broadcast_from_rank0,
    data_parallel,
    stop_on_signal,
)
from st_ar.errors import UserError
from st_ar.evaluation.reconstruction import evaluation_images, reconstruct, save_picture
from st_ar.files import read_json, write_json_lines
from st_ar.hardware import choose_dtype, to_device
from st_ar.progress import progress
from st_ar.randomness import RandomStream, torch_generator, torch_seed
from st_ar.selfguided.guidance import ema_decay, ema_update
from st_ar.tokenizer import load_tokenizer, to_pixels
from st_ar.tokenizer.vq import CONFIG, VQDecoder, VQEncoder, VQTokenizer, nearest_codes
from st_ar.training.checkpoint import Checkpoints, State, export_folders, require_finite
from st_ar.training.optim import adamw, clip_gradients, learning_rate, set_learning_rate
from st_ar.training.run import Run, training_session


class Reconstruction(NamedTuple):
    """The output of the network."""

    images: Tensor
    """[B, 3, H, W], float32."""
    codebook_loss: Tensor
    """Mean squared distance between codes and features. Its gradient moves the codes."""
    commitment_loss: Tensor
    """The same distance. Its gradient moves the features."""
    codes: Tensor
    """int64 [B, h, w]."""
    features: Tensor
    """Unit features before quantisation [B h w, d], without gradient."""


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. Features and codes have length 1, so that the nearest code has the largest cosine."""

    idle: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.reader = VQEncoder(config)
        self.painter = VQDecoder(config)
        self.codebook = nn.Parameter(F.normalize(torch.randn(config.codebook_size, config.codebook_dim), dim=-1))
        # Steps since a code was last chosen; -1 - steps since it was revived, until it is chosen for the first time
        self.register_buffer("idle", torch.full((config.codebook_size,), -1.0))

    def forward(self, images: Tensor) -> Reconstruction:
        z = self.reader(images)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2)
        codebook = F.normalize(self.codebook.float(), dim=-1)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            codes = nearest_codes(flat, codebook).unflatten(0, (len(z), *z.shape[2:]))
        q = F.embedding(codes, codebook).permute(0, 3, 1, 2)
        straight_through = z + (q - z).detach()
        return Reconstruction(
            self.painter(straight_through).float(),
            (q - z.detach()).square().mean(),
            (q.detach() - z).square().mean(),
            codes,
            flat,
        )

    def load(self, tokenizer: VQTokenizer) -> None:
        """Take a tokenizer's weights.

        Raises:
            UserError: it has another architecture.
        """
        if tokenizer.config != self.config:
            raise UserError(
                f"--init has the architecture {tokenizer.config}, not {self.config}: give a tokenizer of the preset's"
            )
        for half in (self.reader, self.painter):
            half.load_state_dict({name: tokenizer.tensors[name] for name in half.state_dict()})
        with torch.no_grad():
            self.codebook.copy_(F.normalize(tokenizer.tensors["quantize.embedding.weight"].float(), dim=-1))

    @property
    def last_layer(self) -> Tensor:
        """The last layer's weight, where the adaptive weight compares the gradients of two losses."""
        return self.painter.decoder.conv_out.weight

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by LlamaGen's names."""
        weights = {**self.reader.state_dict(), **self.painter.state_dict(), "quantize.embedding.weight": self.codebook}
        return {name: tensor.detach().cpu() for name, tensor in weights.items()}


class Discriminator(nn.Module):
    """PatchGAN (arXiv 1611.07004) with group norms: images [B, 3, H, W] -> logits of patches [B, 1, h, w], positive for real ones."""

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (a, b) in enumerate(pairwise(widths), start=1):
            stride = 2 if index < config.layers else 1
            layers += [nn.Conv2d(a, b, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(min(32, b), b)]
            layers += [nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss of its logits: half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake))."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


@torch.no_grad()
def revive(
    codebook: nn.Parameter,
    ema_codebook: nn.Parameter,
    dead: Tensor,
    features: Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Replace dead codes, bool [V], by random unit features [N, d] in the codebook [V, d] and its EMA; returns their number.

    Their moments are reset. The generator is the CPU's, so that all ranks draw the same.
    """
    rows = dead.nonzero().flatten()
    drawn = features[torch.randint(len(features), (len(rows),), generator=generator).to(features.device)]
    codebook[rows] = drawn
    ema_codebook[rows] = drawn
    for moment in optimizer.state.get(codebook, {}).values():
        if moment.shape == codebook.shape:
            moment[rows] = 0
    return len(rows)


class VQLearner:
    """The networks, their EMA and the optimizers, and a training step."""

    def __init__(self, config: VQTrainConfig, device: torch.device, init: VQTokenizer | None = None) -> None:
        torch.manual_seed(torch_seed(config.seed, RandomStream.INITIALISATION))
        self.initialised = init is not None
        self.config, self.device = config, device
        self.dtype = choose_dtype(config.dtype, device)
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.network, self.adversary = VQGAN(config.model).to(device), Discriminator(config.adversary).to(device)
        if init is not None:
            self.network.load(init)
        for parameter in [*self.network.parameters(), *self.adversary.parameters()]:
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = adamw(self.network, config.optim)
        self.adversary_optimizer = adamw(self.adversary, config.optim)
        self.perceptual: nn.Module | None = None
        if config.perceptual_weight:
            from st_ar.evaluation.efficientnet import PerceptualLoss, load_efficientnet

            self.perceptual = PerceptualLoss(load_efficientnet(device))

    def state(self, step: int) -> State:
        """Return the state to save after step `step`, without the discriminator before its first step."""
        networks = {"network": self.network, "adversary": self.adversary}
        optimizers = [self.optimizer, self.adversary_optimizer]
        if step <= self.config.adversary.start:
            del networks["adversary"], optimizers[1:]
        return State({**networks, "ema": self.ema}, nn.ModuleDict(networks), optimizers)

    def share(self) -> None:
        """Average gradients over the ranks from the next step on."""
        self.shared_network, self.shared_adversary = data_parallel(self.network), data_parallel(self.adversary)

    def step(self, images: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """Run optimizer step `step`, counted from 1, on this rank's images [B, 3, S, S]; returns the numbers to log."""
        config = self.config
        set_learning_rate(rate, self.optimizer, self.adversary_optimizer)
        adversarial = step > config.adversary.start
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with autocast:
            output = self.shared_network(images)
            losses = {"l1": F.l1_loss(output.images, images), "l2": F.mse_loss(output.images, images)}
            if self.perceptual is not None:
                losses["perceptual"] = self.perceptual(output.images, images)
            if adversarial:
                self.adversary.requires_grad_(False)
                losses["adversarial"] = -self.adversary(output.images).float().mean()
                self.adversary.requires_grad_(True)
        losses |= {"codebook": output.codebook_loss, "commitment": output.commitment_loss}
        weight = backward(losses, output.images, self.network.last_layer, config)
        norm = _update(self.network, self.optimizer, config.optim.grad_clip)
        if adversarial:
            with autocast:
                logits = self.shared_adversary(torch.cat([images, output.images.detach()])).float()
            losses["discriminator"] = hinge_loss(*logits.chunk(2))
            losses["discriminator"].backward()
            _update(self.adversary, self.adversary_optimizer, config.optim.grad_clip)
        counts = self._update_ema(output.codes, step)
        in_use = self._chosen_lately()
        self._revive(output.features, step)
        shares = counts / counts.sum()
        return {
            **{f"loss_{name}": term.detach() for name, term in losses.items()},
            "adversarial_weight": weight,
            "grad_norm": norm,
            "perplexity": torch.special.entr(shares).sum().exp(),
            "codes_in_use": in_use.float().mean(),
        }

    @torch.no_grad()
    def _update_ema(self, codes: Tensor, step: int) -> Tensor:
        """Update the EMA and the idle steps of the codes; returns how often each code was used [V]."""
        ema_update(self.ema, self.network, ema_decay(self.config.ema_decay, step))
        used, counts = codes.flatten(), codes.new_zeros(self.config.model.codebook_size)
        counts.scatter_add_(0, used, torch.ones_like(used))  # bincount would make the host wait for a GPU
        counts = all_reduce_sum(counts)
        idle = self.network.idle
        idle.add_(torch.where(idle < 0, -1.0, 1.0)).masked_fill_(counts > 0, 0)
        return counts

    def _chosen_lately(self) -> Tensor:
        """Which codes were chosen in the last `revive_after` steps; bool [V]. Revived codes must be chosen to count."""
        idle = self.network.idle
        return (idle >= 0) & (idle < (self.config.revive_after or 100))

    def _revive(self, features: Tensor, step: int) -> None:
        """Initialise the codebook with features of the first batch; later, replace codes that have long been idle."""
        every, first = self.config.revive_after, step == 1 and not self.initialised
        if not every or (step % every and not first):
            return
        idle = self.network.idle
        dead = torch.where(idle < 0, -1 - idle, idle) >= (0 if first else every)
        generator = torch_generator(self.config.seed, RandomStream.CODEBOOK, step)
        revive(self.network.codebook, self.ema.codebook, dead, all_gather(features), self.optimizer, generator)
        self.network.idle.masked_fill_(dead, -1)

    def tokenizer(self) -> VQTokenizer:
        """Return a tokenizer with a copy of the EMA weights."""
        return VQTokenizer(self.config.model, {name: tensor.clone() for name, tensor in self.ema.tensors().items()})


def backward(losses: dict[str, Tensor], images: Tensor, last_layer: Tensor, config: VQTrainConfig) -> Tensor:
    """Add the gradients of the weighted losses of reconstructed images; returns the weight of the adversarial loss.

    With an adaptive weight (VQGAN, arXiv 2012.09841, Eq. 7) it is multiplied by the ratio of the two gradients' norms at the
    last layer. The gradients with respect to the images are computed once, and one backward pass goes through the network.
    """
    weights = {"l1": config.l1_weight, "l2": config.l2_weight, "perceptual": config.perceptual_weight}
    reconstruction = torch.stack([weights[name] * loss for name, loss in losses.items() if name in weights]).sum()
    (gradient,) = torch.autograd.grad(reconstruction, images)
    weight = torch.zeros((), device=images.device)
    if "adversarial" in losses:
        (adversarial,) = torch.autograd.grad(losses["adversarial"], images)
        weight.fill_(config.adversary.weight)
        if config.adversary.adaptive:
            norm, adversarial_norm = (
                all_reduce_mean(torch.autograd.grad(images, last_layer, each, retain_graph=True)[0]).norm()
                for each in (gradient, adversarial)
            )
            weight = weight * (norm / (adversarial_norm + 1e-4)).clamp(max=1e4)
        gradient = gradient + weight * adversarial
    codes = config.codebook_weight * losses["codebook"] + config.commitment * losses["commitment"]
    torch.autograd.backward([images, codes], [gradient, torch.ones_like(codes)])
    return weight


def _update(module: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Clip the gradients, step, and reset them; returns their norm."""
    norm = clip_gradients(module.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def _open_init(path: Path) -> VQTokenizer:
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, VQTokenizer):
        raise UserError(f"--init {path} is a {tokenizer.kind} tokenizer: give a VQ tokenizer")
    return tokenizer


def train_tokenizer(
    config: VQTrainConfig,
    images: ImageSource,
    out: Path,
    *,
    test_images: ImageSource | None = None,
    init: Path | None = None,
    resume: bool = False,
    preset: str = "",
    workers: int | None = None,
) -> Path:
    """Train a VQ-GAN on the images of a source. `out` is the run's folder and, after the first checkpoint, the tokenizer's.

    Under torchrun the ranks share each batch. A run that is stopped at any time and resumed ends with the same weights, bit for
    bit on a CPU.

    Args:
        test_images: source of the centre crops for PSNR, SSIM and codebook usage; the training images if None.
        workers: processes that decode images; 0 decodes in this one. By default one per core, at most 8, or none where small
            images fit in memory and are decoded once.

    Raises:
        UserError: `out` holds a run already, a resume changes settings, images cannot be read, the disk is full, or a loss is
            not finite.
        Interrupted: SIGINT or SIGTERM was received; a checkpoint of the last finished step was written.
    """
    with training_session(config) as (ranks, device), Run(out, config, ranks, preset=preset, resume=resume) as run:
        # Open everything, build the networks, and restore them.
        if config.batch_size % ranks.world:
            raise UserError(
                f"--batch-size {config.batch_size} is not a multiple of the {ranks.world} ranks: give a multiple of {ranks.world}"
            )
        crops = CropLoader(
            images,
            size=config.size,
            crop_range=config.crop_range,
            mirror=config.mirror,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=workers,
            ranks=ranks,
        )
        total = config.total_steps(crops.images)
        start_from = None if init is None else _open_init(init)
        learner = VQLearner(config, device, start_from)
        evaluation = Evaluation(test_images or images, config, out) if run.writes else None
        data: dict[str, Any] = {"images": {"source": images.name, "images": crops.images, "content": images.content}}
        if start_from is not None:
            data["init"] = {"fingerprint": start_from.fingerprint}
        run.open(lambda: data, learner.dtype, images=crops.images, exported=_exported_step(out))
        checkpoints = Checkpoints(out / "checkpoints", keep=config.keep, keep_every=config.keep_every)
        start = broadcast_from_rank0(checkpoints.newest)
        checkpoints.restore(start, learner.state(start))
        run.start(start)
        if run.writes:
            for folder in export_folders(out, ".", start, config):
                if _exported_step(folder) != start:
                    learner.tokenizer().write(folder, step=start)
        learner.share()

        clock, clock_step, quality = time.perf_counter(), start, ""
        with (
            stop_on_signal() as signals,
            crops,
            checkpoints,
            progress(out.name, total, unit="steps", done=start, shown=run.writes) as bar,
        ):
            crops.prepare(start)
            for step in range(start + 1, total + 1):
                batch = to_pixels(to_device(crops.batch(step - 1), device)).contiguous(memory_format=learner.layout)
                rate = learning_rate(config.optim, step, total)
                terms = learner.step(batch, step, rate)

                # Log.
                checkpoints.check()
                last, log = step == total, step % config.log_every == 0 or step == total
                if log or device.type == "cpu":  # reading a loss waits for a GPU
                    require_finite(terms, step, checkpoints)
                if log:
                    speed = config.batch_size * (step - clock_step) / (time.perf_counter() - clock)
                    entry = {name: all_reduce_mean(value.float()).item() for name, value in terms.items()}
                    run.log({"step": step, **entry, "lr": rate, "images_per_second": speed})
                    bar.note(f"{quality}L1 {entry['loss_l1']:.3f}, {speed:,.0f} images/s")
                    clock, clock_step = time.perf_counter(), step
                if evaluation and (step % config.evaluate_every == 0 or last):
                    entry, quality = evaluation.measure(learner.tokenizer(), step, device)
                    run.log(entry)

                # Save if due; stop if asked, all ranks together.
                signum = all_reduce_max(signals[0] if signals else 0)
                if run.writes and (step % config.checkpoint_every == 0 or last or signum):
                    require_finite(terms, step, checkpoints)
                    folders = export_folders(out, ".", step, config)
                    then = partial(_export, learner.tokenizer(), folders, step)
                    checkpoints.save(step, learner.state(step), then=then)
                bar.advance(1)
                if signum and not last:
                    checkpoints.wait()
                    raise run.interrupted(step, total, signum)
        if run.writes and crops.broken:
            lines = ({"index": index, "reason": reason} for index, reason in sorted(crops.broken.items()))
            write_json_lines(out / "skipped.jsonl", lines)
    return out


def _export(tokenizer: VQTokenizer, folders: Sequence[Path], step: int, _: object = None) -> None:
    for folder in folders:
        tokenizer.write(folder, step=step)


class Evaluation:
    """Reconstruction of test images: PSNR, SSIM, codebook usage, and a picture."""

    def __init__(self, source: ImageSource, config: VQTrainConfig, out: Path) -> None:
        self.source, self.out = source, out
        self.examples = evaluation_images(source, config.size, config.evaluate_images)

    def measure(self, tokenizer: VQTokenizer, step: int, device: torch.device) -> tuple[dict[str, Any], str]:
        """Return the entry for log.jsonl, and a note for the progress bar."""
        images, quality = reconstruct(tokenizer.to(device, torch.float32), self.examples)
        save_picture(self.out / "reconstructions" / f"step_{step:08d}.png", self.examples, images)
        entry = {"step": step, "evaluated_on": self.source.name, "images": len(self.examples), **quality._asdict()}
        return entry, f"PSNR {quality.psnr:.2f} dB, {quality.usage:.0%} of codes used, "


def _exported_step(folder: Path) -> int | None:
    """Return the step of the tokenizer in a folder, None without a complete one."""
    return read_json(folder / CONFIG, "a tokenizer").get("step") if (folder / CONFIG).exists() else None
