"""Measure one case in a process of its own, JSON in and out:
`python -m benchmarks.measure truth|run FILE < case.json`.

`truth` writes fp64 losses and gradients of a sample to FILE; `run` compares with it, counts, weighs
and times one provider.
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
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import em_kernels
from benchmarks import inputs
from benchmarks.providers import PROVIDERS, Problem, Provider, products
from em_kernels import reference
from em_kernels.reference import RowTransform, TokenStats

ROUNDS = 7  # of floor and provider in turns; fewer where they take longer than SECONDS
SECONDS = 30.0
SAMPLE = 32  # tokens, and twice so many words, that are compared with fp64
BLOCK = 8192  # words upcast to fp64 at a time
# A gradient of a sample that is off by more, relatively, is wrong. Rounding logits of 20 to bf16
# alone makes 0.07 (stable eager, LM-like input at 0.5, November 2026), a gradient of zeros 1.
WRONG = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
GEMM_OPERANDS = {  # where an op's two matrices stand among its arguments
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "em_kernels::gemm_bf16": 1,
}
GEMMS = {"loss": 3, "frozen": 2, "stats": 3, "forward": 1}
TASKS = {
    "loss": "mean loss, gradients of hidden and weight",
    "frozen": "mean loss, gradient of hidden (LoRA)",
    "stats": "entropy and logprob per token, any upstream, both gradients",
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
    input: str  # lm-0.5: LM-like at temperature 0.5; real-0.5, uniform-1 likewise
    device: str

    @property
    def problem(self) -> str:
        """All but the provider, as results are keyed."""
        head = f"{self.shape} N={self.tokens} D={self.hidden_size} V={self.vocab_size}"
        return f"{head} {self.dtype} {self.task} {self.input}"

    @property
    def temperature(self) -> float:
        return float(self.input.rsplit("-", 1)[1])


def make_problem(case: Case) -> Problem:
    dtype, kind = getattr(torch, case.dtype), case.input.rsplit("-", 1)[0]
    sizes = (case.tokens, case.hidden_size, case.vocab_size)
    if kind == "real":
        given = inputs.real(case.temperature, case.tokens, dtype, case.device)
    else:
        make = {"lm": inputs.lm_like, "uniform": inputs.uniform}[kind]
        given = make(*sizes, dtype, case.device)
    trained = case.task in ("loss", "stats")
    return Problem(
        given.hidden.requires_grad_(case.task != "forward"),
        given.weight.requires_grad_(trained),
        given.targets,
        case.temperature,
        case.softcap,
    )


def upstream(case: Case, device: str) -> Tensor:
    """Upstream weights of the per-token task; signs differ, as advantages do."""
    return torch.linspace(-1, 1, case.tokens, device=device) / case.tokens


def call(provider: Provider, case: Case, problem: Problem) -> Tensor | None:
    """Run one training step; gradients are left in .grad."""
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


def forget(problem: Problem) -> None:
    problem.hidden.grad = problem.weight.grad = None


def wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(rows, V) in fp64, the weight upcast by blocks."""
    return torch.cat([hidden @ block.double().t() for block in weight.split(BLOCK)], dim=1)


@torch.no_grad()
def truth(case: Case, problem: Problem) -> dict[str, dict]:
    """In fp64, by quantity: the loss, and gradients of a sample of tokens and of words."""
    n, v, device = case.tokens, case.vocab_size, case.device
    tokens = torch.linspace(0, n - 1, min(SAMPLE, n), device=device).long().unique()
    words = torch.linspace(0, v - 1, min(SAMPLE, v), device=device).long()
    words = torch.cat([words, problem.targets[tokens]]).unique()
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
        at = torch.where(words == targets[:, None], torch.arange(len(words), device=device), -1)
        chosen = torch.isin(index, tokens)
        for name, weights in given.items():
            mine = TokenStats(*(None if g is None else g[index] for g in weights))
            factors = reference.coefficients(stats, mine, v)
            here = found[name]
            terms = [g * s for g, s in zip(mine, stats, strict=True) if g is not None]
            here["loss"] += sum(term.sum().item() for term in terms)
            here["scale"] += sum(term.abs().sum().item() for term in terms)
            columns = row._replace(targets=at.amax(1))
            dy = reference.row_gradient(y[:, words], columns, m, log_s, factors)
            here["weight"] += dy.t() @ hidden
            if not chosen.any():
                continue
            some = RowTransform(
                None, row.inv_temperature[chosen], 1.0, case.softcap, targets[chosen]
            )
            dy = reference.row_gradient(
                y[chosen],
                some,
                m[chosen],
                log_s[chosen],
                type(factors)(*(f[chosen] for f in factors)),
            )
            blocks = zip(dy.split(BLOCK, dim=1), problem.weight.split(BLOCK), strict=True)
            here["hidden"].append(sum(part @ block.double() for part, block in blocks))
    return {
        name: {
            "loss": here["loss"],
            "scale": here["scale"],  # of the loss's terms, which may cancel
            "hidden": torch.cat(here["hidden"]).cpu(),
            "weight": here["weight"].cpu(),
            "tokens": tokens.cpu(),
            "words": words.cpu(),
        }
        for name, here in found.items()
    }


def errors(true: dict, loss: Tensor, problem: Problem) -> dict[str, float]:
    """Relative to the truth's own size, over the sample."""
    found = {"loss": abs(loss.item() - true["loss"]) / true["scale"]}
    for name, index in (("hidden", "tokens"), ("weight", "words")):
        leaf = getattr(problem, name)
        if leaf.requires_grad:
            mine = leaf.grad[true[index].to(leaf.device)].double().cpu()
            found[name] = ((mine - true[name]).norm() / true[name].norm()).item()
    return found


# Work, memory and time


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


def return_freed_memory() -> None:
    """Blocks of 64 KiB and more are mapped, and so leave the process when freed: peaks are true."""
    mallopt(-3, 2**16)  # M_MMAP_THRESHOLD, which this stops from growing


def keep_freed_memory() -> None:
    """glibc keeps what is freed, as a GPU's allocator does: else a virtual machine that takes
    free pages back makes every large allocation cost as much as a GEMM, now and then.
    """
    mallopt(-4, 0)  # M_MMAP_MAX: nothing from mmap, which goes back at once
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB$", status, re.M)[1])


def peak_bytes(device: str, run: Callable[[], object]) -> int | None:
    """Peak bytes of the device while run() runs, above those before; None if unknown."""
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
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = _kib("VmRSS")
    run()
    return max(0, _kib("VmHWM") - before) << 10


def timed_ms(device: str, run: Callable[[], object]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def spread(values: list[float]) -> tuple[float, list[float]]:
    """Median and quartiles."""
    first, middle, third = statistics.quantiles(values * (1 + (len(values) == 1)), n=4)
    return round(middle, 3), [round(first, 3), round(third, 3)]


def in_turns(device: str, run: Callable, floor: Callable) -> dict[str, object]:
    """Floor and run alternately, so that a neighbour's load meets both alike."""
    times, floors = [], []
    floor()
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    while len(times) < ROUNDS and (not times or time.perf_counter() - start < SECONDS):
        floors.append(timed_ms(device, floor))
        times.append(timed_ms(device, run))
    gc.enable()
    found: dict[str, object] = {"rounds": len(times)}
    ratios = [a / b for a, b in zip(times, floors, strict=True)]
    for name, values in (("time_ms", times), ("floor_ms", floors), ("ratio", ratios)):
        found[name], found[f"{name}_quartiles"] = spread(values)
    return found


def measure(case: Case, true: dict[str, dict]) -> dict[str, object]:
    """Everything of one case; of a wrong provider its error only."""
    provider = PROVIDERS[case.provider]
    return_freed_memory()
    problem = make_problem(case)

    def run() -> Tensor | None:
        forget(problem)
        return call(provider, case, problem)

    found: dict[str, object] = {"versions": versions(provider)}
    if case.provider == "compile":
        run()
    unit = case.tokens * case.hidden_size * case.vocab_size
    losses: list[Tensor | None] = []
    flops = gemm_flops(lambda: losses.append(run()))
    loss = losses[0]
    found["gemm_units"] = round(flops / unit, 3) if provider.counted else None
    if loss is not None:
        found["error"] = errors(true[provider.quantity], loss, problem)
        found["error"] = {name: float(f"{x:.3g}") for name, x in found["error"].items()}
        if not max(found["error"].values()) <= WRONG[case.dtype]:  # NaN is wrong too
            return found | {"wrong": f"error above {WRONG[case.dtype]}"}
    forget(problem)
    peak = peak_bytes(case.device, run)
    leaves = (problem.hidden, problem.weight)
    gradients = sum(x.nbytes for x in leaves if x.requires_grad)
    if peak is not None:
        found["peak_mib"] = round(peak / 2**20, 1)
        found["beyond_gradients_mib"] = round(max(0, peak - gradients) / 2**20, 1)
    forget(problem)
    keep_freed_memory()
    return found | in_turns(case.device, run, lambda: products(problem, GEMMS[case.task]))


def versions(provider: Provider) -> dict[str, str]:
    names = packages_distributions().get(provider.package, [provider.package])
    found = {"em_kernels": em_kernels.__version__, "torch": torch.__version__}
    try:
        return found | {names[0]: version(names[0])}
    except PackageNotFoundError:
        return found


def main() -> None:
    kind, path = sys.argv[1:]
    case = Case(**json.load(sys.stdin))
    if kind == "truth":
        torch.save(truth(case, make_problem(case)), path)
        found: dict[str, object] = {}
    else:
        try:
            found = measure(case, torch.load(path))
        except ImportError as error:
            found = {"skipped": f"does not import: {str(error).splitlines()[0]}"}
        except (MemoryError, torch.OutOfMemoryError) as error:
            found = {"skipped": f"out of memory: {str(error).splitlines()[0]}"}
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            found = {"skipped": "out of memory"}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
