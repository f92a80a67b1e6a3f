"""Sweeps of the Triton kernels' settings and of chunk_bytes on this device; the best to commit."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks import inputs
from benchmarks.measure import clear_gradients, in_turns, peak_bytes, timed_ms
from benchmarks.providers import TOLERANCE, HeadProblem, Loss, ours_loss, products
from benchmarks.store import device_name
from em_kernels import fused_token_stats
from em_kernels.kernels import RowTerms, gradient_buffer, portable, row_stride
from em_kernels.kernels.configs import DEFAULT, TUNED, RowConfig, config_for
from em_kernels.reference import RowTransform, TokenStats

GRID = {  # values to try of the fields in em_kernels/kernels/configs.py
    "statistics_warps": (1, 2, 4, 8),
    "THREAD_V": (8, 16, 32),
    "gradient_warps": (2, 4, 8),
    "BLOCK_N": (1, 2, 4),
    "BLOCK_V": (512, 1024, 2048, 4096),
    "warps_per_sm": (16, 32, 64),
}
FIELDS = {  # fields that each kernel's launch depends on
    "statistics": ("statistics_warps", "THREAD_V", "warps_per_sm"),
    "gradient": ("gradient_warps", "BLOCK_N", "BLOCK_V"),
    "mass": ("THREAD_V", "warps_per_sm"),
}
PATHS = {"exact": ("statistics", "gradient"), "sparse": ("statistics", "mass")}
# Logits per thread of the gradient kernel: fewer make loads too short, more spill registers.
THREAD_LOGITS = range(4, 33)
BYTES = {"statistics": 4, "gradient": 6, "mass": 4}  # per logit: fp32 read, bf16 written
ROUNDS = 5  # of the present settings and the best, in turns
GAIN = 0.02  # A smaller gain is noise.


class HeadSizes(NamedTuple):
    """N, D and V."""

    tokens: int
    hidden_size: int
    vocab_size: int


class Sizes(NamedTuple):
    """Sizes to measure at, on a GPU or in a dry run."""

    device: str
    head: HeadSizes
    rows: int  # in a chunk of logits
    gathered: int  # rows of dy multiplied at once
    checked: tuple[int, int]  # rows and columns for comparing a setting with plain torch
    square: int  # side of the square GEMM, the ceiling
    copied: int  # bytes of the copy
    chunks: tuple[int, ...]  # values of chunk_bytes to try
    grid: dict[str, tuple[int, ...]] = GRID


CHUNKS = tuple(2**n for n in range(26, 32))
GPU = Sizes("cuda", HeadSizes(8192, 4096, 151936), 512, 2048, (37, 5003), 8192, 2**31, CHUNKS)
FEW = {field: values[:2] for field, values in GRID.items()}  # Triton's interpreter is slow.
DRY = Sizes("cpu", HeadSizes(48, 32, 500), 4, 16, (3, 1100), 256, 2**22, (2**14, 2**20), FEW)


class RowProblem(NamedTuple):
    """Inputs of the three row kernels."""

    terms: RowTerms
    out: Tensor  # bf16

    def launch(self, kernels: ModuleType, name: str) -> tuple[Tensor, ...]:
        if name == "statistics":
            y, row = self.terms.y, self.terms.row
            parts = kernels.row_statistics(y, row, with_collision_and_argmax=False)
            stats, m, log_s = kernels.finish_rows(parts, y.shape[1], None)
            return stats.entropy, m, log_s
        if name == "gradient":
            kernels.row_gradient(*self.terms, self.out)
            return (self.out,)
        return kernels.column_mass(*self.terms)


def row_problem(rows: int, columns: int, device: str) -> RowProblem:
    """Make a chunk of an entropy loss, laid out as in chunked.py."""
    stride = row_stride(columns, torch.device(device))
    y = torch.empty(rows, stride, device=device)[:, :columns].normal_(std=4)
    row = RowTransform(None, torch.full((rows,), 2.0, device=device))
    finished = portable.finish_rows(portable.row_statistics(y, row), columns, None)
    one = torch.full((rows,), 1 / rows, device=device)
    upstream = TokenStats(entropy=one, mean_logit=one)  # Without mean_logit rows of dy sum to 0.
    terms = RowTerms(y, row, portable.gradient_factors(finished, upstream, columns))
    return RowProblem(terms, gradient_buffer(y, torch.bfloat16) if y.is_cuda else y.bfloat16())


def median_ms(device: str, run: Callable[[], object]) -> float:
    """Time a call in ms; on a GPU the median, launches included, with a cold L2 cache."""
    if device == "cuda":
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")
    run()
    return timed_ms(device, run)


@contextmanager
def settings(capability: tuple[int, int], config: RowConfig) -> Iterator[None]:
    """Launch the kernels with these settings in the body of a with statement."""
    before = TUNED.get(capability)
    TUNED[capability] = config
    try:
        yield
    finally:
        del TUNED[capability]
        if before is not None:
            TUNED[capability] = before


def candidates(name: str, grid: dict[str, tuple[int, ...]]) -> Iterator[RowConfig]:
    """Yield the settings to try for a kernel; fields it does not use keep their defaults."""
    for values in product(*(grid[field] for field in FIELDS[name])):
        config = DEFAULT._replace(**dict(zip(FIELDS[name], values, strict=True)))
        logits = config.BLOCK_N * config.BLOCK_V // (32 * config.gradient_warps)
        if name != "gradient" or logits in THREAD_LOGITS:
            yield config


def key_of(name: str, config: RowConfig) -> str:
    return " ".join(str(getattr(config, field)) for field in FIELDS[name])


def sweep_rows(kernels: ModuleType, sizes: Sizes) -> dict:
    """Time every setting, then the best and the present ones in turns; return all of it."""
    rows, columns, device = sizes.rows, sizes.head.vocab_size, sizes.device
    timed = row_problem(rows, columns, device)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    times, wrong = time_each(kernels, sizes, timed, capability)

    def total(config: RowConfig) -> float:
        return path_ms({n: times[n].get(key_of(n, config), torch.inf) for n in FIELDS})

    best = min(map(RowConfig._make, product(*sizes.grid.values())), key=total)
    if total(best) == torch.inf:
        raise RuntimeError(f"no setting is right: {'; '.join(wrong)}")
    compared = {"now": config_for(capability), "best": best}
    rounds: dict[str, list] = {kind: [] for kind in compared}
    for _, (kind, config) in product(range(ROUNDS), compared.items()):
        with settings(capability, config):
            runs = {name: partial(timed.launch, kernels, name) for name in FIELDS}
            rounds[kind].append({name: median_ms(device, runs[name]) for name in FIELDS})
    ms = {
        kind: {name: round(statistics.median(r[name] for r in of), 4) for name in FIELDS}
        for kind, of in rounds.items()
    }
    spent = {kind: [path_ms(r) for r in of] for kind, of in rounds.items()}
    gain = 1 - statistics.median(spent["best"]) / statistics.median(spent["now"])
    is_better = gain > GAIN and max(spent["best"]) < min(spent["now"])
    y = timed.terms.y
    copy_ms = median_ms(device, lambda: torch.empty_like(y).copy_(y))
    over_copy = {  # times over that of a copy of as many bytes
        kind: {name: round(t / copy_ms * 8 / BYTES[name], 3) for name, t in of.items()}
        for kind, of in ms.items()
    }
    return {
        "failed": sum("off by" in why for why in wrong),
        "rows": rows,
        "columns": columns,
        "capability": list(capability),
        "copy_ms": round(copy_ms, 4),
        "ms": ms,
        "over_copy": over_copy,
        "gain": round(gain, 4),
        "settings": {kind: config._asdict() for kind, config in compared.items()},
        "winner": "best" if is_better else "now",
        "fields": FIELDS,
        "times_ms": times,
        "wrong": wrong,
    }


def path_ms(ms: dict[str, float]) -> float:
    """Sum the times of the exact and the sparse way through a chunk."""
    return sum(ms[name] for path in PATHS.values() for name in path)


def time_each(
    kernels: ModuleType, sizes: Sizes, timed: RowProblem, capability: tuple[int, int]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return times by kernel and setting, and the settings that are wrong or do not fit."""
    checked = row_problem(*sizes.checked, sizes.device)
    times: dict[str, dict[str, float]] = {name: {} for name in FIELDS}
    wrong: list[str] = []
    for name in FIELDS:
        expected = [x.clone() for x in checked.launch(portable, name)]
        for config in candidates(name, sizes.grid):
            key = key_of(name, config)
            with settings(capability, config):
                try:
                    why = difference(checked.launch(kernels, name), expected)
                    if why is None:
                        run = partial(timed.launch, kernels, name)
                        times[name][key] = round(median_ms(sizes.device, run), 4)
                except triton.runtime.errors.OutOfResources as error:
                    why = str(error)
            if why:
                wrong.append(f"{name} {key}: {why}")
                print(f"  {wrong[-1]}", flush=True)
        fastest = min(times[name], key=times[name].__getitem__, default="none")
        print(f"  {name}: {fastest} ({', '.join(FIELDS[name])})", flush=True)
    return times, wrong


def difference(found: tuple[Tensor, ...], expected: list[Tensor]) -> str | None:
    """Return how far results are off; None if by no more than rounding, the gradient's to bf16."""
    for mine, true in zip(found, expected, strict=True):
        allowed = 2**-7 if mine.dtype == torch.bfloat16 else 1e-4
        off = (mine.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30)
        if not off <= allowed:
            return f"off by {off:.1e}"
    return None


def table_row(found: dict, device: str) -> str:
    """Return a row for TUNED in em_kernels/kernels/configs.py, with a comment on its origin."""
    over, settings = (found[key][found["winner"]] for key in ("over_copy", "settings"))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in over.items())
    values = ", ".join(f"{name}={value}" for name, value in settings.items())
    return (
        f"# {device_name(device)}, {versions}, {time.strftime('%Y-%m-%d')}; over a copy: {told}\n"
        f"{tuple(found['capability'])}: RowConfig({values}),"
    )


def statistics_loss(chunk: int | None) -> Loss:
    """Make a loss of fused_token_stats, whose backward recomputes the logits slab by slab."""

    def loss(problem: HeadProblem) -> Tensor:
        given = (problem.hidden, problem.weight, problem.targets)
        stats = fused_token_stats(*given, temperature=problem.temperature, chunk_bytes=chunk)
        return (stats.entropy + stats.logprob).mean()

    return loss


WAYS = {
    "exact": lambda chunk: ours_loss(0.0, chunk),
    "sparse": lambda chunk: ours_loss(TOLERANCE, chunk),
    "statistics": statistics_loss,
}


def head_problem(sizes: Sizes) -> HeadProblem:
    given = inputs.lm_like(*sizes.head, torch.bfloat16, sizes.device)
    leaves = (given.hidden.requires_grad_(), given.weight.requires_grad_())
    return HeadProblem(*leaves, given.targets, 0.5, None)


def step(problem: HeadProblem, loss: Loss) -> Callable[[], None]:
    """Return a function that runs one training step."""

    def run() -> None:
        clear_gradients(problem)
        loss(problem).backward()

    return run


def sweep_chunks(sizes: Sizes) -> dict[str, dict]:
    """Measure time over the floor and peak memory of each way, by chunk_bytes."""
    problem, found = head_problem(sizes), {way: {} for way in WAYS}
    for way, chunk in product(WAYS, sizes.chunks):
        run = step(problem, WAYS[way](chunk))
        run()
        clear_gradients(problem)
        peak = peak_bytes(sizes.device, run)
        row = {} if peak is None else {"peak_mib": round(peak / 2**20)}
        row |= in_turns(sizes.device, run, lambda: products(problem, 3))
        name = f"{chunk / 2**20:g} MiB"
        print(f"  {way}, chunks of {name}: {row['ratio']:.3f} of the floor", flush=True)
        found[way][name] = row
    return found


def best_chunks(found: dict[str, dict]) -> dict[str, str]:
    """Return each way's smallest chunk that is as fast as its fastest, but for noise."""
    best = {}
    for way, rows in found.items():
        limit = (1 + GAIN) * min(row["ratio"] for row in rows.values())
        best[way] = next(name for name, row in rows.items() if row["ratio"] <= limit)
    return best
