"""The paper's equations (arXiv 2509.15185) as plain loops over float64 numbers, to check the fast versions against.

Written from the equations alone: nothing here may import st_ar.
B: images, M: views, T: tokens, K: positions, D: features.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Vector = Sequence[float]


def dot(a: Vector, b: Vector) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def cosine(a: Vector, b: Vector) -> float:
    return dot(a, b) / (math.sqrt(dot(a, a)) * math.sqrt(dot(b, b)))


def softmax(scores: Vector) -> list[float]:
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return [power / sum(powers) for power in powers]


def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Eq. 3, causal: [B, H, T, d] three times -> [B, H, T, d]. key_mask: True = masked, [B, T], or by query [B, T, T]."""
    batch, heads, length, width = q.shape
    out = torch.zeros(batch, heads, length, width, dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            queries, keys, values = (x[b, head].double().tolist() for x in (q, k, v))
            for t in range(length):
                seen = []
                for s in range(t + 1):
                    if key_mask is None:
                        masked = False
                    elif key_mask.dim() == 2:
                        masked = bool(key_mask[b, s])
                    else:
                        masked = bool(key_mask[b, t, s])
                    if not masked:
                        seen.append(s)
                weights = softmax([dot(queries[t], keys[s]) / math.sqrt(width) for s in seen])
                for weight, s in zip(weights, seen, strict=True):
                    for d in range(width):
                        out[b, head, t, d] += weight * values[s][d]
    return out


def next_token_loss(logits: Tensor, tokens: Tensor) -> float:
    """Eq. 2: logits [N, T, V], tokens [N, T]; the mean over sequences of -(1/T) sum_t log p(x_t | ..)."""
    sequences = []
    for scores, targets in zip(logits.double().tolist(), tokens.tolist(), strict=True):
        nll = 0.0
        for row, target in zip(scores, targets, strict=True):
            nll -= math.log(softmax(row)[target])
        sequences.append(nll / len(targets))
    return sum(sequences) / len(sequences)


def mim_loss(student: Tensor, teacher: Tensor) -> float:
    """Eq. 4 with cosine distance: [N, T, D] twice; the mean over sequences of (1/T) sum_t Dist(h_t, h'_t)."""
    sequences = []
    for ours, theirs in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        distance = 0.0
        for a, b in zip(ours, theirs, strict=True):
            distance += 1 - cosine(a, b)
        sequences.append(distance / len(ours))
    return sum(sequences) / len(sequences)


def info_nce(anchor: Vector, candidates: Sequence[Vector], positive: int, temperature: float) -> float:
    """-log of the ratio in Eq. 6 and 7: the positive's exponential over the sum of all candidates'."""
    powers = [math.exp(cosine(anchor, candidate) / temperature) for candidate in candidates]
    return -math.log(powers[positive] / sum(powers))


def step_loss(z: Tensor, h: Tensor, temperature: float, reduction: str, offset: int = 0) -> float:
    """Eq. 6: z [b, M, K, D], h [B, M, K, D]; image n of z is image offset + n of h."""
    anchors, targets = z.double().tolist(), h.double().tolist()
    views, positions = len(anchors[0]), len(anchors[0][0])
    images = []
    for b in range(len(anchors)):
        terms = []
        for m in range(views):
            for i in range(positions):
                for j in range(positions):
                    if i != j:
                        candidates = [image[m][j] for image in targets]
                        terms.append(info_nce(anchors[b][m][i], candidates, offset + b, temperature))
        images.append(sum(terms) / len(terms) if reduction == "mean" else sum(terms))
    return sum(images) / len(images)


def view_loss(z: Tensor, h: Tensor, temperature: float, reduction: str, offset: int = 0) -> float:
    """Eq. 7: arguments as for step_loss."""
    anchors, targets = z.double().tolist(), h.double().tolist()
    views, positions = len(anchors[0]), len(anchors[0][0])
    images = []
    for b in range(len(anchors)):
        terms = []
        for k in range(positions):
            for i in range(views):
                for j in range(views):
                    if i != j:
                        candidates = [image[j][k] for image in targets]
                        terms.append(info_nce(anchors[b][i][k], candidates, offset + b, temperature))
        images.append(sum(terms) / len(terms) if reduction == "mean" else sum(terms))
    return sum(images) / len(images)


def total(ar: float, mim: float, step: float, view: float, alpha: float, beta: float) -> float:
    """Eq. 8."""
    return ar + alpha * mim + beta * (step + view) / 2
