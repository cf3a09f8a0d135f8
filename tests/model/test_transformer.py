"""Captions as the transformer reads them: a naive reading, padding that changes nothing, and the null condition."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from st_ar.config import ModelConfig
from st_ar.errors import UserError
from st_ar.evaluation.attention import attention_maps, attention_statistics
from st_ar.model import transformer
from st_ar.model.decoder import CachedDecoder
from st_ar.model.generate import generate
from st_ar.model.transformer import (
    Block,
    DropPath,
    RMSNorm,
    TextEmbedding,
    Transformer,
    attend,
    attention_bias,
    attention_weights,
    fused_width,
    rope_table,
    rotate,
)
from st_ar.presets import PRESETS, get_preset
from st_ar.selfguided.guidance import random_key_mask, show_own_position
from st_ar.selfguided.losses import next_token_loss
from tests.reference import equations
from tests.toys import (
    FIXTURES,
    NO_DROPOUT,
    TINY,
    TINY_TEXT,
    random_captions,
    random_model,
    random_sequences,
    recorded,
    recorded_model,
)

LENGTH = TINY.sequence_length


def on_meta(preset: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(get_preset(preset).model)


def random_heads(batch: int, heads: int, length: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, length, width, generator=generator, dtype=torch.float64).unbind()
    return q, k, v


def random_mask(shape: tuple[int, ...], seed: int) -> Tensor:
    """Half of the keys masked, the class never."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0] = False
    return mask


# Agreement with LlamaGen


def test_logits_and_loss_are_those_recorded_from_llamagen() -> None:
    io = recorded("io/")
    with torch.no_grad():
        logits = recorded_model()(io["tokens"][:, :-1], io["labels"]).logits
    torch.testing.assert_close(logits, io["logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(next_token_loss(logits, io["tokens"]), io["loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [f"{size} c2i" for size in ("B", "L", "XL", "XXL", "3B")] + ["XL t2i"])
def test_parameter_names_and_shapes_are_llamagens(layout: str) -> None:
    theirs = json.loads((FIXTURES / "llamagen_layouts.json").read_text())[f"GPT-{layout} 256"]
    preset = f"llamagen-{layout.lower().removesuffix(' c2i').replace(' ', '-')}"
    ours = {key: list(value.shape) for key, value in on_meta(preset).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("llamagen-b", 110.9),
        ("llamagen-l", 342.9),
        ("llamagen-xl", 774.7),
        ("llamagen-xxl", 1411.0),
        ("llamagen-3b", 3096.7),
    ],
)
def test_parameter_counts_are_llamagens(preset: str, millions: float) -> None:
    assert round(sum(parameter.numel() for parameter in on_meta(preset).parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("preset", "hidden"),
    [
        ("llamagen-b", 2048),
        ("llamagen-l", 2816),
        ("llamagen-xl", 3584),
        ("llamagen-xxl", 4096),
        ("llamagen-3b", 8704),
    ],
)
def test_swiglu_width_is_llamagens(preset: str, hidden: int) -> None:
    assert PRESETS[preset]().model.hidden_dim == hidden


# Hidden states


def test_last_hidden_state_through_the_head_gives_the_logits() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    with torch.no_grad():
        logits, hidden = model(tokens[:, :-1], labels, hidden=[TINY.n_layers])
        assert torch.equal(model.head(hidden[TINY.n_layers]), logits)
        normed = F.rms_norm(hidden[TINY.n_layers], (TINY.dim,), model.norm.weight, TINY.norm_eps)
        torch.testing.assert_close(normed @ model.output.weight.T, logits)


def test_hidden_layers_are_counted_from_1_after_the_block() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    inputs: list[Tensor] = []
    for block in model.blocks():
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        hidden = model(tokens[:, :-1], labels, hidden=range(1, TINY.n_layers + 1)).hidden
        embedded = model.embed(tokens[:, :-1], labels)
    assert sorted(hidden) == [1, 2, 3, 4]
    assert torch.equal(inputs[0], embedded)
    for layer in range(1, TINY.n_layers):
        assert torch.equal(hidden[layer], inputs[layer])
        assert not torch.allclose(hidden[layer], inputs[layer - 1])


def test_only_the_chosen_hidden_states_are_returned() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    assert model(tokens[:, :-1], labels).hidden == {}
    assert set(model(tokens[:, :-1], labels, hidden={2, 3}).hidden) == {2, 3}


@pytest.mark.parametrize(("layers", "deepest"), [([1], 1), ([2], 2), ([3, 1], 3), ([4], 4)])
def test_features_run_no_block_after_the_last_wanted_and_no_head(layers: list[int], deepest: int) -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    with torch.no_grad():
        whole = model(tokens[:, :-1], labels, hidden=layers).hidden
    ran: list[str] = []

    def note(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: ran.append(name))

    for number, block in enumerate(model.blocks(), start=1):
        note(f"block {number}", block)
    note("norm", model.norm)
    note("output", model.output)
    with torch.no_grad():
        states = model.features(tokens[:, :-1], labels, layers=layers)
    assert ran == [f"block {number}" for number in range(1, deepest + 1)]
    assert set(states) == set(layers)
    for layer in layers:
        assert torch.equal(states[layer], whole[layer])


@pytest.mark.parametrize("layer", [0, -1, 5])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    tokens, labels = random_sequences(TINY, 1)
    with pytest.raises(UserError, match=rf"no layer {layer}: this network has layers 1 to 4"):
        random_model()(tokens[:, :-1], labels, hidden=[1, layer])


@pytest.mark.parametrize("count", [9, 12])
def test_too_many_tokens_are_refused_with_the_remedy(count: int) -> None:
    tokens = torch.zeros(1, count, dtype=torch.int64)
    with pytest.raises(
        UserError, match=rf"{count} tokens are too many.*first 8 of an image's 9 tokens.*tokens\[:, :-1\]"
    ):
        random_model()(tokens, torch.tensor([0]))


def test_the_label_is_read_and_the_null_class_has_an_embedding_of_its_own() -> None:
    model = random_model()
    tokens, _ = random_sequences(TINY, 1)
    with torch.no_grad():
        every = model(tokens[:, :-1].expand(4, -1), torch.arange(4)).logits
    for a in range(4):
        for b in range(a):
            assert not torch.allclose(every[a], every[b])


# Rotary embedding


@given(grid=st.integers(1, 6), pairs=st.integers(1, 6), base=st.sampled_from([100.0, 10000.0]))
def test_rope_table_against_a_loop(grid: int, pairs: int, base: float) -> None:
    head_dim = 4 * pairs
    table = rope_table(grid, head_dim, base)
    assert table.dtype == torch.float32
    assert table.shape == (1 + grid * grid, head_dim // 2, 2)
    expected = torch.zeros(1 + grid * grid, head_dim // 2, 2, dtype=torch.float64)  # the class position stays 0
    half = head_dim // 2
    for n in range(grid * grid):
        for pair in range(half):
            place = n // grid if pair < half // 2 else n % grid
            angle = place / base ** (2 * (pair % (half // 2)) / half)
            expected[1 + n, pair, 0] = math.cos(angle)
            expected[1 + n, pair, 1] = math.sin(angle)
    torch.testing.assert_close(table.double(), expected, rtol=0, atol=1e-6)


def test_rotation_turns_interleaved_pairs() -> None:
    rope = rope_table(3, 8, 10000.0)
    x = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope)
    for position in range(10):
        for pair in range(4):
            cos, sin = rope[position, pair].tolist()
            first, second = x[:, position, :, 2 * pair], x[:, position, :, 2 * pair + 1]
            torch.testing.assert_close(turned[:, position, :, 2 * pair], first * cos - second * sin)
            torch.testing.assert_close(turned[:, position, :, 2 * pair + 1], first * sin + second * cos)


def test_compiled_rotation_is_the_same() -> None:
    rope = rope_table(3, 8, 10000.0)
    x = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.compile(rotate, backend="aot_eager", fullgraph=True)(x, rope), rotate(x, rope))


def test_rotation_keeps_the_type_but_computes_in_float32() -> None:
    rope = rope_table(3, 8, 10000.0)
    x = torch.randn(2, 10, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, rope)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), rope).bfloat16())


def test_attention_logits_against_the_class_key_are_exactly_0() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    with torch.no_grad():
        x = model.embed(tokens[:, :-1], labels)
        for block in model.blocks():
            q, k, v = block.attention.project(block.attention_norm(x), model.rope[:LENGTH])
            logits = q @ k.transpose(-1, -2)
            assert not logits[..., 0].any()
            assert not logits[:, :, 0].any()
            assert logits[:, :, 1:, 1:].all()  # and only those
            assert v[:, :, 0].all()
            x = block(x, model.rope[:LENGTH], attention_bias(None, LENGTH, x.dtype, x.device))


# Attention and its masks


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    length=st.integers(1, 6),
    kind=st.sampled_from(["none", "key", "query"]),
    seed=st.integers(0, 1000),
)
def test_attention_against_the_naive_loop(batch: int, heads: int, length: int, kind: str, seed: int) -> None:
    q, k, v = random_heads(batch, heads, length, 4, seed)
    shape = {"none": (), "key": (batch, length), "query": (batch, length, length)}[kind]
    mask = random_mask(shape, seed) if shape else None
    bias = attention_bias(mask, length, q.dtype, q.device)
    expected = equations.attention(q, k, v, mask)
    torch.testing.assert_close(attend(q, k, v, bias), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(attention_weights(q, k, bias) @ v, expected, rtol=1e-9, atol=1e-9)


def test_attention_without_a_bias_is_causal() -> None:
    q, k, v = random_heads(2, 2, 5, 4, 0)
    torch.testing.assert_close(attend(q, k, v, None), equations.attention(q, k, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_one_row_of_keys_is_the_masked_attention_with_the_same_gradients(share: float) -> None:
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < share
    mask[:, 0] = False  # the condition
    row = torch.zeros(3, 1, 1, 8, dtype=torch.float64).masked_fill(mask[:, None, None], float("-inf"))
    found: list[tuple[Tensor, ...]] = []
    for bias in (row, attention_bias(mask, 8, torch.float64, mask.device)):
        heads = [x.requires_grad_() for x in random_heads(3, 2, 8, 4, 0)]
        out = attend(*heads, bias)
        out.square().sum().backward()
        found.append((out, *(x.grad for x in heads if x.grad is not None)))
    assert all(x.isfinite().all() for x in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_widened_heads_have_the_same_attention(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_heads(2, 3, 7, 12, 1)
    bias = attention_bias(random_mask((2, 7), 1), 7, q.dtype, q.device) if masked else None
    expected = attend(q, k, v, bias)
    monkeypatch.setattr(transformer, "fused_width", lambda head_dim, device: 16)
    found = attend(q, k, v, bias)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_heads_are_widened_to_a_multiple_of_8_on_a_gpu() -> None:
    widths = [fused_width(head_dim, torch.device("cuda")) for head_dim in (64, 100, 4)]
    assert widths == [64, 104, 8]
    assert fused_width(100, torch.device("cpu")) == 100


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_attention_is_torchs_fused_attention(masked: bool) -> None:
    q, k, v = random_heads(2, 3, 7, 8, 1)
    bias = attention_bias(random_mask((2, 7), 1) if masked else None, 7, q.dtype, q.device)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attention_weights(q, k, bias) @ v, fused, rtol=1e-9, atol=1e-9)


def test_attention_in_bfloat16_is_close_to_the_naive_loop() -> None:
    q, k, v = (x.bfloat16() for x in random_heads(2, 2, 6, 8, 2))
    mask = random_mask((2, 6), 2)
    result = attend(q, k, v, attention_bias(mask, 6, q.dtype, q.device))
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), equations.attention(q, k, v, mask), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["none", "key", "query"])
def test_model_is_its_blocks_with_the_naive_attention(kind: str) -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    mask = None if kind == "none" else random_mask((2, LENGTH) if kind == "key" else (2, LENGTH, LENGTH), 3)
    with torch.no_grad():
        logits, hidden = model(tokens[:, :-1], labels, key_mask=mask, hidden=range(1, TINY.n_layers + 1))
        x = torch.cat(
            [model.cls_embedding.embedding_table(labels)[:, None], model.tok_embeddings(tokens[:, :-1])], dim=1
        )
        for layer, block in enumerate(model.blocks(), start=1):
            heads = equations.attention(*block.attention.project(block.attention_norm(x), model.rope[:LENGTH]), mask)
            x = x + heads.float().transpose(1, 2).flatten(2) @ block.attention.wo.weight.T
            normed = block.ffn_norm(x)
            w1, w2, w3 = (getattr(block.feed_forward, name).weight for name in ("w1", "w2", "w3"))
            x = x + (F.silu(normed @ w1.T) * (normed @ w3.T)) @ w2.T
            torch.testing.assert_close(hidden[layer], x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, model.head(x), rtol=1e-4, atol=1e-4)


def test_one_mask_for_each_query_equals_the_shared_mask_when_its_rows_agree() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 3)
    mask = random_mask((3, LENGTH), 4)
    with torch.no_grad():
        shared = model(tokens[:, :-1], labels, key_mask=mask).logits
        by_query = model(tokens[:, :-1], labels, key_mask=mask[:, None].expand(-1, LENGTH, -1)).logits
        unmasked = model(tokens[:, :-1], labels, key_mask=torch.zeros_like(mask)).logits
        assert torch.equal(shared, by_query)
        assert not torch.allclose(shared, unmasked)
        assert torch.equal(unmasked, model(tokens[:, :-1], labels).logits)


@given(place=st.integers(1, LENGTH - 1), own_visible=st.booleans(), seed=st.integers(0, 50))
def test_a_masked_key_acts_only_through_its_own_residual_stream(place: int, own_visible: bool, seed: int) -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2, seed)
    changed = tokens.clone()
    changed[:, place - 1] = (changed[:, place - 1] + 1) % TINY.vocab_size  # input position 0 is the class
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, place] = True
    key_mask = mask[:, None] & ~torch.eye(LENGTH, dtype=torch.bool) if own_visible else mask
    others = [position for position in range(LENGTH) if position != place]
    with torch.no_grad():
        before = model(tokens[:, :-1], labels, key_mask=key_mask).logits
        after = model(changed[:, :-1], labels, key_mask=key_mask).logits
    torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-6, atol=1e-6)
    assert ((after[:, place] - before[:, place]).abs().amax(-1) > 1e-3).all()


@given(place=st.integers(1, LENGTH - 2), seed=st.integers(0, 50))
def test_a_visible_key_acts_on_every_later_position_and_on_no_earlier_one(place: int, seed: int) -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2, seed)
    changed = tokens.clone()
    changed[:, place - 1] = (changed[:, place - 1] + 1) % TINY.vocab_size
    with torch.no_grad():
        before = model(tokens[:, :-1], labels).logits
        after = model(changed[:, :-1], labels).logits
    torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-6, atol=1e-6)
    assert ((after[:, place:] - before[:, place:]).abs().amax(-1) > 1e-5).all()


def test_a_mask_acts_on_its_own_sequence_only() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[1, 2] = True
    with torch.no_grad():
        plain = model(tokens[:, :-1], labels).logits
        masked = model(tokens[:, :-1], labels, key_mask=mask).logits
    torch.testing.assert_close(masked[0], plain[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(masked[1, :2], plain[1, :2], rtol=1e-6, atol=1e-6)
    assert ((masked[1, 2:] - plain[1, 2:]).abs().amax(-1) > 1e-4).all()


def test_the_first_tokens_give_the_first_logits() -> None:
    model = random_model()
    tokens, labels = random_sequences(TINY, 2)
    mask = random_mask((2, LENGTH), 5)
    with torch.no_grad():
        whole = model(tokens[:, :-1], labels, key_mask=mask).logits
        for count in range(LENGTH - 1):
            part = model(tokens[:, :count], labels, key_mask=mask[:, : count + 1]).logits
            torch.testing.assert_close(part, whole[:, : count + 1], rtol=1e-5, atol=1e-5)


# Precision


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_autocast_is_close_to_float32(masked: bool) -> None:
    io = recorded("io/")
    model = recorded_model()
    mask = random_mask((4, 16), 6) if masked else None
    with torch.no_grad():
        exact = model(io["tokens"][:, :-1], io["labels"], key_mask=mask).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(io["tokens"][:, :-1], io["labels"], key_mask=mask).logits.float()
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_rms_norm_is_computed_in_float32_then_cast_then_scaled() -> None:
    norm = RMSNorm(6, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x).double(), expected * norm.weight.double())
    rounded = x.bfloat16()
    exact = rounded.float() / (rounded.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    scaled = RMSNorm(6, 1e-5).bfloat16()
    with torch.no_grad():
        scaled.weight.copy_(norm.weight)
    assert torch.equal(scaled(rounded), exact.bfloat16() * scaled.weight)
    huge = torch.full((1, 6), 6e4).half()  # its square is beyond half precision
    assert torch.equal(norm.half()(huge), norm.weight[None])


# Training-only randomness


@pytest.mark.parametrize("name", ["token_dropout", "residual_dropout", "ffn_dropout", "drop_path"])
def test_dropout_acts_in_training_only(name: str) -> None:
    model = random_model(replace(TINY, **{name: 0.5}))
    plain = random_model()
    tokens, labels = random_sequences(TINY, 4)
    with torch.no_grad():
        expected = plain(tokens[:, :-1], labels).logits
        assert torch.equal(model(tokens[:, :-1], labels).logits, expected)
        model.train()
        torch.manual_seed(0)
        first = model(tokens[:, :-1], labels).logits
        second = model(tokens[:, :-1], labels).logits
        torch.manual_seed(0)
        again = model(tokens[:, :-1], labels).logits
    assert not torch.allclose(first, expected)
    assert not torch.allclose(first, second)
    assert torch.equal(first, again)


def test_drop_path_drops_whole_sequences_and_keeps_the_mean() -> None:
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    y = DropPath(0.25).train()(x)
    per_sequence = y.flatten(1)
    assert torch.equal(per_sequence.amin(1), per_sequence.amax(1))
    torch.testing.assert_close(per_sequence[:, 0].unique(), torch.tensor([0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1, abs=0.04)  # 4 standard errors: sqrt(1/3 / 4000) is 0.009


def test_drop_path_drops_each_branch_of_a_block_on_its_own() -> None:
    block = random_model(replace(TINY, drop_path=0.5)).blocks()[-1].train()
    x = torch.randn(64, 3, TINY.dim, generator=torch.Generator().manual_seed(0))
    rope, bias = rope_table(3, TINY.head_dim, 10000.0)[:3], attention_bias(None, 3, x.dtype, x.device)
    torch.manual_seed(0)
    with torch.no_grad():
        y = block(x, rope, bias)
        attended = x + 2 * block.attention(block.attention_norm(x), rope, bias)  # what is kept counts 1 / (1 - p)
        outcomes = [
            base + share * block.feed_forward(block.ffn_norm(base)) for base in (x, attended) for share in (0, 2)
        ]
    matches = torch.stack([torch.isclose(y, outcome, atol=1e-4).flatten(1).all(1) for outcome in outcomes])
    assert (matches.sum(0) == 1).all()
    assert matches.any(1).all()


def test_drop_path_rises_linearly_from_0_to_the_last_block() -> None:
    model = Transformer(replace(TINY, drop_path=0.3))
    assert [block.drop_path.p for block in model.blocks()] == pytest.approx([0, 0.1, 0.2, 0.3])


# Initialisation


def test_initialisation_is_llamagens() -> None:
    torch.manual_seed(0)
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, vocab_size=512, grid=4, num_classes=100)
    model = Transformer(config)
    for name, value in model.named_parameters():
        if name == "output.weight":
            assert not value.any()
        elif "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            error = 4 * 0.02 / math.sqrt(2 * value.numel())
            assert value.std().item() == pytest.approx(0.02, abs=error), name
            assert value.mean().item() == pytest.approx(0, abs=4 * 0.02 / math.sqrt(value.numel())), name


def test_an_untrained_model_predicts_every_token_alike() -> None:
    tokens, labels = random_sequences(TINY, 2)
    model = Transformer(TINY)
    loss = next_token_loss(model(tokens[:, :-1], labels).logits, tokens)
    assert loss.item() == pytest.approx(math.log(TINY.vocab_size))


def test_nothing_has_a_bias_and_the_rotary_table_is_not_saved() -> None:
    model = Transformer(TINY)
    assert not [name for name in model.state_dict() if "bias" in name or "rope" in name]
    assert len(model.blocks()) == TINY.n_layers
    assert all(isinstance(block, Block) for block in model.blocks())


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
def test_labels_that_are_not_captions_of_the_model_are_refused(labels: Tensor) -> None:
    model, tokens = random_model(TINY_TEXT), random_sequences(TINY_TEXT, 2)[0]
    with pytest.raises(UserError, match=r"captions' features, floating \[B, 5, 6\]"):
        model(tokens[:, :-1], labels)
    with pytest.raises(UserError, match=r"captions' features, floating \[B, 5, 6\]"):
        generate(model, labels, cfg_scale=2.0)


# The null condition


def test_the_null_condition_replaces_the_captions_own_rows() -> None:
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
        decoder = CachedDecoder(model, 4, bucket=bucket)
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


def test_outputs_are_llamagens() -> None:
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
