"""The toy's two models, untrained: a small Idefics3 with its real processor, and a small CLIP."""

import math
import re

import open_clip
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from common.text import MASK
from reward import FILL_PROMPT
from score_dependency import CAPTION_PROMPT
from toy.world import SIDE

# tokens
CLIP_CONTEXT = 16
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def make_tokenizer(texts, special, **names):
    """A byte-level BPE of at most 1,000 tokens, enough to make every word of `texts` one token.

    special: its special tokens; names: what they are for, as in pad_token="<pad>".
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, clean_up_tokenization_spaces=False, **names
    )


def make_vlm_tokenizer(captions, special, **names):
    """The tokenizer of a base, made from captions, their words, and the prompts."""
    # an answer begins without a space, so words are learned without one as well
    words = []
    for caption in captions:
        words += re.findall(r"\w+", caption)
    prompts = [CAPTION_PROMPT, FILL_PROMPT, "User: Assistant:"] * 10
    tokenizer = make_tokenizer([*captions, *words, *prompts], special, **names)
    # these are not special tokens, because decoding must show them
    form = (MASK, "<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in form])
    return tokenizer


# ---------------------------------------------------------------- the base model


def make_processor(captions):
    """The real Idefics3Processor around a tokenizer made from captions and prompts.

    An image is 16 visual tokens.
    """
    special = [
        "<pad>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<fake_token_around_image>",
        "<image>",
        "<global-img>",
    ]
    tokenizer = make_vlm_tokenizer(
        captions,
        special,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
    )
    images = Idefics3ImageProcessor(
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=TEMPLATE)


def make_base(tokenizer):
    """An untrained Idefics3 of 0.8 M parameters.

    Its vision encoder has absolute positions, so it learns places early.
    """
    ids = {}
    for name in ("pad", "bos", "eos"):
        ids[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    shared = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        # about 1 / sqrt(width); the default suits a wide model
        "initializer_range": 0.05,
    }
    text = {
        "model_type": "llama",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        **shared,
        **ids,
    }
    vision = {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 16, **shared}
    config = Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=1,
        tie_word_embeddings=True,
        initializer_range=shared["initializer_range"],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **ids,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model


# ---------------------------------------------------------------- the CLIP model


def make_clip_tokenizer(captions):
    """A tokenizer that ends every text with <eos>, where the text encoder reads its feature."""
    tokenizer = make_tokenizer(captions, ["<pad>", "<eos>"], pad_token="<pad>", eos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def make_clip(tokenizer, side):
    """An untrained open_clip model, its configuration, and its transform (PIL image -> tensor)."""
    vision = {
        "image_size": side,
        "patch_size": side // 4,
        "width": 128,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 3.0,
    }
    text = {
        "context_length": CLIP_CONTEXT,
        "vocab_size": len(tokenizer),
        "width": 96,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 3.0,
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "hf_tokenizer_name": "in this folder",
    }
    config = {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config, init_logit_scale=math.log(20))

    half = (0.5, 0.5, 0.5)
    open_clip.model.set_model_preprocess_cfg(model, {"size": side, "mean": half, "std": half})
    transform = open_clip.transform.image_transform(side, is_train=False, mean=half, std=half)
    return model, config, transform
