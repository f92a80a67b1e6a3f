"""TRL's GRPOTrainer on :func:`em_kernels.fused_token_stats`."""

from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .functional import fused_token_stats
from .hf import check_head, head_of

try:
    from accelerate.utils import is_peft_model
    from trl import GRPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ImportError(
        "em_kernels.trl: needs trl >= 1.16; install em-kernels[trl] (what failed is above)"
    ) from error


class FusedGRPOTrainer(GRPOTrainer):
    """trl.GRPOTrainer whose log-probabilities and entropies, and their gradients, come straight
    from the hidden states.

    Equals ``trl.GRPOTrainer(...)``, whose arguments, loss and logs it keeps. Per token, of the
    policy and of the reference model::

        logp = (logits.float() / args.temperature).log_softmax(-1)
        log_prob = logp.gather(-1, token)
        entropy = -(logp.exp() * logp).sum(-1)

    GRPO with an entropy bonus::

        args = GRPOConfig(output_dir="run", entropy_coef=0.01)
        FusedGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, dataset).train()

    Args:
        args: a GRPOConfig. ``entropy_coef`` times the mean entropy of the tokens is subtracted from
            the loss: > 0 is a bonus for entropy, < 0 minimises it (EM-RL); with rewards all equal
            nothing else moves the weights.
        others: as trl.GRPOTrainer's. Among several parents this class comes before TRL's.

    Gradient: of log-probabilities and entropies, equation (8) of ``em_kernels.reference``.
    Precision: logits and statistics are fp32 whatever the model's dtype, log-probabilities of words
        the model is sure of included; under autocast the head's inputs are rounded to its dtype.
    Memory: as :func:`em_kernels.fused_token_stats`; of the tokens of the completions only.
    Raises: TypeError, ValueError for what is not supported: FSDP and DeepSpeed; images; the
        load-balancing loss of a mixture of experts; ``cast_lm_head_to_fp32``, which the precision
        above makes needless; an adapter on the head; an architecture whose logits are not its head
        applied to its hidden states.
    Source: GRPO, arXiv 2402.03300; entropy minimisation as a reward, arXiv 2505.15134.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "args: FSDP and DeepSpeed are not supported; use DDP, or trl.GRPOTrainer"
            )
        if self._is_vlm:
            raise TypeError("model: models of images are not supported; use trl.GRPOTrainer")
        if self.aux_loss_enabled:
            coefficient = self.router_aux_loss_coef
            raise ValueError(f"router_aux_loss_coef: {coefficient} is not supported; set it to 0")
        config: Any = self.args
        if config.cast_lm_head_to_fp32:
            raise ValueError("cast_lm_head_to_fp32: logits are fp32 without it; leave it False")
        model: Any = self.model
        _fuse(model.get_base_model() if is_peft_model(model) else model, self.temperature)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model, keep_torch_compile=False)
            _fuse(reference, self.temperature)


def _fuse(model: PreTrainedModel, temperature: float) -> None:
    """Answer TRL's calls ``model(..., labels=labels, fused_lm_head=True)``; others as before.

    In the model's own forward, as what wraps the model (DDP, PEFT) must see the call.
    """
    training, plain = model.training, model.forward
    check_head(model.eval(), head_of(model))
    model.train(training)

    @wraps(type(model).forward)  # generate looks at the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return plain(*args, labels=labels, **kwargs)
        assert labels is not None
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        head, targets = head_of(self), labels[:, 1:]
        stats = fused_token_stats(
            hidden[:, :-1],
            head.weight,
            targets,
            mask=targets != -100,
            temperature=temperature,
            **head.arguments(),
        )
        return FusedCausalLMOutput(log_probs=stats.logprob, entropy=stats.entropy)

    model.forward = MethodType(forward, model)
