"""Tiny random checkpoints of the five supported families, each saved with its own real processor.

    from tiny import build, random_image
    # 0.3M parameters, a tenth of a second, nothing downloaded
    folder = build("qwen3_vl", "/tmp/qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

The weights mean nothing. Everything around them is what a user's checkpoint has: the family's
special tokens, image processor, chat template, position scheme and generation_config. So a test
that passes here has met the real preprocessing.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    JanusConfig,
    JanusImageProcessor,
    JanusProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "llava_onevision", "janus")
# pixels: image side and patch side of the families of a fixed size, patch side of Qwen
SIDE = 32
PATCH = 8
QWEN_PATCH = 4
# hidden 64 * 0.15^2 > 1, so that signals survive the layers and the image reaches the logits
STD = 0.15

SENTENCES = (
    "The red circle is to the left of the blue square, and the small green triangle is above the "
    "yellow star.",
    "What is the area of the large shape? First, look at the image and count how many objects are "
    "inside it.",
    "Step 1: there are 3 circles and 5 squares. Step 2: 3 + 5 = 8, so we add 12 and 40. The answer "
    "is \\boxed{8}.",
    "<think> the angle is 60 degrees, because the triangle has equal sides </think> <answer> 60 "
    "</answer>",
    "Describe the picture in one sentence. Which color is in the middle, at the top, at the "
    "bottom, on the right?",
)

# Per family: pad, eos, what else its processor and template ask for, and what its template writes
# for an image.
QWEN = (
    "<|endoftext|>",
    "<|im_end|>",
    ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "<|vision_start|><|image_pad|><|vision_end|>",
)
TOKENS = {
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "idefics3": (
        "<|pad|>",
        "<end_of_utterance>",
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
        ],
        "<image>",
    ),
    "janus": (
        "<|pad|>",
        "<|end_of_sentence|>",
        ["<|begin_of_sentence|>", "<image_placeholder>", "<begin_of_image>", "<end_of_image>"],
        "<image_placeholder>\\n",
    ),
    "internvl": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], "<IMG_CONTEXT>\\n"),
    "llava_onevision": (
        "<|endoftext|>",
        "<|im_end|>",
        ["<|im_start|>", "<image>", "<video>"],
        "<image>\\n",
    ),
}


@cache
def byte_bpe():
    """(vocab, merges) of a byte-level BPE.

    256 bytes, so that any text can be encoded, and 144 merges of SENTENCES.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # sorted: the ids are the same in every process
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def tokenizer_of(family):
    vocab, merges = byte_bpe()
    pad, eos, others, _ = TOKENS[family]
    special = {"pad_token": pad, "eos_token": eos, "extra_special_tokens": others}
    if family == "idefics3":
        # Llama 3 tokenizers have no class of their own
        bpe = Tokenizer(models.BPE(vocab, merges))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        special["bos_token"] = "<|begin_of_text|>"
        return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    if family == "janus":
        special["bos_token"] = "<|begin_of_sentence|>"
        special["model_specific_special_tokens"] = {
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        }
    if family == "internvl":
        # its processor reads these names off the tokenizer
        special["model_specific_special_tokens"] = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    return Qwen2Tokenizer(vocab=vocab, merges=merges, **special)


def chat_template(family):
    """Jinja text.

    The content of a message is a string, or a list of {"type": "image"} and
    {"type": "text", "text": ...}.
    """
    content = (
        "{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}{{ '" + TOKENS[family][3] + "' }}"
        "{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    if family == "idefics3":
        return (
            "{{ '<|begin_of_text|>' }}{% for m in messages %}"
            "{{ m.role | capitalize + ': ' }}" + content + "{{ '<end_of_utterance>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
        )
    return (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' }}" + content + "{{ '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def processor_of(family, tokenizer):
    template = chat_template(family)
    square = {"height": SIDE, "width": SIDE}
    if family.startswith("qwen"):
        # 8 x 8 pixels per visual token and 256 to 1024 pixels per image: 4 to 16 tokens, as many
        # as the image needs
        size = {
            "size": {"shortest_edge": 256, "longest_edge": 1024},
            "patch_size": QWEN_PATCH,
        }
        image = Qwen2VLImageProcessor(**size)
        if family == "qwen2_5_vl":
            video = Qwen2VLVideoProcessor(**size)
            return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=template)
        video = Qwen3VLVideoProcessor(**size)
        return Qwen3VLProcessor(image, tokenizer, video, chat_template=template)
    if family == "idefics3":
        longest = {"longest_edge": SIDE}
        image = Idefics3ImageProcessor(
            size=longest, max_image_size=longest, do_image_splitting=False
        )
        return Idefics3Processor(image, tokenizer, image_seq_len=4, chat_template=template)
    if family == "internvl":
        # the processor overrides a saved crop_to_patches=False; max_patches=1 it respects
        image = GotOcr2ImageProcessor(size=square, min_patches=1, max_patches=1)
        video = InternVLVideoProcessor(size=square)
        return InternVLProcessor(
            image, tokenizer, video, image_seq_length=4, chat_template=template
        )
    if family == "janus":
        image = JanusImageProcessor(size=square)
        return JanusProcessor(image, tokenizer, chat_template=template, num_image_tokens=16)
    # one pinpoint: a lone image is its overview and one crop of its aspect ratio; of several
    # images each is one padded square
    image = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[SIDE, SIDE]])
    return LlavaOnevisionProcessor(
        image,
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def config_of(family, tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": STD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": STD}
    if family.startswith("qwen"):
        return qwen_config(family, text, vision, ids)

    vision |= {
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    if family == "idefics3":
        text["model_type"] = "llama"
        image_token = ids("<image>")
        return Idefics3Config(text_config=text, vision_config=vision, image_token_id=image_token)

    if family == "janus":
        return janus_config(text, vision, ids)

    text["model_type"] = "qwen2"
    if family == "internvl":
        # the only one here with tied embeddings; its default layer scale 0.1 would mute a layer
        vision["layer_scale_init_value"] = 1.0
        return InternVLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids("<IMG_CONTEXT>"),
            image_seq_length=4,
        )
    vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids("<image>"),
        video_token_index=ids("<video>"),
        image_grid_pinpoints=[[SIDE, SIDE]],
    )


def qwen_config(family, text, vision, ids):
    """The config of a Qwen-VL. Its rotary sections add up to head_dim / 2 = 8, shared by time,
    height and width in about the released proportions."""
    vision |= {"num_heads": 2, "depth": 2, "patch_size": QWEN_PATCH, "out_hidden_size": 64}
    tokens = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family == "qwen2_5_vl":
        text["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
        # one windowed layer, one full
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    text["rope_parameters"] = rope | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text["head_dim"] = 16
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)


def janus_config(text, vision, ids):
    """The config of a Janus: 16 visual tokens in, and 16 codes of 48 out."""
    del vision["intermediate_size"]
    codes = {
        "num_embeddings": 48,
        "embed_dim": 8,
        "base_channels": 32,
        "latent_channels": 32,
        # three halvings: as many pixels a code as a patch
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 0,
        "projection_dim": 64,
        "image_token_embed_dim": 64,
    }
    return JanusConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={**vision, "projection_dim": 64, "num_image_tokens": 16},
        vq_config=codes,
        image_token_id=ids("<image_placeholder>"),
    )


def build(family, folder, seed=0):
    """Writes model and processor of `family` to `folder` and returns it.

    The same seed gives the same weights.
    """
    tokenizer = tokenizer_of(family)
    # the caller's random numbers do not depend on what was built before
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
    eos = tokenizer.eos_token_id
    if family == "idefics3":
        # released checkpoints may end on any of several ids: idefics3 stands for those
        eos = [eos, tokenizer.convert_tokens_to_ids("<|end_of_text|>")]
    return save(model, processor_of(family, tokenizer), folder, eos)


def save(model, processor, folder, eos=None):
    """Writes a checkpoint to `folder` and returns it; eos: the id or ids that end a text."""
    folder = Path(folder)
    model.generation_config.eos_token_id = eos or processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def random_image(seed, size=(64, 48)):
    """A random RGB image of `size` = (width, height) pixels.

    It is a mosaic of 8 x 6 tiles, which survives being shrunk.
    """
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)
