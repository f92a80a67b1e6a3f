"""AdamW on fp32 masters, with its state on the model's device, on the host, or in files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..config import TrainConfig
from ..distributed import Ranks
from ..models.rounding import DROPPED_BITS, to_half
from .offload import Bounce, zeros_in_files, zeros_in_memory

SLAB = 1 << 21  # elements; the fastest of 2^20, 2^21, 2^22 (2-core CPU), and fits a buffer in fp64
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by their names in the settings
# Where torch.amp.GradScaler starts. It doubles the scale after 2000 good updates; a run has about
# ten, so here it only falls.
LOSS_SCALE = 2.0**16
KINDS = ("master", "exp_avg", "exp_avg_sq", "gradient")
NORM_ROW = 256  # elements summed in fp32: a CPU's norm of 2^24 at once is wrong by 8e-4


def state_bytes(
    count: int, weight_bytes: int, moments: torch.dtype, gradients: torch.dtype, shared: bool
) -> dict[str, int]:
    """Return the bytes of masters (shared: they are the parameters), both moments, gradients."""
    exact = weight_bytes == 8
    return {
        "master": 0 if shared else count * (8 if exact else 4),
        "moments": count * (8 if exact else moments.itemsize) * 2,
        "gradients": count * (8 if exact else gradients.itemsize),
    }


def adamw_options(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that are keyword arguments of AdamW."""
    names = ("lr", "betas", "eps", "weight_decay")
    return {name: getattr(config, name) for name in names}


@dataclass(eq=False)
class _Slot:
    """A parameter and its flattened state."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    steps: int = 0
    has_gradient: bool = False  # of this update

    def weights(self) -> Tensor:
        return self.parameter.detach().view(-1)


class MasterAdamW:
    """torch.optim.AdamW after clip_grad_norm_, on fp32 masters of the parameters.

    A backward adds each gradient here and leaves parameter.grad None. A parameter without a
    gradient is skipped. fp64 parameters have all their state in fp64.

    fp16 rounds gradients below 3e-8 to 0, so those of fp16 parameters are computed `scale` times as
    large: by a power of two, which norm() and step() divide by exactly. Otherwise scale is 1.

    Args:
        parameters: (name, parameter) pairs; frozen parameters are left out.
        clip: largest global gradient norm.
        device: of the state; the model's, or the CPU. Without a folder, an fp32 parameter on it is
            its own master.
        moments, gradients: dtypes in which they are kept, float32 or bfloat16.
        folder: keep masters and moments in unnamed files there; device is the CPU.

    Precision: in float32 that of torch. bfloat16 moments are rounded at each update; over ten
    updates, the weights' movement then differed by 0.2% (relative L2 distance), and with bfloat16
    gradients too by 0.4%; in a wider model by 0.2% and 0.7%.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip: float,
        device: torch.device,
        moments: torch.dtype,
        gradients: torch.dtype,
        folder: Path | None = None,
    ):
        self._adamw = partial(
            adamw, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay
        )
        self.clip, self.device = clip, device
        names: dict[nn.Parameter, str] = {}
        for name, parameter in parameters:
            if parameter.requires_grad:
                names.setdefault(parameter, name)
        dtypes = dict(zip(KINDS, (torch.float32, moments, moments, gradients), strict=True))
        sizes: dict[str, list[tuple[int, torch.dtype]]] = {kind: [] for kind in KINDS}
        for p in names:
            apart = folder is not None or p.device.type != device.type or p.dtype.itemsize < 4
            for kind, dtype in dtypes.items():
                n = p.numel() if apart or kind != "master" else 0
                sizes[kind].append((n, p.dtype if p.dtype == torch.float64 else dtype))
        mapped = zeros_in_files(folder, {kind: sizes[kind] for kind in KINDS[:3]}) if folder else {}
        rest = {kind: sizes[kind] for kind in KINDS if kind not in mapped}
        state = zeros_in_memory(device, rest) | mapped
        self._slots: dict[Tensor, _Slot] = {}
        for p, *tensors in zip(names, *(state[kind] for kind in KINDS), strict=True):
            self._slots[p] = slot = _Slot(names[p], p, *tensors)
            if len(slot.master) == p.numel():
                slot.master.copy_(slot.weights())
            else:  # the parameter is its own master
                slot.master = slot.weights()
        self._is_scaled = any(p.dtype == torch.float16 for p in names)
        self.scale = LOSS_SCALE if self._is_scaled else 1.0
        away = [p.device for p in names if p.device.type != device.type]
        self._bounce = Bounce(away[0]) if away else None
        self._scratch = torch.empty(3, SLAB, device=device, dtype=torch.float32)
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in names]

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.add(parameter, parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def add(self, parameter: Tensor, gradient: Tensor, rows: slice | Tensor | None = None) -> None:
        """Add to the gradient of a parameter.

        Args:
            gradient: of the parameter's shape; or of some of its rows, which the caller may then
                overwrite (on the current stream).
            rows: a slice or int64 indices; copying indices from a GPU waits for its stream.
        """
        slot = self._slots[parameter]
        if gradient.is_sparse:
            raise TypeError(f"{slot.name}: its gradient is sparse; only dense ones are supported")
        first, slot.has_gradient = not slot.has_gradient, True
        target, index = slot.gradient, None
        if rows is not None:
            if first:
                target.zero_()
                first = False
            target = target.view(parameter.shape)
            if isinstance(rows, slice):
                target = target[rows].view(-1)
            else:
                target, index = target.view(len(target), -1), rows.to(target.device)
        shape = target.shape if index is None else (len(index), target.shape[1])
        source = gradient.contiguous().view(shape)

        def put(part: slice, values: Tensor) -> None:
            if index is not None:
                target.index_add_(0, index[part], values.to(target.dtype))
                return
            for into, slab in zip(target[part].split(SLAB), values.split(SLAB), strict=True):
                if first:
                    into.copy_(slab)
                else:
                    into.add_(slab)

        if self._bounce is None:
            put(slice(None), source)
        else:
            self._bounce.fetch(source, put, reused=rows is not None)

    def _wide(self, parts: list[tuple[_Slot, slice]], kind: str, row: int) -> list[Tensor]:
        """Return parts of one kind of state, cast to the masters' dtype in a row of the scratch."""
        found, start = [], 0
        for slot, part in parts:
            tensor = getattr(slot, kind)[part]
            if tensor.dtype != slot.master.dtype:
                end = start + len(tensor)
                tensor, start = self._scratch[row, start:end].copy_(tensor), end
            found.append(tensor)
        return found

    @torch.no_grad()
    def add_up(self, ranks: Ranks) -> None:
        """Sum the gradients over the ranks, with the same bits on each."""
        slots = list(self._slots.values())
        self._wait()
        reached = ranks.gather([slot.has_gradient for slot in slots])
        for slot, *anywhere in zip(slots, *reached, strict=True):
            if any(anywhere) and not slot.has_gradient:
                slot.has_gradient = True
                slot.gradient.zero_()
        for parts in _slabs(slot for slot in slots if slot.has_gradient):
            kept = [slot.gradient[part] for slot, part in parts]
            wide = [x.to(slot.master.dtype) for x, (slot, _) in zip(kept, parts, strict=True)]
            sums = ranks.add_up(torch.cat(wide)).split([len(x) for x in kept])
            torch._foreach_copy_(kept, list(sums))

    @torch.no_grad()
    def norm(self) -> float:
        """Return the gradient's global L2 norm, with a relative error of 3e-8."""
        squares = [torch.zeros((), dtype=torch.float64, device=self.device)]
        for parts in _slabs(self._with_gradient()):
            squares += [square_sum(values) for values in self._wide(parts, "gradient", 0)]
        return torch.stack(squares).sum().sqrt().item() / self.scale

    def halve_scale(self) -> bool:
        """Halve the scale of gradients to come; return False where it is 1 already."""
        if self.scale == 1:
            return False
        self.scale /= 2
        return True

    @torch.no_grad()
    def step(self, norm: float) -> None:
        """Update the weights with the gradient, clipped by its norm(), and forget the gradient."""
        coefficient = min(1.0, self.clip / (norm + 1e-6)) / self.scale
        slots = self._with_gradient()
        for parts in _slabs(slots):
            masters = [slot.master[part] for slot, part in parts]
            grads = self._wide(parts, "gradient", 0)
            if coefficient < 1:
                torch._foreach_mul_(grads, coefficient)
            first, second = (self._wide(parts, KINDS[row], row) for row in (1, 2))
            counts = [float(slot.steps) for slot, _ in parts]
            steps = [torch.full((), n, dtype=torch.float32, device=self.device) for n in counts]
            self._adamw(
                masters, grads, first, second, [], steps, amsgrad=False, maximize=False, fused=True
            )
            for (slot, part), m, v in zip(parts, first, second, strict=True):
                if slot.exp_avg.dtype != m.dtype:
                    slot.exp_avg[part].copy_(m)
                    slot.exp_avg_sq[part].copy_(v)
            self._copy_back(parts)
        for slot in slots:
            slot.steps += 1
        self.clear()

    def _copy_back(self, parts: list[tuple[_Slot, slice]]) -> None:
        for slot, part in parts:
            weights, master = slot.weights()[part], slot.master[part]
            if weights.data_ptr() == master.data_ptr():
                continue
            if master.dtype == torch.float32 and weights.dtype in DROPPED_BITS:
                master = to_half(master, weights.dtype, part.start)
            if self._bounce is not None:
                self._bounce.send(weights, master)
            else:
                weights.copy_(master)

    def _with_gradient(self) -> list[_Slot]:
        """Wait for all gradients, and return the parameters that have one."""
        self._wait()
        return [slot for slot in self._slots.values() if slot.has_gradient]

    def _wait(self) -> None:
        if self._bounce is not None:
            self._bounce.wait()

    def clear(self) -> None:
        """Forget the gradient, and what a backward that failed has left."""
        self._wait()
        for slot in self._slots.values():
            slot.has_gradient, slot.parameter.grad = False, None

    def state(self) -> dict[str, Tensor]:
        """Return masters, moments (no copies) and steps: master.NAME, exp_avg.NAME, step.NAME; and
        for fp16 parameters loss_scale.
        """
        self._wait()
        state = {"loss_scale": torch.tensor(self.scale)} if self._is_scaled else {}
        for slot in self._slots.values():
            for kind in KINDS[:3]:
                state[f"{kind}.{slot.name}"] = getattr(slot, kind).view(slot.parameter.shape)
            state[f"step.{slot.name}"] = torch.tensor(slot.steps)
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state(), with its masters in the parameters and no gradient.

        Raises: ValueError, with nothing changed, for a name that is missing, unknown or misshapen.
        """
        current = self.state()
        for name in [*current, *state]:
            if name not in state:
                raise ValueError(f"{name}: missing from the optimizer's state")
            if name not in current:
                raise ValueError(f"{name}: in the optimizer's state, but not of this model")
            if current[name].shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)}, the model's {tuple(current[name].shape)}"
                raise ValueError(f"{name}: the optimizer's state has shape {shapes}")
        self.clear()
        for name, tensor in current.items():
            tensor.copy_(state[name])
        if self._is_scaled:
            self.scale = current["loss_scale"].item()
        for slot in self._slots.values():
            slot.steps = int(current[f"step.{slot.name}"])
        for parts in _slabs(self._slots.values()):
            self._copy_back(parts)

    def close(self) -> None:
        """Stop taking the parameters' gradients."""
        for hook in self._hooks:
            hook.remove()
        if self._bounce is not None:
            self._bounce.close()


def square_sum(values: Tensor) -> Tensor:
    """Return the sum of squares of a (n,) tensor, in fp64."""
    rows = values[: len(values) // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    rest = torch.linalg.vector_norm(values[rows.numel() :])[None]
    return torch.cat([torch.linalg.vector_norm(rows, dim=1), rest]).double().square().sum()


def _slabs(slots: Iterable[_Slot]) -> Iterator[list[tuple[_Slot, slice]]]:
    """Yield all elements of some parameters in lists of at most SLAB; small ones share a list."""
    parts: list[tuple[_Slot, slice]] = []
    room = SLAB
    for slot in slots:
        start, end = 0, len(slot.master)
        while start < end:
            part = slice(start, min(start + room, end))
            parts.append((slot, part))
            room -= part.stop - start
            start = part.stop
            if room == 0:
                yield parts
                parts, room = [], SLAB
    if parts:
        yield parts
