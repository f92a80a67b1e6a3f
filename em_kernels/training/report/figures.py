"""Plots of a report: each as a PNG, and as an SVG that takes font and text colour from the page."""

import re
import warnings
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.statistics import wilson
from ..run_folder import STEP
from .logit_shift import BINS, HIGH, LOW, Measures

INK = "#1f2324"  # for a PNG, which is on white; in an SVG currentColor takes its place
# Distinct for the colour-blind too; each has a contrast of 3 : 1 on white and on the dark page.
COLOURS = ("#2f81f7", "#c95f00", "#1a9173", "#a35bd6", "#d1437a", "#867a19")
DASHES, MARKERS = ("-", "--", "-.", ":"), "osD^vP"
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: small, and in the page's font
    "svg.hashsalt": "em_kernels",  # the same run gives the same file
    "text.parse_math": False,  # a run may be called $x$
    "figure.constrained_layout.use": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.2,
    "lines.markersize": 5,
    "legend.frameon": False,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(INKED, INK),
}
CURVES = {  # by key of metrics.jsonl: title, unit, factor, least upper end of the axis
    "entropy": ("Entropy", "nats per token", 1, 0),
    "divergence": ("KL from the base model", "nats per token", 1, 0),
    "accuracy": ("Accuracy on the training prompt", "% of completions", 100, 100),
    "mean_length": ("Mean length", "tokens per completion", 1, 0),
    "ended": ("Ended before max_new_tokens", "% of completions", 100, 100),
    "repetition": ("Repetition", "% of 4-grams seen before", 100, 5),
    "grad_norm": ("Gradient norm before clipping", "L2 norm", 1, 0),
    "active_share": ("Entries in the head's backward", "% of the vocabulary", 100, 0),
    "dropped_share": ("Head gradient left out", "% of the L1 mass", 100, 0),
    "peak_memory_gib": ("Peak memory; dashed: planned", "GiB", 1, 0),
}


def plot(axes: Axes, described: str, png: Path) -> Markup:
    """Write the PNG; return the SVG for an HTML page, `described` in words for screen readers."""
    figure, (_, labels) = axes.get_figure(), axes.get_legend_handles_labels()
    assert isinstance(figure, Figure)
    figure.set_size_inches(4.6, 3 + 0.1 * len(labels))
    if labels:
        figure.legend(loc="outside lower left", ncols=2)
    text = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a run's name, in a PNG
        figure.savefig(png, dpi=150, facecolor="white")
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=metadata)
    svg = text.getvalue()
    (size,) = re.findall(r'viewBox="[^"]*"', svg)[:1]
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</defs>", "", svg[svg.index("<svg") :], flags=re.S)
    label = escape(f"{axes.get_title(loc='left')}: {described}")
    svg = f'<svg {size} role="img" aria-label="{label}">{svg[svg.index(">") + 1 :]}'
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{png.stem}-", svg).replace("xlink:href", "href")
    return Markup(svg.replace(INK, "currentColor").strip())


@matplotlib.rc_context(STYLE)
def curves(
    names: Sequence[str], metrics: Sequence[list[dict[str, Any]]], folder: Path
) -> list[Markup]:
    """Plot each metric over the updates, a curve per run; skip metrics that no run has."""
    drawn = []
    for key, (title, unit, factor, least) in CURVES.items():
        axes, told = Figure().add_subplot(title=title, xlabel="update", ylabel=unit), list[str]()
        for number, (name, rows) in enumerate(zip(names, metrics, strict=True)):
            if not (rows := [row for row in rows if row.get(key) is not None]):
                continue
            x, y = [row["update"] for row in rows], [factor * row[key] for row in rows]
            told.append(f"{name} {', '.join(f'{value:.3g}' for value in y)}")
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            label = (name if len(name) < 31 else f"…{name[-28:]}") if len(names) > 1 else ""
            axes.plot(x, y, dash, color=colour, marker=marker, label=label, clip_on=False)
            if key == "accuracy":
                low, high = factor * np.transpose([wilson(row["right"]) for row in rows])
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            if key == "peak_memory_gib":
                axes.plot(x, [row["planned_memory_gib"] for row in rows], "--", color=colour)
        if told:
            axes.set_ylim(0, max(least, 1.06 * axes.dataLim.y1) or 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            drawn.append(plot(axes, "; ".join(told), folder / f"{key}.png"))
    return drawn


@matplotlib.rc_context(STYLE)
def suite_curves(name: str, suite: dict[str, Any], png: Path) -> Markup:
    """Plot the accuracy on each set of a suite over the checkpoints; update 0 is the base."""
    axes = Figure().add_subplot(
        title=f"Accuracy on {suite['suite']}", xlabel="update", ylabel="% of problems"
    )
    models, told = suite["models"], list[str]()
    x = [int(label.removeprefix(STEP)) if label.startswith(STEP) else 0 for label in models]
    for number, each in enumerate(next(iter(models.values()))):
        y = [100 * scores[each]["accuracy"] for scores in models.values()]
        low, high = 100 * np.transpose([scores[each]["interval"] for scores in models.values()])
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=marker, label=each, clip_on=False)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        told.append(f"{each} {', '.join(f'{value:.3g}' for value in y)}")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return plot(axes, f"{name}: {'; '.join(told)}", png)


@matplotlib.rc_context(STYLE)
def density(before: Measures, after: Measures, texts: str, png: Path) -> Markup:
    """Plot the densities of the base and the trained model's raw logits."""
    shares = torch.stack([m.histogram / m.histogram.sum() for m in (before, after)])
    seen = (shares.amax(0) > 1e-5).nonzero()
    part = slice(max(0, int(seen[0]) - 1), int(seen[-1]) + 2)
    width = (HIGH - LOW) / BINS
    x = LOW + width * (torch.arange(BINS)[part] + 0.5)
    title = f"Raw logits, {texts}"
    axes = Figure().add_subplot(title=title, xlabel="logit, temperature 1", ylabel="density")
    names = ("base", "trained")
    for name, share, colour, dash in zip(names, shares, COLOURS, DASHES, strict=False):
        y = share[part] / width
        axes.fill_between(x, y, step="mid", color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, y, dash, color=colour, drawstyle="steps-mid", label=name)
    axes.set_ylim(0)
    told = f"mean {before.mean:.3g} and {after.mean:.3g}, "
    told += f"skewness {before.skewness:.3g} and {after.skewness:.3g}"
    return plot(axes, told, png)
