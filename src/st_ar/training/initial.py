"""The weights that a run begins with, if they are not random: a model's."""

from pathlib import Path
from typing import Any

from st_ar.config import ModelConfig
from st_ar.data.store import TokenStore
from st_ar.errors import UserError
from st_ar.evaluation.subjects import check_store
from st_ar.files import sha256
from st_ar.model.transformer import Transformer
from st_ar.model.weights import open_model
from st_ar.settings import differences, to_dict

MAY_DIFFER = ("token_dropout", "residual_dropout", "ffn_dropout", "drop_path")
"""Settings of a model that its weights do not depend on; nor on the grid, since positions are computed."""


class Initial:
    """A model to begin from, or none.

    Args:
        path: a run, an export folder, a .safetensors file, a .pt file of LlamaGen's, or hub:OWNER/NAME; None for random weights.
        ema: its averaged instead of its live weights.
        config: the model that is trained.
        trained_on: the store that it is trained on.

    Raises:
        UserError: no model, one of another architecture, of another tokenizer, or with other classes.
    """

    def __init__(self, path: Path | None, *, ema: bool, config: ModelConfig, trained_on: TokenStore) -> None:
        self.model, self.info = None, None
        if path is None:
            if ema:
                raise UserError(
                    "--init-ema says which weights of --init to begin with: give --init too, or leave it out"
                )
            return
        self.model, self.info = open_model(path, ema=ema, grid=config.grid)
        changed = {
            name: values
            for name, values in differences(to_dict(self.info.config), to_dict(config)).items()
            if name not in MAY_DIFFER
        }
        if changed:
            listed = "; ".join(
                f"--model.{name.replace('_', '-')} is {old} there, {new} here" for name, (old, new) in changed.items()
            )
            raise UserError(
                f"{self.info.source} is not of the model to be trained: {listed}; give its settings, or its preset"
            )
        check_store(self.info, trained_on)

    @property
    def encoder(self) -> str:
        """Of a text model: the encoder of the captions that it knows, as far as that is known."""
        return "" if self.info is None else self.info.encoder

    def describe(self) -> dict[str, Any]:
        """What a run records of the weights; nothing of random ones."""
        if self.info is None:
            return {}
        return {"init": {"sha256": sha256(self.info.source), "ema": self.info.ema, "step": self.info.step}}

    def give(self, model: Transformer) -> None:
        """Give them to the model that is trained, which keeps its random ones if there are none."""
        if self.model is not None:
            model.load_state_dict(self.model.state_dict())
            self.model = None
