import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from st_ar.config import ModelConfig, SampleSettings
from st_ar.errors import UserError
from st_ar.model.generate import TokenSampler, draw_tokens, filter_logits, generate, guidance_scale, uniforms
from st_ar.model.transformer import Transformer
from tests.toys import NO_DROPOUT, TINY, random_model, recorded, recorded_model

LABELS = torch.tensor([0, 1, 3])


def distinct_rows(rows: int, width: int, seed: int) -> Tensor:
    """Logits without ties: in each row a permutation of values 0.1 apart."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(width, generator=generator) for _ in range(rows)])
    return order * 0.1 * (1 + seed % 7) - 1


def probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)


# Agreement with LlamaGen


@pytest.mark.parametrize(
    ("name", "scale", "interval"),
    [("greedy_cfg1.0", 1.0, -1), ("greedy_cfg2.5", 2.5, -1), ("greedy_cfg2.5_interval7", 2.5, 7)],
)
def test_greedy_tokens_are_those_recorded_from_llamagen(name: str, scale: float, interval: int) -> None:
    io = recorded("io/")
    tokens = generate(recorded_model(), io["labels"][:3], cfg_scale=scale, cfg_interval=interval, greedy=True)
    assert torch.equal(tokens, io[name])


@pytest.mark.parametrize("interval", [-1, 6, 8])
def test_the_recorded_guidance_interval_is_7_and_no_other(interval: int) -> None:
    io = recorded("io/")
    tokens = generate(recorded_model(), io["labels"][:3], cfg_scale=2.5, cfg_interval=interval, greedy=True)
    assert not torch.equal(tokens, io["greedy_cfg2.5_interval7"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("filter_topk10", {"top_k": 10}),
        ("filter_topp0.8", {"top_p": 0.8}),
        ("filter_topk20_topp0.9", {"top_k": 20, "top_p": 0.9}),
    ],
)
def test_filtered_probabilities_are_those_recorded_from_llamagen(name: str, settings: dict[str, float]) -> None:
    io = recorded("io/")
    ours = filter_logits(io["filter_in"], **settings).softmax(-1)
    assert torch.equal(ours > 0, io[name] > 0)
    torch.testing.assert_close(ours, io[name], rtol=1e-5, atol=1e-7)


# Filters


@given(rows=st.integers(1, 3), width=st.integers(1, 20), top_k=st.integers(1, 25), seed=st.integers(0, 1000))
def test_top_k_keeps_the_k_largest_unchanged(rows: int, width: int, top_k: int, seed: int) -> None:
    logits = distinct_rows(rows, width, seed)
    kept = filter_logits(logits, top_k=top_k)
    for before, after in zip(logits.tolist(), kept.tolist(), strict=True):
        largest = sorted(before, reverse=True)[:top_k]
        assert after == [value if value in largest else -math.inf for value in before]


def test_top_k_keeps_ties_with_the_kth() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[False, True, True, True, False]]


@given(rows=st.integers(1, 3), width=st.integers(1, 20), top_p=st.floats(0.001, 0.999), seed=st.integers(0, 1000))
def test_top_p_keeps_the_smallest_set_of_the_likeliest_that_exceeds_p(
    rows: int, width: int, top_p: float, seed: int
) -> None:
    logits = distinct_rows(rows, width, seed)
    for row in range(rows):
        ordered = probabilities(logits[row]).sort(descending=True).values
        assume((ordered.cumsum(0) - top_p).abs().min() > 1e-5)  # float32 sums cannot tell nearer ones
    kept = filter_logits(logits, top_p=top_p)
    for before, after in zip(logits, kept, strict=True):
        order = sorted(range(width), key=lambda token: -before[token].item())
        total, expected = 0.0, set()
        for token in order:
            expected.add(token)
            total += probabilities(before)[token].item()
            if total > top_p:
                break
        assert {token for token in range(width) if after[token].isfinite()} == expected
        assert order[0] in expected
        for token in expected:
            assert after[token] == before[token]


@given(top_k=st.integers(1, 12), top_p=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_top_p_comes_after_top_k_on_renormalised_probabilities(top_k: int, top_p: float, seed: int) -> None:
    logits = distinct_rows(2, 12, seed)
    both = filter_logits(logits, top_k=top_k, top_p=top_p)
    assert torch.equal(both, filter_logits(filter_logits(logits, top_k=top_k), top_p=top_p))
    assert (both.isfinite().sum(-1) >= 1).all()
    assert (both.isfinite().sum(-1) <= top_k).all()


def test_filters_turned_off_change_nothing() -> None:
    logits = distinct_rows(3, 12, 0)
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=12), logits)
    assert torch.equal(filter_logits(logits, top_k=0, top_p=1.0), logits)


def test_filters_do_not_change_their_input() -> None:
    logits = distinct_rows(2, 12, 1)
    before = logits.clone()
    filter_logits(logits, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


# Draws


def random_numbers(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return ((counts - expected) ** 2 / expected).sum().item()


def test_choice_frequencies_are_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0])
    draws = 20_000
    tokens = draw_tokens(logits.expand(draws, -1), random_numbers(draws))
    counts = tokens.bincount(minlength=6).double()
    # 20.5 is exceeded once in a thousand seeds with 5 degrees of freedom
    assert chi_square(counts, draws * probabilities(logits)) < 20.5
    assert chi_square(counts, draws * probabilities(logits * 1.1)) > 20.5  # the check tells a near miss apart


def test_rows_are_drawn_independently() -> None:
    tokens = draw_tokens(torch.zeros(20_000, 2, 2).flatten(0, 1), random_numbers(40_000)).view(-1, 2)
    pairs = (2 * tokens[:, 0] + tokens[:, 1]).bincount(minlength=4).double()
    assert chi_square(pairs, torch.full((4,), 5000.0)) < 16.3  # once in a thousand, 3 degrees of freedom


@given(width=st.integers(1, 40), keep=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_choice_inverts_the_cumulative_distribution(width: int, keep: int, seed: int) -> None:
    logits = filter_logits(distinct_rows(1, width, seed), top_k=keep)
    below_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    uniform = torch.tensor([0.0, below_1, *random_numbers(30, seed).tolist()])
    edges = probabilities(logits[0]).cumsum(0)
    chosen = draw_tokens(logits.expand(len(uniform), -1), uniform).tolist()
    for u, token in zip(uniform.tolist(), chosen, strict=True):
        assert logits[0, token].isfinite()  # a removed token is never drawn
        if 0 < u < below_1 and (edges - u).abs().min() > 1e-5:  # float32 sums cannot tell nearer ones
            assert token == next(index for index, edge in enumerate(edges.tolist()) if edge > u)
    kept = logits[0].isfinite().nonzero()[:, 0].tolist()
    assert chosen[0] == kept[0]
    if probabilities(logits[0])[kept[-1]] > 2e-6:
        assert chosen[1] == kept[-1]


def test_removed_tokens_are_not_drawn_at_the_ends_of_a_large_codebook() -> None:
    logits = torch.full((4, 16384), -math.inf)
    logits[:, 5000:9000] = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([0.0, 1 - 2**-24, 2**-24, 1 - 2**-23])
    chosen = draw_tokens(logits, uniform)
    assert chosen.tolist()[0] == 5000
    assert 5000 <= chosen.min() <= chosen.max() < 9000


# Uniform numbers


def test_uniform_numbers_are_a_function_of_the_seed_and_the_images_number() -> None:
    whole = uniforms(3, np.arange(6), 9)
    for order in ([0], [5, 2], [4, 4, 1]):
        assert torch.equal(uniforms(3, np.array(order), 9), whole[order])
    assert torch.equal(uniforms(3, np.arange(6), 4), whole[:, :4])
    others = [whole, uniforms(4, np.arange(6), 9), uniforms(3, np.arange(6, 12), 9)]
    assert torch.cat(others).unique().numel() == 3 * 6 * 9
    assert uniforms(2**63 - 1, np.array([2**40]), 1).shape == (1, 1)


def test_uniform_numbers_are_what_they_were() -> None:
    """Images of a seed stay the same from one version to the next."""
    expected = [[0.8620584011, 0.9342820048, 0.2702667713], [0.0570743680, 0.1609138250, 0.9062579274]]
    assert uniforms(3, np.array([0, 7]), 3).tolist() == [pytest.approx(row, abs=1e-7) for row in expected]


def test_uniform_numbers_are_uniform_along_an_image_and_across_images() -> None:
    drawn = uniforms(0, np.arange(4000), 4)
    assert 0 <= drawn.min() <= drawn.max() < 1
    bins = (drawn * 20).long()
    for numbers in (*bins.T, bins.flatten(), uniforms(1, np.array([0]), 20_000)[0].mul(20).long()):
        counts = numbers.bincount(minlength=20).double()
        assert chi_square(counts, torch.full((20,), len(numbers) / 20).double()) < 43.8  # 0.1 % at 19 degrees
    for first, second in ((bins[:, 0], bins[:, 1]), (bins[:-1, 0], bins[1:, 0])):  # neighbours tell nothing
        pairs = (first // 5 * 4 + second // 5).bincount(minlength=16).double()
        assert chi_square(pairs, torch.full((16,), len(first) / 16).double()) < 37.7  # 0.1 % at 15 degrees


def test_sampled_first_tokens_follow_the_models_probabilities() -> None:
    model = random_model()
    label, draws = 1, 5000
    with torch.no_grad():
        logits = model(torch.empty(1, 0, dtype=torch.int64), torch.tensor([label])).logits[0, 0] / 0.7
    expected = probabilities(logits) * draws
    expected, rare = expected[expected >= 5], expected[expected < 5].sum()
    tokens = generate(model, torch.full((draws,), label), temperature=0.7, seed=3, num_tokens=1)[:, 0]
    counts = tokens.bincount(minlength=TINY.vocab_size).double()
    usual = probabilities(logits) * draws >= 5
    observed = torch.cat([counts[usual], counts[~usual].sum()[None]])
    assert chi_square(observed, torch.cat([expected, rare.clamp(min=1)[None]])) < 29.6  # 0.1 % at 10 degrees


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model = random_model()
    first = generate(model, LABELS, seed=5)
    assert torch.equal(generate(model, LABELS, seed=5), first)
    assert not torch.equal(generate(model, LABELS, seed=6), first)


def test_a_seeded_sampling_neither_reads_nor_moves_torchs_global_generator() -> None:
    model = random_model()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(model, LABELS, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(generate(model, LABELS, seed=5), first)


def test_without_a_seed_draws_differ() -> None:
    model = random_model()
    torch.manual_seed(0)
    assert not torch.equal(generate(model, LABELS), generate(model, LABELS))


def test_a_small_temperature_approaches_greedy() -> None:
    io = recorded("io/")
    tokens = generate(recorded_model(), io["labels"][:3], temperature=1e-3, seed=0)
    assert torch.equal(tokens, io["greedy_cfg1.0"])


def test_top_k_of_1_is_greedy() -> None:
    io = recorded("io/")
    tokens = generate(recorded_model(), io["labels"][:3], cfg_scale=2.5, top_k=1, seed=0)
    assert torch.equal(tokens, io["greedy_cfg2.5"])


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.3}])
def test_every_drawn_token_passes_the_filter(settings: dict[str, float]) -> None:
    model = random_model()
    labels = torch.arange(4).repeat(8)
    tokens = generate(model, labels, seed=1, **settings)
    assert not torch.equal(tokens, generate(model, labels, seed=1))
    with torch.no_grad():
        logits = model(tokens[:, :-1], labels).logits
    for position in range(TINY.sequence_length):
        allowed = filter_logits(logits[:, position], **settings).isfinite()
        assert allowed.gather(1, tokens[:, position, None]).all()


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_an_images_tokens_do_not_depend_on_its_batch(cfg_scale: float) -> None:
    model, labels = random_model(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    whole = generate(model, labels, seed=5, cfg_scale=cfg_scale)
    for numbers in ([3], [6, 0], [5, 4, 3, 2, 1]):
        assert torch.equal(
            generate(model, labels[numbers], seed=5, images=numbers, cfg_scale=cfg_scale), whole[numbers]
        )
    assert not torch.equal(whole[0], whole[3])  # of one class


def test_drawn_tokens_are_those_of_a_naive_decode() -> None:
    model = random_model()
    tokens = generate(
        model, LABELS, seed=8, temperature=0.7, top_k=6, cfg_scale=2.0, cfg_schedule="linear", images=[2, 0, 9]
    )
    drawn = naive(model, [2, 0, 9], 8, lambda t: 1 + (t + 1) / 9, 0.7, 6)
    assert torch.equal(tokens, drawn)


def test_steps_are_a_draw_token_by_token() -> None:
    model, numbers = random_model(), np.arange(3)
    sampler = TokenSampler(model, 3, SampleSettings(cfg_scale=2.0))
    whole = sampler.draw(LABELS, numbers, 5)
    told: list[int] = []
    assert torch.equal(sampler.draw(LABELS, numbers, 5, on_token=told.append), whole)
    assert told == [*range(1, 10)]
    for drawn in sampler.steps(LABELS, numbers, 5):
        assert torch.equal(sampler.tokens[:, :drawn], whole[:, :drawn])
    assert [*sampler.steps(LABELS, numbers, 5, num_tokens=4)] == [1, 2, 3, 4]
    assert torch.equal(sampler.tokens[:, :4], whole[:, :4])


def test_a_draw_that_is_left_changes_no_other_and_cannot_be_taken_up_again() -> None:
    sampler = TokenSampler(random_model(), 3, SampleSettings())
    whole = sampler.draw(LABELS, np.arange(3), 5)
    left = sampler.steps(LABELS, np.arange(3), 6)
    assert [next(left), next(left)] == [1, 2]
    assert torch.equal(sampler.draw(LABELS, np.arange(3), 5), whole)
    with pytest.raises(AssertionError, match="another draw of this sampler has begun"):
        next(left)
    assert torch.is_grad_enabled()


def naive(
    model: Transformer, images: list[int], seed: int, scale: Callable[[int], float], temperature: float, top_k: int
) -> Tensor:
    """Tokens of LABELS without a cache, by the rule: guidance, temperature, top-k, inverse distribution."""
    noise = uniforms(seed, np.array(images), TINY.sequence_length)
    tokens = torch.zeros(len(images), 0, dtype=torch.int64)
    with torch.no_grad():
        for position in range(TINY.sequence_length):
            conditional = model(tokens, LABELS).logits[:, -1]
            null = model(tokens, torch.full_like(LABELS, TINY.null_class)).logits[:, -1]
            logits = (null + scale(position) * (conditional - null)) / temperature
            rows: list[int] = []
            for row, u in zip(logits, noise[:, position].tolist(), strict=True):
                kept = sorted(row.topk(top_k).indices.tolist())
                edges = row[kept].double().softmax(-1).cumsum(0).tolist()
                rows.append(kept[next((index for index, edge in enumerate(edges) if edge > u), -1)])
            tokens = torch.cat([tokens, torch.tensor(rows)[:, None]], dim=1)
    return tokens


# Guidance


def schedule(name: str, scale: float, power: float = 1.0) -> list[float]:
    guidance = SampleSettings(cfg_scale=scale, cfg_schedule=name, cfg_power=power)
    return [guidance_scale(guidance, position, 8) for position in range(8)]


def test_guidance_schedules_are_the_formulas() -> None:
    assert schedule("constant", 3.0) == [3.0] * 8
    assert schedule("linear", 3.0) == pytest.approx([1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0])
    assert schedule("power-cosine", 3.0)[0] == 1.0
    assert schedule("power-cosine", 3.0)[4] == pytest.approx(2.0)  # half the way at power 1
    for power in (0.5, 1.0, 2.75):
        written_out = [1 + 2 * 0.5 * (1 - math.cos(math.pi * (t / 8) ** power)) for t in range(8)]
        assert schedule("power-cosine", 3.0, power) == pytest.approx(written_out)
        assert sorted(written_out) == written_out
    assert schedule("power-cosine", 3.0, 4.0)[4] < schedule("power-cosine", 3.0)[4]  # a larger power comes later


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("linear", lambda t: 1 + 3 * (t + 1) / 9),
        ("power-cosine", lambda t: 1 + 3 * (1 - math.cos(math.pi * (t / 9) ** 1.5)) / 2),
    ],
)
def test_each_token_is_guided_by_its_schedule(name: str, rule: Callable[[int], float]) -> None:
    model = random_model()
    settings = {"cfg_scale": 4.0, "cfg_schedule": name, "cfg_power": 1.5, "greedy": True}
    tokens = generate(model, LABELS, **settings)
    assert torch.equal(tokens, naive(model, [0, 1, 2], 0, rule, 1.0, 1))
    assert not torch.equal(tokens, generate(model, LABELS, cfg_scale=4.0, greedy=True))
    assert torch.equal(generate(model, LABELS, num_tokens=5, **settings), tokens[:, :5])  # as of a whole image
    plain = generate(model, LABELS, greedy=True, cfg_scale=4.0, cfg_schedule="power-cosine", num_tokens=1)
    assert torch.equal(plain, generate(model, LABELS, greedy=True, num_tokens=1))  # it begins at 1


def test_scale_1_is_no_guidance() -> None:
    model = random_model()
    read: list[int] = []
    model.cls_embedding.register_forward_pre_hook(lambda _, arguments: read.append(len(arguments[0])))
    plain = generate(model, LABELS, seed=2)
    assert torch.equal(generate(model, LABELS, seed=2, cfg_scale=1.0, cfg_interval=3), plain)
    assert read == [3, 3]  # and costs no second half of the batch
    assert not torch.equal(generate(model, LABELS, seed=2, cfg_scale=4.0), plain)


def test_guided_greedy_tokens_follow_the_formula() -> None:
    model = random_model()
    scale = 3.0
    tokens = generate(model, LABELS, cfg_scale=scale, greedy=True)
    with torch.no_grad():
        conditional = model(tokens[:, :-1], LABELS).logits
        null = model(tokens[:, :-1], torch.full_like(LABELS, TINY.null_class)).logits
    assert torch.equal((null + scale * (conditional - null)).argmax(-1), tokens)
    assert not torch.equal(conditional.argmax(-1), tokens)


@pytest.mark.parametrize("interval", [0, 2])
def test_guidance_ends_after_its_interval(interval: int) -> None:
    model = random_model()
    tokens = generate(model, LABELS, cfg_scale=3.0, cfg_interval=interval, greedy=True)
    with torch.no_grad():
        conditional = model(tokens[:, :-1], LABELS).logits
        null = model(tokens[:, :-1], torch.full_like(LABELS, TINY.null_class)).logits
    guided = null + 3 * (conditional - null)
    last = interval + 2  # the prefill's token and interval + 1 decode steps
    assert torch.equal(guided[:, :last].argmax(-1), tokens[:, :last])
    assert torch.equal(conditional[:, last:].argmax(-1), tokens[:, last:])


def test_guidance_of_the_null_class_changes_nothing() -> None:
    model = random_model()
    labels = torch.full((2,), TINY.null_class)
    assert torch.equal(generate(model, labels, cfg_scale=5.0, greedy=True), generate(model, labels, greedy=True))


# Batches of one size, one after the other


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sampler_draws_batch_after_batch_in_the_same_memory(scale: float) -> None:
    model, settings = random_model(), SampleSettings(cfg_scale=scale, top_k=7)
    sampler = TokenSampler(model, 3, settings)
    places = addresses(sampler)
    for labels, numbers in ((LABELS, [0, 1, 2]), (LABELS.flip(0), [3, 4, 5]), (LABELS, [0, 1, 2])):
        drawn = sampler.draw(labels, np.array(numbers), 6)
        assert torch.equal(drawn, generate(model, labels, cfg_scale=scale, top_k=7, seed=6, images=numbers))
    assert addresses(sampler) == places  # as a recorded CUDA graph needs it


def addresses(sampler: TokenSampler) -> list[int]:
    held = (sampler.tokens, sampler.noise, sampler.scales, sampler.position)
    decoder = sampler.decoder
    return [tensor.data_ptr() for tensor in (*held, decoder.cache, decoder.mask, decoder.index)]


def test_a_result_outlives_the_next_batch() -> None:
    sampler = TokenSampler(random_model(), 3, SampleSettings())
    first = sampler.draw(LABELS, np.arange(3), 0)
    kept = first.clone()
    assert not torch.equal(sampler.draw(LABELS, np.arange(3), 1), kept)
    assert torch.equal(first, kept)


def test_a_step_can_be_repeated_as_recording_it_does() -> None:
    sampler = TokenSampler(random_model(), 3, SampleSettings(cfg_scale=2.0))
    sampler.draw(LABELS, np.arange(3), 0)
    tokens, cache = sampler.tokens.clone(), sampler.decoder.cache.clone()
    with torch.no_grad():
        sampler._advance(True, 9)
    assert torch.equal(sampler.tokens, tokens)
    assert torch.equal(sampler.decoder.cache, cache)


def test_after_the_first_token_nothing_waits_for_the_device() -> None:
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
            return func(*args, **(kwargs or {}))

    waited: list[int] = []
    sampler = TokenSampler(random_model(), 3, SampleSettings(cfg_scale=2.0, top_k=7, top_p=0.9, cfg_interval=3))
    with Waits() as waits:
        sampler.draw(LABELS, np.arange(3), 0, on_token=lambda _: waited.append(waits.count))
    assert waited[0] > 0  # the labels' range
    assert set(waited) == {waited[0]}


def test_on_token_is_called_after_each_token() -> None:
    sampler = TokenSampler(random_model(), 3, SampleSettings())
    seen: list[Tensor] = []
    drawn = sampler.draw(LABELS, np.arange(3), 0, on_token=lambda count: seen.append(sampler.tokens[:, :count].clone()))
    assert [part.shape[1] for part in seen] == list(range(1, 10))
    assert all(torch.equal(part, drawn[:, : part.shape[1]]) for part in seen)


# Requests


@pytest.mark.parametrize("count", [1, 4, 9])
def test_fewer_tokens_are_the_beginning_of_all(count: int) -> None:
    model = random_model()
    greedy = generate(model, LABELS, cfg_scale=2.0, greedy=True)
    assert torch.equal(generate(model, LABELS, cfg_scale=2.0, greedy=True, num_tokens=count), greedy[:, :count])
    sampled = generate(model, LABELS, seed=0)
    assert torch.equal(generate(model, LABELS, seed=0, num_tokens=count), sampled[:, :count])


def test_tokens_are_whole_numbers_of_the_codebook() -> None:
    tokens = generate(random_model(), LABELS, seed=0)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (3, 9)
    assert 0 <= tokens.min() <= tokens.max() < TINY.vocab_size
    assert not tokens.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_floating_type_samples(dtype: torch.dtype) -> None:
    io = recorded("io/")
    model = recorded_model().to(dtype)  # LlamaGen casts its weights to bfloat16 to sample
    tokens = generate(model, io["labels"][:3], cfg_scale=2.5, seed=0)
    assert torch.equal(generate(model, io["labels"][:3], cfg_scale=2.5, seed=0), tokens)
    assert 0 <= tokens.min() <= tokens.max() < model.config.vocab_size
    with torch.no_grad():
        logits = model(io["tokens"][:, :-1], io["labels"]).logits.float()
    assert (logits - io["logits"]).norm() / io["logits"].norm() < 0.05  # bfloat16 has 8 bits


@pytest.mark.parametrize("label", [-1, 4, 1000])
def test_a_label_out_of_range_is_refused(label: int) -> None:
    with pytest.raises(UserError, match=rf"label {label} is out of range.*0 to 2, or 3 for none"):
        generate(random_model(), torch.tensor([0, label]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 10}, "num_tokens must be 1 to 9, the tokens of an image, not 10"),
        ({"num_tokens": 0}, "num_tokens must be 1 to 9, the tokens of an image, not 0"),
        ({"cfg_scale": 0.5}, r"--cfg-scale must lie in \[1, 1000\], not 0\.5"),
        ({"cfg_scale": -2.0}, r"--cfg-scale must lie in \[1, 1000\], not -2\.0"),
        ({"cfg_scale": math.nan}, r"--cfg-scale must be a finite number or nothing, not nan"),
        ({"cfg_power": 0.0}, r"--cfg-power must lie in \(0, 1000\], not 0\.0"),
        ({"cfg_schedule": "cosine"}, r"--cfg-schedule must be one of constant, linear, power-cosine, not 'cosine'"),
        ({"temperature": 0.0}, r"--temperature must lie in \[0.001, 1000\], not 0\.0.*--top-k 1"),
        ({"temperature": -1.0}, r"--temperature must lie in \[0.001, 1000\], not -1\.0.*--top-k 1"),
        ({"images": [0, 1]}, r"images must be 3 whole numbers of 0 or more, one for each label, not \[0 1\]"),
        ({"images": [0, -1, 2]}, r"images must be 3 whole numbers of 0 or more"),
        ({"images": [0.5, 1.0, 2.0]}, r"images must be 3 whole numbers of 0 or more"),
        ({"seed": -1}, r"the seed must be in \[0, 18446744073709551615\], not -1"),
        ({"temperature": math.nan}, r"--temperature must be a finite number, not nan"),
        ({"top_k": -1}, r"--top-k must be 0 \(off\) or more, not -1"),
        ({"top_k": 12}, r"--top-k must lie in \[0, 11\].*not 12"),
        ({"top_p": 0.0}, r"top-p must lie in \(0, 1\], not 0\.0"),
        ({"top_p": 1.5}, r"top-p must lie in \(0, 1\], not 1\.5"),
        ({"top_p": math.nan}, "--top-p must be a finite number, not nan"),
        ({"cfg_interval": -2}, r"--cfg-interval must be at least -1 .*not -2"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_what_is_allowed(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(random_model(), LABELS, **settings)


@pytest.mark.parametrize(
    "labels", [torch.zeros(0, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2)], ids=str
)
def test_labels_of_another_shape_or_type_are_refused(labels: Tensor) -> None:
    with pytest.raises(UserError, match=r"labels must be int64 \[B\]"):
        generate(random_model(), labels)


def test_a_model_that_has_diverged_is_refused() -> None:
    model = random_model()
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    with pytest.raises(UserError, match="logits are not finite: its training has diverged"):
        generate(model, LABELS, seed=0)


def test_a_grid_of_one_token_samples() -> None:
    config = ModelConfig(dim=8, n_layers=1, n_heads=1, vocab_size=5, grid=1, num_classes=2, **NO_DROPOUT)
    model = random_model(config)
    with torch.no_grad():
        expected = model(torch.empty(3, 0, dtype=torch.int64), torch.arange(3)).logits.argmax(-1)
    assert torch.equal(generate(model, torch.arange(3), greedy=True), expected)
