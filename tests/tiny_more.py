"""Tiny random checkpoints of families beyond those of tiny.py, with their own real processors.

    from tiny_more import MORE_FAMILIES, build_more
    folder = build_more("gemma3", "/tmp/gemma3")

Two or three layers each, so that every kind of layer of the family is there. Images come in
several tiles or crops where the family cuts them.
"""

import json
import shutil

import torch
from tiny import PATCH, SIDE, STD, byte_bpe, save
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    AyaVisionProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Lfm2VlConfig,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    Mistral3Config,
    MllamaConfig,
    MllamaImageProcessor,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
)

SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
# the window of Aya Vision, in tokens: shorter than a prompt with two crops of 4 tokens
WINDOW = 24

# what the template of a family writes for an image
IMAGE = {
    "llava_next": "<image>",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
    "mistral3": "[IMG]",
    "paligemma": "<image>",
    "gemma3": "<start_of_image>",
    "aya_vision": "<image>",
    "mllama": "<|image|>",
    "lfm2_vl": "<image>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
}
MORE_FAMILIES = tuple(IMAGE)
# further tokens that a processor asks for
SPECIAL = {
    "llava_next": ["<image>"],
    "glm4v": ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
    + ["<|begin_of_video|>", "<|end_of_video|>"],
    "mistral3": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "paligemma": ["<image>"],
    "gemma3": [],
    "aya_vision": ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL"],
    "mllama": ["<|python_tag|>", "<|image|>"],
    "lfm2_vl": ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"],
    "qwen3_5": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
}
# tokens that a processor reads off the tokenizer by name
NAMED = {
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
}


def tokenizer_of(family):
    vocab, merges = byte_bpe()
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<|begin_of_text|>",
        extra_special_tokens=["<|im_start|>", *SPECIAL[family]],
        model_specific_special_tokens=NAMED.get(family, {}),
    )


def chat_template(family):
    content = "{% if c.type == 'image' %}" + IMAGE[family] + "{% else %}{{ c.text }}{% endif %}"
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for c in m.content %}" + content + "{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def processor_of(family, tokenizer):
    kwargs = {"tokenizer": tokenizer, "chat_template": chat_template(family)}
    pixels = {"shortest_edge": 256, "longest_edge": 1024}
    if family == "llava_next":
        image = LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
        )
        strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaNextProcessor(image, patch_size=PATCH, **strategy, **kwargs)
    if family == "glm4v":
        image = Glm4vImageProcessor(size=pixels, patch_size=4)
        video = Glm4vVideoProcessor(size=pixels, patch_size=4)
        return Glm4vProcessor(image, video_processor=video, **kwargs)
    if family == "mistral3":
        image = PixtralImageProcessor(size={"longest_edge": SIDE}, patch_size=PATCH)
        return PixtralProcessor(image, patch_size=PATCH, spatial_merge_size=2, **kwargs)
    if family == "paligemma":
        return PaliGemmaProcessor(SiglipImageProcessor(size=SQUARE, image_seq_length=16), **kwargs)
    if family == "gemma3":
        image = Gemma3ImageProcessor(size=SQUARE)
        return Gemma3Processor(image, image_seq_length=4, **kwargs)
    if family == "aya_vision":
        image = GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=2)
        return AyaVisionProcessor(
            image, patch_size=PATCH, img_size=SIDE, downsample_factor=2, **kwargs
        )
    if family == "mllama":
        return MllamaProcessor(MllamaImageProcessor(size=SQUARE), **kwargs)
    if family == "lfm2_vl":
        tiles = {"min_tiles": 2, "max_tiles": 2, "tile_size": SIDE, "max_pixels_tolerance": 1.0}
        tokens = {"min_image_tokens": 2, "max_image_tokens": 4, "encoder_patch_size": PATCH}
        return Lfm2VlProcessor(Lfm2VlImageProcessor(size=SQUARE, **tiles, **tokens), **kwargs)
    image = Qwen2VLImageProcessor(size=pixels, patch_size=4)
    video = Qwen3VLVideoProcessor(size=pixels, patch_size=4)
    return Qwen3VLProcessor(image, video_processor=video, **kwargs)


def config_of(family, tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": STD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "initializer_range": STD,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    siglip = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
    if family == "llava_next":
        return LlavaNextConfig(
            text_config={**text, "model_type": "llama"},
            vision_config={**vision, "model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=ids("<image>"),
            image_grid_pinpoints=PINPOINTS,
        )
    if family == "mistral3":
        return Mistral3Config(
            text_config={**text, "model_type": "mistral", "sliding_window": None},
            vision_config={**vision, "model_type": "pixtral"},
            image_token_index=ids("[IMG]"),
            vision_feature_layer=-1,
        )
    if family == "paligemma":
        return PaliGemmaConfig(
            text_config={**text, "model_type": "gemma"},
            vision_config={**siglip, "projection_dim": 64},
            image_token_index=ids("<image>"),
            projection_dim=64,
            hidden_size=64,
        )
    if family == "gemma3":
        layers = {"sliding_window": 512, "query_pre_attn_scalar": 16}
        layers["layer_types"] = ["sliding_attention", "full_attention"]
        return Gemma3Config(
            text_config={**text, **layers},
            vision_config=siglip,
            mm_tokens_per_image=4,
            boi_token_index=ids("<start_of_image>"),
            eoi_token_index=ids("<end_of_image>"),
            image_token_index=ids("<image_soft_token>"),
        )
    if family == "aya_vision":
        text |= {"model_type": "cohere2", "sliding_window": WINDOW}
        text["layer_types"] = ["sliding_attention", "full_attention"]
        return AyaVisionConfig(
            text_config=text, vision_config=siglip, image_token_index=ids("<|IMG_PATCH|>")
        )
    if family == "mllama":
        # as released, no logit belongs to the image token, the last one
        text |= {"vocab_size": len(tokenizer) - 1, "cross_attention_layers": [1]}
        text["num_hidden_layers"] = 3
        del text["head_dim"]
        vision |= {
            "attention_heads": vision.pop("num_attention_heads"),
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        }
        return MllamaConfig(
            text_config=text, vision_config=vision, image_token_index=ids("<|image|>")
        )
    if family == "lfm2_vl":
        del text["head_dim"]
        text |= {"model_type": "lfm2", "full_attn_idxs": [1], "block_multiple_of": 32}
        text["num_hidden_layers"] = 3
        vision |= {"model_type": "siglip2_vision_model", "vision_use_head": False}
        vision["num_patches"] = 16
        return Lfm2VlConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids("<image>"),
            projector_hidden_size=32,
        )
    return m_rope_config(family, text, vision, ids)


def m_rope_config(family, text, vision, ids):
    """Those with positions in time, height and width."""
    vision |= {"num_heads": 2, "depth": 2, "patch_size": 4, "out_hidden_size": 64}
    del vision["num_attention_heads"], vision["num_hidden_layers"]
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if family == "glm4v":
        del text["head_dim"]
        text["rope_parameters"] = rope | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
        return Glm4vConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=ids("<|image|>"),
            video_token_id=ids("<|video|>"),
            image_start_token_id=ids("<|begin_of_image|>"),
            image_end_token_id=ids("<|end_of_image|>"),
            video_start_token_id=ids("<|begin_of_video|>"),
            video_end_token_id=ids("<|end_of_video|>"),
        )
    del vision["image_size"]
    text["rope_parameters"] = rope | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    text["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
    text["num_hidden_layers"] = 3
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    linear |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    return Qwen3_5Config(
        text_config={**text, **linear},
        vision_config={**vision, "num_position_embeddings": 16},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def build_more(family, folder, seed=0):
    """Writes model and processor of `family` to `folder` and returns it."""
    tokenizer = tokenizer_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config_of(family, tokenizer))
        for name, parameter in model.named_parameters():
            # new models hold zeros here that would hide the image: gates, and Gemma's projection
            is_gate = "gate" in name and parameter.numel() == 1
            if is_gate or "mm_input_projection" in name:
                torch.nn.init.normal_(parameter, std=1.0 if is_gate else STD)
    return save(model, processor_of(family, tokenizer), folder)


def changed(folder, source, **settings):
    """A copy of a checkpoint in `folder` with other settings of its decoder, such as a window."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder
