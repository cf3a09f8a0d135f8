"""examples/: the Llama at a tiny size; LlamaGen's step on a stand-in of its interface and, where LLAMAGEN names a checkout, on itself."""

import importlib
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import st_ar
from st_ar.data.images import open_images
from st_ar.data.source import ImageSource
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.selfguided.guidance import sample_guidance
from tests.data.random_store import random_store
from tests.ranks import ROOT

CHECKOUT = os.environ.get("LLAMAGEN", "")
LINE = r"(AR|ST-AR) +step +(\d+)  next token (\S+)(?:  mim (\S+)  step (\S+)  view (\S+))?"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(name)


# A Hugging Face Llama


def few(spec: str) -> ImageSource:
    """Every 100th photograph."""
    source = open_images(spec)
    kept = list(source.examples(0))[::100]
    return replace(source, count=len(kept), examples=lambda start: iter(kept[start:]))


def test_the_llama_trains_and_is_probed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    llama = example("llama", monkeypatch)
    monkeypatch.setattr(llama, "open_images", few)
    llama.main(["--steps", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out.splitlines()
    lines = [found.groups() for line in printed if (found := re.fullmatch(LINE, line))]
    assert [(name, step) for name, step, *_ in lines] == [(name, s) for name in ("AR", "ST-AR") for s in ("1", "3")]
    losses = [[float(loss) for loss in numbers if loss is not None] for _, _, *numbers in lines]
    assert [len(each) for each in losses] == [1, 1, 4, 4]
    assert all(math.isfinite(loss) for each in losses for loss in each)
    assert losses[0][0] == pytest.approx(math.log(273), abs=0.1)  # untrained: uniform over codes and classes
    assert losses[1][0] < losses[0][0]
    assert losses[3][0] < losses[2][0]
    assert losses[2][2] == pytest.approx(math.log(32), abs=2)  # as many negatives as images
    images = len(TokenStore(tmp_path / "tokens-test"))
    probed = [re.fullmatch(r"(AR|ST-AR) +linear probe: (\S+) % of (\d+) test images", line) for line in printed]
    assert [(found[1], int(found[3])) for found in probed if found] == [("AR", images), ("ST-AR", images)]
    assert all(20 < float(found[2]) <= 100 for found in probed if found)  # chance is 6 %


# LlamaGen's transformer


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[:, 0])


class StandIn(nn.Module):
    """The interface of LlamaGen's Transformer: positions looked up by `input_pos` in evaluation mode, its head zero at first."""

    def __init__(self, *, vocab_size: int = 16, length: int = 16, num_classes: int = 3, dim: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(dim=dim, num_classes=num_classes)
        self.cls_embedding, self.tok_embeddings = nn.Embedding(num_classes + 1, dim), nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(4))
        self.output, self.places = nn.Linear(dim, vocab_size, bias=False), torch.randn(length, dim)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        idx: Tensor,
        cond_idx: Tensor,
        input_pos: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        h = torch.cat([self.cls_embedding(cond_idx)[:, None], self.tok_embeddings(idx)], dim=1)
        h = h + (self.places[: h.shape[1]] if self.training else self.places[input_pos].view(h.shape[1:]))
        for layer in self.layers:
            h = layer(h, mask)
        logits = self.output(h)
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.view(-1))


class Deaf(StandIn):
    """It takes a mask and does not heed it."""

    def forward(self, *given: Tensor, mask: Tensor | None = None, **named: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(*given, **named)


def make(kind: str) -> nn.Module:
    if kind == "stand-in":
        return StandIn()
    models = importlib.import_module("autoregressive.models.gpt")
    return models.Transformer(
        models.ModelArgs(dim=16, n_layer=4, n_head=2, vocab_size=16, block_size=16, num_classes=3, cls_token_num=1)
    )


needs_llamagen = pytest.mark.skipif(
    not CHECKOUT, reason="the project does not hold LlamaGen: LLAMAGEN names a checkout"
)
LLAMAGENS = ["stand-in", pytest.param("LlamaGen", marks=needs_llamagen)]


@pytest.mark.parametrize("kind", LLAMAGENS)
def test_llamagens_step_trains_model_projector_and_teacher(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    llamagen = example("llamagen", monkeypatch)
    monkeypatch.syspath_prepend(CHECKOUT)
    store = TokenStore(random_store(tmp_path / "tokens")[0])
    torch.manual_seed(0)
    model = make(kind)
    tokens = torch.from_numpy(
        store.codes(torch.arange(8).numpy(), torch.arange(2).expand(8, 2).numpy()).astype("int64")
    )
    labels = torch.from_numpy(store.labels[:8])
    llamagen.check(model, tokens[:2, 0])
    assert model.training
    config = st_ar.SelfGuidedConfig(projector_hidden=16)
    guidance, teacher = st_ar.SelfGuidance(model.config.dim, config), st_ar.EMATeacher(model)
    optimizer = torch.optim.AdamW([*model.parameters(), *guidance.parameters()], lr=1e-2)

    # The step's losses are those of the features that the same mask and positions give.
    model.train(False)  # no dropout
    sample = sample_guidance(config, (8, 2, 16), seed=0, step=1)
    loss, features = llamagen.run(model, tokens, labels, sample.key_mask)
    expected = guidance(features, llamagen.run(teacher.model, tokens, labels)[1], sample)
    before, followed = model.layers[0].state_dict(), teacher.model.layers[0].state_dict()
    before, followed = ({name: w.clone() for name, w in each.items()} for each in (before, followed))
    losses = llamagen.train_step(model, guidance, teacher, optimizer, tokens, labels, 1)
    assert losses == {
        "next token": pytest.approx(loss.item()),
        "mim": pytest.approx(expected.mim.item()),
        "step": pytest.approx(expected.step.item()),
        "view": pytest.approx(expected.view.item()),
    }
    assert losses["next token"] == pytest.approx(math.log(16))
    assert losses["mim"] > 1e-4  # the mask changes the student's features
    for name, weight in model.layers[0].named_parameters():
        assert not torch.equal(weight, before[name]), name
        moved = followed[name].lerp(weight, 1 - 2 / 11)  # the decay of step 1
        torch.testing.assert_close(teacher.model.layers[0].get_parameter(name), moved)
    model.train()
    for step in range(2, 40):
        losses = llamagen.train_step(model, guidance, teacher, optimizer, tokens, labels, step)
    assert losses["next token"] < 0.95 * math.log(16)
    assert losses["view"] < 0.8 * expected.view.item()


def test_a_llamagen_that_does_not_heed_its_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llamagen = example("llamagen", monkeypatch)
    with pytest.raises(UserError, match="does not honour the key mask"):
        llamagen.check(Deaf(), torch.randint(16, (2, 16)))


def test_what_is_no_checkout_of_llamagen_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    llamagen = example("llamagen", monkeypatch)
    store, *_ = random_store(tmp_path / "tokens")
    with pytest.raises(UserError, match=r"is not a checkout of LlamaGen: it has no autoregressive/models/gpt.py"):
        llamagen.main(["--llamagen", str(tmp_path), "--tokens", str(store), "--out", str(tmp_path / "x.pt")])


# The change to LlamaGen's scripts that docs/own-model.md shows


def diff_of_the_docs() -> str:
    page = (ROOT / "docs/own-model.md").read_text(encoding="utf-8")
    return page.split("```diff\n")[1].split("```")[0]


def test_the_change_to_llamagens_scripts_is_short() -> None:
    added = [line[1:] for line in diff_of_the_docs().splitlines() if line.startswith("+") and line[:3] != "+++"]
    assert len(added) < 30
    start = added.index("def run(model, layers, x, y, key_mask=None):")
    made = {"torch": torch, "st_ar": st_ar}
    exec("\n".join(added[start : start + 7]), made)
    model, tokens = StandIn(), torch.randint(16, (3, 2, 16))
    loss, features = made["run"](model, model.layers, tokens, torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(16))
    assert {name: each.shape for name, each in features.items()} == dict.fromkeys(("mid", "last"), (3, 2, 16, 8))


@needs_llamagen
def test_the_change_applies_to_a_checkout_of_llamagen() -> None:
    given = {"input": diff_of_the_docs(), "text": True, "cwd": CHECKOUT}
    subprocess.run(["git", "apply", "--unidiff-zero", "--check"], check=True, **given)
