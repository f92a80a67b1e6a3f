"""TRL's GRPOTrainer on :func:`em_kernels.fused_token_stats`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .functional import fused_token_stats
from .hf import Head, causal_lm, check_head, head_of, head_reads

try:
    from trl import GRPOTrainer
except ImportError as error:
    raise ImportError(
        "em_kernels.trl: needs trl >= 1.16; install em-kernels[trl] (the cause is above)"
    ) from error


class FusedGRPOTrainer(GRPOTrainer):
    """trl.GRPOTrainer that needs no logits.

    Log-probabilities, entropies and their gradients come straight from the hidden states.
    Equivalent to ``trl.GRPOTrainer(...)``, with its arguments, loss and logs. Per token, for the
    policy and for the reference model::

        logp = (logits.float() / args.temperature).log_softmax(-1)
        log_prob = logp.gather(-1, token)
        entropy = -(logp.exp() * logp).sum(-1)

    GRPO with an entropy bonus::

        args = GRPOConfig(output_dir="run", entropy_coef=0.01)
        FusedGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, dataset).train()

    Args:
        args: a GRPOConfig. ``entropy_coef`` times the mean entropy of the tokens is subtracted from
            the loss: > 0 is a bonus for entropy, < 0 minimises it (EM-RL). Where all rewards are
            equal, this term and the KL (``beta`` > 0) are the whole loss.
        others: as in trl.GRPOTrainer. A class with several parents lists this one before TRL's.

    Gradient: of log-probabilities and entropies, equation (8) of ``em_kernels.reference``.
    Precision: logits and statistics are fp32 whatever the model's dtype, to which TRL rounds its
        logits; under autocast the hidden states and the head's weight are in autocast's dtype.
    Memory: as in :func:`em_kernels.fused_token_stats`, for the completions' tokens only.
    Raises: TypeError, ValueError for what is not supported: FSDP and DeepSpeed; images; the
        load-balancing loss of a mixture of experts; ``cast_lm_head_to_fp32``, needless as logits
        are fp32; an adapter on the head; an architecture whose logits are not its head applied to
        its hidden states.
    Source: GRPO, arXiv 2402.03300; entropy minimisation as a reward, arXiv 2505.15134.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "args: FSDP and DeepSpeed are not supported; use DDP, or trl.GRPOTrainer"
            )
        if self._is_vlm:
            raise TypeError("model: vision-language models are not supported; use trl.GRPOTrainer")
        if self.aux_loss_enabled:
            coefficient = self.router_aux_loss_coef
            raise ValueError(f"router_aux_loss_coef: {coefficient} is not supported; set it to 0")
        config: Any = self.args
        if config.cast_lm_head_to_fp32:
            raise ValueError("cast_lm_head_to_fp32: logits are fp32 without it; leave it False")
        for model in (self.model, self.ref_model):
            if model is not None:
                training = model.training
                with self.accelerator.autocast():
                    check_head(model.eval(), head_of(causal_lm(model)))  # eval: no dropout
                model.train(training)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Return log-probabilities and entropies (B, logits_to_keep) of the last tokens.

        The third value, a router loss, is None. The wrapped model is called, as DDP must see its
        forward.
        """
        rows = batch_size or len(input_ids)
        parts = []
        for ids, mask in zip(input_ids.split(rows), attention_mask.split(rows), strict=True):
            read = partial(self._read, ids[:, -logits_to_keep:], mask[:, -logits_to_keep:])
            with self.accelerator.autocast(), head_reads(model, read):
                parts.append(model(input_ids=ids, attention_mask=mask, use_cache=False))
        logprob, entropy = torch.cat(parts, dim=1)
        return logprob, entropy, None

    def _read(self, tokens: Tensor, mask: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """Return logprob and entropy (2, B, tokens); hidden state t scores token t + 1."""
        stats = fused_token_stats(
            hidden[:, -tokens.shape[1] - 1 : -1],
            head.weight,
            tokens,
            mask=mask,
            temperature=self.temperature,
            **head.arguments(),
        )
        assert stats.logprob is not None and stats.entropy is not None
        return torch.stack((stats.logprob, stats.entropy))
