"""Charts as numbers: where lines, bars, ticks and legends stand. The templates turn them into inline SVG.

No plotting library: the SVG takes its fonts and colours from the page, so it follows dark mode and print, its text
is text, and nothing has to be imported or cached to draw it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fedllm.runs.report_data import Values

# The plot's edges within the 560 x 294 drawing of templates/charts.html.j2.
LEFT, RIGHT, TOP, BOTTOM = 62, 548, 14, 246

MAX_COLOURS = 8
_MAX_POINTS = 400
_MAX_BARS = 200
_MAX_DOTS = 400
_MAX_ROUNDS_WITH_DOTS = 40
_MAX_LINES_WITH_DOTS = 5
_MAX_TABLE_ROWS = 60


@dataclass(frozen=True)
class Series:
    """A named metric by round and the CSS class that draws it: `lead`, `s1` to `s8`, `muted`."""

    name: str
    values: Values
    css: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A curve: an SVG path, and its points (x, y, label) where there are few enough.

    `quiet` points are seen only under the pointer.
    """

    css: str
    path: str
    name: str
    dots: list[tuple[float, float, str]]
    quiet: bool


@dataclass(frozen=True)
class Bar:
    """A rectangle of a stacked bar."""

    css: str
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Table:
    """A chart's numbers. `note` says what was left out."""

    columns: list[str]
    rows: list[tuple[int, list[float | None]]]
    note: str


@dataclass(frozen=True)
class Drawing:
    """A chart, ready for the template. `legend` holds (CSS class, name)."""

    key: str
    title: str
    summary: str
    unit: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    legend: list[tuple[str, str]]
    table: Table
    lines: list[Line] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    references: list[tuple[str, float, str]] = field(default_factory=list)
    delivered_at: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Labels:
    """The words of a chart: a key for ids, a title, the unit of the numbers, and a note under it."""

    key: str
    title: str
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """A linear map from numbers to places on the page."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the place of a number.

        Args:
            value: The number.
        """
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def party_series(by_party: dict[str, Values]) -> list[Series]:
    """Return a line per party: coloured while the colours last, all muted beyond.

    Args:
        by_party: A metric by party and round.
    """
    few = len(by_party) <= MAX_COLOURS
    return [
        Series(party, values, f"s{number}" if few else "muted")
        for number, (party, values) in enumerate(by_party.items(), start=1)
    ]


def stacked_series(by_party: dict[str, Values]) -> list[Series]:
    """Return a layer per party, the smallest ones joined into one where there are more than colours.

    Args:
        by_party: A metric by party and round.
    """
    if len(by_party) <= MAX_COLOURS:
        return party_series(by_party)
    order = sorted(by_party, key=lambda party: -sum(by_party[party].values()))
    shown, rest = order[: MAX_COLOURS - 1], order[MAX_COLOURS - 1 :]
    joined: Values = {}
    for party in rest:
        for number, value in by_party[party].items():
            joined[number] = joined.get(number, 0.0) + value
    layers = party_series({party: by_party[party] for party in shown})
    return [*layers, Series(f"{len(rest)} other parties", joined, f"s{MAX_COLOURS}")]


def line_chart(
    labels: Labels,
    series: Sequence[Series],
    *,
    references: Sequence[Series] = (),
    delivered: int | None = None,
    gaps: Collection[int] = (),
) -> Drawing | None:
    """Return a line chart over rounds, or None when there is nothing to draw.

    Args:
        labels: The chart's words.
        series: Lines; the first is the one that the summary speaks of.
        references: Horizontal lines: the value of round 0 counts.
        delivered: The round to mark.
        gaps: Rounds that break a line without a value there, even if no line has one.
    """
    series = [one for one in series if one.values]
    if not series:
        return None
    numbers = sorted({number for one in series for number in one.values} | set(gaps))
    levels = [value for one in [*series, *references] for value in one.values.values()]
    y_values = ticks(min(levels), max(levels))
    x = Scale(numbers[0], numbers[-1], LEFT + 6, RIGHT - 6)
    y = Scale(min(y_values[0], min(levels)), max(y_values[-1], max(levels)), BOTTOM, TOP)
    return Drawing(
        key=labels.key,
        title=labels.title,
        summary=_summary(series[0], labels.unit),
        unit=labels.unit,
        x_ticks=[Tick(x.at(number), str(number)) for number in round_ticks(numbers)],
        y_ticks=[Tick(y.at(value), label) for value, label in zip(y_values, tick_labels(y_values), strict=True)],
        # Drawn last, and so on top: the first line.
        lines=[_line(one, numbers, x, y, crowd=len(series)) for one in reversed(series)],
        references=[(one.css, y.at(one.values[0]), one.name) for one in references],
        legend=_legend([*series, *references]),
        table=_table(numbers, series),
        delivered_at=None if delivered not in numbers else x.at(delivered),
        note=labels.note,
    )


def bar_chart(labels: Labels, series: Sequence[Series]) -> Drawing | None:
    """Return a chart of stacked bars over rounds, or None when there is nothing to draw.

    Args:
        labels: The chart's words.
        series: Layers, the lowest first.
    """
    series = [one for one in series if any(one.values.values())]
    if not series:
        return None
    numbers = sorted({number for one in series for number in one.values})
    per_bar = math.ceil(len(numbers) / _MAX_BARS)
    groups = [numbers[start : start + per_bar] for start in range(0, len(numbers), per_bar)]
    highest = max(sum(_sum_of(one, group) for one in series) for group in groups)
    y_values = ticks(0.0, highest)
    y = Scale(0.0, max(y_values[-1], highest), BOTTOM, TOP)
    slot = (RIGHT - LEFT) / len(groups)
    places = {number: LEFT + (place + 0.5) * slot for place, group in enumerate(groups) for number in group}
    note = f"{labels.note} Each bar sums {per_bar} rounds." if per_bar > 1 else labels.note
    return Drawing(
        key=labels.key,
        title=labels.title,
        summary=_bar_summary(series, numbers, labels.unit),
        unit=labels.unit,
        x_ticks=[Tick(round(places[number], 1), str(number)) for number in round_ticks(numbers)],
        y_ticks=[Tick(y.at(value), label) for value, label in zip(y_values, tick_labels(y_values), strict=True)],
        bars=[bar for place, group in enumerate(groups) for bar in _stack(series, group, place, slot, y)],
        legend=_legend(series),
        table=_table(numbers, series),
        note=note.strip(),
    )


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return round numbers that cover a range, `count` or so of them.

    Args:
        low: Least value.
        high: Greatest value.
        count: How many steps to aim for.
    """
    if not high > low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return the labels of ticks, all with the decimals that tell them apart.

    Args:
        values: From `ticks`.
    """
    step = values[1] - values[0]
    if max(map(abs, values)) >= 1e6 or step < 1e-6:
        return [f"{value:.3g}" for value in values]
    decimals = next(d for d in range(8) if abs(round(step, d) - step) < step * 1e-6)
    return [f"{value:.{decimals}f}" for value in values]


def round_ticks(numbers: Sequence[int], *, count: int = 8) -> list[int]:
    """Return the rounds to label on the axis: whole, evenly spaced, at most `count` or so.

    Args:
        numbers: The rounds of the chart, ascending.
        count: How many labels there is room for.
    """
    span = numbers[-1] - numbers[0]
    step = next(s * 10**p for p in range(12) for s in (1, 2, 5) if span <= count * s * 10**p)
    present = set(numbers)
    return [number for number in range(math.ceil(numbers[0] / step) * step, numbers[-1] + 1, step) if number in present]


def number_text(value: float | None) -> str:
    """Return a number with four significant digits, whole ones in groups of three; a dash for None.

    Args:
        value: The number.
    """
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    if abs(value) >= 1e4:
        return number_text(round(value)) if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:#.4g}"


def _line(series: Series, numbers: list[int], x: Scale, y: Scale, *, crowd: int) -> Line:
    stride = math.ceil(len(numbers) / _MAX_POINTS)
    parts, pen_down = [], False
    for number in [*numbers[:-1:stride], numbers[-1]]:
        value = series.values.get(number)
        if value is not None:
            # "h0" gives a lone point a length, so that its round cap is drawn.
            parts.append(f"{'L' if pen_down else 'M'}{x.at(number):g} {y.at(value):g}{'' if pen_down else 'h0'}")
        pen_down = value is not None
    dots = [
        (x.at(number), y.at(value), f"{series.name}, round {number}: {number_text(value)}")
        for number, value in series.values.items()
    ]
    quiet = len(numbers) > _MAX_ROUNDS_WITH_DOTS or (crowd > _MAX_LINES_WITH_DOTS and series.css != "lead")
    return Line(series.css, "".join(parts), series.name, dots if crowd * len(numbers) <= _MAX_DOTS else [], quiet)


def _stack(series: Sequence[Series], group: list[int], place: int, slot: float, y: Scale) -> list[Bar]:
    bars, base = [], 0.0
    gap = min(slot * 0.25, 6)
    name = f"round {group[0]}" if len(group) == 1 else f"rounds {group[0]} to {group[-1]}"
    for one in series:
        value = _sum_of(one, group)
        top, bottom = y.at(base + value), y.at(base)
        base += value
        if bottom > top:
            label = f"{one.name}, {name}: {number_text(value)}"
            x = round(LEFT + place * slot + gap / 2, 1)
            bars.append(Bar(one.css, x, top, round(slot - gap, 1), round(bottom - top, 1), label))
    return bars


def _sum_of(series: Series, group: list[int]) -> float:
    return sum(series.values.get(number, 0.0) for number in group)


def _legend(series: Sequence[Series]) -> list[tuple[str, str]]:
    muted = [one for one in series if one.css == "muted"]
    named = [(one.css, one.name) for one in series if one.css != "muted"]
    return [*named, ("muted", f"each of {len(muted)} parties")] if muted else named


def _summary(series: Series, unit: str) -> str:
    first, last = min(series.values), max(series.values)
    values = series.values
    text = f"{series.name}: {number_text(values[first])} at round {first}"
    if last > first:
        lowest, highest = min(values.values()), max(values.values())
        text += f", {number_text(values[last])} at round {last}; between {number_text(lowest)} and "
        text += number_text(highest)
    return f"{text} ({unit})."


def _bar_summary(series: Sequence[Series], numbers: list[int], unit: str) -> str:
    parts = [f"{one.name} {number_text(sum(one.values.values()))}" for one in series]
    return f"Summed over rounds {numbers[0]} to {numbers[-1]}, in {unit}: {', '.join(parts)}."


def _table(numbers: list[int], series: Sequence[Series]) -> Table:
    stride = math.ceil(len(numbers) / _MAX_TABLE_ROWS)
    kept = sorted({*numbers[::stride], numbers[-1]})
    notes = [f"Every {stride} rounds and the last."] if stride > 1 else []
    muted = [one for one in series if one.css == "muted"]
    named = [one for one in series if one.css != "muted"]
    columns = [one.name for one in named]
    if muted:
        columns += ["least of the parties", "median", "greatest"]
        notes.append(f"{len(muted)} parties are reduced to three numbers.")
    rows = [(number, [one.values.get(number) for one in named] + _spread(muted, number)) for number in kept]
    if notes:
        notes.append("metrics.jsonl has all.")
    return Table(columns, rows, " ".join(notes))


def _spread(muted: list[Series], number: int) -> list[float | None]:
    if not muted:
        return []
    found = [one.values[number] for one in muted if number in one.values]
    return [min(found), statistics.median(found), max(found)] if found else [None, None, None]
