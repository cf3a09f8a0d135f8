"""What the line on CIFAR-10 of docs/tokenizers.md reached, read from the folders that its commands wrote.

    python benchmarks/cifar10.py --tokenizer tokenizer --run ar --test-tokens tokens-test

Paces and losses come from the runs' logs; the validation loss is computed here, on the test images' centre crops.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from common import save
from st_ar.data.store import TokenStore
from st_ar.evaluation.likelihood import validation_loss
from st_ar.model.weights import open_model


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def pace(lines: list[dict[str, Any]], per_second: str, per_step: int) -> dict[str, float]:
    """The pace over the run's lines, and the seconds that it makes in all."""
    lines = [line for line in lines if per_second in line]
    low, median, high = statistics.quantiles((line[per_second] for line in lines), n=4)
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 0}, *lines], lines, strict=False)]
    seconds = sum(count * per_step / line[per_second] for count, line in zip(steps, lines, strict=True))
    return {"median": median, "quartile_low": low, "quartile_high": high, "seconds_in_all": seconds}


def main() -> None:
    """Read, compute, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--test-tokens", type=Path, required=True)
    given = parser.parse_args()
    tokenizer = json.loads((given.tokenizer / "config.json").read_text(encoding="utf-8"))
    trained = json.loads((given.run / "config.json").read_text(encoding="utf-8"))
    lines, evaluated = log_of(given.tokenizer), log_of(given.tokenizer)[-1]
    model, info = open_model(given.run, ema=True)
    config = trained["config"]
    results = {
        "tokenizer": {
            "preset": tokenizer["preset"],
            "steps": evaluated["step"],
            "made in": tokenizer["environment"],
            "images/s": pace(lines, "images_per_second", tokenizer["config"]["batch_size"]),
            **{name: evaluated[name] for name in ("images", "psnr", "ssim", "usage", "perplexity")},
        },
        "model": {
            "preset": trained["preset"],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": info.step,
            "made in": trained["environment"],
            "tokens/s": pace(
                log_of(given.run),
                "tokens_per_second",
                config["batch_size"] * config["views"] * info.config.sequence_length,
            ),
            "validation loss, EMA": validation_loss(model, TokenStore(given.test_tokens)),
            "validation loss, live": validation_loss(open_model(given.run)[0], TokenStore(given.test_tokens)),
            "uniform guess": math.log(info.config.vocab_size),
        },
    }
    print(json.dumps(results, indent=1))
    save("cifar10-cpu", results)


if __name__ == "__main__":
    main()
