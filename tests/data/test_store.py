"""The token store and its batches; damaged and unsuitable stores are refused by name."""

import gc
import json
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_ar.config import ModelConfig
from st_ar.data import store as store_module
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.distributed import Ranks
from tests.data.random_store import FINGERPRINT, checksum, random_store, write_store
from tests.disk import flip_byte, refused

SUITABLE = ModelConfig(dim=32, n_layers=1, n_heads=2, vocab_size=16, grid=4, num_classes=3)
FIRST_CODES, LAST_LABELS = "codes-00000-of-00003.npy", "labels-00002-of-00003.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_store(tmp_path / "store", images=11, crops=3, shards=3)[0]


def edit_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def replace_shard(folder: Path, name: str, array: np.ndarray) -> None:
    """Write another array under a shard's name, with its checksum."""
    np.save(folder / name, array)
    meta = json.loads((folder / "meta.json").read_text())
    what = name.partition("-")[0]
    for shard in meta["shards"]:
        if shard[what] == name:
            shard[f"{what}_sha256"] = checksum(folder / name)
    (folder / "meta.json").write_text(json.dumps(meta))


@given(
    data=st.data(),
    images=st.integers(1, 30),
    crops=st.integers(1, 10),
    grid=st.integers(1, 3),
    shards=st.integers(1, 4),
)
def test_codes_and_labels_come_back_for_any_number_of_shards(
    data: st.DataObject, images: int, crops: int, grid: int, shards: int
) -> None:
    shards = min(shards, images)
    with TemporaryDirectory() as temporary:
        folder, codes, labels = random_store(
            Path(temporary) / "store", images=images, crops=crops, grid=grid, vocab_size=1 << 16, shards=shards
        )
        store = TokenStore(folder)
        store.verify()
        assert len(store) == images
        assert store.labels.dtype == np.int64
        np.testing.assert_array_equal(store.labels, labels)
        wanted = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=20), label="images")
        chosen = data.draw(
            st.lists(
                st.lists(st.integers(0, crops - 1), min_size=2, max_size=2), min_size=len(wanted), max_size=len(wanted)
            ),
            label="crops",
        )
        read = store.codes(np.array(wanted), np.array(chosen))
        assert read.dtype == np.uint16
        for row, (image, image_crops) in enumerate(zip(wanted, chosen, strict=True)):
            np.testing.assert_array_equal(read[row], codes[image][image_crops])


def test_a_store_of_many_shards_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "OPEN", 3)
    folder, codes, labels = random_store(tmp_path / "store", images=40, crops=2, shards=40)

    def open_files() -> int:
        gc.collect()  # left by other tests
        return len(list(Path("/dev/fd").iterdir()))

    before = open_files()
    store = TokenStore(folder)
    assert open_files() <= before
    images = np.array([39, 0, 17, 5, 17, 22])
    crops = np.array([[0, 1], [1, 0]] * 3)
    np.testing.assert_array_equal(store.codes(images, crops), codes[images[:, None], crops])
    assert open_files() <= before + 3
    np.testing.assert_array_equal(store.labels, labels)


def test_a_suitable_model_is_accepted(folder: Path) -> None:
    TokenStore(folder).check_model(SUITABLE)
    TokenStore(folder).check_model(SUITABLE, FINGERPRINT)


@pytest.mark.parametrize("name", [FIRST_CODES, LAST_LABELS])
def test_verify_names_the_shard_with_a_flipped_byte(folder: Path, name: str) -> None:
    if name == LAST_LABELS:  # still a valid label
        labels = np.load(folder / name)
        labels[-1] = (labels[-1] + 1) % 3
        np.save(folder / name, labels)
    else:
        flip_byte(folder / name)
    store = TokenStore(folder)
    with refused(folder, rf"{name} is damaged \(.* checksum in meta.json\): tokenize again"):
        store.verify()


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(folder: Path, label: int) -> None:
    labels = np.load(folder / LAST_LABELS)
    labels[-1] = label
    np.save(folder / LAST_LABELS, labels)
    low, high = (-1, 2) if label < 0 else (0, 3)
    with refused(folder, rf"has labels {low} to {high}, but its meta.json names 3 classes; tokenize again"):
        TokenStore(folder)


@pytest.mark.parametrize("left", [0, 40, 200, -1])
@pytest.mark.parametrize("name", [FIRST_CODES, LAST_LABELS])
def test_a_truncated_shard_is_refused(folder: Path, name: str, left: int) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: min(left, len(whole) - 1)])
    with refused(folder, rf"{name} is truncated or damaged .*tokenize again"):
        TokenStore(folder)


@pytest.mark.parametrize("name", [FIRST_CODES, LAST_LABELS])
def test_a_missing_shard_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with refused(folder, rf"{name} is missing from the token store; tokenize again"):
        TokenStore(folder)


def test_a_shard_of_pickled_objects_is_never_unpickled(folder: Path) -> None:
    np.save(folder / FIRST_CODES, np.array([Path("/")], object), allow_pickle=True)
    with refused(folder, rf"{FIRST_CODES} is truncated or damaged"):
        TokenStore(folder)


@pytest.mark.parametrize(
    ("name", "array", "found", "expected"),
    [
        (FIRST_CODES, np.zeros((4, 3, 16), np.int64), r"int64 \[4, 3, 16\]", r"uint16 \[4, 3, 16\]"),
        (FIRST_CODES, np.zeros((4, 3, 9), np.uint16), r"uint16 \[4, 3, 9\]", r"uint16 \[4, 3, 16\]"),
        (FIRST_CODES, np.zeros((3, 3, 16), np.uint16), r"uint16 \[3, 3, 16\]", r"uint16 \[4, 3, 16\]"),
        (LAST_LABELS, np.zeros(3, np.float32), r"float32 \[3\]", r"int32 \[3\]"),
    ],
)
def test_a_shard_of_another_type_or_shape_is_refused_with_both(
    folder: Path, name: str, array: np.ndarray, found: str, expected: str
) -> None:
    replace_shard(folder, name, array)
    with refused(folder, rf"{name} is {found}, but meta.json says {expected}"):
        TokenStore(folder)


@pytest.mark.parametrize("version", [0, 2, None])
def test_another_format_version_is_refused(folder: Path, version: int | None) -> None:
    edit_meta(folder, format_version=version)
    with refused(folder, rf"format version {version}; this st-ar reads 1"):
        TokenStore(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"images": 12}, "has 11 images, but its meta.json says 12"), ({"images": 0, "shards": []}, "has 0 images")],
)
def test_a_wrong_number_of_images_is_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_meta(folder, **changes)
    with refused(folder, message):
        TokenStore(folder)


@pytest.mark.parametrize(
    "meta", ["", "{", "[]", "null", '{"format_version": 1}', '{"format_version": 1, "shards": [{}]}', "\x00\xff"]
)
def test_a_damaged_meta_is_refused(folder: Path, meta: str) -> None:
    (folder / "meta.json").write_text(meta, encoding="latin-1")
    with refused(folder, "damaged"):
        TokenStore(folder)


@pytest.mark.parametrize("changes", [{"grid": "4"}, {"crops": None}, {"shards": [{"images": 4}]}, {"shards": 3}])
def test_invalid_values_in_meta_are_refused(folder: Path, changes: dict[str, object]) -> None:
    edit_meta(folder, **changes)
    with refused(folder, "meta.json is damaged .*tokenize again"):
        TokenStore(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with refused(tmp_path, "nowhere is not a token store: no such folder; `st-ar tokenize` makes one"):
        TokenStore(tmp_path / "nowhere")


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused(tmp_path, r"meta.json is missing: .* is not a token store"):
        TokenStore(tmp_path)


def test_an_unfinished_store_says_how_to_finish_it(folder: Path) -> None:
    shutil.move(folder / "meta.json", folder / "job.json")
    with refused(folder, "is an unfinished token store: run the same `st-ar tokenize` again"):
        TokenStore(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 32}, "has 16 tokens in the codebook, the model 32: train with --model.vocab-size 16"),
        ({"grid": 8}, "has 4 tokens a side, the model 8: train with --model.grid 4"),
        ({"num_classes": 1000}, "has 3 classes, the model 1000: train with --model.num-classes 3"),
    ],
)
def test_an_unsuitable_model_is_refused_with_both_values_and_the_remedy(
    folder: Path, changes: dict[str, int], message: str
) -> None:
    kept = {
        name: getattr(SUITABLE, name) for name in ("dim", "n_layers", "n_heads", "vocab_size", "grid", "num_classes")
    }
    store = TokenStore(folder)
    with refused(folder, message):
        store.check_model(ModelConfig(**(kept | changes)))


def test_a_model_of_another_tokenizer_is_refused_with_both_fingerprints(folder: Path) -> None:
    store = TokenStore(folder)
    with refused(
        folder, "was made by tokenizer 0123456789ab, .* codes of fedcba987654: tokenize the images with the model's"
    ):
        store.check_model(SUITABLE, FINGERPRINT[::-1])


def test_swapped_entries_of_shards_are_refused(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    edit_meta(folder, shards=meta["shards"][::-1])
    with refused(folder, r"meta\.json is damaged \(its entry 0 is not of that shard\): tokenize again"):
        TokenStore(folder)


@pytest.mark.parametrize("key", ["codes_sha256", "labels_sha256"])
def test_a_missing_checksum_is_refused(folder: Path, key: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    del meta["shards"][2][key]
    edit_meta(folder, shards=meta["shards"])
    with refused(folder, r"meta\.json is damaged \(its entry 2"):
        TokenStore(folder)


def test_codes_beyond_the_codebook_are_found(folder: Path) -> None:
    edit_meta(folder, vocab_size=7)
    with refused(folder, r"has codes up to 15, but its meta\.json says vocab_size 7; tokenize again"):
        TokenStore(folder).verify()


def numbered_store(folder: Path, *, images: int, crops: int) -> TokenStore:
    """A store with the codes image * crops + crop and the labels image % 7."""
    codes = np.arange(images * crops).reshape(images, crops, 1).repeat(4, axis=2)
    write_store(folder, codes, np.arange(images) % 7, vocab_size=1 << 16, num_classes=7, shards=min(3, images))
    return TokenStore(folder)


@given(images=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 1 << 31))
def test_every_epoch_visits_every_image_exactly_once(images: int, batch: int, seed: int) -> None:
    with TemporaryDirectory() as temporary:
        views = TokenBatches(
            numbered_store(Path(temporary) / "s", images=images, crops=1), batch_size=batch, views=1, seed=seed
        )
        steps = -(-3 * images // batch)
        visited = np.concatenate([views.images(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(visited[epoch * images : (epoch + 1) * images]) == list(range(images))


@given(images=st.integers(1, 25), batch=st.integers(1, 30), count=st.integers(1, 5), step=st.integers(0, 1000))
def test_views_are_different_crops_of_the_labelled_image(images: int, batch: int, count: int, step: int) -> None:
    with TemporaryDirectory() as temporary:
        views = TokenBatches(
            numbered_store(Path(temporary) / "s", images=images, crops=5), batch_size=batch, views=count, seed=1
        )
        tokens, labels = views.batch(step)
        chosen = views.images(step)
    assert (tokens.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert tokens.shape == (batch, count, 4)
    assert (tokens == tokens[..., :1]).all()
    assert (tokens[..., 0] // 5 == torch.from_numpy(chosen)[:, None]).all()
    assert labels.tolist() == [int(image) % 7 for image in chosen]
    assert all(len(set(crops)) == count for crops in (tokens[..., 0] % 5).tolist())


def test_a_batch_depends_only_on_seed_and_step(tmp_path: Path) -> None:
    store = TokenStore(random_store(tmp_path / "store", shards=3)[0])
    views = TokenBatches(store, batch_size=7, views=2, seed=3)
    forward = [views.batch(step) for step in range(20)]
    for step in [19, 4, 4, 0, 11, 3]:  # over several epochs, back and forth
        fresh = TokenBatches(TokenStore(tmp_path / "store"), batch_size=7, views=2, seed=3).batch(step)
        for expected, again, new in zip(forward[step], views.batch(step), fresh, strict=True):
            assert torch.equal(expected, again)
            assert torch.equal(expected, new)


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1)])
def test_another_seed_or_epoch_has_another_order_and_other_crops(tmp_path: Path, seed: int, epoch: int) -> None:
    store = numbered_store(tmp_path / "store", images=50, crops=10)
    batches = [
        TokenBatches(store, batch_size=50, views=1, seed=s).batch(e)[0][:, 0, 0] for s, e in [(0, 0), (seed, epoch)]
    ]
    assert (batches[0] // 10).tolist() != (batches[1] // 10).tolist()
    crops_by_image = [(batch % 10)[(batch // 10).argsort()].tolist() for batch in batches]
    assert crops_by_image[0] != crops_by_image[1]


def test_every_crop_is_drawn_equally_often(tmp_path: Path) -> None:
    views = TokenBatches(numbered_store(tmp_path / "store", images=50, crops=10), batch_size=50, views=2, seed=0)
    drawn = Counter(int(code) % 10 for step in range(40) for code in views.batch(step)[0][..., 0].flatten())
    assert sorted(drawn) == list(range(10))
    # 4,000 draws of 10 crops: 400 each, with a standard deviation of 18 (distinct within an image, so a bit less).
    assert all(abs(count - 400) < 90 for count in drawn.values()), drawn


def test_the_data_order_never_changes(tmp_path: Path) -> None:
    # Runs begun with one version of st-ar are resumed with another: the order is part of the format.
    views = TokenBatches(numbered_store(tmp_path / "store", images=10, crops=5), batch_size=4, views=2, seed=6)
    epochs = [np.random.default_rng([6, 1, epoch]).permutation(10) for epoch in (0, 1)]
    images = np.concatenate(epochs)[8:12]  # of step 2: the end of one epoch and the beginning of the next
    crops = np.random.default_rng([6, 2, 2]).random((4, 5)).argsort(axis=1)[:, :2]
    assert views.images(2).tolist() == images.tolist()
    assert views.batch(2)[0][..., 0].tolist() == (5 * images[:, None] + crops).tolist()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_ranks_batches_joined_are_those_of_one(tmp_path: Path, world: int) -> None:
    store = numbered_store(tmp_path / "store", images=20, crops=5)
    settings: dict[str, Any] = {"batch_size": 6, "views": 2, "seed": 1}
    alone = TokenBatches(store, **settings)
    ranks = [TokenBatches(store, **settings, ranks=Ranks(rank=rank, world=world)) for rank in range(world)]
    for step in (0, 3):  # step 3 has the end of one epoch and the beginning of the next
        tokens, labels = (torch.cat(parts) for parts in zip(*(rank.batch(step) for rank in ranks), strict=True))
        assert torch.equal(tokens, alone.batch(step)[0])
        assert torch.equal(labels, alone.batch(step)[1])


def test_more_views_than_crops_are_refused_with_both_and_the_remedy(tmp_path: Path) -> None:
    store = TokenStore(random_store(tmp_path / "store", crops=1)[0])
    with refused(
        tmp_path, "--views 2 asks for different crops of an image, .* has 1 of each: tokenize with --crops ten"
    ):
        TokenBatches(store, batch_size=4, views=2, seed=0)
