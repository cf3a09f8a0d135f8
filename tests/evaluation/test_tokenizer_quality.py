"""A tokenizer's faithfulness in one pass: the numbers of the whole, whatever the batches, and pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.cli import main
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import Place
from st_ar.evaluation.generation.image_sets import of_source, open_files
from st_ar.evaluation.metrics import frechet_distance, mean_and_covariance
from st_ar.evaluation.reconstruction import FaithfulnessMeter, measure_tokenizer, psnr, reconstruct, ssim
from tests.disk import contents
from tests.evaluation.test_generation import pictures, toy
from tests.small_line import random_source, random_tokenizer

Capture = pytest.CaptureFixture[str]


def test_the_numbers_are_those_of_the_whole_set_whatever_the_batches(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(20))
    tokenizer, extractor = random_tokenizer(), toy()
    made, expected = reconstruct(tokenizer, pictures(20))
    real, drawn = (
        mean_and_covariance(extractor.run(torch.from_numpy(x)).features.numpy()) for x in (pictures(20), made)
    )
    for batch_size in (1, 6, 64):
        images = open_files(str(tmp_path / "a.npz"))
        found = measure_tokenizer(tokenizer, images, extractor, Place(batch_size=batch_size))["metrics"]
        assert list(found) == ["rFID", "PSNR (dB)", "SSIM", "codebook usage", "codebook perplexity"]
        assert found["rFID"] == pytest.approx(frechet_distance(*real, *drawn), rel=1e-4)
        assert list(found.values())[1:] == pytest.approx(list(expected), rel=1e-5)


def test_the_meters_means_are_over_images() -> None:
    images = torch.from_numpy(pictures(6))
    others = torch.from_numpy(pictures(6, 1))
    codes = torch.tensor([[[0, 1], [1, 1]]] * 6)
    meter = FaithfulnessMeter(8)
    for some in (slice(0, 1), slice(1, 6)):
        meter.update(codes[some], images[some], others[some])
    found = meter.result()
    assert found.psnr == pytest.approx(psnr(images, others).mean().item(), rel=1e-6)
    assert found.ssim == pytest.approx(ssim(images, others).mean().item(), rel=1e-6)
    assert found.usage == 2 / 8
    assert found.perplexity == pytest.approx(0.25**-0.25 * 0.75**-0.75)


def test_the_picture_shows_each_image_above_its_reconstruction(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(100))
    images = open_files(str(tmp_path / "a.npz"))
    measure_tokenizer(random_tokenizer(), images, None, Place(), picture=tmp_path / "shown.png")
    shown = np.asarray(Image.open(tmp_path / "shown.png"))
    assert shown.shape == (8 * 12, 8 * 12, 3)
    made, _ = reconstruct(random_tokenizer(), pictures(100))
    np.testing.assert_array_equal(shown[:12, :12], pictures(100)[0])
    np.testing.assert_array_equal(shown[-12:, -12:], made[99])


def reconstruct_command(folder: Path, count: int, size: int = 12) -> list[str]:
    """The command for a tokenizer and a file of pictures that this writes."""
    np.savez(folder / "a.npz", arr_0=pictures(count, size=size))
    random_tokenizer().save(folder / "t")
    files = f"--tokenizer {folder / 't'} --images {folder / 'a.npz'}"
    return ["reconstruct", *files.split(), "--device", "cpu"]


def test_every_reconstruction_is_kept_as_an_image_that_evaluate_reads(tmp_path: Path, capsys: Capture) -> None:
    command = reconstruct_command(tmp_path, 7)
    command += ["--extractor", "none", "--batch-size", "3", "--save", str(tmp_path / "made")]
    main(command)
    made, _ = reconstruct(random_tokenizer(), pictures(7))
    kept = open_files(str(tmp_path / "made"))
    np.testing.assert_array_equal(np.stack([image for _, image in kept.read(0, 1)]), made)
    before = contents(tmp_path / "made")
    with pytest.raises(SystemExit):
        main(command)
    assert "choose another --save" in capsys.readouterr().err
    assert contents(tmp_path / "made") == before


def test_a_reconstruction_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    command = reconstruct_command(tmp_path, 7)
    saved = ["--save", str(tmp_path / "made"), "--out", str(tmp_path / "a.npz" / "x.png")]
    with pytest.raises(SystemExit):
        main([*command, "--extractor", "none", *saved])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "t"]


def test_images_that_do_not_suit_the_tokenizer_are_refused() -> None:
    with pytest.raises(UserError, match="5 pixels are no whole number of 2-pixel patches"):
        measure_tokenizer(random_tokenizer(), of_source(random_source(size=6), 5), None, Place())


def test_reconstruct_by_command_never_says_fid_of_another_network(tmp_path: Path, capsys: Capture) -> None:
    command = reconstruct_command(tmp_path, 12, size=32)
    main(
        [*command, "--extractor", "efficientnet", "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.png")]
    )
    out = capsys.readouterr().out
    assert re.search(r"^rFD-EfficientNet-Lite0 +\d+\.\d{3}$", out, flags=re.MULTILINE)
    assert "FID" not in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"]["count"] == 12
    assert result["tokenizer"]["fingerprint"] == random_tokenizer().fingerprint
    main([*command, "--extractor", "none", "--json", "-"])
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == list(result["metrics"])[1:]
    with pytest.raises(SystemExit):
        main([*command, "--extractor", "none", "--out", "x.jpg"])
    assert "the picture is a PNG" in capsys.readouterr().err
