"""Random models with 267 vocabulary entries, and their tokenizer, for plain computation."""

import json
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from em_kernels.hf import head_of
from em_kernels.training.config import Sampling, TrainConfig
from em_kernels.training.engines.optimizer import MasterAdamW
from em_kernels.training.engines.step import Scoring, entropy_step
from em_kernels.training.models.rounding import to_bf16

CONTEXT = 128
TRAINING_TEXT = "What is 2 + 3?"
MERGES = [("t", "h"), ("th", "e"), ("Ċ", "Ċ"), ("3", "Ċ"), ("Ġ", "a"), ("a", "b"), ("ab", "c")]
SPECIAL = ["<|end|>", "<|user|>", "<|pad|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # wide enough that distributions are not flat
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 2,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes and a few merges, two of which hold a newline."""
    words = [*SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(kind="llama", *, tied=True, dtype=torch.float32, **settings):
    """Make a random model of a transformers architecture, the same one every time."""
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": len(make_tokenizer()), "tie_word_embeddings": tied, **settings}
    config = AutoConfig.for_model(kind, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_tiny(folder: Path, kind="llama", **settings) -> Path:
    """Save a random model and its tokenizer, and return the folder."""
    make_model(kind, **settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


PLAIN = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1, max_new_tokens=12)


def settings(folder, output, **changes):
    base = {"prompt": TRAINING_TEXT, "steps": 2, "rollouts": 6, "sampling": PLAIN, "lr": 1e-3}
    base["grad_tolerance"] = 0.0  # exact, as plain torch is
    base |= {"mode": "full", "moments": "fp32", "gradients": "fp32", "micro_batch": 4096}
    base |= {
        "rollout_batch": 64,
        "gradient_checkpointing": False,
        "dtype": "float32",
        "attention": "sdpa",
        "share_prefix": True,
    }
    base |= {"chunk_bytes": 1 << 28, "save_optimizer": False, "save_at": ()}
    return TrainConfig(
        **{"model": str(folder), "output": output, "device": "cpu", **base, **changes}
    )


def run(config, model=None):
    from em_kernels.training.trainer import train

    return train(config, model=model, console=Console(file=StringIO()))


def make_optimizer(model, config):
    return MasterAdamW(
        model.named_parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip=config.clip,
        device=torch.device("cpu"),
        moments=torch.float32,
        gradients=torch.float32,
    )


def loss_and_gradients(model, rollouts, config, micro_batch=10**6, padding=0, base=None):
    """Return the loss and, by parameter, the gradients of one update; base: as entropy_step's."""
    optimizer, scoring = make_optimizer(model, config), Scoring(config.official_loss, padding)
    given = model, head_of(model), rollouts, config, optimizer, micro_batch, lambda: None
    loss = entropy_step(*given, scoring=scoring, base=base)
    gradients = {s.name: s.gradient.view(s.parameter.shape) for s in optimizer._with_gradient()}
    optimizer.close()
    return loss, gradients


def rounded(weight):
    """Round a weight to bf16 as a checkpoint does."""
    return to_bf16(weight.detach().float().flatten()).view(weight.shape)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
