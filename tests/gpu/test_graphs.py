"""torch.compile takes each block as one graph, and as few of them as there are kinds of calls, on fake CUDA.

Proven: dynamo traces the blocks without a break, also when FSDP2 shards them, AOTAutograd makes their backward passes, and a step
does not compile anew. Not proven: that Inductor's kernels are right or fast; tests/gpu/test_kernels.py compiles them.
"""

from typing import Any

import pytest

from tests.gpu.conftest import Script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def graphs(run_script: Script) -> dict[str, Any]:
    return run_script("graphs")


@pytest.mark.parametrize(
    ("run", "count"),
    [
        ("plain", 1),
        ("alternating", 3),  # the student's with a mask and without, and the teacher's
        ("text", 2),  # with gradients and without
        ("guided, sharded", 2),  # the student's with a mask, the teacher's without
    ],
)
def test_training_compiles_few_graphs(graphs: dict[str, Any], run: str, count: int) -> None:
    of_the_loss = 1
    assert graphs[run] == {"graphs": count + of_the_loss, "breaks": 0}


def test_recomputed_blocks_compile_few_graphs(run_script: Script) -> None:
    found = run_script("graphs", "recomputed")
    assert found == {kind: {"graphs": 3, "breaks": 0} for kind in ("full", "selective")}


def test_decoding_compiles_one_graph_for_all_lengths(graphs: dict[str, Any]) -> None:
    assert graphs["decode"] == {"graphs": 1, "breaks": 0, "lengths": [32, 64, 96]}


def test_a_graph_break_is_found(graphs: dict[str, Any]) -> None:
    assert graphs["broken"]["breaks"] == 1
