"""TRL's trainers without logits: GRPO on fused_token_stats, distillation on fused_divergence."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import fused_divergence
from .functional import fused_token_stats
from .hf import Head, causal_lm, check_head, head_reads
from .losses import em_rl_sequence_reward, em_rl_token_reward, intuitor_reward, rent_reward
from .reference import IGNORE_INDEX, TokenStats

try:
    from trl import DistillationTrainer, GRPOTrainer
    from trl.trainer import distillation_trainer, grpo_trainer
except ImportError as error:
    raise ImportError(
        "em_kernels.trl: needs trl >= 1.16; install em-kernels[trl] (the cause is above)"
    ) from error

INTRINSIC_REWARDS: dict[str, Callable[[TokenStats, Tensor, int], Tensor]] = {
    "rent": lambda stats, mask, _: rent_reward(stats, mask),
    "intuitor": intuitor_reward,
    "em_rl_token": lambda stats, mask, _: em_rl_token_reward(stats, mask),
    "em_rl_sequence": lambda stats, mask, _: em_rl_sequence_reward(stats, mask),
}
OF_STATISTICS = (rent_reward, intuitor_reward, em_rl_token_reward, em_rl_sequence_reward)


class _HeadChecks:
    """Checks of the heads that both trainers read; a mixin, placed before TRL's trainer."""

    accelerator: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def _check_all(self, *models: nn.Module | None) -> None:
        """Refuse FSDP1, and check the models' heads unless ranks hold parts of the weights."""
        self._checked = set[nn.Module]()
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError('args: FSDP1 is not supported; set "version": 2 in fsdp_config')
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            for model in models:
                if model is not None:
                    self._check(model)

    def _check(self, model: nn.Module) -> None:
        """Check a model's head once."""
        lm = causal_lm(model)
        if lm not in self._checked:
            training = model.training
            model.eval()  # dropout would make two forwards differ
            with self.accelerator.autocast():
                check_head(model)
            model.train(training)
            self._checked.add(lm)


class FusedGRPOTrainer(_HeadChecks, GRPOTrainer):
    """trl.GRPOTrainer that needs no logits, and knows rewards that need no reward model.

    Log-probabilities, entropies and their gradients come straight from the hidden states.
    Equivalent to ``trl.GRPOTrainer(...)``, with its arguments, loss and logs. Per token, for the
    policy and for the reference model::

        logp = (logits.float() / args.temperature).log_softmax(-1)
        log_prob = logp.gather(-1, token)
        entropy = -(logp.exp() * logp).sum(-1)

    GRPO with an entropy bonus::

        args = GRPOConfig(output_dir="run", entropy_coef=0.01)
        FusedGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, dataset).train()

    RENT with a reward for the format::

        FusedGRPOTrainer("Qwen/Qwen3-0.6B", ["rent", format_reward], args, dataset).train()

    Args:
        reward_funcs: as in trl.GRPOTrainer, or names of rewards of ``em_kernels.losses``: "rent",
            "intuitor", "em_rl_token", "em_rl_sequence", alone or in a list with others. They are in
            nats, at args.temperature, and logged as rewards/rent/mean and so on. They come from the
            pass that computes the old log-probabilities; where TRL needs none, the ratio being 1,
            from one such pass. They count the model's own tokens only, not a tool's, and are None
            for a completion that mask_truncated_completions leaves out. A reward model in a folder
            of such a name is given as "./rent".
        args: a GRPOConfig. ``entropy_coef`` times the mean entropy of the tokens is subtracted from
            the loss: > 0 is a bonus for entropy, < 0 minimises it (EM-RL). Where all rewards are
            equal, this term and the KL (``beta`` > 0) are the whole loss.
        others: as in trl.GRPOTrainer. A class with several parents lists this one before TRL's.

    Gradient: of log-probabilities and entropies, equation (8) of ``em_kernels.reference``.
    Precision: logits and statistics are fp32 whatever the model's dtype, to which TRL rounds its
        logits; under autocast the hidden states and the head's weight are in autocast's dtype.
    Memory: as in :func:`em_kernels.fused_token_stats`, for the completions' tokens only; with a
        LoRA adapter on the head, which TRL refuses, as in :func:`em_kernels.hf.adapted_head`. With
        FSDP2 or DeepSpeed ZeRO-3 each rank gathers the head's whole weight, as for logits.
    Raises: TypeError, ValueError for what is not supported: FSDP1; an adapter on the head with
        DeepSpeed ZeRO-3, whose hooks do not gather the weight beneath it;
        ``cast_lm_head_to_fp32``, needless as logits are fp32; an architecture whose logits are not
        its head applied to its hidden states (with FSDP and DeepSpeed in the first step).
    Source: GRPO, arXiv 2402.03300; entropy minimisation as a reward, arXiv 2505.15134; others in
        ``em_kernels.losses``.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, *args: Any, **kwargs: Any) -> None:
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self._intrinsic = [r for r in given if isinstance(r, str) and r in INTRINSIC_REWARDS]
        for name in given:
            if not (name is None or isinstance(name, str) or callable(name)):
                raise TypeError(
                    "reward_funcs: expected a name, a function or a reward model, or a list of "
                    f"these, got {type(name).__name__}"
                )
            if name in OF_STATISTICS:
                known = name.__name__.removesuffix("_reward")
                raise TypeError(
                    f'reward_funcs: {name.__name__} takes statistics; give its name, "{known}"'
                )
            if isinstance(name, str) and not (
                name in INTRINSIC_REWARDS or "/" in name or os.path.isdir(name)
            ):
                raise ValueError(
                    f"reward_funcs: {name!r} is none of {', '.join(INTRINSIC_REWARDS)}, and no "
                    "reward model, which is a folder or owner/name"
                )
        self._scored: tuple[TokenStats, Tensor, int] | None = None
        self._is_scoring = False
        self._tool_masks: list[list[int]] | None = None
        rewards = [self._reward(r) if isinstance(r, str) else r for r in given if r is not None]
        with _adapter_on_the_head(grpo_trainer):
            super().__init__(model, rewards, *args, **kwargs)
        config: Any = self.args
        if config.cast_lm_head_to_fp32:
            raise ValueError("cast_lm_head_to_fp32: logits are fp32 without it; leave it False")
        self._check_all(self.model, self.ref_model)

    def _reward(self, name: str) -> Any:
        """Return the reward function of an intrinsic reward; another name is a reward model."""
        if name not in INTRINSIC_REWARDS:
            return name

        def reward(**others: Any) -> list[float | None]:
            assert self._scored is not None
            stats, mask, vocab_size = self._scored
            rewards = INTRINSIC_REWARDS[name](stats, mask, vocab_size).tolist()
            return [r if n else None for r, n in zip(rewards, mask.sum(1).tolist(), strict=True)]

        reward.__name__ = name  # in TRL's logs
        return reward

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        self._tool_masks = found[2]
        return found

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let TRL compute the old log-probabilities if a reward needs that pass, before rewards."""
        if not self._intrinsic:
            return super()._generate_and_score_completions(inputs)
        config: Any = self.args
        iterations, accumulated = self.num_iterations, config.gradient_accumulation_steps
        is_needed = accumulated % (config.steps_per_generation * iterations) != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )
        self._is_scoring = True
        try:
            if not is_needed:  # TRL makes the pass for more iterations than steps accumulate
                self.num_iterations = accumulated + 1
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.num_iterations, self._is_scoring, self._scored = iterations, False, None
        if not is_needed:
            del output["old_per_token_logps"]  # as in TRL the ratio is exactly 1
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probabilities, entropies (B, logits_to_keep) and MoE loss, as TRL's method.

        The wrapped model is called, as DDP and FSDP must see its forward.
        """
        self._check(model)
        keeps = self._is_scoring and self._scored is None
        names = ["logprob", "entropy"]
        if keeps and "intuitor" in self._intrinsic:
            names += ["logsumexp", "mean_logit"]
        parts, vocab_size = list[Tensor](), 0

        def score(labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
            """Return what TRL's fused head returns, for its labels; hidden t scores token t + 1."""
            tokens = labels[:, -logits_to_keep:]

            def read(hidden: Tensor, head: Head) -> Tensor:
                nonlocal vocab_size
                vocab_size = len(head.weight)
                stats = fused_token_stats(
                    hidden[:, -logits_to_keep - 1 : -1],
                    head.weight,
                    tokens,
                    stats=names,
                    mask=tokens != IGNORE_INDEX,
                    temperature=self.temperature,
                    **head.arguments(),
                )
                return torch.stack([getattr(stats, name) for name in names])

            with head_reads(model, read):
                found = model(**inputs, use_cache=False)
            has_loss = inputs.get("output_router_logits", False)
            values, aux_loss = found if has_loss else (found, None)
            parts.append(values.detach())
            return SimpleNamespace(log_probs=values[0], entropy=values[1], aux_loss=aux_loss)

        found = super()._get_per_token_logps_and_entropies(
            score, input_ids, attention_mask, logits_to_keep, *args, **others
        )
        if keeps:
            mask = attention_mask[:, -logits_to_keep:].clone()
            for row, own in zip(mask, self._tool_masks or (), strict=False):
                row[: len(own)] *= row.new_tensor(own)
            stats = TokenStats(**dict(zip(names, torch.cat(parts, 1), strict=True)))
            self._scored = stats, mask, vocab_size
        return found


class FusedDistillationTrainer(_HeadChecks, DistillationTrainer):
    """trl.DistillationTrainer on :func:`em_kernels.fused_divergence`.

    Equivalent to ``trl.DistillationTrainer(...)``, with its arguments, loss and logs. Per token of
    a completion that the student has sampled, for the student's logits and the teacher's::

        logp = (logits.float() / args.temperature).log_softmax(-1)
        logq = (teacher_logits.float() / args.temperature).log_softmax(-1)
        divergence = {0: KL(q || p), 1: KL(p || q)}.get(args.beta, JSD(p, q, args.beta))

    Distillation by the reverse KL::

        args = DistillationConfig(output_dir="run", beta=1.0)
        FusedDistillationTrainer("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", args, dataset).train()

    Args:
        all: as in trl.DistillationTrainer. The teacher has the student's tokenizer; its hidden
            size, scale and softcap are its own. A class with several parents lists this one before
            TRL's.

    Gradient: for the student, equation (11) of ``em_kernels.reference_divergence``.
    Precision: as in :func:`em_kernels.fused_divergence`: its sums have no negative term, where
        TRL's KL is a difference of logsumexps; under autocast hidden states and the heads' weights
        are in autocast's dtype.
    Memory: as in :func:`em_kernels.fused_divergence`, for the completions' tokens only; with a LoRA
        adapter on a head, which TRL refuses, as in :func:`em_kernels.hf.adapted_head`. With FSDP2
        or DeepSpeed ZeRO-3 each rank gathers the heads' whole weights.
    Raises: TypeError, ValueError for what is not supported, as :class:`FusedGRPOTrainer`.
    Source: on-policy distillation, arXiv 2306.13649.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _adapter_on_the_head(distillation_trainer):
            super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError("teacher_model: is None; give the model to learn from, or its name")
        self._check_all(self.model, self.teacher_model)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss, at the first call once both heads are checked."""
        for wrapped in (model, self.teacher_model):
            self._check(wrapped)
        return super().compute_loss(model, *args, **kwargs)

    def _compute_loss(
        self, student: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, summed entropy and number of tokens, as TRL's method.

        It runs within the forward of the wrapped student. The divergence runs within the forwards
        of both heads' modules, where FSDP and ZeRO have gathered their weights.
        """
        pieces = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
        ids, attended = (torch.cat([inputs[name] for name in names], 1) for names in pieces)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        known = inspect.signature(self._get_last_hidden_state).parameters
        images = {name: x for name, x in inputs.items() if name in known}
        teacher: Any = self.accelerator.unwrap_model(self.teacher_model)
        grad_mode, found = torch.is_grad_enabled(), list[Tensor]()

        def hidden_states(model: nn.Module) -> Tensor:
            return self._get_last_hidden_state(model, ids, attended, mask.shape[1], **images)

        hidden = hidden_states(student)

        def compare(ref_hidden: Tensor, ref: Head) -> Tensor:
            def read(hidden: Tensor, head: Head) -> Tensor:
                loss, stats = fused_divergence(
                    hidden,
                    head.weight,
                    ref_hidden,
                    ref.weight,
                    beta=self.beta,
                    mask=mask.to(hidden.device),
                    temperature=self.temperature,
                    reduction="mean" if num_items_in_batch is None else "sum",
                    ref_bias=ref.bias,
                    ref_logit_scale=ref.logit_scale,
                    ref_softcap=ref.softcap,
                    return_stats=["entropy"],
                    **head.arguments(),
                )
                return torch.stack((loss, stats.entropy.sum()))

            with torch.set_grad_enabled(grad_mode):
                found.extend(_at_the_head(student, hidden, read))
            return ref_hidden

        self.teacher_model.eval()
        with torch.no_grad():
            # What it returns is not used: hooks of the teacher's modules must not see the loss.
            self._forward_redirection(
                self.teacher_model,
                teacher,
                lambda: _at_the_head(teacher, hidden_states(teacher), compare),
            )
        loss, entropy = found
        if num_items_in_batch is not None:
            loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        return loss, entropy.detach(), mask.sum().to(loss.device)


def _at_the_head(
    model: nn.Module, hidden: Tensor, read: Callable[[Tensor, Head], Tensor]
) -> Tensor:
    """Return read(hidden states, head), run as the forward of the head's module."""
    layer: Any = causal_lm(model).get_output_embeddings()
    with head_reads(model, read):
        return layer(hidden.to(layer.weight.device))


@contextmanager
def _adapter_on_the_head(module: Any) -> Iterator[None]:
    """Let a module of TRL accept a head with an adapter, which its own loss would ignore."""
    tuner = vars(module).get("BaseTunerLayer")  # absent without peft
    module.BaseTunerLayer = ()  # what it looks for: nothing is an instance of it
    try:
        yield
    finally:
        module.BaseTunerLayer = tuner
