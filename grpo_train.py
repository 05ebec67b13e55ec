"""Stage 4: GRPO, written out by hand.

For each masked caption the policy samples G completions, the reward compares them with each other, and the policy moves
towards the better ones. With ratio rho = exp(logp - logp_old) per token and advantage A per completion (reward.py, 2):

    term = min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) - beta KL                                        (3)
    KL   = exp(ref - logp) - (ref - logp) - 1                                      (k3, of a frozen reference) (4)
    loss = - sum over completions, tokens  w term / N                                                          (5)

               w                      N                                advantage divided by std
    grpo       1 / completion length  completions of the step          yes      arXiv 2402.03300
    dr_grpo    1                      completions x --max-new-tokens   no       arXiv 2503.20783
    dapo       1                      tokens of the step               yes      arXiv 2503.14476, --clip-eps 0.2 0.28

N counts the whole step over all ranks: micro-batches add up gradients of sums, and the division comes last.

The G completions of a group share their prompt, and most of a prompt is picture. It is run once: its KV cache, graph and
all, starts the rollout and stands under the completions again when they are scored. The G completions lie side by side in
one row, each masked from the others, so the cache is never copied. The gradient is that of the plain computation, vision
tower included, for P + G S tokens instead of G (P + S). Prior art: Prefix Grouper (2506.05433), Tree Training (2511.00413).

With one update per rollout rho is 1, and the loss is about 0 although its gradient is not (advantages of a group sum
to 0): watch advantage_abs, grad_norm and the reward, not the loss.

Differences from published GRPO: reward parts are normalised one by one (reward.py); no KL unless --beta is given (RPT);
the policy stays in eval mode, as dropout would make old and new log-probs differ.

    python grpo_train.py                                                            # the toy world
    python grpo_train.py --objective sft --out runs/toy/sft                          # imitation of the same targets
    torchrun --nproc_per_node 8 grpo_train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data masks.jsonl --out run ...

in:   JSONL of build_masks.py
out:  OUT/metrics.jsonl (a line a step), OUT/samples.txt, OUT/checkpoint-N (loads with AutoModelForImageTextToText)
"""
import argparse
import collections
import contextlib
import copy
import functools
import json
import math
import os
import random
import re
import resource
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as hf_logging

from build_masks import read_masks
from reward import FILL_PROMPT, advantages, add_arguments, load_reward, target_completion, warn_of_cut
from score_dependency import (BadRecord, ahead, amount, chat_prompt, cli, distributed, encode_prompt, encode_responses, fail,
                              fingerprint, image_root, join_prompts, load_image, load_vlm, positive, read_jsonl,
                              response_positions, same_run, token_logps, write_atomically, writing)


# ------------------------------------------------------------------- rollout and log-probs: one prompt pass a group


def grouped_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """sdpa of query (B, H, n, d) and key, value (B, H_kv, m, d) under a mask (B, 1, n, m), or (B, 1, H / H_kv * n, m) already,
    without H / H_kv copies of keys and values, which transformers makes at every step: heads that share a key become rows."""
    if attention_mask is None:                                            # causal, without padding: torch shares keys itself
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    B, H, n, d = query.shape
    rows = query.reshape(B, key.shape[1], -1, d)                                                # (B, H_kv, H / H_kv * n, d)
    repeats = rows.shape[2] // attention_mask.shape[2]
    mask = attention_mask.repeat(1, 1, repeats, 1) if repeats > 1 else attention_mask
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return out.view(B, H, n, d).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


class Policy(nn.Module):
    """A vision-language model with a sampling temperature. DDP wraps it, so forward() does everything that needs a graph.

    stop: ids that end a completion; banned: ids that are never sampled (image tokens would ask for pixels, trl#3847).
    """

    def __init__(self, model, processor, temperature=1.0, static=False):
        super().__init__()
        self.model, self.temperature, self.static = model, temperature, static
        model.set_attn_implementation({"text_config": "grouped"})
        text = model.config.get_text_config()
        self.heads_a_key = text.num_attention_heads // (text.num_key_value_heads or text.num_attention_heads)
        eos = model.generation_config.eos_token_id
        self.stop = sorted({processor.tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
        names = [getattr(model.config, n, None) for n in ("image_token_id", "video_token_id", "vision_start_token_id")]
        self.banned = [i for i in names if i is not None]

    def logits(self, hidden):
        """(..., D) -> (..., vocabulary) in fp32, divided by the temperature: policy, old and reference alike (trl#3029)."""
        logits = self.model.lm_head(hidden).float() / (self.temperature or 1.0)
        logits[..., self.banned] = float("-inf")
        return logits

    def prefill(self, batch):
        """One pass over B prompts: last hidden states (B, 1, D) and the cache, graph and all."""
        out = self.model.model(**batch, use_cache=True)
        cache = out.past_key_values
        if cache is None or cache.get_seq_length() != batch["input_ids"].shape[1]:   # train() with gradient checkpointing
            raise RuntimeError("the model kept no cache of the prompt: switch gradient checkpointing off")
        return out.last_hidden_state[:, -1:], cache

    def resume(self, batch, cache, ids, positions, own):
        """Hidden states (B, n, D) of n more tokens a prompt; `cache` grows. The completions of a group lie in one row:
        each sees the whole prompt and, by own (n, m), its own among the m tokens behind it."""
        seen = batch["attention_mask"].bool()[:, None, None].expand(-1, 1, len(own), -1)
        seen = torch.cat([seen, own.expand(len(ids), 1, -1, -1)], -1).repeat(1, 1, self.heads_a_key, 1)
        # made a float mask here, once: sdpa makes one of a boolean mask in every layer, and keeps each for the backward pass
        device = seen.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        wide = seen.new_zeros(*seen.shape[:-1], -(-seen.shape[-1] // 16) * 16, dtype=dtype)      # aligned, as CUDA asks for
        seen = wide[..., :seen.shape[-1]].masked_fill_(~seen, float("-inf"))        # (B, 1, H / H_kv * n, P + m)
        return self.model.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=seen, past_key_values=cache,
                                        use_cache=True).last_hidden_state

    def forward(self, batch, group, uniforms=None, ids=None, mask=None):
        """One pass over B prompts, then completions: sampled, or the given ids and mask (B*G, S), scored with a graph.

        batch: join_prompts(); group: G; uniforms: (B*G, S) in [0, 1), one a token, decides what is sampled.
        Returns ids, mask (B*G, S) (the mask ends with the first stop token), logps and entropy (B*G, S) in nats.
        """
        first, cache = self.prefill(batch)
        if ids is None:
            self.logits(first)              # autocast keeps its casts of weights: the first one must not be under no_grad
            ids, mask = self.sample(batch, first, cache, uniforms)
        hidden, S = first.repeat_interleave(group, 0), ids.shape[1] - 1
        if S:
            positions = response_positions(batch["position_ids"], S).repeat_interleave(group, -2).reshape(
                *batch["position_ids"].shape[:-1], group * S)
            own = torch.block_diag(*torch.ones(group, S, S, device=ids.device).tril()).bool()
            later = self.resume(batch, cache, ids[:, :-1].reshape(-1, group * S), positions, own)
            hidden = torch.cat([hidden, later.reshape(len(ids), S, -1)], 1)                         # (B*G, S + 1, D)
        return ids, mask, *self.score(hidden, ids)

    def growing_step(self, batch, cache, positions, group):
        """step(token (B, G), s): hidden states (B, G, D) of the s-th tokens, over a copy of `cache` that grows."""
        cache = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])     # the update needs the old one again
        own = torch.eye(group, dtype=torch.bool, device=positions.device).repeat(1, positions.shape[-1])
        return lambda token, s: self.resume(batch, cache, token, positions[..., s:s + 1].expand(*positions.shape[:-1], group),
                                            own[:, :group * (s + 1)])

    def static_step(self, batch, cache, positions, group):
        """The same over a cache of fixed size. Every step is then the same work on the same memory, which a GPU records once
        and replays: one launch a token instead of hundreds."""
        own = torch.eye(group, dtype=torch.bool, device=positions.device).repeat(1, positions.shape[-1])
        static = StaticCache(self.model.config.get_text_config(), max_cache_len=batch["input_ids"].shape[1] + own.shape[1])
        for i, layer in enumerate(cache.layers):
            static.update(layer.keys, layer.values, i)
            if torch.is_autocast_enabled(own.device.type):                               # rotated keys are fp32, values are not
                static.layers[i].values = static.layers[i].values.to(torch.get_autocast_dtype(own.device.type))
        ids, s = torch.zeros(len(batch["input_ids"]), group, dtype=torch.long, device=own.device), positions.new_zeros(1)
        columns = torch.arange(own.shape[1], device=own.device)

        def run():
            at = positions.index_select(-1, s).expand(*positions.shape[:-1], group)
            return self.resume(batch, static, ids, at, own & (columns < group * (s + 1)))
        graph = hidden = None
        if ids.is_cuda:
            side = torch.cuda.Stream()                                                   # a recording must not be the first run
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream().wait_stream(side)
            for layer in static.layers:
                layer.cumulative_length.sub_(group)                                      # what that run has filled
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):             # NCCL has a thread of its own
                hidden = run()

        def step(token, at):
            ids.copy_(token)
            s.fill_(at)
            if graph is None:
                return run()
            graph.replay()
            return hidden
        return step

    @torch.no_grad()
    def sample(self, batch, hidden, cache, uniforms):
        """Decodes from what prefill() returned until every completion met a stop token: ids, mask (B*G, S).

        Each token inverts the CDF at its uniform, so a rollout depends on nothing else; temperature 0 takes the argmax.
        """
        B, group, stop = len(hidden), len(uniforms) // len(hidden), torch.tensor(self.stop, device=hidden.device)
        positions = response_positions(batch["position_ids"], uniforms.shape[1])
        uniforms = uniforms.view(B, group, -1)
        step = (self.static_step if self.static else self.growing_step)(batch, cache, positions, group)
        ids, mask, going = [], [], torch.ones(B, group, dtype=torch.bool, device=hidden.device)
        for s in range(uniforms.shape[-1]):
            logits = self.logits(hidden)                                                 # (B, 1 or G, V)
            if self.temperature:
                cdf = logits.softmax(-1).cumsum(-1)
                below = torch.nextafter(cdf[..., -1:], torch.zeros_like(cdf[..., -1:]))  # or rounding runs off the end
                at = torch.minimum(uniforms[..., s].reshape(B, cdf.shape[1], -1) * cdf[..., -1:], below)
                token = torch.searchsorted(cdf, at, right=True).clamp(max=cdf.shape[-1] - 1)         # NaN: any token
            else:
                token = logits.argmax(-1)
            token = token.reshape(B, -1).expand(B, group)
            ids.append(token)
            mask.append(going.long())
            going = going & ~torch.isin(token, stop)
            if s + 1 == uniforms.shape[-1] or not going.any():
                break
            hidden = step(token, s)
        self.sampled_at = time.time()
        return torch.stack(ids, -1).flatten(0, 1), torch.stack(mask, -1).flatten(0, 1)

    def score(self, hidden, ids, chunk=1024):
        """Log-probs of ids and entropies (B*G, S). fp32 logits exist for `chunk` tokens at a time, in backward too."""
        def some(h, i):
            logits = self.logits(h)
            with torch.no_grad():
                p = logits.softmax(-1)
                entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
            return token_logps(logits[None], i[None])[0], entropy
        flat, ids_flat = hidden.flatten(0, 1), ids.flatten()
        parts = [checkpoint(some, h, i, use_reentrant=False) for h, i in zip(flat.split(chunk), ids_flat.split(chunk))]
        return tuple(torch.cat(p).view_as(ids) for p in zip(*parts))


def decode(processor, ids, mask):
    """The texts of completions ids, mask (N, S), without special tokens."""
    return processor.tokenizer.batch_decode([row[m.bool()] for row, m in zip(ids, mask)], skip_special_tokens=True)


def freeze_unused(policy, batch):
    """Freezes what gets no gradient, as the norm behind some vision towers does: DDP would wait for it for ever."""
    ids = torch.full((len(batch["input_ids"]), 2), policy.stop[0], device=batch["input_ids"].device)
    policy(batch, 1, ids=ids, mask=torch.ones_like(ids))[2].sum().backward()
    for p in policy.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None


def activation_bytes(policy, row):
    """Bytes that a token of the prompt `row` of encode_prompt() keeps for the backward pass, its share of the vision encoder
    included: what a second copy of the prompt adds, so that weights cast to bf16 do not count."""
    kept = [{}, {}]
    for n in (1, 2):
        def keep(tensor):
            kept[n - 1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        ids = torch.full((n, 2), policy.stop[0], device=policy.model.device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            policy(join_prompts(policy.model, [row] * n), 1, ids=ids, mask=torch.ones_like(ids))
    return (sum(kept[1].values()) - sum(kept[0].values())) / (row["input_ids"].numel() + 1)


def estimate_memory(policy, reference, shards, activation, tokens, group_tokens, device):
    """{what: bytes on one rank} of a step. shards: ranks that share the optimizer; activation: bytes a token;
    tokens: of a forward pass; group_tokens: those of them that are completions."""
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters()) if module else 0
    text, trained = policy.model.config.get_text_config(), sum(p.numel() for p in policy.parameters() if p.requires_grad)
    heads = text.num_key_value_heads or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {"fp32 master weights": size(policy), "bf16 copies": size(policy) // 2 * (device.type == "cuda"),
            "gradients": 4 * trained, "optimizer": 8 * trained // shards, "reference": size(reference),
            "KV cache while decoding": 2 * text.num_hidden_layers * heads * head_dim * 4 * tokens,        # fp32: keys are rotated
            "activations": int(activation * tokens), "logits of a chunk": 5 * 4 * text.vocab_size * min(1024, group_tokens)}


def peak_memory(device):
    """Bytes at most in use so far: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------- the loss: equations (3) to (5)


def grpo_terms(logps, old, advantage, mask, clip_low, clip_high, beta=0.0, ref=None):
    """Equation (3) for logps, old, ref, mask (N, S) and advantage (N,): the term, KL and whether it was clipped (N, S).

    All is masked before exp() and the log-ratio kept within +-20: exp of garbage at padding is inf, and inf * 0 is NaN.
    """
    mask = mask.bool()
    rho = (logps - old).masked_fill(~mask, 0).clamp(-20, 20).exp()
    a = advantage[:, None]
    clipped = ((rho < 1 - clip_low) & (a < 0)) | ((rho > 1 + clip_high) & (a > 0))
    term = torch.minimum(rho * a, rho.clamp(1 - clip_low, 1 + clip_high) * a)
    kl = torch.zeros_like(logps)
    if ref is not None:
        d = (ref - logps).masked_fill(~mask, 0).clamp(-20, 20)
        kl = d.exp() - d - 1
    return (term - beta * kl).masked_fill(~mask, 0), kl, clipped & mask


def token_weights(mask, loss):
    """w of equation (5): (N, S) in fp32."""
    mask = mask.float()
    return mask / mask.sum(1, keepdim=True).clamp(min=1) if loss == "grpo" else mask


def divisor(loss, completions, tokens, max_new_tokens):
    """N of equation (5), from the counts of the whole step over all ranks."""
    return {"grpo": completions, "dr_grpo": completions * max_new_tokens, "dapo": tokens, "sft": tokens}[loss]


# ------------------------------------------------------------------- data: the same prompts whatever the ranks


@functools.lru_cache(2)
def permutation(seed, epoch, size):
    return random.Random(f"{seed} {epoch}").sample(range(size), size)


def prompt_order(step, count, size, seed):
    """Indices of the `count` prompts of a step (from 1) in data of `size`: epochs of fresh permutations, no state."""
    return [permutation(seed, i // size, size)[i % size] for i in range((step - 1) * count, step * count)]


def uniforms_of(step, prompts, group, length, seed):
    """(len(prompts) * G, S) uniforms; a prompt's depend on seed, step and its place in the step, not on rank or batch."""
    return torch.cat([torch.rand(group, length, generator=torch.Generator().manual_seed(hash((seed, step, p)) % 2**63))
                      for p in prompts])


class Prompts:
    """The masked captions of a file as examples. A record that cannot be used gives way to the next good one."""

    def __init__(self, path, root, max_pixels, room, model, processor):
        self.root, self.max_pixels, self.room, self.model, self.bad = root, max_pixels, room, model, set()
        self.processor = copy.deepcopy(processor)                  # a tokenizer cannot serve two threads ("Already borrowed")
        self.records = []
        for number, row in read_masks(path):
            if isinstance(row, BadRecord):
                tqdm.write(f"skipped {path}:{number}: {row}")
            else:
                self.records.append(row)
        if not self.records:
            fail(f"{path}: no mask that could be learned; it should be the output of build_masks.py")

    def __call__(self, index):
        """(record, PIL image, encode_prompt() of both) of this index."""
        while True:
            record = self.records[index]
            try:
                if index not in self.bad:
                    image = load_image(self.root, record["image"], self.max_pixels)
                    target = encode_responses(self.processor, [target_completion(record)], "cpu")[0]     # what SFT writes
                    text = chat_prompt(self.processor, FILL_PROMPT.format(masked_caption=record["masked_caption"]))
                    return record, image, encode_prompt(self.model, self.processor, text, [image],
                                                         max(self.room, target.shape[1] + 1))
            except BadRecord as e:
                self.bad.add(index)
                tqdm.write(f"skipped record {record['id']}: {e}")
                if len(self.bad) == len(self.records):
                    fail("no record of --data can be used")
            index = (index + 1) % len(self.records)


def pack(examples, behind, budget):
    """Splits examples [..., encode_prompt()] into passes of at most `budget` tokens, padding and the `behind` tokens that
    follow each prompt included; an example that is larger alone is a pass of its own."""
    length, passes = lambda example: example[-1]["input_ids"].shape[1] + behind, []
    for example in sorted(examples, key=length, reverse=True):                    # the like together: less padding
        if not passes or (len(passes[-1]) + 1) * length(passes[-1][0]) > budget:
            passes.append([])
        passes[-1].append(example)
    return passes


# ------------------------------------------------------------------- checkpoints


def checkpoints(out):
    """{step: path} of the complete checkpoints of a run folder, oldest first."""
    found = {p.name.removeprefix("checkpoint-"): p for p in Path(out).glob("checkpoint-*")}
    return dict(sorted((int(n), p) for n, p in found.items() if n.isdecimal()))


def newest_checkpoint(out):
    """(path, step) of the newest complete checkpoint of a run folder, or (None, 0)."""
    return next(((p, n) for n, p in reversed(checkpoints(out).items())), (None, 0))


def save_checkpoint(out, step, model, processor, optimizer, keep):
    """OUT/checkpoint-<step>, complete or absent: written beside its name and renamed; the oldest beyond `keep` go."""
    temporary, path = Path(out, "checkpoint.tmp"), Path(out, f"checkpoint-{step}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, temporary / "trainer.pt")
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as f:
                os.fsync(f.fileno())                               # or a power cut may leave the new name on empty files
    except (OSError, RuntimeError, SafetensorError) as e:          # a full disk: safetensors and torch raise their own
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"{path} cannot be written ({(str(e).strip() or type(e).__name__).splitlines()[0]}); the checkpoints before it "
             "are whole, the same command goes on from the newest")
    os.replace(temporary, path)
    prune(out, keep)
    return path


def remove(checkpoint):
    """Deletes a checkpoint; renamed first, as half of one must not be taken for one after a kill."""
    old = checkpoint.with_name("checkpoint.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(checkpoint, old)
    shutil.rmtree(old)


def gather_optimizer(optimizer, rank, world):
    """consolidate_state_dict() of a ZeroRedundancyOptimizer by all ranks. Its own takes minutes a gigabyte, on the GPU too."""
    state = optimizer.optim.state_dict()
    state["state"] = {i: {k: v.cpu() for k, v in some.items()} for i, some in state["state"].items()}
    shards = [None] * world if rank == 0 else None
    dist.gather_object(state, shards)
    if rank == 0:
        optimizer._all_state_dicts = shards


def prune(out, keep):
    """Deletes all but the `keep` newest checkpoints, and what a kill has left of others. keep: at least 1."""
    shutil.rmtree(Path(out, "checkpoint.old"), ignore_errors=True)
    for old in list(checkpoints(out).values())[:-keep]:
        remove(old)


def metrics_until(out, step):
    """The rows of metrics.jsonl up to `step`; a line that was cut by a kill is left out."""
    rows = read_jsonl(out / "metrics.jsonl", ("step",)) if (out / "metrics.jsonl").exists() else ()
    return [row for _, row in rows if not isinstance(row, BadRecord) and row["step"] <= step]


def cut_logs(out, step):
    """Drops what a killed run logged behind the checkpoint of `step`."""
    write_atomically(out / "metrics.jsonl", [json.dumps(row) + "\n" for row in metrics_until(out, step)])
    if (out / "samples.txt").exists():
        text = (out / "samples.txt").read_bytes().decode("utf-8", "replace")
        later = (m.start() for m in re.finditer(r"^=== step (\d+)  ", text, re.MULTILINE) if int(m[1]) > step)
        write_atomically(out / "samples.txt", text[:next(later, None)].rpartition("\n\n")[:2])     # a block ends in \n\n


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="runs/toy/base", help="hub id or folder (%(default)s)")
    add("--data", default="runs/toy/masks_train.jsonl", help="masks (%(default)s)")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--out", default="runs/toy/mmrpt", help="folder of the run (%(default)s)")
    add("--steps", type=positive, default=150, help="updates to have made at the end (%(default)s)")
    add("--prompts-per-step", type=positive, default=32, help="over all ranks (%(default)s)")
    add("--group-size", type=positive, default=8, help="G, completions a prompt (%(default)s: RPT)")
    add("--max-new-tokens", type=positive, default=24, help="cap of a completion; see truncated_fraction (%(default)s: the toy)")
    add("--temperature", type=float, default=1.0, help="of sampling and of all log-probs (%(default)s; RPT has 0.8)")
    add("--lr", type=amount, default=2e-4, help="(%(default)s is for 1M parameters; RPT has 1e-6 for billions)")
    add("--beta", type=amount, default=0.0, help="weight of the KL; 0 loads no reference (%(default)s: RPT)")
    add("--clip-eps", type=amount, nargs="+", default=[0.2], help="eps_low [eps_high]; DAPO has 0.2 0.28 (0.2: RPT)")
    add("--loss", default="grpo", choices=("grpo", "dr_grpo", "dapo"), help="normalisation, see above (%(default)s)")
    add("--objective", default="grpo", choices=("grpo", "sft"), help="sft imitates the hidden text: the baseline (%(default)s)")
    add("--updates", type=positive, default=1, help="updates a rollout; beyond 1 the ratio can leave 1 (%(default)s: on-policy)")
    add("--tokens-per-forward", type=positive, default=4096, help="groups share a pass of up to so many tokens a rank, prompts "
        "and completions; changes speed and memory only (%(default)s)")
    add("--max-pixels", type=positive, default=1003520, help="larger images are shrunk: 1,280 tokens of 28 x 28 (%(default)s)")
    add("--max-grad-norm", type=amount, default=1.0, help="(%(default)s)")
    add("--seed", type=int, default=0, help="of data order and sampling (%(default)s)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from the newest checkpoint in --out")
    add("--save-every", type=positive, default=50, help="steps between checkpoints (%(default)s)")
    add("--log-every", type=positive, default=10, help="steps between printed lines; metrics.jsonl has them all (%(default)s)")
    add("--sample-every", type=positive, default=10, help="steps between groups in samples.txt (%(default)s)")
    add("--keep", type=positive, default=2, help="checkpoints kept (%(default)s)")
    add("--static-cache", action="store_true", help="decode over a cache of fixed size, on a GPU as one recorded graph; same up to rounding")
    add("--zero", action="store_true", help="share the optimizer's state over the ranks; same result")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add_arguments(parser)
    args = parser.parse_args()
    if args.objective == "grpo" and not args.w_semantic + args.w_visual:
        fail("--w-semantic and --w-visual are both 0: nothing is rewarded")
    if not args.max_grad_norm:
        fail("--max-grad-norm 0 would leave nothing of any gradient")
    if not 0 < args.temperature < math.inf:
        fail("--temperature must be above 0: an advantage compares different completions")
    return args


# what a run may be resumed with although it differs: it changes speed, length or place, not the numbers of a step
FREE = ("out", "steps", "tokens_per_forward", "static_cache", "zero", "resume", "save_every", "log_every", "sample_every", "keep",
        "image_root", "trust_remote_code")


def main():
    args = parse_args()
    rank, world, device = distributed()
    sft, out = args.objective == "sft", Path(args.out)
    group = 1 if sft else args.group_size
    if not sft and group < 2:
        fail("--group-size must be at least 2: an advantage compares the completions of one prompt")
    if len(args.clip_eps) > 2:
        fail("--clip-eps takes one or two numbers: eps_low [eps_high]")
    root = image_root(args.image_root, args.data)
    settings = {k: v for k, v in vars(args).items() if k not in FREE} | {
        "model": fingerprint(args.model), "data": fingerprint(args.data), "clip": fingerprint(args.clip)}
    written = [*checkpoints(out).values(), *(p for n in ("metrics.jsonl", "samples.txt", "run.json") if (p := out / n).exists())]
    if written and written[-1].name != "run.json":                        # an HF Trainer's, say: neither continued nor cut
        fail(f"{out} holds {written[0].name} but no run.json: not a run of this script, choose another --out")
    if world > 1:
        dist.barrier()
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and written       # by torchrun, with what it has done
    if not args.resume and not restarted and rank == 0:
        for old in written:
            remove(old) if old.is_dir() else old.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()
    resumed, start = newest_checkpoint(out)
    if world > 1:
        dist.broadcast_object_list(seen := [start])
        if seen[0] != start:
            fail(f"{out} holds another checkpoint on this node than on the first: --out must be a folder that all nodes share")
    same_run(out / "run.json", settings)
    if start >= args.steps:
        if rank == 0:
            prune(out, args.keep)
            print(f"reused {resumed}: its {start} steps are done")
        return
    if world > 1:
        dist.barrier()
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)

    # fp32 master weights: at lr 1e-6 a bf16 weight would round every update away (AReaL PR#1634)
    model, processor = load_vlm(str(resumed or args.model), device, args.trust_remote_code, torch.float32)
    hf_logging.disable_progress_bar()                                     # of saving; ours says more
    policy = Policy(model, processor, 1.0 if sft else args.temperature, args.static_cache)
    reference = None
    if args.beta and not sft:
        start_model = load_vlm(args.model, device, args.trust_remote_code, torch.float32)[0]       # in the policy's numerics, or
        reference = Policy(start_model.requires_grad_(False), processor, args.temperature)         # the KL would not start at 0
    prompts = Prompts(args.data, root, args.max_pixels, args.max_new_tokens, model, processor)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    with autocast():
        freeze_unused(policy, join_prompts(model, [prompts(0)[2]]))
        activation = activation_bytes(policy, prompts(0)[2])
    net = DistributedDataParallel(policy, gradient_as_bucket_view=True) if world > 1 else policy
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = (ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **adamw) if args.zero and world > 1 else
                 torch.optim.AdamW(trained, **adamw))
    if resumed:
        state = torch.load(resumed / "trainer.pt", map_location="cpu", mmap=True, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.state.clear()                                       # else a second copy of this rank's share stays
    reward = None if sft else load_reward(args, prompts.records, root, args.max_pixels, device, processor.tokenizer)
    clip_low, clip_high = args.clip_eps[0], args.clip_eps[-1]
    if rank == 0:            # all is loaded: a run refused above binds no settings, so that the right command can follow
        write_atomically(out / "run.json", [json.dumps({"settings": settings}, indent=1)])
        cut_logs(out, start)
        prune(out, args.keep)
        print(f"{args.objective} on {world} x {device.type}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
              f"{len(prompts.records)} masks, steps {start + 1} to {args.steps}{f', resumed from {resumed}' if resumed else ''}")

    behind = group * args.max_new_tokens

    def load(step):                                                     # this rank's places in the order of the step
        order = prompt_order(step, args.prompts_per_step, len(prompts.records), args.seed)
        return [(place, *prompts(order[place])) for place in range(args.prompts_per_step)[rank::world] or [0]]

    bar = tqdm(total=args.steps, initial=start, desc=out.name, unit="step", disable=rank > 0)
    skips = [row.get("skipped_update", 0) for row in metrics_until(out, start)]            # a count for each step
    idle = rank >= args.prompts_per_step                                  # an idle rank makes a pass of weight 0
    steps = range(start + 1, args.steps + 1)
    for step, examples in zip(steps, ahead(load, steps)):
        began, seconds, skipped = time.time(), collections.Counter(rollout=0, reward=0), 0
        passes = pack(examples, behind, args.tokens_per_forward)
        rollouts = [None] * len(passes)
        if step == start + 1 and rank == 0:
            prompt, groups = passes[0][0][-1]["input_ids"].shape[1], len(passes[0])
            sizes = estimate_memory(policy, reference, world if args.zero else 1, activation, groups * (prompt + behind),
                                    groups * behind, device)
            tqdm.write("estimated memory a rank: " + ", ".join(f"{k} {v / 2**20:.0f}" for k, v in sizes.items() if v) +
                       f"; together {sum(sizes.values()) / 2**20:.0f} MiB ({groups} groups of {prompt} + {behind} tokens a pass, "
                       f"{activation / 1024:.0f} KiB of activations a token)")
        for _ in range(args.updates):
            optimizer.zero_grad(set_to_none=world == 1)                   # DDP's gradients are its buckets: no second copy
            tally = collections.Counter()
            for i, (places, records, images, rows) in enumerate(zip(*some) for some in passes):
                # ranks may differ in their number of passes, as only the last one waits for the others
                with contextlib.nullcontext() if world == 1 or i + 1 == len(passes) else net.no_sync():
                    # 1. rollout (or the given tokens) and log-probs, from one pass over the prompts
                    tick, known, batch = time.time(), rollouts[i] or {}, join_prompts(model, rows)
                    if sft:
                        texts = [target_completion(r) for r in records]
                        known = dict(zip(("ids", "mask"), encode_responses(processor, texts, device, policy.stop[0])))
                    uniforms = uniforms_of(step, places, group, args.max_new_tokens, args.seed).to(device)
                    with autocast():
                        ids, mask, logps, entropy = net(batch, group, uniforms, known.get("ids"), known.get("mask"))
                    if not known:
                        # 2. reward and advantage
                        seconds["rollout"] += policy.sampled_at - tick
                        tick = time.time()
                        texts = decode(processor, ids, mask)
                        texts = [texts[j:j + group] for j in range(0, len(texts), group)]
                        parts = reward(records, images, texts)
                        advantage = advantages(parts, reward.weights, args.loss != "dr_grpo")                 # (B, G)
                        seconds["reward"] += time.time() - tick
                        with torch.no_grad(), autocast():
                            ref = reference(batch, group, ids=ids, mask=mask)[2] if reference else None
                        known = rollouts[i] = {"ids": ids, "mask": mask, "old": logps.detach(), "ref": ref, "parts": parts,
                                               "advantage": advantage}
                        if rank == 0 and 0 in places and (step - 1) % args.sample_every == 0:
                            log_samples(out, step, places.index(0), records, texts, parts, advantage)
                    # 3. loss of this pass, a sum; the division by the count of the whole step comes with the update
                    terms, kl, clipped = (logps * mask, *torch.zeros(2, 1, device=device)) if sft else grpo_terms(
                        logps, known["old"], known["advantage"].flatten().to(device), mask, clip_low, clip_high, args.beta,
                        known["ref"])
                    loss = -(terms * token_weights(mask, "sft" if sft else args.loss)).sum()
                    (loss * (not idle)).backward()
                if not idle:
                    visual = (batch["input_ids"] == model.config.image_token_id).sum()
                    stopped = (torch.isin(ids, torch.tensor(policy.stop, device=device)) & mask.bool()).any(1)
                    counted = {"loss": loss, "completions": len(ids), "tokens": mask.sum(), "prompts": len(places),
                               "visual_tokens": visual, "entropy": (entropy * mask).sum(), "kl": (kl * mask).sum(),
                               "clipped": clipped.sum(), "cut": (~stopped).sum()}
                    if not sft:
                        advantage = known["advantage"].abs()
                        counted |= {"advantage": advantage.sum(), "zero_std": (advantage.amax(1) < 1e-6).sum(),
                                    **{name: part.sum() for name, part in known["parts"].items()}}
                    tally.update({k: v.item() if torch.is_tensor(v) else v for k, v in counted.items()})

            # 4. update
            if world > 1:
                tallies = [None] * world
                dist.all_gather_object(tallies, tally)
                tally = collections.Counter()
                for other in tallies:
                    tally.update(other)                                   # + would drop what is negative or not a number
            n = divisor("sft" if sft else args.loss, tally["completions"], tally["tokens"], args.max_new_tokens)
            for p in trained:
                p.grad *= world / n                                       # DDP has divided the sum by world
            norm = nn.utils.clip_grad_norm_(trained, args.max_grad_norm).item()
            finite = math.isfinite(norm) and math.isfinite(tally["loss"])
            if finite:                                                    # the same decision on every rank
                optimizer.step()
            skipped += not finite

        skips.append(skipped)
        row = metrics_row(step, tally, n, {} if sft else reward.weights) | {
            "grad_norm": norm, "lr": args.lr, "skipped_update": skipped, "rollout_seconds": seconds["rollout"],
            "reward_seconds": seconds["reward"], "update_seconds": time.time() - began - sum(seconds.values()),
            "completions_per_second": tally["completions"] / (time.time() - began)}
        saving = step % args.save_every == 0 or step == args.steps
        if saving and isinstance(optimizer, ZeroRedundancyOptimizer):
            gather_optimizer(optimizer, rank, world)
        if rank == 0:
            with writing(out / "metrics.jsonl", "a") as f:
                f.write(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n")
            if step % args.log_every == 0 or step == args.steps:
                names = ("loss",) if sft else ("reward", *(k for k in row if k.startswith("reward_") and k != "reward_seconds"),
                                               "format_ok", "entropy", "completion_tokens")
                tqdm.write(f"step {step:4d}  " + "  ".join(f"{k} {row[k]:.3f}" for k in (*names, "grad_norm")))
        if len(skips) >= 10 and min(skips[-10:]) == args.updates:                         # the same on every rank
            fail(f"the loss or gradient was not finite in ten steps in a row, the last of them {step}: look at grad_norm in "
                 f"{out}/metrics.jsonl and at {out}/samples.txt, lower --lr; the newest checkpoint has the weights from before")
        if rank == 0:
            if saving:
                saved = save_checkpoint(out, step, model, processor, optimizer, args.keep)
            if step == start + 1:
                tqdm.write(f"measured peak: {peak_memory(device) / 2**20:.0f} MiB" + " (the whole process)" * (device.type == "cpu"))
        bar.update()
    bar.close()
    warn_of_cut(reward)
    if rank == 0:
        print(f"{saved}: done, {sum(skips)} updates skipped as not finite, {len(prompts.bad)} records could not be "
              f"used. Next: evaluate.py --model {saved}")


def metrics_row(step, tally, n, weights):
    """The metrics of a step from its sums over all ranks; README explains each. weights: the reward's, {} for SFT."""
    count, tokens, prompts = tally["completions"], tally["tokens"], tally["prompts"]
    return {"step": step, "loss": tally["loss"] / n,
            "reward": sum(w * tally[k] for k, w in weights.items()) / count / (sum(weights.values()) or 1),
            **{f"reward_{k}": tally[k] / count for k in weights},
            "format_ok": tally["format"] / count, "advantage_abs": tally["advantage"] / count,
            "zero_std_fraction": tally["zero_std"] / prompts, "entropy": tally["entropy"] / tokens, "kl": tally["kl"] / tokens,
            "clip_fraction": tally["clipped"] / tokens, "completion_tokens": tokens / count,
            "truncated_fraction": tally["cut"] / count, "visual_tokens": tally["visual_tokens"] / prompts}


def log_samples(out, step, b, records, completions, parts, advantage):
    """Appends group b of a pass to samples.txt, as text to be read."""
    record = records[b]
    with writing(out / "samples.txt", "a") as f:
        f.write(f"=== step {step}  {record['image']}\n{record['sentence']}   <-   {record['answer']}\n")
        for j, text in enumerate(completions[b]):
            scores = "  ".join(f"{k} {v[b, j]:.2f}" for k, v in parts.items())
            f.write(f"  A {advantage[b, j]:+.2f}  {scores}  {text!r}\n")
        f.write("\n")


if __name__ == "__main__":
    cli(main)
