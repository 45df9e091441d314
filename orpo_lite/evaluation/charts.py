"""Draw the curves of a run as inline SVG, by matplotlib.

Colours are variables of the page's style sheet, so that one picture serves light and dark pages.
Lines differ by dashes and markers too, so they can be distinguished without colour.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WIDTH, HEIGHT = 400, 236  # units of the picture, about a pixel each; the page scales it
DRAWN = 240  # parts of a line of which minimum and maximum are drawn
TABLE_ROWS = 9
SMOOTHED_FROM = 20  # steps
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (7, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D")
COLOURS = 4
# Stand-ins for variables of the style sheet: matplotlib writes a colour, which is then replaced.
VARIABLES = {f"#00000{number}": f"var(--line-{number})" for number in range(1, COLOURS + 1)}
VARIABLES |= {"#000008": "var(--grid)", "#000009": "var(--muted)", "#00000a": "var(--card)"}
GRID, MUTED, CARD = "#000008", "#000009", "#00000a"

Better = Literal["low", "high", ""]


@dataclass(frozen=True)
class Line:
    """A curve: values by step."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    """NaN where a value is missing or not finite."""
    colour: int
    """From 0; beyond the last colour it starts again."""
    style: int
    """From 0, of dashes and markers."""
    held_out: bool = False
    """Measured at few steps, so each of them has a marker; else a step has noise."""
    faint: bool = True
    """Also draw each step, faintly, where the line is smoothed."""

    @property
    def smooth(self) -> tuple[Array, int]:
        """The mean of the nearest steps at each step, and how many steps that are."""
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
    """A picture of curves that share an axis."""

    key: str
    """Its identifier in the page."""
    title: str
    note: str
    """What it shows, in a sentence."""
    lines: Sequence[Line]
    better: Better = ""
    """Which values are better; "" if neither."""
    percent: bool = False
    level: tuple[str, float] | None = None
    """A horizontal line: its label and value."""

    def text(self, value: float) -> str:
        """Return a value as text, as precise as people read it."""
        if not np.isfinite(value):
            return "–"
        if self.percent:
            return f"{value:.1%}"
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.3g}".replace("-", "\u2212") if value < 0 else f"{value:.3g}"

    def summary(self) -> list[str]:
        """Return for each line its first, last and best value, as a sentence."""
        sentences = []
        for line in self.lines:
            values, width = line.smooth
            known = np.flatnonzero(np.isfinite(values))
            if not len(known):
                sentences.append(f"{line.label}: no finite value")
                continue
            first, last = values[known[0]], values[known[-1]]
            steps = f"step {line.steps[known[0]]:,} to step {line.steps[known[-1]]:,}"
            text = f"{line.label}: {self.text(first)} → {self.text(last)} ({steps})"
            if self.better != "high":
                low = known[np.argmin(values[known])]
                text += f", lowest {self.text(values[low])} at step {line.steps[low]:,}"
            if self.better != "low":
                high = known[np.argmax(values[known])]
                text += f", highest {self.text(values[high])} at step {line.steps[high]:,}"
            sentences.append(text + (f"; means of {width} steps" if width > 1 else ""))
        if self.level:
            sentences.append(f"{self.level[0]}: {self.text(self.level[1])}")
        return sentences

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and some rows, evenly spaced, of the values that are drawn."""
        steps = sorted({step for line in self.lines for step in line.steps})
        picked = np.unique(np.linspace(0, len(steps) - 1, min(TABLE_ROWS, len(steps))).astype(int))
        held_out = {step for line in self.lines if line.held_out for step in line.steps}
        if 0 < len(held_out) <= 2 * TABLE_ROWS:  # these are the rows in which all lines have values
            shown = sorted(held_out | ({steps[0], steps[-1]} if steps else set()))
        else:
            shown = [steps[index] for index in picked]
        columns = [dict(zip(line.steps, line.smooth[0], strict=True)) for line in self.lines]
        rows = [[f"{s:,}", *(self.text(c.get(s, np.nan)) for c in columns)] for s in shown]
        return ["step", *(line.label for line in self.lines)], rows


def extremes(steps: Sequence[int], values: Sequence[float] | Array) -> tuple[Array, Array]:
    """Return a long line with fewer points: first, last, and both extremes of each part."""
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
    """Return a chart as an ``svg`` element, without a size of its own."""
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
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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
    """Return matplotlib's SVG as an element of an HTML page, with the page's colours and font."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)  # equal in all pictures of a page
    text = re.sub(r"(id=\"|url\(#|href=\"#)", rf"\g<1>{key}-", text)
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', text)
    text = re.sub(r"#00000[0-9a]\b", lambda found: VARIABLES.get(found[0], found[0]), text)
    text = re.sub(r" font-family: [^;]*;| transform=\"rotate\(-0 [^\"]*\"", "", text)
    # A tenth of a pixel is enough. Texts between elements are values, and keep their digits.
    places = re.compile(r"(?<= )(d|x|y|transform)=\"[^\"]*\"")
    text = places.sub(lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\n\s*", "\n", text).strip()
