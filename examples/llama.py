"""Train a Hugging Face Llama on image tokens, without and with self-guidance, and probe both.

    python examples/llama.py                two minutes on two cores
    python examples/llama.py --steps 50     a shorter run

The images are the package's photographs, as 8 x 8 tokens of k-means. Both models see the same two crops of each image in the same
order. It prints the losses every 50 steps, and after each training the accuracy of a linear probe: how well the features at half
depth, after the last position and without the class, tell the class. It needs `pip install 'st-ar[quickstart,dinov2]'`.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import st_ar
from st_ar.data.images import open_images
from st_ar.data.source import Crops, ImageSource, Kind
from st_ar.data.store import TokenBatches, TokenStore
from st_ar.errors import require
from st_ar.tokenizer import Tokenizer
from st_ar.tokenizer.kmeans import train_kmeans
from st_ar.tokenizer.tokenize import tokenize

CODES, CLASSES, DIM, LAYERS = 256, 16, 128, 4
NO_CLASS = CLASSES  # its label, for the probe and for a tenth of the training
CENTRE = 4  # the centre crop among the ten
FEATURES = {"mid": f"model.layers.{LAYERS // 2 - 1}", "last": f"model.layers.{LAYERS - 1}"}
CONFIG = st_ar.SelfGuidedConfig(projector_hidden=512, ema_decay=0.999)


def make_store(source: ImageSource, tokenizer: Tokenizer, kind: Kind, folder: Path) -> TokenStore:
    """Tokenize crops of the images into a folder; a finished store is kept."""
    return tokenize(source, tokenizer, Crops(kind=kind, size=source.size, range=source.crop_range), folder)


def make_llama() -> nn.Module:
    """A LlamaForCausalLM over the codes, the classes and "no class"."""
    transformers = require("transformers")
    config = transformers.LlamaConfig(
        vocab_size=CODES + CLASSES + 1,
        hidden_size=DIM,
        intermediate_size=3 * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    return transformers.LlamaForCausalLM(config)


def run(
    model: nn.Module, tokens: Tensor, labels: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the next-token loss of tokens [B, M, T] and labels [B], and the features [B, M, T, D]."""
    rows, classes = tokens.flatten(0, 1), CODES + labels.repeat_interleave(tokens.shape[1])
    inputs = torch.cat([classes[:, None], rows[:, :-1]], dim=1)  # the class token, then all tokens but the last
    mask = None if key_mask is None else st_ar.attention_mask(key_mask.flatten(0, 1))  # None is causal
    with st_ar.capture(model, FEATURES) as features:
        logits: Tensor = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), rows.flatten())
    return loss, {name: each.unflatten(0, tokens.shape[:2]) for name, each in features.items()}


def features_of(model: nn.Module, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Features [B, T, D] at half depth of tokens [B, T], without the class."""
    labels = torch.full((len(tokens),), NO_CLASS)
    return run(model.eval(), tokens[:, None], labels, None if key_mask is None else key_mask[:, None])[1]["mid"][:, 0]


def train(store: TokenStore, *, guided: bool, steps: int, seed: int) -> nn.Module:
    """Train a Llama on a token store."""
    torch.manual_seed(seed)
    model, guidance = make_llama(), st_ar.SelfGuidance(DIM, CONFIG, seed=seed)
    teacher = st_ar.EMATeacher(model, decay=CONFIG.ema_decay)
    batches = TokenBatches(store, batch_size=32, views=2, seed=seed)
    if guided:  # checked once
        st_ar.require_key_mask(partial(features_of, model), batches.batch(0)[0][:, 0])
    parameters = [*model.parameters(), *(guidance.parameters() if guided else ())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(1, steps + 1):
        tokens, labels = batches.batch(step - 1)
        labels = torch.where(torch.rand(len(labels)) < 0.1, NO_CLASS, labels)
        model.train()
        if guided:
            sample = guidance.sample(tokens.shape, step)
            with torch.no_grad():
                _, target = run(teacher.model, tokens, labels)
            loss, features = run(model, tokens, labels, sample.key_mask)
            losses = guidance(features, target, sample)
            total = loss + losses.total
            shown = f"  mim {losses.mim.item():.3f}  step {losses.step.item():.3f}  view {losses.view.item():.3f}"
        else:
            total = loss = run(model, tokens, labels)[0]
            shown = ""
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(model, step)
        if step in (1, steps) or step % 50 == 0:
            print(f"{'ST-AR' if guided else 'AR':6} step {step:3}  next token {loss.item():.3f}{shown}", flush=True)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Make the tokens, train both, probe both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each model (default: 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to keep the tokens in; by default they are not kept")
    given = parser.parse_args(arguments)
    require("transformers")  # before the tokens are made
    with tempfile.TemporaryDirectory() as temporary:
        out, source = given.out or Path(temporary), open_images("photos:train")
        tokenizer = train_kmeans(source, vocab_size=CODES)
        store = make_store(source, tokenizer, "ten", out / "tokens")
        test_store = make_store(open_images("photos:test"), tokenizer, "center", out / "tokens-test")
        for guided in (False, True):
            model = train(store, guided=guided, steps=given.steps, seed=given.seed)
            read = partial(features_of, model)
            probed = st_ar.probe(lambda tokens, read=read: read(tokens)[:, -1], store, test_store, train_crops=[CENTRE])
            accuracy = f"{100 * probed.top1[0]:.1f} % of {probed.test_images} test images"
            print(f"{'ST-AR' if guided else 'AR':6} linear probe: {accuracy}", flush=True)


if __name__ == "__main__":
    main()
