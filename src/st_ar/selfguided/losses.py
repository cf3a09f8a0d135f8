"""The losses of ST-AR as pure functions of tensors: no model, no state, no collective.

B: images, M: views of each, T: tokens, K: sampled positions, D: features. Similarities are cosines computed in float32
or better, whatever the inputs' type and whether or not autocast is on: in half precision their norms overflow.
"""

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
    """L_AR, Eq. 2: mean cross-entropy of logits [.., T, V] against tokens [.., T]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), tokens.flatten())


def linear_next_token_loss(x: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """L_AR from what the vocabulary projection reads: `next_token_loss(x @ weight.T, tokens)`, a part of the rows at a time.

    The logits and their gradients, by far a step's largest tensors (4 bytes of each of V entries a token, several times over),
    are never in memory together. Products are in autocast's type, the softmax in float32.

    Args:
        x: normalised features [.., T, D]; weight: [V, D]; tokens: int64 [.., T].
    """
    if not torch.is_grad_enabled():
        return next_token_loss(F.linear(x, weight), tokens)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss = _LinearCrossEntropy.apply(x.flatten(0, -2).to(dtype), weight, tokens.flatten())
    assert isinstance(loss, Tensor)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x [n, D] times weight [V, D], in x's type, against targets [n].

    Both gradients are known as soon as a part's logits are, and are kept instead of them (as Liger Kernel does, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        count, rows = len(x), max(512, 4 * x.shape[1])  # enough to pay for another sum of weight's gradients
        wide = torch.promote_types(x.dtype, torch.float32)
        loss, matrix = x.new_zeros((), dtype=wide), weight.to(x.dtype)
        of_x, sums = torch.empty_like(x), []
        with torch.autocast(x.device.type, enabled=False):
            for part, target, gradient in zip(x.split(rows), targets.split(rows), of_x.split(rows), strict=True):
                logits = F.linear(part, matrix).requires_grad_()
                with torch.enable_grad():
                    term = F.cross_entropy(logits.to(wide), target, reduction="sum") / count
                (of_logits,) = torch.autograd.grad(term, logits)
                loss += term.detach()
                torch.mm(of_logits, matrix, out=gradient)
                product = (of_logits.T @ part).to(wide)
                sums = [sums[0].add_(product)] if sums else [product]
        ctx.save_for_backward(of_x, sums[0].to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        (gradient,) = grad_outputs
        of_x, of_weight = ctx.saved_tensors
        return of_x * gradient.to(of_x.dtype), of_weight * gradient.to(of_weight.dtype), None


def mim_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_MIM, Eq. 4: mean cosine distance between features [.., T, D], over *all* positions, masked or not."""
    with torch.autocast(student.device.type, enabled=False):
        return (1 - (_unit(student) * _unit(teacher)).sum(-1)).mean()


def _contrast(z: Tensor, h: Tensor, temperature: float, offset: int) -> Tensor:
    """Cross-entropy of each anchor z [.., b, D] against the candidates h [.., B, D]: [.., b].

    Image `offset + n` of the candidates is the positive of anchor n, all others are its negatives.
    """
    assert 0 <= offset <= h.shape[-2] - z.shape[-2], "every anchor needs its image among the candidates"
    with torch.autocast(z.device.type, enabled=False):
        logits = _unit(z) @ _unit(h).transpose(-1, -2) / temperature
        return -logits.log_softmax(dim=-1).diagonal(offset=offset, dim1=-2, dim2=-1)


def _reduce(terms: Tensor, reduction: Reduction) -> Tensor:
    """Pairs x images [P, b] -> the mean over images of the pairs' mean, or of their sum as printed in Eq. 6 and 7."""
    if reduction not in ("mean", "sum"):
        raise UserError(f"the reduction must be mean or sum, not {reduction!r}")
    return terms.mean() if reduction == "mean" else terms.sum(0).mean()


def _off_diagonal(terms: Tensor) -> Tensor:
    """Terms [n, n, ..] of different first two indices: [n * (n - 1), ..]. By views alone: a mask makes the host wait for a GPU."""
    n = len(terms)
    return terms.flatten(0, 1)[1:].unflatten(0, (n - 1, n + 1))[:, :-1].flatten(0, 1)


def step_loss(
    z: Tensor, h: Tensor, *, temperature: float = 0.2, reduction: Reduction = "mean", offset: int = 0
) -> Tensor:
    """L_step, Eq. 6: within a view m, the student at step i should find its own image among the teacher's at step j != i.

    Args:
        z: projected student features [b, M, K, D].
        h: teacher features [B, M, K, D], B >= b, the candidates. Usually B = b; with micro-batches or several ranks
            these are the whole batch's.
        temperature: of the softmax over cosine similarities.
        reduction: over the M * K * (K - 1) pairs.
        offset: z's first image in h.
    """
    assert z.shape[2] > 1, "one step has no other to be compared with"
    z, h = z.permute(1, 2, 0, 3), h.permute(1, 2, 0, 3)  # (M, K, b or B, D)
    terms = _contrast(z[:, :, None], h[:, None, :], temperature, offset)  # (M, K, K, b): anchor step, candidate step
    return _reduce(_off_diagonal(terms.permute(1, 2, 0, 3)).flatten(0, 1), reduction)


def view_loss(
    z: Tensor, h: Tensor, *, temperature: float = 0.2, reduction: Reduction = "mean", offset: int = 0
) -> Tensor:
    """L_view, Eq. 7: at a step k, the student in view i should find its own image among the teacher's in view j != i.

    Arguments as for `step_loss`; the reduction is over the M * (M - 1) * K pairs.
    """
    assert z.shape[1] > 1, "one view has no other to be compared with"
    z, h = z.permute(1, 2, 0, 3), h.permute(1, 2, 0, 3)  # (M, K, b or B, D)
    terms = _contrast(z[:, None], h[None, :], temperature, offset)  # (M, M, K, b): anchor view, candidate view
    return _reduce(_off_diagonal(terms).flatten(0, 1), reduction)
