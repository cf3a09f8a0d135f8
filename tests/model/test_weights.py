"""Weights on disk: what is saved is loaded, and whatever is not a model of ours is refused with the remedy."""

import argparse
import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_ar import load_model
from st_ar.cli.train import Convert
from st_ar.model.transformer import Transformer
from st_ar.model.weights import HEADS, exported_step, infer_config, open_model, save_llamagen
from st_ar.presets import get_preset
from tests.disk import contents, flip_byte, full_disk, refused
from tests.small_line import random_tokenizer
from tests.toys import (
    FIXTURES,
    NO_DROPOUT,
    TINY,
    TINY_TEXT,
    random_captions,
    random_model,
    random_sequences,
    save_export,
)

INFO = {"step": 7, "preset": "st-ar-toy", "class_names": ["cat", "dog", "owl"], "tokenizer": "abc123"}
LIVE, AVERAGED = random_model(seed=1), random_model(seed=2)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The export folder of a run."""
    save_export(tmp_path / "run" / "export", LIVE, AVERAGED, INFO)
    return tmp_path / "run" / "export"


def edit(export: Path, **changes: object) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | changes))


def assert_same(model: Transformer, expected: Transformer) -> None:
    """Equal in every weight, and in what is computed with them."""
    found, wanted = model.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    tokens, labels = random_sequences(TINY, 2)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1], labels).logits, expected(tokens[:, :-1], labels).logits)


@pytest.mark.parametrize("given", [".", "..", "model.safetensors"])
def test_a_run_an_export_or_a_file_is_the_live_model(export: Path, given: str) -> None:
    model, info = open_model(export / given)
    assert_same(model, LIVE)
    assert not model.training
    assert (info.step, info.class_names, info.tokenizer, info.ema) == (7, ["cat", "dog", "owl"], "abc123", False)
    assert info.config == TINY
    assert info.source.resolve() == export / "model.safetensors"


@pytest.mark.parametrize("given", [".", "..", "model.safetensors", "ema.safetensors"])
def test_ema_weights_are_loaded_on_request(export: Path, given: str) -> None:
    model, info = open_model(export / given, ema=True)
    assert_same(model, AVERAGED)
    assert info.ema
    assert info.source.resolve() == export / "ema.safetensors"


def test_a_path_may_be_a_string(export: Path) -> None:
    assert_same(load_model(str(export)), LIVE)


def test_ema_of_a_file_that_has_none_is_refused_and_not_ignored(export: Path) -> None:
    (export / "model.safetensors").rename(export / "mine.safetensors")
    (export / "ema.safetensors").unlink()
    assert_same(load_model(export / "mine.safetensors"), LIVE)
    with refused(export, "ema"):
        load_model(export / "mine.safetensors", ema=True)


def test_weights_in_half_precision_are_loaded_in_float32(export: Path) -> None:
    halves = {key: value.bfloat16() for key, value in LIVE.state_dict().items()}
    save_file(halves, export / "model.safetensors")
    model = load_model(export)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for key, value in model.state_dict().items():
        assert torch.equal(value, halves[key].float()), key


def test_saving_again_replaces_the_whole_export(export: Path) -> None:
    save_export(export, AVERAGED, LIVE, INFO | {"step": 8})
    assert_same(load_model(export), AVERAGED)
    assert_same(load_model(export, ema=True), LIVE)
    assert open_model(export)[1].step == 8
    assert sorted(contents(export)) == ["config.json", "ema.safetensors", "model.safetensors"]


def test_the_same_weights_give_the_same_bytes(export: Path) -> None:
    # Runs are compared by their files' checksums; a header in no fixed order would make them differ now and then.
    expected = contents(export)
    for again in range(8):
        save_export(export.parent / str(again), LIVE, AVERAGED, INFO)
        assert contents(export.parent / str(again)) == expected


def test_a_full_disk_leaves_the_previous_export_and_says_so(export: Path) -> None:
    with full_disk(1000), refused(export, r"cannot write .*model\.safetensors: .*File too large"):
        save_export(export, AVERAGED, LIVE, INFO)
    assert_same(load_model(export), LIVE)


def test_a_missing_path_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere does not exist; give a run, an export folder, a .safetensors or LlamaGen .pt file"):
        load_model(tmp_path / "nowhere")


def test_a_folder_of_other_things_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused(tmp_path, r"is not a model: .*give a run or an export folder"):
        load_model(tmp_path)


def test_a_run_before_its_first_checkpoint_says_when_there_will_be_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with refused(tmp_path, r"has no weights yet: .*first checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "notes.txt"])
def test_other_files_are_refused_without_being_opened(export: Path, name: str) -> None:
    (export / name).write_bytes(b"\x80\x04.")
    with refused(export, rf"{name} is not a \.safetensors or \.pt file; give a run, an export folder or a file"):
        load_model(export / name)


def test_a_file_without_its_config_is_refused_unless_its_size_is_llamagens(export: Path) -> None:
    (export / "config.json").unlink()
    with refused(export, r"width 16 and 4 layers: without a config\.json beside it only LlamaGen's own sizes"):
        load_model(export / "model.safetensors")


@pytest.mark.parametrize("left", [0, 7, 100, 0.5, -1])
@pytest.mark.parametrize("ema", [False, True])
def test_truncated_weights_are_refused_with_the_remedy(export: Path, left: float, ema: bool) -> None:
    file = export / ("ema.safetensors" if ema else "model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: round(left * len(whole)) if left == 0.5 else int(left)])
    with refused(export, rf"{file.name} is damaged \(.*\): .*export it again from its run"):
        load_model(export, ema=ema)


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_format_is_refused_with_the_one_that_is_read(export: Path, version: int | None) -> None:
    edit(export, format_version=version)
    with refused(export, rf"config\.json has format {version}; this st-ar reads 1"):
        load_model(export)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_a_damaged_config_is_refused(export: Path, text: str) -> None:
    (export / "config.json").write_text(text, encoding="latin-1")
    with refused(export, r"config\.json .*damaged"):
        load_model(export)


def model_settings(export: Path) -> dict[str, object]:
    return json.loads((export / "config.json").read_text())["model"]


def test_a_setting_of_a_newer_version_is_named(export: Path) -> None:
    edit(export, model=model_settings(export) | {"experts": 8})
    with refused(export, r"config\.json: unknown settings \['experts'\]; was it written by a newer version"):
        load_model(export)


def test_a_missing_setting_is_named(export: Path) -> None:
    settings = model_settings(export)
    del settings["dim"]
    edit(export, model=settings)
    with refused(export, r"config\.json: .*'dim'"):
        load_model(export)


@pytest.mark.parametrize("model", [None, [], "tiny", {"dim": "16", "n_layers": 4, "n_heads": 2}])
def test_a_config_whose_model_makes_no_sense_is_refused(export: Path, model: object) -> None:
    edit(export, model=model)
    with refused(export, r"config\.json"):
        load_model(export)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 12}, r"output\.weight is \[11, 16\] there and \[12, 16\] by the config"),
        ({"num_classes": 9}, r"cls_embedding\.embedding_table\.weight is \[4, 16\] there and \[10, 16\]"),
        ({"n_layers": 5}, r"layers\.4\.attention\.wo\.weight is \[\] there and \[16, 16\] by the config"),
        ({"n_layers": 3}, r"layers\.3\.attention\.wo\.weight is \[16, 16\] there and \[\] by the config"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named_with_both_shapes(
    export: Path, changes: dict[str, int], message: str
) -> None:
    save_file(load_file(export / "model.safetensors"), export / "model.safetensors")  # as other programs write it
    edit(export, model=model_settings(export) | changes)
    with refused(export, rf"model\.safetensors does not fit its config\.json: {message}"):
        load_model(export)


def test_a_safetensors_file_of_something_else_is_refused(export: Path) -> None:
    save_file({"codebook": torch.zeros(3, 4)}, export / "model.safetensors")
    with refused(export, r"model\.safetensors does not fit its config\.json"):
        load_model(export)


def test_the_file_holds_llamagens_names_and_nothing_else(export: Path) -> None:
    # LLAMAGEN.md's list; the rotary table is a buffer that no file carries.
    layer = ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    layer += ["attention_norm", "ffn_norm"]
    names = [f"layers.{index}.{part}.weight" for index in range(TINY.n_layers) for part in layer]
    names += ["cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"]
    for file in ("model.safetensors", "ema.safetensors"):
        assert sorted(load_file(export / file)) == sorted(names)


@pytest.mark.parametrize(
    ("setting", "value"), [("n_heads", 1), ("rope_base", 20000.0), ("norm_eps", 1e-3), ("grid", 4)]
)
def test_a_config_that_differs_from_the_weights_metadata_is_refused(export: Path, setting: str, value: float) -> None:
    edit(export, model=model_settings(export) | {setting: value})
    with refused(export, rf"config\.json does not describe model\.safetensors: {setting} is {value} there"):
        load_model(export)


def test_swapped_live_and_ema_weights_are_refused(export: Path) -> None:
    live, averaged = export / "model.safetensors", export / "ema.safetensors"
    live.rename(export / "x")
    averaged.rename(live)
    (export / "x").rename(averaged)
    with refused(export, r"model\.safetensors was written as ema\.safetensors: rename it to"):
        load_model(export)
    assert_same(load_model(averaged.rename(export / "mine.safetensors")), LIVE)


def test_a_flipped_bit_in_the_weights_is_found(export: Path) -> None:
    flip_byte(export / "model.safetensors", -100)
    with refused(
        export, r"model\.safetensors is damaged \(its content does not match its checksum\): .*export it again"
    ):
        load_model(export)
    assert_same(load_model(export, ema=True), AVERAGED)


def test_a_network_deeper_than_any_is_refused_before_it_is_built(export: Path) -> None:
    save_file(load_file(export / "model.safetensors"), export / "model.safetensors")  # that says nothing of itself
    edit(export, model=model_settings(export) | {"n_layers": 10**9})
    with refused(export, r"config\.json: --model\.n-layers must lie in \[1, 1024\], not 1000000000"):
        load_model(export)


@pytest.mark.parametrize("changes", [{"class_names": "cat"}, {"step": "7"}, {"class_dropout": [0.1]}, {"tokenizer": 3}])
def test_a_card_whose_values_make_no_sense_is_refused(export: Path, changes: dict[str, object]) -> None:
    edit(export, **changes)
    with refused(export, rf"config\.json is damaged \({next(iter(changes))} is"):
        load_model(export)


def test_a_run_whose_exports_card_is_damaged_counts_as_not_exported(export: Path) -> None:
    assert exported_step(export) == 7
    (export / "config.json").write_text("{")
    assert exported_step(export) is None


FILE_INFO = {"step": 7, "preset": "toy", "class_names": ["a", "b", "c"], "tokenizer": "abc"}


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Weights by LlamaGen's names, of a small model whose number of heads is known."""
    monkeypatch.setitem(HEADS, (TINY.dim, TINY.n_layers), TINY.n_heads)
    return random_model().state_dict()


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
    found = (info.config.n_heads, info.config.grid, info.config.vocab_size, info.config.num_classes)
    assert found == (TINY.n_heads, 16, TINY.vocab_size, TINY.num_classes)
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
    save_export(tmp_path / "export", model, model, FILE_INFO | {"encoder": "t5", "class_dropout": 0.25})
    convert(tmp_path / "export", tmp_path / "copy", to="st-ar")
    again, info = open_model(tmp_path / "copy")
    assert (info.encoder, info.class_dropout, info.config) == ("t5", 0.25, TINY_TEXT)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_converted_ema_weights_are_still_called_ema_weights(export: Path, tmp_path: Path) -> None:
    for ema in (False, True):
        convert(export, tmp_path / f"copy-{ema}", to="st-ar", ema=ema)
        model, info = open_model(tmp_path / f"copy-{ema}")
        assert info.ema is ema
        assert_same(model, AVERAGED if ema else LIVE)


def test_an_export_from_before_there_were_captions_is_a_class_models(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path, model, model, FILE_INFO)
    card = json.loads((tmp_path / "config.json").read_text())
    for name in ("condition", "text_tokens", "text_dim"):
        del card["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(card))
    assert open_model(tmp_path)[1].config == TINY


@pytest.mark.parametrize("held", [{}, {"model": {}}, {"steps": 3}, [1, 2], {"model": {"lr": 0.1}}])
def test_a_file_without_weights_is_refused(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "empty.pt")
    with refused(tmp_path, "has no weights"):
        load_model(tmp_path / "empty.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict()}, tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with refused(tmp_path, r"cut\.pt (is damaged|was refused)"):
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
    save_export(tmp_path, model, model, FILE_INFO)
    larger = load_model(tmp_path, grid=5)
    tokens, labels = random_sequences(larger.config, 2)
    with torch.no_grad():
        assert larger(tokens[:, :-1], labels).logits.shape == (2, 25, TINY.vocab_size)
        # the first row of the larger grid has the same positions as the first row of the smaller one
        first = load_model(tmp_path)(tokens[:, :2], labels).logits
        torch.testing.assert_close(larger(tokens[:, :2], labels).logits, first)


def convert(source: Path, target: Path, **options: Any) -> str:
    """What `st-ar convert` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        Convert(source=source, target=target, **options).run()
    return out.getvalue()


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


def test_ema_weights_are_exported_on_request(tmp_path: Path) -> None:
    live, averaged = random_model(seed=1), random_model(seed=2)
    save_export(tmp_path / "export", live, averaged, FILE_INFO)
    convert(tmp_path / "export", tmp_path / "live.pt", to="llamagen")
    convert(tmp_path / "export", tmp_path / "ema.pt", to="llamagen", ema=True)
    for name, model in (("live.pt", live), ("ema.pt", averaged)):
        saved = torch.load(tmp_path / name, weights_only=True)["model"]
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())


def test_a_target_that_exists_or_has_the_wrong_form_is_refused(tmp_path: Path) -> None:
    model = random_model()
    save_export(tmp_path / "export", model, model, FILE_INFO)
    (tmp_path / "there.pt").write_text("mine")
    random_tokenizer().save(tmp_path / "tokenizer")
    before = contents(tmp_path)
    for target, to, message in (
        ("there.pt", "llamagen", "exists already"),
        ("export", "st-ar", "exists already"),
        ("folder", "llamagen", r"give a \.pt file for llamagen"),
        ("file.pt", "st-ar", "or a folder for st-ar"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "export", tmp_path / target, to=to)
    with pytest.raises(ValueError, match="--grid needs --to st-ar: LlamaGen's files have no grid"):
        convert(tmp_path / "export", tmp_path / "model.pt", to="llamagen", grid=24)
    for option in ({"ema": True}, {"grid": 24}):
        with pytest.raises(ValueError, match=r"is a tokenizer.*: leave out --"):
            convert(tmp_path / "tokenizer", tmp_path / "vq", to="st-ar", **option)
    assert contents(tmp_path) == before
