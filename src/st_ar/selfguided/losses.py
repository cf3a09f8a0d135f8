"""The losses of ST-AR as pure functions of tensors, without models, state or collectives.

B: images, M: views of each, T: tokens, K: sampled positions, D: features. Cosine similarities are computed in float32 or
better for every input dtype, also under autocast: in half precision the norms overflow.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from st_ar.errors import UserError

Reduction = Literal["mean", "sum"]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return L_AR (Eq. 2): the mean cross-entropy of logits [.., T, V] against tokens [.., T]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten())


def linear_next_token_loss(x: Tensor, weight: Tensor, tokens: Tensor, *, compiled: bool = False) -> Tensor:
    """Return `next_token_loss(x @ weight.T, tokens)` without ever holding all logits, by computing the rows in chunks.

    The logits and their gradients are by far a step's largest tensors. Matrix products use autocast's dtype, the softmax float32.

    Args:
        x: normalised features [.., T, D], the input of the vocabulary projection.
        weight: weight of the vocabulary projection [V, D].
        tokens: int64 [.., T].
        compiled: compute loss and gradient of the logits in one compiled kernel, which reads them less often.
    """
    if not torch.is_grad_enabled():
        return next_token_loss(F.linear(x, weight), tokens)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss = _LinearCrossEntropy.apply(x.flatten(0, -2).to(dtype), weight, tokens.flatten(), compiled)
    assert isinstance(loss, Tensor)
    return loss


def _cross_entropy_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return `scale` times the sum of the cross-entropies of logits [n, V], and its gradient, in the logits' dtype."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    loss = -scale * log_probs.gather(1, targets[:, None]).sum()
    return loss, (scale * (log_probs.exp() - is_target.to(log_probs.dtype))).to(logits.dtype)


@cache
def _compiled_cross_entropy() -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return torch.compile(_cross_entropy_and_gradient, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x [n, D] times weight [V, D], in x's dtype, against targets [n].

    The forward pass computes both gradients chunk by chunk and keeps them instead of the logits (Liger Kernel, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, compiled: bool) -> Tensor:
        # Each chunk adds to the V x D gradient of weight. With small chunks these sums would take most of the time.
        rows = max(512, 4 * x.shape[1])
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, matrix = x.new_zeros((), dtype=wide), weight.to(x.dtype)
        x_grad, weight_grad = torch.empty_like(x), None
        with torch.autocast(x.device.type, enabled=False):
            for chunk, target, chunk_grad in zip(x.split(rows), targets.split(rows), x_grad.split(rows), strict=True):
                logits = F.linear(chunk, matrix)
                if compiled:
                    term, logits_grad = _compiled_cross_entropy()(logits, target, 1 / len(x))
                else:
                    with torch.enable_grad():
                        logits.requires_grad_()
                        term = F.cross_entropy(logits.to(wide), target, reduction="sum") / len(x)
                    (logits_grad,) = torch.autograd.grad(term, logits)
                loss += term.detach()
                torch.mm(logits_grad, matrix, out=chunk_grad)
                product = (logits_grad.T @ chunk).to(wide)
                weight_grad = product if weight_grad is None else weight_grad.add_(product)
        assert weight_grad is not None
        ctx.save_for_backward(x_grad, weight_grad.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = grad_outputs
        x_grad, weight_grad = ctx.saved_tensors
        return x_grad * gradient.to(x_grad.dtype), weight_grad * gradient.to(weight_grad.dtype), None, None


def mim_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return L_MIM (Eq. 4): the mean cosine distance between features [.., T, D] over *all* positions, masked or not."""
    with torch.autocast(student.device.type, enabled=False):
        return (1 - (_unit(student) * _unit(teacher)).sum(-1)).mean()


def _contrast(z: Tensor, h: Tensor, temperature: float, offset: int) -> Tensor:
    """Return the cross-entropy of each anchor z [.., b, D] against the candidates h [.., B, D]: [.., b].

    Candidate `offset + n` is the positive of anchor n. All others are its negatives.
    """
    assert 0 <= offset <= h.shape[-2] - z.shape[-2], "every anchor needs its image among the candidates"
    with torch.autocast(z.device.type, enabled=False):
        logits = _unit(z) @ _unit(h).transpose(-1, -2) / temperature
        return -logits.log_softmax(dim=-1).diagonal(offset=offset, dim1=-2, dim2=-1)


def _reduce(terms: Tensor, reduction: Reduction) -> Tensor:
    """Average terms [pairs, b] over the images, and average or (as Eq. 6 and 7 are printed) sum them over the pairs."""
    if reduction not in ("mean", "sum"):
        raise UserError(f"the reduction must be mean or sum, not {reduction!r}")
    return terms.mean() if reduction == "mean" else terms.sum(0).mean()


def _off_diagonal(terms: Tensor) -> Tensor:
    """Return the terms [n, n, ..] with different first two indices, [n * (n - 1), ..]."""
    n = len(terms)  # views only: a boolean mask would make the host wait for a GPU
    return terms.flatten(0, 1)[1:].unflatten(0, (n - 1, n + 1))[:, :-1].flatten(0, 1)


def step_loss(
    z: Tensor, h: Tensor, *, temperature: float = 0.2, reduction: Reduction = "mean", offset: int = 0
) -> Tensor:
    """Return L_step (Eq. 6): in each view, the student's features at step i should match the teacher's of the same image at step j != i.

    Args:
        z: projected student features [b, M, K, D].
        h: teacher features [B, M, K, D], B >= b, the candidates. With micro-batches or several ranks they are the whole batch's.
        temperature: temperature of the softmax over cosine similarities.
        reduction: reduction over the M * K * (K - 1) pairs.
        offset: index of z's first image in h.
    """
    assert z.shape[2] > 1, "the inter-step loss needs two positions"
    z, h = z.permute(1, 2, 0, 3), h.permute(1, 2, 0, 3)  # (M, K, b or B, D)
    terms = _contrast(z[:, :, None], h[:, None, :], temperature, offset)  # (M, K, K, b): anchor step, candidate step
    return _reduce(_off_diagonal(terms.permute(1, 2, 0, 3)).flatten(0, 1), reduction)


def view_loss(
    z: Tensor, h: Tensor, *, temperature: float = 0.2, reduction: Reduction = "mean", offset: int = 0
) -> Tensor:
    """Return L_view (Eq. 7): at each step, the student's features in view i should match the teacher's of the same image in view j != i.

    The arguments are those of `step_loss`; the reduction is over the M * (M - 1) * K pairs.
    """
    assert z.shape[1] > 1, "the inter-view loss needs two views"
    z, h = z.permute(1, 2, 0, 3), h.permute(1, 2, 0, 3)  # (M, K, b or B, D)
    terms = _contrast(z[:, None], h[None, :], temperature, offset)  # (M, M, K, b): anchor view, candidate view
    return _reduce(_off_diagonal(terms).flatten(0, 1), reduction)
