"""Measure one case in a process of its own, with JSON on stdin and stdout.

`python -m benchmarks.measure truth FILE` writes the fp64 loss, and fp64 gradients of a sample, to
FILE; `python -m benchmarks.measure run FILE` compares a provider with it, and measures its work,
memory and time; `python -m benchmarks.measure fresh FILE` measures its time alone, with nothing set
in the process, and reads no FILE.
"""

import ctypes
import gc
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import em_kernels
from benchmarks import inputs
from benchmarks.providers import PROVIDERS, HeadProblem, Provider, products
from em_kernels import reference
from em_kernels.reference import RowTransform, TokenStats

ROUNDS = 7  # of floor and provider in turns; fewer if they take longer than ROUNDS_SECONDS
ROUNDS_SECONDS = 30.0
SAMPLE = 32  # tokens compared with fp64, and twice as many vocabulary entries
BLOCK = 8192  # vocabulary entries upcast to fp64 at a time
# A sampled gradient whose relative error is larger is wrong. Rounding logits of 20 to bf16 alone
# costs 0.07 (stable eager, LM-like input at 0.5, November 2026); a gradient of zeros has 1.
WRONG = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
GEMM_OPERANDS = {  # op: index of the first of its two matrices among its arguments
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "em_kernels::gemm_bf16": 1,
}
GEMMS = {"loss": 3, "frozen": 2, "stats": 3, "forward": 1}  # matrix products of the floor
TASKS = {
    "loss": "mean loss, gradients of hidden and weight",
    "frozen": "mean loss, gradient of hidden (LoRA)",
    "stats": "entropy and logprob per token, any upstream gradient, both gradients",
    "forward": "mean loss, no gradient",
}


class Case(NamedTuple):
    """A case that one process measures."""

    provider: str
    shape: str
    tokens: int
    hidden_size: int
    vocab_size: int
    softcap: float | None
    dtype: str
    task: str
    input: str  # kind and temperature: lm-0.5, real-0.5, uniform-1
    device: str

    @property
    def problem(self) -> str:
        """The key of its results: all but the provider."""
        head = f"{self.shape} N={self.tokens} D={self.hidden_size} V={self.vocab_size}"
        return f"{head} {self.dtype} {self.task} {self.input}"

    @property
    def unit(self) -> int:
        """FLOPs that GEMM work is counted in: half a product."""
        return self.tokens * self.hidden_size * self.vocab_size

    @property
    def temperature(self) -> float:
        return float(self.input.rsplit("-", 1)[1])


def make_problem(case: Case) -> HeadProblem:
    """Make the inputs of a case, with the gradients that its task needs."""
    dtype, kind = getattr(torch, case.dtype), case.input.rsplit("-", 1)[0]
    sizes = (case.tokens, case.hidden_size, case.vocab_size)
    if kind in inputs.REAL:
        given = inputs.real(kind, case.temperature, case.tokens, dtype, case.device)
    else:
        make = {"lm": inputs.lm_like, "uniform": inputs.uniform}[kind]
        given = make(*sizes, dtype, case.device)
    trained = case.task in ("loss", "stats")
    return HeadProblem(
        given.hidden.requires_grad_(case.task != "forward"),
        given.weight.requires_grad_(trained),
        given.targets,
        case.temperature,
        case.softcap,
    )


def upstream(case: Case, device: str) -> Tensor:
    """Return each token's weight in the loss of task stats, of either sign, as advantages are."""
    return torch.linspace(-1, 1, case.tokens, device=device) / case.tokens


def clear_gradients(problem: HeadProblem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def call(provider: Provider, case: Case, problem: HeadProblem) -> Tensor | None:
    """Run one training step, which replaces the gradients in .grad; return the loss."""
    clear_gradients(problem)
    if provider.loss is None:
        products(problem, GEMMS[case.task])
        return None
    with torch.set_grad_enabled(case.task != "forward"):
        if case.task == "stats":
            entropy, logprob = provider.statistics(problem)
            loss = (upstream(case, case.device) * (entropy + logprob)).sum()
        else:
            loss = provider.loss(problem)
    if case.task != "forward":
        loss.backward()
    return loss.detach()


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits (rows, V) in fp64, upcasting the weight in blocks."""
    return torch.cat([hidden @ block.double().t() for block in weight.split(BLOCK)], dim=1)


@torch.no_grad()
def truth(case: Case, problem: HeadProblem) -> dict[str, dict]:
    """Return, by quantity, the loss and gradients of sampled tokens and entries, all in fp64."""
    n, v, device = case.tokens, case.vocab_size, case.device
    tokens = torch.linspace(0, n - 1, min(SAMPLE, n), device=device).long().unique()
    entries = torch.linspace(0, v - 1, min(SAMPLE, v), device=device).long()
    entries = torch.cat([entries, problem.targets[tokens]]).unique()
    ones = torch.ones(n, dtype=torch.float64, device=device)
    given = {
        "entropy": TokenStats(entropy=ones / n),
        "cross-entropy": TokenStats(logprob=-ones / n),
    }
    if case.task == "stats":
        u = upstream(case, device).double()
        given = {"entropy": TokenStats(entropy=u, logprob=u)}
    found = {name: {"loss": 0.0, "scale": 0.0, "hidden": [], "weight": 0.0} for name in given}
    for index in torch.arange(n, device=device).split(max(1, 2**27 // (8 * v))):
        hidden, targets = problem.hidden[index].double(), problem.targets[index]
        y = wide_logits(hidden, problem.weight)
        row = RowTransform(None, ones[index] / case.temperature, 1.0, case.softcap, targets)
        parts = reference.row_parts(reference.transform(y, row), targets)
        stats = reference.statistics(parts, v, targets)
        m, log_s = parts.m, parts.s1.log1p()
        at = torch.where(entries == targets[:, None], torch.arange(len(entries), device=device), -1)
        chosen = torch.isin(index, tokens)
        for name, weights in given.items():
            upstreams = TokenStats(*(None if g is None else g[index] for g in weights))
            factors = reference.coefficients(stats, upstreams, v)
            sums = found[name]
            terms = [g * s for g, s in zip(upstreams, stats, strict=True) if g is not None]
            sums["loss"] += sum(term.sum().item() for term in terms)
            sums["scale"] += sum(term.abs().sum().item() for term in terms)
            columns = row._replace(targets=at.amax(1))
            dy = reference.row_gradient(y[:, entries], columns, m, log_s, factors)
            sums["weight"] += dy.t() @ hidden
            if not chosen.any():
                continue
            sampled = row._replace(
                inv_temperature=row.inv_temperature[chosen], targets=targets[chosen]
            )
            factors = type(factors)(*(f[chosen] for f in factors))
            dy = reference.row_gradient(y[chosen], sampled, m[chosen], log_s[chosen], factors)
            blocks = zip(dy.split(BLOCK, dim=1), problem.weight.split(BLOCK), strict=True)
            sums["hidden"].append(sum(part @ block.double() for part, block in blocks))
    return {
        name: {
            "loss": sums["loss"],
            "scale": sums["scale"],  # sum of the loss's absolute terms, as these may cancel
            "hidden": torch.cat(sums["hidden"]).cpu(),
            "weight": sums["weight"].cpu(),
            "tokens": tokens.cpu(),
            "entries": entries.cpu(),
        }
        for name, sums in found.items()
    }


def errors(true: dict, loss: Tensor, problem: HeadProblem) -> dict[str, float]:
    """Return the relative errors of the loss and of the sampled gradients."""
    found = {"loss": abs(loss.item() - true["loss"]) / true["scale"]}
    for name, index in (("hidden", "tokens"), ("weight", "entries")):
        leaf = getattr(problem, name)
        if leaf.requires_grad:
            mine = leaf.grad[true[index].to(leaf.device)].double().cpu()
            found[name] = ((mine - true[name]).norm() / true[name].norm()).item()
    return found


def gemm_flops(run: Callable[[], object]) -> float:
    """Count the FLOPs of every matrix product that goes through torch, inside custom ops and
    compiled code too, where FlopCounterMode does not look.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    flops = 0.0
    for event in profiler.events():
        if event.name in GEMM_OPERANDS:
            a, b = event.input_shapes[GEMM_OPERANDS[event.name] :][:2]
            flops += 2 * math.prod(a) * b[-1]
    return flops


def mallopt(option: int, value: int) -> None:
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    if function:  # glibc
        function(option, value)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as a GPU's allocator does.

    Otherwise a virtual machine that takes free pages back can make a large allocation cost as much
    as a GEMM.
    """
    mallopt(-4, 0)  # M_MMAP_MAX: no mmap, whose memory is returned at once
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB$", status, re.M)[1])


def peak_bytes(device: str, run: Callable[[], object]) -> int | None:
    """Return the peak memory of run() above that before it, in bytes; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Reset VmHWM, the peak of resident memory.
    before = _kib("VmRSS")
    run()
    return max(0, _kib("VmHWM") - before) << 10


def timed_ms(device: str, run: Callable[[], object]) -> float:
    """Time one call, in ms."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def spread(values: list[float]) -> tuple[float, list[float]]:
    """Return the median and the quartiles."""
    pair = values * 2 if len(values) == 1 else values  # quantiles needs two
    first, middle, third = statistics.quantiles(pair, n=4)
    return round(middle, 3), [round(first, 3), round(third, 3)]


def in_turns(device: str, run: Callable, floor: Callable) -> dict[str, object]:
    """Time `floor` and `run` in turns, so that load from outside slows both; return medians."""
    times, floors = [], []
    floor()
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    while len(times) < ROUNDS and (not times or time.perf_counter() - start < ROUNDS_SECONDS):
        floors.append(timed_ms(device, floor))
        times.append(timed_ms(device, run))
    gc.enable()
    found: dict[str, object] = {"rounds": len(times)}
    ratios = [a / b for a, b in zip(times, floors, strict=True)]
    for name, values in (("time_ms", times), ("floor_ms", floors), ("ratio", ratios)):
        found[name], found[f"{name}_quartiles"] = spread(values)
    return found


def figures(
    case: Any, provider: Any, problem: Any, run: Callable, floor: Callable, true: dict[str, float]
) -> dict[str, object]:
    """Measure work, error, memory, time; no memory and time if the error is too large.

    `true` is the truth of what the provider computes; `case` has the fields device, provider, dtype
    and unit; `problem`, too, may be another suite's.
    """
    found: dict[str, object] = {"versions": versions(provider)}
    if case.provider in ("compile", "liger"):
        run()  # compiles, so that what follows measures the compiled code alone
    losses: list[Tensor | None] = []
    flops = gemm_flops(lambda: losses.append(run()))
    loss = losses[0]
    found["gemm_units"] = round(flops / case.unit, 3) if provider.counted else None
    if loss is not None:
        found["error"] = errors(true, loss, problem)
        found["error"] = {name: float(f"{x:.3g}") for name, x in found["error"].items()}
        if not max(found["error"].values()) <= WRONG[case.dtype]:  # NaN is wrong too.
            return found | {"wrong": f"error above {WRONG[case.dtype]}"}
        found["loss"] = float(f"{loss.item():.4g}")
    clear_gradients(problem)
    peak = peak_bytes(case.device, run)
    leaves = (problem.hidden, problem.weight)
    gradients = sum(x.nbytes for x in leaves if x.requires_grad)
    if peak is not None:
        found["peak_mib"] = round(peak / 2**20, 1)
        found["beyond_gradients_mib"] = round(max(0, peak - gradients) / 2**20, 1)
    clear_gradients(problem)
    keep_freed_memory()
    return found | in_turns(case.device, run, floor)


def return_freed_memory() -> None:
    """Make malloc return freed blocks to the system, so that peaks are true."""
    mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def measure(case: Case, true: dict[str, dict]) -> dict[str, object]:
    """Measure a case, as figures() does."""
    provider = PROVIDERS[case.provider]
    return_freed_memory()
    problem = make_problem(case)
    run = partial(call, provider, case, problem)
    floor = partial(products, problem, GEMMS[case.task])
    found = figures(case, provider, problem, run, floor, true.get(provider.quantity, {}))
    if case.provider == "ours-sparse" and "wrong" not in found:
        report = em_kernels.gradient_report(provider.loss(problem))
        found["active_share"] = float(f"{report.active_share.item():.3g}")
    return found


def fresh_times(case: Case) -> dict[str, object]:
    """Time a case where nothing is set, as in a user's program.

    On a CPU, freed memory then goes back to the system, and each call pays for its new pages.
    """
    problem = make_problem(case)
    run = partial(call, PROVIDERS[case.provider], case, problem)
    run()  # compiles, and starts threads
    return in_turns(case.device, run, partial(products, problem, GEMMS[case.task]))


def versions(provider: Provider) -> dict[str, str]:
    names = packages_distributions().get(provider.package, [provider.package])
    found = {"em_kernels": em_kernels.__version__, "torch": torch.__version__}
    try:
        return found | {names[0]: version(names[0])}
    except PackageNotFoundError:
        return found


def answer(actions: dict[str, Callable], kind_of_case: type) -> None:
    """Do what the first argument names with the second, a file, and the case that is on stdin.

    Print what was found as one line of JSON.
    """
    kind, path = sys.argv[1:]
    case = kind_of_case(**json.load(sys.stdin))
    try:
        found = actions[kind](case, path)
    except ImportError as error:
        found = {"skipped": f"does not import: {str(error).splitlines()[0]}"}
    except (MemoryError, torch.OutOfMemoryError) as error:
        found = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        found = {"skipped": "out of memory"}
    print("\n" + json.dumps(found or {}))


if __name__ == "__main__":
    answer(
        {
            "truth": lambda case, path: torch.save(truth(case, make_problem(case)), path),
            "run": lambda case, path: measure(case, torch.load(path)),
            "fresh": lambda case, _: fresh_times(case),
        },
        Case,
    )
