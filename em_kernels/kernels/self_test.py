"""Choice between the Triton and the portable kernels: a self-test at a GPU's first use.

Once per process, device and dtypes every Triton kernel runs on 64 rows, and its numbers are
compared with those of the portable kernels in fp64. A GPU on which one does not compile, does not
launch or is wrong uses the portable kernels from then on, after one warning.
"""

import subprocess
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..reference import IGNORE_INDEX, RowParts, RowTransform, TokenStats
from ..reference_divergence import DivergenceTerms
from . import portable

# Multiples of no block, so that masks are tested, but of 16, as the vocabularies of models are:
# Triton compiles other code for other sizes, and a loss's first launches find this one's.
ROWS, COLUMNS, CUT = 64, 4112, 2064
SAMPLE = 2048
COLUMN_TOLERANCE = 0.1
# Of a value, and of the largest in its row: fp32 sums of so many terms are off by 1e-6 to 1e-5.
TOLERANCE = 1e-4

_chosen: dict[tuple, ModuleType] = {}  # by device, dtype of x, dtype of the results, and test
_failures: dict[torch.device, str] = {}
_lock = threading.Lock()


def tested_kernels(x: Tensor, out_dtype: torch.dtype, results: "Results") -> ModuleType:
    """Return the kernels for x, on a GPU, whose results are written in out_dtype."""
    key = x.device, x.dtype, out_dtype, results
    return _chosen.get(key) or _choose(x, key)


def failure(device: torch.device) -> str:
    """Return why a GPU uses the portable kernels; empty where it does not, or not yet."""
    return _failures.get(device, "")


def _choose(x: Tensor, key: tuple) -> ModuleType:
    device, *test = key
    if isinstance(x, FakeTensor):
        return portable  # whose operations are torch's, which know such tensors
    if torch.cuda.is_current_stream_capturing():
        # Comparing numbers would break the capture; untested kernels might record wrong ones.
        warnings.warn(
            f"em_kernels: {device}: a CUDA graph is being captured before the first use, so it "
            "records the slower portable kernels; call the function once before the capture",
            stacklevel=2,
        )
        return portable
    reason = ""
    with _lock:
        if key not in _chosen and device not in _failures:
            reason = _why_not(device, *test)
        if reason:
            _failures[device] = reason
            _chosen.update((other, portable) for other in _chosen if other[0] == device)
        if device in _failures:
            _chosen[key] = portable
        elif key not in _chosen:
            from . import triton

            _chosen[key] = triton
    if reason:
        warnings.warn(
            f"em_kernels: {device} uses the portable kernels, which are right but slower: {reason}",
            stacklevel=2,
        )
    return _chosen[key]


def _why_not(
    device: torch.device, y_dtype: torch.dtype, out_dtype: torch.dtype, results: "Results"
) -> str:
    """Return why the Triton kernels cannot be used; empty where they can."""
    try:
        from . import triton
    except Exception as error:
        if getattr(error, "name", "") == "triton":
            problem = "is not installed"
        else:  # a version with another interface
            problem = f"does not load ({_told(error)})"
        return f"Triton {problem}; install the one that your torch names (pip show torch)"
    try:
        wrong = wrong_result(triton, device, y_dtype, out_dtype, results)
    except torch.OutOfMemoryError:
        raise  # which says nothing about the kernels
    except Exception as error:
        return _remedy(error)
    dtypes = " to ".join(str(dtype).removeprefix("torch.") for dtype in (y_dtype, out_dtype))
    return wrong and f"the Triton kernels ({dtypes}) give {wrong}; please report it"


def _told(error: Exception) -> str:
    """Return the kind and the last line of an error; Triton's begin with the kernel's source."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__


def _remedy(error: Exception) -> str:
    """Return what was raised by a compilation or a launch, and what helps."""
    if "C compiler" in str(error):
        return "Triton needs a C compiler at run time; install gcc, or set CC to the path of one"
    if isinstance(error, FileNotFoundError | subprocess.CalledProcessError):
        return (
            f"Triton could not run its compiler ({_told(error)}); install gcc and Python's headers "
            "(Debian: apt-get install gcc python3-dev), or set CC to the path of another compiler"
        )
    return f"the Triton kernels do not run here ({_told(error)}); please report it"


class Problem(NamedTuple):
    """A small problem, on which Triton's and the portable kernels are compared."""

    y: Tensor  # (ROWS, COLUMNS), the same values in fp32, bf16 and fp16
    inv_temperature: Tensor  # (ROWS,)
    targets: Tensor  # (ROWS,)
    upstream: Tensor  # (5, ROWS)
    mass: Tensor  # (COLUMNS,) that the choice of columns is made from
    row_of: Tensor  # (COLUMNS,) rows of an earlier choice


def problem() -> Problem:
    """Draw the problem in fp32 on the CPU, from a generator of its own."""
    generator, fp32 = torch.Generator().manual_seed(0), torch.float32
    normal = torch.randn(ROWS, COLUMNS, generator=generator, dtype=fp32, device="cpu")
    y = (normal * 4).clamp(-15, 15).mul(16).round().div(16)
    inv_temperature = torch.linspace(0.5, 2, ROWS, dtype=fp32, device="cpu")
    targets = torch.randint(COLUMNS, (ROWS,), generator=generator, device="cpu")
    targets[::7] = IGNORE_INDEX
    upstream = torch.randn(5, ROWS, generator=generator, dtype=fp32, device="cpu")
    upstream[1, ::7] = 0  # as the callers give it where a target is ignored
    mass = torch.rand(COLUMNS, generator=generator, dtype=fp32, device="cpu").mul(-12).exp2()
    row_of = torch.full((COLUMNS,), -1, device="cpu")
    row_of[:99:3] = torch.arange(33, device="cpu")
    return Problem(y, inv_temperature, targets, upstream, mass, row_of)


def _converted(given: Problem, device: torch.device, y_dtype: torch.dtype) -> Problem:
    """Return the problem on a device, y in its dtype, the rest in the dtype of accumulation."""
    wide = torch.float64 if y_dtype == torch.float64 else torch.float32

    def moved(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=wide if x.is_floating_point() else x.dtype)

    return Problem(
        given.y.to(device=device, dtype=y_dtype),
        *(moved(x) for x in given[1:]),
    )


# Runs kernels on the problem, given the dtype of gradients; returns their results by name.
Results = Callable[[ModuleType, Problem, torch.dtype], dict[str, Tensor]]


def row_results(kernels: ModuleType, given: Problem, out_dtype: torch.dtype) -> dict[str, Tensor]:
    """Run every kernel of one head; return integers for what must be the same."""
    y, inv_temperature, targets, upstream, mass, row_of = given
    row = RowTransform(None, inv_temperature, targets=targets)
    parts = []
    for part in (slice(0, CUT), slice(CUT, COLUMNS)):
        shifted = row._replace(targets=targets - part.start)
        found = kernels.row_statistics(y[:, part], shifted, True)
        parts.append(found._replace(argmax=found.argmax + part.start))
    joined = RowParts._make(map(torch.cat, zip(*parts, strict=True)))
    rows = kernels.finish_rows(joined, COLUMNS, targets)
    per_row = kernels.gradient_factors(rows, TokenStats(*upstream), COLUMNS)
    dy = torch.empty_like(y, dtype=out_dtype)
    kernels.row_gradient(y, row, per_row, dy)
    column_mass, row_sums = kernels.column_mass(y, row, per_row)
    choice = kernels.choose_columns(mass, row_of, COLUMN_TOLERANCE, SAMPLE, out_dtype)
    # Not of the columns chosen, as wrong indices would end the process.
    columns, residual = torch.arange(0, COLUMNS, 3, device=y.device), row_sums.clone()
    if hasattr(kernels, "gradient_of_columns"):
        chosen = kernels.gradient_of_columns(y, row, per_row, columns, out_dtype, residual)
    else:
        chosen = dy[:, columns]
        residual -= chosen.sum(1)
    count = int(choice.counts[0])
    return {
        **{name: x for name, x in rows.stats._asdict().items() if x is not None},
        "gradient": dy,
        "column masses": column_mass,
        "row sums": row_sums,
        "number of columns": choice.counts,
        "columns": choice.vocab_indices[:count],
        "rows of columns": choice.dweight_rows[:count],
        "rows of all columns": choice.row_of,
        "masses left out": choice.masses,
        "shares of the sample": choice.shares,
        "gradient of columns": chosen,
        "rest of the row sums": residual,
    }


def divergence_results(
    kernels: ModuleType, given: Problem, out_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run the kernels of a divergence, for each of its formulas."""
    ref_y, row = given.y.roll(1, 0), RowTransform(None, given.inv_temperature)
    # The reference's log-probabilities of the entries that the other head finds likeliest
    row = row._replace(targets=given.y.argmax(1))
    per_row = torch.cat([given.upstream, given.upstream[:2]])
    for at, logits in ((0, given.y), (2, ref_y)):
        parts = kernels.row_statistics(logits, row, False)
        (_, logprob, *_), m, log_s = kernels.finish_rows(parts, COLUMNS, row.targets)
        per_row[at : at + 2] = torch.stack([m, log_s])
    per_row[4] = -per_row[1] - logprob
    found: dict[str, Tensor] = {}
    for beta in (0.0, 0.5, 1.0):
        terms = DivergenceTerms(given.y, row, ref_y, row, per_row, beta)
        sums = kernels.divergence_sums(terms)
        per_row[5] = sums[1]
        dy = torch.empty_like(given.y, dtype=out_dtype)
        kernels.divergence_gradient(terms, dy)
        found |= {f"divergences at beta {beta:g}": sums, f"their gradient at beta {beta:g}": dy}
    return found


def wrong_result(
    kernels: ModuleType,
    device: torch.device,
    y_dtype: torch.dtype,
    out_dtype: torch.dtype,
    results: Results = row_results,
) -> str:
    """Return which result of the kernels is wrong, and by how much; empty where all are right.

    Memory: 20 MB on the host, 5 on the device. Waits for the device.
    """
    given = problem()
    with torch.no_grad():
        wide = _converted(given, torch.device("cpu"), torch.float64)
        expected = results(portable, wide, torch.float64)
        found = results(kernels, _converted(given, device, y_dtype), out_dtype)
    for name, true in expected.items():
        ours = found[name].cpu()
        if ours.shape != true.shape:
            return f"{name} of shape {tuple(ours.shape)} instead of {tuple(true.shape)}"
        if not true.is_floating_point():
            if not torch.equal(ours, true):
                return f"{(ours != true).sum().item()} wrong {name}"
            continue
        size, error = true.abs(), (ours.double() - true).abs()
        rounding = torch.finfo(ours.dtype).eps * size
        limit = rounding + TOLERANCE * (size + size.amax(-1, keepdim=True))
        if not (error <= limit).all():  # also where one is NaN
            worst = (error / limit).max().item()
            return f"{name} that are off by {worst:.2g} times what rounding explains"
    return ""
