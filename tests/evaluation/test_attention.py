"""Attention maps are what the model computes with, and their statistics are what a naive loop counts."""

import cmath
import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.attention import attention_maps, attention_statistics, attention_steps, draw_attention
from st_ar.model.weights import load_model
from tests.disk import contents, refused
from tests.small_line import SmallLine, make_line, random_tokenizer
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
                rows.append((to_class, near, far / (1 - to_class), entropy))
    means = np.mean(rows, axis=0)
    return means[0], means[1], means[2], means[3]


@given(st.integers(2, 4), st.integers(1, 2), st.integers(1, 3), st.integers(0, 1000))
def test_statistics_are_those_of_a_naive_loop(grid: int, images: int, heads: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 2, (images, heads, grid**2, grid**2))
    weights = np.tril(np.exp(logits))
    weights /= weights.sum(-1, keepdims=True)
    found = attention_statistics(torch.from_numpy(weights), grid)
    expected = naive_statistics(weights, grid)
    assert (found.class_weight, found.neighbour_weight, found.distance, found.entropy) == pytest.approx(expected)


def test_a_model_that_looks_at_the_class_alone() -> None:
    weights = torch.zeros(1, 2, 9, 9)
    weights[..., 0] = 1
    found = attention_statistics(weights, 3)
    assert (found.class_weight, found.neighbour_weight, found.entropy) == (1, 0, 0)


def test_a_model_that_looks_at_the_newest_token_alone() -> None:
    found = attention_statistics(torch.eye(9).expand(2, 2, 9, 9), 3)
    assert asdict(found) == {"class_weight": 0, "neighbour_weight": 1, "distance": 0, "entropy": 0}


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


# The job


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> SmallLine:
    return make_line(tmp_path_factory.mktemp("line"))


def draw(line: SmallLine, out: Path, **changes: Any) -> Any:
    return draw_attention(line.model, line.tokens, line.tokenizer, out, **changes)


def test_it_writes_a_picture_and_the_statistics_of_every_layer(line: SmallLine, tmp_path: Path) -> None:
    found = draw(line, tmp_path / "maps.svg", layer=3, images=[5, 1], average=4)
    assert set(contents(tmp_path)) == {"maps.svg", "maps.json"}
    root = ElementTree.fromstring((tmp_path / "maps.svg").read_text())
    assert root.get("aria-label") == "attention at layer 3"
    images = root.iter("{http://www.w3.org/2000/svg}image")
    assert sum(1 for _ in images) == 2 * (1 + 5)  # each image, and what is looked at after each of five steps
    store = TokenStore(line.tokens)
    codes = torch.from_numpy(store.codes(np.arange(4), np.zeros((4, 1), int))[:, 0].astype(np.int64))
    maps = attention_maps(
        load_model(line.model), codes[:, :-1], torch.from_numpy(store.labels[:4]), layers=[1, 2, 3, 4]
    )
    assert found == {layer: attention_statistics(weights, 3) for layer, weights in maps.items()}
    saved = json.loads((tmp_path / "maps.json").read_text())
    assert saved == {str(layer): asdict(value) for layer, value in found.items()}


def test_it_can_look_at_the_averaged_weights(line: SmallLine, tmp_path: Path) -> None:
    live, ema = (draw(line, tmp_path / f"{ema}.svg", images=[0], average=2, ema=ema) for ema in (False, True))
    assert live != ema
    assert (tmp_path / "False.svg").read_text() != (tmp_path / "True.svg").read_text()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": [0, 8]}, "--images 8 is out of range: .* has images 0 to 7"),
        ({"images": [-1]}, "--images -1 is out of range"),
        ({"images": []}, "at least one image"),
        ({"average": 0}, "at least one image"),
        ({"layer": 0}, "no layer 0: this network has layers 1 to 4"),
        ({"layer": 5}, "no layer 5: this network has layers 1 to 4"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_written(
    line: SmallLine, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with refused(tmp_path, match):
        draw(line, tmp_path / "maps.svg", **changes)


def test_pictures_are_svg_or_refused(line: SmallLine, tmp_path: Path) -> None:
    with refused(tmp_path, "drawn as SVG; give a name that ends in .svg"):
        draw(line, tmp_path / "maps.png")


def test_another_tokenizer_is_refused(line: SmallLine, tmp_path: Path) -> None:
    other = random_tokenizer(seed=1)
    other.save(tmp_path / "other")
    with refused(tmp_path, f"was made by tokenizer .*, .*other is {other.fingerprint[:12]}"):
        draw_attention(line.model, line.tokens, tmp_path / "other", tmp_path / "maps.svg")
