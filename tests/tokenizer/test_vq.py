"""The VQ-GAN against LlamaGen's recorded outputs and the layouts of its published models."""

import json
import pickle
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from st_ar import load_tokenizer
from st_ar.config import VQ_8, VQ_16, VQConfig
from st_ar.tokenizer.vq import VQDecoder, VQEncoder, VQTokenizer, infer_config, nearest_codes
from tests.disk import contents, flip_byte, refused
from tests.toys import FIXTURES

SMALL = VQConfig(channels=32, multipliers=(1, 2), z_channels=16, codebook_size=24, codebook_dim=4, residual_blocks=1)


def recorded(prefix: str) -> dict[str, Tensor]:
    """LlamaGen's recorded tensors whose names begin with `prefix`, in float32 (the weights are stored in float16)."""
    with safe_open(FIXTURES / "llamagen_vq_tiny.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        found = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in found.items()}


@pytest.fixture(scope="module")
def theirs() -> VQTokenizer:
    tensors = recorded("weights/")
    tensors.pop("quantize.codebook_used", None)
    return VQTokenizer(infer_config(tensors, Path("recorded")), tensors)


def random_tensors(config: VQConfig = SMALL, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors = {**VQEncoder(config).state_dict(), **VQDecoder(config).state_dict()}
    return tensors | {"quantize.embedding.weight": torch.randn(config.codebook_size, config.codebook_dim)}


def test_the_config_is_inferred_from_the_weights(theirs: VQTokenizer) -> None:
    assert theirs.config == VQConfig(multipliers=(1, 1), z_channels=32, codebook_size=64)
    assert theirs.grid(32) == 16


def test_codes_equal_the_recorded_ones(theirs: VQTokenizer) -> None:
    io = recorded("io/")
    assert torch.equal(theirs.encode(io["image"]), io["codes"])


def test_reconstruction_equals_the_recorded_one(theirs: VQTokenizer) -> None:
    io = recorded("io/")
    assert (theirs.decode(io["codes"]) - io["reconstruction"]).abs().max() < 1e-4
    quantised = theirs.codebook[io["codes"]].permute(0, 3, 1, 2)
    assert (quantised - io["quant"]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_tokenizer_gives_the_recorded_codes_and_reconstruction(
    theirs: VQTokenizer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    io = recorded("io/")
    compiled = theirs.to(torch.device("cpu"), torch.float32, compiled=True)
    assert torch.equal(compiled.encode(io["image"]), io["codes"])
    assert (compiled.decode(io["codes"]) - io["reconstruction"]).abs().max() < 1e-4
    assert all(half._compiled_call_impl is not None for half in (compiled.encoder, compiled.decoder))


def test_bfloat16_gives_nearly_the_same_codes(theirs: VQTokenizer) -> None:
    io = recorded("io/")
    half = theirs.to(torch.device("cpu"), torch.bfloat16)
    assert (half.encode(io["image"]) == io["codes"]).float().mean() > 0.9
    error = half.decode(io["codes"]) - io["reconstruction"]
    assert error.norm() / io["reconstruction"].norm() < 0.03


@pytest.mark.parametrize(("name", "config"), [("VQ-16", VQ_16), ("VQ-8", VQ_8)])
def test_names_and_shapes_are_those_of_the_published_models(name: str, config: VQConfig) -> None:
    layout = json.loads((FIXTURES / "llamagen_layouts.json").read_text())[name]
    layout.pop("quantize.codebook_used")
    with torch.device("meta"):
        ours = {**VQEncoder(config).state_dict(), **VQDecoder(config).state_dict()}
        theirs = {key: torch.empty(shape) for key, shape in layout.items()}
    assert {key: list(value.shape) for key, value in ours.items()} | {"quantize.embedding.weight": [16384, 8]} == layout
    assert infer_config(theirs, Path(name)) == config


def test_the_nearest_code_is_the_nearest_by_euclidean_distance() -> None:
    torch.manual_seed(0)
    features, codebook = F.normalize(torch.randn(500, 8)), F.normalize(torch.randn(300, 8))
    plain = torch.cdist(features.double(), codebook.double()).argmin(dim=1)
    assert torch.equal(nearest_codes(features, codebook), plain)
    assert torch.equal(nearest_codes(features, codebook, rows=7), plain)


def test_encoding_does_not_depend_on_the_batch(theirs: VQTokenizer) -> None:
    images = recorded("io/")["image"]
    assert torch.equal(theirs.encode(images[1:]), theirs.encode(images)[1:])


def test_encoder_and_decoder_are_built_when_used_without_gradients() -> None:
    tokenizer = VQTokenizer(SMALL, random_tensors())
    images = torch.rand(1, 3, 8, 8).requires_grad_() * 2 - 1
    codes = tokenizer.encode(images)
    assert "decoder" not in tokenizer.__dict__
    assert not any(parameter.requires_grad for parameter in tokenizer.encoder.parameters())
    assert not VQTokenizer(SMALL, random_tensors()).decode(codes).requires_grad
    other = VQTokenizer(SMALL, random_tensors())
    other.decode(codes)
    assert "encoder" not in other.__dict__


def test_rectangles_are_encoded_and_other_sizes_refused() -> None:
    tokenizer = VQTokenizer(SMALL, random_tensors())
    assert tokenizer.encode(torch.zeros(1, 3, 8, 12)).shape == (1, 4, 6)
    with pytest.raises(ValueError, match=r"7 pixels cannot be cut into 2-pixel patches.*--size"):
        tokenizer.encode(torch.zeros(1, 3, 8, 7))


@pytest.mark.parametrize("wrong", [-1, 24])
def test_codes_out_of_range_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=rf"codes must lie between 0 and 23.*{wrong}"):
        VQTokenizer(SMALL, random_tensors()).decode(torch.tensor([[[0, wrong]]]))


# On disk


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_llamagen_files_load_with_any_wrapper(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    tensors = random_tensors() | {"quantize.codebook_used": torch.zeros(65536)}
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    torch.save(named if wrapper is None else {wrapper: named, "steps": 3}, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    expected = VQTokenizer(SMALL, random_tensors())
    assert loaded.fingerprint == expected.fingerprint
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(loaded.encode(images), expected.encode(images))


def test_a_folder_round_trip(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(SMALL, random_tensors())
    tokenizer.save(tmp_path / "vq")
    loaded = load_tokenizer(tmp_path / "vq")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == 24
    codes = torch.randint(24, (2, 3, 3))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    with refused(tmp_path, "exists already"):
        tokenizer.save(tmp_path / "vq")


def test_the_fingerprint_depends_on_encoder_and_codebook() -> None:
    first = VQTokenizer(SMALL, random_tensors()).fingerprint
    for name in ("encoder.mid.1.q.weight", "quant_conv.bias", "quantize.embedding.weight"):
        changed = random_tensors()
        changed[name] = changed[name] + 1e-3
        assert VQTokenizer(SMALL, changed).fingerprint != first


def test_damage_is_refused(tmp_path: Path) -> None:
    VQTokenizer(SMALL, random_tensors()).save(tmp_path / "vq")
    whole = contents(tmp_path / "vq")["vq.safetensors"]
    flip_byte(tmp_path / "vq" / "vq.safetensors")
    with refused(tmp_path, "does not match|do not match"):
        load_tokenizer(tmp_path / "vq")
    (tmp_path / "vq" / "vq.safetensors").write_bytes(whole[: len(whole) // 2])
    with refused(tmp_path, "damaged"):
        load_tokenizer(tmp_path / "vq")
    (tmp_path / "vq" / "vq.safetensors").unlink()
    with refused(tmp_path, "does not exist"):
        load_tokenizer(tmp_path / "vq")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "decoder.mid.0.conv1.weight",
            [64, 64, 1, 1],
            r"decoder\.mid\.0\.conv1\.weight is \[64, 64, 1, 1\], expected \[64, 64, 3, 3\]",
        ),
        ("decoder.extra", [1], r"decoder\.extra is \[1\], expected nothing"),
    ],
)
def test_another_architecture_is_refused_with_the_first_difference(
    tmp_path: Path, name: str, shape: list[int], message: str
) -> None:
    save_file(random_tensors() | {name: torch.zeros(shape)}, tmp_path / "vq.safetensors")
    with refused(tmp_path, message):
        load_tokenizer(tmp_path / "vq.safetensors")


def test_a_transformer_is_refused(tmp_path: Path) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    with refused(tmp_path, r"not a VQ-GAN.*encoder\.conv_in\.weight"):
        load_tokenizer(tmp_path / "model.safetensors")


class Trap:
    """A pickle that would write a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    trap = {"model": {"quantize.embedding.weight": torch.zeros(2, 2)}, "args": Trap(tmp_path / "sprung")}
    if writer == "torch":
        torch.save(trap, tmp_path / "vq.pt")
    else:
        (tmp_path / "vq.pt").write_bytes(pickle.dumps(trap))
    with refused(tmp_path, r"vq\.pt was refused.*could run code"):
        load_tokenizer(tmp_path / "vq.pt")
    assert not (tmp_path / "sprung").exists()
