"""Drawing prompts in, drawings out: lines of JSON, prompts as tensors, the codes of an image."""

import torch
import torch.nn.functional as F
from PIL import Image

from common.records import BadRecord, fail, read_jsonl
from common.vlm import chat_prompt, encode_prompt


def read_prompts(path):
    """Yields (line number, {id, prompt, tag?, include?, exclude?, ...} or BadRecord).

    The id of a record without one, as in GenEval's file, is the index of its line: "0" at first.
    """
    for number, record in read_jsonl(path, ("prompt",)):
        if isinstance(record, dict):
            record = {"id": number - 1, **record}
            record = _checked(record)
        yield number, record


def _checked(record):
    """The record, or a BadRecord if it cannot be drawn, or judged by GenEval's rules."""
    if type(record["id"]) is int:
        record["id"] = str(record["id"])
    texts = (record["prompt"], record["id"], record.get("tag", ""))
    if not all(isinstance(text, str) for text in texts) or not record["prompt"].strip():
        return BadRecord("prompt, id and tag must be text, and the prompt not empty")
    for field in ("include", "exclude"):
        wanted = record.get(field, [])
        if not isinstance(wanted, list) or not all(map(_is_requirement, enumerate(wanted))):
            form = 'class, count from 1, color?, position? ["left of", index of an earlier one]'
            return BadRecord(f"{field} must be a list of objects with {form}")
    return record


def _is_requirement(numbered):
    match numbered:
        case i, {"position": [relation, int(target)]}:
            is_sound = relation in ("left of", "right of", "above", "below") and 0 <= target < i
        case _, wanted:
            is_sound = isinstance(wanted, dict) and "position" not in wanted
    match numbered:
        case _, {"class": str(), "count": int(count), **more}:
            return is_sound and count > 0 and isinstance(more.get("color", ""), str)
    return False


def load_prompts(path):
    """The usable records of a file of prompts; unusable ones are named on the screen."""
    records = []
    for number, record in read_prompts(path):
        if isinstance(record, dict):
            records.append(record)
        else:
            print(f"skipped {path}:{number}: {record}")
    if not records:
        fail(f"{path}: no prompt that can be used; each line should be an object with a prompt")
    return records


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
