"""Plan a run before anything is loaded: bytes by component, batch sizes, seconds, does it fit.

Needs the model's config alone. Activations are run, on tensors without memory (activations.py); the
rest is arithmetic.
"""

import shutil
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...ops.free_memory import free_host_bytes
from ...ops.memory import chunk_length, free_bytes
from ...ops.sparse import SAMPLE
from ...ops.weight_gradient import MIN_SLAB_ENTRIES
from ...ops.weight_gradient import SLAB_BYTES as SLAB
from ..config import FULL_LR, LORA_LR, TrainConfig
from ..distributed import LaunchSpec
from ..engines.optimizer import SLAB as STEP_SLAB
from ..engines.optimizer import state_bytes
from ..models.loading import attention_of, auto_dtype
from ..models.rounding import LENGTH
from ..settings import UserError
from .activations import Sketch
from .plan import GIB, MIB, Plan, cheaper, peak, phases
from .run_time import RATES, Work, seconds_of
from .sharded import CONTEXT, PROCESS, SMALL_STATE, divided, settings_of

LIBRARIES = 256 * MIB  # of the context: what is loaded with the first kernels
STAGING = 2 * 64 * MIB  # pinned
FRAGMENTS = 0.05  # of what comes and goes, lost between a GPU allocator's blocks
SCRATCH = 3 * 4 * STEP_SLAB  # of the optimizer
NOISE = 4 * LENGTH  # of rounding to bf16
SAVED = 2 << 30  # bytes of a model that are written at a time
CHUNK = 256 * MIB  # of logits
STATISTICS = 132  # bytes a token, measured like those below
CHOICE = 36  # bytes a word, where columns are chosen
SHARD = 5 * GIB  # read at a time while weights are loaded
PAYS = {"cuda": 16384, "cpu": 1024}  # tokens of a micro-batch beyond which nothing is gained
MOST_ROWS = 256  # sampled at a time, as a token of a step takes as long on a GPU, and here longer
SHORT = 8  # times as many rows as whole ones make a micro-batch where they end early, at most
ENOUGH = 4096  # tokens of a micro-batch for whose sake nothing need be recomputed
# Bytes a word of sampling.py's processors, beside the model's own logits: peaks of `generate` under
# torch.profiler on a CPU; the same for V 50,000 and 150,000, 8 and 16 rows.
GREEDY, PLAIN, TOP_K, TOP_P = 16, 24, 28, 34
CUDA_SORT = 24  # keys and indices again, in a GPU's sort
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = LaunchSpec()


def resolve(
    config: TrainConfig,
    model_config: PreTrainedConfig,
    prompt_tokens: int,
    device: torch.device,
    held: int = 0,
    world: LaunchSpec = ALONE,
) -> Plan:
    """The plan of a run, its settings complete.

    Raises: UserError where nothing fits: what is missing, and what would help, cheapest first.
    """
    planner = Planner(config, model_config, prompt_tokens, device, held=held, world=world)
    plan = planner.choose()
    if not plan.fits:
        help = f"try {', or '.join(plan.remedies)}" if plan.remedies else "take a smaller model"
        raise UserError(f"memory: mode {plan.name}: {'; '.join(plan.problems)}; {help}")
    place = config.output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    need = sum(size for name, size in plan.disk.items() if not name.endswith("(offload)"))
    need -= sum(path.stat().st_size for path in config.output.rglob("*") if path.is_file())
    if need > free:
        raise UserError(
            f"output: {config.output} has {free / GIB:.1f} GiB of disk free, the run writes up to "
            f"{need / GIB:.1f}; keep fewer with --save-at, --keep or --save-optimizer False"
        )
    return plan


class Planner:
    """Plans one run on one machine; results for one mode are reused for the others.

    Args:
        download: bytes; None: of all weights, in the dtype that the config names.
        held: bytes of the model that are on the device already.
        world: all of the run's processes; the plan is of one.

    Raises: UserError for settings that go with another engine.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: PreTrainedConfig,
        prompt_tokens: int,
        device: torch.device,
        download: int | None = 0,
        held: int = 0,
        world: LaunchSpec = ALONE,
    ) -> None:
        cuda, host = device.type == "cuda", config.host_memory
        if world.engine != "replicas":
            config = settings_of(config, world.engine)
        dtype: Any = config.dtype
        if dtype == "auto":
            dtype = auto_dtype(device.type)
        self.config = config.model_copy(update={"dtype": dtype})
        self.model_config, self.prompt, self.download = model_config, prompt_tokens, download
        self.cuda, self.dtype, self.rates = cuda, DTYPES[dtype], RATES[device.type]
        self.world = world
        free = free_host_bytes() // world.on_machine + (0 if cuda else held)
        limit = free if host is None else int(host * GIB) // world.on_machine
        self.device_limit = self.host_limit = limit
        if cuda and config.gpu_memory is not None:
            self.device_limit = int(config.gpu_memory * GIB)
        elif cuda and torch.cuda.is_available():
            # asking has made the context; libraries' parts of it come later
            self.device_limit = free_bytes(device) + held + CONTEXT - LIBRARIES
        elif cuda:
            raise UserError("gpu_memory: torch sees no CUDA GPU; give the GiB of one to plan for")
        self.sketches: dict[tuple | None, Sketch] = {}
        self.plans: dict[str, Plan] = {}

    def modes(self) -> list[Plan]:
        """One plan of each, whatever the settings say."""
        folder = self.config.offload_dir or self.config.output / "offload"
        modes: list[dict[str, Any]] = [
            {"mode": "full"},
            {"mode": "offload"},
            {"mode": "offload", "offload_dir": folder},
            {"mode": "lora"},
            {"mode": "lora", "four_bit": True},
        ]
        if self.world.engine != "replicas":
            del modes[1:]
        elif not self.cuda:  # memory is the same on either side; 4 bits are for a GPU
            del modes[4], modes[1]
        plain = {"offload_dir": None, "four_bit": False}
        return [self.plan(self.config.model_copy(update={**plain, **mode})) for mode in modes]

    def choose(self) -> Plan:
        """Pick the first allowed mode that fits; else the last one, with remedies."""
        modes: list[Any] = [self.config.mode]
        if modes == ["auto"]:
            modes = ["full", *["offload"] * self.cuda, "lora"]
            if self.config.four_bit or self.config.offload_dir:
                modes = ["lora" if self.config.four_bit else "offload"]
        for mode in modes:
            folder = self.config.offload_dir if mode == "offload" else None
            asked = self.config.model_copy(update={"mode": mode, "offload_dir": folder})
            plan = self.plan(asked)
            if plan.fits:
                return plan
        return Plan(**{**vars(plan), "remedies": self._remedies(asked)})

    def _remedies(self, config: TrainConfig) -> tuple[str, ...]:
        """That which costs nothing, or the three cheapest; or else the cheapest together."""
        found: list[str] = []
        for text, change in cheaper(config, self.cuda, self.world.engine):
            if len(found) < 3 and self.plan(config.model_copy(update=change)).fits:
                found.append(text)
                if "auto" in change.values():
                    break
        if found:
            return tuple(found)
        texts: list[str] = []
        for text, change in cheaper(config, self.cuda, self.world.engine):
            config, texts = config.model_copy(update=change), [*texts, text]
            if self.plan(config).fits:
                return (" with ".join(texts),)
        return ()

    def sketch(self, config: TrainConfig) -> Sketch:
        key = (config.lora_rank, config.lora_targets) if config.mode == "lora" else None
        if key not in self.sketches:
            lora = config if key else None
            self.sketches[key] = Sketch(self.model_config, self.dtype, config.attention, lora)
        return self.sketches[key]

    def plan(self, config: TrainConfig) -> Plan:
        """Pick the most exact moments and gradients that leave room for an efficient batch size."""
        key = config.model_dump_json()
        if key not in self.plans:
            best: Plan | None = None
            for moments, gradients in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
                wanted = {"moments": moments, "gradients": gradients}
                wanted = {k: v for k, v in wanted.items() if getattr(config, k) == "auto"}
                plan = self._sized(config.model_copy(update=wanted))
                if best is None or plan.merit > best.merit:
                    best = plan
                if best.fits and best.pays:
                    break
            assert best is not None
            self.plans[key] = best
        return self.plans[key]

    def _sized(self, config: TrainConfig) -> Plan:
        """With the largest batches that fit."""
        sketch, new = self.sketch(config), config.sampling.max_new_tokens
        own = -(-config.rollouts // self.world.ranks)  # of this rank
        prompts = 1 if config.prompt_from is None else len(config.prompt_rows)
        most = -(-own // prompts)  # rows of a micro-batch
        shared = config.share_prefix and sketch.can_share and most > 1
        most = min(most if shared else own, config.micro_batch_rows or own)
        row = new + (0 if shared else self.prompt)  # tokens
        chunk = config.chunk_bytes or self._chunk(sketch)
        device, host, disk = self._always(config, sketch)
        # one layer's weight in 16 bits
        unpacked = 2 * sketch.largest if config.four_bit else 0
        room = self.device_limit - sum(device.values())
        room = int(room / (1 + FRAGMENTS)) if self.cuda else room

        def passing(rows: int, columns: int, recompute: bool) -> dict[str, int]:
            found = sketch.run(rows, self.prompt, columns, shared, recompute)
            return {
                "activations": found.kept,
                "logits chunk": self._head(config, sketch, found.states, chunk),
                "recompute, gradients": found.peak - found.kept + unpacked,
            }

        def worst(rows: int, recompute: bool) -> dict[str, int]:
            """Completions that end early are more rows, with the prompt's keys before each."""
            widest = min(most, SHORT * rows)
            short = max(2, rows * new // widest)
            shapes = [(rows, new)] + [(widest, short)] * (shared and short < new)
            return max((passing(*shape, recompute) for shape in shapes), key=peak)

        goal = max(1, min(most, PAYS["cuda" if self.cuda else "cpu"] // row))
        if config.micro_batch != "auto":
            goal = max(1, min(most, config.micro_batch // row))
        enough, recompute = min(goal, -(-ENOUGH // row)), config.gradient_checkpointing
        if recompute == "auto":
            recompute = room <= 0 or peak(worst(enough, False)) > room
        rows = goal
        if config.micro_batch == "auto":
            rows = _largest(lambda n: peak(passing(n, new, recompute)), goal, room)
            if peak(worst(rows, recompute)) > room:
                rows = _largest(lambda n: peak(worst(n, recompute)), rows, room)
            while rows > 1 and peak(worst(rows, recompute)) > room:
                rows = rows * 3 // 4
            rows = -(-most // -(-most // rows))  # batches alike
        of_row = self._of_completion(config, sketch)
        batch = max(1, min(own, MOST_ROWS, room // sum(of_row.values())))
        batch = -(-own // -(-own // batch))
        if config.rollout_batch != "auto":
            batch = min(own, config.rollout_batch)
        moving = {name: size * batch for name, size in of_row.items()}
        moving |= worst(rows, recompute)
        if config.chunk_bytes is None and config.mode == "offload" and self.cuda:
            # each chunk may send a gradient of the whole head: as few as the backward leaves room
            spare = chunk + phases(moving)["backward"] - phases(moving)["head"]
            chunk = max(chunk, 1 << max(0, spare.bit_length() - 1))
            moving |= worst(rows, recompute)
        some = min(STEP_SLAB, sketch.sizes.trained)
        moving["rounding"] = 2 * some + 4 * min(LENGTH, some) if device.get("master") else 0
        copied = not self.cuda and config.mode != "lora" and self.dtype == torch.float32
        moving["bf16 copy"] = (sketch.sizes.weights // 2 + NOISE) * copied
        if self.cuda:
            device["fragments"] = int(FRAGMENTS * peak(moving))
        trained = sketch.sizes.trained
        state = trained * (4 + 2 * PRECISIONS[config.moments].itemsize)
        complete: dict[str, Any] = {
            "lr": config.lr or (LORA_LR if config.mode == "lora" else FULL_LR),
            "gradient_checkpointing": recompute,
            "chunk_bytes": chunk,
            "attention": attention_of(config.attention, self.model_config),
        }
        if config.micro_batch == "auto":
            complete["micro_batch"] = rows * row
        if SHORT * rows < most:
            complete["micro_batch_rows"] = SHORT * rows
        if config.rollout_batch == "auto":
            complete["rollout_batch"] = batch
        if config.save_optimizer == "auto":
            complete["save_optimizer"] = state <= SMALL_STATE
        config = config.model_copy(update=complete)
        last = {step for step in config.save_at if step < config.steps} | {config.steps}
        count = min(len(last), config.keep + 1 if config.keep else len(last))
        each = 2 * sketch.sizes.weights // self.dtype.itemsize
        if config.mode == "lora":
            each = 4 * trained
        disk["checkpoints"] = count * each
        if config.save_optimizer:
            disk["optimizer state"] = state * min(2, len(last))  # the next is written beside it
        work = Work(
            self.prompt * (prompts if shared else own),
            -(-most // rows) * prompts if shared else -(-own // rows),
            prompts if shared else 0,
            of_row["KV cache"],
            len(last) * each,
        )
        download = self.download
        if download is None:
            itemsize = getattr(self.model_config.dtype, "itemsize", 2)
            download = sketch.sizes.weights // self.dtype.itemsize * itemsize
        of_rank = config.model_copy(update={"rollouts": own})
        seconds, once = seconds_of(of_rank, sketch, work, self.rates, download)
        return Plan(
            config,
            {**device, **moving},
            host,
            self.device_limit,
            self.host_limit,
            disk,
            download,
            seconds,
            once,
            self.rates,
            pays=rows * row >= min(goal * row, 2048) and batch >= min(own, 16),
        )

    def _always(
        self, config: TrainConfig, sketch: Sketch
    ) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Bytes that stay: on the device, on the host, on disk."""
        sizes = sketch.sizes
        device = {"weights": sizes.weights, "buffers": sizes.buffers}
        if self.world.engine != "replicas":
            return *divided(config, self.world, sketch, device, self.cuda), {}
        if config.four_bit:  # a byte's scale for 64 weights, a float's for 256 of those
            packed = sizes.linear // 2 + sizes.linear // 64 + sizes.linear // (64 * 256) * 4
            device["weights"] += packed - sizes.linear * self.dtype.itemsize
        if config.mode == "lora":
            device["adapters"] = sizes.trained_bytes
        offload, folder = config.mode == "offload" and self.cuda, config.offload_dir is not None
        itemsize = sizes.trained_bytes // sizes.trained
        state = state_bytes(
            [sizes.trained],
            weight_bytes=itemsize,
            moments=PRECISIONS[config.moments],
            gradients=PRECISIONS[config.gradients],
            master_is_parameter=itemsize == 4 and not offload and not folder,
        )
        disk = {f"{n} (offload)": state.pop(n) for n in ("master", "moments") if folder}
        state["scratch"] = SCRATCH + (NOISE if itemsize < 4 else 0)
        if not self.cuda:
            return {**device, **state}, {}, disk
        host = {"process": PROCESS, "saving": min(SAVED, sizes.weights)}
        if offload:
            host |= {**state, "staging": STAGING}
        else:
            device |= state
        shard = min(SHARD, sizes.weights)  # gone before the rest comes
        host["loading"] = max(0, shard - sum(host.values()) + PROCESS)
        return {**device, "context": CONTEXT}, host, disk

    def _chunk(self, sketch: Sketch) -> int:
        """Two rows of logits, or what memory allows; a power of two."""
        some = min(CHUNK, self.device_limit // 64)
        return max(2 * self._logit_bytes(sketch), 1 << max(0, some.bit_length() - 1))

    def _logit_bytes(self, sketch: Sketch) -> int:
        """Bytes per row: fp32 logits; on a GPU also their gradient and a second chunk's logits."""
        return sketch.words * (4 + (4 + self.dtype.itemsize) * self.cuda)

    def _head(self, config: TrainConfig, sketch: Sketch, states: int, chunk: int) -> int:
        """Bytes of entropy_loss_into: logits, fp32 dhidden, the head's gradient slab; with a
        tolerance also a chunk's chosen columns, at most half of all, or a sample of the others.
        """
        words, width, itemsize = sketch.words, sketch.width, self.dtype.itemsize
        device, row = torch.device("cuda" if self.cuda else "cpu"), self._logit_bytes(sketch)
        rows = chunk_length(states, row, max(row, chunk), device)
        held = rows * row
        if self.cuda and not config.grad_tolerance:  # dy of chunks that wait fills the budget
            held = min(states * words * (4 + itemsize), chunk)
        total = held + states * (width * 4 + STATISTICS)
        if config.mode != "lora":
            total += min(SLAB, words * width * 4)
        if config.grad_tolerance:
            word = rows * 8 + width * itemsize
            some = min(words // 2, max(MIN_SLAB_ENTRIES, min(SLAB, chunk) // word))
            total += max(some * word, min(SAMPLE, words) * width * itemsize) + CHOICE * words
        return total

    def _of_completion(self, config: TrainConfig, sketch: Sketch) -> dict[str, int]:
        """Bytes per completion while sampling."""
        sampling, length = config.sampling, self.prompt + config.sampling.max_new_tokens
        word = TOP_P if sampling.top_p < 1 else TOP_K if sampling.top_k else PLAIN
        word = (word if sampling.temperature else GREEDY) + self.dtype.itemsize
        word += CUDA_SORT if self.cuda and sampling.temperature and sampling.top_p < 1 else 0
        cache = sketch.cache_bytes(length)
        grown = cache // (2 * sketch.layers)  # a layer's keys, copied for one token more
        ids = 8 * (3 * length + config.sampling.max_new_tokens)
        return {"KV cache": cache, "next tokens": sketch.words * word + grown + ids}


def _largest(need: Callable[[int], int], most: int, room: int) -> int:
    """Rows up to `most` that need no more than the room, at least 1, on a straight line from the
    need of 1 to that of all: activations are convex in them, so that it seldom says too many.
    """
    if most == 1 or room <= 0:
        return 1
    if need(most) <= room:
        return most
    if need(1) >= room:
        return 1
    slope = (need(most) - need(1)) / (most - 1)
    return max(1, min(most - 1, 1 + int((room - need(1)) / slope)))
