"""Maps as pixels: where a click lands, what is bright, what is blank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_ar.demo import reading as maps
from st_ar.demo.reading import Reading

PICTURE = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)


@given(grid=st.integers(1, 40), row=st.integers(0, 39), column=st.integers(0, 39))
def test_a_click_inside_a_token_is_that_token(grid: int, row: int, column: int) -> None:
    row, column = row % grid, column % grid
    side = maps.enlarge(np.zeros((2 * grid, 2 * grid, 3), np.uint8), grid).shape[0]
    cell = side / grid
    assert cell == side // grid
    for place in (0.01, 0.5, 0.99):
        x, y = int((column + place) * cell), int((row + place) * cell)
        assert maps.token_at(x, y, grid) == row * grid + column


def test_a_click_outside_is_the_nearest_token() -> None:
    assert maps.token_at(-5, 10**6, 3) == 6
    assert maps.token_at(10**6, 10**6, 3) == 8


def test_the_enlarged_picture_keeps_its_pixels() -> None:
    large = maps.enlarge(PICTURE, 3)
    assert large.shape[0] >= maps.SIDE
    centres = ((np.arange(12) + 0.5) * large.shape[0] / 12).astype(int)
    np.testing.assert_array_equal(large[centres][:, centres], PICTURE)


def at(picture: np.ndarray, token: int, grid: int = 3) -> np.ndarray:
    """The middle pixel of a token."""
    cell = picture.shape[0] // grid
    return picture[token // grid * cell + cell // 2, token % grid * cell + cell // 2].astype(int)


@pytest.mark.parametrize("token", [0, 1, 5, 8])
def test_attention_shows_the_past_and_leaves_the_future_blank(token: int) -> None:
    weights = np.array([0.5, *np.linspace(0.01, 0.2, 8)])
    shown = maps.attention_map(PICTURE, weights, 3, token)
    for place in range(9):
        assert at(shown, place)[3] == (255 if place < token else 0)
    cell = shown.shape[0] // 3
    corner = shown[token // 3 * cell, token % 3 * cell]
    assert tuple(corner) == (*maps.TARGET, 255)
    if token > 2:
        flat = maps.attention_map(np.full_like(PICTURE, 90), weights, 3, token)
        assert at(flat, token - 1)[:3].sum() > at(flat, 0)[:3].sum()


def test_entropy_is_brightest_where_it_is_most() -> None:
    entropy = np.arange(9, dtype=np.float32)[::-1] / 9
    shown = maps.entropy_map(np.full_like(PICTURE, 90), entropy, 3, 4)
    light = [int(at(shown, place).sum()) for place in range(9)]
    assert light == sorted(light, reverse=True)
    assert light[0] > light[8] + 100
    maps.entropy_map(PICTURE, np.zeros(9, np.float32), 3, 0)  # of a certain model


def test_the_overview_has_each_head_where_a_click_finds_it() -> None:
    attention = np.zeros((2, 3, 9, 9), np.float16)
    for layer in range(2):
        for head in range(3):
            attention[layer, head, 8, 1 + layer * 3 + head] = 1
    nothing = np.zeros(9, np.float32)
    reading = Reading(attention=attention, entropy=nothing, chance=nothing, rank=nothing.astype(np.int64))
    shown = maps.heads_overview(reading, 3, 8, (2, 1))
    height, width = shown.shape[0] // 2, shown.shape[1] // 3
    assert (height * 2, width * 3) == shown.shape[:2]
    for layer in range(2):
        for head in range(3):
            top, left = layer * height, head * width
            assert maps.head_at(left + width // 2, top + height // 2, 3, 3) == (layer + 1, head + 1)
            inside = shown[top + maps.RIM : top + height - maps.RIM, left + maps.RIM : left + width - maps.RIM]
            light = [int(at(inside, place).sum()) for place in range(9)]
            assert light.index(max(light)) == layer * 3 + head
            framed = tuple(shown[top, left]) == maps.TARGET
            assert framed == ((layer, head) == (1, 0))
    whole = maps.heads_overview(reading, 3, 8, (1, None))
    assert [tuple(whole[0, head * width]) == maps.TARGET for head in range(3)] == [True] * 3
