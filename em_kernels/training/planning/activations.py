"""Memory of a model, measured by running it on fake tensors, which have shapes but no storage."""

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
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
from ..engines.shared_prefix import SharedPrefix
from ..engines.step import recomputation, scored_states
from ..models.loading import architecture, attention_of, refused_attention
from ..rollouts.kv_cache import check_cache, grouped_attention, new_cache
from ..rollouts.sampling import Rollout
from ..settings import UserError, in_one_line

FREE = ("view", "empty", "detach")  # in names of operations that launch nothing on a GPU
DEPTHS = (2, 3)  # layers of the models that are run in place of a deep one with identical layers


class ParameterSizes(NamedTuple):
    """Parameter and byte counts of a model."""

    weight_bytes: int  # a tied head counts once
    buffer_bytes: int
    matrix_parameters: int  # that each token is multiplied with
    linear_parameters: int  # in linear layers, without the head
    trained_parameters: int
    trained_bytes: int
    largest_linear: int  # parameters of the largest linear layer but the head


class ActivationBytes(NamedTuple):
    """Memory of a micro-batch beyond the model's own."""

    head_rows: int  # hidden states that the head reads
    after_forward: int  # kept for the backward
    peak: int  # of forward and backward, gradients included


class _LiveBytes(TorchDispatchMode):
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
        """Return the peak since the last call."""
        peak, self.peak = self.peak, self.live
        return peak


class _Launches(TorchDispatchMode):
    """Counts operations that launch work on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        free = func.is_view or func.namespace == "prim"
        self.count += not free and not any(part in func.__name__ for part in FREE)
        return func(*args, **(kwargs or {}))


class FakeModel:
    """A model of fake tensors; lora: the settings of its adapters."""

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, attention: str, lora: TrainConfig | None
    ) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        if attention.startswith("flash"):  # runs on GPUs only, and sdpa keeps as much memory
            attention = "sdpa"
        implementation = attention_of(attention, config)
        try:
            # Some architectures read their weights' values when they initialise them.
            with self.fake, no_init_weights():
                self.model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=implementation
                )
        except (ImportError, ValueError) as error:
            refused_attention(attention, error)
            raise
        self.model.tie_weights()
        self.model.eval()
        self.base = list(self.model.parameters())
        require_gradients(self.model)
        self.text = [p for p in self.base if p.requires_grad]  # no vision tower's
        if lora is not None:
            self._add_adapters(lora, dtype)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.live = _LiveBytes(self.model)
        # The last run's shared prompt: (tokens, recompute), the prompt, and its backward's peaks.
        self.prefix_key: tuple[int, bool] | None = None
        self.prefix: SharedPrefix | None = None
        self.prefix_peaks = (0, 0)

    def _add_adapters(self, lora: TrainConfig, dtype: torch.dtype) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        from ..models.lora import adapted_layers

        self.model.requires_grad_(False)
        targets = list(adapted_layers(self.model, lora))
        settings = LoraConfig(r=lora.lora_rank, target_modules=targets)
        inject_adapter_in_model(settings, self.model, low_cpu_mem_usage=True)
        with self.fake:  # peft leaves adapters on the meta device
            for module in self.model.modules():
                for name, p in module._parameters.items():
                    if p is not None and p.requires_grad:
                        module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype))

    def sizes(self) -> ParameterSizes:
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        linear = {m.weight for m in self.model.modules() if isinstance(m, nn.Linear | Conv1D)}
        matrices = sum(p.numel() for p in self.text if p.dim() > 1)
        return ParameterSizes(
            sum(p.nbytes for p in self.base),
            sum(b.nbytes for b in self.model.buffers()),
            matrices - (0 if embedding is head else embedding.numel()),
            sum(p.numel() for p in self.base if p in linear and p is not head),
            sum(p.numel() for p in self.trained),
            sum(p.nbytes for p in self.trained),
            max(p.numel() for p in self.base if p in linear and len(p) != len(head)),
        )

    def launches(self) -> int:
        """Return the operations that a token launches while it is sampled, linear in the depth."""
        with self.fake, torch.no_grad(), without_values(), grouped_attention():
            cache, ids = new_cache(self.model, 2), torch.zeros(1, 1, dtype=torch.int64)
            self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            with _Launches() as launched:
                self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return launched.count

    def run(self, rows: int, prompt: int, new: int, shared: bool, recompute: bool) -> list[int]:
        """Return seven numbers, each linear in the depth: rows that the head reads; bytes after the
        forward; peaks of the forward, of the layers' backward, of the embedding's backward; and of
        these two backwards for the shared prompt.
        """
        batch = [Rollout([0] * prompt, [0] * new, False)] * rows
        with self.fake, self.live, without_values(), recomputation(self.model, recompute):
            key = (prompt, recompute) if shared else None
            if key != self.prefix_key:
                self.prefix_key, self.prefix, self.prefix_peaks = key, None, (0, 0)
                if shared:
                    self.prefix_peaks = self._peaks_of_prefix(prompt)
                    self.prefix = SharedPrefix(self.model, [0] * prompt)
            self.live.take_peak()
            states = scored_states(self.model, batch, self.prefix)
            if self.prefix is not None:
                states = torch.cat([self.prefix.last, states])
            count, kept, forward = len(states), self.live.live, self.live.take_peak()
            peaks = self._backward_peaks(lambda: states.backward(torch.zeros_like(states)))
            for leaf in self.prefix.leaves if self.prefix is not None else ():
                leaf.grad = None
        return [count, kept, forward, *peaks, *self.prefix_peaks]

    def _peaks_of_prefix(self, prompt: int) -> tuple[int, int]:
        """Return the peaks of a shared prompt's backward, which frees its graph."""
        prefix = SharedPrefix(self.model, [0] * prompt)
        self.live.take_peak()
        for leaf in prefix.leaves:
            leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
        return self._backward_peaks(prefix.backward)

    def _backward_peaks(self, backward: Callable[[], object]) -> tuple[int, int]:
        """Return the peaks of the layers' gradients, and of the embedding's after those."""
        embedding, layers_peak = self.model.get_input_embeddings().weight, 0

        def drop(p: nn.Parameter) -> None:
            nonlocal layers_peak
            if p is not embedding:
                layers_peak = max(layers_peak, self.live.take_peak())
            p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(drop) for p in self.trained]
        backward()
        for hook in hooks:
            hook.remove()
        return layers_peak, self.live.take_peak()


@contextmanager
def without_values() -> Iterator[None]:
    """Keep transformers from what fails on fake tensors: position ids without values, and torch's
    grouped product of experts, which takes bf16 only; transformers' own takes as much memory.
    """
    packed, grouped = masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm
    masking_utils.find_packed_sequence_indices = lambda *_: None
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._can_use_grouped_mm = packed, grouped


@contextmanager
def _as_user_error(config: PreTrainedConfig) -> Iterator[None]:
    """Turn what an architecture's own code raises on fake tensors into a UserError."""
    name, log = architecture(config), logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it prints a traceback of its own
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = in_one_line(error)
        problem = f"cannot be planned ({type(error).__name__}: {text[:200]})"
        if text.startswith("model: "):  # raised by this library
            raise UserError(text) from error
        if isinstance(error, DataDependentOutputException):
            how = "decides by its tensors' values what it computes"
            problem = f"{how}, so its memory cannot be planned"
        elif "Unrecognized configuration class" in text:
            raise UserError(f"model: transformers has no causal model for {name}") from error
        raise UserError(f"model: {name} {problem}; this architecture is not supported") from error
    finally:
        log.disabled = before


class ModelMemory:
    """Parameter, activation and KV cache sizes of a model, from its config alone."""

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attention: str = "auto",
        lora: TrainConfig | None = None,
    ) -> None:
        self.config, self.itemsize = config, dtype.itemsize
        self._measured: dict[tuple, ActivationBytes] = {}
        self._caches: dict[int, int] = {}
        with _as_user_error(config):
            whole = FakeModel(config, dtype, attention, None)
            check_cache(whole.model)
            self.vocab_size, self.hidden_size = head_of(whole.model).weight.shape
            shapes = [
                (type(block), [p.shape for p in block.parameters()])
                for block in decoder_of(whole.model).modules()
                if isinstance(block, GradientCheckpointingLayer)
            ]
            caches = [type(layer) for layer in DynamicCache(config=config).layers]
            self.layers, self.can_share_prefix = len(caches), set(caches) == {DynamicLayer}
            alike = shapes == shapes[:1] * self.layers
            # A target such as layers.3.q_proj adapts single layers, which then differ.
            targets = lora.lora_targets if lora is not None else ()
            numbered = any(part.isdigit() for target in targets for part in target.split("."))
            if alike and self.can_share_prefix and self.layers > sum(DEPTHS) and not numbered:
                configs = [with_depth(config, depth) for depth in DEPTHS]
                self.models = [FakeModel(c, dtype, attention, lora) for c in configs]
            else:
                self.models = [FakeModel(config, dtype, attention, lora) if lora else whole]
            sizes = [model.sizes() for model in self.models]
            self.sizes = ParameterSizes(*self._full_depth(sizes))
            # Of one of the layers; 0 if these are not alike.
            self.layer_bytes = sizes[-1].weight_bytes - sizes[0].weight_bytes

    def _full_depth(self, values: Any) -> list[int]:
        """Extrapolate linearly from the 2- and 3-layer models to full depth."""
        if len(values) == 1:
            return list(values[0])
        more, step = self.layers - DEPTHS[1], DEPTHS[1] - DEPTHS[0]
        return [b + (b - a) * more // step for a, b in zip(*values, strict=True)]

    def activations(
        self, rows: int, prompt_tokens: int, new_tokens: int, shared: bool, recompute: bool
    ) -> ActivationBytes:
        """Return a micro-batch's memory, measured by the trainer's own forward and backward."""
        key = (rows, prompt_tokens, new_tokens, shared, recompute)
        if key not in self._measured:
            with _as_user_error(self.config):
                runs = [model.run(*key) for model in self.models]
            head_rows, kept, *peaks = self._full_depth(runs)
            self._measured[key] = ActivationBytes(head_rows, kept, max(peaks))
        return self._measured[key]

    @cached_property
    def launches(self) -> int:
        """Operations that the model, unquantised, launches in a step of sampling."""
        with _as_user_error(self.config):
            return self._full_depth([[model.launches()] for model in self.models])[0]

    def cache_bytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of one completion."""
        if tokens not in self._caches:
            self._caches[tokens] = self._measure_cache(tokens)
        return self._caches[tokens]

    def _measure_cache(self, tokens: int) -> int:
        found = []
        for fake in self.models:
            cache = DynamicCache(config=fake.model.config)
            with _as_user_error(self.config), fake.fake, torch.no_grad(), without_values():
                ids = torch.zeros(1, tokens, dtype=torch.int64)
                decoder_of(fake.model)(input_ids=ids, past_key_values=cache, use_cache=True)
            layers: list[Any] = cache.layers
            filled = [x for x in layers if x.keys is not None]  # some layers share another's
            found.append([sum(x.keys.nbytes + x.values.nbytes for x in filled)])
        return self._full_depth(found)[0]


def with_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """Return the config with so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config
