"""The verb that opens the page: its options are the fields, and its help their docstrings.

What it needs is imported when it runs, so that help is quick.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from st_ar.errors import UserError

if TYPE_CHECKING:
    from st_ar.demo.setup import Setup


@dataclass(kw_only=True)
class Demo:
    """A web page on this machine: draw token by token, compare two models, see what they look at, follow runs.

    Without --model it shows the quickstart's models, and makes them first where there are none. Needs the extra demo.
    """

    model: tuple[Path, ...] = ()
    """One or two of: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's. Averaged weights beside live
    ones are offered too."""
    tokenizer: Path | None = None
    """The tokenizer that they were trained with: its folder, or a .pt file of LlamaGen's."""
    names: tuple[str, ...] = ()
    """What to call the models, one name each; by default their paths' last parts."""
    tokens: Path | None = None
    """Token store whose images can be looked at."""
    probe_tokens: Path | None = None
    """Token store with classes that quick probes are fitted on (its centre crops), to guess an image's class as it is read."""
    probe_images: int = 4000
    """Images of it that a probe is fitted on at most."""
    runs: tuple[Path, ...] = ()
    """Run folders to follow, beside those that --model names."""
    quickstart: Path = Path("quickstart")
    """Without --model: the folder of an earlier quickstart, or of one that is made now (some minutes on two cores)."""
    host: str = "127.0.0.1"
    """Address to serve on. Any other than this machine's own lets others in: whoever reaches it may use the page."""
    port: int = 7860
    """Port to serve on; 0 takes a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights and activations that draw; auto takes bfloat16 where the hardware has it."""

    def run(self) -> None:
        self._check()
        from st_ar.demo.serve import bind, private_folder, require_gradio, serve
        from st_ar.figures import require_matplotlib

        with private_folder():
            require_gradio()
            require_matplotlib()
            bind(self.host, self.port).close()  # before anything that takes long
            serve(self._setup(), self.host, self.port)

    def _setup(self) -> "Setup":
        from st_ar.demo.serve import is_local
        from st_ar.demo.setup import Setup, find_runs, open_store, quickstart_setup
        from st_ar.demo.shelf import Shelf

        if not is_local(self.host):
            said = "whoever can reach this address may use the page; it asks nobody who they are"
            print(f"--host {self.host}: {said}", file=sys.stderr)
        if not self.model:
            setup = quickstart_setup(
                self.quickstart, device=self.device, dtype=self.dtype, probe_images=self.probe_images
            )
            setup.runs = {**setup.runs, **find_runs([], self.runs)}
            return setup
        assert self.tokenizer is not None
        return Setup(
            runs=find_runs(self.model, self.runs),
            shelf=Shelf(self.model, self.tokenizer, names=self.names, device=self.device, dtype=self.dtype),
            store=open_store(self.tokens) if self.tokens else None,
            probe_store=open_store(self.probe_tokens) if self.probe_tokens else None,
            probe_images=self.probe_images,
        )

    def _check(self) -> None:
        if len(self.model) > 2:
            raise UserError(f"--model names {len(self.model)} models: the page compares two at most")
        if self.model and self.tokenizer is None:
            raise UserError("--model needs --tokenizer: a model draws tokens until one paints them")
        if not self.model:
            given = {"--tokenizer": self.tokenizer, "--names": self.names, "--tokens": self.tokens}
            if wrong := [flag for flag, value in (given | {"--probe-tokens": self.probe_tokens}).items() if value]:
                raise UserError(f"{wrong[0]} is for a --model of yours: give both, or neither for the quickstart's")
        elif self.quickstart != Path("quickstart"):
            raise UserError("--quickstart is for the page without --model: give one of the two")
        if self.probe_images < 2:
            raise UserError(f"--probe-images must be at least 2, not {self.probe_images}")
        if not self.host:
            raise UserError("--host must name an address: 127.0.0.1 is this machine's own")
