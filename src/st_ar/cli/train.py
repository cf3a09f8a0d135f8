"""Commands from images to a trained model: train-tokenizer, tokenize, import-tokens, train, convert."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro

from st_ar.cli import options, require_one_rank
from st_ar.config import VQ_PRESETS, PlanConfig, RunConfig, TrainConfig, VQTrainConfig, WatchConfig
from st_ar.errors import UserError, listed
from st_ar.presets import PRESETS, get_preset, unknown_preset

if TYPE_CHECKING:
    from st_ar.data.store import TokenStore


@dataclass(kw_only=True)
class TrainKMeans:
    """Fit a k-means codebook of pixel patches, in seconds."""

    images: options.ImageSource
    out: Path
    """Folder of the tokenizer."""
    vocab_size: int = 256
    """Codes in the codebook."""
    patch: int = 4
    """Side of a patch in pixels."""
    size: int | None = None
    """Side of the crops in pixels. By default the source's size."""
    seed: int = 0
    """Random seed of the clustering."""

    def run(self) -> None:
        from st_ar.data.images import open_images
        from st_ar.data.source import note_enlarged
        from st_ar.files import require_absent
        from st_ar.tokenizer.kmeans import CODEBOOK, train_kmeans

        require_absent(self.out, "a tokenizer", besides=[CODEBOOK])
        source = open_images(self.images)
        if self.size is None:
            note_enlarged(source)
        tokenizer = train_kmeans(source, vocab_size=self.vocab_size, patch=self.patch, size=self.size, seed=self.seed)
        tokenizer.save(self.out)
        print(f"{self.out}: {tokenizer.vocab_size} codes of {self.patch} x {self.patch} pixels")


@dataclass(kw_only=True)
class TrainVQ:
    """Train a VQ-GAN."""

    preset: tyro.conf.Suppress[str] = ""
    images: options.ImageSource
    out: Path
    """Folder of the run, which is also the tokenizer's folder."""
    test_images: str | None = None
    """Image source for PSNR, SSIM and codebook usage. By default the training images."""
    init: Path | None = None
    """VQ tokenizer to start from instead of random weights: a folder, or LlamaGen's .pt."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint, with the same settings."""
    workers: options.Workers = None
    config: Annotated[VQTrainConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        from st_ar.data.images import open_images
        from st_ar.distributed import Ranks
        from st_ar.training.vqgan import train_tokenizer

        train_tokenizer(
            self.config,
            open_images(self.images),
            self.out,
            test_images=open_images(self.test_images) if self.test_images else None,
            init=self.init,
            resume=self.resume,
            preset=self.preset,
            workers=self.workers,
        )
        if Ranks.from_environment().rank == 0:
            print(f"{self.out}: tokenizer trained; reconstructions in {self.out / 'reconstructions'}")


@dataclass(kw_only=True)
class Tokenize:
    """Encode all crops of all images into a token store. Run the same command again to continue a stopped job."""

    images: options.ImageSource
    tokenizer: options.Tokenizer
    out: Path
    """Folder of the token store."""
    crops: Literal["center", "center-mirror", "ten"] = "ten"
    """Crops of each image: the centre, the centre and its mirror image, or ten (corners, centre and their mirror images)."""
    size: int | None = None
    """Side of a crop in pixels. By default 32 for photos and digits, 256 for others."""
    crop_range: float | None = None
    """Shorter side before cropping, in multiples of --size. By default 1.125 for photos and digits, else 1.1 (ten crops) or 1.0."""
    mirror: bool = True
    """Include mirror images. Digits are never mirrored."""
    workers: options.Workers = None
    batch_size: int = 256
    """Crops to encode at once."""
    max_skipped: options.MaxSkipped = 0.01
    num_classes: int | None = None
    """Number of classes, for labels that are numbers. Give it if the images may lack the last classes."""
    device: options.Device = "auto"
    dtype: options.VQType = "float32"
    compile: bool | Literal["auto"] = False
    """Compile a VQ network with torch.compile: faster after half a minute; changes a few codes. auto compiles on GPUs."""

    def run(self) -> None:
        from st_ar.data.decoding import default_workers
        from st_ar.data.images import open_images, with_num_classes
        from st_ar.data.source import Crops, note_enlarged
        from st_ar.distributed import Ranks
        from st_ar.tokenizer import open_tokenizer
        from st_ar.tokenizer.tokenize import tokenize

        source = open_images(self.images)
        if self.size is None:
            note_enlarged(source)
        if self.num_classes is not None:
            source = with_num_classes(source, self.num_classes)
        crops = Crops(
            kind=self.crops,
            size=self.size if self.size is not None else source.size,
            range=self.crop_range if self.crop_range is not None else source.range_for(self.crops),
            mirror=self.mirror and source.mirror,
        )
        store = tokenize(
            source,
            open_tokenizer(self.tokenizer, self.device, self.dtype, self.compile),
            crops,
            self.out,
            batch_size=self.batch_size,
            workers=self.workers if self.workers is not None else default_workers(source.count),
            max_skipped=self.max_skipped,
        )
        if Ranks.from_environment().rank == 0:
            print(_describe_store(self.out, store))


@dataclass(kw_only=True)
class ImportTokens:
    """Make a token store from the .npy files that LlamaGen's extraction script writes.

    Run the same command again to continue a stopped import.
    """

    codes: Path
    """Folder imagenet{size}_codes: {i}.npy, integers [1, crops, tokens]."""
    labels: Path
    """Folder imagenet{size}_labels: {i}.npy, integers [1]."""
    out: Path
    """Folder of the token store."""
    vocab_size: int = 16384
    """Codes in the tokenizer's codebook."""
    more_codes: Path | None = None
    """Second folder of crops of the same images, such as LlamaGen's at range 1.05."""
    num_classes: int | None = None
    """Number of classes. By default the largest label plus one."""
    tokenizer: Path | None = None
    """Tokenizer of the codes. With it, the store is checked against models, and samples can be decoded."""
    max_skipped: options.MaxSkipped = 0.01

    def run(self) -> None:
        from st_ar.data.llamagen import import_tokens
        from st_ar.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        if tokenizer and tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{self.tokenizer} has {tokenizer.vocab_size} codes, and --vocab-size is {self.vocab_size}: give the same number"
            )
        store = import_tokens(
            self.codes,
            self.labels,
            self.out,
            vocab_size=self.vocab_size,
            more_codes=self.more_codes,
            num_classes=self.num_classes,
            tokenizer=tokenizer.fingerprint if tokenizer else "",
            max_skipped=self.max_skipped,
        )
        print(_describe_store(self.out, store))


def _describe_store(out: Path, store: "TokenStore") -> str:
    import numpy as np

    grid, meta = store.meta.grid, store.meta
    skipped = (
        f"; {meta.skipped} unusable image{'s' * (meta.skipped > 1)}, listed in {out / 'skipped.jsonl'}"
        if meta.skipped
        else ""
    )
    images = np.bincount(store.labels, minlength=len(meta.class_names))
    counts = " to ".join(f"{count:,}" for count in sorted({images.min(), images.max()}))
    classes = f"{len(images)} classes of {counts} images" if len(images) > 1 else "1 class"
    if empty := [meta.class_names[label] for label in store.empty_classes]:
        classes += f", none of {listed(empty)}"
    crops = "1 crop" if len(meta.crops) == 1 else f"{len(meta.crops)} crops"
    return f"{out}: {len(store):,} images x {crops} x {grid} x {grid} tokens; {classes}{skipped}"


@dataclass(kw_only=True)
class Train:
    """Train a model on a token store."""

    preset: tyro.conf.Suppress[str] = ""
    tokens: Path
    """Token store to train on."""
    text: options.Text = None
    validation: Path | None = None
    """Token store for the validation loss of the EMA weights at each checkpoint. OUT/best keeps the best weights."""
    init: Path | None = None
    """Model to start from: a run, an export folder, a .safetensors or LlamaGen .pt file, or hub:OWNER/NAME. Random by default."""
    init_ema: bool = False
    """Start from the EMA weights of --init instead of the live ones."""
    out: Path
    """Folder of the run."""
    resume: bool = False
    """Continue the run in --out from its latest checkpoint, with the same settings."""
    planning: Annotated[PlanConfig, tyro.conf.arg(name="")] = field(default_factory=PlanConfig)
    watching: Annotated[WatchConfig, tyro.conf.arg(name="")] = field(default_factory=WatchConfig)
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        self._train() if self.planning.plan is None else self._plan(self.planning.plan)

    def _plan(self, gpu: str) -> None:
        """Print what the run would take."""
        from st_ar.data.store import META, TokenStore
        from st_ar.hardware import find_gpu
        from st_ar.report import print_table
        from st_ar.training.parallel import choose_parallel
        from st_ar.training.plan import plan_run, shortage

        (name, memory, peak), ranks, mfu = find_gpu(gpu), self.planning.ranks or 1, self.planning.mfu or 0.4
        config = replace(self.config, parallel=choose_parallel(self.config, ranks))
        known, compiled = (self.tokens.expanduser() / META).exists(), config.compile is not False
        images = len(TokenStore(self.tokens)) if known else 1_281_167
        source = "" if known else " (ASSUMED: ImageNet)"
        print(
            f"{self.preset}, {images:,} images{source}, {ranks} x {name} of {memory / 2**30:.0f} GiB; predicted, not measured"
        )
        print(f"throughput ASSUMED: {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s\n")
        rows = plan_run(config, memory, peak, ranks=ranks, mfu=mfu, images=images, compiled=compiled)
        print_table(("what", "how much"), rows)
        if short := shortage(config, ranks, memory, compiled=compiled):
            print(f"\n{short}")

    def _train(self) -> None:
        from st_ar.files import read_json
        from st_ar.training.loop import train
        from st_ar.training.run import read_log

        train(
            self.config,
            self.tokens,
            self.out,
            text=self.text,
            validation=self.validation,
            init=self.init,
            init_ema=self.init_ema,
            watching=self.watching,
            resume=self.resume,
            preset=self.preset,
        )
        if os.environ.get("RANK", "0") == "0":
            skipped = sum("skipped" in entry for entry in read_log(self.out / "log.jsonl"))
            without = f"; {skipped} steps were skipped because their loss or gradient was not finite" if skipped else ""
            print(f"{self.out}: trained; weights in {self.out / 'export'}{without}")
            best = self.out / "best"
            if self.validation and (best / "config.json").exists():
                info = read_json(best / "config.json", "an export folder")
                if isinstance(loss := info.get("validation_loss"), float):
                    print(f"{best}: lowest validation loss, {loss:.4f}, at step {info.get('step')}")


def read_train(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse `st-ar train PRESET ...`. The preset sets the defaults."""
    usage = (
        "--tokens STORE [--text TEXT] [--validation STORE] [--init MODEL] --out RUN [--resume] [--steps N | --epochs N] "
        "[any setting]"
    )
    name, rest = _choose_preset("train", usage, PRESETS, arguments)
    config = _with_budget(get_preset(name), rest)
    # a plan needs no folders
    path = Path() if any(word.split("=")[0] == "--plan" for word in rest) else tyro.MISSING
    default = Train(preset=name, tokens=path, out=path, config=config)
    prog, description = f"st-ar train {name}", PRESETS[name].__doc__
    return tyro.cli(Train, prog=prog, args=rest, description=description, default=default).run


def read_train_tokenizer(arguments: Sequence[str]) -> Callable[[], None]:
    """Parse `st-ar train-tokenizer PRESET ...`: kmeans, or a VQ-GAN's preset, which sets the defaults."""
    presets = {"kmeans": TrainKMeans, **VQ_PRESETS}
    name, rest = _choose_preset("train-tokenizer", "--images SRC --out DIR [any setting]", presets, arguments)
    prog, description = f"st-ar train-tokenizer {name}", presets[name].__doc__
    if name == "kmeans":
        require_one_rank("train-tokenizer kmeans")
        return tyro.cli(TrainKMeans, prog=prog, args=rest, description=description).run
    config = _with_budget(VQ_PRESETS[name](), rest)
    default = TrainVQ(preset=name, images=tyro.MISSING, out=tyro.MISSING, config=config)
    return tyro.cli(TrainVQ, prog=prog, args=rest, description=description, default=default).run


def _choose_preset(
    command: str, usage: str, presets: Mapping[str, Callable[..., object]], arguments: Sequence[str]
) -> tuple[str, list[str]]:
    """The preset and the options after it. For --help it prints the presets and exits."""
    if arguments and arguments[0] in presets:
        return arguments[0], list(arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        raise unknown_preset(arguments[0], presets)
    if not arguments or arguments[0] not in ("-h", "--help"):
        raise UserError(f"{command} has no preset: give one of {', '.join(presets)} before the options")
    listed = "\n".join(f"  {name:24}{(build.__doc__ or '').splitlines()[0]}" for name, build in presets.items())
    print(
        f"usage: st-ar {command} PRESET {usage}\n\n"
        f"st-ar {command} PRESET --help lists every setting with the preset's values. The presets:\n\n{listed}"
    )
    sys.exit(0)


Run = TypeVar("Run", bound=RunConfig)


def _with_budget(default: Run, arguments: Sequence[str]) -> Run:
    """The preset, without its own length if --steps or --epochs is given."""
    given = {flag: any(a.split("=")[0] == f"--{flag}" for a in arguments) for flag in ("steps", "epochs")}
    if given["steps"] == given["epochs"]:
        return default
    return replace(default, steps=1 if given["steps"] else None, epochs=1 if given["epochs"] else None)


@dataclass(kw_only=True)
class Convert:
    """Convert a model or a VQ tokenizer between st-ar's folders and LlamaGen's .pt files."""

    source: tyro.conf.Positional[Path]
    """A run, an export folder, a tokenizer's folder, a .safetensors file, or a LlamaGen .pt file."""
    target: tyro.conf.Positional[Path]
    """New .pt file (--to llamagen) or new folder (--to st-ar)."""
    to: Literal["llamagen", "st-ar"]
    """Format to write."""
    ema: bool = False
    """Convert the EMA weights instead of the live ones."""
    grid: int | None = None
    """Tokens per side for --to st-ar. By default 16, for 256 pixels; give 24 for LlamaGen's 384 px weights."""

    def run(self) -> None:
        from st_ar.files import require_absent

        require_absent(self.target, "a converted model", flag="target")
        if (self.to == "llamagen") != (self.target.suffix == ".pt"):
            raise UserError(
                f"{self.target} does not fit --to {self.to}: give a .pt file for llamagen, or a folder for st-ar"
            )
        print(f"{self.target}: {self._tokenizer() if _is_tokenizer(self.source) else self._model()}")

    def _tokenizer(self) -> str:
        """Convert a tokenizer; return a description."""
        from st_ar.model.weights import save_llamagen
        from st_ar.tokenizer import load_tokenizer
        from st_ar.tokenizer.vq import VQTokenizer

        if self.grid is not None:
            raise UserError(f"{self.source} is a tokenizer: leave out --grid, which applies to models")
        if self.ema and self.source.is_dir():
            raise UserError(
                f"{self.source} is a tokenizer's folder: leave out --ema, which selects among a .pt file's weights"
            )
        tokenizer = load_tokenizer(f"{self.source}#ema" if self.ema else self.source)
        if not isinstance(tokenizer, VQTokenizer):
            raise UserError(
                f"{self.source} is a {tokenizer.kind} tokenizer: give a VQ-GAN, the only kind that LlamaGen has"
            )
        if self.to == "llamagen":
            save_llamagen(self.target, tokenizer.tensors)
        else:
            tokenizer.save(self.target)
        return f"VQ tokenizer, {tokenizer.vocab_size} codes of {tokenizer.patch} x {tokenizer.patch} pixels"

    def _model(self) -> str:
        """Convert a model; return a description."""
        from st_ar.model.weights import open_model, save_llamagen, save_weights

        if self.grid is not None and self.to == "llamagen":
            raise UserError("--grid needs --to st-ar: LlamaGen's files have no grid")
        model, info = open_model(self.source, ema=self.ema, grid=self.grid)
        if self.to == "llamagen":
            save_llamagen(self.target, model.state_dict())
        else:
            metadata = {"step": info.step, "class_names": info.class_names, "tokenizer": info.tokenizer, "preset": ""}
            metadata |= {"empty_classes": info.empty_classes} if info.empty_classes else {}
            metadata |= {"encoder": info.encoder} if info.encoder else {}
            metadata |= {} if info.class_dropout is None else {"class_dropout": info.class_dropout}
            metadata |= {"ema": True} if info.ema else {}
            save_weights(self.target, {"model.safetensors": model.state_dict()}, model.config, metadata)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return f"{parameters / 1e6:.1f}M parameters, {info.config.n_layers} layers, {info.config.condition_name}"


def _is_tokenizer(source: Path) -> bool:
    from st_ar.files import read_tensors
    from st_ar.tokenizer import CONFIG

    if source.is_dir():
        return (source / CONFIG).exists()
    file = Path(str(source).removesuffix("#ema"))
    return file.is_file() and "quantize.embedding.weight" in read_tensors(file, ema=file != source)
