"""LlamaGen's files of weights load here, ours load there, and nothing in them is run."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from st_ar import load_model
from st_ar.cli.train import convert
from st_ar.model.transformer import Transformer
from st_ar.model.weights import HEADS, infer_config, open_model, save_export, save_llamagen
from st_ar.presets import get_preset
from tests.disk import contents, refused
from tests.small_line import random_tokenizer
from tests.toys import FIXTURES, NO_DROPOUT, TINY, TINY_TEXT, random_captions, random_model, random_sequences

INFO = {"step": 7, "preset": "toy", "class_names": ["a", "b", "c"], "tokenizer": "abc"}


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    """Weights of LlamaGen-B's shape, small classes and codebook to be quick; heads are known from width and depth."""
    with torch.device("meta"):
        shapes = {
            key: list(value.shape) for key, value in Transformer(get_preset("llamagen-b").model).state_dict().items()
        }
    shapes["cls_embedding.embedding_table.weight"][0] = 4
    shapes["tok_embeddings.weight"][0] = shapes["output.weight"][0] = 32
    torch.manual_seed(0)
    return {key: torch.randn(shape) * 0.02 for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, ""), ("model", ""), ("module", "module."), ("state_dict", "_orig_mod."), ("model", "module._orig_mod.")],
)
def test_a_file_of_llamagens_loads(
    tmp_path: Path, base: dict[str, torch.Tensor], wrapper: str | None, prefix: str
) -> None:
    named: dict[str, Any] = {prefix + key: value.bfloat16() for key, value in base.items()}
    named[prefix + "freqs_cis"] = torch.zeros(257, 32, 2)
    args = argparse.Namespace(gpt_model="GPT-B", lr=1e-4)
    torch.save(named if wrapper is None else {wrapper: named, "args": args, "steps": 5}, tmp_path / "c2i_B_256.pt")
    model, info = open_model(tmp_path / "c2i_B_256.pt")
    assert (info.config.n_heads, info.config.grid, info.config.vocab_size, info.config.num_classes) == (12, 16, 32, 3)
    assert not model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, base[key].bfloat16().float()), key


def test_every_published_size_is_recognised() -> None:
    for name in ("b", "l", "xl", "xxl", "3b", "xl-t2i"):
        config = get_preset(f"llamagen-{name}").model
        with torch.device("meta"):
            tensors = Transformer(config).state_dict()
        assert infer_config(tensors, Path(name)) == config


def test_a_size_that_is_not_llamagens_needs_its_config(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict()}, tmp_path / "odd.pt")
    with refused(tmp_path, r"width 16 and 4 layers.*768 x 12"):
        load_model(tmp_path / "odd.pt")


def test_a_file_of_llamagens_for_captions_loads_and_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, (16, 4), 2)
    config = replace(TINY_TEXT, grid=16)
    theirs = random_model(config).state_dict()
    torch.save({"model": {**theirs, "freqs_cis": torch.zeros(261, 4, 2)}}, tmp_path / "t2i.pt")
    model, info = open_model(tmp_path / "t2i.pt")
    dropouts = dict.fromkeys(NO_DROPOUT, 0.1)  # LlamaGen's, which no file holds
    assert info.config == replace(config, **dropouts)
    smaller = load_model(tmp_path / "t2i.pt", grid=3)
    tokens, captions = random_sequences(TINY_TEXT, 2)[0], random_captions(TINY_TEXT, [3, 5])
    with torch.no_grad():
        found = smaller(tokens[:, :-1], captions).logits
        assert torch.equal(found, random_model(TINY_TEXT)(tokens[:, :-1], captions).logits)
    convert(tmp_path / "t2i.pt", tmp_path / "larger", to="st-ar", grid=24)
    assert open_model(tmp_path / "larger")[1].config == replace(info.config, grid=24)
    assert "captions of 5 x 6 features" in convert(tmp_path / "t2i.pt", tmp_path / "ours", to="st-ar")
    convert(tmp_path / "ours", tmp_path / "back.pt", to="llamagen")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.items())


def test_an_export_keeps_the_captions_encoder_and_how_many_went_without(tmp_path: Path) -> None:
    model = random_model(TINY_TEXT)
    save_export(tmp_path / "export", model, model, INFO | {"encoder": "t5", "class_dropout": 0.25})
    convert(tmp_path / "export", tmp_path / "copy", to="st-ar")
    again, info = open_model(tmp_path / "copy")
    assert (info.encoder, info.class_dropout, info.config) == ("t5", 0.25, TINY_TEXT)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_an_export_from_before_there_were_captions_is_a_class_models(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path, model, model, INFO)
    card = json.loads((tmp_path / "config.json").read_text())
    for name in ("condition", "text_tokens", "text_dim"):
        del card["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(card))
    assert open_model(tmp_path)[1].config == TINY


@pytest.mark.parametrize("held", [{}, {"model": {}}, {"steps": 3}, [1, 2], {"model": {"lr": 0.1}}])
def test_a_file_without_weights_is_refused(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "empty.pt")
    with refused(tmp_path, "holds no weights"):
        load_model(tmp_path / "empty.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict()}, tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with refused(tmp_path, r"cut\.pt (is damaged or incomplete|was refused)"):
        load_model(tmp_path / "cut.pt")


class Trap:
    """A pickle that would make a folder when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict(), "args": Trap(tmp_path / "sprung")}, tmp_path / "evil.pt")
    with refused(tmp_path, r"evil\.pt was refused.*could run code.*mkdir"):
        load_model(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_weights_run_at_another_size(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path, model, model, INFO)
    larger = load_model(tmp_path, grid=5)
    tokens, labels = random_sequences(larger.config, 2)
    with torch.no_grad():
        assert larger(tokens[:, :-1], labels).logits.shape == (2, 25, TINY.vocab_size)
        # the first row of the larger grid has the same positions as the first row of the smaller one
        first = load_model(tmp_path)(tokens[:, :2], labels).logits
        torch.testing.assert_close(larger(tokens[:, :2], labels).logits, first)


def test_there_and_back_again(tmp_path: Path, base: dict[str, torch.Tensor]) -> None:
    torch.save({"model": base}, tmp_path / "theirs.pt")
    assert "layers" in convert(tmp_path / "theirs.pt", tmp_path / "ours", to="st-ar")
    convert(tmp_path / "ours", tmp_path / "back.pt", to="llamagen")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == base.keys()
    assert all(torch.equal(back[key], value) for key, value in base.items())


@pytest.mark.parametrize("layout", ["B c2i", "L c2i", "XL c2i", "XXL c2i", "3B c2i", "XL t2i"])
def test_exported_files_have_the_names_and_shapes_that_llamagen_reads(tmp_path: Path, layout: str) -> None:
    preset = f"llamagen-{layout.lower().removesuffix(' c2i').replace(' ', '-')}"
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in Transformer(get_preset(preset).model).state_dict().items()}
    save_llamagen(tmp_path / "ours.pt", {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    saved = torch.load(tmp_path / "ours.pt", weights_only=True)
    theirs = json.loads((FIXTURES / "llamagen_layouts.json").read_text())[f"GPT-{layout} 256"]
    assert saved.keys() == {"model"}
    assert {key: list(value.shape) for key, value in saved["model"].items()} == theirs
    # What their vLLM loader joins; it looks for nothing else by name and ignores what it lacks
    for layer in range(get_preset(preset).model.n_layers):
        joined = [saved["model"][f"layers.{layer}.feed_forward.{name}.weight"].shape for name in ("w1", "w3")]
        assert joined[0] == joined[1]


def test_averaged_weights_are_exported_by_asking(tmp_path: Path) -> None:
    live, averaged = random_model(seed=1), random_model(seed=2)
    save_export(tmp_path / "export", live, averaged, INFO)
    convert(tmp_path / "export", tmp_path / "live.pt", to="llamagen")
    convert(tmp_path / "export", tmp_path / "ema.pt", to="llamagen", ema=True)
    for name, model in (("live.pt", live), ("ema.pt", averaged)):
        saved = torch.load(tmp_path / name, weights_only=True)["model"]
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_a_target_that_exists_or_has_the_wrong_form_is_refused(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path / "export", model, model, INFO)
    (tmp_path / "there.pt").write_text("mine")
    random_tokenizer().save(tmp_path / "tokenizer")
    before = contents(tmp_path)
    for target, to, message in (
        ("there.pt", "llamagen", "exists already"),
        ("export", "st-ar", "exists already"),
        ("folder", "llamagen", r"ends in \.pt"),
        ("file.pt", "st-ar", "folder's name"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "export", tmp_path / target, to=to)
    with pytest.raises(ValueError, match="keep no grid: --grid is for --to st-ar"):
        convert(tmp_path / "export", tmp_path / "model.pt", to="llamagen", grid=24)
    for option in ({"ema": True}, {"grid": 24}):
        with pytest.raises(ValueError, match="is a tokenizer: leave out --ema and --grid"):
            convert(tmp_path / "tokenizer", tmp_path / "vq", to="st-ar", **option)
    assert contents(tmp_path) == before
