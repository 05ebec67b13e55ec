"""Which decoder layers are recorded, and observing their queries and keys in a forward pass."""

import contextlib
from argparse import ArgumentTypeError

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common.attention import attention_spans
from common.records import BadRecord, fail

# more than any decoder has
MOST_LAYERS = 10_000


class RecordedLayers:
    """The layers whose attention is recorded: `chosen`, indices from 0.

    Only softmax attention over a whole sequence, image and caption, can be shared out among them.
    By default the upper-middle of the layers that have it, their third quarter. In a family whose
    layers all see a window, they are used for sequences of at most `limit` tokens.
    alone: whether captions run one by one, as padding could reach the state of other layers.
    """

    def __init__(self, model, chosen=None):
        family = model.config.model_type
        spans = attention_spans(model)
        self.alone = 0 in spans
        self.limit = max(spans)
        usable = [i for i, span in enumerate(spans) if span and span == self.limit]
        if getattr(model.config.get_text_config(), "cross_attention_layers", None):
            fail(f"{family} reads images by cross-attention, in no sequence with text: no D_vis")
        if not usable:
            fail(f"{family} has no layer with softmax attention over image and caption: no D_vis")

        n = len(usable)
        self.chosen = chosen or usable[n // 2 : max(n // 2 + 1, n * 3 // 4)]
        if max(self.chosen) >= len(spans):
            fail(f"--layers: the decoder has layers 0 to {len(spans) - 1}")
        if not set(self.chosen) <= set(usable):
            names = ", ".join(map(str, usable))
            fail(f"--layers: of {family}, only these attend to all of image and caption: {names}")
        self.are_all = n == len(spans)

    def check_length(self, tokens):
        """Raises BadRecord for a sequence of more tokens than the layers see."""
        if tokens > self.limit:
            raise BadRecord(
                f"image and caption, {tokens} tokens, exceed the {self.limit} that the model's "
                "layers see: lower --max-pixels or shorten the caption"
            )

    def __str__(self):
        names = f"layers {list(self.chosen)}"
        if self.are_all:
            return names
        return f"{names}, of those that attend to all of image and caption"


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
        if not int(first) <= int(last) < MOST_LAYERS:
            raise ArgumentTypeError(f"{text}: write layers from 0, as 14-20 or 3,5,7")
        layers |= set(range(int(first), int(last) + 1))
    return sorted(layers)
