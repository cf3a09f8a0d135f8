"""Inductor's kernels for an H200, compiled without one.

Proven: every kernel of the compiled blocks and of a decode step compiles for sm_90 and spills no register, and how many kernels a
block launches. Not proven: that the kernels are right (a NaN in them), their speed, and the choices that Inductor makes by timing.
"""

import importlib.util
import math
import re
from typing import Any

import pytest

from tests.gpu.conftest import Script

pytestmark = pytest.mark.slow
Report = dict[str, Any]
FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
LAUNCHES = {
    "plain, forward": (10, {"mm": 5, FLASH: 1}),
    "plain, backward": (13, {"mm": 10, f"{FLASH}_backward": 1}),
    "guided, inference": (10, {"mm": 5, FLASH: 1}),  # the teacher
    "guided, forward": (10, {"mm": 5, EFFICIENT: 1}),
    "guided, backward": (13, {"mm": 10, f"{EFFICIENT}_backward": 1}),
    "decode, inference": (9, {"mm": 5}),
}
"""Fused kernels that a block may launch, and its matrix products and attention."""


@pytest.fixture(scope="module")
def kernels(run_script: Script) -> Report:
    if importlib.util.find_spec("triton") is None:
        pytest.skip(
            "there is no triton, which torch's CPU build does not bring: pip install the version that fits torch"
        )
    return run_script("kernels")


def test_there_are_no_other_graphs(kernels: Report) -> None:
    assert kernels.keys() == LAUNCHES.keys()


@pytest.mark.parametrize("graph", LAUNCHES)
def test_kernels_do_not_spill(kernels: Report, graph: str) -> None:
    resources = [variant for variants in kernels[graph]["kernels"].values() for variant in variants]
    assert resources
    assert [each for each in resources if each["stack"] > 0 or each["registers"] > 128] == []


@pytest.mark.parametrize("graph", LAUNCHES)
def test_a_block_launches_few_kernels(kernels: Report, graph: str) -> None:
    fused, others = LAUNCHES[graph]
    assert kernels[graph]["fused"] <= fused
    assert kernels[graph]["others"] == others


def test_decoding_allocates_no_copy_of_the_cache(kernels: Report) -> None:
    """Its rows are 4, its length is symbolic: at most 257 positions of 12 heads."""
    shapes = [re.sub(r"s\d+", "257", shape) for shape in kernels["decode, inference"]["allocated"]]
    sizes = [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]
    assert max(sizes) == 4 * 12 * 257  # attention weights; the cache has 64 times as many numbers
