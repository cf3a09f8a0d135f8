"""Two machines with one torchrun each, as in docs/training.md; here both are this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from st_ar.cli import main
from st_ar.training.run import read_log
from tests.data.random_store import random_store
from tests.ranks import ROOT

MODEL = "--model.dim 32 --model.n-layers 2 --model.n-heads 2 --model.vocab-size 16 --model.grid 4 --model.num-classes 3"
SETTINGS = "--batch-size 8 --views 1 --optim.warmup-steps 0 --optim.schedule constant --log-every 1 --device cpu --dtype float32"


def command(tokens: Path, out: Path, steps: int) -> list[str]:
    """Plain training, toy-sized."""
    return ["train", "llamagen-photos", *f"--tokens {tokens} --out {out} --steps {steps} {MODEL} {SETTINGS}".split()]


def start(machine: int, port: int, logs: Path, *arguments: str) -> subprocess.Popen[str]:
    """One machine's torchrun, one rank."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run"]
    launch += ["--local-addr", "127.0.0.1", "-m", "st_ar", *arguments]
    with open(logs / f"machine-{machine}-{time.time_ns()}.log", "w") as log:
        return subprocess.Popen(
            launch, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT, text=True
        )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def said(logs: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(logs.glob("machine-*.log")))


@pytest.mark.slow
def test_two_machines_train_as_one_and_save_when_one_is_asked_to_stop(tmp_path: Path) -> None:
    tokens = random_store(tmp_path / "tokens", images=20, crops=4)[0]
    out, alone = tmp_path / "run", tmp_path / "alone"
    agents = [
        start(machine, port, tmp_path, *command(tokens, out, 100_000)) for port in [free_port()] for machine in (0, 1)
    ]
    try:
        until = time.monotonic() + 90
        while len(read_log(out / "log.jsonl")) < 5 and time.monotonic() < until:
            time.sleep(0.1)
        agents[1].send_signal(signal.SIGTERM)  # as Slurm does before the time is up
        codes = [agent.wait(60) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert all(codes), said(tmp_path)
    step = json.loads((out / "export" / "config.json").read_text())["step"]
    assert step >= 5, said(tmp_path)
    port = free_port()
    again = [*command(tokens, out, step + 3), "--resume"]
    agents = [start(machine, port, tmp_path, *again) for machine in (0, 1)]
    assert [agent.wait(60) for agent in agents] == [0, 0], said(tmp_path)
    log = read_log(out / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, step + 4))
    main(command(tokens, alone, 5))
    for found, wanted in zip(log, read_log(alone / "log.jsonl"), strict=False):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
