"""`st-ar reference` and `st-ar evaluate`, end to end with the extractor that needs no download, and mistakes in one line."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from st_ar.cli import main
from st_ar.config import ExtractorName
from st_ar.data.images import open_images
from st_ar.errors import UserError, note
from st_ar.evaluation.generation import evaluate as evaluate_module
from st_ar.evaluation.generation import features as features_module
from st_ar.evaluation.generation import references
from st_ar.evaluation.generation.evaluate import (
    check_sizes,
    choose_metrics,
    evaluate,
    format_number,
    is_class_sorted,
    one_line,
)
from st_ar.evaluation.generation.features import (
    Compute,
    Extracted,
    Extractor,
    collect,
    load_extractor,
    resize_as_llamagen,
    resize_bicubic,
)
from st_ar.evaluation.generation.image_sets import (
    ImageSet,
    from_source,
    image_digest,
    open_files,
    open_set,
    read_array,
)
from st_ar.evaluation.generation.references import open_reference, read_meta, write_reference
from st_ar.evaluation.metrics import (
    InceptionScore,
    frechet_distance,
    inception_score,
    mean_and_covariance,
    precision_recall,
)
from st_ar.evaluation.reconstruction import measure_tokenizer
from tests.disk import flip_byte, refused
from tests.ranks import checked_torchrun
from tests.small_line import random_tokenizer

Capture = pytest.CaptureFixture[str]
OFFLINE = ["--extractor", "efficientnet", "--device", "cpu"]


@pytest.fixture(autouse=True)
def forgotten_notes() -> None:
    """A note is printed once in a process: a test does not depend on those before it."""
    note.cache_clear()


def st_ar(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def fails(capsys: Capture, match: str, *arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as stop:
        st_ar(*arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(match, err), err


def pictures(count: int, seed: int = 0, size: int = 12) -> np.ndarray:
    """Smooth noise, uint8 [N, size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse])


def save_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def toy(name: str = "Inception", weights: str = "toy") -> Extractor:
    """Features that are linear in the pixels' means, under whatever name: as quick as nothing."""
    generator = torch.Generator().manual_seed(0)
    to_features, to_spatial, to_logits = (torch.randn(48, d, generator=generator) for d in (6, 5, 4))

    def run(images: torch.Tensor) -> Extracted:
        small = torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4).flatten(1)
        return Extracted(small @ to_features, small @ to_spatial, small @ to_logits)

    return Extractor(name=name, weights=weights, dim=6, spatial_dim=5, classes=4, run=run)


ALL = choose_metrics(["fid", "sfid", "is", "kid", "precision", "recall", "density", "coverage"], "inception")

# Sets of images


def test_a_file_and_a_folder_of_the_same_images_have_the_same_content(tmp_path: Path) -> None:
    images = pictures(7)
    np.savez(tmp_path / "stored.npz", arr_0=images, arr_1=np.arange(7) % 3)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=images)
    folder = save_folder(tmp_path / "folder", images)
    hashes: set[str] = set()
    for place in (tmp_path / "stored.npz", tmp_path / "compressed.npz", folder):
        found = open_set(str(place))
        assert (found.count, found.size) == (7, (12, 12))
        for ranks in (1, 3, 9):
            shares = [list(found.read(rank, ranks)) for rank in range(ranks)]
            flat = [entry for share in shares for entry in share]
            assert [index for index, _ in flat] == list(range(7))
            np.testing.assert_array_equal(np.stack([pixels for _, pixels in flat]), images)
        hashes.add(collect(found, toy(), ["fid"], Compute(batch_size=3)).content)
    assert len(hashes) == 1
    images[3, 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", arr_0=images)
    assert collect(open_set(str(tmp_path / "other.npz")), toy(), ["fid"], Compute()).content not in hashes


def test_labels_and_metadata_are_read_from_the_file_beside_the_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=pictures(3), arr_1=np.array([2, 0, 1]))
    (tmp_path / "s.json").write_text(json.dumps({"settings": {"cfg_scale": 2.0}, "labels": [9, 9, 9]}))
    folder = save_folder(tmp_path / "f", pictures(3))
    (folder / "metadata.json").write_text(json.dumps({"settings": {"cfg_scale": 2.0}, "labels": [2, 0, 1]}))
    for place in (tmp_path / "s.npz", folder):
        found = open_files(str(place))
        assert found.metadata == {"settings": {"cfg_scale": 2.0}}
        assert found.labels is not None
        assert found.labels.tolist() == [2, 0, 1]


def test_a_source_gives_its_centre_crops() -> None:
    found = open_set("photos:test")
    assert found.size == (32, 32)
    first = next(iter(found.read(0, 1)))[1]
    shares = [dict(found.read(rank, 2)) for rank in range(2)]
    assert found.count == len(shares[0]) + len(shares[1])
    np.testing.assert_array_equal(shares[0][0], first)
    assert open_set("photos:test", size=16).size == (16, 16)


def test_broken_images_of_a_source_are_listed_up_to_a_share(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "a", pictures(5))
    (folder / "000002.png").write_bytes(b"nothing")
    found = open_set(f"folder:{tmp_path}", size=12, max_skipped=0.2)
    assert [index for index, _ in found.read(0, 1)] == [0, 1, 3, 4]
    collected = collect(found, toy(), ["fid"], Compute(batch_size=2))
    assert collected.count == 4
    assert [(each.index, each.name) for each in collected.skipped.found.values()] == [(2, "a/000002.png")]
    with pytest.raises(
        UserError, match=r"1 of 5 images cannot be used, more than --max-skipped 0.19; the first is a/0000"
    ):
        collect(open_set(f"folder:{tmp_path}", size=12, max_skipped=0.19), toy(), ["fid"], Compute())
    with pytest.raises(UserError, match=r"--max-skipped must lie in \[0, 1\], not 1.5"):
        open_set(f"folder:{tmp_path}", size=12, max_skipped=1.5)
    stream = replace(open_images(f"folder:{tmp_path}"), count=None, streaming=True)  # its number is known at the end
    with pytest.raises(UserError, match=r"1 of 5 images cannot be used, more than --max-skipped 0.01"):
        collect(from_source(stream, 12), toy(), ["fid"], Compute())


def test_images_that_a_folder_holds_beside_pngs_are_noted_or_named(tmp_path: Path, capsys: Capture) -> None:
    folder = save_folder(tmp_path / "f", pictures(5))
    assert open_set(str(folder)).notes == ()
    image = Image.fromarray(pictures(1)[0])
    (folder / "more" / "below").mkdir(parents=True)
    for name in ("x.jpg", "y.JPG", "z.webp", "more/a.png", "more/below/b.jpeg", ".hidden.jpg"):
        image.save(folder / name)
    (folder / "more" / "loop").symlink_to(folder)
    (folder / "metadata.json").write_text("{}")
    left_out = "only its 5 PNGs are read, not 2 .jpg, 1 .webp, 2 in sub-folders, such as more/a.png; "
    found = open_set(str(folder))
    assert found.count == 5
    assert found.notes == (
        f"{folder}: {left_out}folder:{folder} reads images of all types, all in the folder or all in its sub-folders",
    )
    samples = open_files(str(folder))
    assert samples.notes == (f"{folder}: {left_out}convert them to .png, and move them into the folder",)
    assert [f"st-ar: note: {text}" for text in (*found.notes, *samples.notes)] == capsys.readouterr().err.splitlines()
    reference = open_reference(str(folder), toy(), ["fid"], Compute())
    assert evaluate(samples, reference, toy(), ["fid"], Compute())["notes"][:2] == [*samples.notes, *found.notes]
    meta = write_reference(open_set(str(folder)), tmp_path / "r.npz", toy(), Compute())
    assert meta["notes"] == [*found.notes]
    assert open_reference(str(tmp_path / "r.npz"), toy(), ["fid"], Compute()).notes == [*found.notes]
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(
        UserError, match=r"f holds no PNGs, only 2 .jpg, 1 .webp, 2 in sub-folders, .*: folder:.* reads"
    ):
        open_set(str(folder))
    with pytest.raises(UserError, match=r"f/more/below holds no PNGs, only 1 .jpeg: convert them to .png"):
        open_files(str(folder / "more" / "below"))


# One pass


def test_numbers_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(40))
    np.savez(tmp_path / "b.npz", arr_0=pictures(30, 1))
    results: list[dict[str, float]] = []
    for batch_size in (1, 7, 64):
        place = Compute(batch_size=batch_size)
        reference = open_reference(str(tmp_path / "a.npz"), toy(), ALL, place)
        results.append(evaluate(open_files(str(tmp_path / "b.npz")), reference, toy(), ALL, place)["metrics"])
    assert list(results[0]) == ["FID", "sFID", "IS", "KID", "KID std", "precision", "recall", "density", "coverage"]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5, abs=1e-6)


def test_the_numbers_are_those_of_the_metrics_on_the_features(tmp_path: Path) -> None:
    extractor = toy()
    np.savez(tmp_path / "a.npz", arr_0=pictures(40))
    np.savez(tmp_path / "b.npz", arr_0=pictures(30, 1))
    real, generated = (extractor.run(torch.from_numpy(pictures(n, s))) for n, s in ((40, 0), (30, 1)))
    reference = open_reference(str(tmp_path / "a.npz"), extractor, ALL, Compute())
    found = evaluate(open_files(str(tmp_path / "b.npz")), reference, extractor, ALL, Compute(), shuffle_seed=3)[
        "metrics"
    ]
    assert generated.logits is not None
    for name, x, y in (("FID", real.features, generated.features), ("sFID", real.spatial, generated.spatial)):
        assert x is not None
        assert y is not None
        statistics = (*mean_and_covariance(x.numpy()), *mean_and_covariance(y.numpy()))
        assert found[name] == pytest.approx(frechet_distance(*statistics), rel=1e-4)
    assert found["IS"] == pytest.approx(
        inception_score(generated.logits.softmax(1)), rel=1e-5
    )  # one split has no order
    assert (found["precision"], found["recall"]) == precision_recall(real.features, generated.features)


def test_the_order_of_the_splits_is_shuffled_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "InceptionScore", partial(InceptionScore, split_size=10))
    extractor = toy()
    np.savez(tmp_path / "b.npz", arr_0=pictures(30, 1))
    samples = open_files(str(tmp_path / "b.npz"))
    probs = extractor.run(torch.from_numpy(pictures(30, 1))).logits
    assert probs is not None
    order = np.random.default_rng(5).permutation(30)
    shuffled = np.empty((30, 4))
    shuffled[order] = probs.double().softmax(1).numpy()
    found = collect(samples, extractor, ["is"], Compute(batch_size=4), order=order).score
    assert found is not None
    assert found.result() == pytest.approx(inception_score(shuffled, 10), rel=1e-6)
    assert found.result() != pytest.approx(inception_score(probs.softmax(1), 10), rel=1e-6)


def test_samples_sorted_by_class_are_noticed() -> None:
    def labelled(labels: np.ndarray | None) -> ImageSet:
        return ImageSet(name="", count=6000, size=(1, 1), read=lambda rank, world: iter(()), labels=labels)

    assert is_class_sorted(labelled(np.sort(np.arange(6000) % 10)))
    assert is_class_sorted(labelled(np.sort(np.arange(6000) % 10)[::-1]))
    assert is_class_sorted(labelled(np.random.default_rng(0).permutation(10).repeat(600)))
    assert not is_class_sorted(labelled(np.tile(np.arange(10).repeat(300), 2)))  # each class is two blocks
    assert not is_class_sorted(labelled(np.arange(6000) % 10))
    assert not is_class_sorted(labelled(np.arange(6000)))  # indices of captions
    assert not is_class_sorted(labelled(np.sort(np.arange(4000) % 10)))  # one split
    assert not is_class_sorted(labelled(None))


@pytest.mark.parametrize(("count", "last"), [(10, None), (11, "1 of 10"), (25, "5 of 10"), (20, None), (7, None)])
def test_a_short_last_split_and_sorted_classes_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, last: str | None
) -> None:
    monkeypatch.setattr(evaluate_module, "SPLIT", 10)
    np.savez(tmp_path / "a.npz", arr_0=pictures(count), arr_1=np.arange(count)[::-1] // 4)
    reference = open_reference(str(tmp_path / "a.npz"), toy(), ["is"], Compute())
    notes = evaluate(open_files(str(tmp_path / "a.npz")), reference, toy(), ["is"], Compute())["notes"]
    short = [text for text in notes if "splits" in text]
    assert [text.split(" has ")[1].split(" images ")[0] for text in short] == ([last] if last else [])
    if count == 25:
        assert short[0].startswith("the last of the 3 splits of IS has 5 of 10 images and counts as much as the others")
        assert short[0].endswith(": measure a multiple of 10, such as 20 or 30")
    assert any("sorted by class" in text for text in notes) == (count > 10)
    found = evaluate(open_files(str(tmp_path / "a.npz")), reference, toy(), ["fid"], Compute())["notes"]
    assert not any("split" in text for text in found)


# The reference


@pytest.fixture
def small_keep(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(references, "KEEP", 12)
    return 12


def test_a_reference_made_once_gives_the_numbers_of_its_images(tmp_path: Path, small_keep: int) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(40))
    np.savez(tmp_path / "b.npz", arr_0=pictures(30, 1))
    made = tmp_path / "made.npz"
    meta = write_reference(open_set(str(tmp_path / "a.npz")), made, toy(), Compute(batch_size=3), seed=4)
    with np.load(made, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["arr_0", "features", "mu", "mu_s", "sigma", "sigma_s", "st_ar"]
        assert arrays["arr_0"].shape == (small_keep, 12, 12, 3)
        rows = [np.flatnonzero((pictures(40) == image).all((1, 2, 3))) for image in arrays["arr_0"]]
        assert np.all(np.diff(np.concatenate(rows)) > 0)  # in the order of the images, none twice
        expected = toy().run(torch.from_numpy(arrays["arr_0"])).features
        np.testing.assert_allclose(arrays["features"], expected, rtol=1e-5, atol=1e-6)
    assert (meta["images"], meta["size"], meta["extractor"]["name"]) == (40, [12, 12], "Inception")
    results: list[dict[str, object]] = []
    for reference in (tmp_path / "a.npz", made):
        opened = open_reference(str(reference), toy(), ALL, Compute(), seed=4)
        results.append(evaluate(open_files(str(tmp_path / "b.npz")), opened, toy(), ALL, Compute()))
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-6)
    for key in ("sha256", "statistics", "neighbours", "size"):
        assert results[0]["reference"][key] == results[1]["reference"][key], key
    again = tmp_path / "again.npz"
    write_reference(open_set(str(tmp_path / "a.npz")), again, toy(), Compute(batch_size=64), seed=4)
    with np.load(made) as one, np.load(again) as two:
        for name in ("mu", "sigma", "arr_0"):
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_the_kept_images_depend_on_the_seed_not_on_the_batch_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(30))
    found = [
        collect(open_files(str(tmp_path / "a.npz")), toy(), ["kid"], Compute(batch_size=b), keep=10, seed=s).features
        for s, b in ((0, 4), (0, 30), (1, 30))
    ]
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_adm_batches_give_statistics_and_their_images_only_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mu, mu_s = rng.normal(size=6), rng.normal(size=5)
    sigma, sigma_s = np.cov(rng.normal(size=(6, 50))), np.cov(rng.normal(size=(5, 50)))
    path = tmp_path / "virtual.npz"
    np.savez(path, arr_0=pictures(20), mu=mu.astype(np.float32), sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = open_reference(str(path), toy(), ALL, Compute())
    assert reference.statistics == "mu and sigma in the file"
    np.testing.assert_allclose(reference.gaussian.mean, mu, rtol=1e-6)
    assert reference.spatial is not None
    np.testing.assert_array_equal(reference.spatial.covariance, sigma_s)
    assert len(reference.features) == 20
    assert open_reference(str(path), toy(), ["fid"], Compute()).features.shape == (0, 6)
    np.savez(tmp_path / "alone.npz", mu=mu, sigma=sigma)  # another evaluator's, for FID alone
    alone = open_reference(str(tmp_path / "alone.npz"), toy(), ["fid"], Compute())
    assert alone.size is None
    np.savez(tmp_path / "s.npz", arr_0=pictures(20))
    distance = evaluate(open_files(str(tmp_path / "s.npz")), alone, toy(), ["fid"], Compute())["metrics"]["FID"]
    features = toy().run(torch.from_numpy(pictures(20))).features.numpy()
    assert distance == pytest.approx(frechet_distance(mu, sigma, *mean_and_covariance(features)), rel=1e-4)
    with pytest.raises(UserError, match=r"no mu_s and sigma_s: leave sfid out"):
        open_reference(str(tmp_path / "alone.npz"), toy(), ["fid", "sfid"], Compute())
    with pytest.raises(UserError, match=r"statistics but no images: leave precision recall out of --metrics"):
        open_reference(str(tmp_path / "alone.npz"), toy(), ["fid", "recall", "precision"], Compute())
    other = open_reference(str(path), toy("EfficientNet-Lite0"), ["fd"], Compute())  # their statistics are of Inception
    assert other.statistics == "20 images"


@pytest.mark.parametrize("keep", [None, 8])
def test_memory_holds_only_the_kept_images(tmp_path: Path, keep: int | None) -> None:
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(0).integers(0, 256, (512, 64, 64, 3)).astype(np.uint8))
    images = open_files(str(tmp_path / "s.npz"))
    tracemalloc.start()
    found = collect(images, toy(), ["precision"], Compute(batch_size=4), keep=keep)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.features) == (keep or 512)
    assert peak < 200 * 64 * 64 * 3  # 64 are read at once


# Names


def test_other_networks_never_report_fid() -> None:
    other = toy("EfficientNet-Lite0")
    assert [other.label(m) for m in ("fd", "precision", "kid")] == [
        "FD-EfficientNet-Lite0",
        "precision (EfficientNet-Lite0)",
        "KD-EfficientNet-Lite0",
    ]
    assert choose_metrics([], "efficientnet") == ["fd", "precision", "recall"]
    assert choose_metrics(["recall", "fd", "fid", "fid"], "inception") == ["fid", "recall"]
    for metric, give in (("fid", ""), ("sfid", ""), ("is", " or --classifier FOLDER")):
        with pytest.raises(
            UserError, match=f"--metrics {metric} needs another network: give --extractor inception{give}"
        ):
            choose_metrics([metric, "fd"], "dinov2")


def test_the_line_for_a_paper_names_all_that_identifies_the_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=pictures(40))
    settings = {"cfg_scale": 1.75, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 7}
    settings |= {"cfg_schedule": "power-cosine", "cfg_power": 2.75, "cfg_interval": 9}
    weights = {"sha256": "abcdef0123456789", "ema": True}
    metadata = {"settings": settings, "weights": weights, "label_mode": "balanced"}
    (tmp_path / "a.json").write_text(json.dumps(metadata))
    reference = open_reference(str(tmp_path / "a.npz"), toy(), ["fid"], Compute())
    result = evaluate(open_files(str(tmp_path / "a.npz")), reference, toy(weights="0123456789"), ["fid"], Compute())
    line = one_line(result)
    content = reference.content[:8]
    for part in (
        "FID 0.000 (40 samples " + content, "guidance 1.75, temperature 1.0", "seed 7", "balanced labels",
        "EMA weights abcdef01",
        "power-cosine guidance schedule of power 2.75", "guidance interval 9", f"a.npz {content}, 40 images",
        "Inception 01234567", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert part in line, part
    assert result["samples"]["metadata"] == metadata
    assert result["notes"] == ["FD of 40 samples is biased upwards: do not compare it with numbers from 50,000 samples"]


# Resizing


def test_bicubic_resizing_is_pillows_but_for_a_level() -> None:
    for size in (36, 224, 300):
        images = pictures(2, size=size)
        found = resize_bicubic(torch.from_numpy(images), 224).permute(0, 2, 3, 1).numpy()
        expected = [np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) for image in images]
        assert np.abs(found - np.stack(expected)).max() <= 1


def test_llamagens_resize_is_torchs_plain_bicubic_on_values_from_minus_one_to_one() -> None:
    images = torch.from_numpy(pictures(2, size=24))
    values = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    resized = torch.nn.functional.interpolate(values, (16, 16), mode="bicubic")
    expected = (127.5 * resized + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    difference = (resize_as_llamagen(images, 16).int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01  # rounding of halves


def test_samples_of_another_size_need_an_explicit_resize(tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", arr_0=pictures(20, size=24))
    np.savez(tmp_path / "small.npz", arr_0=pictures(20, size=12))
    samples = open_files(str(tmp_path / "large.npz"))
    reference = open_reference(str(tmp_path / "small.npz"), toy(), ["fid"], Compute())
    with pytest.raises(UserError, match=r"samples have 24x24 pixels, the reference 12x12.*--resize 12"):
        evaluate(samples, reference, toy(), ["fid"], Compute())
    with pytest.raises(UserError, match=r"24x24 \(resized to 16\) pixels"):
        check_sizes(samples.size, (12, 12), 16)
    result = evaluate(samples, reference, toy(), ["fid"], Compute(), resize=12)
    small = resize_as_llamagen(torch.from_numpy(pictures(20, size=24)), 12)
    statistics = mean_and_covariance(toy().run(small).features.numpy())
    expected = frechet_distance(*reference.gaussian, *statistics)
    assert result["metrics"]["FID"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert "resized to 12 px" in one_line(result)


# By command


def quick_extractor(name: ExtractorName, device: torch.device, *, inception: Path | None = None) -> Extractor:
    return load_extractor(name, device, inception=inception) if inception else toy("EfficientNet-Lite0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 patches of photographs as samples, and a reference of 50 others."""
    folder = tmp_path_factory.mktemp("evaluation")
    images = np.stack([pixels for _, pixels in open_set("photos:test").read(0, 1)])
    np.savez(folder / "samples.npz", arr_0=images[:40])
    save_folder(folder / "others", images[100:150])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_module, "load_extractor", quick_extractor)
        st_ar("reference", folder / "others", "--out", folder / "reference.npz", *OFFLINE)
    return folder


@pytest.fixture
def pipeline(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`made`, and commands that use a quick network in place of EfficientNet."""
    monkeypatch.setattr(features_module, "load_extractor", quick_extractor)
    return made


def test_a_reference_by_command_says_what_it_is(pipeline: Path, capsys: Capture) -> None:
    meta = read_meta(pipeline / "reference.npz")
    assert (meta["images"], meta["size"], meta["extractor"]["name"]) == (50, [32, 32], "EfficientNet-Lite0")
    out = pipeline / "reference.npz"
    fails(capsys, "exists already", "reference", pipeline / "others", "--out", out, *OFFLINE)
    fails(capsys, "x.pt is not a .npz file", "reference", pipeline / "others", "--out", pipeline / "x.pt", *OFFLINE)


def test_a_reference_with_broken_images_by_command(pipeline: Path, capsys: Capture, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "f", pictures(8, size=32))
    (folder / "000003.png").write_bytes(b"")
    source, made = f"folder:{folder}", tmp_path / "made.npz"
    refusal = "1 of 8 images cannot be used, more than --max-skipped 0.01; the first is 000003.png: empty. Repair or"
    fails(capsys, refusal, "reference", source, "--size", "32", "--out", made, *OFFLINE)
    allowed = ["--max-skipped", "0.2", "--size", "32"]
    st_ar("reference", source, *allowed, "--out", made, *OFFLINE)
    said = f"{source}: 1 of 8 images cannot be used and are left out: 000003.png (empty)"
    assert f"st-ar: note: {said}\n" in capsys.readouterr().err
    evaluated = ["evaluate", pipeline / "samples.npz", *OFFLINE, "--metrics", "fd", "--json", "-", "--reference"]
    fails(capsys, refusal, *evaluated, source, "--size", "32")
    for reference in ([made], [source, *allowed]):
        st_ar(*evaluated, *reference)
        result = json.loads(capsys.readouterr().out)
        assert (result["reference"]["statistics"], result["reference"]["skipped"]) == ("7 images", 1)
        assert result["reference"]["skipped_images"] == [{"index": 3, "name": "000003.png", "reason": "empty"}]
        assert result["notes"][0] == said


def test_evaluate_prints_a_table_a_line_and_json(pipeline: Path, capsys: Capture) -> None:
    command = ["evaluate", pipeline / "samples.npz", "--reference", pipeline / "reference.npz", *OFFLINE]
    st_ar(*command, "--json", pipeline / "result.json", "--metrics", "fd", "precision", "recall", "kid", "coverage")
    out, err = capsys.readouterr()
    result = json.loads((pipeline / "result.json").read_text())
    labels = ["FD-EfficientNet-Lite0", "KD-EfficientNet-Lite0", "KD-EfficientNet-Lite0 std"]
    labels += [f"{name} (EfficientNet-Lite0)" for name in ("precision", "recall", "coverage")]
    assert list(result["metrics"]) == labels
    assert all(np.isfinite(value) for value in result["metrics"].values())
    assert not re.search(r"\bFID\b", out)
    assert one_line(result) in out
    assert "biased upwards" in err
    st_ar(*command, "--json", "-", "--batch-size", "7")
    again = json.loads(capsys.readouterr().out)
    for label, value in again["metrics"].items():
        assert value == pytest.approx(result["metrics"][label], rel=1e-4, abs=1e-5)


def test_the_reference_itself_has_fd_0(pipeline: Path, capsys: Capture) -> None:
    st_ar("evaluate", pipeline / "others", "--reference", pipeline / "reference.npz", *OFFLINE, "--json", "-")
    found = json.loads(capsys.readouterr().out)
    distance, precision, recall = found["metrics"].values()
    assert 0 <= distance < 1e-3
    assert (precision, recall) == (1, 1)
    assert found["samples"]["sha256"] == found["reference"]["sha256"]


def test_errors_are_one_line_with_a_remedy(pipeline: Path, capsys: Capture, tmp_path: Path) -> None:
    def against(name: str, match: str, *more: str | Path, reference: Path | str = pipeline / "reference.npz") -> None:
        fails(capsys, match, "evaluate", tmp_path / name, "--reference", reference, *OFFLINE, *more)

    good = pictures(6, size=32)
    np.savez(tmp_path / "good.npz", arr_0=good)
    against("none.npz", r"none.npz does not exist: give a .npz file with arr_0")
    against("good.npz", "nowhere does not exist: .*image source such as", reference="nowhere")
    against("good.npz", "unknown image source|has no split 'tset'", reference="photos:tset")
    np.savez(tmp_path / "float.npz", arr_0=good / 255)
    against("float.npz", r"arr_0 must be images uint8 \[N, H, W, 3\], not float64 \[6, 32, 32, 3\]")
    np.savez(tmp_path / "first.npz", arr_0=good.transpose(0, 3, 1, 2).copy())
    against("first.npz", r"not uint8 \[6, 3, 32, 32\]")
    np.savez(tmp_path / "named.npz", images=good)
    against("named.npz", "has no array .*arr_0")
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{}], dtype=object))
    against("pickled.npz", r"arr_0 must be images uint8 \[N, H, W, 3\], not object")
    (tmp_path / "text.npz").write_text("hello")
    against("text.npz", "damaged or not a .npz file")
    np.savez(tmp_path / "flipped.npz", arr_0=good)
    flip_byte(tmp_path / "flipped.npz", 5000)
    against("flipped.npz", "flipped.npz is damaged .*CRC.*copy or make it again")
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:9000])
    against("cut.npz", "cut.npz is damaged")
    np.savez(tmp_path / "one.npz", arr_0=good[:1])
    against("one.npz", "1 image cannot have a covariance: give at least 2", "--metrics", "fd")
    np.savez(tmp_path / "three.npz", arr_0=good[:3])
    against("three.npz", "3 images are too few for neighbours: k = 3 needs at least 4")
    (tmp_path / "empty").mkdir()
    against("empty", "holds no PNGs")
    mixed = save_folder(tmp_path / "mixed", good)
    Image.fromarray(pictures(1)[0]).save(mixed / "000003.png")
    against("mixed", "000003.png has 12 x 12 pixels, 000000.png 32 x 32")
    (mixed / "000003.png").write_bytes(b"")
    against("mixed", r"000003.png cannot be used \(empty\)")
    against("good.npz", "--size is 16: leave --size out", "--size", "16")
    against("good.npz", "--metrics is needs another network", "--metrics", "is")
    against("good.npz", "--inception names Inception's weights, and --extractor is efficientnet", "--inception", "x")
    against("good.npz", "--batch-size must be at least 1", "--batch-size", "0")
    against("good.npz", "seeds must be 0 or more", "--seed", "-1")
    against("good.npz", "--resize must be at least 1", "--resize", "0")


def test_wrong_sizes_and_paths_are_refused_before_the_work(pipeline: Path, capsys: Capture, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=pictures(6, size=24))
    (tmp_path / "file").write_text("")
    evaluated = ("evaluate", tmp_path / "s.npz", *OFFLINE, "--reference")
    fails(capsys, "samples have 24x24 pixels, the reference 32x32", *evaluated, pipeline / "others")
    below = tmp_path / "file" / "x.npz"
    fails(capsys, "cannot write .*file is not a folder", "reference", pipeline / "others", "--out", below, *OFFLINE)


def test_a_result_does_not_overwrite_the_samples_metadata(pipeline: Path, capsys: Capture, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", arr_0=pictures(6, size=32))
    said = {"settings": {"cfg_scale": 2.0, "seed": 5}, "weights": {"sha256": "ab", "ema": False}, "labels": [0] * 6}
    (tmp_path / "s.json").write_text(json.dumps(said))
    command = ("evaluate", tmp_path / "s.npz", "--reference", pipeline / "reference.npz", *OFFLINE, "--metrics", "fd")
    fails(
        capsys, "is the metadata file of the samples: give another file name", *command, "--json", tmp_path / "s.json"
    )
    assert json.loads((tmp_path / "s.json").read_text()) == said
    (tmp_path / "s.json").unlink()
    for _ in range(2):  # a result there is no metadata, and may be made again
        st_ar(*command, "--json", tmp_path / "s.json")
    capsys.readouterr()
    assert open_files(str(tmp_path / "s.npz")).metadata == {}
    (tmp_path / "s.json").write_text("[1]")
    assert open_files(str(tmp_path / "s.npz")).metadata == {}
    (tmp_path / "s.json").write_text("{")
    fails(capsys, "s.json is unreadable .* remove it, or copy it again", *command)


def test_unfinished_samples_are_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "f", pictures(3))
    (folder / "job.json").write_text("{}")
    with pytest.raises(UserError, match="holds unfinished samples: run the same `st-ar sample` again"):
        open_files(str(folder))


def test_damaged_references_are_refused(pipeline: Path, tmp_path: Path) -> None:
    extractor = toy("EfficientNet-Lite0")
    with np.load(pipeline / "reference.npz") as arrays:
        good = dict(arrays)
    path = tmp_path / "r.npz"

    def opened(**changed: object) -> None:
        np.savez(path, **(good | changed))
        open_reference(str(path), extractor, ["fd"], Compute())

    opened()
    for match, changed in (
        ("mu or sigma holds NaN", {"mu": np.full(6, np.nan)}),
        (r"have the shapes \[3\] and \[6, 6\], not \[6\]", {"mu": np.zeros(3)}),
        ("its description is invalid", {"st_ar": np.array("hello")}),
        ("its description is invalid", {"st_ar": np.array("[]")}),
        ("has format 2; this st-ar reads 1", {"st_ar": np.array(str(good["st_ar"]).replace(": 1,", ": 2,", 1))}),
    ):
        with pytest.raises(UserError, match=match):
            opened(**changed)
    opened()
    with pytest.raises(UserError, match=r"was made with EfficientNet-Lite0 .*not with Inception"):
        open_reference(str(path), toy(), ["fid"], Compute())
    flip_byte(path, path.stat().st_size // 2)
    with refused(tmp_path, "r.npz is damaged"):
        for metrics in (["fd"], ["fd", "precision"]):
            open_reference(str(path), extractor, metrics, Compute())
        open_set(str(path)).read(0, 1)
        list(open_set(str(path)).read(0, 1))


@pytest.mark.parametrize(
    ("value", "match"),
    [(torch.nan, "hold NaN or infinity"), (-torch.inf, "hold NaN or infinity"), (-1e20, r"reach 1e\+20, above 100000")],
)
@pytest.mark.parametrize("output", [0, 1, 2])
def test_features_that_are_not_finite_or_huge_name_their_image(
    tmp_path: Path, value: float, match: str, output: int
) -> None:
    images = pictures(10)
    images[7] = 255

    def run(pixels: torch.Tensor) -> Extracted:
        extracted = toy().run(pixels)
        extracted[output][(pixels == 255).all(3).all(2).all(1), 1] = value  # pyright: ignore[reportOptionalSubscript]
        return extracted

    broken = replace(toy(), run=run)
    np.savez(tmp_path / "a.npz", arr_0=images)
    folder = save_folder(tmp_path / "f", images)
    for spec, name in (
        (tmp_path / "a.npz", "image 7 of .*a.npz"),
        (folder, "000007.png of .*f"),
        (f"folder:{folder}", "000007.png of folder:.*f"),
    ):
        with pytest.raises(UserError, match=f"^the features of {name} {match}: look for damaged images or weights"):
            collect(open_set(str(spec), size=12), broken, ["fid"], Compute(batch_size=3))
    if output == 0:
        with pytest.raises(UserError, match=f"000007.png of .*f {match}"):
            measure_tokenizer(random_tokenizer(), open_set(str(folder)), broken, Compute())


def test_features_are_computed_in_full_float32_inside_autocast_and_tf32() -> None:
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    seen: list[list[str]] = []

    def run(images: torch.Tensor) -> Extracted:
        seen.append([backend.fp32_precision for backend in backends])
        return Extracted(images.flatten(1).float() @ torch.ones(3, 2))

    before = [backend.fp32_precision for backend in backends]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = Extractor(name="x", weights="", dim=2, run=run).extract(torch.ones(1, 1, 1, 3, dtype=torch.uint8))
        assert found.features.dtype == torch.float32
        assert seen == [["ieee"] * 3]
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[1]
    assert [backend.fp32_precision for backend in backends] == before


def test_images_of_different_sizes_have_different_digests() -> None:
    flat = np.zeros((2, 8, 3), np.uint8)
    assert image_digest(flat) != image_digest(flat.reshape(4, 4, 3))


# DINOv2: the library's own network with random weights, in the place of the large one that it would download


def test_dinov2_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'st-ar\[dinov2\]'"):
        load_extractor("dinov2", torch.device("cpu"))


CACHED = """
import sys, torch, transformers
from pathlib import Path
from st_ar.errors import UserError
from st_ar.evaluation.generation.features import load_extractor, resize_bicubic

transformers.utils.logging.disable_progress_bar()
try:
    load_extractor("dinov2", torch.device("cpu"))
except UserError as error:
    print(error)
torch.manual_seed(0)
config = transformers.Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
network = transformers.Dinov2Model(config).eval()
place = Path(sys.argv[1], "models--facebook--dinov2-large")
network.save_pretrained(place / "snapshots" / "0")
(place / "refs").mkdir()
(place / "refs" / "main").write_text("0")
extractor = load_extractor("dinov2", torch.device("cpu"))
images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
with torch.no_grad():
    expected = network(pixel_values=(resize_bicubic(images, 224) / 255 - mean) / std).pooler_output  # normed class token
assert torch.equal(extractor.run(images).features, expected)
assert (extractor.name, extractor.dim, len(extractor.weights)) == ("DINOv2", 12, 64)
"""


@pytest.mark.slow
def test_dinov2_extracts_the_class_token_of_normalised_images(tmp_path: Path) -> None:
    # A subprocess: huggingface_hub reads its cache folder and HF_HUB_OFFLINE on import.
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CACHED, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("facebook/dinov2-large cannot be loaded (")
    assert "download it on a machine with a network and copy the Hugging Face cache" in done.stdout


# Several ranks


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=read_array(made / "samples.npz", "arr_0")[:12])
    command = ["evaluate", tmp_path / "samples.npz", "--reference", made / "others", *OFFLINE, "--batch-size", "16"]
    command += ["--metrics", "fd", "precision", "recall", "kid", "--json"]
    st_ar(*command, tmp_path / "one.json")
    first, second = checked_torchrun(2, "-m", "st_ar", *command, tmp_path / "two.json", logs=tmp_path / "logs")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one_line(two) in first
    assert second == ""
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, abs=1e-5)
    for part in ("samples", "reference"):
        assert one[part] == two[part]


@pytest.mark.slow
def test_two_ranks_list_the_broken_images_of_both(made: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=read_array(made / "samples.npz", "arr_0")[:12])
    folder = save_folder(tmp_path / "f", read_array(made / "samples.npz", "arr_0")[:12])
    for name in ("000002.png", "000009.png"):
        (folder / name).write_bytes(b"")
    command = ["evaluate", tmp_path / "samples.npz", "--reference", f"folder:{folder}", "--size", "32", *OFFLINE]
    command += ["--metrics", "fd", "--max-skipped", "0.2", "--json", tmp_path / "two.json"]
    checked_torchrun(2, "-m", "st_ar", *command, logs=tmp_path / "logs")
    result = json.loads((tmp_path / "two.json").read_text())
    assert result["reference"]["skipped"] == 2
    assert [(each["index"], each["name"]) for each in result["reference"]["skipped_images"]] == [
        (2, "000002.png"),
        (9, "000009.png"),
    ]
    assert result["notes"][0].endswith(
        "2 of 12 images cannot be used and are left out: 000002.png (empty), 000009.png (empty)"
    )


# Archives whose headers lie


def write_member(path: Path, name: str, shape: tuple[int, ...], data: bytes, dtype: str = "|u1") -> None:
    """A .npz file, whole by its checksums, whose one array's header promises any shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", header.getvalue() + data)


@pytest.mark.parametrize("count", [2, 10**12, 10**30])
def test_a_header_with_too_many_images_is_refused_at_once(tmp_path: Path, count: int) -> None:
    write_member(tmp_path / "x.npz", "arr_0", (count, 4, 4, 3), bytes(48))
    with refused(tmp_path, rf"x\.npz is cut short: arr_0 ends before image 2 of {count}; copy or make it again"):
        open_files(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((10**12,), "|u1"), ((10**30,), "|u1"), ((-8,), "|u1"), ((7,), "|u1"), ((8,), "|O"), ((1,), "<U2147483647")],
)
def test_an_array_takes_no_more_memory_than_its_file_holds(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    write_member(tmp_path / "x.npz", "mu", shape, bytes(8), dtype)
    with refused(tmp_path, r"x\.npz is damaged or not a \.npz file \(.*\): copy or make it again"):
        read_array(tmp_path / "x.npz", "mu")


def test_an_array_is_read_in_either_order_and_may_be_empty(tmp_path: Path) -> None:
    arrays = {"rows": np.arange(6).reshape(2, 3), "columns": np.asfortranarray(np.arange(6).reshape(2, 3))}
    np.savez(tmp_path / "x.npz", **arrays, empty=np.zeros((0, 3)), text=np.array("text"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read_array(tmp_path / "x.npz", name), array)
    assert read_array(tmp_path / "x.npz", "empty").shape == (0, 3)
    assert str(read_array(tmp_path / "x.npz", "text")) == "text"
    with refused(tmp_path, r"x\.npz has no array .*sigma"):
        read_array(tmp_path / "x.npz", "sigma")


@pytest.mark.parametrize("labels", [[0, 1, 10**30], [True, False, True], [0, 1, -1], [0, 1], "012", [0, 1, 0.5]])
def test_invalid_labels_beside_samples_are_ignored(tmp_path: Path, labels: object) -> None:
    np.savez(tmp_path / "x.npz", arr_0=pictures(3))
    (tmp_path / "x.json").write_text(json.dumps({"labels": labels}))
    assert open_files(str(tmp_path / "x.npz")).labels is None


@pytest.mark.parametrize(
    "changes", [{"size": [6]}, {"size": "66"}, {"extractor": None}, {"extractor": {"name": "x"}}, {"images": "20"}]
)
def test_a_reference_with_an_invalid_description_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(20))
    write_reference(open_set(str(tmp_path / "images.npz")), tmp_path / "r.npz", toy(), Compute())
    with np.load(tmp_path / "r.npz") as archive:
        arrays = dict(archive)
    arrays["st_ar"] = np.array(json.dumps(json.loads(str(arrays["st_ar"])) | changes))
    np.savez(tmp_path / "r.npz", **arrays)
    with refused(tmp_path, r"r\.npz is damaged \(its description is invalid\): make it again with `st-ar reference`"):
        open_reference(str(tmp_path / "r.npz"), toy(), ["fid"], Compute())


@pytest.mark.parametrize("value", [np.nan, 1e20])
def test_a_reference_with_features_that_are_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(20))
    write_reference(open_set(str(tmp_path / "images.npz")), tmp_path / "r.npz", toy(), Compute())
    with np.load(tmp_path / "r.npz") as archive:
        arrays = dict(archive)
    arrays["features"][4, 2] = value
    np.savez(tmp_path / "r.npz", **arrays)
    with refused(tmp_path, r"the features of image 4 of .*r\.npz (hold NaN|reach 1e\+20).*: make it again"):
        open_reference(str(tmp_path / "r.npz"), toy(), ["precision"], Compute())


@pytest.mark.parametrize("features", [np.zeros((20, 5), np.float32), np.zeros((20, 6)), np.zeros(20, np.float32)])
def test_a_reference_with_features_of_another_shape_or_type_is_refused(tmp_path: Path, features: np.ndarray) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(20))
    write_reference(open_set(str(tmp_path / "images.npz")), tmp_path / "r.npz", toy(), Compute())
    with np.load(tmp_path / "r.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "r.npz", **(arrays | {"features": features}))
    with refused(tmp_path, r"r\.npz: features are float\d\d \[20.*\], not float32 \[n, 6\]: make it again"):
        open_reference(str(tmp_path / "r.npz"), toy(), ["precision"], Compute())


@pytest.mark.parametrize(
    ("label", "value", "shown"),
    [
        ("FID", 12.34567, "12.346"),
        ("KID", 0.0123456, "0.01235"),
        ("precision (Inception)", 0.65432, "0.6543"),
        ("PSNR (dB)", 22.8, "22.800"),
        ("SSIM", 0.73014, "0.7301"),
        ("codebook usage", 1.0, "1.0000"),
        ("codebook perplexity", 174.0342, "174.034"),
    ],
)
def test_each_metric_has_the_decimals_that_papers_print(label: str, value: float, shown: str) -> None:
    assert format_number(label, value) == shown
