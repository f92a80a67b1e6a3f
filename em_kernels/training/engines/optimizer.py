"""AdamW on fp32 masters, whose state lies on the model's device, on the host, or in files."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..distributed import Ranks
from ..models.rounding import to_bf16
from .offload import Bounce, zeros_in_files

SLAB = 1 << 21  # elements, of 2^20, 2^21, 2^22 the fastest (2-core CPU); fp64 must fit a buffer
KINDS = ("master", "exp_avg", "exp_avg_sq", "gradient")
NORM_ROW = 256  # elements; longer ones lose digits: on a CPU 2^24 at once are wrong by 8e-4


def state_bytes(
    numels: Iterable[int],
    *,
    weight_bytes: int,
    moments: torch.dtype,
    gradients: torch.dtype,
    master_is_parameter: bool,
) -> dict[str, int]:
    """Bytes of the masters, both moments and gradients of parameters with so many elements each,
    of weight_bytes an element.
    """
    count, exact = sum(numels), weight_bytes == 8
    return {
        "master": 0 if master_is_parameter else count * (8 if exact else 4),
        "moments": count * (8 if exact else moments.itemsize) * 2,
        "gradients": count * (8 if exact else gradients.itemsize),
    }


@dataclass(eq=False)
class _Slot:
    """A parameter and its state, flat."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    steps: int = 0
    held: bool = False  # gradient holds something of this update

    def weights(self) -> Tensor:
        return self.parameter.detach().view(-1)


class MasterAdamW:
    """torch.optim.AdamW after clip_grad_norm_, on fp32 masters of the parameters.

    A backward adds each gradient here and leaves parameter.grad None. A parameter that got none is
    skipped. fp64 parameters have all their state in fp64.

    Args:
        parameters: (name, parameter) pairs; what does not require a gradient is left out.
        clip: largest global gradient norm.
        device: of the state; the model's, or the CPU. A parameter that is fp32 there already is
            its own master.
        moments, gradients: dtypes of what is kept, float32 or bfloat16.
        folder: masters and moments are in unnamed files there; device is the CPU.

    Precision: with float32 that of torch. bfloat16 moments, rounded at each update, changed ten
    updates by 0.2% (relative L2 distance of the weights' change), with bfloat16 gradients by 0.4%;
    of a wider model by 0.2% and 0.7%.

    Raises: UserError where the folder cannot hold the files.
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
            own = folder is not None or p.device.type != device.type or p.dtype.itemsize < 4
            for kind, dtype in dtypes.items():
                n = p.numel() if own or kind != "master" else 0  # its own master
                sizes[kind].append((n, p.dtype if p.dtype == torch.float64 else dtype))
        mapped = zeros_in_files(folder, {kind: sizes[kind] for kind in KINDS[:3]}) if folder else {}
        # written, not only asked for: a host that lacks the memory fails here
        state = [
            mapped.get(kind) or [torch.empty(n, dtype=d, device=device).zero_() for n, d in s]
            for kind, s in sizes.items()
        ]
        slots = [_Slot(names[p], p, *tensors) for p, *tensors in zip(names, *state, strict=True)]
        for slot in slots:
            if len(slot.master) == slot.parameter.numel():
                slot.master.copy_(slot.weights())
            else:
                slot.master = slot.weights()
        self._slots: dict[Tensor, _Slot] = dict(zip(names, slots, strict=True))
        away = [p.device for p in names if p.device.type != device.type]
        self._bounce = Bounce(away[0]) if away else None
        self._scratch = torch.empty(3, SLAB, device=device, dtype=torch.float32)
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in names]

    def _take(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.add(parameter, parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def add(self, parameter: Tensor, gradient: Tensor, words: slice | Tensor | None = None) -> None:
        """Add to the gradient of a parameter.

        Args:
            gradient: shaped as the parameter, and ours from now on; or some of its rows, the
                caller's again (on the current stream) when this returns.
            words: which rows, as a slice or int64 indices; from a GPU to the host, indices wait for
                the stream.

        Raises: TypeError for a sparse gradient.
        """
        slot = self._slots[parameter]
        if gradient.is_sparse:
            raise TypeError(f"{slot.name}: its gradient is sparse; only dense ones are supported")
        first, slot.held = not slot.held, True
        target, index = slot.gradient, None
        if words is not None:
            if first:
                target.zero_()
                first = False
            target = target.view(parameter.shape)
            if isinstance(words, slice):
                target = target[words].view(-1)
            else:
                target, index = target.view(len(target), -1), words.to(target.device)
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

        if self._bounce is None and first and source.dtype == target.dtype:
            slot.gradient = source  # spares a copy; what was there is as large, and goes
        elif self._bounce is None:
            put(slice(None), source)
        else:
            self._bounce.fetch(source, put, reused=words is not None)

    def _wide(self, parts: list[tuple[_Slot, slice]], kind: str, row: int) -> list[Tensor]:
        """The parts of a kind of state in their masters' dtype; rounded ones as copies in a row of
        the scratch memory.
        """
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
        """Add the gradients of all ranks, the same bits on each."""
        slots = list(self._slots.values())
        self._wait()
        for slot, *held in zip(slots, *ranks.gather([slot.held for slot in slots]), strict=True):
            if any(held) and not slot.held:
                slot.held = True
                slot.gradient.zero_()
        for parts in _slabs(slot for slot in slots if slot.held):
            kept = [slot.gradient[part] for slot, part in parts]
            wide = [x.to(slot.master.dtype) for x, (slot, _) in zip(kept, parts, strict=True)]
            sums = ranks.add_up(torch.cat(wide)).split([len(x) for x in kept])
            torch._foreach_copy_(kept, list(sums))

    @torch.no_grad()
    def norm(self) -> float:
        """Global L2 norm of what was added since the last update, to 3e-8 of it."""
        squares = [torch.zeros((), dtype=torch.float64, device=self.device)]
        for parts in _slabs(self._held()):
            squares += [square_sum(values) for values in self._wide(parts, "gradient", 0)]
        return torch.stack(squares).sum().sqrt().item()

    @torch.no_grad()
    def step(self, norm: float) -> None:
        """Update with what was added, whose norm() this is, and forget it."""
        coefficient = min(1.0, self.clip / (norm + 1e-6))
        held = self._held()
        for parts in _slabs(held):
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
        for slot in held:
            slot.steps += 1
        self.clear()

    def _copy_back(self, parts: list[tuple[_Slot, slice]]) -> None:
        for slot, part in parts:
            weights, master = slot.weights()[part], slot.master[part]
            if weights.data_ptr() == master.data_ptr():
                continue
            if (master.dtype, weights.dtype) == (torch.float32, torch.bfloat16):
                master = to_bf16(master, part.start)
            if self._bounce is not None:
                self._bounce.send(weights, master)
            else:
                weights.copy_(master)

    def _held(self) -> list[_Slot]:
        """Parameters that got a gradient, once all of it is there."""
        self._wait()
        return [slot for slot in self._slots.values() if slot.held]

    def _wait(self) -> None:
        if self._bounce is not None:
            self._bounce.wait()

    def clear(self) -> None:
        """Forget what was added, and what a backward that failed has left."""
        self._wait()
        for slot in self._slots.values():
            slot.held, slot.parameter.grad = False, None

    def state(self) -> dict[str, Tensor]:
        """Masters, moments (no copies) and step counts: master.NAME, exp_avg.NAME, exp_avg_sq.NAME,
        step.NAME.
        """
        self._wait()
        found = {}
        for slot in self._slots.values():
            for kind in KINDS[:3]:
                found[f"{kind}.{slot.name}"] = getattr(slot, kind).view(slot.parameter.shape)
            found[f"step.{slot.name}"] = torch.tensor(slot.steps)
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state(), its masters in the parameters; what was added is forgotten.

        Raises: ValueError, with nothing changed, for a name that is missing, unknown, or of another
        shape.
        """
        own = self.state()
        for name in [*own, *state]:
            if name not in state:
                raise ValueError(f"{name}: missing from the optimizer's state")
            if name not in own:
                raise ValueError(f"{name}: in the optimizer's state, but not of this model")
            if own[name].shape != state[name].shape:
                shapes = f"{tuple(state[name].shape)}, the model's {tuple(own[name].shape)}"
                raise ValueError(f"{name}: the optimizer's state has shape {shapes}")
        self.clear()
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for slot in self._slots.values():
            slot.steps = int(own[f"step.{slot.name}"])
        for parts in _slabs(self._slots.values()):
            self._copy_back(parts)

    def close(self) -> None:
        """Leave the parameters' gradients to themselves."""
        for hook in self._hooks:
            hook.remove()
        if self._bounce is not None:
            self._bounce.close()


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares of a (n,) tensor, in fp64."""
    rows = values[: len(values) // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    norms = [torch.linalg.vector_norm(rows, dim=1)]
    norms.append(torch.linalg.vector_norm(values[rows.numel() :])[None])
    return torch.cat(norms).double().square().sum()


def _slabs(slots: Iterable[_Slot]) -> Iterator[list[tuple[_Slot, slice]]]:
    """All their elements, in lists of at most SLAB; small parameters go together."""
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
