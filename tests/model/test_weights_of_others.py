"""EMA weights in .pt files: which are taken is chosen, said and recorded; files that are missing are named."""

from pathlib import Path

import pytest
import torch

from st_ar.errors import UserError
from st_ar.files import read_tensors
from st_ar.model import weights
from st_ar.model.weights import open_model
from st_ar.tokenizer import load_tokenizer
from tests.model.test_weights import convert
from tests.tokenizer.test_vq import random_tensors
from tests.toys import TINY, random_model, save_export

LIVE, AVERAGED = random_model(seed=0), random_model(seed=1)


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.HEADS, (TINY.dim, TINY.n_layers), TINY.n_heads)


def equal(path: Path, expected: torch.nn.Module, *, ema: bool) -> bool:
    model, info = open_model(path, ema=ema, grid=TINY.grid)
    assert info.ema is ema
    return all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


@pytest.mark.usefixtures("tiny_is_known")
@pytest.mark.parametrize("name", ["ema", "model_ema", "ema_model"])
def test_live_and_ema_weights_of_one_file_are_chosen_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "both.pt"
    torch.save({"model": LIVE.state_dict(), name: AVERAGED.state_dict(), "steps": 7}, path)
    assert equal(path, LIVE, ema=False)
    assert capsys.readouterr().err == f"st-ar: note: {path}: using 'model', not its EMA weights {name!r}\n"
    assert equal(path, AVERAGED, ema=True)
    assert capsys.readouterr().err == f"st-ar: note: {path}: using its EMA weights {name!r}, not 'model'\n"
    convert(path, tmp_path / "converted", to="st-ar", ema=True, grid=TINY.grid)
    model, info = open_model(tmp_path / "converted")
    assert info.ema
    assert torch.equal(model.output.weight, AVERAGED.output.weight)


@pytest.mark.usefixtures("tiny_is_known")
def test_ema_weights_without_others_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alone.pt"
    torch.save({"ema": {f"_orig_mod.{name}": value for name, value in AVERAGED.state_dict().items()}}, path)
    model, _ = open_model(path, grid=TINY.grid)
    assert torch.equal(model.output.weight, AVERAGED.output.weight)
    assert capsys.readouterr().err == f"st-ar: note: {path}: using its EMA weights 'ema'\n"
    torch.save({"model": LIVE.state_dict()}, tmp_path / "live.pt")
    with pytest.raises(
        UserError, match=r"live.pt has no EMA weights, under ema, model_ema, ema_model: leave out --ema"
    ):
        open_model(tmp_path / "live.pt", ema=True)


def test_a_tokenizers_file_too(tmp_path: Path) -> None:
    live, averaged = random_tensors(seed=0), random_tensors(seed=1)
    path = tmp_path / "vq.pt"
    torch.save({"model": live, "ema": averaged}, path)
    assert load_tokenizer(path).fingerprint != load_tokenizer(f"{path}#ema").fingerprint
    torch.testing.assert_close(read_tensors(path, ema=True), averaged)
    convert(path, tmp_path / "live", to="st-ar")
    convert(path, tmp_path / "averaged", to="st-ar", ema=True)
    assert load_tokenizer(tmp_path / "live").fingerprint == load_tokenizer(path).fingerprint
    assert load_tokenizer(tmp_path / "averaged").fingerprint == load_tokenizer(f"{path}#ema").fingerprint


def test_a_folder_without_one_of_its_files_names_it(tmp_path: Path) -> None:
    save_export(tmp_path / "export", LIVE, AVERAGED, {})
    (tmp_path / "export/ema.safetensors").unlink()
    for place in (tmp_path, tmp_path / "export"):
        with pytest.raises(
            UserError, match=r"export/ema.safetensors is missing: copy it beside model.safetensors, or leave out --ema"
        ):
            open_model(place, ema=True)
    (tmp_path / "export/model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"export/model.safetensors is missing: config.json is there without weights; copy"
    ):
        open_model(tmp_path / "export")
