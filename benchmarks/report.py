"""The tables and plots of README and docs, from the files in results/ alone."""

import json
import re
from pathlib import Path

from benchmarks import evidence, inputs, store, tables
from benchmarks.providers import PROVIDERS

FEATURED = {  # shape and input of the problems that are shown, and measured by default
    "cpu": (("qwen2.5-1.5b", "lm-0.5"), ("smollm2-135m", "real-0.5")),
    "cuda": (("qwen3-8b", "lm-0.5"), ("llama3-8b", "lm-0.5"), ("gemma2-2b", "lm-0.5")),
}
SECTIONS = ("training", "distillation", "proof", "parts")  # of a device's results, beside "cases"
TITLES = {"lm": "LM-like input", "real": "real states", "uniform": "near-uniform input"}
TITLES |= {kind: "own states" for kind in inputs.REAL if kind != "real"}
README_PROVIDERS = ("ours", "ours-sparse", "floor", "compile", "official-eager")
README = Path(__file__).parents[1] / "README.md"
PAGE = README.parent / "docs" / "benchmarks.md"
EVIDENCE = README.parent / "docs" / "evidence.md"
STUDIES = store.RESULTS / "studies"
BEGIN, END = "<!-- python -m benchmarks --report: begin -->", "<!-- end -->"
# By theme: colour of text, colour of other libraries' marks.
THEMES = {"light": ("#1f2328", "#8c959f"), "dark": ("#e6edf3", "#7d8590")}
OUR_COLOURS = ("#2f81f7", "#db6d28", "#8957e5")  # readable on white and on black
LINES = {  # of the memory plot: colour (None: that of other libraries) and dash, by provider
    "ours": (OUR_COLOURS[0], "-"),
    "ours-sparse": (OUR_COLOURS[2], "--"),  # dashed and after ours, as it may lie on it
    "ours-64mib": (OUR_COLOURS[1], "-"),
    "trl": (None, "--"),
    "stable-eager": (None, ":"),
}


def featured(cases: dict[str, dict]) -> list[list[dict]]:
    """Return the cases of each featured problem, or of the first one if none is featured.

    The fastest comes first, those without a time last.
    """
    plain = [
        row
        for row in cases.values()
        if row["shape"] != "scaling" and (row["dtype"], row["task"]) == ("bfloat16", "loss")
    ]
    measured = {(row["shape"], row["input"]): None for row in plain}
    wanted = FEATURED[plain[0]["device"]] if plain else ()
    shown = [pair for pair in wanted if pair in measured] or list(measured)[:1]
    found = []
    for pair in shown:
        rows = [row for row in plain if (row["shape"], row["input"]) == pair]
        most = max(row["tokens"] for row in rows)
        rows = [row for row in rows if row["tokens"] == most]
        found.append(sorted(rows, key=tables.rank))
    return found


def heading(row: dict) -> str:
    kind, tau = row["input"].rsplit("-", 1)
    sizes = f"N={row['tokens']}, D={row['hidden_size']}, V={row['vocab_size']}"
    return f"{row['shape']} ({sizes}), {row['dtype']}, {TITLES[kind]} at temperature {tau}"


def name_of(row: dict) -> str:
    """Return the provider's title, and what it computes if that is not the entropy."""
    provider = PROVIDERS[row["provider"]]
    name = f"**{provider.title}**" if row["provider"].startswith("ours") else provider.title
    return name if provider.quantity == "entropy" else f"{name} ({provider.quantity})"


def table(rows: list[dict]) -> list[str]:
    fresh = tables.has_fresh(rows)
    lines = [
        f"{heading(rows[0])}: loss with all gradients",
        "",
        *tables.head_lines([""], fresh, ["peak memory", "beyond gradients"]),
    ]
    unable: dict[str, list[str]] = {}
    for row in rows:
        if "skipped" in row:
            unable.setdefault(row["skipped"], []).append(PROVIDERS[row["provider"]].title)
            continue
        name = name_of(row)
        if "wrong" in row:
            empty = " |" * (5 if fresh else 4)
            lines.append(f"| {name} | wrong |{empty} **{100 * tables.worst_error(row):.2g} %** |")
            continue
        lines.append(
            f"| {name} | {tables.cells(row, fresh, ('peak_mib', 'beyond_gradients_mib'))} |"
        )
    lines.append("")
    for why, names in unable.items():
        lines.append(f"Not here: {', '.join(names)}: {why}.")
    return lines


def others(content: dict) -> list[str]:
    """Tabulate what was measured beside the featured problems: other tasks, inputs and losses."""
    cases = content.get("cases", {})
    shown = [row for group in featured(cases) for row in group] + of_real_models(cases)
    rows = [row for row in cases.values() if row not in shown]
    rows = [row for row in rows if row["shape"] != "scaling" and "ratio" in row]
    if not rows:
        return []
    fresh = tables.has_fresh(rows)
    lines = [
        "Each over the products that its own task needs.",
        "",
        *tables.head_lines(["problem", "task", ""], fresh, ["beyond gradients"]),
    ]
    for row in rows:
        kind, tau = row["input"].rsplit("-", 1)
        lines.append(
            f"| {row['shape']}, {TITLES[kind]}, {tau} | {row['task']} | {name_of(row)} "
            f"| {tables.cells(row, fresh, ('beyond_gradients_mib',))} |"
        )
    return lines


def of_real_models(cases: dict[str, dict]) -> list[dict]:
    """Return the cases on own states of models whose vocabulary has 152 thousand entries."""
    kinds = {kind for kind in inputs.REAL if kind != "real"}
    return [row for row in cases.values() if row["input"].rsplit("-", 1)[0] in kinds]


def by_size(content: dict) -> list[str]:
    """Tabulate peak memory by tokens and vocabulary: the numbers of the memory plot."""
    rows = scaling(content)
    names = [name for name in LINES if any(row["provider"] == name for row in rows)]
    found = {(row["tokens"], row["vocab_size"], row["provider"]): row for row in rows}
    lines = [
        f"Peak MiB beyond the gradients, D={rows[0]['hidden_size']}, {rows[0]['dtype']}",
        "",
        f"| tokens | vocabulary | {' | '.join(PROVIDERS[name].title for name in names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for tokens, vocab in sorted({key[:2] for key in found}, key=lambda pair: pair[::-1]):
        cells = (found.get((tokens, vocab, name)) for name in names)
        sizes = ("" if row is None else f"{row['beyond_gradients_mib']:.0f}" for row in cells)
        lines.append(f"| {tokens} | {vocab} | {' | '.join(sizes)} |")
    return lines


def shown(content: dict) -> list[dict]:
    """Return the rows whose dates and versions stand above the tables."""
    groups = featured(content.get("cases", {}))
    groups += [list(content.get(name, {}).values()) for name in SECTIONS]
    rows = [row for group in groups for row in group if "skipped" not in row]
    return rows or [row for group in groups for row in group]


def date_of(content: dict) -> str:
    return max(row["date"] for row in shown(content))


def about(content: dict) -> str:
    """Name the device, the date and the versions of what is shown."""
    rows = shown(content)
    versions = {name: v for row in rows for name, v in row.get("versions", {}).items()}
    known = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    return f"On {content['device']}, {date_of(content)}; {known}."


def measured(paths: list[Path]) -> list[tuple[Path, dict]]:
    """Load the files that have something to show."""
    loaded = [(path, store.load(path)) for path in paths]
    return [(p, c) for p, c in loaded if featured(c.get("cases", {})) or any(map(c.get, SECTIONS))]


def block(paths: list[Path]) -> str:
    """Return the README's generated text: five rows of the first featured problem, a plot, and a
    divergence.

    Of several CPUs, or GPUs, the one that was measured last.
    """
    lines: list[str] = []
    latest: dict[str, tuple[Path, dict]] = {}
    for path, content in sorted(measured(paths), key=lambda found: date_of(found[1])):
        if groups := featured(content.get("cases", {})):
            latest[groups[0][0]["device"]] = path, content
    for path, content in latest.values():
        groups = featured(content["cases"])
        rows = [row for row in groups[0] if row["provider"] in README_PROVIDERS]
        light, dark = (f"benchmarks/results/{path.stem}-time-{t}.svg" for t in THEMES)
        lines += [
            about(content),
            "",
            *table(rows),
            "<picture>",
            f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">',
            f'<img alt="time over the floor" src="{light}">',
            "</picture>",
            "",
        ]
        if divergences := of_largest_vocabulary(content.get("distillation", {}), "jsd"):
            lines += [*tables.of_distillation(divergences), ""]
    return "\n".join(lines).rstrip()


def of_largest_vocabulary(rows: dict[str, dict], task: str) -> dict[str, dict]:
    """Return the cases of a distillation loss on the largest heads that were measured."""
    found = {name: row for name, row in rows.items() if row["task"] == task}
    largest = max((row["vocab_size"] for row in found.values()), default=0)
    return {name: row for name, row in found.items() if row["vocab_size"] == largest}


def page(paths: list[Path], studies: list[Path], folder: str = "") -> str:
    """Return a page of all results; `folder` leads from the page to the plots."""

    def plot(path: Path, kind: str, alt: str) -> list[str]:
        """Link both themes' plots: GitHub and mkdocs-material show the one for theirs."""
        return [f"![{alt}]({folder}{path.stem}-{kind}-{t}.svg#gh-{t}-mode-only)" for t in THEMES]

    lines: list[str] = []
    for path, content in measured(paths):
        lines += [about(content), ""]
        groups, trained = featured(content.get("cases", {})), content.get("training", {})
        for group in groups:
            lines += [f"### The loss, {group[0]['shape']}", "", *table(group), ""]
        if groups:
            lines += [*plot(path, "time", "time over the floor"), ""]
        if real := [r for r in of_real_models(content.get("cases", {})) if "ratio" in r]:
            lines += ["### On the states of real models", "", *tables.real_models(real), ""]
        if rest := others(content):
            lines += ["### Other tasks and inputs", "", *rest, ""]
        if scaling(content):
            lines += ["### Memory over tokens and vocabulary", "", *by_size(content), ""]
            lines += [*plot(path, "memory", "peak memory over tokens, over vocabulary"), ""]
        if content.get("distillation"):
            lines += ["### Distillation", "", *tables.of_distillation(content["distillation"]), ""]
        if trained:
            lines += ["### A whole update", "", *tables.updates(trained), ""]
        if content.get("ratios"):
            lines += ["### Ratios, limits and goals", "", *tables.ratios(content["ratios"]), ""]
        for title, rows in tables.proof(content):
            lines += [f"### {title}", "", *rows, ""]
    for path in studies:
        told = json.loads(path.read_text())
        lines += [f"### A study: {told['data']}", "", *tables.study(told), ""]
    return "\n".join(lines).rstrip()


def write(path: Path) -> list[Path]:
    """Write the plots beside the results, and the tables; return the files written.

    Tables of the repository's own results go into README and docs, others into a .md beside them.
    """
    if not featured(store.load(path).get("cases", {})):
        raise store.BenchError(f"{path}: holds no case of task loss in bfloat16; run one first")
    written = []
    for theme in THEMES:
        written += plots(path, theme)
    if path.resolve().parent != store.RESULTS:
        beside = path.with_suffix(".md")
        beside.write_text(page([path], []) + "\n")
        return [*written, beside]
    for target, text in generated().items():
        old = target.read_text()
        pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.S)
        if not pattern.search(old):
            raise store.BenchError(f"{target}: has no line {BEGIN}")
        target.write_text(pattern.sub(lambda _, text=text: f"\n{text}\n\n", old))
        written.append(target)
    return written


def generated() -> dict[Path, str]:
    """Return the text between the markers of each page."""
    results, studies = sorted(store.RESULTS.glob("*.json")), sorted(STUDIES.glob("*.json"))
    whole = page(results, studies, "../benchmarks/results/")
    return {README: block(results), PAGE: whole, EVIDENCE: evidence.markdown()}


def scaling(content: dict) -> list[dict]:
    """Return the rows that --scaling measured."""
    rows = content.get("cases", {}).values()
    return [row for row in rows if row["shape"] == "scaling" and "peak_mib" in row]


def plots(path: Path, theme: str) -> list[Path]:
    """Write <results>-time-<theme>.svg and, if there are scaling runs, -memory-<theme>.svg.

    Return the files written.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, _ = THEMES[theme]
    content = store.load(path)
    style = {
        "font.size": 10,
        "svg.fonttype": "none",  # text stays text: small files
        "svg.hashsalt": "em_kernels",  # the same results give the same file
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "savefig.transparent": True,
    }
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    written = []
    with plt.rc_context(style | dict.fromkeys(inked, text)):
        drawn = {"time": time_figure(plt, content, theme)}
        if scaling(content):
            drawn["memory"] = memory_figure(plt, content, theme)
        for kind, figure in drawn.items():
            out = path.with_name(f"{path.stem}-{kind}-{theme}.svg")
            figure.savefig(out, metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            written.append(out)
    return written


def colour(provider: str, theme: str) -> str:
    return OUR_COLOURS[0] if provider.startswith("ours") else THEMES[theme][1]


def time_figure(plt, content: dict, theme: str):
    """Draw bars of time over the floor, one panel per featured problem."""
    groups = [[row for row in g if "ratio" in row] for g in featured(content["cases"])]
    groups = [[row for row in g if row["provider"] != "floor"] for g in groups]
    height = 1.2 + 0.36 * max(map(len, groups))
    figure, panels = plt.subplots(1, len(groups), figsize=(5.4 * len(groups), height))
    for axes, rows in zip([panels] if len(groups) == 1 else panels, groups, strict=True):
        fresh = all("fresh_ratio" in row for row in rows)  # never both kinds in one panel
        prefix = "fresh_" if fresh else ""
        ratios = [row[f"{prefix}ratio"] for row in rows]
        quartiles = [row[f"{prefix}ratio_quartiles"] for row in rows]
        spread = [
            [ratio - low for ratio, (low, _) in zip(ratios, quartiles, strict=True)],
            [high - ratio for ratio, (_, high) in zip(ratios, quartiles, strict=True)],
        ]
        axes.barh(
            [PROVIDERS[row["provider"]].title for row in rows],
            ratios,
            xerr=spread,
            ecolor=THEMES[theme][0],
            color=[colour(row["provider"], theme) for row in rows],
            height=0.66,
        )
        for place, (ratio, (_, high)) in enumerate(zip(ratios, quartiles, strict=True)):
            axes.text(high, place, f"  {ratio:.2f}", va="center")
        axes.axvline(1, color=THEMES[theme][0], linewidth=1, linestyle=":")
        axes.set_xlim(0, 1.15 * max(high for _, high in quartiles))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        where = ", in a fresh process" if fresh else ""
        axes.set_xlabel(f"time over that of the bare matrix products{where}")
        kind, tau = rows[0]["input"].rsplit("-", 1)
        axes.set_title(f"{rows[0]['shape']}, {TITLES[kind]}, temperature {tau}", fontsize=10)
    figure.tight_layout(w_pad=3)
    return figure


def memory_figure(plt, content: dict, theme: str):
    """Draw peak memory beyond the gradients, over tokens and over the vocabulary."""
    rows = scaling(content)
    least_vocab = min(row["vocab_size"] for row in rows)
    tokens = {row["tokens"] for row in rows if row["vocab_size"] > least_vocab}
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    views = (
        (panels[0], "tokens", [row for row in rows if row["vocab_size"] == least_vocab]),
        (panels[1], "vocab_size", [row for row in rows if row["tokens"] in tokens]),
    )
    width = rows[0]["hidden_size"]
    for axes, along, shown in views:
        for provider, (ink, dash) in LINES.items():
            mine = sorted((r for r in shown if r["provider"] == provider), key=lambda r: r[along])
            axes.plot(
                [row[along] for row in mine],
                [max(1, row["beyond_gradients_mib"]) for row in mine],
                dash,
                color=ink or colour(provider, theme),
                marker="o",
                markersize=4,
                label=PROVIDERS[provider].title,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted({row[along] for row in shown})
        axes.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_xlabel(f"tokens (D={width}, V={least_vocab})")
    panels[1].set_xlabel(f"vocabulary (D={width}, N={max(tokens, default=0)})")
    panels[0].set_ylabel("peak MiB beyond the gradients")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    return figure
