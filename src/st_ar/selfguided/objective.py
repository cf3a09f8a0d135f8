"""Eq. 8 for LlamaGen's transformer: the student's masked pass, the teacher's unmasked pass, and the total loss."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from st_ar.config import SelfGuidedConfig
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import EMATeacher, Features, GuidanceSample, SelfGuidance, guidance_losses
from st_ar.selfguided.losses import linear_next_token_loss


class Losses(NamedTuple):
    """The terms of Eq. 8, scalars. A term without weight is 0 and not computed."""

    total: Tensor
    ar: Tensor
    mim: Tensor
    step: Tensor
    view: Tensor

    def numbers(self) -> dict[str, float]:
        """Return the terms under the names that log.jsonl has for them. The host waits for a GPU."""
        names = ("loss", "loss_ar", "loss_mim", "loss_step", "loss_view")
        return dict(zip(names, (term.item() for term in self), strict=True))


class SelfGuided(SelfGuidance):
    """The student: the transformer with its self-guidance. With alpha = beta = r = 0 training is plain."""

    def __init__(self, model: Transformer, config: SelfGuidedConfig, *, seed: int = 0) -> None:
        super().__init__(model.config.dim, config, seed=seed)
        projector = self.projector
        del self.projector
        self.model, self.projector = (
            model,
            projector,
        )  # the order of parameters, in which their gradients' norms are summed
        self.middle, self.last = config.layer(model.config.n_layers), model.config.n_layers
        self.compiled_loss = False
        """Whether the next-token loss is compiled."""

    def teach(
        self, teacher: EMATeacher[Transformer], tokens: Tensor, labels: Tensor, positions: Tensor | None
    ) -> Features:
        """Compute the teacher's features of tokens [B, M, T] and labels [B, ..], with nothing masked and without gradients."""
        config, network = self.config, teacher.model
        if not config.needs_teacher or positions is None:
            return Features(None, None)
        layers = {layer for layer, on in ((self.last, config.alpha > 0), (self.middle, config.contrast)) if on}
        with torch.no_grad():
            states = network.features(*_sequences(tokens, labels), layers=layers)
        views = tokens.shape[:2]
        last = states[self.last].unflatten(0, views) if config.alpha > 0 else None
        if last is not None and config.mim_features == "after_norm":
            last = network.norm(last)
        middle = states[self.middle].unflatten(0, views)[:, :, positions] if config.contrast else None
        return Features(last, middle)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- runs the network too
        self, tokens: Tensor, labels: Tensor, sample: GuidanceSample, teacher: Features, offset: int = 0
    ) -> Losses:
        """Run the student's masked pass and compute Eq. 8.

        Args:
            tokens: int64 [b, M, T].
            labels: the model's labels, [b] or [b, N, width], after label dropout.
            sample: the key mask and the positions of these images.
            teacher: the teacher's features of these images; `middle` may be of the whole batch.
            offset: index of the first image in `teacher.middle`.
        """
        key_mask = None if sample.key_mask is None else sample.key_mask.flatten(0, 1)
        inputs, repeated = _sequences(tokens, labels)
        hidden = self.model.features(inputs, repeated, key_mask=key_mask, layers={self.middle, self.last})
        last = self.model.norm(hidden[self.last])
        ar = self.model.output(
            last, partial(linear_next_token_loss, tokens=tokens.flatten(0, 1), compiled=self.compiled_loss)
        )
        mim_input = last if self.config.mim_features == "after_norm" else hidden[self.last]
        views = tokens.shape[:2]
        student = Features(mim_input.unflatten(0, views), hidden[self.middle].unflatten(0, views))
        guidance = guidance_losses(self.config, self.projector, student, teacher, sample.positions, offset=offset)
        return Losses(ar + guidance.total, ar, guidance.mim, guidance.step, guidance.view)


def _sequences(tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten views into a batch of model inputs: tokens [B, M, T], labels [B, ..] -> [B * M, T - 1], [B * M, ..]."""
    return tokens.flatten(0, 1)[:, :-1], labels.repeat_interleave(tokens.shape[1], dim=0)
