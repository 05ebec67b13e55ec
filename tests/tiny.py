"""Tiny random checkpoints of the five supported families, each saved with its own real processor.

    from tiny import build, picture
    folder = build("qwen3_vl", "/tmp/qwen3_vl")     # 0.3M parameters, a tenth of a second, nothing downloaded
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

The weights mean nothing; everything around them is what a user's checkpoint has: the family's special tokens, image
processor, chat template, position scheme and generation_config. So a test that passes here met the real preprocessing.
"""
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText, GotOcr2ImageProcessor, Idefics3Config, Idefics3ImageProcessor, Idefics3Processor,
    InternVLConfig, InternVLProcessor, InternVLVideoProcessor, LlavaOnevisionConfig, LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLConfig,
    Qwen3VLProcessor, Qwen3VLVideoProcessor,
)

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "internvl", "llava_onevision")
SIDE, PATCH, QWEN_PATCH = 32, 8, 4  # pixels: crop and patch side of the fixed-size families, patch side of Qwen
STD = 0.15  # hidden 64 * 0.15^2 > 1, so that signals survive the layers and the picture reaches the logits

SENTENCES = (
    "The red circle is to the left of the blue square, and the small green triangle is above the yellow star.",
    "What is the area of the large shape? First, look at the image and count how many objects are inside it.",
    "Step 1: there are 3 circles and 5 squares. Step 2: 3 + 5 = 8, so we add 12 and 40. The answer is \\boxed{8}.",
    "<think> the angle is 60 degrees, because the triangle has equal sides </think> <answer> 60 </answer>",
    "Describe the picture in one sentence. Which color is in the middle, at the top, at the bottom, on the right?",
)

# Per family: pad, eos, what else its processor and template ask for, and what its template writes for an image.
QWEN = ("<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>"], "<|vision_start|><|image_pad|><|vision_end|>")
TOKENS = {
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "idefics3": ("<|pad|>", "<end_of_utterance>", ["<|begin_of_text|>", "<|end_of_text|>", "<fake_token_around_image>",
                 "<image>", "<global-img>"], "<image>"),
    "internvl": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"], "<IMG_CONTEXT>\\n"),
    "llava_onevision": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<image>", "<video>"], "<image>\\n"),
}


@cache
def byte_bpe():
    """(vocab, merges) of a byte-level BPE: 256 bytes, so that any text can be encoded, and 144 merges of SENTENCES."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # sorted: the ids are the same in every process
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet,
                                                           show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def tokenizer_of(family):
    (vocab, merges), (pad, eos, rest, _) = byte_bpe(), TOKENS[family]
    special = dict(pad_token=pad, eos_token=eos, extra_special_tokens=rest)
    if family == "idefics3":  # Llama 3 tokenizers have no class of their own
        bpe = Tokenizer(models.BPE(vocab, merges))
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", **special)
    if family == "internvl":  # its processor reads these names off the tokenizer
        special["model_specific_special_tokens"] = dict(start_image_token="<img>", end_image_token="</img>",
                                                        context_image_token="<IMG_CONTEXT>", video_token="<video>")
    return Qwen2Tokenizer(vocab=vocab, merges=merges, **special)


def chat_template(family):
    """Jinja text. A message's content is a string or a list of {"type": "image"} and {"type": "text", "text": ...}."""
    content = ("{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}"
               "{{ '" + TOKENS[family][3] + "' }}{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}")
    if family == "idefics3":
        return ("{{ '<|begin_of_text|>' }}{% for m in messages %}{{ m.role | capitalize + ': ' }}" + content +
                "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
    return ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}" + content +
            "{{ '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def processor_of(family, tokenizer):
    template, square = chat_template(family), {"height": SIDE, "width": SIDE}
    if family.startswith("qwen"):
        # 8 x 8 pixels a visual token, 256 to 1024 pixels a picture: 4 to 16 tokens, as many as the picture needs
        size = dict(size={"shortest_edge": 256, "longest_edge": 1024}, patch_size=QWEN_PATCH)
        kind, video = ((Qwen2_5_VLProcessor, Qwen2VLVideoProcessor) if family == "qwen2_5_vl" else
                       (Qwen3VLProcessor, Qwen3VLVideoProcessor))
        return kind(Qwen2VLImageProcessor(**size), tokenizer, video(**size), chat_template=template)
    if family == "idefics3":
        image = Idefics3ImageProcessor(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE},
                                       do_image_splitting=False)
        return Idefics3Processor(image, tokenizer, image_seq_len=4, chat_template=template)
    if family == "internvl":  # the processor overrides a saved crop_to_patches=False; max_patches=1 it respects
        image = GotOcr2ImageProcessor(size=square, min_patches=1, max_patches=1)
        return InternVLProcessor(image, tokenizer, InternVLVideoProcessor(size=square), image_seq_length=4,
                                 chat_template=template)
    # one pinpoint: a lone picture is its overview and one aspect-true crop; of several each is one padded square
    image = LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[SIDE, SIDE]])
    return LlavaOnevisionProcessor(image, tokenizer, LlavaOnevisionVideoProcessor(size=square), num_image_tokens=16,
                                   vision_feature_select_strategy="full", chat_template=template)


def config_of(family, tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, initializer_range=STD,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)
    vision = dict(hidden_size=32, intermediate_size=64, initializer_range=STD)
    if family.startswith("qwen"):
        vision |= dict(num_heads=2, depth=2, patch_size=QWEN_PATCH, out_hidden_size=64)
        tokens = dict(image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
                      vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"))
        # the sections add up to head_dim / 2 = 8, shared by time, height and width in about the released proportions
        if family == "qwen2_5_vl":
            text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
            vision |= dict(window_size=16, fullatt_block_indexes=[1])  # one windowed layer, one full
            return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2],
                                       mrope_interleaved=True)
        text["head_dim"] = 16
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
        return Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    vision |= dict(num_attention_heads=2, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH)
    if family == "idefics3":
        return Idefics3Config(text_config=dict(model_type="llama", **text), vision_config=vision,
                              image_token_id=ids("<image>"))
    if family == "internvl":  # the only one here with tied embeddings; its default layer scale 0.1 would mute a layer
        return InternVLConfig(text_config=dict(model_type="qwen2", **text), image_token_id=ids("<IMG_CONTEXT>"),
                              vision_config=vision | dict(layer_scale_init_value=1.0), image_seq_length=4)
    return LlavaOnevisionConfig(text_config=dict(model_type="qwen2", **text), image_token_index=ids("<image>"),
                                vision_config=vision | dict(model_type="siglip_vision_model", vision_use_head=False),
                                video_token_index=ids("<video>"), image_grid_pinpoints=[[SIDE, SIDE]])


def build(family, folder, seed=0):
    """Write model and processor of `family` to `folder` and return it. The same seed gives the same weights."""
    folder, tokenizer = Path(folder), tokenizer_of(family)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not depend on what was built before
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
    # released checkpoints may end on any of several ids: idefics3 stands for those
    more = [tokenizer.convert_tokens_to_ids("<|end_of_text|>")] if family == "idefics3" else []
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *more] if more else tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor_of(family, tokenizer).save_pretrained(folder)
    return folder


def picture(seed, size=(64, 48)):
    """Random RGB picture, size = (width, height) in pixels: a mosaic of 8 x 6 tiles, which survives being shrunk."""
    tiles = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)
