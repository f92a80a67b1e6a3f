"""Small GGUF files, as llama.cpp would write them: a random Qwen2, and the tokenizer of tiny.py."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH
from training.tiny import CONTEXT, MERGES, SPECIAL, TEMPLATE, make_model, make_tokenizer

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Qwen's tokenizers have <|endoftext|>; transformers would add it beyond the embedding.
WORDS = [*make_tokenizer().convert_ids_to_tokens(range(len(make_tokenizer()))), "<|endoftext|>"]
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # of whole blocks, which have 32 weights


def random_model(*, tied=True):
    """Make a Qwen2 in which all biases and norms differ."""
    model = make_model("qwen2", tied=tied, vocab_size=len(WORDS), **SIZES)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def weights_of(model):
    """Return a model's weights under the names that GGUF has for them."""
    names = get_tensor_name_map(MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    split = {name: name.rpartition(".") for name, _ in model.named_parameters()}
    return {
        f"{names.get_name(split[name][0])}.{split[name][2]}": parameter.detach().numpy()
        for name, parameter in model.named_parameters()
    }


def stored(weight, kind):
    """Return a matrix as it comes out of a file that has it quantised."""
    kind = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(weight, kind), kind))


def write_gguf(path, model, kind="F32", *, weights=None, kinds=None, fields=None, arch="qwen2"):
    """Write a model's GGUF file, and return its path.

    Args:
        kind: quantisation of the matrices; vectors are in F32, as llama.cpp writes them.
        weights: arrays to add or replace, by name, and None for those to leave out; bytes are
            written as they are.
        kinds: another quantisation for some of them.
        fields: texts and small integers to add to the header.
    """
    writer, config = GGUFWriter(path, arch), model.config
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(WORDS)
    control = {*SPECIAL, WORDS[-1]}
    writer.add_token_types([3 if word in control else 1 for word in WORDS])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, value in (fields or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(name, value)
    for name, weight in {**weights_of(model), **(weights or {})}.items():
        if weight is not None:
            raw = GGMLQuantizationType[(kinds or {}).get(name, kind if weight.ndim > 1 else "F32")]
            data = weight if weight.dtype == np.uint8 else quantize(weight, raw)
            writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
