"""Prompts in, drawings out: the tokens of a prompt, the codes of an image."""

import torch
import torch.nn.functional as F
from PIL import Image

from common.records import BadRecord, fail
from common.vlm import chat_prompt, encode_prompt


def require_drawing(policy, name):
    """Ends the program if the checkpoint `name` cannot draw."""
    if "image" not in policy.media:
        fail(f"{name} cannot draw: choose a checkpoint that predicts images too, such as Janus")


def encode_drawing(model, processor, text):
    """encode_prompt() of a prompt that ends where the first code of an image is predicted."""
    begin = processor.image_start_token
    if begin in text:
        raise BadRecord(f"the text contains the token {begin}")
    prompt = chat_prompt(processor, text, images=0) + begin
    room = model.config.vision_config.num_image_tokens
    return encode_prompt(model, processor, prompt, [], room)


@torch.no_grad()
def drawings_of_codes(model, processor, codes):
    """PIL images, in RGB, of codes (N, number of codes).

    Like the image processor's postprocess(), but rounded, and without need of its backend.
    """
    mean = torch.tensor(processor.image_processor.image_mean)
    std = torch.tensor(processor.image_processor.image_std)
    images = []
    for chunk in codes.to(model.device).split(32):
        pixels = model.decode_image_tokens(chunk).float().cpu() * std + mean  # (n, H, W, 3)
        pixels = (255 * pixels).round().clamp(0, 255).to(torch.uint8)
        images += [Image.fromarray(image) for image in pixels.numpy()]
    return images


@torch.no_grad()
def codes_of_drawings(model, processor, images):
    """The codes (N, number of codes) of PIL images, which are prepared as those that are read.

    The vectors that are compared are made unit vectors, as those of the codebook are: encode() of
    transformers does not do this, and decode() does.
    """
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    vq = model.model.vqmodel
    codebook = F.normalize(vq.quantize.embedding.weight, dim=1)
    codes = []
    for chunk in pixels.to(model.device).split(32):
        vectors = F.normalize(vq.quant_conv(vq.encoder(chunk)), dim=1)  # (n, D, h, w)
        codes.append(torch.einsum("ndhw,kd->nhwk", vectors, codebook).argmax(-1).flatten(1))
    return torch.cat(codes)
