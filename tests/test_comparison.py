"""Means and spreads over seeds, and what is noise."""

import pytest

from st_ar.report import Column, Spread, difference, is_noise, table_columns, table_rows


def test_mean_and_deviation_are_the_formulas() -> None:
    spread = Spread((1.0, 2.0, 6.0))
    assert spread.mean == 3
    assert spread.deviation == pytest.approx(((4 + 1 + 9) / 2) ** 0.5)
    assert spread.text(1) == "3.0 ± 2.6"
    assert spread.describe() == {"mean": 3.0, "deviation": spread.deviation, "values": [1.0, 2.0, 6.0]}


def test_one_seed_says_nothing_about_spread() -> None:
    single = Spread((0.847,))
    assert (single.mean, single.deviation, single.text(2)) == (0.847, None, "0.85")
    assert is_noise(single) is None


def test_differences_are_taken_seed_by_seed() -> None:
    paired = difference(Spread((10.0, 20.0, 30.0)), Spread((9.0, 19.0, 29.0)))
    assert paired.values == (1.0, 1.0, 1.0)
    assert is_noise(paired) is False  # though each spreads by ten
    with pytest.raises(ValueError, match="shorter"):
        difference(Spread((1.0, 2.0)), Spread((1.0,)))


@pytest.mark.parametrize(("shift", "noise"), [(1.1, True), (1.2, False), (-1.2, False)])
def test_noise_is_up_to_two_standard_errors(shift: float, noise: bool) -> None:
    paired = Spread(tuple(shift + x for x in (-1.0, 1.0, -1.0, 1.0)))  # the standard error is sqrt(4 / 3) / 2 = 0.577
    assert is_noise(paired) is noise


def test_rows_have_a_dash_for_what_was_not_measured() -> None:
    columns = [Column(key="fid", label="FID", digits=2), Column(key="probe", label="probe, %", digits=1, factor=100)]
    rows = {"AR": {"fid": Spread((31.351,)), "probe": Spread((0.18, 0.20))}, "ST-AR": {"probe": Spread((0.4527,))}}
    assert table_rows(columns, rows) == [["AR", "31.35", "19.0 ± 1.4"], ["ST-AR", "-", "45.3"]]
    assert table_columns(columns, rows) == [["FID", "31.35", "-"], ["probe, %", "19.0 ± 1.4", "45.3"]]
