"""The functions of flash-attn 2 that transformers calls, by their documented behaviour, in torch.

Tensors are (batch, tokens, heads, head_dim), or (tokens, heads, head_dim) with cumulative lengths.
Query heads share key heads in groups. A causal mask is aligned to the bottom right corner: the last
query sees the last key. Runs on any device and in any dtype.
"""

import sys
from types import ModuleType

import torch
from transformers import modeling_flash_attention_utils as theirs


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    assert dropout_p == softcap == 0 and window_size == (-1, -1) and alibi_slopes is None
    assert not return_attn_probs
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    queries, keys = scores.shape[-2:]
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~seen, -torch.inf)
    # A query that sees no key gives zeros.
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(0.0), v)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and block_table is None
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (len(q), len(k)) and len(v) == len(k)
    lengths = [x.diff().tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert [max(x) for x in lengths] == [max_seqlen_q, max_seqlen_k]
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    more = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    return torch.cat([flash_attn_func(*(x[None] for x in part), *more)[0] for part in parts])


def install(patch):
    """Let transformers find these functions as flash-attn; `patch` is a pytest.MonkeyPatch."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    for function in (flash_attn_func, flash_attn_varlen_func):
        setattr(package, function.__name__, function)
    package.flash_attn_with_kvcache = None  # of a paged cache, which the trainer has none of
    padding.pad_input, padding.unpad_input = theirs._pad_input, theirs._unpad_input
    patch.setitem(sys.modules, "flash_attn", package)
    patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    patch.setattr(theirs, "is_flash_attn_2_available", lambda: True)
    patch.setattr(theirs, "_loaded_implementation", None)
