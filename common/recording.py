"""Parsing --layers, and observing the queries and keys of decoder layers in a forward pass."""

import contextlib

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@contextlib.contextmanager
def observe_attention(model, layers, observer, run_all_layers):
    """While open, observer(query, key, mask, scaling) is called by each of the decoder's `layers`.

    query: (B, H, N, d); key: (B, H_kv, N, d); mask: None (causal) or (B, 1, N, N). Unless
    run_all_layers, the layers above the last of `layers` are not run. Afterwards the model is as it
    was.
    """
    AttentionInterface.register("observed", _observed_attention)
    AttentionMaskInterface.register("observed", sdpa_mask)
    decoder = model.get_decoder()
    all_layers = decoder.layers
    implementation = model.config.get_text_config()._attn_implementation
    try:
        model.set_attn_implementation({"text_config": "observed"})
        for i in layers:
            all_layers[i].self_attn.attention_observer = observer
        if not run_all_layers:
            decoder.layers = all_layers[: max(layers) + 1]
        yield
    finally:
        decoder.layers = all_layers
        for i in layers:
            all_layers[i].self_attn.attention_observer = None
        model.set_attn_implementation({"text_config": implementation})


def _observed_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Scaled-dot-product attention, which an observer of the module may look at."""
    observer = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(query, key, attention_mask, scaling)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def layer_list(text):
    """argparse type: '14-16,20' gives [14, 15, 16, 20]; each layer counts once."""
    layers = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        last = last or first
        if int(last) < int(first):
            raise ValueError("no layers")
        layers |= set(range(int(first), int(last) + 1))
    return sorted(layers)
