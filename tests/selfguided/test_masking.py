import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from st_ar.selfguided.objective import random_key_mask, random_positions, show_own_position


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(batch=st.integers(1, 8), length=st.integers(1, 40), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_each_sequence_has_the_exact_count_masked_and_never_its_class(
    batch: int, length: int, ratio: float, seed: int
) -> None:
    mask = random_key_mask(batch, length, ratio, seeded(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == (batch, length)
    assert mask.sum(1).tolist() == [round(ratio * (length - 1))] * batch
    assert not mask[:, 0].any()


@given(batch=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_share_of_the_sequences_is_masked_and_the_others_are_not(batch: int, share: float, seed: int) -> None:
    mask = random_key_mask(batch, 9, 0.5, seeded(seed), share=share)
    assert sorted(mask.sum(1).tolist()) == [0] * (batch - round(share * batch)) + [4] * round(share * batch)
    everyone = random_key_mask(batch, 9, 0.5, seeded(seed))
    masked = mask.any(1)
    assert torch.equal(mask[masked], everyone[masked])


@given(
    batch=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_a_part_of_the_batch_is_masked_as_it_is_in_the_whole(
    batch: int, share: float, seed: int, cut: tuple[int, int]
) -> None:
    mine = slice(min(cut), max(cut))
    whole = random_key_mask(batch, 9, 0.5, seeded(seed), share=share)
    assert torch.equal(random_key_mask(batch, 9, 0.5, seeded(seed), share=share, mine=mine), whole[mine])


def test_each_sequence_is_as_likely_to_be_masked() -> None:
    generator, draws = seeded(0), 4000
    counts = sum(random_key_mask(6, 9, 0.5, generator, share=0.5).any(1).double() for _ in range(draws))
    assert isinstance(counts, Tensor)
    assert (counts / draws - 0.5).abs().max() < 4.5 * math.sqrt(0.25 / draws)


def test_a_quarter_of_255_image_keys_is_64() -> None:
    assert random_key_mask(3, 256, 0.25, seeded(0)).sum(1).tolist() == [64, 64, 64]


def test_sequences_are_masked_differently() -> None:
    mask = random_key_mask(64, 65, 0.25, seeded(0))
    assert len({tuple(row) for row in mask.tolist()}) == 64


def test_every_image_key_is_masked_equally_often_and_independently_of_the_others() -> None:
    draws, keys, ratio = 6000, 10, 0.3
    mask = random_key_mask(draws, keys + 1, ratio, seeded(1))[:, 1:].double()
    error = math.sqrt(ratio * (1 - ratio) / draws)
    assert (mask.mean(0) - ratio).abs().max() < 4.5 * error
    together = mask.T @ mask / draws
    expected = 3 * 2 / (10 * 9)  # both of two given keys among the three masked of ten
    apart = together[~torch.eye(keys, dtype=torch.bool)]
    assert (apart - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / draws)


@given(seed=st.integers(0, 2**32))
def test_the_generator_alone_decides(seed: int) -> None:
    torch.manual_seed(0)
    first = random_key_mask(4, 65, 0.25, seeded(seed)), random_positions(65, 8, seeded(seed))
    torch.manual_seed(1)
    again = random_key_mask(4, 65, 0.25, seeded(seed)), random_positions(65, 8, seeded(seed))
    other = random_key_mask(4, 65, 0.25, seeded(seed + 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other)


def naive_own_visible(mask: Tensor) -> Tensor:
    batch, length = mask.shape
    out = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for query in range(length):
            for key in range(length):
                out[b, query, key] = bool(mask[b, key]) and key != query
    return out


@given(batch=st.integers(1, 4), length=st.integers(1, 12), ratio=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_own_position_can_be_shown_and_nothing_else(batch: int, length: int, ratio: float, seed: int) -> None:
    mask = random_key_mask(batch, length, ratio, seeded(seed))
    before = mask.clone()
    assert torch.equal(show_own_position(mask), naive_own_visible(mask))
    assert torch.equal(mask, before)


@given(length=st.integers(1, 300), data=st.data(), seed=st.integers(0, 2**32))
def test_positions_are_distinct_ascending_and_in_range(length: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, length))
    positions = random_positions(length, count, seeded(seed))
    assert positions.dtype == torch.int64
    found = positions.tolist()
    assert len(found) == count
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] < length


@given(length=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32))
def test_positions_may_begin_later(length: int, data: st.DataObject, seed: int) -> None:
    first = data.draw(st.integers(0, length - 1))
    count = data.draw(st.integers(1, length - first))
    positions = random_positions(length, count, seeded(seed), first=first).tolist()
    assert positions == sorted(set(positions))
    assert len(positions) == count
    assert first <= positions[0] <= positions[-1] < length


def test_all_positions_can_be_taken() -> None:
    assert random_positions(7, 7, seeded(3)).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_every_position_is_drawn_equally_often() -> None:
    draws, length, count = 4000, 9, 4
    generator = seeded(0)
    drawn = torch.cat([random_positions(length, count, generator) for _ in range(draws)])
    share = drawn.bincount(minlength=length).double() / draws
    expected = count / length
    assert (share - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / draws)
