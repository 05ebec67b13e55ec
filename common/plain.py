"""The plain computation: each prompt by itself, repeated for each of its completions.

It is right for every family that transformers can run, whatever its layers are: nothing is padded
on the left, tokens come from the model's own generate(), and log-probs from one pass over a prompt
and its completion. common/policy.py uses it where sharing a prompt would be wrong. It takes G
passes over a prompt and its image instead of one.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor

from common.vlm import append_responses, join_prompts


class UniformSampler(LogitsProcessor):
    """Leaves generate() no choice but the token that Policy.sample_token() draws.

    uniforms: (G, S), one per token.
    """

    def __init__(self, policy, uniforms):
        self.policy = policy
        self.uniforms = iter(uniforms.unbind(1))
        self.is_used = False

    def __call__(self, input_ids, scores):
        self.is_used = True
        logits = self.policy.shape_logits(scores[None])  # (1, G, vocabulary)
        token = self.policy.sample_token(logits, next(self.uniforms)[None])  # (1, G)
        return torch.full_like(scores, float("-inf")).scatter(1, token.T, 0.0)


@contextlib.contextmanager
def without_generation_settings(model):
    """Inside, generate() penalises and suppresses nothing, whatever came with the checkpoint."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def plain_sample(policy, prompts, uniforms):
    """Completions of B prompts of encode_prompt(): ids and mask (B*G, <= S).

    uniforms: (B*G, S), of which a token depends on its own alone, as in Policy.sample().
    """
    stop_ids = policy.media["text"].stop_ids
    group = len(uniforms) // len(prompts)
    completions = []
    for prompt, drawn in zip(prompts, uniforms.split(group)):
        inputs = {name: torch.cat([tensor] * group) for name, tensor in prompt.items()}
        sampler = UniformSampler(policy, drawn)
        with without_generation_settings(policy.model):
            sequences = policy.model.generate(
                **{name: tensor.to(policy.model.device) for name, tensor in inputs.items()},
                logits_processor=[sampler],
                max_new_tokens=uniforms.shape[1],
                do_sample=False,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=0,
                use_cache=policy.uses_cache,
                synced_gpus=False,
            )
        if not sampler.is_used:
            raise RuntimeError("its generate() takes no logits_processor")
        completions.append(sequences[:, prompt["input_ids"].shape[1] :])

    # autocast keeps its casts of weights, and these have no gradient
    torch.clear_autocast_cache()
    length = max(ids.shape[1] for ids in completions)
    ids = torch.cat([F.pad(ids, (0, length - ids.shape[1])) for ids in completions])
    is_stop = torch.isin(ids, torch.tensor(stop_ids, device=ids.device, dtype=torch.long)).long()
    mask = (is_stop.cumsum(1) - is_stop == 0).long()
    return ids, mask


def plain_logps(policy, prompts, ids, mask):
    """Log-probs and entropies (B*G, S) in nats of the completions ids, mask (B*G, S)."""
    group = len(ids) // len(prompts)
    S = ids.shape[1]
    results = []
    for prompt, ids_of_prompt, mask_of_prompt in zip(prompts, ids.split(group), mask.split(group)):
        batch = join_prompts(policy.model, [prompt] * group)
        joined = append_responses(batch, ids_of_prompt, mask_of_prompt)
        hidden = policy.model.model(**joined, use_cache=False).last_hidden_state
        results.append(policy.token_logps(hidden[:, -S - 1 : -1], ids_of_prompt))
    logps, entropies = zip(*results)
    return torch.cat(logps), torch.cat(entropies)
