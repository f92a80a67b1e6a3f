"""Measures one case of a distillation loss, in a process that bench_distillation.py starts.

`python -m benchmarks.distillation truth FILE`, `run FILE` and `fresh FILE` are as measure.py's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.measure import (
    BLOCK,
    SAMPLE,
    answer,
    clear_gradients,
    figures,
    in_turns,
    return_freed_memory,
    wide_logits,
)
from em_kernels import fused_divergence, fused_token_stats

TOP_K = 20
# Share of the variance of the teacher's logits that comes from the student's, so that most of their
# likely entries are the same ones.
AGREEMENT = 0.8
TRUTH_BYTES = 2**26  # of fp64 logits at a time; a divergence's formula holds many such tensors


class Problem(NamedTuple):
    """Student, teacher, and the teacher's likeliest entries as a data set would store them."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    ref_hidden: Tensor  # (N, D')
    ref_weight: Tensor  # (V, D')
    ids: Tensor  # (N, K) int64, most probable first
    probs: Tensor  # (N, K) fp32, which sum to 1


class Task(NamedTuple):
    """A loss: the mean over tokens of `rows`, which takes logits of both models (rows, V)."""

    title: str
    rows: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]  # ..., ids, probs
    beta: float | None = None  # None: the teacher's head is not used


Loss: TypeAlias = Callable[[Problem, Task], Tensor]


def divergence_rows(y: Tensor, ref_y: Tensor, _ids: Tensor, _probs: Tensor, beta: float) -> Tensor:
    """Return each row's divergence by F.kl_div, as eager trainers do."""
    logp, logq = y.log_softmax(-1), ref_y.log_softmax(-1)
    kl = partial(F.kl_div, reduction="none", log_target=True)
    if beta == 0:
        return kl(logp, logq).sum(-1)
    if beta == 1:
        return kl(logq, logp).sum(-1)
    shares = torch.stack([logq + math.log(beta), logp + math.log(1 - beta)])
    logr = shares.logsumexp(0)
    return (beta * kl(logr, logq) + (1 - beta) * kl(logr, logp)).sum(-1)


def stored_rows(y: Tensor, _: Tensor | None, ids: Tensor, probs: Tensor) -> Tensor:
    """Return the cross-entropy with the teacher's stored probabilities."""
    return -(probs * y.log_softmax(-1).gather(-1, ids)).sum(-1)


def top_entropy(top_logprobs: Tensor) -> Tensor:
    return -(top_logprobs.exp() * top_logprobs).sum(-1)


def top_rows(y: Tensor, _: Tensor | None, ids: Tensor, _probs: Tensor) -> Tensor:
    return top_entropy(y.log_softmax(-1).topk(ids.shape[-1]).values)


TASKS = {
    "forward-kl": Task("KL(teacher, student): beta 0", partial(divergence_rows, beta=0.0), 0.0),
    "jsd": Task("Jensen-Shannon: beta 0.5", partial(divergence_rows, beta=0.5), 0.5),
    "reverse-kl": Task("KL(student, teacher): beta 1", partial(divergence_rows, beta=1.0), 1.0),
    "stored-top-k": Task(f"log-probabilities of {TOP_K} given ids a token", stored_rows),
    "top-k": Task(f"the {TOP_K} largest log-probabilities of each token", top_rows),
}


def eager_loss(problem: Problem, task: Task) -> Tensor:
    """Compute the task's formula on an fp32 copy of all logits, which models return in bf16."""
    ref_y = None
    if task.beta is not None:
        with torch.no_grad():
            ref_y = (problem.ref_hidden @ problem.ref_weight.t()).float()
    y = (problem.hidden @ problem.weight.t()).float()
    return task.rows(y, ref_y, problem.ids, problem.probs).mean()


def compiled_loss(problem: Problem, task: Task) -> Tensor:
    return torch.compile(eager_loss, dynamic=False)(problem, task)


def ours_loss(problem: Problem, task: Task) -> Tensor:
    head = (problem.hidden, problem.weight)
    if task.beta is not None:
        return fused_divergence(*head, problem.ref_hidden, problem.ref_weight, beta=task.beta)
    if task.rows is top_rows:
        top_logprobs = fused_token_stats(*head, top_k=problem.ids.shape[-1]).top_logprobs
        return top_entropy(top_logprobs).mean()
    logprob = fused_token_stats(*head, problem.ids, stats=("logprob",)).logprob
    return -(problem.probs * logprob).sum(-1).mean()


class Provider(NamedTuple):
    """A way to compute the losses; loss is None for the floor."""

    title: str
    loss: Loss | None
    package: str = "torch"
    divergence_only: bool = False
    logit_bytes: tuple[int, int] = (0, 0)  # peak a logit, of divergences and others; 0: in chunks
    counted: bool = True


PROVIDERS = {
    "floor": Provider("GEMM floor", None, logit_bytes=(4, 2)),
    "ours": Provider("ours", ours_loss),
    "compile": Provider("torch.compile of eager", compiled_loss, logit_bytes=(30, 10)),
    "eager": Provider("eager, all logits in fp32", eager_loss, logit_bytes=(60, 20)),
    "trl": Provider(
        "TRL chunked divergence",
        lambda problem, task: peers.trl_divergence(problem, task.beta),
        package="trl",
        divergence_only=True,
    ),
    "liger": Provider(
        "Liger fused linear JSD",
        lambda problem, task: peers.liger_divergence(problem, task.beta),
        package="liger_kernel",
        divergence_only=True,
        logit_bytes=(60, 0),  # its chunks are of 1024 tokens
    ),
}


class Case(NamedTuple):
    """A case that one process measures."""

    provider: str
    shape: str
    tokens: int
    hidden_size: int
    ref_hidden_size: int
    vocab_size: int
    dtype: str
    task: str
    device: str

    @property
    def problem(self) -> str:
        """The key of its results: all but the provider."""
        widths = f"D={self.hidden_size} D'={self.ref_hidden_size}"
        return f"{self.shape} N={self.tokens} {widths} V={self.vocab_size} {self.dtype} {self.task}"

    @property
    def unit(self) -> float:
        """FLOPs that GEMM work is counted in: half a product, on average where D' is not D."""
        width = float(self.hidden_size)
        if TASKS[self.task].beta is not None:
            width = (3 * self.hidden_size + self.ref_hidden_size) / 4
        return self.tokens * width * self.vocab_size


def make_problem(case: Case) -> Problem:
    """Make LM-like inputs; the teacher's logits are the student's and some of its own, mixed."""
    dtype, device = getattr(torch, case.dtype), case.device
    student = inputs.lm_like(case.tokens, case.hidden_size, case.vocab_size, dtype, device)
    extra = case.ref_hidden_size - case.hidden_size
    own = inputs.lm_like(case.tokens, extra, case.vocab_size, dtype, device, seed=10)
    shares = (math.sqrt(AGREEMENT), math.sqrt(1 - AGREEMENT))
    ref_hidden = torch.cat([student.hidden * shares[0], own.hidden * shares[1]], dim=1)
    ref_weight = torch.cat([student.weight, own.weight], dim=1)
    blocks = ((rows @ ref_weight.t()).topk(TOP_K) for rows in ref_hidden.split(64))
    logits, ids = map(torch.cat, zip(*blocks, strict=True))
    return Problem(
        student.hidden.requires_grad_(),
        student.weight.requires_grad_(),
        ref_hidden,
        ref_weight,
        ids,
        logits.float().softmax(-1),
    )


@torch.no_grad()
def products(problem: Problem, task: Task) -> None:
    """Run the floor: the matrix products alone, of both heads for a divergence."""
    kept = []  # Results live until the end, as a caller's would.
    if task.beta is not None:
        kept.append(torch.mm(problem.ref_hidden, problem.ref_weight.t()))
    logits = torch.mm(problem.hidden, problem.weight.t())
    kept += [logits, torch.mm(logits, problem.weight), torch.mm(logits.t(), problem.hidden)]


def call(case: Case, problem: Problem) -> Tensor | None:
    """Run one training step, which replaces the gradients in .grad; return the loss."""
    clear_gradients(problem)
    loss_of, task = PROVIDERS[case.provider].loss, TASKS[case.task]
    if loss_of is None:
        products(problem, task)
        return None
    loss = loss_of(problem, task)
    loss.backward()
    return loss.detach()


def truth(case: Case, problem: Problem) -> dict[str, float | Tensor]:
    """Return the loss and gradients of sampled tokens and entries, by autograd in fp64."""
    n, v, device, task = case.tokens, case.vocab_size, case.device, TASKS[case.task]
    tokens = torch.linspace(0, n - 1, min(SAMPLE, n), device=device).long().unique()
    entries = torch.linspace(0, v - 1, min(SAMPLE, v), device=device).long()
    entries = torch.cat([entries, problem.ids[tokens, 0]]).unique()
    weight, ref_weight = problem.weight.detach(), problem.ref_weight
    loss, of_weight, of_hidden = 0.0, torch.zeros((), device=device), []
    for index in torch.arange(n, device=device).split(max(1, TRUTH_BYTES // (8 * v))):
        hidden, ref_y = problem.hidden.detach()[index].double(), None
        if task.beta is not None:
            ref_y = wide_logits(problem.ref_hidden[index].double(), ref_weight)
        y = wide_logits(hidden, weight).requires_grad_()
        value = task.rows(y, ref_y, problem.ids[index], problem.probs[index].double()).sum() / n
        (dy,) = torch.autograd.grad(value, y)
        loss += value.item()
        of_weight = of_weight + dy[:, entries].t() @ hidden
        blocks = zip(
            dy[torch.isin(index, tokens)].split(BLOCK, dim=1), weight.split(BLOCK), strict=True
        )
        of_hidden.append(sum(part @ block.double() for part, block in blocks))
    return {
        "loss": loss,
        "scale": loss,  # No token's term is negative.
        "hidden": torch.cat(of_hidden).cpu(),
        "weight": of_weight.cpu(),
        "tokens": tokens.cpu(),
        "entries": entries.cpu(),
    }


def measure(case: Case, true: dict) -> dict[str, object]:
    """Measure a case, as measure.figures() does."""
    return_freed_memory()
    problem = make_problem(case)
    run, floor = partial(call, case, problem), partial(products, problem, TASKS[case.task])
    return figures(case, PROVIDERS[case.provider], problem, run, floor, true)


def fresh_times(case: Case) -> dict[str, object]:
    """Time a case where nothing is set, as measure.fresh_times() does."""
    problem = make_problem(case)
    run, floor = partial(call, case, problem), partial(products, problem, TASKS[case.task])
    run()  # compiles, and starts threads
    return in_turns(case.device, run, floor)


if __name__ == "__main__":
    answer(
        {
            "truth": lambda case, path: torch.save(truth(case, make_problem(case)), path),
            "run": lambda case, path: measure(case, torch.load(path)),
            "fresh": lambda case, _: fresh_times(case),
        },
        Case,
    )
