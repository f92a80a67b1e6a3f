"""The engine in which every rank holds the whole model, with the trainer's own optimizer."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...hf import head_of, require_gradients
from ..rollouts.sampling import Rollout
from ..runs.checkpoint import Writer, write_model
from .base import Engine
from .optimizer import PRECISIONS, MasterAdamW, adamw_options
from .step import StepLoss, can_share_prefix, entropy_step


class Replicas(Engine):
    """Each rank holds the whole model and optimizer; gradients are added up once an update. One
    process is the special case.
    """

    retries = True

    def prepare(self) -> None:
        model, config = self.model, self.config
        if config.mode == "lora":  # add_adapters comes before any forward
            from ..models.lora import add_adapters, write_adapter  # peft takes seconds

            self.write = write_adapter(add_adapters(model, config), self.tokenizer)
        else:
            self.write = write_model(model, self.tokenizer)
        self.check_model()
        if config.mode != "lora":
            require_gradients(model)
        self.head = head_of(model)
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

    def forward_backward(
        self, rollouts: Sequence[Rollout], micro_batch: int, check: Callable[[], None]
    ) -> StepLoss:
        self.optimizer.clear()
        model, head, rank = self.model, self.head, (self.ranks.index, self.ranks.count)
        return entropy_step(
            model, head, rollouts, self.config, self.optimizer, micro_batch, check, *rank
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
