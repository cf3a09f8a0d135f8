"""The verbs that make token stores: one dataclass each, whose fields are the options and whose docstrings are the help.

What a verb needs is imported when it runs, so that help is quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from st_ar.errors import UserError
from st_ar.vq_config import VQTrainConfig

if TYPE_CHECKING:
    from st_ar.data.store import TokenStore


@dataclass(kw_only=True)
class TrainKMeans:
    """Clusters of pixel patches, in seconds."""

    images: str
    """Image source: folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]."""
    out: Path
    """Folder to write the tokenizer to."""
    vocab_size: int = 256
    """Codes in the codebook."""
    patch: int = 4
    """Side of a patch in pixels."""
    size: int | None = None
    """Side of the images' crops in pixels; by default what suits the source."""
    seed: int = 0
    """Seed of the clustering."""

    def run(self) -> None:
        from st_ar.data.images import open_images
        from st_ar.files import require_absent
        from st_ar.tokenizer.kmeans import CODEBOOK, train_kmeans

        require_absent(self.out, "a tokenizer", besides=[CODEBOOK])
        tokenizer = train_kmeans(
            open_images(self.images), vocab_size=self.vocab_size, patch=self.patch, size=self.size, seed=self.seed
        )
        tokenizer.save(self.out)
        print(f"{self.out}: {tokenizer.vocab_size} codes of {self.patch} x {self.patch} pixels")


@dataclass(kw_only=True)
class TrainVQ:
    """Train a VQ-GAN."""

    preset: tyro.conf.Suppress[str] = ""
    images: str
    """Image source: folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]."""
    out: Path
    """Folder of the run, which becomes the tokenizer's."""
    test_images: str | None = None
    """Image source to measure PSNR, SSIM and the use of the codebook on; by default the training images."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; give the settings it was begun with."""
    workers: int | None = None
    """Processes that decode images, 0 for none; by default one for each core, at most 8, and none where all fit in memory."""
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
            resume=self.resume,
            preset=self.preset,
            workers=self.workers,
        )
        if Ranks.from_environment().rank == 0:
            print(
                f"{self.out}: trained; it is a tokenizer now, and {self.out / 'reconstructions'} shows what it makes of images"
            )


def vq_command(name: str, default: VQTrainConfig) -> type[TrainVQ]:
    """The command with a preset's values as defaults."""

    @dataclass(kw_only=True)
    class WithPreset(TrainVQ):
        preset: tyro.conf.Suppress[str] = name
        config: Annotated[VQTrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: default)

    return WithPreset


@dataclass(kw_only=True)
class Tokenize:
    """Encode every crop of every image into a token store. A stopped job is continued by the same command."""

    images: str
    """Image source: folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]."""
    tokenizer: Path
    """The tokenizer's folder, or a .pt file of LlamaGen's."""
    out: Path
    """Folder to write the store to."""
    crops: Literal["center", "center-mirror", "ten"] = "ten"
    """The centre alone, of the image or also of its mirror image; or corners and centre of both."""
    size: int | None = None
    """Side of a crop in pixels; by default 32 for photos and digits, 256 for others."""
    crop_range: float | None = None
    """Short side before cropping as a multiple of the crop's; by default 1.125 for photos and digits, for others 1.1 for
    ten crops and 1.0 for the centre."""
    mirror: bool = True
    """Whether mirror images are taken at all. Those of digits never are."""
    workers: int | None = None
    """Processes that decode images, 0 for none; by default one for each core, at most 8, and none below 10,000 images."""
    batch_size: int = 256
    """Crops encoded at once."""
    max_skipped: float = 0.01
    """Share of the images that may be unusable; they are left out and listed in skipped.jsonl."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of a VQ network's activations; bfloat16 is faster and changes a few codes."""
    compile: bool = False
    """Compile a VQ network with torch.compile (needs a C++ compiler on a CPU): faster after half a minute."""

    def run(self) -> None:
        from st_ar.data.crops import Crops
        from st_ar.data.images import open_images
        from st_ar.data.pool import default_workers
        from st_ar.distributed import Ranks
        from st_ar.tokenizer import place_tokenizer
        from st_ar.tokenizer.tokenize import tokenize

        ranks = Ranks.from_environment()
        source = open_images(self.images)
        crops = Crops(
            kind=self.crops,
            size=self.size if self.size is not None else source.size,
            range=self.crop_range if self.crop_range is not None else source.range_for(self.crops),
            mirror=self.mirror and source.mirror,
        )
        store = tokenize(
            source,
            place_tokenizer(self.tokenizer, self.device, self.dtype, self.compile),
            crops,
            self.out,
            batch_size=self.batch_size,
            workers=self.workers if self.workers is not None else default_workers(source.count),
            max_skipped=self.max_skipped,
            ranks=ranks,
        )
        if ranks.rank == 0:
            print(_describe_store(self.out, store))


@dataclass(kw_only=True)
class ImportTokens:
    """Make a token store of the folders of .npy files that LlamaGen's extraction script writes.

    A stopped import is continued by the same command.
    """

    codes: Path
    """Folder imagenet{size}_codes: {i}.npy, integers [1, crops, tokens]."""
    labels: Path
    """Folder imagenet{size}_labels: {i}.npy, integers [1]."""
    out: Path
    """Folder to write the store to."""
    vocab_size: int = 16384
    """Codes in the codebook of the tokenizer that made them."""
    more_codes: Path | None = None
    """A second set of crops of the same images, such as LlamaGen's at range 1.05: so many more crops."""
    num_classes: int | None = None
    """Number of classes; by default the largest label and one."""
    tokenizer: Path | None = None
    """The tokenizer that made the codes, so that the store can be checked against models and samples be decoded."""
    max_skipped: float = 0.01
    """Share of the images whose files may be cut short; they are left out and listed in skipped.jsonl."""

    def run(self) -> None:
        from st_ar.data.llamagen import import_tokens
        from st_ar.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        if tokenizer and tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{self.tokenizer} has {tokenizer.vocab_size} codes, --vocab-size is {self.vocab_size}: they must agree"
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
    grid, meta = store.meta.grid, store.meta
    skipped = f"; {meta.skipped} that could not be used are in {out / 'skipped.jsonl'}" if meta.skipped else ""
    return f"{out}: {len(store):,} images x {len(meta.crops)} crops x {grid} x {grid} tokens{skipped}"
