"""Comparing methods honestly: one number for each seed, mean and spread, and a table that shows both."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A measurement repeated with several seeds."""

    values: tuple[float, ...]
    """One for each seed."""

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in the denominator); None for a single one, which says nothing about spread."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self, digits: int) -> str:
        """84.8 ± 0.7, or 84.8 alone for one seed."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"

    def describe(self) -> dict[str, object]:
        """As plain JSON values."""
        return {"mean": self.mean, "deviation": self.deviation, "values": list(self.values)}


def difference(of: Spread, over: Spread) -> Spread:
    """Seed by seed, since both methods saw the same data in the same order."""
    return Spread(tuple(a - b for a, b in zip(of.values, over.values, strict=True)))


def is_noise(paired: Spread) -> bool | None:
    """Whether a paired difference is less than two standard errors from zero; None where one seed cannot say."""
    if paired.deviation is None:
        return None
    return abs(paired.mean) <= 2 * paired.deviation / math.sqrt(len(paired.values))


@dataclass(frozen=True, kw_only=True)
class Column:
    """How a measurement is shown."""

    key: str
    label: str
    digits: int
    factor: float = 1
    """100 for shares shown in per cent."""

    def text(self, measured: Spread | None) -> str:
        """The cell; a dash for what was not measured."""
        return "-" if measured is None else Spread(tuple(self.factor * v for v in measured.values)).text(self.digits)


def table_rows(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """Rows of text for a terminal (`printing.print_table`) or a page (`report.Table`): the method, then its columns."""
    return [[label, *(column.text(found.get(column.key)) for column in columns)] for label, found in rows.items()]


def table_columns(columns: Sequence[Column], rows: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """The same lying down: a row for each measurement, a column for each method."""
    return [[column.label, *(column.text(found.get(column.key)) for found in rows.values())] for column in columns]
