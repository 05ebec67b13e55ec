"""The policy: a vision-language model that samples completions and scores them, sharing prompts.

The G completions of a group share their prompt, and most of a prompt is image. It is run once: its
KV cache, graph and all, starts the rollout and is used again when the completions are scored. The
completions of a group lie side by side in one row, each masked from the others, so the cache is
never copied. The gradient is that of the plain computation, vision tower included, for P + G S
tokens instead of G (P + S). Prior art: Prefix Grouper (2506.05433), Tree Training (2511.00413).

This holds for softmax attention over the whole sequence. common/exactness.py checks it at load;
where it does not hold, common/plain.py takes over.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from common.attention import attention_spans, use_grouped_attention
from common.plain import plain_logps, plain_sample
from common.vlm import end_of_text_ids, join_prompts, language_head, response_positions, token_logps

# fp32 logits exist for so many tokens at a time
LOGITS_CHUNK = 256


class Medium(NamedTuple):
    """What completions are made of: text tokens, or the codes of an image.

    embed: ids -> (..., D). head: hidden states (..., D) -> logits (..., vocabulary). length: None
    for text, which ends with one of stop_ids; an image has exactly so many codes. banned_ids are
    never sampled. guidance s: the logits are u + s (c - u), of the prompt (c) and of an empty one
    (u); at 1 there is no u.
    """

    embed: Callable
    head: Callable
    length: int | None = None
    stop_ids: tuple = ()
    banned_ids: tuple = ()
    guidance: float = 1.0

    @property
    def rows(self):
        """Rows of a batch per completion: with guidance, an unconditional one stands beside it."""
        return 1 if self.guidance == 1 else 2


class Policy(nn.Module):
    """A vision-language model with a sampling temperature.

    DDP wraps it, so forward() does everything that needs a graph. The model stays in eval mode:
    dropout would make old and new log-probs differ.

    media: {"text": Medium}, and "image" of a model that draws.
    """

    def __init__(self, model, processor, temperature=1.0, guidance=1.0):
        super().__init__()
        use_grouped_attention(model)
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.rollout_seconds = 0.0
        # a prompt and its completion of more tokens than this are computed plainly
        self.shared_limit = min(filter(None, attention_spans(model)), default=math.inf)
        # whether plain decoding keeps a cache
        self.uses_cache = True

        text = model.config.get_text_config()
        key_heads = text.num_key_value_heads or text.num_attention_heads
        self.heads_per_key = text.num_attention_heads // key_heads

        eos = end_of_text_ids(model, processor)
        names = ("image_token_id", "video_token_id", "vision_start_token_id")
        # an image token would ask for pixels (trl#3847)
        banned = [getattr(model.config, name, None) for name in names]
        # Mllama has no logit for it
        banned = [i for i in banned if i is not None and i < model.lm_head.out_features]
        embed = model.get_input_embeddings()
        self.media = {"text": Medium(embed, language_head(model), None, eos, banned)}
        if hasattr(model, "prepare_embeddings_for_image_generation"):
            embed = model.prepare_embeddings_for_image_generation
            length = model.config.vision_config.num_image_tokens
            head = model.model.generation_head
            self.media["image"] = Medium(embed, head, length, guidance=guidance)

    @property
    def eos_ids(self):
        """Ids that end a text."""
        return self.media["text"].stop_ids

    @property
    def suppressed_ids(self):
        """Ids that are never sampled in a text."""
        return self.media["text"].banned_ids

    def forward(self, batch, group, uniforms=None, ids=None, mask=None, medium="text"):
        """One pass over B prompts, then their completions: sampled, or given and only scored.

        batch: join_prompts(). group: G. uniforms: (B*G, S) in [0, 1), one per token, decide what
        is sampled; or ids and mask (B*G, S) are given. Returns ids, mask (B*G, S), where the mask
        ends with the first eos token, and logps and entropy (B*G, S) in nats, with a graph.

        The G images of a group do not lie in one row, whose attention would cost (G S)^2: their
        prompt is short, and is repeated.
        """
        began = time.time()
        length = (uniforms if ids is None else ids).shape[1]
        if medium == "text" and not self.shares_prompt(batch["input_ids"].shape[1] + length):
            if ids is None:
                ids, mask = plain_sample(self, batch.prompts, uniforms)
                self.rollout_seconds = time.time() - began
            return ids, mask, *plain_logps(self, batch.prompts, ids, mask)

        rows = self.media[medium].rows
        if self.media[medium].length:
            batch = repeat_prompts(batch, group)
            group = 1
        if rows == 2:
            batch = self.with_unconditional(batch)
        prompt_end, cache = self.prefill(batch)
        if ids is None:
            # autocast keeps its casts of weights: the first one must not be under no_grad
            self.logits(prompt_end, medium)
            self.media[medium].embed(torch.zeros_like(batch["input_ids"][:, :1]))
            ids, mask = self.sample(batch, prompt_end, cache, uniforms, medium)
            self.rollout_seconds = time.time() - began

        # (B*G, 1, D), where B counts unconditional rows too: it predicts the first token
        hidden = prompt_end.repeat_interleave(group, 0)
        S = ids.shape[1] - 1
        if S:
            completions = ids[:, :-1].repeat(rows, 1).reshape(-1, group * S)
            positions = response_positions(batch["position_ids"], S).repeat_interleave(group, -2)
            positions = positions.reshape(*batch["position_ids"].shape[:-1], group * S)
            causal_blocks = torch.block_diag(*torch.ones(group, S, S, device=ids.device).tril())
            later = self.extend(batch, cache, completions, positions, causal_blocks.bool(), medium)
            hidden = torch.cat([hidden, later.reshape(len(hidden), S, -1)], 1)
        logps, entropy = self.token_logps(hidden, ids, medium)
        return ids, mask, logps, entropy

    def shares_prompt(self, tokens):
        """Whether completions may share their prompt, if it has `tokens` with one of them."""
        return tokens <= self.shared_limit

    def prefill(self, batch):
        """One pass over B prompts: last hidden states (B, 1, D) and the cache, graph and all."""
        out = self.model.model(**batch, use_cache=True)
        cache = out.past_key_values
        if cache is None or cache.get_seq_length() != batch["input_ids"].shape[1]:
            # train() with gradient checkpointing drops it without a word
            raise RuntimeError(
                "the model kept no cache of the prompt: switch gradient checkpointing off"
            )
        return out.last_hidden_state[:, -1:], cache

    def with_unconditional(self, batch):
        """A batch of prompts of images, and below it the same without their text."""
        empty = without_text(self.processor, batch["input_ids"])
        doubled = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
        return doubled | {"input_ids": torch.cat([batch["input_ids"], empty])}

    def extend(self, batch, cache, ids, positions, block_mask, medium="text"):
        """Hidden states (B, n, D) of n more tokens per prompt; `cache` grows by them.

        The completions of a group lie in one row: each sees the whole prompt and, by block_mask
        (n, m), its own among the m tokens after it.
        """
        prompt_mask = batch["attention_mask"].bool()[:, None, None]
        prompt_mask = prompt_mask.expand(-1, 1, len(block_mask), -1)
        visible = torch.cat([prompt_mask, block_mask.expand(len(ids), 1, -1, -1)], -1)
        visible = visible.repeat(1, 1, self.heads_per_key, 1)  # (B, 1, H / H_kv * n, P + m)
        out = self.model.get_decoder()(
            inputs_embeds=self.media[medium].embed(ids),
            position_ids=positions,
            attention_mask=self._float_mask(visible),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def _float_mask(self, visible):
        """0 where `visible`, else -inf, in the dtype of the pass.

        Made once here: sdpa would make one of a boolean mask in every layer, and keep each for the
        backward pass.
        """
        device = visible.device.type
        dtype = self.model.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        columns = visible.shape[-1]
        aligned = -(-columns // 16) * 16  # as CUDA's kernels ask for
        mask = visible.new_zeros(*visible.shape[:-1], aligned, dtype=dtype)
        return mask[..., :columns].masked_fill_(~visible, float("-inf"))

    def logits(self, hidden, medium="text"):
        """Hidden states (N, ..., D) to logits (N / rows, ..., vocabulary) in fp32."""
        return self.shape_logits(self.media[medium].head(hidden), medium)

    def shape_logits(self, logits, medium="text"):
        """(N, ..., vocabulary) -> (N / rows, ...) in fp32, guided, divided by the temperature.

        Policy, old and reference log-probs are divided alike (trl#3029).
        """
        medium = self.media[medium]
        logits = logits.float()
        if medium.rows == 2:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + medium.guidance * (conditional - unconditional)
        logits = logits / (self.temperature or 1.0)
        logits[..., medium.banned_ids] = float("-inf")
        return logits

    def token_logps(self, hidden, ids, medium="text"):
        """Log-probs of ids and entropies, both (B*G, S) in nats, of hidden states (rows*B*G, S, D).

        fp32 logits exist for LOGITS_CHUNK tokens at a time, in the backward pass too.
        """
        entropies = {}

        def chunk_logps(chunk, hidden, ids):
            logits = self.logits(hidden, medium)[0]
            if chunk not in entropies:
                # only now, and not again in the backward pass
                with torch.no_grad():
                    entropies[chunk] = torch.special.entr(logits.softmax(-1)).sum(-1)
            return token_logps(logits[None], ids[None])[0]

        # (rows, B*G*S, D)
        rows = self.media[medium].rows
        hidden_chunks = hidden.reshape(rows, ids.numel(), -1).split(LOGITS_CHUNK, 1)
        ids_chunks = ids.flatten().split(LOGITS_CHUNK)
        logps = [
            checkpoint(chunk_logps, *chunk, use_reentrant=False)
            for chunk in zip(range(len(ids_chunks)), hidden_chunks, ids_chunks)
        ]
        return torch.cat(logps).view_as(ids), torch.cat(list(entropies.values())).view_as(ids)

    @torch.no_grad()
    def sample(self, batch, hidden, cache, uniforms, medium="text"):
        """Decodes, from what prefill() returned, until every completion has met an eos token.

        uniforms: (B*G, S). Each token inverts the CDF at its uniform, so that a rollout depends on
        nothing else; temperature 0 takes the argmax. Returns ids and mask (B*G, <= S).
        """
        rows = self.media[medium].rows
        B = len(hidden) // rows
        group = len(uniforms) // B
        length = uniforms.shape[1]
        uniforms = uniforms.view(B, group, length)
        stop_ids = torch.tensor(self.media[medium].stop_ids, device=hidden.device, dtype=torch.long)
        positions = response_positions(batch["position_ids"], length)
        # a copy that grows: the update needs the cache of the prompt again
        cache = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        # token s of a completion sees its own earlier tokens, which are G columns apart
        block_mask = torch.eye(group, dtype=torch.bool, device=hidden.device).repeat(1, length)

        ids = []
        mask = []
        unfinished = torch.ones(B, group, dtype=torch.bool, device=hidden.device)
        for s in range(length):
            token = self.sample_token(self.logits(hidden, medium), uniforms[..., s])
            ids.append(token)
            mask.append(unfinished.long())
            unfinished = unfinished & ~torch.isin(token, stop_ids)
            if s + 1 == length or not unfinished.any():
                break
            position = positions[..., s : s + 1].expand(*positions.shape[:-1], group)
            visible = block_mask[:, : group * (s + 1)]
            tokens = token.repeat(rows, 1)
            hidden = self.extend(batch, cache, tokens, position, visible, medium)
        return torch.stack(ids, -1).flatten(0, 1), torch.stack(mask, -1).flatten(0, 1)

    def sample_token(self, logits, uniforms):
        """Token ids (B, G) of logits (B, 1 or G, vocabulary) and uniforms (B, G)."""
        B, group = uniforms.shape
        if not self.temperature:
            return logits.argmax(-1).expand(B, group)
        p = logits.softmax(-1)
        cdf = p.cumsum(-1)
        total = cdf[..., -1:]
        # or rounding would run off the end
        below_total = torch.nextafter(total, torch.zeros_like(total))
        threshold = uniforms.reshape(B, cdf.shape[1], -1) * total
        threshold = torch.minimum(threshold, below_total)
        token = torch.searchsorted(cdf, threshold, right=True)
        token = token.clamp(max=cdf.shape[-1] - 1)  # NaN: any token
        # a sum in parallel may step where p is 0, as of a banned id: then the likeliest token
        is_possible = p.gather(-1, token) > 0
        token = torch.where(is_possible, token, p.argmax(-1, keepdim=True))
        return token.reshape(B, group)


def repeat_prompts(batch, group):
    """The inputs of join_prompts() with each of B prompts `group` times in a row."""
    return {name: tensor.repeat_interleave(group, 0) for name, tensor in batch.items()}


def without_text(processor, ids):
    """The ids (B, P) of prompts of images with pads for all text, as transformers' generate() has
    it: the pads are attended to."""
    tokenizer = processor.tokenizer
    begin_of_image = tokenizer.convert_tokens_to_ids(processor.image_start_token)
    is_kept = (ids == tokenizer.bos_token_id) | (ids == begin_of_image)
    return ids.masked_fill(~is_kept, tokenizer.pad_token_id)


def decode(processor, ids, mask):
    """The texts of completions ids, mask (N, S), without special tokens."""
    completions = [ids_row[m.bool()] for ids_row, m in zip(ids, mask)]
    return processor.tokenizer.batch_decode(completions, skip_special_tokens=True)


@torch.no_grad()
def generate(policy, processor, prompts, max_new_tokens):
    """The texts of one completion for each prompt of encode_prompt(); greedy at temperature 0."""
    batch = join_prompts(policy.model, prompts)
    uniforms = torch.zeros(len(prompts), max_new_tokens)
    if policy.shares_prompt(batch["input_ids"].shape[1] + max_new_tokens):
        ids, mask = policy.sample(batch, *policy.prefill(batch), uniforms)
    else:
        ids, mask = plain_sample(policy, prompts, uniforms)
    return decode(processor, ids, mask)
