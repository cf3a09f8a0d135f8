"""The verb that asks how well a model predicts: its options are the fields, and its help their docstrings.

What it needs is imported when it runs, so that help is quick.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from st_ar.printing import check_json, keep_json, print_table

FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Likelihood:
    """The validation loss: how well models predict the tokens of images that they have not seen, given their classes.

    The mean next-token loss in nats per token over the centre crop of each image, in float32, and
    its exponential, the perplexity: among so many equally likely tokens a guess would be as hard. Only models of one tokenizer compare.
    """

    model: tuple[Path, ...]
    """One or several of: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's."""
    tokens: Path
    """Token store of the images."""
    names: tuple[str, ...] = ()
    """What to call the models, one name each; by default their paths' last parts."""
    weights: Literal["live", "ema", "both"] = "live"
    """The live weights, the averaged ones, or both."""
    ema: bool = False
    """The same as --weights ema."""
    mask_ratio: float = 0.0
    """Mask so large a share of the keys at random, as ST-AR's training does (it masks 0.25); 0 for no mask."""
    mask_own_position: bool = True
    """Whether a masked token is also hidden from its own query, as --selfguided.mask-own-position."""
    seed: int = 0
    """Seed of the masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    out: Path | None = None
    """JSON file for the results, with all that identifies them; never written over."""
    json: str | None = None
    """File for the same JSON; - for standard output, instead of the table."""

    def run(self) -> None:
        from st_ar.data.store import TokenStore
        from st_ar.evaluation.attention import ImageMasks
        from st_ar.evaluation.likelihood import validation_loss
        from st_ar.evaluation.subjects import check_store, find_subjects
        from st_ar.files import require_absent, require_place, write_json
        from st_ar.hardware import choose_device, describe
        from st_ar.progress import progress

        check_json(self.json)
        if self.out:
            require_absent(self.out, "a result")
            require_place(self.out)
        masks = ImageMasks(ratio=self.mask_ratio, seed=self.seed, own_position=self.mask_own_position)
        device, store = choose_device(self.device), TokenStore(self.tokens)
        subjects = find_subjects(self.model, self.names, self.weights, ema=self.ema)
        for subject in subjects:
            check_store(subject.info, store)
        store.verify()
        with progress("likelihood", len(store) * len(subjects), unit="images") as bar:
            losses = {
                subject.name: validation_loss(subject.open().to(device), store, masks=masks, advance=bar.advance)
                for subject in subjects
            }
        if self.json != "-":
            header = ("", "loss (nats per token)", "perplexity")
            print_table(header, [(name, f"{loss:.4f}", f"{math.exp(loss):.2f}") for name, loss in losses.items()])
            codes = store.meta.vocab_size
            hidden = f", {self.mask_ratio:.0%} of the keys masked" if self.mask_ratio else ""
            print(f"\n{len(store):,} images{hidden}; an even guess among {codes:,} tokens: {math.log(codes):.4f}")
        results = [{"model": s.name, "weights": s.describe(), "loss": losses[s.name]} for s in subjects]
        record = {"format_version": FORMAT_VERSION, "store": store.describe(), "results": results}
        record |= {"masks": asdict(masks)} if self.mask_ratio else {}
        record |= {"environment": describe()}
        if self.out:
            write_json(self.out, record)
        keep_json(self.json, record)
