"""What stands in for what, when the commands of README.md and docs/ are run here: everything that the tests change in them.

A command is run unless PARSED says why it cannot be; then the command line's own parser reads it, so that a wrong option fails.
"""

TINY: list[tuple[str, str]] = [
    # The photographs: 16 classes of drawn pictures in a folder, which has other defaults for size and range.
    (r"(tokenize --images) photos:(\w+)", r"\1 folder:photos/\2 --size 32 --crop-range 1.125"),
    (r"(train-tokenizer kmeans --images) photos", r"\1 folder:photos/train --size 32"),
    # Short runs, small batches, few images.
    (r"^(st-ar train .*--steps) \d+", r"\1 3"),
    (r"^(st-ar train (?!.*--steps ).*)$", r"\1 --steps 3"),
    (r"^(st-ar train .*--batch-size) \d+", r"\1 8"),
    (r"^(st-ar train (?!.*--batch-size ).*)$", r"\1 --batch-size 8"),
    (r"^(st-ar sample .*--num) \d+", r"\1 4"),
    (r"^(st-ar sample (?!.*(--num|--per-class) ).*)$", r"\1 --num 4"),
    (r"^(st-ar probe .*)$", r"\1 --epochs 2"),
    (r"^(python benchmarks/)", r"python ROOT/benchmarks/"),
]
"""Pattern -> what takes its place in a command, all in this order."""

PARSED: list[tuple[str, str]] = [
    (r"^torchrun ", "several processes or machines"),
    (r"^curl ", "downloads"),
    (r"^(make|pip|python3 -m venv|\. )", "installs"),
    (r"^tensorboard ", "serves until it is stopped"),
    (r"^st-ar demo", "serves until it is stopped; the page has tests of its own"),
    (r"st-ar-b-50|tokens-val", "ImageNet's page"),
    (r"my-reference", "needs Inception's weights"),
    (r"train-classifier|--classifier", "trains for minutes; the classifier's own tests run it"),
    (
        r"imagenet|vq_ds16_c2i|c2i_B_(256|384)|samples-256|my-run|\bvq-16\b",
        "needs ImageNet, published weights or a large tokenizer",
    ),
    (r"^st-ar train (st-ar|llamagen)-(b|xl|xl-t2i) ", "a model for GPUs"),
    (r"hub:|push_to_hub", "needs the hub"),
    (r"cifar10|mnist", "needs a data set and an hour"),
    (r"^st-ar quickstart", "takes minutes; the quickstart has tests of its own"),
    (r"^st-ar reproduce", "takes minutes; the tables have tests of their own"),
    (r"^python (autoregressive|evaluations)/", "a script of LlamaGen's"),
    (r"^python examples/", "takes minutes; the examples have tests of their own"),
]
"""Pattern -> why a command that it finds is parsed instead of run."""

PARSED_PYTHON = {
    "google/flan-t5-xl": "needs the encoder's weights",
    "numpy.arange(4), model.config.text_tokens": "needs a text model",
}
"""Text -> why a block of Python that holds it is compiled instead of run; what it imports of st_ar must exist."""

SHELL_WORDS: list[tuple[str, str]] = [
    (r"\$\(\[ [^)]*\)|\$resume", "--resume"),
    (r"\$\((?!which)[^)]*\)", "HOST"),
    (r"\$SKYPILOT_NODE_RANK", "0"),
    (r"\$SKYPILOT_NUM_\w+", "8"),
    (r"\$\{?\w+\}?", "VALUE"),
]
"""Pattern -> what stands for it where a script's commands are parsed."""

LISTINGS = {
    ("README.md", "src/st_ar/"),
    ("development.md", "src/st_ar/"),
    (
        "development.md",
        "tests/          one folder for each folder of the package; reference/ has the equations as naive loops, fixtures/ outputs",
    ),
    ("demo.md", "ssh -L 7860:localhost:7860 machine"),
    ("demo.md", "location /demo/ {"),
    ("own-images.md", "pictures/"),
    ("own-model.md", "AR     step   1  next token 5.668"),
    (
        "llamagen.md",
        "torchrun --nproc_per_node=8 autoregressive/train/extract_codes_c2i.py --vq-ckpt vq_ds16_c2i.pt "
        "--data-path imagenet/train \\",
    ),
}
"""(page, first line) of blocks that hold no command of ours: layouts, figures, LlamaGen's commands. formats.md has such alone."""
