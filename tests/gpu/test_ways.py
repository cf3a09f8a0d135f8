"""Ways to compute attention on a GPU, on fake CUDA."""

import pytest

from tests.gpu.conftest import Script


@pytest.mark.slow
def test_each_way_uses_its_kernel_and_waits_for_nothing(run_script: Script) -> None:
    kernels = {
        "mask T x T": "efficient",
        "widened head": "flash",
        "unmasked, causal": "flash",
        "mask T x T, cuDNN": "cudnn",
        "causal and key bias": "efficient",
        "unmasked, causal, cuDNN": "cudnn",
        "unmasked, causal, memory-efficient": "efficient",
    }
    found = run_script("ways")
    assert {name: report["attention"] for name, report in found.items()} == {
        name: {kernel: 1, f"{kernel} backward": 1} for name, kernel in kernels.items()
    }
    for report in found.values():
        assert not any(report[kind] for kind in ("wait", "copy", "mixed", "float64"))
