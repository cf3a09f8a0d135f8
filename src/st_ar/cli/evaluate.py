"""Commands that measure images: evaluate, reference, reconstruct."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.cli import options
from st_ar.config import ClassifierConfig
from st_ar.errors import UserError, note


@dataclass(kw_only=True)
class Evaluate:
    """Measure samples against a reference: FID, sFID, IS, precision, recall (ADM's suite), KID, density, coverage.

    Prints a table and one line to cite. Under torchrun the ranks share the images.
    """

    samples: tyro.conf.Positional[str]
    """A .npz file with arr_0 (uint8 [N, H, W, 3]), or a folder of PNGs."""
    reference: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"A file of `st-ar reference`, an ADM reference batch (.npz), or images: {options.SOURCES}. "
            "By default the decoded test images of --classifier."
        ),
    ] = None
    metrics: options.Metrics = ()
    extractor: options.Extractor = "inception"
    inception: options.Inception = None
    classifier: options.Classifier = None
    size: options.Size = None
    resize: options.Resize = None
    max_skipped: options.MaxLeftOut = 0.01
    shuffle_seed: int | None = None
    """Shuffle the samples with this seed before IS splits them. Use it for samples sorted by class."""
    seed: int = 0
    """Random seed of KID's subsets, and of the 10,000 images taken from a larger reference."""
    batch_size: int = 64
    """Images per forward pass."""
    device: options.Device = "auto"
    json: options.Json = None
    page: options.Page = None

    def run(self) -> None:
        from st_ar.distributed import process_group
        from st_ar.evaluation.generation.evaluate import (
            check_sizes,
            choose_metrics,
            evaluate,
            evaluation_page,
            number_rows,
            one_line,
        )
        from st_ar.evaluation.generation.features import CLASSIFIER, REFERENCE, Compute
        from st_ar.evaluation.generation.image_sets import metadata_path, open_files
        from st_ar.evaluation.generation.references import open_reference

        metrics = choose_metrics(self.metrics, CLASSIFIER if self.classifier else self.extractor)
        reference_file = self.reference or (str(self.classifier / REFERENCE) if self.classifier else "")
        if not reference_file:
            raise UserError("give --reference: a file of `st-ar reference`, an ADM batch, or images")
        options.check_seeds(self.seed, self.shuffle_seed)
        options.check_side("--resize", self.resize)
        options.check_results(self.json, self.page)
        samples = open_files(self.samples)
        metadata = metadata_path(Path(self.samples).expanduser())
        if self.json and samples.metadata and Path(self.json).absolute() == metadata.absolute():
            raise UserError(f"--json {self.json} is the metadata file of the samples: give another file name")
        with process_group(self.device) as (ranks, device):
            compute = Compute(device=device, ranks=ranks, batch_size=self.batch_size)
            extractor = options.open_extractor(self.extractor, device, self.inception, self.classifier)
            reference = open_reference(
                reference_file,
                extractor,
                metrics,
                compute,
                size=self.size,
                seed=self.seed,
                max_skipped=self.max_skipped,
                check=lambda size: check_sizes(samples.size, size, self.resize),
            )
            result = evaluate(
                samples,
                reference,
                extractor,
                metrics,
                compute,
                resize=self.resize,
                seed=self.seed,
                shuffle_seed=self.shuffle_seed,
            )
        if ranks.rank == 0:
            if self.page:
                evaluation_page(self.page, result, samples)
            for text in result["notes"]:
                note(text)
            text = f"\n{one_line(result)}"
            options.report(self.json, result, ("", "value"), number_rows(result), text, page=self.page)


@dataclass(kw_only=True)
class MakeReference:
    """Compute the statistics of a data set for `st-ar evaluate --reference`.

    For precision and recall, the file also holds 10,000 of the images and their features. Under torchrun the ranks share the images.
    """

    source: tyro.conf.Positional[options.ImageSet]
    out: Path
    """New file FILE.npz."""
    size: options.Size = None
    extractor: options.Extractor = "inception"
    inception: options.Inception = None
    classifier: options.Classifier = None
    max_skipped: options.MaxLeftOut = 0.01
    seed: int = 0
    """Random seed of the choice of 10,000 images."""
    batch_size: int = 64
    """Images per forward pass."""
    device: options.Device = "auto"

    def run(self) -> None:
        from st_ar.distributed import process_group
        from st_ar.evaluation.generation.features import Compute
        from st_ar.evaluation.generation.image_sets import open_set
        from st_ar.evaluation.generation.references import write_reference
        from st_ar.files import require_place

        options.check_seeds(self.seed)
        options.check_side("--size", self.size)
        require_place(self.out)
        with process_group(self.device) as (ranks, device):
            compute = Compute(device=device, ranks=ranks, batch_size=self.batch_size)
            extractor = options.open_extractor(self.extractor, device, self.inception, self.classifier)
            images = open_set(self.source, size=self.size, max_skipped=self.max_skipped)
            meta = write_reference(images, self.out, extractor, compute, seed=self.seed)
        if ranks.rank == 0:
            height, width = meta["size"]
            print(f"{self.out}: {extractor.name} statistics of {meta['images']:,} images of {height} x {width} pixels")
            print(f"content {meta['content']}")


@dataclass(kw_only=True)
class TrainClassifier:
    """Train a small classifier on a token store's decoded images, for `st-ar evaluate --classifier`.

    It measures whether samples show the class they were generated for. Its folder also holds the statistics of the decoded test images.
    """

    tokens: Path
    """Token store to train on."""
    test_tokens: Path
    """Token store of the test images."""
    tokenizer: options.Tokenizer
    out: Path
    """New folder."""
    settings: Annotated[ClassifierConfig, tyro.conf.arg(name="")] = field(default_factory=ClassifierConfig)
    device: options.Device = "auto"

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.generation.classifier import train_classifier
        from st_ar.hardware import choose_device
        from st_ar.tokenizer import load_tokenizer

        record = train_classifier(
            TokenStore(self.tokens),
            TokenStore(self.test_tokens),
            load_tokenizer(self.tokenizer),
            self.out,
            self.settings,
            choose_device(self.device),
        )
        accuracy = f"{100 * record['test_accuracy']:.1f} % of {record['test_images']:,} decoded test images"
        print(f"{self.out}: {record['classes']} classes; {accuracy} are classified correctly")


@dataclass(kw_only=True)
class Reconstruct:
    """Measure a tokenizer: rFID, PSNR, SSIM, codebook usage and perplexity.

    rFID compares reconstructions with their originals; it is not the FID of a generator. Under torchrun the ranks share the images.
    """

    tokenizer: options.Tokenizer
    images: options.ImageSet
    size: options.Size = None
    max_skipped: options.MaxLeftOut = 0.01
    extractor: Literal["inception", "efficientnet", "dinov2", "none"] = "inception"
    """Feature network of FD; none skips it. Only the FD of Inception is rFID."""
    inception: options.Inception = None
    batch_size: int = 32
    """Images to encode at once."""
    device: options.Device = "auto"
    dtype: options.VQType = "float32"
    out: Path | None = None
    """New PNG file with some images, each above its reconstruction."""
    save: Path | None = None
    """New folder for all reconstructions as PNGs. `st-ar evaluate` takes it as samples or as the reference."""
    json: options.Json = None

    def run(self) -> None:
        from st_ar.distributed import process_group
        from st_ar.evaluation.generation.evaluate import format_number
        from st_ar.evaluation.generation.features import Compute
        from st_ar.evaluation.generation.image_sets import open_set
        from st_ar.evaluation.reconstruction import measure_tokenizer
        from st_ar.files import atomic_folder, require_absent, require_place
        from st_ar.tokenizer import open_tokenizer

        options.check_side("--size", self.size)
        options.check_results(self.json)
        for path in filter(None, (self.out, self.save)):
            require_place(path)
        if self.out and self.out.suffix.lower() != ".png":
            raise UserError(f"--out {self.out} is not a PNG file: give a name that ends in .png")
        name = self.extractor
        if name == "none" and self.inception:
            raise UserError("--inception has no effect with --extractor none: leave one of them out")
        if self.save:
            require_absent(self.save, "a folder of images", flag="--save")
        image_set = open_set(self.images, size=self.size, max_skipped=self.max_skipped)
        with process_group(self.device) as (ranks, device), ExitStack() as stack:
            if self.save and ranks.world > 1:
                raise UserError("--save needs a single process: run the command without torchrun")
            folder = stack.enter_context(atomic_folder(self.save)) if self.save else None
            compute = Compute(device=device, ranks=ranks, batch_size=self.batch_size)
            tokenizer = open_tokenizer(self.tokenizer, self.device, self.dtype)
            extractor = None if name == "none" else options.open_extractor(name, device, self.inception, None)
            result = measure_tokenizer(tokenizer, image_set, extractor, compute, picture=self.out, folder=folder)
        if ranks.rank == 0:
            rows = [(label, format_number(label, value)) for label, value in result["metrics"].items()]
            source, fingerprint = result["images"], result["tokenizer"]["fingerprint"]
            images = f"{source['count']:,} images of {source['name']} ({source['sha256'][:8]})"
            text = f"\n{images}, tokenizer {fingerprint[:12]}"
            options.report(self.json, result, ("", "value"), rows, text)
