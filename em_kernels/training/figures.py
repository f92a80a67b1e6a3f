"""Plots of a report: each a PNG, and an SVG that takes text and axes from the page it stands in."""

import re
import warnings
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .evaluate import wilson
from .shift import EDGES, Measures
from .summary import Run

INK = "#1f2324"  # in a PNG, on white; in an SVG the page's own
# told apart by the colour-blind too, each at least 3 : 1 on white and on the dark page
COLOURS = ("#2f81f7", "#c95f00", "#1a9173", "#a35bd6", "#d1437a", "#867a19")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
STYLE: Any = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "svg.hashsalt": "em_kernels",  # the same run gives the same file
    "text.parse_math": False,  # a run may be called $x$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
}
CURVES = {  # of metrics.jsonl: title, unit, factor, how far the axis reaches at least
    "entropy": ("Entropy = loss", "nats a token", 1, 0),
    "accuracy": ("Accuracy on the training prompt", "% of completions", 100, 100),
    "mean_length": ("Mean length", "tokens a completion", 1, 0),
    "ended": ("Ended by themselves", "% of completions", 100, 100),
    "repetition": ("Repetition", "% of 4-grams seen before", 100, 5),
    "grad_norm": ("Gradient norm before clipping", "L2 norm", 1, 0),
    "active_share": ("Words in the head's backward", "% of the vocabulary", 100, 0),
    "dropped_share": ("Gradient that it left out", "% of the L1 mass", 100, 0),
    "peak_memory_gib": ("Peak memory; dashed: planned", "GiB", 1, 0),
}


class Line(NamedTuple):
    """A curve; its number among the runs gives its look."""

    label: str  # in the legend, unless it is empty
    x: Sequence[float]
    y: Sequence[float]
    number: int = 0
    planned: bool = False  # a bound: dashed, without markers
    filled: bool = False  # a histogram
    band: Sequence[tuple[float, float]] = ()  # an interval around each point


def draw(
    lines: Sequence[Line], title: str, x: str, y: str, png: Path, described: str, top: float = 0
) -> Markup:
    """Write the PNG, and return the SVG.

    Args:
        x, y: what the axes show, with units.
        described: the plot in words, for those who do not see it.
        top: the y axis reaches at least so far.
    """
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a PNG, of a run's name
        named = [line for line in lines if line.label]
        figure = Figure(figsize=(4.6, 2.9 + 0.1 * (len(named) + 1)), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            ink = COLOURS[line.number % len(COLOURS)]
            dash = DASHES[line.number // len(COLOURS) % len(DASHES)]
            if line.filled:
                axes.fill_between(line.x, line.y, step="mid", color=ink, alpha=0.2, linewidth=0)
                dash = DASHES[line.number % 2]
                axes.plot(line.x, line.y, dash, color=ink, drawstyle="steps-mid", linewidth=1.5)
            elif line.planned:
                axes.plot(line.x, line.y, "--", color=ink, linewidth=1.5)
            else:
                marker = MARKERS[line.number % len(MARKERS)]
                axes.plot(
                    line.x, line.y, dash, color=ink, marker=marker, markersize=5, clip_on=False
                )
                if line.band:
                    low, high = zip(*line.band, strict=True)
                    axes.fill_between(line.x, low, high, color=ink, alpha=0.15, linewidth=0)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        highest = 1.06 * max(value for line in lines for value in line.y)
        axes.set_ylim(0, max(top, highest) or 1)
        if not any(line.filled for line in lines):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len({value for line in lines for value in line.x}) == 1:
                axes.set_xlim(lines[0].x[0] - 1, lines[0].x[0] + 1)
        axes.grid(axis="y", alpha=0.2)
        if named:
            names = [x if len(x) < 31 else f"…{x[-28:]}" for x in (line.label for line in named)]
            handles = [h for h, line in zip(axes.get_lines(), lines, strict=True) if line.label]
            figure.legend(handles, names, loc="outside lower left", ncols=2, frameon=False)
        figure.savefig(png, dpi=150, facecolor="white")
        text = StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=metadata)
    return _inline(text.getvalue(), png.stem, f"{title}: {described}")


def _inline(svg: str, key: str, described: str) -> Markup:
    """For an HTML page: no names of its own kind, ids that no other plot has."""
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], flags=re.S)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None
    head = f'<svg {size[0]} role="img" aria-label="{escape(described)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{key}-", svg).replace("xlink:href", "href")
    return Markup(svg.replace(INK, "currentColor").strip())


def curves(runs: Sequence[Run], folder: Path) -> list[Markup]:
    """Of what the updates recorded; those that no run knows are left out."""
    drawn = []
    for key, (title, unit, factor, top) in CURVES.items():
        lines, told = list[Line](), list[str]()
        for number, run in enumerate(runs):
            rows = [row for row in run.metrics if row.get(key) is not None]
            if not rows:
                continue
            x, y = [row["update"] for row in rows], [factor * row[key] for row in rows]
            told.append(f"{run.name} {', '.join(f'{value:.3g}' for value in y)}")
            band = [wilson(run.right(row)) for row in rows] if key == "accuracy" else []
            band = [(factor * low, factor * high) for low, high in band]
            alone, memory = len(runs) == 1, key == "peak_memory_gib"
            name = ("measured" if memory else "") if alone else run.name
            lines.append(Line(name, x, y, number, band=band))
            if memory:
                plan = [row["planned_memory_gib"] for row in rows]
                lines.append(Line("planned" if alone else "", x, plan, number, planned=True))
        if lines:
            png = folder / f"{key}.png"
            drawn.append(draw(lines, title, "update", unit, png, "; ".join(told), top))
    return drawn


def density(before: Measures, after: Measures, texts: str, png: Path) -> Markup:
    """Two models' raw logits."""
    width = (EDGES[1] - EDGES[0]).item()
    shares = [measures.histogram / measures.histogram.sum() for measures in (before, after)]
    (seen,) = torch.nonzero(torch.maximum(*shares) > 1e-5, as_tuple=True)
    part = slice(max(0, int(seen[0]) - 1), int(seen[-1]) + 2)
    x = (EDGES[:-1] + width / 2)[part].tolist()
    lines = [
        Line(name, x, (share[part] / width).tolist(), number, filled=True)
        for number, (name, share) in enumerate(zip(("base", "trained"), shares, strict=True))
    ]
    told = f"mean {before.mean:.3g} and {after.mean:.3g}, "
    told += f"skewness {before.skewness:.3g} and {after.skewness:.3g}"
    return draw(lines, f"Raw logits, {texts}", "logit, temperature 1", "density", png, told)
