"""What the page says of the weights that it offers."""

from dataclasses import replace
from pathlib import Path

from st_ar.demo.page import describe
from st_ar.demo.shelf import Shelf
from tests.demo.small_page import export
from tests.small_line import make_line
from tests.toys import TINY


def test_weights_of_one_shape_are_named_together(tmp_path: Path) -> None:
    models = [export(tmp_path / name, replace(TINY, n_layers=layers), 1) for name, layers in (("a", 4), ("<b>", 2))]
    shelf = Shelf(models, make_line(tmp_path).tokenizer, device="cpu", dtype="float32")
    shelf.close()
    size = f"layers of {TINY.dim}, 3 x 3 tokens"
    assert describe(shelf) == f"a, a (EMA): 4 {size}; <b>, <b> (EMA): 2 {size}; cpu, float32"
