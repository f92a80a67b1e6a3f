"""Markdown: cells of a measured case; tables of all that is measured beside the losses."""

from collections.abc import Iterator

from benchmarks.distillation import PROVIDERS, TASKS

TEST_TITLES = {
    "rows": "Triton rows and sparse gradient",
    "functions": "public functions, hard inputs",
    "trainer": "optimizer, trainer",
    "ranks": "several processes",
}
SIZES = ("shape", "tokens", "hidden_size", "ref_hidden_size", "vocab_size", "dtype")
KERNELS = 8  # kernels shown per step, those that take most


def worst_error(row: dict) -> float:
    return max(row["error"].values())


def rank(row: dict) -> float:
    """Return the ratio, of a fresh process where there is one; infinity for a row without."""
    return row.get("fresh_ratio", row.get("ratio", float("inf")))


def fresh_cell(row: dict) -> str:
    """Return time and ratio in a fresh process; empty if not measured."""
    if "fresh_ratio" not in row:
        return ""
    low, high = row["fresh_ratio_quartiles"]
    return f"{row['fresh_time_ms']:.0f} ms, {row['fresh_ratio']:.2f} ({low:.2f}-{high:.2f})"


def cells(row: dict, fresh: bool, memory: tuple[str, ...]) -> str:
    """Return a row's cells: times, memory, work, error; empty if not measured."""
    low, high = row["ratio_quartiles"]
    found = [f"{row['time_ms']:.0f} ms", f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"]
    found += [fresh_cell(row)] if fresh else []
    found += [f"{row[name]:.0f} MiB" if name in row else "" for name in memory]
    found.append("" if row["gemm_units"] is None else f"{row['gemm_units']:.2f}")
    found.append(f"{100 * worst_error(row):.2g} %" if "error" in row else "")
    return " | ".join(found)


def has_fresh(rows: list[dict]) -> bool:
    """Return True if a fresh process was measured too, which it is on a CPU alone."""
    return any("fresh_ratio" in row for row in rows)


def head_lines(first: list[str], fresh: bool, memory: list[str]) -> list[str]:
    """Return the two lines above the rows whose cells() are asked for alike."""
    times = ["time", "over the GEMM floor", *(["in a fresh process"] if fresh else [])]
    heads = [*first, *times, *memory, "GEMM work", "error"]
    return [
        "|" + "".join(f" {head} |" if head else " |" for head in heads),
        "|" + "---|" * len(heads),
    ]


def real_models(rows: list[dict]) -> list[str]:
    """Tabulate, for a model's own states, peakedness and what a tolerance gains and costs."""
    fresh = has_fresh(rows)
    heads = ["model", "T", "N", "entropy", "active", "", "over the GEMM floor"]
    heads += ["in a fresh process"] * fresh + ["beyond gradients", "dhidden", "dweight"]
    lines = [
        "Loss with all gradients. *Active*: the share of vocabulary entries that the tolerance "
        "keeps, on average over chunks. *dhidden*, *dweight*: relative error against fp64.",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        model, tau = row["input"].rsplit("-", 1)
        share = f"{100 * row['active_share']:.2g} %" if "active_share" in row else ""
        low, high = row["ratio_quartiles"]
        found = [model, tau, str(row["tokens"]), f"{row.get('loss', 0):.3f}", share]
        found += [row["provider"], f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"]
        found += [fresh_cell(row)] if fresh else []
        found.append(f"{row['beyond_gradients_mib']:.0f} MiB")
        found += [f"{100 * row['error'][name]:.2g} %" for name in ("hidden", "weight")]
        lines.append(f"| {' | '.join(found)} |")
    return lines


def proof(content: dict) -> Iterator[tuple[str, list[str]]]:
    """Yield the title and the lines of each part that was done."""
    found = {k: row for k, row in content.get("proof", {}).items() if "skipped" not in row}
    if "environment" in found:
        yield "Ceilings", ceilings(found["environment"])
    if any(name in found for name in TEST_TITLES):
        yield "Tests on the device", tests(found)
    if "tune-rows" in found:
        yield "Settings of the row kernels", settings(found["tune-rows"], found.get("counters"))
    if "tune-chunks" in found:
        yield "Chunks", chunks(found["tune-chunks"]["ways"])
    if "profile" in found:
        yield "Where a step's time goes", steps(found["profile"])
    if content.get("parts"):
        yield "Training on 24 GB", training(content["parts"])


def ceilings(row: dict) -> list[str]:
    head = ", ".join(f"{name} {rate:.0f}" for name, rate in row["head_tflops"].items())
    return [
        f"A copy moves {row['copy_gb_per_s']:.0f} GB/s, bytes read and written; a square bf16 "
        f"GEMM runs at {row['square_tflops']:.0f} TFLOP/s. The head's products, of {row['rows']} "
        f"rows of logits and {row['gathered']} of dy, into fp32 unless said, TFLOP/s: {head}."
    ]


def tests(proof: dict[str, dict]) -> list[str]:
    lines = ["| tests, on the device | passed | failed | left out |", "|---|---|---|---|"]
    for name, title in TEST_TITLES.items():
        if row := proof.get(name):
            counted = (row["passed"], row["failed"], row["left_out"])
            lines.append(f"| {title} | {' | '.join(map(str, counted))} |")
    checked = {kind: proof.get(kind, {}).get("summary") for kind in ("memcheck", "racecheck")}
    if told := [f"{kind}: {summary}" for kind, summary in checked.items() if summary]:
        lines += ["", f"compute-sanitizer, {'; '.join(told)}."]
    return lines


def settings(row: dict, counted: dict | None) -> list[str]:
    """Tabulate time over a copy of as many bytes, with the present settings and the best."""
    lines = [
        f"{row['rows']} x {row['columns']} logits; over the time of a copy of as many bytes.",
        "",
        "| kernel | settings then | the best | which |",
        "|---|---|---|---|",
    ]
    for kernel, fields in row["fields"].items():
        over = [f"{row['over_copy'][kind][kernel]:.2f}" for kind in ("now", "best")]
        values = ", ".join(f"{field} {row['settings']['best'][field]}" for field in fields)
        lines.append(f"| {kernel} | {' | '.join(over)} | {values} |")
    if counted and "left_out" not in counted:
        names = list(next(v for v in counted.values() if isinstance(v, dict)))
        lines += ["", f"| Nsight Compute | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        rows = {kernel: of for kernel, of in counted.items() if isinstance(of, dict)}
        lines += [f"| {kernel} | {' | '.join(of.values())} |" for kernel, of in rows.items()]
    return lines


def chunks(ways: dict[str, dict]) -> list[str]:
    lines = ["| | chunk_bytes | over the GEMM floor | peak memory |", "|---|---|---|---|"]
    for way, rows in ways.items():
        for size, row in rows.items():
            low, high = row["ratio_quartiles"]
            peak = f"{row['peak_mib']} MiB" if "peak_mib" in row else ""
            lines.append(f"| {way} | {size} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) | {peak} |")
    return lines


def steps(row: dict) -> list[str]:
    lines = ["| | ms | times | kernel |", "|---|---|---|---|"]
    for way, found in row.items():
        if isinstance(found, dict):
            lines.append(f"| **{way}** | {found['wall_ms']:.2f} | | the whole step |")
            lines += [f"| | {ms:.2f} | {n} | `{name}` |" for name, ms, n in found["top"][:KERNELS]]
    return lines


def training(parts: dict[str, dict]) -> list[str]:
    """Tabulate `make gpu-24gb`."""
    lines = [
        "64 completions of 128 + 512 tokens an update; GiB, measured and planned.",
        "",
        "| | device peak | planned | host peak | planned | sampling | training |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in parts.items():
        if "skipped" in row:
            lines.append(f"| {name} | {row['skipped']} | | | | | |")
            continue
        memory = ("device_peak_gib", "planned_device_gib", "host_peak_gib", "planned_host_gib")
        last = row["updates"][-1]
        seconds = f"{last['sampling_s']:.1f} s | {last['training_s']:.1f} s"
        lines.append(f"| {name} | {' | '.join(f'{row[key]:.1f}' for key in memory)} | {seconds} |")
    return lines


def model_of(row: dict) -> str:
    """Describe the updates that bench_train.py measured."""
    model = "SmolLM2-135M-Instruct" if row["model"] == "demo" else row["model"]
    prompt = "the demo's prompt"
    if row.get("recipe", "demo") != "demo":
        prompt = f"the paper's prompt, of up to {row['new_tokens']} tokens"
    return f"{model}, {row['rollouts']} completions of {prompt}, sampled and trained"


def of_distillation(rows: dict[str, dict]) -> list[str]:
    """Tabulate distillation losses by head and task, the fastest first."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows.values():
        groups.setdefault(tuple(row[name] for name in SIZES), []).append(row)
    lines = []
    for (shape, tokens, width, ref_width, vocab, dtype), found in groups.items():
        fresh = has_fresh(found)
        memory = ("peak_mib", "beyond_gradients_mib")
        lines += [
            f"{shape} (N={tokens}, D={width}, the teacher's {ref_width}, V={vocab}), {dtype}, "
            "LM-like input at temperature 1: loss with all gradients of the student",
            "",
            *head_lines(["", ""], fresh, ["peak memory", "beyond gradients"]),
        ]
        order = list(TASKS)
        for row in sorted(found, key=lambda row: (order.index(row["task"]), rank(row))):
            if "ratio" in row:
                title = PROVIDERS[row["provider"]].title
                name = f"**{title}**" if row["provider"] == "ours" else title
                task = TASKS[row["task"]].title
                lines.append(f"| {task} | {name} | {cells(row, fresh, memory)} |")
        lines.append("")
        missing = {(row["provider"], row["skipped"]): None for row in found if "skipped" in row}
        lines += [f"Not here: {PROVIDERS[n].title}: {why}." for n, why in missing]
        wrong = [row for row in found if "wrong" in row]
        lines += [f"Wrong: {r['provider']}, {r['task']}: {r['wrong']}." for r in wrong]
        lines += [""] if missing or wrong else []
    return lines[:-1]


def updates(rows: dict[str, dict]) -> list[str]:
    """Tabulate whole updates of One-shot EM, as bench_train.py measured them."""
    found: dict[str, list[dict]] = {}
    for row in rows.values():
        found.setdefault(model_of(row), []).append(row)
    return [line for title, group in found.items() for line in [*updates_of(title, group), ""]][:-1]


def updates_of(title: str, rows: list[dict]) -> list[str]:
    """Tabulate updates of one model and recipe."""
    lines = [
        f"A whole update of One-shot EM, {title}",
        "",
        "| | update | over ours | sampling | training | tokens | peak memory | updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = [f"{row[key]:.1f} s" for key in ("sampling_s", "training_s")]
        lines.append(
            f"| {row['program']} | {row['total_s']:.1f} s | {row['ratio']:.2f} "
            f"| {' | '.join(seconds)} | {row['tokens']:.0f} | {row['peak_gib']:.2f} GiB "
            f"| {row['updates']} |"
        )
    return lines


def ratios(rows: dict[str, dict]) -> list[str]:
    """Tabulate `make bench`."""
    lines = [
        f"By `make bench`, {max(row['date'] for row in rows.values())}. A ratio should keep to its "
        "limit, and is worked on until it reaches its goal.",
        "",
        "| | over | ratio | limit | goal | time |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['what']} | {row['over']} | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) "
            f"| {row['must']} | {row['aim']} | {row['time_ms']:.0f} ms |"
        )
    return lines


def study(report: dict) -> list[str]:
    """Tabulate a study, and repeat its conclusions."""
    best, rows = report["best_temperature"], report["rows"]
    lines = [
        f"{report['data']}, {report['model']} model, {report['held_out']} held-out problems, "
        "accuracy in %",
        "",
        f"| | prompts | solved before | greedy | change | sampled | over T = {best:g} |",
        "|---|---|---|---|---|---|---|",
        f"| untrained | | | {100 * report['base_greedy']:.1f} | | "
        f"{100 * report['base_sampled']['1.0']:.1f} | |",
        f"| untrained, more examples | | | {100 * report['more_examples']:.1f} | | | |",
        f"| untrained, examples of the form only | | | {100 * report['form_only']:.1f} | | | |",
    ]
    for row in rows:
        change, over = (
            "{:+.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in row[key]))
            for key in ("change", "over_temperature")
        )
        lines.append(
            f"| {row['arm']}, {row['update']} updates | {row['prompts']} | {row['majority_right']} "
            f"| {100 * row['greedy']:.1f} | {change} | {100 * row['sampled']:.1f} | {over} |"
        )
    return [*lines, "", report["reading"]]
