"""The engine of one process, or of several that each hold the whole model; wrapped.py has others.

All engines compute the same update: the mean over all ranks' tokens, clip, AdamW on fp32 masters.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hf import check_head, head_of, require_gradients
from ...streamed_loss import divergence_into, entropy_loss_into
from ..config import TrainConfig
from ..distributed import Ranks
from ..rollouts.kv_cache import check_cache
from ..rollouts.padding import check_sampling
from ..rollouts.sampling import Rollout
from ..runs.checkpoint import Writer, write_model
from ..settings import UserError
from .optimizer import PRECISIONS, MasterAdamW, adamw_options
from .shared_prefix import can_share_prefix
from .step import StepLoss, entropy_step, scoring_of


class Engine:
    """A model in training, whole on each rank, with the trainer's own optimizer; gradients are
    added up once an update. Every rank makes the same calls.
    """

    retries = True  # a rank that runs out of memory may compute its share again, alone
    base: PreTrainedModel | None = None  # a copy of what the run began with, for kl_weight

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        self.model, self.tokenizer, self.config, self.ranks = model.eval(), tokenizer, config, ranks
        self.scoring = scoring_of(config, tokenizer)
        self.prepare()

    def check_model(self) -> bool:
        """Return True if unequally long prompts can share a batch; UserError for an unfit model."""
        try:
            head = head_of(self.model)
            check_head(self.model, head)
            check_cache(self.model)
            weight, chunk_bytes = head.weight.detach(), self.config.chunk_bytes
            token = weight.new_zeros(1, weight.shape[1])
            entropy_loss_into(None, token, weight, chunk_bytes=chunk_bytes)  # checks its arguments
            if self.config.kl_weight:
                divergence_into(None, token, weight, token, weight, chunk_bytes=chunk_bytes)
            return check_sampling(self.model)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    def prepare(self) -> None:
        """Make the optimizer; raise UserError for a model or settings that do not suit."""
        model, config = self.model, self.config
        if config.mode == "lora":  # add_adapters comes before any forward
            from ..models.lora import add_adapters, write_adapter  # peft takes seconds

            self.write = write_adapter(add_adapters(model, config), self.tokenizer)
        else:
            self.write = write_model(model, self.tokenizer)
        self.check_model()
        if config.mode != "lora":
            require_gradients(model)
        if config.kl_weight and config.mode != "lora":  # before a checkpoint is loaded
            self.base = copy.deepcopy(model).requires_grad_(False)
        if config.share_prefix and not can_share_prefix(model):
            self.config = config.model_copy(update={"share_prefix": False})
        offload = config.mode == "offload"
        self.optimizer = MasterAdamW(
            model.named_parameters(),
            **adamw_options(config),
            clip=config.clip,
            device=torch.device("cpu") if offload else self.ranks.device,
            moments=PRECISIONS[config.moments],
            gradients=PRECISIONS[config.gradients],
            folder=config.offload_dir if offload else None,
        )

    def gathered_weights(self) -> AbstractContextManager[object]:
        """Return a context in which each rank may call the model by itself."""
        return nullcontext()

    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        """Compute this rank's share of the gradient anew, and return its share of the loss."""
        self.optimizer.clear()
        return entropy_step(
            self.model,
            head_of(self.model),
            rollouts,
            self.config,
            self.optimizer,
            micro_batch,
            check,
            self.ranks.index,
            self.ranks.count,
            self.scoring,
            self.base,
        )

    def norm(self) -> float:
        """Return the global L2 norm of all ranks' gradient."""
        if self.ranks.count > 1:
            self.optimizer.add_up(self.ranks)
        return self.optimizer.norm()

    def halve_scale(self) -> bool:
        """Halve what multiplies the gradients of fp16 weights; False if that is 1 already."""
        return self.optimizer.halve_scale()

    def step(self, norm: float) -> None:
        """Update the weights with the gradient, clipped by its norm(), and forget the gradient."""
        self.optimizer.step(norm)

    def state(self) -> Mapping[str, Tensor]:
        """Return tensors named as in MasterAdamW.state(), unsharded; needed on rank 0 only."""
        return self.optimizer.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state(), which every rank is given whole."""
        self.optimizer.load(state)

    def writer(self) -> Writer:
        """Return a writer that fills a folder with the model, on rank 0."""
        return self.write

    def close(self) -> None:
        """Release the model."""
        self.optimizer.close()
