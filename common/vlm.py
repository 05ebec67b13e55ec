"""A vision-language model: loading it, and prompts and responses as tensors.

All stages lay out a sequence alike: prompts end and responses begin at one column.

    [ padding | prompt with visual tokens ][ response | padding ]
"""

import collections
import signal

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.records import BadRecord, fail

# of processor time, for the first use of a chat template, which takes hundredths of one
TEMPLATE_SECONDS = 5


def load_vlm(name, device, trust_remote_code=False, dtype=None):
    """(model in eval mode, processor) of a hub id or folder.

    dtype: bf16 on a GPU and fp32 on a CPU unless given. A checkpoint that cannot be used here ends
    the program with one line that says what it lacks.
    """
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        # transformers, tokenizers, safetensors and torch each raise their own for a broken file
        fail(f"{name} cannot be loaded as a vision-language model: {reason_of(error)}")
    _check_parts(name, model, processor)
    model = model.to(device).eval()
    require_finite(name, model)
    return model, processor


def reason_of(error):
    """In one line, what a library says of a checkpoint that it could not load."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which only --model with --trust-remote-code may run"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_parts(name, model, processor):
    """Ends the program if an image cannot be placed in a chat prompt of this checkpoint."""
    tokenizer = getattr(processor, "tokenizer", None)
    parts = {
        "image processor": getattr(processor, "image_processor", None),
        "chat template": getattr(processor, "chat_template", None),
        "image token": getattr(model.config, "image_token_id", None),
        "fast tokenizer": getattr(tokenizer, "is_fast", None) or None,
    }
    for what, part in parts.items():
        if part is None:
            fail(f"{name} has no {what}: choose an instruction-tuned vision-language checkpoint")

    if processor.image_token not in _sample_prompt(name, processor):
        fail(
            f"{name}: its chat template places no image: choose an instruction-tuned "
            "vision-language checkpoint"
        )


def _sample_prompt(name, processor):
    """A chat prompt; a template that raises, or does not end, ends the program."""

    def give_up(signum, frame):
        fail(
            f"{name}: its chat template does not end: choose another checkpoint, or correct the "
            "template"
        )

    previous = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        return chat_prompt(processor, "Describe this image.")
    except Exception as error:
        # whatever a template raises
        fail(f"{name}: its chat template cannot be used ({error})")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


def require_finite(name, model):
    """Ends the program if a weight is NaN or infinite: every score would be NaN, too."""
    for weight, values in model.named_parameters():
        # a sum copies nothing, and if it is finite, so are all summands
        if not values.sum().isfinite() and not values.isfinite().all():
            fail(
                f"{name}: its weight {weight} holds NaN or infinity: download it again, or choose "
                "another checkpoint"
            )


def end_of_text_ids(model, processor):
    """The ids of the tokens that end a text, sorted; a checkpoint without any ends the program."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    ids = [i for i in (processor.tokenizer.eos_token_id, *ids) if i is not None]
    known = range(model.get_input_embeddings().num_embeddings)
    if not ids or not all(type(i) is int and i in known for i in ids):
        fail(
            f"{model.name_or_path} has no token that ends a text: name one as eos_token in its "
            "tokenizer_config.json, and see eos_token_id in its generation_config.json"
        )
    return sorted(set(ids))


# ---------------------------------------------------------------- prompts


def chat_prompt(processor, text, images=1):
    """The chat-formatted prompt: `images` placeholders, then `text`, then the answer's opening.

    Text that contains the image token is a BadRecord.
    """
    if processor.image_token in text:
        raise BadRecord(f"the text contains the image token {processor.image_token}")
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_prompt(model, processor, prompt, images, room=0):
    """What the processor makes of one prompt and its PIL images: a dict of CPU tensors.

    input_ids is (1, P). Nothing is ever truncated, which would cut through visual tokens: images
    that get no visual tokens, or a prompt that does not fit the model's positions with `room`
    tokens after it, are a BadRecord. No model pass is needed, so a thread can do this ahead.
    """
    try:
        encoded = dict(
            processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
        )
    except ValueError as error:
        # an image of 1000 x 1 pixels, a video token in the text
        raise BadRecord(f"the processor refuses it ({error})") from None

    # what the processors of Gemma3 and Aya Vision write where the prompt has their image token
    token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    if token != processor.image_token and token in prompt:
        raise BadRecord(f"the text contains the image token {token}")
    length = encoded["input_ids"].shape[1]
    visual = int((encoded["input_ids"] == model.config.image_token_id).sum())
    limit = model.config.get_text_config().max_position_embeddings
    # of PaliGemma, which makes them of a caption that it is not given
    encoded.pop("labels", None)
    if images and not visual:
        raise BadRecord("no visual tokens: does this checkpoint's chat template place images?")
    if length + room > limit:
        raise BadRecord(
            f"a prompt of {length} tokens, {visual} of them visual, with {room} after it exceeds "
            f"the model's {limit}: lower --max-pixels or shorten the text"
        )
    return encoded


class Batch(collections.UserDict):
    """Model inputs of B prompts; `prompts` are the same as encode_prompt() returned them.

    No dict: some versions of FSDP rebuild those that they move to a GPU, without `prompts`.
    """

    prompts: list


def join_prompts(model, prompts):
    """The Batch of B prompts of encode_prompt(), on the model's device.

    Texts are left-padded and pixel tensors zero-padded, as the families' own processors do.
    Returns input_ids and attention_mask (B, P), the family's pixel tensors, and position_ids
    (B, P), or (3, B, P) for the M-RoPE of Qwen-VL.
    """
    batch = Batch()
    batch.prompts = prompts
    for name in prompts[0]:
        tensors = [_pad_to_largest(model, name, prompt[name], prompts) for prompt in prompts]
        batch[name] = torch.cat(tensors).to(model.device)

    if hasattr(model.model, "get_rope_index"):
        # explicit positions: rope_deltas kept on the model go stale (transformers PR#43952)
        grids = {k: batch[k] for k in ("mm_token_type_ids", "image_grid_thw") if k in batch}
        positions = model.model.get_rope_index(
            batch["input_ids"], attention_mask=batch["attention_mask"], **grids
        )
        batch["position_ids"] = positions[0]
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    batch.pop("mm_token_type_ids", None)  # only positions need it
    return batch


def _pad_to_largest(model, name, tensor, prompts):
    """`tensor`, padded in all but its first dimension to the largest of that name."""
    is_per_token = all(p[name].shape[:2] == p["input_ids"].shape for p in prompts)
    value = 0
    if name == "input_ids":
        value = model.config.get_text_config().pad_token_id or 0

    padding = []
    for dimension in range(tensor.ndim - 1, 0, -1):  # F.pad wants the last dimension first
        largest = max(prompt[name].shape[dimension] for prompt in prompts)
        gap = largest - tensor.shape[dimension]
        is_left = is_per_token and dimension == 1
        padding += [gap, 0] if is_left else [0, gap]
    return F.pad(tensor, padding, value=value)


def encode_prompts(model, processor, prompts, images, room=0):
    """join_prompts() of encode_prompt() of each; images: a list of PIL images per prompt."""
    encoded = [encode_prompt(model, processor, *pair, room) for pair in zip(prompts, images)]
    return join_prompts(model, encoded)


# ---------------------------------------------------------------- responses


def ids_of_images(processor):
    """The set of token ids that stand for images; some families write others than they read."""
    # Janus's processor knows the token, but not its id
    ids = {processor.tokenizer.convert_tokens_to_ids(processor.image_token)}
    return ids.union(getattr(processor, "image_token_ids", None) or ()) - {None}


def encode_responses(processor, texts, device, eos=None):
    """Right-padded ids and mask (B, S) of responses, and the character spans of their tokens.

    `eos`, if given, is appended. Empty text, and text with the image token, are a BadRecord.
    """
    sequences = []
    offsets = []
    for text in texts:
        encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not text or not encoded.input_ids:
            raise BadRecord("the text is empty")
        image_tokens = ids_of_images(processor).intersection(encoded.input_ids)
        if image_tokens:
            token = processor.tokenizer.convert_ids_to_tokens(min(image_tokens))
            raise BadRecord(f"the text contains the image token {token}")
        ids = list(encoded.input_ids)
        if eos is not None:
            ids.append(eos)
        sequences.append(ids)
        offsets.append(encoded.offset_mapping)

    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids.to(device), mask.to(device), offsets


def response_positions(position_ids, length):
    """Positions of `length` tokens that follow prompts at position_ids (B, P) or (3, B, P).

    Returns (B, S) or (3, B, S). M-RoPE continues after the largest of its three coordinates,
    wherever in the prompt that is.
    """
    last = position_ids.amax(-1, keepdim=True)
    if position_ids.ndim == 3:
        last = last.amax(0, keepdim=True).expand(3, -1, -1)
    return last + torch.arange(1, length + 1, device=position_ids.device)


def append_responses(batch, ids, mask):
    """The model inputs of prompts followed by responses (B, S): one plain pass over everything."""
    responses = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": response_positions(batch["position_ids"], ids.shape[1]),
    }
    joined = dict(batch)
    if "cross_attention_mask" in batch:
        # (B, P, images, tiles) of Mllama: a response sees what the end of its prompt sees
        end = batch["cross_attention_mask"][:, -1:]
        responses["cross_attention_mask"] = end.expand(-1, ids.shape[1], -1, -1)
    for name, response in responses.items():
        dimension = 1 if name == "cross_attention_mask" else -1
        joined[name] = torch.cat([batch[name], response.to(batch[name].dtype)], dimension)
    return joined


def language_head(model):
    """Hidden states to logits, as the model's own forward() has it."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return model.lm_head
    return lambda hidden: cap * torch.tanh(model.lm_head(hidden) / cap)


def response_logps(model, hidden, ids):
    """Log-probs (B, S) in nats of responses, from hidden states (B, N, D) that end with theirs."""
    head = language_head(model)
    hidden = hidden[:, -ids.shape[1] - 1 : -1]
    # one at a time, as its logits are S x vocabulary
    responses = zip(hidden.split(1), ids.split(1))
    return torch.cat([token_logps(head(h), i) for h, i in responses])


def token_logps(logits, ids):
    """log p of ids (B, S) under logits (B, S, vocabulary), in fp32: (B, S), in nats."""
    logps = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    return -logps.view_as(ids)
