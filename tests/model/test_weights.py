"""Weights on disk: what is saved is loaded, and whatever is not a model of ours is refused with the remedy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_ar import load_model
from st_ar.model.transformer import Transformer
from st_ar.model.weights import exported_step, open_model, save_export
from tests.disk import contents, flip_byte, full_disk, refused
from tests.toys import TINY, random_model, random_sequences

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
def test_the_averaged_weights_are_had_by_asking(export: Path, given: str) -> None:
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
    with refused(tmp_path, "nowhere does not exist; give a run, an export folder or a .safetensors file"):
        load_model(tmp_path / "nowhere")


def test_a_folder_of_other_things_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused(tmp_path, r"is no model: .*give a run or an export folder"):
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
    with refused(export, rf"{file.name} is damaged or incomplete .*export it again from its run"):
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
def test_a_config_that_no_weights_shape_contradicts_is_refused_by_what_the_weights_say(
    export: Path, setting: str, value: float
) -> None:
    edit(export, model=model_settings(export) | {setting: value})
    with refused(export, rf"config\.json is not of these weights: {setting} is {value}, of the weights"):
        load_model(export)


def test_live_and_averaged_weights_under_each_others_names_are_refused(export: Path) -> None:
    live, averaged = export / "model.safetensors", export / "ema.safetensors"
    live.rename(export / "x")
    averaged.rename(live)
    (export / "x").rename(averaged)
    with refused(export, r"model\.safetensors holds what was written as ema\.safetensors: give it that name back"):
        load_model(export)
    assert_same(load_model(averaged.rename(export / "mine.safetensors")), LIVE)


def test_a_flipped_bit_in_the_weights_is_found(export: Path) -> None:
    flip_byte(export / "model.safetensors", -100)
    with refused(export, r"model\.safetensors is damaged: its content does not match its checksum; .*export it again"):
        load_model(export)
    assert_same(load_model(export, ema=True), AVERAGED)


def test_a_network_deeper_than_any_is_refused_before_it_is_built(export: Path) -> None:
    save_file(load_file(export / "model.safetensors"), export / "model.safetensors")  # that says nothing of itself
    edit(export, model=model_settings(export) | {"n_layers": 10**9})
    with refused(export, r"config\.json: --model\.n-layers must be at most 1024, not 1000000000"):
        load_model(export)


@pytest.mark.parametrize("changes", [{"class_names": "cat"}, {"step": "7"}, {"class_dropout": [0.1]}, {"tokenizer": 3}])
def test_a_card_whose_values_make_no_sense_is_refused(export: Path, changes: dict[str, object]) -> None:
    edit(export, **changes)
    with refused(export, rf"config\.json is damaged: {next(iter(changes))} is"):
        load_model(export)


def test_a_run_whose_exports_card_is_damaged_counts_as_not_exported(export: Path) -> None:
    assert exported_step(export) == 7
    (export / "config.json").write_text("{")
    assert exported_step(export) is None
