"""transformers' Trainer with the entropy as its loss.

It stands apart from hf because importing Trainer takes seconds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .hf import check_head, entropy_loss, next_tokens, scored_positions
from .ops.checks import check_tolerance, check_transform


def named_accuracy(prefix: str, counts: Tensor) -> dict[str, float]:
    """Return the share of right tokens, from (right, all); nothing where there are none."""
    right, count = counts.tolist()
    return {f"{prefix}mean_token_accuracy": right / count} if count > 0 else {}


class EntropyTrainer(Trainer):
    """transformers.Trainer that minimises :func:`em_kernels.hf.entropy_loss`.

    That is its loss in training and in evaluation; no logits are computed. Batches need no labels.
    An update's loss is the mean over all its tokens that count, however many batches it accumulates
    and, with average_tokens_across_devices, whichever process has them. Beside it
    mean_token_accuracy is logged, as TRL names it: the share of these tokens that were the most
    probable, since the last log or in an evaluation.

    Args:
        args, kwargs: as in Trainer.
        temperature, grad_tolerance, chunk_bytes: as in entropy_loss.

    Raises: ValueError, TypeError naming the argument; TypeError in the first step for a model whose
        logits are not its head applied to its hidden states.
    """

    def __init__(
        self,
        *args: Any,
        temperature: float = 1.0,
        grad_tolerance: float = 0.0,
        chunk_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_tolerance(grad_tolerance)
        check_transform(temperature, 1.0, None, torch.empty(1, 1))
        super().__init__(*args, **kwargs)
        for name, value in (
            ("compute_loss_func", self.compute_loss_func),
            ("label_smoothing_factor", self.label_smoother),
            ("compute_metrics", self.compute_metrics),
            ("preprocess_logits_for_metrics", self.preprocess_logits_for_metrics),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}: the loss is the entropy and there are no logits; leave it out"
                )
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError(
                "parallelism_config: a sequence split over ranks (cp, sp) is not supported"
            )
        self.loss_settings: dict[str, Any] = {
            "temperature": temperature,
            "grad_tolerance": grad_tolerance,
            "chunk_bytes": chunk_bytes,
        }
        self.model_accepts_loss_kwargs = True  # Trainer then counts num_items_in_batch
        self.head_checked = False
        # Tokens that were the most probable, and all that count: of each row (B, 2) of the last
        # batch, on this rank since the last log, and in the evaluation on all ranks
        self.counts = torch.zeros(0, 2, dtype=torch.int64)
        self.tokens, self.evaluated = self.counts.sum(0), self.counts.sum(0)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Any], device: torch.device) -> Any:
        """Count the scored tokens, with labels or without."""
        # Trainer counts labels other than -100; so it gets 0 for each token that is scored.
        labels = [torch.where(scored_positions(batch), 0, -100) for batch in batch_samples]
        batches = [{"labels": x, "shift_labels": x} for x in labels]
        return super()._get_num_items_in_batch(batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the mean entropy; the first call also checks the model's head."""
        if not self.head_checked:
            training = model.training
            model.eval()  # dropout would make two forwards differ
            with self.accelerator.autocast():
                check_head(model)
            model.train(training)
            self.head_checked = True

        def outputs(num_items_in_batch: Any = None, **batch: Tensor) -> dict[str, Tensor]:
            settings = {"num_items_in_batch": num_items_in_batch, **self.loss_settings}
            with self.accelerator.autocast():
                loss, stats = entropy_loss(model, batch, return_stats=("argmax",), **settings)
            scores = scored_positions(batch)
            right = stats.argmax == next_tokens(batch, scores).to(loss.device)
            scores = scores.to(loss.device)
            self.counts = torch.stack([(right & scores).sum(1), scores.sum(1)], 1)
            if model.training:
                self.tokens = self.tokens.to(loss.device) + self.counts.sum(0)
            return {"loss": loss}

        # Trainer passes num_items_in_batch on, and multiplies the loss by the number of processes.
        return super().compute_loss(outputs, inputs, return_outputs, num_items_in_batch)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the accuracy to what is logged of the training steps; a collective call then."""
        if "loss" in logs:
            counts = self.accelerator.reduce(self.tokens.to(self.args.device), reduction="sum")
            logs |= named_accuracy("", counts)
            self.tokens = torch.zeros_like(self.tokens)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, and add the accuracy to the metrics."""
        self.evaluated = torch.zeros_like(self.evaluated)
        given = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        output = super().evaluation_loop(*given)
        accuracy = named_accuracy(f"{metric_key_prefix}_", self.evaluated)
        return output._replace(metrics={**(output.metrics or {}), **accuracy})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Compute the loss of an evaluation batch; there are no logits and no labels to return."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        # As Trainer does with the losses: without the rows that fill up the last batch.
        counts: Any = self.gather_function(self.counts)
        self.evaluated = self.evaluated.to(counts.device) + counts.sum(0)
        return loss, None, None
