"""What the layers of a decoder attend to, and attention without copies of keys and values."""

import math

import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attention_spans(model):
    """How many tokens each decoder layer sees by softmax attention over the sequence: a list.

    inf is the whole sequence; n a window, or chunks, of n tokens; 0 a layer of another kind, such
    as a convolution, linear attention or cross-attention.
    """
    spans = []
    # the cache that transformers makes for a model knows the kind of each layer
    cache = DynamicCache(config=model.config)
    for layer, cached in zip(model.get_decoder().layers, cache.layers):
        span = 0
        if hasattr(layer, "self_attn") and type(cached) is DynamicLayer:
            span = math.inf
        elif hasattr(layer, "self_attn") and type(cached) is DynamicSlidingWindowLayer:
            span = cached.sliding_window
        spans.append(span)
    return spans


def use_grouped_attention(model):
    """Has the decoder compute attention by grouped_attention()."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", sdpa_mask)
    model.set_attn_implementation({"text_config": "grouped"})


def use_plain_attention(model):
    """Has the decoder compute attention as it was loaded."""
    model.set_attn_implementation({"text_config": "sdpa"})


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """sdpa without the copies of keys and values that transformers makes at every step.

    query (B, H, n, d), key and value (B, H_kv, m, d), mask (B, 1, n, m), or repeated already to
    (B, 1, H / H_kv * n, m). Heads that share a key become rows. Returns (B, n, H, d).
    """
    if attention_mask is None:
        # causal, without padding: torch shares the keys itself
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    B, H, n, d = query.shape
    rows = query.reshape(B, key.shape[1], -1, d)  # (B, H_kv, H / H_kv * n, d)
    repeats = rows.shape[2] // attention_mask.shape[2]
    if repeats > 1:
        attention_mask = attention_mask.repeat(1, 1, repeats, 1)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.view(B, H, n, d).transpose(1, 2).contiguous(), None
