"""Draw the plots of docs/paper.md as SVG with matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {
    "E1": (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "chosen - rejected")),
    "E2": (("chosen", "chosen"), ("rejected", "rejected"), ("margin", "chosen - rejected")),
    "E3": (("chosen", "chosen"), ("margin", "chosen - rejected")),
    "E4": (("chosen", "chosen"), ("rejected", "rejected")),
}
"""Experiment -> the quantities that its plot shows, with the titles of the panels."""
LINES = ("-", "--", ":", "-.")
MARKERS = "os^D"
STYLE = {
    "svg.fonttype": "none",  # texts stay texts, so that the file is small
    "svg.hashsalt": "orpo-lite",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def draw(name: str, plot: Mapping[str, Any], file: Path) -> None:
    """Write the plot of an experiment to ``file``. Equal data give an equal file."""
    with mpl.rc_context(STYLE):
        if "density" in plot:
            figure = _densities(plot)
        elif "curves" in plot:
            figure = _curves(plot["curves"], PANELS[name])
        elif "wins" in plot:
            figure = _wins(plot)
        elif "diversity" in plot:
            figure = _diversity(plot["diversity"])
        else:
            figure = _bars(plot)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = file.read_text("utf-8")
    file.write_text("".join(f"{line.rstrip()}\n" for line in text.splitlines()), "utf-8")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.3 * count, 2.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _densities(plot: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(5, 2.8)
    for number, (label, density) in enumerate(plot["density"].items()):
        axes.stairs(
            density, plot["edges"], label=label, linestyle=LINES[number], color=f"C{number}"
        )
    axes.set_xlabel("difference of the two samples")
    axes.set_ylabel("density")
    axes.legend(frameon=False)
    return figure


def _curves(curves: Mapping[str, Any], panels: tuple[tuple[str, str], ...]) -> Figure:
    figure, all_axes = _panels(len(panels))
    for axes, (key, title) in zip(all_axes, panels, strict=True):
        for number, (label, line) in enumerate(curves.items()):
            style = {"linestyle": LINES[number % 4], "marker": MARKERS[number % 4]}
            axes.plot(line["share"], line[key], label=label, markersize=3, **style)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("share of the training")
    all_axes[0].set_ylabel("nats a token, held-out pairs")
    all_axes[-1].legend(frameon=False, fontsize=7)
    return figure


def _bars(plot: Mapping[str, Any]) -> Figure:
    figure, all_axes = _panels(2)
    titles = {"rows": "rows of a step", "seconds": "seconds of a step (median)"}
    for axes, (key, title) in zip(all_axes, titles.items(), strict=True):
        labels = [label.replace(", ", ",\n") for label in plot[key]]
        axes.barh(labels, [*plot[key].values()], color="C0")
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
    all_axes[1].set_yticklabels([])
    return figure


def _wins(plot: Mapping[str, Any]) -> Figure:
    figure, (axes, rewards) = _panels(2)
    for place, (value, low, high) in enumerate(plot["wins"].values()):
        low, high = (value if end is None else end for end in (low, high))
        reach = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(100 * value, place, xerr=reach, fmt="o", color="C0", capsize=3)
    labels = [f"against {label}".replace(" with", "\nwith") for label in plot["wins"]]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(50, color="black", linewidth=0.8)
    axes.set_xlim(0, 100)
    axes.set_title("ORPO wins, % (95% interval)", fontsize=9)
    for number, (label, density) in enumerate(plot["rewards"].items()):
        style = {"linestyle": LINES[number % 4], "color": f"C{number}"}
        rewards.stairs(density, plot["reward_edges"], label=label, **style)
    rewards.set_title("density of the judge's rewards", fontsize=9)
    rewards.legend(frameon=False, fontsize=7)
    return figure


def _diversity(found: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(5, 2.8)
    for number, (label, (pid, aid)) in enumerate(found.items()):
        style = {"marker": "os^Dvx"[number % 6], "color": f"C{number}", "linestyle": "none"}
        axes.plot([pid], [aid], label=label, **style)
    axes.set_xlabel("PID: answers to one prompt are alike")
    axes.set_ylabel("AID: across prompts")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
