"""The ways of benchmarks/gpu_attention.py on fake CUDA; prints the kernels of each as JSON: python -m tests.gpu.ways."""

from tests.gpu import fake_cuda  # isort: skip -- before torch

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def main() -> None:
    import gpu_attention

    fake_cuda.choose_device()
    found: dict[str, object] = {}
    with fake_cuda.MODE:
        inputs = {name: torch.zeros(4, 256, 12, 64, device=fake_cuda.DEVICE, dtype=torch.bfloat16) for name in "qkv"}
        slope = torch.zeros(4, 12, 256, 64, device=fake_cuda.DEVICE, dtype=torch.bfloat16)
        hidden = torch.zeros(4, 256, dtype=torch.bool, device=fake_cuda.DEVICE)
        for name, way in gpu_attention.ways(fake_cuda.DEVICE).items():
            if name != "FlexAttention":  # which is compiled
                with fake_cuda.Recorder() as recorder:
                    mask = way.prepare(hidden, 12)
                    gpu_attention.with_gradients(
                        lambda q, k, v, way=way, mask=mask: way.attend(q, k, v, mask), inputs, slope
                    )
                found[name] = recorder.report()
    print(json.dumps(found))


if __name__ == "__main__":
    fake_cuda.run(main)
