"""Who holds a model's weights and its optimizer's state on how many ranks, and adds up gradients.

All compute the same update: clip, AdamW on fp32 masters, the mean over the tokens of all ranks.
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
    """A model in training. Every rank makes the same calls.

    retries: a rank that runs out of memory may do its part again, alone.
    """

    retries = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        ranks: Ranks,
    ) -> None:
        self.model, self.tokenizer, self.config, self.ranks = model.eval(), tokenizer, config, ranks
        self.prepare()  # eval: no dropout

    def check_model(self) -> bool:
        """Check the model; true if rows of unequal length may be sampled side by side.

        Raises: UserError where the loss would not be of the model's own distribution, or what is
            sampled not its own.
        """
        try:
            head = head_of(self.model)
            check_head(self.model, head)
            check_cache(self.model)
            token = head.weight.new_zeros(1, head.weight.shape[1])
            weight, chunk_bytes = head.weight.detach(), self.config.chunk_bytes
            entropy_loss_into(None, token, weight, chunk_bytes=chunk_bytes)  # chunk_bytes
            return check_sampling(self.model)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error

    @abstractmethod
    def prepare(self) -> None:
        """Make the optimizer; whatever does not suit is refused."""

    def gathered_weights(self) -> AbstractContextManager[object]:
        """In it each rank may call the model by itself."""
        return nullcontext()

    @abstractmethod
    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        """This rank's part of the gradient, anew, and of the loss."""

    @abstractmethod
    def norm(self) -> float:
        """Global L2 norm of the gradient of all ranks."""

    @abstractmethod
    def step(self, norm: float) -> None:
        """Update the weights, the gradient's norm() clipped; forget the gradient."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """As MasterAdamW has it, whole, on rank 0."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state(), given whole on every rank."""

    @abstractmethod
    def writer(self) -> Writer:
        """A writer that fills a folder with the model, on rank 0."""

    def close(self) -> None:  # noqa: B027
        """Leave the model to itself."""
