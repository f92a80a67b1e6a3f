"""The interface of an engine, which holds a model's weights and optimizer on one or more ranks.

All engines compute the same update: the mean over all ranks' tokens, clip, AdamW on fp32 masters.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...functional import entropy_loss_into
from ...hf import check_head, head_of
from ..config import TrainConfig
from ..distributed import Ranks
from ..rollouts.padding import check_cache, check_sampling
from ..rollouts.sampling import Rollout
from ..runs.checkpoint import Writer
from ..settings import UserError
from .step import StepLoss


class Engine(ABC):
    """A model in training. Every rank makes the same calls."""

    retries = False  # a rank that runs out of memory may compute its share again, alone

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        self.model, self.tokenizer, self.config, self.ranks = model.eval(), tokenizer, config, ranks
        self.prepare()

    def check_model(self) -> bool:
        """Check the model; return True if prompts of unequal length may be sampled side by side.

        Raises: UserError where loss or samples would not be of the model's own distribution.
        """
        try:
            head = head_of(self.model)
            check_head(self.model, head)
            check_cache(self.model)
            weight, chunk_bytes = head.weight.detach(), self.config.chunk_bytes
            token = weight.new_zeros(1, weight.shape[1])
            entropy_loss_into(None, token, weight, chunk_bytes=chunk_bytes)  # checks its arguments
            return check_sampling(self.model)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    @abstractmethod
    def prepare(self) -> None:
        """Make the optimizer; raise UserError for a model or settings that do not suit."""

    def gathered_weights(self) -> AbstractContextManager[object]:
        """Return a context in which each rank may call the model by itself."""
        return nullcontext()

    @abstractmethod
    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        """Compute this rank's share of the gradient anew, and return its share of the loss."""

    @abstractmethod
    def norm(self) -> float:
        """Return the global L2 norm of all ranks' gradient."""

    @abstractmethod
    def step(self, norm: float) -> None:
        """Update the weights with the gradient, clipped by its norm(), and forget the gradient."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Return what MasterAdamW.state() does, whole, on rank 0."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state(), which every rank is given whole."""

    @abstractmethod
    def writer(self) -> Writer:
        """Return a writer that fills a folder with the model, on rank 0."""

    def close(self) -> None:  # noqa: B027
        """Release the model."""
