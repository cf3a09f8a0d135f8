"""Sampling at the edge: extreme settings are refused, and logits that are not finite never end as tokens."""

import math

import pytest
import torch

from st_ar.config import SampleSettings
from st_ar.errors import UserError
from st_ar.model.decoder import copy_function
from st_ar.model.generate import choose_tokens, draw_tokens, generate
from tests.toys import TINY, random_model


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": 1e-40}, r"--temperature must lie in \[0.001, 1000\], not 1e-40"),
        ({"temperature": 1e300}, r"--temperature must lie in \[0.001, 1000\]"),
        ({"cfg_scale": 1e300}, r"--cfg-scale must lie in \[1, 1000\], not 1e\+300"),
        ({"cfg_power": 1e300}, "--cfg-power must lie in"),
        ({"seed": 2**64}, r"--seed must be a whole number below 2\^64, not 18446744073709551616"),
    ],
)
def test_settings_beyond_what_can_be_computed_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=match):
        SampleSettings(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.001}, {"temperature": 1000.0}, {"cfg_scale": 1000.0, "temperature": 0.001}]
)
def test_settings_at_the_bounds_give_tokens(settings: dict[str, float]) -> None:
    tokens = generate(random_model(TINY), torch.tensor([0, 1]), seed=2**64 - 1, **settings)  # pyright: ignore[reportArgumentType]
    assert 0 <= tokens.min() <= tokens.max() < TINY.vocab_size


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_choice_is_always_a_token_of_the_codebook(wrong: float) -> None:
    for place in range(4):
        logits = torch.zeros(1, 4)
        logits[0, place] = wrong
        for uniform in (0.0, 0.5, 1 - 2**-24):
            assert 0 <= int(draw_tokens(logits, torch.tensor([uniform]))) < 4
    assert 0 <= int(draw_tokens(torch.full((1, 4), wrong), torch.tensor([0.5]))) < 4


@pytest.mark.parametrize("first", [0, 2])
def test_logits_that_become_nan_are_an_error_whenever_they_do(first: int) -> None:
    model = random_model(TINY)
    with torch.no_grad():  # NaN for every token that follows number `first` of the image
        model.rope[first, 0] = math.nan
    with pytest.raises(UserError, match="the model's logits are not finite: its training has diverged"):
        generate(model, torch.tensor([0, 1]), seed=0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_compiled_choice_is_the_same(guided: bool, greedy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16 if guided else 8, 50, generator=generator)
    scale, uniform = torch.tensor([1.7]) if guided else None, None if greedy else torch.rand(8, generator=generator)
    settings = {"temperature": 0.9, "top_k": 30, "top_p": 0.8}
    compiled = torch.compile(copy_function(choose_tokens), backend="aot_eager", fullgraph=True)
    for bad in (False, True):
        logits[0, 0] = math.inf if bad else 0
        expected = choose_tokens(logits, scale, uniform, **settings)  # pyright: ignore[reportArgumentType]
        found = compiled(logits, scale, uniform, **settings)
        assert torch.equal(found[0], expected[0])
        assert bool(found[1]) == bool(expected[1]) == (not bad)
