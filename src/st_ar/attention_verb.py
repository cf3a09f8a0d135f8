"""The verb that shows what models look at: a dataclass whose fields are the options and whose docstrings are the help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from st_ar.printing import check_json, json_alone, keep_json, print_table


@dataclass(kw_only=True)
class Attention:
    """What one model or several look at: attention maps over images of a store, and statistics by layer.

    Prints the statistics; the folder --out gets them too, the maps, and attention.html, a page with both.
    """

    model: tuple[Path, ...]
    """Runs, export folders, .safetensors files, or .pt files of LlamaGen's: one, or several to compare. A run beside its
    export/ema.safetensors compares live with averaged weights."""
    names: tuple[str, ...] = ()
    """What to call them; by default their folders' names."""
    tokens: Path
    """Token store with the images to read (their centre crops)."""
    tokenizer: Path
    """The tokenizer that made the store."""
    out: Path
    """Folder for the maps, statistics.json, statistics.csv and the page."""
    layers: tuple[int, ...] = ()
    """Layers to draw, counted from 1; half the depth by default. The statistics are of every layer."""
    heads: tuple[str, ...] = ("mean",)
    """Heads to draw: mean for their average, numbers counted from 1, or all for each on its own."""
    steps: tuple[int, ...] = ()
    """Numbers of tokens read after which to draw; by default fifths of the image and all but its last token."""
    images: tuple[int, ...] = (0, 1, 2)
    """Which of the store's images to draw."""
    average: int = 256
    """Images to average the statistics over, evenly spaced in the store (all, if it has fewer)."""
    mask_ratio: float = 0.0
    """Mask so large a share of the keys at random, as ST-AR's training does (it masks 0.25); 0 for no mask."""
    mask_own_position: bool = True
    """Whether a masked token is also hidden from its own query, as --selfguided.mask-own-position."""
    seed: int = 0
    """Seed of the masks."""
    ema: bool = False
    """Look at the averaged weights instead of the live ones, of every model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: str | None = None
    """File for what statistics.json holds; - for standard output, instead of the table."""

    def run(self) -> None:
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.attention_job import Chosen, report_attention
        from st_ar.evaluation.attention_report import table_of
        from st_ar.files import read_json

        check_json(self.json)
        chosen = Chosen(
            layers=self.layers,
            heads=self.heads,
            steps=self.steps,
            images=self.images,
            average=self.average,
            masks=ImageMasks(ratio=self.mask_ratio, seed=self.seed, own_position=self.mask_own_position),
        )
        statistics = report_attention(
            self.model,
            self.tokens,
            self.tokenizer,
            self.out,
            chosen,
            names=self.names,
            ema=self.ema,
            device=self.device,
        )
        if self.json != "-":
            print_table(*table_of(statistics))
        with json_alone(self.json):
            print(f"\nthe page: {self.out / 'attention.html'}")
        if self.json:
            keep_json(self.json, read_json(self.out / "statistics.json", "attention's statistics"))
