"""Draw the curves of a run as inline SVG with matplotlib.

Colours are variables of the page's style sheet, so the same picture works on light and dark pages.
Lines also differ in dashes and markers, so people can distinguish them without colour.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDTH, HEIGHT = 400, 236  # in SVG units, about one pixel each; the page scales the picture
DRAWN = 240  # a long line is split into this many parts, and each part's extremes are drawn
TABLE_ROWS = 9
SMOOTHED_FROM = 20  # steps; a shorter line is not smoothed
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (7, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D")
COLOURS = 4
# matplotlib writes these colours; then each is replaced by a variable of the style sheet.
VARIABLES = {f"#00000{number}": f"var(--line-{number})" for number in range(1, COLOURS + 1)}
VARIABLES |= {"#000008": "var(--grid)", "#000009": "var(--muted)", "#00000a": "var(--card)"}
GRID, MUTED, CARD = "#000008", "#000009", "#00000a"

Better = Literal["low", "high", ""]


@dataclass(frozen=True)
class Line:
    """A curve: one value for each step, or for each value of the chart's x axis."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    """NaN where a value is missing or not finite."""
    colour: int
    """Index of the colour, from 0. After the last colour the first one is used again."""
    style: int
    """Index of the dashes and the marker, from 0."""
    held_out: bool = False
    """True: a held-out metric, drawn with markers. False: a noisy training metric, smoothed."""
    faint: bool = True
    """If the line is smoothed, also draw the value of each step as a faint line."""

    @property
    def smooth(self) -> tuple[Array, int]:
        """The moving average of the values, and its width in steps. Width 1: not smoothed."""
        values = np.asarray(self.values, np.float64)
        if self.held_out or len(values) < SMOOTHED_FROM:
            return values, 1
        width = 2 * (len(values) // 40) + 1
        known = np.isfinite(values)
        kernel = np.ones(max(3, width))
        sums = np.convolve(np.where(known, values, 0.0), kernel, "same")
        counts = np.convolve(known.astype(np.float64), kernel, "same")
        mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return np.where(known, mean, np.nan), len(kernel)


@dataclass(frozen=True)
class Chart:
    """Curves that are drawn in one picture with the same axes."""

    key: str
    """The chart's identifier in the page."""
    title: str
    note: str
    """One sentence that says what the chart shows."""
    lines: Sequence[Line]
    better: Better = ""
    """Whether low or high values are better. "": neither."""
    percent: bool = False
    level: tuple[str, float] | None = None
    """Label and value of a horizontal line."""
    axis: str = "step"
    """What the x axis shows. Steps are whole numbers."""

    def text(self, value: float) -> str:
        """Return a value as text, rounded for reading: ``0.12345`` -> ``0.123``."""
        if not np.isfinite(value):
            return "–"
        if self.percent:
            return f"{value:.1%}"
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}".replace("-", "\u2212") if value < 0 else f"{value:.3g}"

    def _place(self, x: float) -> str:
        """Return a place on the x axis as text: ``step 1,000``."""
        text = f"{x:,}" if self.axis == "step" else f"{x:.3g}".replace("-", "\u2212")
        return f"{self.axis} {text}"

    def summary(self) -> list[str]:
        """Return a sentence for each line: its first, last and extreme values.

        If ``level`` is set, the last sentence gives its label and value.
        """
        sentences = []
        for line in self.lines:
            values, width = line.smooth
            known = np.flatnonzero(np.isfinite(values))
            if not len(known):
                sentences.append(f"{line.label}: no finite value")
                continue
            first, last = values[known[0]], values[known[-1]]
            steps = f"{self._place(line.steps[known[0]])} to {self._place(line.steps[known[-1]])}"
            text = f"{line.label}: {self.text(first)} → {self.text(last)} ({steps})"
            if self.better != "high":
                low = known[np.argmin(values[known])]
                text += f", lowest {self.text(values[low])} at {self._place(line.steps[low])}"
            if self.better != "low":
                high = known[np.argmax(values[known])]
                text += f", highest {self.text(values[high])} at {self._place(line.steps[high])}"
            sentences.append(text + (f"; means of {width} steps" if width > 1 else ""))
        if self.level:
            sentences.append(f"{self.level[0]}: {self.text(self.level[1])}")
        return sentences

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of a table with some of the drawn values.

        Each row is a step. The rows are the first step, the last step, and the steps with a
        held-out evaluation. If there are no evaluations, or more than ``2 * TABLE_ROWS``, the rows
        are at most ``TABLE_ROWS`` evenly spaced steps.
        """
        steps = sorted({step for line in self.lines for step in line.steps})
        picked = np.unique(np.linspace(0, len(steps) - 1, min(TABLE_ROWS, len(steps))).astype(int))
        held_out = {step for line in self.lines if line.held_out for step in line.steps}
        if 0 < len(held_out) <= 2 * TABLE_ROWS:  # at these steps all lines have values
            shown = sorted(held_out | ({steps[0], steps[-1]} if steps else set()))
        else:
            shown = [steps[index] for index in picked]
        columns = [dict(zip(line.steps, line.smooth[0], strict=True)) for line in self.lines]
        rows = [
            [
                self._place(step).removeprefix(f"{self.axis} "),
                *(self.text(column.get(step, np.nan)) for column in columns),
            ]
            for step in shown
        ]
        return [self.axis, *(line.label for line in self.lines)], rows


def extremes(steps: Sequence[float], values: Sequence[float] | Array) -> tuple[Array, Array]:
    """Return the steps and values of a line, with fewer points if it is long.

    A line of more than ``2 * DRAWN`` points is divided into parts. The first and the last point of
    the line are kept. In each part, the lowest point, the highest point and the first point without
    a finite value are kept. So a gap in the line is kept too.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    if len(x) <= 2 * DRAWN:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), DRAWN):
        known = part[np.isfinite(y[part])]
        if len(known):
            kept |= {int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}
        if len(known) < len(part):  # a gap
            kept.add(int(part[~np.isfinite(y[part])][0]))
    index = np.array(sorted(kept))
    return x[index], y[index]


def draw(chart: Chart) -> str:
    """Return a chart as an ``svg`` element. The element has no size: the page sets the size."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.key,
        "font.size": 12,
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), facecolor="none")
        FigureCanvasSVG(figure)
        entries = len(chart.lines) + bool(chart.level)
        is_short = sum(len(line.label) for line in chart.lines) <= 24
        columns = entries if is_short and not chart.level else 2
        top = 0.97 - 0.075 * (-(-entries // columns) if entries > 1 else 0)
        axes = figure.add_axes((0.13, 0.11, 0.855, top - 0.11), facecolor="none")
        for line in chart.lines:
            _draw_line(axes, line)
        if chart.level:
            label, value = chart.level
            axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=STYLES[2], label=label)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GRID)
        axes.tick_params(colors=MUTED, length=0, pad=5)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02, y=0.08)
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=chart.axis == "step"))
        if entries > 1:
            figure.legend(
                loc="upper left",
                bbox_to_anchor=(0.0, 1.01),
                ncols=columns,
                frameon=False,
                labelcolor=MUTED,
                handlelength=2.2,
                columnspacing=1.2,
                borderaxespad=0.1,
                labelspacing=0.25,
                handletextpad=0.5,
            )
        output = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(output, format="svg", transparent=True, metadata=empty)
    return _inline(output.getvalue(), chart.key)


def _draw_line(axes: Any, line: Line) -> None:
    colour = f"#00000{line.colour % COLOURS + 1}"
    smooth, width = line.smooth
    if width > 1 and line.faint:
        x, y = extremes(line.steps, line.values)
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.28)
    x, y = extremes(line.steps, smooth)
    kind = line.style % len(STYLES)
    options: dict[str, Any] = {}
    if line.held_out:
        options = {"marker": MARKERS[kind], "markersize": 5, "markeredgecolor": CARD}
        options["markevery"] = max(1, len(x) // 12)
    axes.plot(
        x, y, color=colour, linewidth=1.8, linestyle=STYLES[kind], label=line.label, **options
    )


def _tick(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 100_000 else f"{value / 1000:,g}k"
    return (
        f"{value:.6g}".replace("-", "\u2212") if abs(value) >= 1e-3 or not value else f"{value:g}"
    )


def _inline(text: str, key: str) -> str:
    """Return matplotlib's SVG as an element for an HTML page, with the page's colours and font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    # These ids are the same in all pictures of a page, but an id must be unique in the page.
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    text = re.sub(r"(id=\"|url\(#|href=\"#)", rf"\g<1>{key}-", text)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', text)
    text = re.sub(r"#00000[0-9a]\b", lambda found: VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", text)
    # Round coordinates to a tenth of a pixel. Texts between elements are values and stay exact.
    places = re.compile(r"(?<= )(d|x|y|transform)=\"[^\"]*\"")
    text = places.sub(lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\n\s*", "\n", text).strip()
