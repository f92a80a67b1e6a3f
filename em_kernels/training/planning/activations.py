"""A model's forward and backward on tensors that have shapes and no memory: every byte counted."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig, masking_utils
from transformers.cache_utils import DynamicLayer
from transformers.initialization import no_init_weights
from transformers.integrations import moe
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ...hf import decoder_of, head_of, require_gradients
from ..config import TrainConfig
from ..engines.step import SharedPrefix, recomputation, scored_states
from ..models.loading import architecture, attention_of, refused_attention
from ..rollouts.padding import check_cache
from ..rollouts.sampling import Rollout
from ..settings import UserError, in_one_line

DEPTHS = (2, 3)  # of models that stand for a deep one whose layers are alike


class Sizes(NamedTuple):
    """Parameter and byte counts of a model."""

    weights: int  # bytes, a tied head once
    buffers: int  # bytes
    multiplied: int  # weights that a token is multiplied with
    linear: int  # weights of linear layers but the head
    trained: int  # parameters
    trained_bytes: int


class Activations(NamedTuple):
    """Bytes of a micro-batch beyond the model's own."""

    states: int  # rows that the head reads
    kept: int  # when the forward is done
    peak: int  # of forward and backward, gradients included


class _Live(TorchDispatchMode):
    """Counts the bytes of storages while they live."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {x.untyped_storage()._cdata for x in tensors}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self.seen.discard(key)

    def take_peak(self) -> int:
        """Since the last time."""
        peak, self.peak = self.peak, self.live
        return peak


class _Net:
    """A model of some depth."""

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str,
        lora: TrainConfig | None = None,
    ) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        if attention.startswith("flash"):  # keeps as much, and runs on GPUs only
            attention = "sdpa"
        try:
            with self.fake, no_init_weights():  # some ask for values
                self.model = AutoModelForCausalLM.from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=attention_of(attention, config),
                )
        except (ImportError, ValueError) as error:
            refused_attention(attention, error)
            raise
        self.model.tie_weights()
        self.model.eval()
        self.base = list(self.model.parameters())
        require_gradients(self.model)
        self.text = [p for p in self.base if p.requires_grad]
        if lora is not None:
            self._add_adapters(lora)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.live = _Live(self.model)
        self.prompt: tuple[tuple[int, bool], SharedPrefix, tuple[int, int]] | None = None

    def _add_adapters(self, lora: TrainConfig) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        from ..models.lora import adapted_layers

        self.model.requires_grad_(False)
        targets = list(adapted_layers(self.model, lora))
        settings = LoraConfig(r=lora.lora_rank, target_modules=targets)
        inject_adapter_in_model(settings, self.model, low_cpu_mem_usage=True)
        with self.fake:  # peft leaves them on the meta device
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None and p.requires_grad:
                        module._parameters[name] = nn.Parameter(torch.empty(p.shape))

    def sizes(self) -> Sizes:
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        linear = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D)}
        matrices = sum(p.numel() for p in self.text if p.dim() > 1)
        return Sizes(
            sum(p.nbytes for p in self.base),
            sum(b.nbytes for b in self.model.buffers()),
            matrices - (0 if embedding is head else embedding.numel()),
            sum(p.numel() for p in self.base if p in linear and p is not head),
            sum(p.numel() for p in self.trained),
            sum(p.nbytes for p in self.trained),
        )

    def run(self, rows: int, prompt: int, new: int, shared: bool, recompute: bool) -> list[int]:
        """States, bytes kept, peaks of: forward, backward of layers, its end, the same of the
        prompt's. Each is a linear function of the depth.
        """
        batch = [Rollout([0] * prompt, [0] * new, False)] * rows
        with self.fake, self.live, _without_values(), recomputation(self.model, recompute):
            begun, ahead = self._begin((prompt, recompute) if shared else None)
            self.live.take_peak()
            states = scored_states(self.model, batch, begun, False)
            if begun is not None:
                states = torch.cat([begun.last, states])
            count, kept, forward = len(states), self.live.live, self.live.take_peak()
            peaks = self._backward(lambda: states.backward(torch.zeros_like(states)))
            for leaf in begun.leaves if begun is not None else ():
                leaf.grad = None
        return [count, kept, forward, *peaks, *ahead]

    def _begin(self, key: tuple[int, bool] | None) -> tuple[SharedPrefix | None, tuple[int, int]]:
        """A prompt, kept until another is asked for, and the peaks of its backward."""
        if self.prompt is not None and self.prompt[0] != key:
            self.prompt = None
        if key is None:
            return None, (0, 0)
        if self.prompt is None:
            begun = SharedPrefix(self.model, [0] * key[0])
            self.live.take_peak()
            peaks = self._finish(begun)
            del begun
            self.prompt = key, SharedPrefix(self.model, [0] * key[0]), peaks
        return self.prompt[1:]

    def _finish(self, prompt: SharedPrefix) -> tuple[int, int]:
        for leaf in prompt.leaves:
            leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
        return self._backward(prompt.backward)

    def _backward(self, backward: Callable[[], object]) -> tuple[int, int]:
        """Peaks until the layers have their gradients, and after: that of the embedding."""
        embedding, layers = self.model.get_input_embeddings().weight, 0

        def drop(p: nn.Parameter) -> None:
            nonlocal layers
            if p is not embedding:
                layers = max(layers, self.live.take_peak())
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(drop) for p in self.trained]
        backward()
        for hook in hooks:
            hook.remove()
        return layers, self.live.take_peak()


@contextmanager
def _without_values() -> Iterator[None]:
    """transformers asks for the values of position ids, whether rows are packed; not of tensors
    without: it would make the mask of rows that are. And torch's grouped product, of experts, wants
    bf16 where it has no values; transformers' own takes any dtype, and as much memory.
    """
    packed, grouped = masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm
    masking_utils.find_packed_sequence_indices = lambda *_: None
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm = packed, grouped


@contextmanager
def _planned(config: PreTrainedConfig) -> Iterator[None]:
    """Turn what an architecture's own code raises on tensors without values into a UserError."""
    name, log = architecture(config), logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it prints a traceback of its own
    try:
        yield
    except UserError:
        raise
    except DataDependentOutputException as error:
        raise UserError(
            f"model: {name} decides by its tensors' values what it computes, so what that needs "
            "cannot be planned; this architecture is not supported"
        ) from error
    except Exception as error:
        text = in_one_line(error)
        if text.startswith("model: "):  # our own
            raise UserError(text) from error
        if "Unrecognized configuration class" in text:
            raise UserError(f"model: transformers opens {name} as no causal model") from error
        raise UserError(
            f"model: {name} cannot be planned ({type(error).__name__}: {text[:200]}); this "
            "architecture is not supported"
        ) from error
    finally:
        log.disabled = before


class Sketch:
    """A model as its config describes it, with adapters where the settings say so."""

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str = "auto",
        lora: TrainConfig | None = None,
    ) -> None:
        self.config = config
        with _planned(config):
            self._build(config, dtype, attention, lora)

    def _build(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str,
        lora: TrainConfig | None,
    ) -> None:
        whole = _Net(config, dtype, attention)
        check_cache(whole.model)
        self.words, self.width = head_of(whole.model).weight.shape
        parts = decoder_of(whole.model).modules()
        blocks = [m for m in parts if isinstance(m, GradientCheckpointingLayer)]
        kinds = [(type(m), [p.shape for p in m.parameters()]) for m in blocks]
        caches = [type(layer) for layer in DynamicCache(config=config).layers]
        self.layers = len(caches)
        self.can_share = set(caches) == {DynamicLayer}
        self.itemsize = dtype.itemsize
        alike = self.can_share and len(blocks) == self.layers and kinds == kinds[:1] * self.layers
        one = lora is not None and any(s.isdigit() for t in lora.lora_targets for s in t.split("."))
        if alike and self.layers > sum(DEPTHS) and not one:  # of single layers, by their number
            self.nets = [_Net(_of_depth(config, depth), dtype, attention, lora) for depth in DEPTHS]
        else:
            self.nets = [_Net(config, dtype, attention, lora) if lora else whole]
        self.sizes = Sizes(*self._whole([net.sizes() for net in self.nets]))
        linear = [m for m in whole.model.modules() if isinstance(m, nn.Linear | Conv1D)]
        self.largest = max(m.weight.numel() for m in linear if len(m.weight) != self.words)
        self.runs: dict[tuple, Activations] = {}

    def _whole(self, values: Any) -> list[int]:
        """Extrapolate linearly from the 2- and 3-layer models to full depth."""
        if len(values) == 1:
            return list(values[0])
        more, step = self.layers - DEPTHS[1], DEPTHS[1] - DEPTHS[0]
        return [b + (b - a) * more // step for a, b in zip(*values, strict=True)]

    def run(self, rows: int, prompt: int, new: int, shared: bool, recompute: bool) -> Activations:
        """Rows of so many prompt and new tokens, through the update's own forward and backward."""
        key = (rows, prompt, new, shared, recompute)
        if key not in self.runs:
            with _planned(self.config):
                count, kept, *peaks = self._whole([net.run(*key) for net in self.nets])
            self.runs[key] = Activations(count, kept, max(peaks))
        return self.runs[key]

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of one row."""
        found = []
        for net in self.nets:
            cache = DynamicCache(config=net.model.config)
            with _planned(self.config), net.fake, torch.no_grad(), _without_values():
                ids = torch.zeros(1, tokens, dtype=torch.int64)
                decoder_of(net.model)(input_ids=ids, past_key_values=cache, use_cache=True)
            kept: list[Any] = cache.layers  # some share others', and have none
            found.append([sum(x.keys.nbytes + x.values.nbytes for x in kept if x.keys is not None)])
        return self._whole(found)[0]


def _of_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config
