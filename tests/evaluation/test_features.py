"""Region statistics: the feature space of FD-regions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_ar.evaluation.metrics import region_statistics


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 1000))
def test_each_region_gives_three_means_then_three_deviations_in_raster_order(
    count: int, regions: int, side: int, seed: int
) -> None:
    images = random_images(count, regions * side, seed)
    expected: list[list[float]] = []
    for image in images:
        row: list[float] = []
        for top in range(0, regions * side, side):
            for left in range(0, regions * side, side):
                pixels = image[top : top + side, left : left + side].reshape(-1, 3).astype(np.float64) / 255
                mean = pixels.sum(0) / side**2
                row += [*mean, *np.sqrt(((pixels - mean) ** 2).sum(0) / side**2)]
        expected.append(row)
    np.testing.assert_allclose(region_statistics(images, regions), expected, atol=1e-12)


def test_four_by_four_regions_of_six_numbers_are_the_default() -> None:
    assert region_statistics(random_images(2, 32)).shape == (2, 96)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 20, 250)])
def test_an_image_of_one_colour_has_that_mean_everywhere_and_no_deviation(colour: tuple[int, int, int]) -> None:
    image = np.broadcast_to(np.array(colour, np.uint8), (1, 8, 8, 3))
    expected = np.tile([*(value / 255 for value in colour), 0, 0, 0], 16)
    np.testing.assert_allclose(region_statistics(image)[0], expected, atol=1e-12)


def test_a_change_in_one_region_shows_in_its_numbers_alone() -> None:
    images = random_images(1, 8).repeat(2, axis=0)
    images[1, 4:6, 2:4] //= 2  # row 2, column 1 of the regions
    first, second = region_statistics(images).reshape(2, 16, 6)
    assert [index for index in range(16) if not np.array_equal(first[index], second[index])] == [9]


def test_an_images_features_do_not_depend_on_its_batch() -> None:
    images = random_images(7, 16)
    whole = region_statistics(images)
    for index in range(7):
        np.testing.assert_array_equal(region_statistics(images[index : index + 1])[0], whole[index])
