"""Who holds a model's weights and its optimizer's state on how many ranks, and adds up gradients.

All compute the same update: clip, AdamW on fp32 masters, the mean over the tokens of all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..functional import entropy_loss_into
from ..hf import check_head, head_of, require_gradients
from .checkpoint import Writer, write_model
from .config import TrainConfig, UserError
from .optimizer import MasterAdamW
from .padding import check_cache, check_sampling
from .ranks import Ranks
from .rollout import Rollout
from .step import StepLoss, can_share_prefix, entropy_step


def engine_of(kind: str) -> "type[Engine]":
    """Of a World."""
    if kind == "replicas":
        return Replicas
    from .wrapped import DeepSpeed, Fsdp2  # torch's part of it takes a second

    return {"fsdp2": Fsdp2, "deepspeed": DeepSpeed}[kind]


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
        """Whether rows of unequal length may be sampled side by side.

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

    def whole(self) -> AbstractContextManager[object]:
        """In it each rank may call the model by itself."""
        return nullcontext()

    @abstractmethod
    def learn(
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
        """What fills a folder with the model, on rank 0."""

    def close(self) -> None:  # noqa: B027
        """Leave the model to itself."""


class Replicas(Engine):
    """Each rank has all of it, in the trainer's own optimizer; gradients are added up once an
    update. One process is the special case.
    """

    retries = True

    def prepare(self) -> None:
        model, config = self.model, self.config
        if config.mode == "lora":  # before any forward, see there
            from .lora import add_adapters, write_adapter  # peft takes seconds

            self.write = write_adapter(add_adapters(model, config), self.tokenizer)
        else:
            self.write = write_model(model, self.tokenizer)
        self.check_model()
        if config.mode != "lora":
            require_gradients(model)
        self.head = head_of(model)
        if config.share_prefix and not can_share_prefix(model):
            self.config = config.model_copy(update={"share_prefix": False})
        assert config.lr is not None
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        self.optimizer = MasterAdamW(
            model.named_parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            clip=config.clip,
            device=torch.device("cpu") if config.mode == "offload" else self.ranks.device,
            moments=dtypes[config.moments],
            gradients=dtypes[config.gradients],
            folder=config.offload_dir if config.mode == "offload" else None,
        )

    def learn(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        self.optimizer.clear()
        return entropy_step(
            self.model,
            self.head,
            rollouts,
            self.config,
            self.optimizer,
            micro_batch,
            check,
            self.ranks.index,
            self.ranks.count,
        )

    def norm(self) -> float:
        if self.ranks.count > 1:
            self.optimizer.add_up(self.ranks)
        return self.optimizer.norm()

    def step(self, norm: float) -> None:
        self.optimizer.step(norm)

    def state(self) -> Mapping[str, Tensor]:
        return self.optimizer.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.optimizer.load(state)

    def writer(self) -> Writer:
        return self.write

    def close(self) -> None:
        self.optimizer.close()
