"""The verb of the command line that draws images: its options are the fields, and its help their docstrings.

What it needs is imported when it runs, so that help is quick.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from st_ar.sample_config import SampleSettings


@dataclass(kw_only=True)
class Sample:
    """Draw images from a model into a .npz file (ADM's layout) or a folder of PNGs, with the settings beside them.

    The same command continues a stopped job. Several processes share one: torchrun --nproc-per-node 4 "$(which st-ar)" sample ..
    """

    model: Path
    """A run, an export folder, a .safetensors file, or a .pt file of LlamaGen's."""
    tokenizer: Path
    """The tokenizer that the model was trained with: its folder, or a .pt file of LlamaGen's."""
    out: Path
    """FILE.npz, or a folder for PNGs."""
    text: Path | None = None
    """Captions' features for a text model: a .safetensors file, or a folder of them."""
    num: Annotated[int | None, tyro.conf.arg(aliases=["--num-images"])] = None
    """Images to draw: 64 by default; of a text model one for each caption. Under torchrun, which refuses --num, write --num-images."""
    per_class: int | None = None
    """Images to draw of each class (instead of --num): 50 of 1,000 classes for FID."""
    labels: tuple[int, ...] = ()
    """Classes to draw, in turn; all if not given."""
    label_mode: Literal["balanced", "random"] = "balanced"
    """Take the classes or captions in turn, or draw them at random."""
    settings: Annotated[SampleSettings, tyro.conf.arg(name="")] = field(default_factory=SampleSettings)
    batch_size: int = 256
    """Images drawn at once, and written at once; the images depend on it by rounding alone."""
    ema: bool = False
    """Draw from the averaged weights instead of the live ones."""
    grid: int | None = None
    """Tokens per side, if not the size trained for: 24 for 384 px with LlamaGen's weights of 256 px."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the model's weights and activations; auto takes bfloat16 where the hardware has it."""
    compile: bool = False
    """Compile the transformer's blocks with torch.compile: faster after some seconds (needs a C++ compiler on a CPU)."""

    def run(self) -> None:

        from st_ar.data.text import open_text
        from st_ar.distributed import Ranks
        from st_ar.sampling import Sampler, choose_conditions, open_model_and_tokenizer, sample_to

        ranks = Ranks.from_environment()
        model, info, tokenizer = open_model_and_tokenizer(
            self.model, self.tokenizer, device=self.device, dtype=self.dtype, ema=self.ema, grid=self.grid
        )
        text = open_text(self.text, info.config, info.encoder)
        labels = choose_conditions(
            info.config,
            text,
            self.num,
            self.settings.seed,
            mode=self.label_mode,
            labels=self.labels,
            per_class=self.per_class,
        )
        sampler = Sampler(model, tokenizer, self.settings, text, compiled=self.compile)
        sample_to(self.out, sampler, labels, info, label_mode=self.label_mode, batch_size=self.batch_size, ranks=ranks)
        if ranks.rank == 0:
            size = info.config.grid * tokenizer.patch
            print(f"{self.out}: {len(labels):,} images of {size} x {size} pixels")
