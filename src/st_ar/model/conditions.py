"""What images are drawn for: classes or captions, as the positions that the transformer reads before an image.

Both kinds offer the same: a check, their embedding, the null condition of classifier-free guidance, and the attention
mask that their padding needs. B: sequences, N: positions of the condition, D: the transformer's features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.errors import UserError


class ClassEmbedding(nn.Module):
    """A class as one position: labels are int64 [B], and the last of num_classes + 1 embeddings is the null class."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.null_class = config.null_class
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def check(self, labels: Tensor) -> None:
        """Refuse what is no class; waits for the device."""
        if labels.dim() != 1 or len(labels) == 0 or labels.dtype != torch.int64:
            raise UserError(f"labels must be int64 [B] with B of 1 or more, not {labels.dtype} {list(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.null_class:
            raise UserError(
                f"label {low if low < 0 else high} is out of range: the model knows classes 0 to {self.null_class - 1}, "
                f"and {self.null_class} for none"
            )

    def null(self, labels: Tensor) -> Tensor:
        """The null class [B] in the labels' place."""
        return torch.full_like(labels, self.null_class)

    def null_condition(self, count: int) -> Tensor:
        """The null class [count]."""
        return torch.full((count,), self.null_class, device=self.embedding_table.weight.device)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:  # noqa: ARG002
        """The mask over all positions: as it is, since none is padding."""
        return key_mask

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)[:, None]  # (B, 1, D)


class Projection(nn.Module):
    """Captions' features to the transformer's width: fc2(gelu(fc1 x)), without biases."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TextEmbedding(nn.Module):
    """A caption as N positions: labels are its features, floating [B, N, width], as any text encoder gives them.

    A caption of fewer tokens stands at the end, and a row of zeros before it is padding: no other position attends to it.
    The null condition is `uncond_embedding` [N, width], drawn once and not trained, in the caption's own rows.
    """

    uncond_embedding: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cap_proj = Projection(config.text_dim, config.dim)
        drawn = torch.randn(config.text_tokens, config.text_dim) / config.text_dim**0.5
        self.register_buffer("uncond_embedding", drawn)

    def check(self, labels: Tensor) -> None:
        """Refuse what are no captions' features of this model; does not wait for the device."""
        rows, width = self.uncond_embedding.shape
        if labels.shape[1:] != (rows, width) or len(labels) == 0 or not labels.is_floating_point():
            raise UserError(
                f"a text model's labels must be captions' features, floating [B, {rows}, {width}] with B of 1 or more, "
                f"not {labels.dtype} {list(labels.shape)}; TextStore.features gives them"
            )

    def null(self, labels: Tensor) -> Tensor:
        """The null condition [B, N, width] in the labels' place; padding stays padding, as LlamaGen keeps a caption's mask."""
        return torch.where(labels.any(dim=-1, keepdim=True), self.uncond_embedding.to(labels), 0.0)

    def null_condition(self, count: int) -> Tensor:
        """The null condition [count, N, width], with every row in use."""
        return self.uncond_embedding.expand(count, -1, -1)

    def key_mask(self, labels: Tensor, key_mask: Tensor | None, length: int) -> Tensor | None:
        """The mask over all positions, one for each query: bool [B, length, length], True where it may not look.

        `key_mask` [B, t] or [B, t, t] counts the condition as its position 0, which here stands for all N. Padding is
        hidden from all but itself, so that no softmax is empty.
        """
        padding = F.pad(~labels.any(dim=-1), (0, length - labels.shape[1]), value=False)  # (B, length)
        own = torch.eye(length, dtype=torch.bool, device=labels.device)
        masked = padding[:, None, :] & ~own
        if key_mask is None:
            return masked
        places = (torch.arange(length, device=labels.device) - labels.shape[1] + 1).clamp_min(0)
        assert key_mask.shape[-1] == length - labels.shape[1] + 1, "a key mask has one column for the condition"
        key_mask = key_mask[..., places]
        return masked | (key_mask[:, places] if key_mask.dim() == 3 else key_mask[:, None, :])

    def forward(self, labels: Tensor) -> Tensor:
        self.check(labels)
        return self.cap_proj(labels.to(self.uncond_embedding.dtype))  # (B, N, D)
