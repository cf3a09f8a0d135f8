"""Self-guidance of networks that are not ours: the same losses and gradients as our trainer's, captured features, and refusals."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import st_ar
from st_ar.config import SelfGuidedConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.model.transformer import Transformer
from st_ar.selfguided.guidance import NO_GUIDANCE, EMATeacher
from st_ar.selfguided.objective import SelfGuided
from st_ar.training.loop import Learner, forward_backward
from tests.data.random_store import random_store
from tests.toys import TINY, random_model

CONFIG = SelfGuidedConfig(positions=3, projector_hidden=8, ema_decay=0.9, mask_ratio=0.4)
IMAGES, VIEWS, LENGTH = 4, 2, TINY.sequence_length
SHAPE = (IMAGES, VIEWS, LENGTH)


class Wrapped(nn.Module):
    """A Hugging Face Llama with the weights of our transformer: a class token before the image's tokens."""

    def __init__(self, ours: Transformer) -> None:
        transformers = pytest.importorskip("transformers")
        super().__init__()
        config = ours.config
        self.llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=config.dim,
                intermediate_size=config.hidden_dim,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                vocab_size=config.vocab_size,
                rms_norm_eps=config.norm_eps,
                attn_implementation="sdpa",
            )
        )
        self.classes = nn.Embedding(config.num_classes + 1, config.dim)
        body, weights = self.llama.model, ours.state_dict()
        self.classes.weight.data.copy_(weights["cls_embedding.embedding_table.weight"])
        body.embed_tokens.weight.data.copy_(weights["tok_embeddings.weight"])
        body.norm.weight.data.copy_(weights["norm.weight"])
        self.llama.lm_head.weight.data.copy_(weights["output.weight"])
        for number, layer in enumerate(body.layers):
            mine = {
                name.removeprefix(f"layers.{number}."): w for name, w in weights.items() if f"layers.{number}." in name
            }
            q, k, v = mine["attention.wqkv.weight"].chunk(3)
            pairs: dict[str, Tensor] = {
                "self_attn.q_proj": halves(q, config.n_heads),
                "self_attn.k_proj": halves(k, config.n_heads),
                "self_attn.v_proj": v,
                "self_attn.o_proj": mine["attention.wo.weight"],
                "mlp.gate_proj": mine["feed_forward.w1.weight"],
                "mlp.up_proj": mine["feed_forward.w3.weight"],
                "mlp.down_proj": mine["feed_forward.w2.weight"],
                "input_layernorm": mine["attention_norm.weight"],
                "post_attention_layernorm": mine["ffn_norm.weight"],
            }
            for name, weight in pairs.items():
                layer.get_submodule(name).weight.data.copy_(weight)
        body.rotary_emb = Rotary(ours.rope)

    def forward(self, tokens: Tensor, labels: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens [B, M, T] and labels [B] -> logits [B M, T, V]."""
        flat, classes = tokens.flatten(0, 1), labels.repeat_interleave(tokens.shape[1])
        inputs = torch.cat([self.classes(classes)[:, None], self.llama.model.embed_tokens(flat[:, :-1])], dim=1)
        mask = torch.zeros(flat.shape, dtype=torch.bool) if key_mask is None else key_mask.flatten(0, 1)
        return self.llama(inputs_embeds=inputs, attention_mask=st_ar.attention_mask(mask), use_cache=False).logits


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of interleaved pairs as Hugging Face has them: all first members, then all second ones."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Rotary(nn.Module):
    """Our two-dimensional rotary table in the place of Llama's."""

    def __init__(self, rope: Tensor) -> None:
        super().__init__()
        self.register_buffer("rope", rope.clone(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self.rope[: x.shape[1]].unbind(-1)
        return torch.cat([cosine, cosine], -1)[None], torch.cat([sine, sine], -1)[None]


LAYERS = {
    "ours": {"mid": "layers.1", "last": "layers.3"},
    "llama": {"mid": "llama.model.layers.1", "last": "llama.model.layers.3"},
}


class Ours(nn.Module):
    """Our transformer as somebody else's network: it returns logits and no features."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.layers, self.model = (
            model.layers,
            [model],
        )  # the parameters under other names, those outside the blocks hidden

    def forward(self, tokens: Tensor, labels: Tensor, key_mask: Tensor | None = None) -> Tensor:
        classes = labels.repeat_interleave(tokens.shape[1])
        mask = None if key_mask is None else key_mask.flatten(0, 1)
        return self.model[0](tokens.flatten(0, 1)[:, :-1], classes, key_mask=mask).logits


def run(
    kind: str, network: nn.Module, tokens: Tensor, labels: Tensor, mask: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The next-token loss and the features [B, M, T, D]."""
    with st_ar.capture(network, LAYERS[kind]) as features:
        logits = network(tokens, labels, mask)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    return loss, {name: each.unflatten(0, tokens.shape[:2]) for name, each in features.items()}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TINY.vocab_size, SHAPE, generator=generator), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, mask_own_position=False, reduction="sum"), replace(CONFIG, alpha=0.0)]
)
def test_losses_and_gradients_are_our_trainers(kind: str, config: SelfGuidedConfig) -> None:
    tokens, labels = batch()
    torch.manual_seed(3)
    student = SelfGuided(random_model(seed=0), config, seed=5).train()
    teacher = EMATeacher(random_model(seed=1))
    sample = student.sample(SHAPE, 7)
    expected = forward_backward(Learner(student, teacher, 1, torch.float32), tokens, labels, sample)

    wrap = Wrapped if kind == "llama" else Ours
    model, target = random_model(seed=0), random_model(seed=1)
    network, followed = wrap(model), EMATeacher(wrap(target))
    guidance = st_ar.SelfGuidance(TINY.dim, config, seed=5)
    guidance.load_state_dict({n: w for n, w in student.state_dict().items() if n.startswith("projector.")})
    own = guidance.sample(SHAPE, 7)
    assert all(torch.equal(a, b) for a, b in zip(own, sample, strict=True) if a is not None and b is not None)
    with torch.no_grad():
        targets = run(kind, followed.model, tokens, labels, None)[1]
    loss, features = run(kind, network, tokens, labels, own.key_mask)
    terms = guidance(features, targets, own)
    (loss + terms.total).backward()

    tolerance = {"rtol": 0, "atol": 0} if kind == "ours" else {"rtol": 1e-5, "atol": 1e-6}
    for found, wanted in ((terms.mim, expected.mim), (terms.step, expected.step), (terms.view, expected.view)):
        torch.testing.assert_close(found, wanted, **tolerance)
    torch.testing.assert_close(
        loss + terms.total, expected.total, rtol=1e-5, atol=1e-6
    )  # our trainer sums the loss in chunks
    for ours, theirs in zip(guidance.parameters(), student.projector.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    wanted_grad = student.model.layers[0].feed_forward.w1.weight.grad
    found_layer = network.llama.model.layers[0].mlp.gate_proj if kind == "llama" else model.layers[0].feed_forward.w1
    torch.testing.assert_close(found_layer.weight.grad, wanted_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_faces_decoders_honour_the_mask(attention: str) -> None:
    network = Wrapped(random_model()).eval()
    network.llama.set_attn_implementation(attention)

    def features(tokens: Tensor, mask: Tensor) -> Tensor:
        return network(tokens[:, None], torch.zeros(len(tokens), dtype=torch.int64), mask[:, None])

    st_ar.require_key_mask(features, batch()[0][:, 0])


def test_a_mask_that_does_nothing_is_refused() -> None:
    network = Wrapped(random_model()).eval()
    tokens, labels = batch()[0][:, 0], torch.zeros(IMAGES, dtype=torch.int64)
    with pytest.raises(
        UserError, match="the network does not honour the key mask: a masked token changes other positions"
    ):
        st_ar.require_key_mask(lambda tokens, mask: network(tokens[:, None], labels), tokens)
    with pytest.raises(UserError, match="the features do not depend on the tokens"):
        st_ar.require_key_mask(lambda tokens, mask: torch.ones(IMAGES, LENGTH, 3), tokens)


# The teacher


class Norms(nn.Module):
    """Tied weights, a buffer that training changes, and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.norm = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(3)
        self.head.weight = self.embed.weight


def test_the_teacher_follows_any_module() -> None:
    torch.manual_seed(0)
    model = Norms()
    teacher = EMATeacher(model, decay=0.75, warmup=False)
    before = teacher.model.embed.weight.clone()
    with torch.no_grad():
        model.embed.weight.normal_()
    model.norm(torch.randn(7, 3))
    assert teacher.update(model, 1) == 0.75
    torch.testing.assert_close(teacher.model.embed.weight, 0.75 * before + 0.25 * model.embed.weight)
    assert teacher.model.head.weight is teacher.model.embed.weight
    assert torch.equal(teacher.model.norm.running_mean, model.norm.running_mean)
    assert int(teacher.model.norm.num_batches_tracked) == 1
    assert not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(UserError, match="are not those that the teacher was copied from"):
        teacher.update(nn.Linear(2, 3), 2)


# Capture


def test_features_are_captured_with_gradients_and_the_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with st_ar.capture(model, {"mid": "0", "last": model[2]}) as features:
        out = model(torch.ones(1, 3))
    assert features["last"] is out
    features["mid"].sum().backward()
    assert model[0].weight.grad is not None
    kept = dict(features)
    model(torch.zeros(1, 3))
    assert features == kept


def test_modules_that_cannot_be_captured_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    unknown = st_ar.capture(model, {"mid": "blocks.3"})
    with pytest.raises(UserError, match=r"no module 'blocks.3': give a name of named_modules\(\), such as \['1'\]"):
        unknown.__enter__()

    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    model = nn.Sequential(Dictionary())
    with (
        st_ar.capture(model, {"mid": "0"}),
        pytest.raises(UserError, match="module '0' returns dict: give one that returns a tensor"),
    ):
        model(torch.ones(1))


# Refusals


def features_of(shape: tuple[int, ...], **changed: Any) -> dict[str, Tensor]:
    return {"mid": torch.ones(shape), "last": torch.ones(shape)} | changed


@pytest.mark.parametrize(
    ("student", "teacher", "match"),
    [
        (
            features_of((4, 2, 9, 16)),
            features_of((4, 2, 8, 16)),
            r"'last' are \[4, 2, 9, 16\] and the teacher's \[4, 2, 8, 16\]",
        ),
        (features_of((8, 9, 16)), features_of((8, 9, 16)), r"give \[B, M, T, D\] with any D"),
        (features_of((4, 2, 9, 12)), features_of((4, 2, 9, 12)), r"'mid' are .* give \[B, M, T, D\] with D of 16"),
        (
            {"last": torch.ones(4, 2, 9, 16)},
            features_of((4, 2, 9, 16)),
            "features 'mid' are missing: give both networks'",
        ),
        (
            features_of((4, 2, 9, 16)),
            features_of((4, 2, 9, 16), mid=torch.ones(4, 2, 9, 16, requires_grad=True)),
            "carry gradients: compute them under torch.no_grad",
        ),
        (features_of((1, 2, 9, 16)), features_of((1, 2, 9, 16)), "needs negatives, and the batch has one image"),
    ],
)
def test_features_that_do_not_fit_are_refused(
    student: dict[str, Tensor], teacher: dict[str, Tensor], match: str
) -> None:
    guidance = st_ar.SelfGuidance(16, CONFIG)
    with pytest.raises(UserError, match=match):
        guidance(student, teacher, guidance.sample((4, 2, 9), 1))


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((4, 1, 9), "the inter-view loss compares views, and there is 1"),
        ((4, 2, 2), "3 positions from position 0 on are more than the 2"),
        ((4, 9), r"tokens of shape \[4, 9\] have no views: give \[B, M, T\]"),
    ],
)
def test_batches_that_do_not_fit_the_settings_are_refused(shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        st_ar.SelfGuidance(16, CONFIG).sample(shape, 1)


def test_a_mask_of_views_is_refused() -> None:
    with pytest.raises(UserError, match=r"not torch.bool \[2, 2, 3, 3\]: flatten its views with flatten\(0, 1\)"):
        st_ar.attention_mask(torch.zeros(2, 2, 3, 3, dtype=torch.bool))


# Random choices


def test_samples_depend_on_seed_and_step_alone() -> None:
    first, second = (st_ar.SelfGuidance(16, CONFIG, seed=seed) for seed in (1, 2))
    torch.manual_seed(9)
    sample = first.sample(SHAPE, 3)
    for other, same in (
        (first.sample(SHAPE, 3), True),
        (first.sample(SHAPE, 4), False),
        (second.sample(SHAPE, 3), False),
    ):
        assert torch.equal(other.key_mask, sample.key_mask) == same
    assert sample.key_mask is not None
    share = first.sample(SHAPE, 3, images=slice(1, 3))
    assert torch.equal(share.key_mask, sample.key_mask[1:3])


def test_plain_steps_add_nothing() -> None:
    guidance = st_ar.SelfGuidance(16, replace(CONFIG, every=2, until=0.5))
    assert [guidance.sample(SHAPE, step, total=8) == NO_GUIDANCE for step in range(1, 7)] == [
        False,
        True,
        False,
        True,
        True,
        True,
    ]
    features = {"mid": torch.ones(4, 2, 9, 16)}  # "last" is for MIM, and a plain step needs neither
    terms = guidance(features, {}, NO_GUIDANCE)
    assert terms.total.item() == 0
    terms.total.backward()  # DDP expects a gradient for each weight of the projector
    assert all(p.grad is not None for p in guidance.parameters())


# Probes


class Colours:
    """A function of no network: how often each code occurs, which a linear probe reads perfectly for these labels."""

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.one_hot(tokens, 4).float().mean(1)


@pytest.mark.parametrize("method", ["mae", "ridge"])
def test_any_function_can_be_probed(method: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    tokens = torch.where(torch.rand(400, 9, generator=generator) < 0.8, labels[:, None], 0)
    train, test = (tokens[:300], labels[:300]), (tokens[300:], labels[300:])
    result = st_ar.probe(Colours(), train, test, method=method)
    assert (result.train_images, result.test_images, result.steps) == (300, 100, [1])
    assert result.top1[0] > 0.95
    stepped = st_ar.probe(lambda tokens: F.one_hot(tokens, 4).float(), train, test, method="ridge", batch_size=64)
    assert len(stepped.top1) == 9
    assert all(0.6 < share < 0.95 for share in stepped.top1)
    for wrong in (lambda tokens: torch.ones(3, 2), lambda tokens: torch.full((len(tokens), 2), math.nan)):
        with pytest.raises(UserError, match=r"must be \[b, D\]|hold NaN"):
            st_ar.probe(wrong, train, test)
    with pytest.raises(UserError, match="give two stores, or two pairs of tokens and labels"):
        st_ar.probe(Colours(), TokenStore(random_store(tmp_path / "store", images=4)[0]), test)
    with pytest.raises(UserError, match="layer and steps are for a Transformer"):
        st_ar.probe(Colours(), train, test, layer=1)
