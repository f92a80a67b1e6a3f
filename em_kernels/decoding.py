"""Entropy minimisation at inference: logits are sharpened at each step, no weight is trained."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

MIN_LOG = -1e4  # in place of log 0, which times a probability of 0 would be NaN


class EntropyMinimizationLogitsProcessor(LogitsProcessor):
    """Lower the entropy of each next-token distribution by gradient descent on its logits.

    Each row of logits z is optimised on its own, from the model's logits and with a fresh Adam:

        p0, p = softmax(z0), softmax(z)
        loss = entropy(p) + kl_weight * KL(p0 || p)     # stops once entropy(p) < threshold

    A distribution that is sure already, and in theory every greedy choice, stays as it is: this is
    for sampling. The published settings sample at temperature 0.1 after it:

        generate(..., do_sample=True, temperature=0.1,
                 logits_processor=[EntropyMinimizationLogitsProcessor()])

    transformers applies it after the repetition penalty and before temperature, top-k and top-p.

    Args:
        threshold: entropy in nats below which a row is left alone.
        kl_weight: weight of the divergence from the model's own distribution.
        learning_rate: Adam's; the first step moves a logit by at most this.
        n_grad_steps: steps at most.

    Precision: computed and returned in fp32. Entries of -inf stay.
    Memory: eight fp32 copies of the logits of the rows at or above the threshold.
    Raises: ValueError for a setting out of its range.
    Source: EM-INF, arXiv 2505.15134, with a threshold for each row rather than for the batch's sum.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        kl_weight: float = 0.05,
        learning_rate: float = 0.1,
        n_grad_steps: int = 3,
    ) -> None:
        for name, value in (("threshold", threshold), ("kl_weight", kl_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: {value} must be 0 or more")
        if not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate: {learning_rate} must be above 0")
        if n_grad_steps < 1 or n_grad_steps != int(n_grad_steps):
            raise ValueError(f"n_grad_steps: {n_grad_steps} must be a whole number above 0")
        self.threshold, self.kl_weight = threshold, kl_weight
        self.learning_rate, self.n_grad_steps = learning_rate, n_grad_steps

    @torch.no_grad()
    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Return the sharpened logits, (rows, vocabulary), in fp32; input_ids are not used."""
        found = scores.float()
        rows = (_entropy(found.log_softmax(-1)) >= self.threshold).nonzero()[:, 0]
        if len(rows):  # Most distributions of a trained model are below the threshold.
            found = found.index_copy(0, rows, self._sharpened(found[rows]))
        return found

    def _sharpened(self, logits: Tensor) -> Tensor:
        """Return logits after the last step that began at or above the threshold, row by row."""
        optimizer = torch.optim.Adam([logits], lr=self.learning_rate)
        first, result = logits.softmax(-1), logits.clone()
        going = torch.ones_like(logits[:, 0], dtype=torch.bool)
        for _ in range(self.n_grad_steps):
            log_p = logits.log_softmax(-1)
            entropy = _entropy(log_p)
            going &= entropy >= self.threshold
            p = log_p.exp()
            # d entropy / dz = -p (log p + entropy); d KL(p0 || p) / dz = p - p0
            gradient = log_p.clamp_(min=MIN_LOG).add_(entropy[:, None]).mul_(p).neg_()
            logits.grad = gradient.add_(p.sub_(first), alpha=self.kl_weight)
            optimizer.step()
            result = torch.where(going[:, None], logits, result)
        return result


def _entropy(log_p: Tensor) -> Tensor:
    """Return each row's entropy in nats."""
    return -(log_p.exp() * log_p.clamp(min=MIN_LOG)).sum(-1)
