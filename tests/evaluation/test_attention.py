"""Attention maps are what the model computes with, and their statistics are what a naive loop counts."""

import cmath
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from st_ar.config import SelfGuidedConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation import attention
from st_ar.evaluation.attention import (
    STATISTICS,
    AttentionStatistics,
    ImageMasks,
    attention_maps,
    attention_statistics,
    attention_steps,
    average_statistics,
    center_crops,
    head_statistics,
)
from st_ar.model.transformer import attention_bias
from st_ar.model.weights import load_model
from st_ar.selfguided.guidance import sample_guidance
from tests.small_line import SmallLine, make_line
from tests.toys import TINY, random_model, random_sequences


def no_mask() -> None:
    return None


def mask_of_keys() -> Tensor:
    """One mask for all queries [B, T]; the class is never masked."""
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[:, 0] = False
    return mask


def mask_of_pairs() -> Tensor:
    """One mask for each query [B, T, T]."""
    mask = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = False
    return mask


MASKS = pytest.mark.parametrize("make_mask", [no_mask, mask_of_keys, mask_of_pairs])


@torch.no_grad()
@MASKS
def test_each_layers_output_is_reproduced_from_its_map(make_mask: Any) -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 2)
    read, mask = tokens[:, :-1], make_mask()
    states = model.features(read, labels, layers=[1, 2, 3, 4], key_mask=mask)
    states[0] = model.embed(read, labels)
    maps = attention_maps(model, read, labels, layers=[1, 2, 3, 4], key_mask=mask)
    assert list(maps) == [1, 2, 3, 4]
    for number, block in enumerate(model.blocks(), start=1):
        x = states[number - 1]
        _, _, v = block.attention.project(block.attention_norm(x), model.rope[:9])
        x = x + block.attention.merge(maps[number] @ v)
        x = x + block.feed_forward(block.ffn_norm(x))
        torch.testing.assert_close(x, states[number], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@MASKS
def test_weights_times_values_are_what_the_fused_kernel_gives_the_model(make_mask: Any) -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 2)
    read, mask = tokens[:, :-1], make_mask()
    fused: list[Tensor] = []
    for block in model.blocks():
        block.attention.register_forward_hook(lambda _module, _inputs, output: fused.append(output))
    states = model.states(read, labels, layers=range(5), key_mask=mask)
    bias = attention_bias(mask, 9, torch.float32, torch.device("cpu"))
    for number, weights in attention_maps(model, read, labels, layers=[1, 2, 3, 4], key_mask=mask).items():
        block = model.blocks()[number - 1]
        q, k, v = block.attention.project(block.attention_norm(states[number - 1]), model.rope[:9])
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        torch.testing.assert_close(weights @ v, heads, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.attention.merge(weights @ v), fused[number - 1], rtol=1e-5, atol=1e-5)
        if mask is None:
            causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.testing.assert_close(weights @ v, causal, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_layers_weights_are_those_of_the_rotary_embedding_written_out() -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 1)
    block = model.blocks()[0]
    x = block.attention_norm(model.embed(tokens[:, :-1], labels))[0].double()
    wqkv = block.attention.wqkv.weight.double()
    heads, size = TINY.n_heads, TINY.head_dim
    found = attention_maps(model, tokens[:, :-1], labels, layers=[1])[1][0]

    def turned(vector: list[float], position: int) -> list[complex]:
        """Position 0 is the class and vanishes; half of the other positions' pairs turn by row, half by column."""
        if position == 0:
            return [0j] * (size // 2)
        row, column = divmod(position - 1, TINY.grid)
        pairs = [complex(vector[2 * j], vector[2 * j + 1]) for j in range(size // 2)]
        quarter = size // 4
        angles = [
            (row if j < quarter else column) * TINY.rope_base ** (-2 * (j % quarter) / (size // 2))
            for j in range(size // 2)
        ]
        return [pair * cmath.exp(1j * angle) for pair, angle in zip(pairs, angles, strict=True)]

    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        q, k = (x @ wqkv[part * TINY.dim : (part + 1) * TINY.dim][rows].T for part in (0, 1))
        queries, keys = ([turned(v.tolist(), n) for n, v in enumerate(vectors)] for vectors in (q, k))
        for query in range(9):
            logits = [
                sum((a * b.conjugate()).real for a, b in zip(queries[query], keys[key], strict=True)) / math.sqrt(size)
                for key in range(query + 1)
            ]
            assert logits[0] == 0  # the class
            total = sum(math.exp(logit) for logit in logits)
            expected = [math.exp(logit) / total for logit in logits] + [0.0] * (8 - query)
            assert found[head, query].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


@MASKS
def test_rows_are_distributions_over_the_past(make_mask: Any) -> None:
    tokens, labels = random_sequences(TINY, 2)
    mask = make_mask()
    for weights in attention_maps(random_model(), tokens[:, :-1], labels, layers=[1, 4], key_mask=mask).values():
        assert weights.shape == (2, 2, 9, 9)
        assert weights.dtype == torch.float32
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9))
        assert (weights.triu(1) == 0).all()
        assert (weights[:, :, 0, 0] == 1).all()
        if mask is not None:
            masked = (mask if mask.dim() == 3 else mask[:, None].expand(2, 9, 9))[:, None].expand_as(weights)
            assert (weights[masked] == 0).all()
            assert (weights[(~masked).tril()] > 0).any()


def test_the_class_key_says_nothing_so_the_first_layers_maps_are_the_same_for_all_labels() -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 3)
    first, second = (attention_maps(model, tokens[:, :-1], some, layers=[1, 2]) for some in (labels, (labels + 1) % 4))
    torch.testing.assert_close(first[1], second[1])
    assert not torch.allclose(first[2], second[2], atol=1e-3)


def test_layers_asked_for_alone_or_together_have_the_same_maps() -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 2)
    together = attention_maps(model, tokens[:, :-1], labels, layers=[4, 2, 1])
    assert together.keys() == {1, 2, 4}
    for layer, weights in together.items():
        alone = attention_maps(model, tokens[:, :-1], labels, layers=[layer])[layer]
        torch.testing.assert_close(alone, weights)


def test_the_beginning_of_an_image_has_the_beginning_of_its_map() -> None:
    model, (tokens, labels) = random_model(), random_sequences(TINY, 2)
    whole = attention_maps(model, tokens[:, :-1], labels, layers=[3])[3]
    torch.testing.assert_close(attention_maps(model, tokens[:, :4], labels, layers=[3])[3], whole[:, :, :5, :5])


@pytest.mark.parametrize("layer", [-1, 0, 5])
def test_a_layer_out_of_range_is_refused(layer: int) -> None:
    tokens, labels = random_sequences(TINY, 1)
    with pytest.raises(UserError, match=f"no layer {layer}: this network has layers 1 to 4"):
        attention_maps(random_model(), tokens[:, :-1], labels, layers=[1, layer])


# Statistics


def naive_statistics(weights: np.ndarray, grid: int) -> tuple[float, float, float, float]:
    """Class weight, neighbour weight, distance and entropy, one weight at a time."""
    rows: list[tuple[float, float, float, float]] = []
    for image in weights:
        for head in image:
            for query in range(1, len(head)):
                at_row, at_column = divmod(query - 1, grid)
                near = far = entropy = 0.0
                for key, weight in enumerate(head[query].tolist()):
                    entropy -= weight * math.log(weight) if weight else 0.0
                    if key == 0:
                        continue
                    row, column = divmod(key - 1, grid)
                    near += weight if max(abs(row - at_row), abs(column - at_column)) <= 1 else 0.0
                    far += weight * math.hypot(row - at_row, column - at_column)
                to_class = float(head[query, 0])
                to_tokens = float(head[query, 1:].sum())
                rows.append((to_class, near, far / to_tokens if to_tokens else math.nan, entropy))
    means = np.nanmean(rows, axis=0)
    return means[0], means[1], means[2], means[3]


@given(st.integers(2, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 1000))
def test_statistics_are_those_of_a_naive_loop(grid: int, images: int, heads: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (images, heads, grid**2, grid**2))
    weights = np.tril(np.exp(logits))
    weights /= weights.sum(-1, keepdims=True)
    found = attention_statistics(torch.from_numpy(weights), grid)
    expected = naive_statistics(weights, grid)
    assert (found.class_weight, found.neighbour_weight, found.distance, found.entropy) == pytest.approx(expected)


@torch.no_grad()
def test_statistics_of_every_image_and_head_are_those_of_it_alone() -> None:
    tokens, labels = random_sequences(TINY, 3)
    weights = attention_maps(random_model(), tokens[:, :-1], labels, layers=[2])[2]
    found = head_statistics(weights, 3)
    assert found.shape == (3, 2, len(STATISTICS))
    for image in range(3):
        for head in range(2):
            expected = naive_statistics(weights[image : image + 1, head : head + 1].numpy(), 3)
            assert found[image, head].tolist() == pytest.approx(expected)
    together = [getattr(attention_statistics(weights, 3), name) for name in STATISTICS]
    assert found.mean((0, 1)).tolist() == pytest.approx(together)


def test_a_model_that_looks_at_the_class_alone() -> None:
    weights = torch.zeros(1, 2, 9, 9)
    weights[..., 0] = 1
    assert asdict(attention_statistics(weights, 3)) == {
        "class_weight": 1,
        "neighbour_weight": 0,
        "distance": 0,
        "entropy": 0,
    }


def test_a_step_that_sees_no_token_has_no_distance() -> None:
    weights = torch.zeros(1, 1, 4, 4)
    weights[0, 0, :, 0] = 1
    weights[0, 0, 3, :3] = torch.tensor([0.5, 0.25, 0.25])  # from token 2 (below 0) to 0 and 1 (across)
    assert attention_statistics(weights, 2).distance == pytest.approx((1 + math.sqrt(2)) / 2)


def test_a_model_that_looks_everywhere_alike() -> None:
    weights = (torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]).expand(3, 2, 4, 4)
    found = attention_statistics(weights, 2)
    assert found.class_weight == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert found.neighbour_weight == pytest.approx(1 - found.class_weight)  # 2 x 2 tokens are all neighbours
    assert found.entropy == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    # From token 0, to itself; from 1, to 0 and 1; from 2 (below 0), to 0, 1 (across) and 2.
    assert found.distance == pytest.approx((0 + 1 / 2 + (1 + math.sqrt(2)) / 3) / 3)


def test_pictures_show_fifths_of_an_image_and_its_end() -> None:
    assert attention_steps(64) == [13, 26, 38, 51, 63]
    assert attention_steps(256) == [51, 102, 154, 205, 255]


# Averages over a store


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


def values(statistics: AttentionStatistics | None) -> list[float]:
    return [getattr(statistics, name) for name in STATISTICS]


@pytest.mark.parametrize("at_once", [1, 3 * 2 * 81, 10**6], ids=["one by one", "three by three", "all together"])
@pytest.mark.parametrize("masks", [ImageMasks(), ImageMasks(ratio=0.5, seed=3)], ids=["no mask", "masks"])
def test_means_and_spreads_are_those_of_a_loop_over_images_whatever_the_batch(
    line: SmallLine, monkeypatch: pytest.MonkeyPatch, at_once: int, masks: ImageMasks
) -> None:
    monkeypatch.setattr(attention, "WEIGHTS_AT_ONCE", at_once)
    model, store, images = load_model(line.model), TokenStore(line.tokens), [0, 2, 3, 5, 7]
    found = average_statistics(model, store, images, masks=masks)
    assert list(found) == [1, 2, 3, 4]
    for layer, statistics in found.items():
        by_head = np.empty((len(images), 2, len(STATISTICS)))
        for row, image in enumerate(images):
            tokens, labels = center_crops(store, [image])
            mask = masks.draw([image], 9)
            weights = attention_maps(model, tokens[:, :-1], labels, layers=[layer], key_mask=mask)[layer].numpy()
            for head in range(2):
                by_head[row, head] = naive_statistics(weights[:, head : head + 1], 3)
        close = {"rel": 1e-4, "abs": 1e-6}
        assert values(statistics.over_heads.mean) == pytest.approx(by_head.mean((0, 1)), **close)
        assert values(statistics.over_heads.std) == pytest.approx(by_head.mean(1).std(0, ddof=1), **close)
        for head, averaged in enumerate(statistics.by_head):
            assert values(averaged.mean) == pytest.approx(by_head[:, head].mean(0), **close)
            assert values(averaged.std) == pytest.approx(by_head[:, head].std(0, ddof=1), **close)


def test_a_model_without_preferences_looks_everywhere_alike(line: SmallLine) -> None:
    """All queries and keys 0: after q tokens, each of the q + 1 keys has the weight 1 / (q + 1)."""
    model, store = load_model(line.model), TokenStore(line.tokens)
    with torch.no_grad():
        for block in model.blocks():
            block.attention.wqkv.weight[: 2 * TINY.dim] = 0
    for statistics in average_statistics(model, store, range(4)).values():
        mean, std = statistics.over_heads.mean, statistics.over_heads.std
        assert mean.class_weight == pytest.approx(sum(1 / (q + 1) for q in range(1, 9)) / 8)
        assert mean.entropy == pytest.approx(sum(math.log(q + 1) for q in range(1, 9)) / 8)
        assert values(std) == pytest.approx([0, 0, 0, 0], abs=1e-6)


def test_a_single_image_has_no_spread(line: SmallLine) -> None:
    found = average_statistics(load_model(line.model), TokenStore(line.tokens), [4])
    assert all(s.over_heads.std is None and s.by_head[0].std is None for s in found.values())


def test_attention_that_is_not_finite_is_refused(line: SmallLine) -> None:
    model = load_model(line.model)
    with torch.no_grad():
        model.blocks()[1].attention_norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the attention of ST-AR in layer 2 is not finite: its training has diverged"):
        average_statistics(model, TokenStore(line.tokens), range(4), name="ST-AR")


def test_center_crops_are_the_stores(line: SmallLine) -> None:
    store = TokenStore(line.tokens)
    tokens, labels = center_crops(store, [5, 1])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [store.codes(np.array([i]), np.array([[0]]))[0, 0].tolist() for i in (5, 1)]
    assert labels.tolist() == [store.labels[5], store.labels[1]]


# Masks


@given(st.floats(0.01, 0.99), st.integers(0, 5), st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_an_images_mask_is_trainings_of_a_step_with_its_number(ratio: float, seed: int, images: list[int]) -> None:
    config = SelfGuidedConfig(mask_ratio=ratio)
    found = ImageMasks(ratio=ratio, seed=seed).draw(images, 9)
    assert found is not None
    assert found.sum(1).tolist() == [round(ratio * 8)] * len(images)
    for mask, image in zip(found, images, strict=True):
        expected = sample_guidance(config, (1, 1, TINY.sequence_length), seed=seed, step=image).key_mask
        assert expected is not None
        assert torch.equal(mask, expected[0, 0])


def test_masks_can_leave_a_tokens_own_query_out_as_training_can() -> None:
    config = SelfGuidedConfig(mask_ratio=0.5, mask_own_position=False)
    found = ImageMasks(ratio=0.5, seed=1, own_position=False).draw([7], 9)
    expected = sample_guidance(config, (1, 1, TINY.sequence_length), seed=1, step=7).key_mask
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected[0])
    assert not found.diagonal(dim1=1, dim2=2).any()


def test_no_ratio_is_no_mask() -> None:
    assert ImageMasks().draw([0, 1], 9) is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"ratio": -0.1}, r"--mask-ratio must lie in \[0, 1\), not -0.1"),
        ({"ratio": 1.0}, r"--mask-ratio must lie in \[0, 1\), not 1.0"),
        ({"ratio": math.nan}, r"--mask-ratio must lie in \[0, 1\), not nan"),
        ({"ratio": 0.5, "seed": -1}, "--seed must be 0 or more, not -1"),
    ],
)
def test_masks_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        ImageMasks(**settings)
