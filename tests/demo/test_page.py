"""What the page says of the weights that it offers."""

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from st_ar.data.store import TokenStore
from st_ar.demo.models import Shelf
from st_ar.demo.reading import NONE, OWN
from st_ar.demo.serve import describe
from st_ar.demo.setup import Setup
from st_ar.demo.tabs import still_known
from st_ar.demo.understand_tab import still_there
from st_ar.errors import UserError
from tests.data.random_store import random_store
from tests.demo.small_page import export
from tests.small_line import make_line
from tests.toys import TINY


def test_weights_of_one_shape_are_named_together(tmp_path: Path) -> None:
    models = [export(tmp_path / name, replace(TINY, n_layers=layers), 1) for name, layers in (("a", 4), ("<b>", 2))]
    shelf = Shelf(models, make_line(tmp_path).tokenizer, device="cpu", dtype="float32")
    shelf.close()
    size = f"layers of {TINY.dim}, 3 x 3 tokens"
    assert describe(shelf) == f"a, a (EMA): 4 {size}; <b>, <b> (EMA): 2 {size}; cpu, float32"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Generator[Setup]:
    """Two models, of which b has fewer layers, heads and classes than a."""
    folder = tmp_path_factory.mktemp("page")
    models = [
        export(folder / "a", TINY, 1),
        export(folder / "b", replace(TINY, n_layers=2, n_heads=1, num_classes=2), 1, ["ant", "bee"]),
    ]
    shelf = Shelf(models, make_line(folder).tokenizer, device="cpu", dtype="float32")
    yield Setup(shelf=shelf, store=None, probe_store=None)
    shelf.close()


def test_a_store_that_names_other_classes_is_refused(setup: Setup, tmp_path: Path) -> None:
    names = ["bee", "ant"]
    shelf = Shelf(
        [export(tmp_path / "m", replace(TINY, num_classes=2), 1, ["ant", "bee"])],
        make_line(tmp_path).tokenizer,
        device="cpu",
    )
    store = random_store(tmp_path / "store", images=2, grid=TINY.grid, vocab_size=TINY.vocab_size, num_classes=2)[0]
    meta = json.loads((store / "meta.json").read_text())
    meta |= {"class_names": names, "tokenizer": setup.shelf.tokenizer.fingerprint}
    (store / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"names its classes otherwise than m \(class 0 is 'ant' and 'bee'\)"):
        Setup(shelf=shelf, store=TokenStore(store), probe_store=None)
    shelf.close()


def test_classes_stay_chosen_as_far_as_other_weights_know_them(setup: Setup) -> None:
    kept = still_known(setup, "b", [0, 2, 1])
    assert kept["choices"] == [("ant", 0), ("bee", 1)]
    assert kept["value"] == [0, 1]
    assert still_known(setup, "a", [0, 2, 1])["value"] == [0, 2, 1]
    assert still_known(setup, "a", None)["value"] == []


def test_class_layer_and_head_stay_as_far_as_other_weights_have_them(setup: Setup) -> None:
    given, layer, head = still_there(setup, "b", 2, 4, 2)
    assert (given["value"], layer["value"], head["value"]) == (OWN, 2, 0)
    assert layer["maximum"] == 2
    assert head["choices"] == [("average", 0), ("1", 1)]
    assert given["choices"] == [("the image's own", OWN), ("none", NONE), ("ant", 0), ("bee", 1)]
    given, layer, head = still_there(setup, "a", 2, 4, 2)
    assert (given["value"], layer["value"], head["value"]) == (2, 4, 2)
