"""The verbs that measure images: one dataclass each, whose fields are the options and whose docstrings are the help.

What a verb needs is imported when it runs, so that help is quick.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from st_ar.errors import UserError
from st_ar.evaluation.names import ExtractorName, Metric
from st_ar.printing import check_json, keep_json, print_table


@dataclass(kw_only=True)
class Evaluate:
    """Measure samples against a reference: FID, sFID, IS, precision, recall (ADM's suite), KID, density, coverage.

    Prints a table and a line with all that identifies the numbers. Under torchrun each rank takes its share of the images.
    """

    samples: tyro.conf.Positional[str]
    """A .npz file with arr_0 (uint8 [N, H, W, 3]), or a folder of PNGs."""
    reference: str
    """A file of `st-ar reference`, a reference batch of ADM's (.npz), another .npz or folder of PNGs, or an image source:
    folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos[:train|:test] or digits[:train|:test]."""
    metrics: tuple[Metric, ...] = ()
    """What to measure; by default fid sfid is precision recall, and with another extractor fd precision recall."""
    extractor: ExtractorName = "inception"
    """The network whose features are compared: only inception's distance is FID. efficientnet needs no download (extra
    metrics), dinov2 runs through transformers (extra dinov2)."""
    inception: Path | None = None
    """Inception's file of weights, or its folder; by default it is downloaded once into the cache."""
    size: int | None = None
    """Side in pixels of the centre crops of an image source; by default what suits it."""
    resize: int | None = None
    """Resize the samples to so many pixels first, bicubically, as LlamaGen's evaluation does with 384 px."""
    shuffle_seed: int | None = None
    """Shuffle the samples with this seed before IS splits them: for samples that are sorted by class."""
    seed: int = 0
    """Seed of KID's subsets, and of the 10,000 images of a larger reference whose features are compared."""
    batch_size: int = 64
    """Images in the network at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: str | None = None
    """File for the result as JSON; - for standard output, instead of the table."""
    page: Path | None = None
    """FILE.html for a page with the numbers, the first samples, and what identifies them (extra quickstart)."""

    def run(self) -> None:
        from st_ar.distributed import in_turn, process_group
        from st_ar.evaluation.collect import Place
        from st_ar.evaluation.extractors import load_extractor
        from st_ar.evaluation.generation import check_sizes, choose_metrics, evaluate, format_number, one_line
        from st_ar.evaluation.image_sets import metadata_of, open_files
        from st_ar.evaluation.references import open_reference

        metrics = choose_metrics(self.metrics, self.extractor == "inception")
        check_seeds(self.seed, self.shuffle_seed)
        check_side("--resize", self.resize)
        check_json(self.json)
        check_page(self.page)
        samples = open_files(self.samples)
        told = metadata_of(Path(self.samples).expanduser())
        if self.json and samples.metadata and Path(self.json).absolute() == told.absolute():
            raise UserError(f"--json {self.json} says how the samples were made: give the result another name")
        with process_group(self.device) as (ranks, device):
            place = Place(device=device, ranks=ranks, batch_size=self.batch_size)
            extractor = in_turn(lambda: load_extractor(self.extractor, device, inception=self.inception))
            reference = open_reference(
                self.reference,
                extractor,
                metrics,
                place,
                size=self.size,
                seed=self.seed,
                check=lambda size: check_sizes(samples.size, size, self.resize),
            )
            result = evaluate(
                samples,
                reference,
                extractor,
                metrics,
                place,
                resize=self.resize,
                seed=self.seed,
                shuffle_seed=self.shuffle_seed,
            )
        if ranks.rank == 0:
            keep_json(self.json, result)
            if self.page:
                from st_ar.evaluation.pages import evaluation_page

                evaluation_page(self.page, result, samples)
            for note in result["notes"]:
                print(f"st-ar: {note}", file=sys.stderr)
            if self.json != "-":
                print_table(("", "value"), [(k, format_number(k, v)) for k, v in result["metrics"].items()])
                print(f"\n{one_line(result)}")
                if self.page:
                    print(f"the page: {self.page}")


@dataclass(kw_only=True)
class MakeReference:
    """Compute the statistics of a data set once, for `st-ar evaluate --reference`.

    The file also holds 10,000 of the images and their features, for precision and recall. Under torchrun each rank takes its share.
    """

    source: tyro.conf.Positional[str]
    """An image source (folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos, digits), a .npz file or a folder of PNGs."""
    out: Path
    """FILE.npz to write."""
    size: int | None = None
    """Side in pixels of the centre crops of an image source; by default what suits it."""
    extractor: ExtractorName = "inception"
    """The network whose features are compared; see `st-ar evaluate --help`."""
    inception: Path | None = None
    """Inception's file of weights, or its folder; by default it is downloaded once into the cache."""
    seed: int = 0
    """Seed that the 10,000 images are drawn with."""
    batch_size: int = 64
    """Images in the network at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""

    def run(self) -> None:
        from st_ar.distributed import in_turn, process_group
        from st_ar.evaluation.collect import Place
        from st_ar.evaluation.extractors import load_extractor
        from st_ar.evaluation.references import write_reference
        from st_ar.files import require_place

        check_seeds(self.seed)
        check_side("--size", self.size)
        require_place(self.out)
        with process_group(self.device) as (ranks, device):
            place = Place(device=device, ranks=ranks, batch_size=self.batch_size)
            extractor = in_turn(lambda: load_extractor(self.extractor, device, inception=self.inception))
            meta = write_reference(self.source, self.out, extractor, place, size=self.size, seed=self.seed)
        if ranks.rank == 0:
            height, width = meta["size"]
            print(f"{self.out}: {extractor.name} statistics of {meta['images']:,} images of {height} x {width} pixels")
            print(f"content {meta['content']}")


@dataclass(kw_only=True)
class Reconstruct:
    """Measure how faithful a tokenizer is: rFID, PSNR, SSIM, use and perplexity of its codebook.

    rFID compares reconstructions with their originals and says nothing on a generator. Under torchrun each rank takes its share.
    """

    tokenizer: Path
    """The tokenizer's folder, or a .pt file of LlamaGen's."""
    images: str
    """An image source (folder:PATH, parquet:GLOB, hub:NAME[:SPLIT], photos, digits), a .npz file or a folder of PNGs."""
    size: int | None = None
    """Side in pixels of the centre crops of an image source; by default what suits it."""
    extractor: Literal["inception", "efficientnet", "dinov2", "none"] = "inception"
    """The network of the Frechet distance, which is called rFID with inception only; none to leave it out."""
    inception: Path | None = None
    """Inception's file of weights, or its folder; by default it is downloaded once into the cache."""
    batch_size: int = 32
    """Images encoded at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of a VQ network's activations."""
    out: Path | None = None
    """PNG file for some of the images, each above its reconstruction."""
    save: Path | None = None
    """Folder for every reconstruction as a PNG: `st-ar evaluate` measures it like samples, as the best that a generator could
    do with this tokenizer, or takes it for the reference."""
    json: str | None = None
    """File for the result as JSON; - for standard output, instead of the table."""

    def run(self) -> None:
        from st_ar.distributed import in_turn, process_group
        from st_ar.evaluation.collect import Place
        from st_ar.evaluation.extractors import load_extractor
        from st_ar.evaluation.generation import format_number
        from st_ar.evaluation.image_sets import open_set
        from st_ar.evaluation.tokenizer_quality import measure_tokenizer
        from st_ar.files import require_absent, require_place
        from st_ar.tokenizer import place_tokenizer

        check_side("--size", self.size)
        check_json(self.json)
        for place in filter(None, (self.out, self.save)):
            require_place(place)
        if self.out and self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out}: the picture is a PNG; give a name that ends in .png")
        name = self.extractor
        if name == "none" and self.inception:
            raise UserError("--inception names Inception's weights, and --extractor is none: leave one of them out")
        if self.save:
            require_absent(self.save, "a folder of images", flag="--save")
        images = open_set(self.images, size=self.size)
        with process_group(self.device) as (ranks, device), self._folder(ranks.world) as folder:
            place = Place(device=device, ranks=ranks, batch_size=self.batch_size)
            tokenizer = place_tokenizer(self.tokenizer, self.device, self.dtype)
            extractor = (
                None if name == "none" else in_turn(lambda: load_extractor(name, device, inception=self.inception))
            )
            result = measure_tokenizer(tokenizer, images, extractor, place, picture=self.out, folder=folder)
        if ranks.rank == 0:
            keep_json(self.json, result)
            if self.json != "-":
                rows = [(label, format_number(label, value)) for label, value in result["metrics"].items()]
                print_table(("", "value"), rows)
                about, fingerprint = result["images"], result["tokenizer"]["fingerprint"]
                print(
                    f"\n{about['count']:,} images of {about['name']} ({about['sha256'][:8]}), tokenizer {fingerprint[:12]}"
                )

    def _folder(self, ranks: int) -> AbstractContextManager[Path | None]:
        """Where reconstructions go until there are all of them."""
        from st_ar.files import folder_aside

        if self.save and ranks > 1:
            raise UserError("--save writes with one process: give the command without torchrun")
        return folder_aside(self.save) if self.save else nullcontext()


def check_page(page: Path | None) -> None:
    """Refuse a --page that could not be written at the end."""
    if page is not None:
        from st_ar.report import require_page

        require_page(page)


def check_seeds(*seeds: int | None) -> None:
    """Refuse a negative seed."""
    for seed in seeds:
        if seed is not None and seed < 0:
            raise UserError(f"seeds must be 0 or more, not {seed}")


def check_side(flag: str, side: int | None) -> None:
    """Refuse a size below one pixel."""
    if side is not None and side < 1:
        raise UserError(f"{flag} must be at least 1 pixel, not {side}")
