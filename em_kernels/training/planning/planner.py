"""Plan a run before anything is loaded: a mode that fits, its batch sizes, memory, disk and time.

Needs the model's config alone: activations are measured on fake tensors, the rest is arithmetic.
"""

import shutil
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...ops.free_memory import free_host_bytes
from ...ops.memory import free_bytes
from ..config import FULL_LR, LORA_LR, TrainConfig
from ..distributed import LaunchSpec
from ..engines.optimizer import PRECISIONS, SLAB
from ..models.loading import attention_of, auto_dtype, capability_of, has_flash_attention
from ..models.rounding import LENGTH
from ..settings import UserError
from . import components
from .activations import ModelMemory
from .batch_sizes import BatchSizes
from .cpu_speed import measured_rates
from .gpus import Card, card_of, gpu_rates
from .plan import CPU_RATES, GIB, Plan, cheaper, peak

ONE_PROCESS = LaunchSpec()


class Planner:
    """Plans one process of a run; measurements of one mode are reused for the others.

    Args:
        download: bytes to download; None: all weights, in the dtype that the config names.
        loaded_bytes: those of the model that are on the device already.
        measure_speed: take this CPU's speed for the plan's seconds; where the layers differ or
            need other inputs, the estimates stay.
        card: plan for this GPU in place of the one that is here.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: PreTrainedConfig,
        prompt_tokens: int,
        device: torch.device,
        download: int | None = 0,
        loaded_bytes: int = 0,
        launch: LaunchSpec = ONE_PROCESS,
        measure_speed: bool = False,
        card: Card | None = None,
    ) -> None:
        self.model_config, self.prompt_tokens = model_config, prompt_tokens
        self.download, self.launch = download, launch
        self.cuda, self.rates = device.type == "cuda", CPU_RATES
        self.card = (card or card_of(device)) if self.cuda else None
        self.measure_speed = measure_speed and not self.cuda
        if config.dtype == "auto":
            capability = card.capability if card else capability_of(device)
            dtype = auto_dtype(device.type, capability)
            config = config.model_copy(update={"dtype": dtype})
        if launch.engine != "replicas":
            config = sharded_settings(config, launch.engine)
        self.config, self.dtype = config, getattr(torch, config.dtype)
        host = free_host_bytes() if config.host_memory is None else int(config.host_memory * GIB)
        limit = host // launch.on_machine
        if config.host_memory is None and not self.cuda:
            limit += loaded_bytes + components.CPU_PROCESS_BYTES  # which this process holds now
        self.device_limit = self.host_limit = limit
        if card is not None:
            self.device_limit = int(card.usable_gib * GIB)
        elif self.cuda and config.gpu_memory is not None:
            self.device_limit = int(config.gpu_memory * GIB)
        elif self.cuda and torch.cuda.is_available():
            # Asking creates the context; its libraries are loaded later.
            context = components.CONTEXT_BYTES - components.LIBRARIES_BYTES
            self.device_limit = free_bytes(device) + loaded_bytes + context
        elif self.cuda:
            remedy = "give the GiB of one to plan for, or name it with plan --gpu"
            raise UserError(f"gpu_memory: torch sees no CUDA GPU; {remedy}")
        self.models: dict[tuple | None, ModelMemory] = {}
        self.plans: dict[str, Plan] = {}

    def resolve(self) -> Plan:
        """Return the plan of a run that starts now.

        Raises: UserError where nothing fits: what is missing, and what would help, cheapest first.
        """
        plan, output = self.choose(), self.config.output
        if not plan.fits:
            help = f"try {', or '.join(plan.remedies)}" if plan.remedies else "take a smaller model"
            raise UserError(f"memory: mode {plan.name}: {'; '.join(plan.problems)}; {help}")
        absolute = output.absolute()
        there = next(path for path in (absolute, *absolute.parents) if path.exists())
        free = shutil.disk_usage(there).free
        need = sum(size for name, size in plan.disk.items() if not name.endswith("(offload)"))
        need -= sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        if need > free:
            sizes = f"{free / GIB:.1f} GiB of disk free, the run writes up to {need / GIB:.1f}"
            remedy = "keep less with --save-at, --keep or --save-optimizer False"
            raise UserError(f"output: {output} has {sizes}; {remedy}")
        return plan

    def modes(self) -> list[Plan]:
        """Plan each mode that the objective allows, whatever the settings say."""
        folder = self.config.offload_dir or self.config.output / "offload"
        plain: dict[str, Any] = {"offload_dir": None, "four_bit": False}
        full, offload, lora = ({**plain, "mode": mode} for mode in ("full", "offload", "lora"))
        modes = [full, offload, offload | {"offload_dir": folder}, lora, lora | {"four_bit": True}]
        if self.launch.engine != "replicas":
            del modes[1:]
        elif not self.cuda:  # host and device share their memory, and 4 bits need a GPU
            del modes[4], modes[1]
        return [self.plan(self.config.model_copy(update=mode)) for mode in modes]

    def choose(self) -> Plan:
        """Pick the first allowed mode that fits; else the last one, with remedies."""
        modes: list[Any] = [self.config.mode]
        if modes == ["auto"]:
            modes = ["full", "offload", "lora"] if self.cuda else ["full", "lora"]
            if self.config.four_bit:
                modes = ["lora"]
            elif self.config.offload_dir:
                modes = ["offload"]
        for mode in modes:
            folder = self.config.offload_dir if mode == "offload" else None
            asked = self.config.model_copy(update={"mode": mode, "offload_dir": folder})
            plan = self.plan(asked)
            if plan.fits:
                return plan
        return replace(plan, remedies=self._remedies(asked))

    def _remedies(self, config: TrainConfig) -> tuple[str, ...]:
        """Return up to three flags, cheapest first, each of which is enough; one that costs nothing
        ends the list. If none is enough, join flags in that order into one text, until they are.
        """
        flags, found = cheaper(config, self.cuda, self.launch.engine), list[str]()
        for flag, change in flags.items():
            if self.plan(config.model_copy(update=change)).fits:
                found.append(flag)
                if "auto" in change.values() or len(found) == 3:
                    break
        if found:
            return tuple(found)
        for flag, change in flags.items():
            config, found = config.model_copy(update=change), [*found, flag]
            if self.plan(config).fits:
                return (" with ".join(found),)
        return ()

    def model_memory(self, config: TrainConfig) -> ModelMemory:
        """Return the measured memory of the model with the adapters of a config; measures once."""
        key = (config.lora_rank, config.lora_targets) if config.mode == "lora" else None
        if key not in self.models:
            lora = config if key else None
            model = ModelMemory(self.model_config, self.dtype, config.attention, lora)
            self.models[key] = model
            if self.measure_speed and (layer := model.layer_bytes):
                self.measure_speed = False
                with suppress(Exception):  # Some architectures want more than token ids.
                    sampling = config.sampling
                    self.rates = measured_rates(self.model_config, layer, self.dtype, sampling)
        return self.models[key]

    def plan(self, config: TrainConfig) -> Plan:
        """Plan a config, with the highest "auto" precisions that leave room for good batches."""
        key = config.model_dump_json()
        if key not in self.plans:
            plans: list[Plan] = []
            for moments, gradients in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
                wanted = {"moments": moments, "gradients": gradients}
                wanted = {k: v for k, v in wanted.items() if getattr(config, k) == "auto"}
                plans.append(self._plan_exactly(config.model_copy(update=wanted)))
                if plans[-1].fits and plans[-1].pays:
                    break
            self.plans[key] = max(plans, key=lambda plan: plan.merit)
        return self.plans[key]

    def _plan_exactly(self, config: TrainConfig) -> Plan:
        """Plan with the mode and precision of a config, and with the largest batches that fit."""
        model, cuda, lora = self.model_memory(config), self.cuda, config.mode == "lora"
        sizes, trained = model.sizes, model.sizes.trained_parameters
        state_bytes = trained * (4 + 2 * PRECISIONS[config.moments].itemsize)
        if config.save_optimizer == "auto":
            save_optimizer = state_bytes <= components.SMALL_STATE_BYTES
            config = config.model_copy(update={"save_optimizer": save_optimizer})
        if self.launch.engine == "replicas":
            device, host, disk = components.fixed_bytes(config, model, cuda)
        else:
            device, host, disk = components.sharded_bytes(config, model, self.launch, cuda)
        if cuda:
            device["spare"] = int(components.SPARE_SHARE * self.device_limit)
        room = self.device_limit - sum(device.values())
        lost = components.FRAGMENTED_SHARE if cuda else components.CPU_FRAGMENTED_SHARE
        room = int(room / (1 + lost))
        chunk = config.chunk_bytes or components.default_chunk_bytes(model, self.device_limit, cuda)
        card, rates = self.card, self.rates
        if card is not None:
            rates = gpu_rates(card, config.sampling, model.vocab_size)
        given = model, self.prompt_tokens, self.launch.ranks, cuda, chunk, room
        batches = BatchSizes(config, *given)
        if config.share_prefix == "auto" and batches.may_be_faster_alone(rates):
            alone = BatchSizes(config.model_copy(update={"share_prefix": False}), *given)
            batches = min(batches, alone, key=lambda sizes: sizes.cost(rates))
        passing = {**batches.passing, "rounding": 0, "bf16 copy": 0}
        if device.get("master"):
            passing["rounding"] = 2 * min(SLAB, trained) + 4 * min(LENGTH, SLAB, trained)
        if not cuda and (copy := components.bf16_copy_bytes(config, model)):
            passing["bf16 copy"] = copy + components.NOISE_BYTES
        device["fragments"] = int(lost * peak(passing))
        flash = cuda and model.itemsize == 2 and has_flash_attention()
        complete = {
            "lr": config.lr or (LORA_LR if lora else FULL_LR),
            "attention": attention_of(config.attention, self.model_config, flash),
        }
        config = config.model_copy(update={**complete, **batches.settings})
        saved = len({step for step in config.save_at if step < config.steps} | {config.steps})
        kept = min(saved, config.keep + 1) if config.keep else saved
        checkpoint = sizes.trained_bytes if lora else 2 * sizes.weight_bytes // model.itemsize
        disk["checkpoints"] = kept * checkpoint
        if config.save_optimizer:  # the next state is written before the last one is removed
            disk["optimizer state"] = state_bytes * min(2, saved)
        weights, download = sizes.weight_bytes // model.itemsize, self.download
        if download is None:
            download = weights * getattr(self.model_config.dtype, "itemsize", 2)
        return Plan(
            config=config,
            device={**device, **passing},
            host=host,
            device_limit=self.device_limit,
            host_limit=self.host_limit,
            disk=disk,
            download=download,
            seconds=batches.update_seconds(config, rates),
            once={
                "download": download / rates.download,
                "loading": sizes.weight_bytes / rates.disk,
                "checkpoints": saved * checkpoint / rates.disk,
            },
            rates=rates,
            card=card.name if card else "",
            pays=batches.efficient,
        )


def sharded_settings(config: TrainConfig, engine: str) -> TrainConfig:
    """Return the settings as FSDP2 and DeepSpeed need them; UserError for other wishes."""
    only: dict[str, Any] = {"mode": "full", "moments": "fp32", "gradients": "fp32"}
    for name, value in only.items():
        if (asked := getattr(config, name)) not in ("auto", value):
            why = f"{asked} does not go with {engine}, which has {value}"
            raise UserError(f"{name}: {why}; launch without {engine}")
    if config.dtype == "float16":
        why = f"float16 needs a loss whose scale adapts, which {engine} does not get here"
        raise UserError(f"dtype: {why}; use float32 or bfloat16, or launch without {engine}")
    for name in ("four_bit", "offload_dir", "kl_weight"):
        if getattr(config, name):
            raise UserError(f"{name}: does not go with {engine}; launch without {engine}")
    # A shared prompt would need a backward of its own through every layer.
    return config.model_copy(update={**only, "share_prefix": False})
