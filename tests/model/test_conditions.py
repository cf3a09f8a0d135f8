"""Captions as the transformer reads them: a naive reading, padding that changes nothing, and the null condition."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from st_ar.config import ModelConfig
from st_ar.errors import UserError
from st_ar.evaluation.attention import attention_maps, attention_statistics
from st_ar.model.decoder import Decoder
from st_ar.model.generate import generate
from st_ar.model.transformer import TextEmbedding, Transformer, rope_table
from st_ar.selfguided.objective import random_key_mask, show_own_position
from tests.toys import FIXTURES, NO_DROPOUT, TINY, TINY_TEXT, random_captions, random_model, random_sequences

N, T = TINY_TEXT.text_tokens, TINY_TEXT.sequence_length
LENGTHS = st.lists(st.integers(1, N), min_size=1, max_size=3)


def text_embedding(model: Transformer) -> TextEmbedding:
    assert isinstance(model.cls_embedding, TextEmbedding)
    return model.cls_embedding


def cut_to(model: Transformer, rows: int) -> Transformer:
    """The same model for captions of so many rows: the weights do not depend on how many there are."""
    cut = Transformer(replace(model.config, text_tokens=rows))
    weights = dict(model.state_dict())
    weights["cls_embedding.uncond_embedding"] = weights["cls_embedding.uncond_embedding"][-rows:]
    cut.load_state_dict(weights)
    return cut.eval()


def projected(model: Transformer, features: Tensor) -> Tensor:
    """fc2(gelu(fc1 x)) with GELU's tanh form written out, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    inner = features.double() @ weights["cls_embedding.cap_proj.fc1.weight"].T
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return inner @ weights["cls_embedding.cap_proj.fc2.weight"].T


def naive_logits(model: Transformer, tokens: Tensor, caption: Tensor, masked: Sequence[bool]) -> Tensor:
    """Logits [T, V] of one image, position by position in float64: what is visible is written as a rule for each pair."""
    config = model.config
    w = {name: value.double() for name, value in model.state_dict().items()}
    x = torch.cat([projected(model, caption), w["tok_embeddings.weight"][tokens[:-1]]])
    padding = [not row.any() for row in caption] + [False] * (T - 1)
    hidden_key = [False] * N + list(masked[1:])
    rope = model.rope.double()

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight

    def turn(values: Tensor) -> Tensor:  # (positions, heads, head_dim)
        even, odd = values[..., ::2], values[..., 1::2]
        cos, sin = rope[: len(x), None, :, 0], rope[: len(x), None, :, 1]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    for i in range(config.n_layers):
        layer = {
            name.removeprefix(f"layers.{i}."): value for name, value in w.items() if name.startswith(f"layers.{i}.")
        }
        normed = norm(x, layer["attention_norm.weight"])
        q, k, v = (normed @ layer["attention.wqkv.weight"].T).unflatten(-1, (3, config.n_heads, -1)).unbind(1)
        q, k = turn(q), turn(k)
        heads = torch.zeros_like(v)
        for query in range(len(x)):
            seen = [
                key
                for key in range(query + 1)
                if (key == query and padding[key]) or (not padding[key] and not hidden_key[key])
            ]
            scores = torch.einsum("hd,khd->hk", q[query], k[seen]) / math.sqrt(config.head_dim)
            heads[query] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen])
        x = x + heads.flatten(1) @ layer["attention.wo.weight"].T
        normed = norm(x, layer["ffn_norm.weight"])
        gate = F.silu(normed @ layer["feed_forward.w1.weight"].T) * (normed @ layer["feed_forward.w3.weight"].T)
        x = x + gate @ layer["feed_forward.w2.weight"].T
    return norm(x[N - 1 :], w["norm.weight"]) @ w["output.weight"].T


def key_masks(count: int, seed: int) -> Tensor:
    return random_key_mask(count, T, 0.4, torch.Generator().manual_seed(seed))


# The transformer with captions


@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_those_of_a_naive_reading(masked: bool) -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 3)[0]
    captions, mask = random_captions(TINY_TEXT, [1, 3, N]), key_masks(3, 1)
    with torch.no_grad():
        found = model(tokens[:, :-1], captions, key_mask=mask if masked else None).logits
    assert found.shape == (3, T, TINY_TEXT.vocab_size)
    for image in range(3):
        rule = mask[image].tolist() if masked else [False] * T
        torch.testing.assert_close(
            found[image].double(), naive_logits(model, tokens[image], captions[image], rule), rtol=1e-4, atol=1e-4
        )


def test_a_caption_is_embedded_by_the_projection_row_by_row() -> None:
    model, captions = random_model(TINY_TEXT), random_captions(TINY_TEXT, [2, N])
    embedded = model.cls_embedding(captions)
    torch.testing.assert_close(embedded.double(), projected(model, captions), rtol=1e-5, atol=1e-6)
    assert not embedded[0, : N - 2].any()  # padding stays zero: the projection has no biases


def test_the_captions_positions_are_not_rotated_but_zeroed() -> None:
    table = random_model(TINY_TEXT).rope
    assert table.shape == (N + T, TINY_TEXT.head_dim // 2, 2)
    assert not table[:N].any()
    assert torch.equal(table[N:], rope_table(3, TINY_TEXT.head_dim, 10000.0)[1:])


@given(lengths=LENGTHS, seed=st.integers(0, 99), mask=st.sampled_from(["none", "keys", "queries"]))
def test_padding_changes_nothing(lengths: list[int], seed: int, mask: str) -> None:
    model, count = random_model(TINY_TEXT), len(lengths)
    tokens, captions = random_sequences(TINY_TEXT, count, seed)[0], random_captions(TINY_TEXT, lengths, seed)
    key_mask = None if mask == "none" else key_masks(count, seed)
    if key_mask is not None and mask == "queries":
        key_mask = show_own_position(key_mask)
    with torch.no_grad():
        found = model(tokens[:, :-1], captions, key_mask=key_mask, hidden=[2])
        for image, length in enumerate(lengths):
            one = slice(image, image + 1)
            alone = cut_to(model, length)(
                tokens[one, :-1],
                captions[one, N - length :],
                key_mask=None if key_mask is None else key_mask[one],
                hidden=[2],
            )
            torch.testing.assert_close(found.logits[one], alone.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.hidden[2][one], alone.hidden[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, "keys", "queries"])
def test_a_caption_of_one_row_is_read_as_a_class_is(mask: str | None) -> None:
    config = replace(TINY_TEXT, text_tokens=1)
    model, captions = random_model(config), random_captions(config, [1] * 3)
    classes = random_model(TINY)
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("cls_embedding")}
    with torch.no_grad():
        table = torch.cat([model.cls_embedding(captions)[:, 0], torch.zeros(1, config.dim)])
        classes.load_state_dict(weights | {"cls_embedding.embedding_table.weight": table})
        key_mask = None if mask is None else key_masks(3, 0)
        key_mask = show_own_position(key_mask) if key_mask is not None and mask == "queries" else key_mask
        tokens = random_sequences(TINY, 3)[0][:, :-1]
        found = model(tokens, captions, key_mask=key_mask)
        expected = classes(tokens, torch.arange(3), key_mask=key_mask)
    torch.testing.assert_close(found.logits, expected.logits)


def test_every_row_of_a_caption_counts_and_the_first_token_has_read_them_all() -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 1)[0]
    captions = random_captions(TINY_TEXT, [N])
    with torch.no_grad():
        before = model(tokens[:, :-1], captions).logits
        for row in range(N):
            changed = captions.clone()
            changed[0, row] += 1
            assert (model(tokens[:, :-1], changed).logits - before)[0, 0].abs().max() > 1e-3


def test_an_empty_caption_is_read_without_nan() -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 2)[0]
    with torch.no_grad():
        logits = model(tokens[:, :-1], random_captions(TINY_TEXT, [0, 2])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(2, N + 1, 6), torch.zeros(2, N, 7), torch.zeros(2, N, 6, dtype=torch.int64), torch.tensor([0, 1])],
)
def test_what_is_no_caption_of_the_model_is_refused(labels: Tensor) -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 2)[0]
    with pytest.raises(UserError, match=r"captions' features, floating \[B, 5, 6\]"):
        model(tokens[:, :-1], labels)
    with pytest.raises(UserError, match=r"captions' features, floating \[B, 5, 6\]"):
        generate(model, labels, cfg_scale=2.0)


# The null condition


def test_the_null_condition_stands_in_the_captions_own_rows() -> None:
    model = random_model(TINY_TEXT)
    uncond = text_embedding(model).uncond_embedding
    null = model.cls_embedding.null(random_captions(TINY_TEXT, [2, N]))
    assert not null[0, : N - 2].any()
    assert torch.equal(null[0, N - 2 :], uncond[N - 2 :])
    assert torch.equal(null[1], uncond)
    assert torch.equal(model.null_condition(3), torch.stack([uncond] * 3))


def test_the_null_condition_of_a_class_model_is_its_null_class() -> None:
    model = random_model()
    assert model.cls_embedding.null(torch.tensor([0, 2])).tolist() == [3, 3]
    assert model.null_condition(3).tolist() == [3, 3, 3]
    assert model.null_condition(3).dtype == torch.int64


def test_the_null_condition_is_drawn_as_llamagens_and_not_trained() -> None:
    torch.manual_seed(0)
    embedding = text_embedding(Transformer(replace(TINY_TEXT, text_tokens=120, text_dim=2048)))
    assert embedding.uncond_embedding.std().item() == pytest.approx(2048**-0.5, rel=0.01)
    assert [name for name, _ in embedding.named_parameters()] == ["cap_proj.fc1.weight", "cap_proj.fc2.weight"]


# Sampling


@pytest.mark.parametrize("bucket", [1, 4, 32])
def test_the_decoder_gives_the_logits_of_the_forward_pass(bucket: int) -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 4)[0]
    captions = random_captions(TINY_TEXT, [1, 3, N, 0])
    with torch.no_grad():
        expected = model(tokens[:, :-1], captions).logits
        decoder = Decoder(model, 4, bucket=bucket)
        torch.testing.assert_close(decoder.begin(captions), expected[:, 0], rtol=1e-4, atol=1e-5)
        for position in range(T - 1):
            here = decoder.read(tokens[: 2 if position > 4 else 4, position], decoder.seek(position))
            torch.testing.assert_close(here, expected[: len(here), position + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_greedy_tokens_are_those_of_whole_passes(scale: float) -> None:
    model, captions = random_model(TINY_TEXT), random_captions(TINY_TEXT, [2, N, 1])
    uncond = text_embedding(model).uncond_embedding
    null = torch.stack([torch.where((row != 0).any(-1, keepdim=True), uncond, torch.zeros(6)) for row in captions])
    tokens = torch.zeros(3, 0, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(T):
            with_caption = model(tokens, captions).logits[:, -1]
            without = model(tokens, null).logits[:, -1]
            chosen = (without + scale * (with_caption - without)).argmax(-1)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
    assert torch.equal(generate(model, captions, cfg_scale=scale, greedy=True), tokens)


def test_captions_in_float32_are_sampled_from_weights_in_bfloat16() -> None:
    model = random_model(TINY_TEXT).bfloat16()
    tokens = generate(model, random_captions(TINY_TEXT, [2, N]), cfg_scale=2.0, seed=0)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (2, T))
    assert model.rope.dtype == torch.float32


# Attention maps


def test_attention_maps_have_the_captions_keys_first_and_padding_unseen() -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 2)[0]
    maps = attention_maps(model, tokens[:, :-1], random_captions(TINY_TEXT, [2, N]), layers=[1, 3])
    for weights in maps.values():
        assert weights.shape == (2, 2, T, N - 1 + T)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, T))
        assert not weights[0, :, :, : N - 2].any()
        # zeroed positions: every row of a caption has the logit 0, so all have the same weight
        torch.testing.assert_close(weights[0, :, :, N - 2], weights[0, :, :, N - 1])
        torch.testing.assert_close(weights[1, :, :, 0], weights[1, :, :, N - 1])
        assert not weights[:, :, 0, N:].any()
        statistics = attention_statistics(weights, 3)
        assert statistics.class_weight == pytest.approx(weights[:, :, 1:, :N].sum(-1).double().mean().item())


def test_agrees_with_what_llamagen_gave() -> None:
    """Logits of three captions of 120, 7 and 1 rows, and greedy tokens with and without guidance, recorded from LlamaGen."""
    file = load_file(FIXTURES / "llamagen_t2i_tiny.safetensors")
    weights = {name.removeprefix("weights/"): t for name, t in file.items() if name.startswith("weights/")}
    text = {"condition": "text", "text_tokens": 120, "text_dim": 16}
    model = Transformer(ModelConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, grid=4, **text, **NO_DROPOUT)).eval()
    model.load_state_dict(weights)
    features, tokens = file["io/features"], file["io/tokens"]
    with torch.no_grad():
        logits = model(tokens[:, :-1], features).logits
    torch.testing.assert_close(logits, file["io/logits"], rtol=1e-5, atol=1e-5)
    for scale in (1.0, 2.5):
        assert generate(model, features, cfg_scale=scale, greedy=True).equal(file[f"io/greedy_cfg{scale}"])
