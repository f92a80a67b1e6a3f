"""README's table and two plots, from results/<device>.json and from nothing else."""

import re
from pathlib import Path

import store
from providers import PROVIDERS

FEATURED = (("qwen2.5-1.5b", "lm-0.5"), ("smollm2-135m", "real-0.5"))  # shape, input
TITLES = {"lm": "LM-like input", "real": "real states", "uniform": "near-uniform input"}
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- em-kernels bench --report: begin -->", "<!-- end -->"
THEMES = {"light": ("#1f2328", "#8c959f"), "dark": ("#e6edf3", "#7d8590")}  # text, others' marks
OURS = ("#2f81f7", "#db6d28", "#8957e5")  # readable on white and on black
LINES = {  # of the memory plot
    "ours": (OURS[0], "-"),
    "ours-sparse": (OURS[2], "--"),  # after ours, which it may lie on
    "ours-64mib": (OURS[1], "-"),
    "trl": (None, "--"),
    "stable-eager": (None, ":"),
}


def worst_error(row: dict) -> float:
    return max(row["error"].values())


def featured(cases: dict[str, dict]) -> list[list[dict]]:
    """The cases of each featured problem, fastest first, those without a time last; of a file
    without any, those of its first problem.
    """
    plain = [
        row
        for row in cases.values()
        if row["shape"] != "scaling" and (row["dtype"], row["task"]) == ("bfloat16", "loss")
    ]
    measured = {(row["shape"], row["input"]): None for row in plain}
    shown = [pair for pair in FEATURED if pair in measured] or list(measured)[:1]
    found = []
    for pair in shown:
        rows = [row for row in plain if (row["shape"], row["input"]) == pair]
        most = max(row["tokens"] for row in rows)
        rows = [row for row in rows if row["tokens"] == most]
        found.append(sorted(rows, key=lambda row: row.get("ratio", float("inf"))))
    return found


def heading(row: dict) -> str:
    kind, tau = row["input"].rsplit("-", 1)
    sizes = f"N={row['tokens']}, D={row['hidden_size']}, V={row['vocab_size']}"
    return f"{row['shape']} ({sizes}), {row['dtype']}, {TITLES[kind]} at temperature {tau}"


def table(rows: list[dict]) -> list[str]:
    lines = [
        f"{heading(rows[0])}: loss with all gradients",
        "",
        "| | time | over the GEMM floor | peak memory | beyond gradients | GEMM work | error |",
        "|---|---|---|---|---|---|---|",
    ]
    unable: dict[str, list[str]] = {}
    for row in rows:
        provider = PROVIDERS[row["provider"]]
        if "skipped" in row:
            unable.setdefault(row["skipped"], []).append(provider.title)
            continue
        name = provider.title
        if row["provider"].startswith("ours"):
            name = f"**{name}**"
        if provider.quantity != "entropy":
            name += f" ({provider.quantity})"
        error = f"{100 * worst_error(row):.2g} %" if "error" in row else ""
        if "wrong" in row:
            lines.append(f"| {name} | wrong | | | | | **{error}** |")
            continue
        low, high = row["ratio_quartiles"]
        peak, beyond = row.get("peak_mib"), row.get("beyond_gradients_mib")
        memory = "| |" if peak is None else f"| {peak:.0f} MiB | {beyond:.0f} MiB |"
        work = "" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}"
        ratio = f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"| {name} | {row['time_ms']:.0f} ms | {ratio} {memory} {work} | {error} |")
    lines.append("")
    for why, names in unable.items():
        lines.append(f"Not here: {', '.join(names)}: {why}.")
    return lines


def training(rows: dict[str, dict]) -> list[str]:
    """Whole updates of One-shot EM, as bench_train.py measured them."""
    first = next(iter(rows.values()))
    model = "SmolLM2-135M-Instruct" if first["model"] == "demo" else first["model"]
    lines = [
        f"A whole update of One-shot EM, {model}, {first['rollouts']} completions of the demo's "
        "prompt, sampled and trained",
        "",
        "| | update | over ours | sampling | training | tokens | peak memory | updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        seconds = [f"{row[key]:.1f} s" for key in ("sampling_s", "training_s")]
        lines.append(
            f"| {row['program']} | {row['total_s']:.1f} s | {row['ratio']:.2f} "
            f"| {' | '.join(seconds)} | {row['tokens']:.0f} | {row['peak_gib']:.2f} GiB "
            f"| {row['updates']} |"
        )
    return lines


def block(paths: list[Path]) -> str:
    """What stands between the README's markers."""
    lines: list[str] = []
    for path in paths:
        content = store.load(path)
        groups, trained = featured(content.get("cases", {})), content.get("training", {})
        if not groups and not trained:
            continue
        rows = [row for group in [*groups, trained.values()] for row in group if "versions" in row]
        versions = {name: v for row in rows for name, v in row["versions"].items()}
        known = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
        lines += [f"On {content['device']}, {max(row['date'] for row in rows)}; {known}.", ""]
        for group in groups:
            lines += [*table(group), ""]
        if trained:
            lines += [*training(trained), ""]
        if not groups:
            continue
        for kind, alt in (("time", "time over the floor"), ("memory", "peak memory over tokens")):
            if kind == "memory" and not scaling(content):
                continue
            light, dark = (f"benchmarks/results/{path.stem}-{kind}-{t}.svg" for t in THEMES)
            lines += [
                "<picture>",
                f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">',
                f'<img alt="{alt}" src="{light}">',
                "</picture>",
                "",
            ]
    return "\n".join(lines).rstrip()


def write(path: Path) -> list[Path]:
    """Plots beside the results, and the tables: in the README where these are the repository's
    results, else in a .md beside them.
    """
    if not featured(store.load(path).get("cases", {})):
        raise store.BenchError(f"{path}: holds no case of task loss in bfloat16; run one first")
    written = []
    for theme in THEMES:
        written += plots(path, theme)
    if path.resolve().parent != store.RESULTS:
        page = path.with_suffix(".md")
        page.write_text(block([path]) + "\n")
        return [*written, page]
    old = README.read_text()
    tables = block(sorted(store.RESULTS.glob("*.json")))
    pattern = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.S)
    if not pattern.search(old):
        raise store.BenchError(f"{README}: has no line {BEGIN}")
    README.write_text(pattern.sub(lambda _: f"\n{tables}\n\n", old))
    return [*written, README]


def scaling(content: dict) -> list[dict]:
    rows = content.get("cases", {}).values()
    return [row for row in rows if row["shape"] == "scaling" and "peak_mib" in row]


def plots(path: Path, theme: str) -> list[Path]:
    """<results>-time-<theme>.svg and, where there are scaling runs, -memory-<theme>.svg."""
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
    return OURS[0] if provider.startswith("ours") else THEMES[theme][1]


def time_figure(plt, content: dict, theme: str):
    """Bars of time over the floor, one panel a featured problem."""
    groups = [[row for row in g if "ratio" in row] for g in featured(content["cases"])]
    groups = [[row for row in g if row["provider"] != "floor"] for g in groups]
    height = 1.2 + 0.36 * max(map(len, groups))
    figure, panels = plt.subplots(1, len(groups), figsize=(5.4 * len(groups), height))
    for axes, rows in zip([panels] if len(groups) == 1 else panels, groups, strict=True):
        ratios = [row["ratio"] for row in rows]
        spread = [
            [row["ratio"] - row["ratio_quartiles"][0] for row in rows],
            [row["ratio_quartiles"][1] - row["ratio"] for row in rows],
        ]
        axes.barh(
            [PROVIDERS[row["provider"]].title for row in rows],
            ratios,
            xerr=spread,
            ecolor=THEMES[theme][0],
            color=[colour(row["provider"], theme) for row in rows],
            height=0.66,
        )
        for place, row in enumerate(rows):
            label = f"  {row['ratio']:.2f}"
            axes.text(row["ratio_quartiles"][1], place, label, va="center")
        axes.axvline(1, color=THEMES[theme][0], linewidth=1, linestyle=":")
        axes.set_xlim(0, 1.15 * max(row["ratio_quartiles"][1] for row in rows))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("time over that of the bare matrix products")
        kind, tau = rows[0]["input"].rsplit("-", 1)
        axes.set_title(f"{rows[0]['shape']}, {TITLES[kind]}, temperature {tau}", fontsize=10)
    figure.tight_layout(w_pad=3)
    return figure


def memory_figure(plt, content: dict, theme: str):
    """Peak memory beyond the gradients over tokens, and over words."""
    rows = scaling(content)
    least_words = min(row["vocab_size"] for row in rows)
    tokens = {row["tokens"] for row in rows if row["vocab_size"] > least_words}
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), sharey=True)
    views = (
        (panels[0], "tokens", [row for row in rows if row["vocab_size"] == least_words]),
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
    panels[0].set_xlabel(f"tokens (D={width}, V={least_words})")
    panels[1].set_xlabel(f"words (D={width}, N={max(tokens, default=0)})")
    panels[0].set_ylabel("peak MiB beyond the gradients")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    return figure
