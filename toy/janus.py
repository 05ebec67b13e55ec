"""A tiny Janus that reads and draws: its VQ-VAE, its processor and its training from scratch.

The classes are those of transformers. An image has 4 x 4 visual tokens when it is read, and 4 x 4
codes when it is drawn.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
)

from common.captions import load_image
from common.drawings import codes_of_drawings, encode_drawing
from common.policy import without_text
from common.records import load_records
from common.vlm import join_prompts, response_positions
from score_dependency import CAPTION_PROMPT
from toy.drawing import SIDE, tile_pixels
from toy.models import make_vlm_tokenizer
from toy.training import fill_example, fill_pair, fit, response_loss, save_checkpoint

PATCH = 8
N_CODES = (SIDE // PATCH) ** 2
CODEBOOK = 192
CODE_DIM = 16
WIDTH = 128
EDGE_WEIGHT = 8
# images per step of the base
READ_BATCH = 16
DRAW_BATCH = 32
TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image_placeholder>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


# ---------------------------------------------------------------- the model


def make_janus_processor(captions):
    """The real JanusProcessor around a tokenizer made from captions and prompts."""
    special = [
        "<pad>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<image_placeholder>",
        "<begin_of_image>",
        "<end_of_image>",
    ]
    tokenizer = make_vlm_tokenizer(
        captions,
        special,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        model_specific_special_tokens={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    # pixels from -1 to 1, as the VQ-VAE has them
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    images = JanusImageProcessor(size=size, image_mean=half, image_std=half)
    return JanusProcessor(images, tokenizer, chat_template=TEMPLATE, num_image_tokens=N_CODES)


def make_janus(tokenizer):
    """An untrained Janus of 1.3 M parameters, and 0.9 M of its VQ-VAE."""
    ids = {}
    for name in ("pad", "bos", "eos"):
        ids[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    text = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        # about 1 / sqrt(width); the default suits a wide model
        "initializer_range": 0.05,
        **ids,
    }
    vision = {
        "hidden_size": 96,
        "mlp_ratio": 2.5,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": WIDTH,
        "num_image_tokens": N_CODES,
        "initializer_range": 0.05,
    }
    codes = {
        "num_embeddings": CODEBOOK,
        "embed_dim": CODE_DIM,
        # two channels per group of its norm: with one, a code would depend on the whole image
        "base_channels": 64,
        "latent_channels": 64,
        # three halvings: as many pixels per code as per patch
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 0,
        "num_patches": SIDE // PATCH,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
        **ids,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model


# ---------------------------------------------------------------- the VQ-VAE


def train_vq(model, steps, seed):
    """Trains the VQ-VAE of a Janus on random drawings, in a way that the port leaves out.

    For the first third of the steps nothing is quantised. Then k-means on what the encoder says
    starts the codebook; it follows by moving averages, gradients pass straight through, and rows
    that nothing chooses move to something that was said. Rows have unit length, as decode() makes
    them so. The loss counts pixels at edges more, as only there kinds of shapes differ.
    """
    vq = model.model.vqmodel
    rng = np.random.default_rng(seed)
    trained = [p for name, p in vq.named_parameters() if "quantize" not in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, steps // 35)

    def share_of_rate(step):
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    codebook = None
    with tqdm(range(steps), desc="VQ-VAE", unit="step", leave=False) as bar:
        for step in bar:
            images, weights = random_drawings(rng, 16)
            z = said_by_encoder(vq, images)  # (B, 16, 4, 4)
            commitment = 0.0
            quantised = z
            if step >= 0.3 * steps:
                if codebook is None:
                    codebook = Codebook(vq, rng)
                nearest = codebook.quantise(z, may_move=step < 0.8 * steps)
                commitment = 0.25 * ((z - nearest) ** 2).sum(1).mean()
                quantised = z + (nearest - z).detach()
            drawn = vq.decoder(vq.post_quant_conv(quantised))
            error = ((drawn - images) ** 2).mean(1)
            loss = (weights * error).mean() + commitment

            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    vq.requires_grad_(False)
    print(f"VQ-VAE: {steps} steps, loss {loss.item():.3f}")


def random_drawings(rng, n):
    """Images (n, 3, 32, 32) in [-1, 1], and the weight of each pixel (n, 32, 32)."""
    _, known = tile_pixels()
    known = torch.tensor(known).permute(0, 3, 1, 2) / 127.5 - 1
    # the largest difference from a neighbour marks an edge
    padded = F.pad(known, (1, 1, 1, 1), mode="replicate")
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)
    is_edge = (patches - known[..., None, None]).abs().amax((1, 4, 5)) > 0.01
    weights = 1 + EDGE_WEIGHT * is_edge.float()

    indices = rng.integers(0, len(known), (n, 4))
    indices[rng.random((n, 4)) < 0.4] = 0
    indices = torch.tensor(indices)
    return four_quarters(known[indices]), four_quarters(weights[indices])


def four_quarters(quarters):
    """(n, 4, ..., 16, 16) -> (n, ..., 32, 32)."""
    rows = [torch.cat([quarters[:, i], quarters[:, i + 1]], -1) for i in (0, 2)]
    return torch.cat(rows, -2)


def said_by_encoder(vq, images):
    """Unit vectors (B, 16, 4, 4), which are then replaced by the nearest rows of the codebook."""
    return F.normalize(vq.quant_conv(vq.encoder(images)), dim=1)


class Codebook:
    """The unit rows of a VQ-VAE's codebook, which follow the vectors that choose them."""

    def __init__(self, vq, rng):
        with torch.no_grad():
            drawn = [said_by_encoder(vq, random_drawings(rng, 64)[0]) for _ in range(6)]
        vectors = torch.cat(drawn).permute(0, 2, 3, 1).flatten(0, 2)
        self.rows = vq.quantize.embedding.weight.data
        self.rows.copy_(k_means(vectors, len(self.rows)))
        self.sums = self.rows.clone()
        self.counts = torch.ones(len(self.rows))

    @torch.no_grad()
    def quantise(self, z, may_move, decay=0.95):
        """The nearest rows, shaped as z (B, D, h, w); then all rows move."""
        B, D, h, w = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, D)
        codes = (vectors @ self.rows.T).argmax(1)
        nearest = self.rows[codes].view(B, h, w, D).permute(0, 3, 1, 2)

        chosen = F.one_hot(codes, len(self.rows)).float()
        self.counts = decay * self.counts + (1 - decay) * chosen.sum(0)
        self.sums = decay * self.sums + (1 - decay) * chosen.T @ vectors
        self.rows.copy_(F.normalize(self.sums / self.counts.clamp(min=1e-5)[:, None], dim=1))
        is_dead = self.counts < 0.02
        if may_move and is_dead.any():
            moved = vectors[torch.randint(len(vectors), (int(is_dead.sum()),))]
            self.rows[is_dead] = moved
            self.sums[is_dead] = moved
            self.counts[is_dead] = 1.0
        return nearest


@torch.no_grad()
def k_means(vectors, k, rounds=10):
    """k unit vectors (k, D) of vectors (N, D): k-means++, then Lloyd's rounds."""
    centres = vectors[:1]
    distances = ((vectors - centres) ** 2).sum(1)
    for _ in range(k - 1):
        chosen = vectors[torch.multinomial(distances.clamp(min=1e-9), 1)]
        centres = torch.cat([centres, chosen])
        distances = torch.minimum(distances, ((vectors - chosen) ** 2).sum(1))
    for _ in range(rounds):
        members = F.one_hot((vectors @ centres.T).argmax(1), k).float()
        means = members.T @ vectors
        centres = torch.where(members.sum(0)[:, None] > 0, F.normalize(means, dim=1), centres)
    return centres


# ---------------------------------------------------------------- the base


def train_janus(world, vq_steps, steps, seed):
    """Trains world/base on the captions and prompts of world: to read and to draw.

    Reading is taught as to the toy's other base. One drawing in ten has no prompt, for guidance.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    records = load_records(world / "train.jsonl")
    prompts = load_records(world / "prompts_train.jsonl")
    captions = [record["caption"] for record in records]
    processor = make_janus_processor(captions)
    model = make_janus(processor.tokenizer)
    train_vq(model, vq_steps, seed)

    bar = tqdm(records, desc="reading images", leave=False)
    images = [load_image(world, record["image"], SIDE * SIDE) for record in bar]
    codes = codes_of_drawings(model, processor, images)

    def loss_of(indices):
        reading = indices[:READ_BATCH]
        drawing = indices[READ_BATCH:]
        chosen = [images[i] for i in reading]
        texts = [captions[i] for i in reading]
        if rng.random() < 0.15:
            pairs = [(CAPTION_PROMPT, text) for text in texts]
            loss = response_loss(model, processor, pairs, chosen)
        else:
            pairs = [fill_pair(fill_example(rng, text)) for text in texts]
            loss = response_loss(model, processor, pairs, chosen, prompt_weight=2)
        texts = [prompts[i]["prompt"] for i in drawing]
        is_empty = torch.tensor([rng.random() < 0.1 for _ in drawing])
        return loss + drawing_loss(model, processor, texts, codes[drawing], is_empty)

    batch = READ_BATCH + DRAW_BATCH
    desc = "base: reading and drawing"
    fit(model, loss_of, len(records), steps, batch, 3e-3, seed, desc, muon_lr=4e-3)
    save_checkpoint(model, processor, world / "base")


def drawing_loss(model, processor, texts, codes, is_empty):
    """Cross-entropy, in nats per code, of codes (B, 16) after prompts; is_empty (B,): no text."""
    encoded = [encode_drawing(model, processor, text) for text in texts]
    batch = join_prompts(model, encoded)
    ids = batch["input_ids"]
    ids = torch.where(is_empty[:, None], without_text(processor, ids), ids)
    embedded = model.get_input_embeddings()(ids)
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    mask = torch.cat([batch["attention_mask"], torch.ones_like(codes[:, :-1])], 1)
    positions = response_positions(batch["position_ids"], codes.shape[1] - 1)
    hidden = model.model.language_model(
        inputs_embeds=torch.cat([embedded, drawn], 1),
        attention_mask=mask,
        position_ids=torch.cat([batch["position_ids"], positions], 1),
    ).last_hidden_state
    # the state at the begin of the image predicts the first code
    logits = model.model.generation_head(hidden[:, ids.shape[1] - 1 :])
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
