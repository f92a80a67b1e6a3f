"""Examination of every causal architecture of transformers, on tiny random models.

`make test-architectures` examines all of them and writes docs/architectures.md. Each is planned,
trained (all weights, then adapters) and its checkpoint opened; loss and gradients are compared with
the logits', with a shared prompt and with recomputation, and batched completions with single ones.
Results are kept in build/architectures, so that the same command continues; remove it to begin
again.
"""

import json
import os
import re
import signal
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from training.tiny import PLAIN, TRAINING_TEXT, loss_and_gradients, make_tokenizer, settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from em_kernels.cli import main
from em_kernels.hf import entropy_loss, require_gradients
from em_kernels.training.engines.shared_prefix import can_share_prefix
from em_kernels.training.rollouts.padding import can_pad
from em_kernels.training.rollouts.sampling import Rollout, generate
from em_kernels.training.runs.records import write_whole
from em_kernels.training.settings import in_one_line

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
RESULTS = ROOT / "build" / "architectures" / transformers.__version__
VOCAB_SIZE = 267  # that of training.tiny's tokenizer
LARGEST = 2 << 30  # bytes of a model
# New values of integer settings, by the first pattern that their name matches.
SMALL = {
    "^(vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)$": VOCAB_SIZE,
    "^(max_position_embeddings|n_positions|n_ctx|max_seq_len)$": 128,
    "^(pad_token_id)$": 2,
    "^(eos_token_id|bos_token_id|decoder_start_token_id|sep_token_id)$": 0,
    "(sliding_window|window_size|sliding_window_size|attention_chunk_size|index_topk)$": 8,
    "(qk_rope_head_dim|rotary_dim|qk_nope_head_dim|v_head_dim|head_dim|d_head|kv_channels)$": 16,
    "lora_rank$|^gated_norm_rank$": 16,
    "(n_group|topk_group|num_expert_group)$": 1,
    "(n_routed_experts|num_local_experts|num_experts|n_experts)$": 4,
    "(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|moe_top_k|top_k_experts)$": 2,
    "(num_key_value_heads|num_kv_heads)$": 2,
    "(attention_heads|n_head|n_heads|num_heads)$": 4,
    "(intermediate_size|ffn_dim|n_inner|ffn_hidden_size|dff|dim_ff|ffn_dim|inner_size)$": 64,
    "(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers)$": 4,
    "(hidden_size|n_embd|d_model|embedding_size|embed_dim|model_dim|hidden_dim)$": 64,
    "(mamba_expand|mamba_d_state|ssm_state_size|state_size|chunk_size)$": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_ssm": 128}
SLIDING = ["sliding_attention", "full_attention"] * 2
OWN: dict[str, dict] = {  # values that only fit together
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "falcon_h1": MAMBA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longcat_flash": {"moe_topk": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "cohere_compass_text": {"layer_types": SLIDING},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "reformer": {"is_decoder": True},
    "xlm": {"emb_dim": 64},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {
        "intermediate_size": 64,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING,
    },
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": SLIDING},
    "nemotron_h": {"hybrid_override_pattern": "M*-*"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}


def shrunk(settings: dict) -> dict:
    """Return the settings to change, with small values."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("_config"):
            found[name] = shrunk(value)
        elif isinstance(value, int | None) and not isinstance(value, bool):
            small = next((s for pattern, s in SMALL.items() if re.search(pattern, name)), None)
            if small is not None and (value is not None or name.endswith("token_id")):
                found[name] = small
    if "qk_rope_head_dim" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def tiny_config(kind: str) -> PreTrainedConfig:
    """Return the architecture's configuration with every size small."""
    settings = shrunk(AutoConfig.for_model(kind).to_dict())
    return AutoConfig.for_model(kind, **{**settings, **OWN.get(kind, {})})


class Failure(Exception):
    """An accepted architecture gives a wrong result."""


def make(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Return a model with random weights whose distributions are not flat."""
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() * 8 for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise Failure(f"is {size / 2**30:.1f} GiB even so")
    torch.manual_seed(0)
    options = {"experts_implementation": "eager"}  # torch's grouped GEMM takes no fp64.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
    head = model.get_output_embeddings()
    for _ in range(3) if isinstance(head, torch.nn.Linear) else ():
        with torch.no_grad():  # Scale the logits to a standard deviation of 1.
            head.weight *= 1 / model(input_ids=torch.tensor([PROMPTS[1]])).logits.std()
    return model


PROMPTS = ([7, 30, 99, 12], [7, 30, 99, 12, 41, 66, 5, 80, 9], [7, 30, 55, 61, 70, 88, 93, 14, 77])
ROLLOUTS = [
    Rollout(PROMPTS[0], [5, 9, 40, 41, 42], False),
    Rollout(PROMPTS[0], [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111], False),
    Rollout(PROMPTS[1], [200, 201, 7], False),
    Rollout(PROMPTS[1], [44], False),
]


def check_loss(model: PreTrainedModel) -> None:
    """Check that entropy_loss and its gradients equal those from the logits."""
    ids = torch.tensor([r.prompt_ids[:4] + r.response_ids[:1] for r in ROLLOUTS])
    require_gradients(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logp = model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1).mean()
    loss = entropy_loss(model, {"input_ids": ids})
    if not abs(loss - expected) < 1e-5 * expected:
        raise Failure(f"entropy_loss is {loss.item():.9f}, of the logits {expected.item():.9f}")
    if expected < 0.1:
        raise Failure("the test's model is sure of itself")
    compare(
        torch.autograd.grad(loss, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        [n for n, p in model.named_parameters() if p.requires_grad],
        "entropy_loss",
    )


def compare(found, expected, names, what) -> None:
    scale = torch.stack([x.norm() for x in expected if x is not None]).norm()
    for name, mine, other in zip(names, found, expected, strict=True):
        zero = torch.zeros(())
        error = ((zero if mine is None else mine) - (zero if other is None else other)).norm()
        if not error <= (1e-5 if scale.dtype == torch.float64 else 1e-3) * scale:
            raise Failure(f"{what}: the gradient of {name} is off by {error / scale:.1g}")


def check_update(model: PreTrainedModel, share: bool, recompute: bool) -> None:
    """Check that the trainer's gradients equal those from each completion's logits."""
    config = settings("-", Path("-"), share_prefix=share, gradient_checkpointing=recompute)
    rows = []
    for r in ROLLOUTS:
        ids = torch.tensor([r.prompt_ids + r.response_ids])
        logits = model(input_ids=ids, use_cache=False).logits
        logp = logits[0, len(r.prompt_ids) - 1 : -1].double().log_softmax(-1)
        rows.append(-(logp.exp() * logp).sum(-1))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(torch.cat(rows).mean(), [*named.values()], allow_unused=True)
    _, ours = loss_and_gradients(model, ROLLOUTS, config)
    compare([ours.get(n) for n in named], expected, named, f"share {share}, recompute {recompute}")


def check_completions(model: PreTrainedModel) -> None:
    """Compare completions sampled side by side with those sampled alone."""
    tokenizer, sampling = make_tokenizer(), PLAIN.model_copy(update={"repetition_penalty": 1.2})
    prompts = [*PROMPTS, PROMPTS[0], PROMPTS[2]]
    seeds = [(0, i) for i in range(len(prompts))]
    together = generate(model, tokenizer, prompts, seeds, sampling)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = generate(model, tokenizer, [prompt], [seed], sampling, batch_size=1)
        if alone[0].response_ids != row.response_ids:
            raise Failure("completions side by side are not those of one alone")


def refusal_of(call) -> str:
    """Run a command; return the line of a refusal, raise Failure for any other error."""
    out, error = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        code = main(call)
    if code == 2:
        return error.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    if code != 0:
        raise Failure(f"{call[0]}: {error.getvalue().strip()[-300:]}")
    return ""


def examine(kind: str, folder: Path) -> dict[str, Any]:
    """Try an architecture: accepted, refused in one line, or failed."""
    try:
        try:
            model = make(kind)
        except RuntimeError:  # A few compute in fp32 whatever their dtype.
            model = make(kind, torch.float32)
    except Exception as error:  # transformers refuses settings by many kinds.
        return {"verdict": "not built", "why": in_one_line(error)[:200]}
    found: dict[str, Any] = {"class": type(model).__name__}
    try:
        if line := commands(model, folder):
            return {**found, "verdict": "refused", "why": line}
        found["lora"] = refusal_of(["train", *asked(folder), "--mode", "lora"])
        check_loss(model)
        share = can_share_prefix(model)
        for recompute in (False, True):
            check_update(model, share, recompute)
        check_completions(model)
        found |= {"share": share, "pad": can_pad(model, 24)}
        return {**found, "verdict": "accepted"}
    except Failure as error:
        return {**found, "verdict": "failed", "why": str(error)}
    except Exception:
        where = traceback.format_exc().strip().splitlines()
        return {**found, "verdict": "failed", "why": where[-1], "where": where[-12:-1]}


def asked(folder: Path) -> list[str]:
    """Return arguments for plan and train."""
    task = ["--model", str(folder / "model"), "--prompt", TRAINING_TEXT, "--no-chat-template"]
    task += ["--steps", "1", "--rollouts", "4", "--max-new-tokens", "6", "--device", "cpu"]
    return [*task, "--dtype", "float32", "--output", tempfile.mkdtemp(dir=folder)]


def commands(model: PreTrainedModel, folder: Path) -> str:
    """Plan, train, and open the checkpoint; return the line of a refusal."""
    dtype = model.dtype
    model.float().save_pretrained(folder / "model")
    model.to(dtype)
    make_tokenizer().save_pretrained(folder / "model")
    arguments = asked(folder)
    prompt_tokens = len(make_tokenizer()(TRAINING_TEXT).input_ids)
    line = refusal_of(["plan", *arguments, "--prompt-tokens", str(prompt_tokens)])
    line = line or refusal_of(["train", *arguments, "--mode", "full"])
    if not line:
        AutoModelForCausalLM.from_pretrained(Path(arguments[-1], "checkpoints", "step-00001"))
    return line


def examined(kind: str) -> tuple[str, dict[str, Any]]:
    """Return the verdict on an architecture, from an earlier run if there is one."""
    path = RESULTS / f"{kind}.json"
    if not path.exists():
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            found = examine(kind, Path(folder))
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found))
    return kind, json.loads(path.read_text())


def page(results: dict[str, dict[str, Any]]) -> str:
    """Render docs/architectures.md."""

    def of(verdict: str) -> dict[str, dict[str, Any]]:
        return {kind: r for kind, r in results.items() if r["verdict"] == verdict}

    accepted, refused, missing = of("accepted"), of("refused"), of("not built")
    text = f"""# Architectures

What `make test-architectures` finds of the {len(results)} causal architectures of transformers \
{transformers.__version__}, on tiny random models: {len(accepted)} can be trained and evaluated, \
{len(refused)} are refused in one line, {len(missing)} could not be built so small and were not \
tried.

An accepted one has planned and done an update of all its weights; loss and gradients are those of \
its logits; completions sampled side by side are those of one alone.

- **unequal prompts**: completions of prompts of unequal length are sampled side by side, or each \
length by itself (slower; the same completions).
- **shared prompt**: the prompt is computed once for all its completions.
- **LoRA**: `--lora-targets all-linear`; attention: only targets in the attention.

| model_type | class | unequal prompts | shared prompt | LoRA |
|---|---|---|---|---|
"""
    for kind, r in accepted.items():
        side = "side by side" if r["pad"] else "by length"
        shared, lora = "yes" if r["share"] else "no", "attention" if r["lora"] else "all"
        text += f"| {kind} | {r['class']} | {side} | {shared} | {lora} |\n"
    text += "\n## Refused\n\n| model_type | what it says |\n|---|---|\n"
    for kind, r in refused.items():
        why = re.sub(r" \(.*\)", "", r["why"])  # Numbers depend on the machine's rounding.
        text += f"| {kind} | {why} |\n"
    return f"{text}\n## Not tried\n\n{', '.join(missing)}.\n"


def examine_all() -> int:
    """Examine every architecture; print those that fail, or else write the page."""
    workers = max(1, (os.cpu_count() or 1))
    results: dict[str, dict[str, Any]] = {}
    alone = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), **alone) as pool:
        try:
            for done in as_completed([pool.submit(examined, kind) for kind in KINDS]):
                kind, found = done.result()
                results[kind] = found
                print(f"{len(results)}/{len(KINDS)} {kind}: {found['verdict']}", flush=True)
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            return 130
    failed = {kind: r for kind, r in results.items() if r["verdict"] == "failed"}
    for kind, found in sorted(failed.items()):
        print(f"{kind}: {found['why']}\n" + "\n".join(found.get("where", ())), file=sys.stderr)
    if not failed:
        write_whole(PAGE, page({kind: results[kind] for kind in KINDS}))
        print(PAGE)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(examine_all())
