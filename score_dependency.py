"""Stage 1: which sentences of a caption need the image?

The model reads an image and its caption as if it had written the caption (teacher forcing). The
visual dependency of a sentence s is the share of attention that its tokens pay to the image
(MMRPT, arXiv 2512.07203):

    D_vis(s) = 1/(|s| |L|)  sum_{l in L} sum_{t in s}
                   sum_{v in V} a_l(t, v) / sum_{x in V u T} a_l(t, x)                         (1)

L: the chosen layers; V: the visual tokens; T: the caption's tokens up to and including t; a_l: the
attention of layer l, averaged over heads. The chat template, BOS and the question are attention
sinks, in neither V nor T. No code was published; these choices are ours. T grows along a caption,
so D_vis falls, whatever the caption says. `score` is D_vis corrected for that, by --correction:

    position   D_vis minus its position baseline, the mean D_vis of words at the same place in all
               captions of the file (for a sentence, averaged over its words)
    density    log[ (sum_V a_l / |V|) / (sum_T a_l / |T|) ], averaged like D_vis, in nats; it needs
               only one caption

    python score_dependency.py --model Qwen/Qwen2.5-VL-3B-Instruct --data captions.jsonl \\
        --out scores.jsonl
    torchrun --nproc_per_node 8 score_dependency.py --model ... --data ... --out ...

in:   JSONL {id, image, caption}, or LLaVA / ShareGPT4V JSON, or COCO captions JSON
out:  JSONL {id, image, caption, sentences: [{text, start, end, score, d_vis, position_baseline,
      density, ablation?, words: [{start, end, score, d_vis, position_baseline, density,
      producing: {score, d_vis, position_baseline, density}}]}], attention?}
      start and end count characters; ablation is in nats per token. Sentences and words are
      scored by the attention rows of their own tokens, `producing` by those that predict them.
      OUT.html shows the first --page records, whose `attention` holds a map per sentence: {rows,
      columns, sentences: [[share per cell], ...]}; its cells add up to D_vis, or for tiled images
      to the overview's part of it
"""

from common.script import run_script  # first: the other imports take seconds

import itertools
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from common.captions import image_root, load_image, read_captions
from common.corrections import CORRECTIONS, correct_scores
from common.recording import RecordedLayers, layer_list, observe_attention
from common.records import BadRecord, fingerprint
from common.stage import (
    make_parser,
    map_records,
    parse,
    positive_int,
    require_output,
    setup_distributed,
)
from common.text import split_sentences, split_words, tokens_in_span
from common.vlm import (
    append_responses,
    chat_prompt,
    encode_prompt,
    encode_responses,
    join_prompts,
    load_vlm,
    response_logps,
)
from report.dependency import attention_record, print_listing, visual_grid, write_dependency_page

CAPTION_PROMPT = "Describe this image in detail."


# ---------------------------------------------------------------- equation (1), row by row


def visual_share(to_visual, to_text):
    """The fraction in equation (1): 0.6 to V and 0.2 to T give 0.75."""
    return to_visual / (to_visual + to_text)


def density_ratio(to_visual, to_text, visual_tokens, text_tokens):
    """Log of the attention per visual token over that per text token, in nats.

    0.6 to 12 visual tokens and 0.2 to 2 text tokens give log(0.05 / 0.1) = -0.69. The row that
    predicts a caption's first token sees no text; it takes the value of that token's own row.
    to_visual, to_text, text_tokens: (B, R); visual_tokens: (B, 1).
    """
    smallest = torch.finfo(to_visual.dtype).tiny  # a softmax may underflow
    per_visual_token = to_visual.clamp(min=smallest) / visual_tokens
    per_text_token = to_text.clamp(min=smallest) / text_tokens.clamp(min=1)
    ratio = per_visual_token.log() - per_text_token.log()
    return torch.cat([ratio[:, 1:2], ratio[:, 1:]], 1)


def attention_mass(query, key, mask, scaling, visual, text, chunk=256, cells=None):
    """sum_V a_l and sum_T a_l for the last R = S + 1 query positions: two (B, R) in fp32.

    The first row predicts the first caption token, the others are those of the S caption tokens.
    query: (B, H, N, d); key: (B, H_kv, N, d); mask: None (causal), boolean or additive
    (B, 1, N, N); visual: (B, N) and text: (B, S), boolean. To save memory, the map is built `chunk`
    rows and one key head at a time. cells: None, or (B, R, N), to which each visual token's part in
    the visual share is added.
    """
    N = key.shape[2]
    first = N - text.shape[1] - 1
    group = query.shape[1] // key.shape[1]
    columns = torch.arange(N, device=key.device)
    in_text = F.pad(text.float(), (first + 1, 0))
    members = torch.stack([visual.float(), in_text], -1)  # (B, N, 2)

    masses = []
    for start in range(first, N, chunk):
        rows = slice(start, min(start + chunk, N))
        seen = columns <= columns[rows, None] if mask is None else mask[:, :, rows]
        attention = 0
        for head in range(key.shape[1]):
            q = query[:, head * group : (head + 1) * group, rows].float()
            logits = q @ key[:, head : head + 1].float().transpose(-1, -2) * scaling
            if seen.dtype == torch.bool:
                logits = logits.masked_fill(~seen, float("-inf"))
            else:
                logits = logits + seen
            # heads are averaged before the ratio
            attention = attention + logits.softmax(-1).sum(1) / query.shape[1]  # (B, chunk, N)

        mass = attention @ members  # (B, chunk, 2)
        masses.append(mass)
        if cells is not None:
            to_cells = attention * members[:, None, :, 0]
            cells[:, rows.start - first : rows.stop - first] += to_cells / mass.sum(
                -1, keepdim=True
            )
    return torch.cat(masses, 1).unbind(-1)


class Scorer:
    """Computes equation (1) by observing attention in a forward pass; the model is not modified.

    layers: indices from 0; see RecordedLayers. ablation: also compute the log-prob gain of the
    image. Without it, layers above the last chosen one are not run.
    """

    def __init__(self, model, processor, layers=None, ablation=False):
        self.recorded = RecordedLayers(model, layers)
        self.layers = self.recorded.chosen
        self.model = model
        self.processor = processor
        self.ablation = ablation

    def prepare(self, image, caption):
        """The CPU work for an image and its caption, done ahead by a thread. Raises BadRecord."""
        ids, _, offsets = encode_responses(self.processor, [caption], "cpu")
        prompt = chat_prompt(self.processor, CAPTION_PROMPT)
        images = [image]
        if self.ablation:
            images.append(Image.new("RGB", image.size, (127, 127, 127)))
        room = ids.shape[1]
        prompts = [encode_prompt(self.model, self.processor, prompt, [i], room) for i in images]
        self.recorded.check_length(prompts[0]["input_ids"].shape[1] + room)
        return prompts, ids[0], offsets[0]

    @torch.no_grad()
    def __call__(self, prepared, maps=False):
        """For each caption of S tokens: (rows, gains, offsets), or with `maps` (..., cells).

        rows: {"d_vis", "density"}, S + 1 numbers each: the row that predicts the first token, and
        those of the S tokens. gains: S log-prob gains of the image in nats, or None. offsets: S
        character spans. cells: (S, V), each visual token's part in the d_vis of each token.
        """
        if self.recorded.alone and len(prepared) > 1:
            return [self([caption], maps)[0] for caption in prepared]
        prompts, ids, all_offsets = zip(*prepared)
        mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        mask = mask.to(self.model.device)
        ids = pad_sequence(ids, batch_first=True).to(self.model.device)

        logps = self._run([images[0] for images in prompts], ids, mask, maps)
        all_rows = {k: (total / len(self.layers)).tolist() for k, total in self.totals.items()}
        visual, cells = self.visual, self.cells
        all_gains = None
        if self.ablation:
            # log p(token | image) - log p(token | grey image of the same size)
            all_gains = (logps - self._run([images[1] for images in prompts], ids, mask)).tolist()

        results = []
        for i, offsets in enumerate(all_offsets):
            S = len(offsets)
            rows = {name: values[i][: S + 1] for name, values in all_rows.items()}
            results.append((rows, all_gains and all_gains[i][:S], offsets))
            if maps:
                results[i] += ((cells[i, 1 : S + 1, visual[i]] / len(self.layers)).cpu(),)
        return results

    def _run(self, prompts, ids, mask, maps=False):
        """Runs one pass. Adds each layer's rows to self.totals (B, S + 1).

        Returns log-probs (B, S), or None without ablation.
        """
        batch = append_responses(join_prompts(self.model, prompts), ids, mask)
        self.visual = batch["input_ids"] == self.model.config.image_token_id
        self.text = mask.bool()
        self.totals = {"d_vis": 0, "density": 0}
        self.cells = None
        if maps:
            shape = (len(ids), ids.shape[1] + 1, self.visual.shape[1])
            self.cells = torch.zeros(shape, device=ids.device)
        with observe_attention(self.model, self.layers, self._add_layer, self.ablation):
            hidden = self.model.model(**batch, use_cache=False).last_hidden_state
        return response_logps(self.model, hidden, ids) if self.ablation else None

    def _add_layer(self, query, key, mask, scaling):
        mass = attention_mass(query, key, mask, scaling, self.visual, self.text, cells=self.cells)
        visual_tokens = self.visual.sum(1, keepdim=True)
        text_tokens = F.pad(self.text.cumsum(1), (1, 0))  # that each row can see: 0, 1, 2, ...
        self.totals["d_vis"] += visual_share(*mass)
        self.totals["density"] += density_ratio(*mass, visual_tokens, text_tokens)


# ---------------------------------------------------------------- sentences and words


def score_record(record, rows, gains, offsets):
    """The output record: what a Scorer returns, averaged over the tokens of sentences and words.

    `score` is plain D_vis until correct_scores() has seen the whole file.
    """

    def mean(values, span):
        tokens = tokens_in_span(span, offsets)
        return round(sum(values[i] for i in tokens) / len(tokens), 6)

    def scores(span, first):
        d_vis = mean(rows["d_vis"][first:], span)
        density = mean(rows["density"][first:], span)
        return {"score": d_vis, "d_vis": d_vis, "position_baseline": 0.0, "density": density}

    caption = record["caption"]
    sentences = []
    for start, end in split_sentences(caption):
        sentence = {"text": caption[start:end], "start": start, "end": end}
        sentence |= scores((start, end), 1)
        if gains:
            sentence["ablation"] = mean(gains, (start, end))
        sentence["words"] = []
        for span in split_words(caption, start, end):
            word = {"start": span[0], "end": span[1], **scores(span, 1)}
            word["producing"] = scores(span, 0)
            sentence["words"].append(word)
        sentences.append(sentence)
    return {**record, "sentences": sentences}


# ---------------------------------------------------------------- the command


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder")
    add("--data", required=True, help="captions")
    add("--out", required=True, help="the scores; OUT.html is a page of them")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--correction", choices=CORRECTIONS, default="position", help="`score` (%(default)s)")
    add("--layers", type=layer_list, help="decoder layers, from 0: 14-20 or 3,5,7 (third quarter)")
    add("--batch-size", type=positive_int, default=16, help="captions per pass (%(default)s)")
    add("--max-pixels", type=positive_int, default=1003520, help="shrink to this (%(default)s)")
    add("--limit", type=positive_int, help="only the first N records")
    add("--page", type=int, default=50, help="records on the page OUT.html (%(default)s)")
    add("--ablation", action="store_true", help="add log p(text|image) - log p(text|grey)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return parse(parser)


def records_with_maps(args):
    """Yields (number, (record, has_map)), or (number, BadRecord), for up to --limit captions."""
    captions = itertools.islice(read_captions(args.data), args.limit)
    for i, (number, record) in enumerate(captions):
        if not isinstance(record, BadRecord):
            record = (record, i < args.page)
        yield number, record


def start_scoring(args, root, rank, device):
    """Loads the model and returns (prepare, process) for map_records()."""
    model, processor = load_vlm(args.model, device, args.trust_remote_code)
    scorer = Scorer(model, processor, args.layers, args.ablation)
    if rank == 0:
        print(f"{args.model} on {device}: {scorer.recorded}")

    def prepare(item):
        record, has_map = item
        words = split_words(record["caption"])
        if not words:
            raise BadRecord("the caption has no words")
        image = load_image(root, record["image"], args.max_pixels)
        prepared = scorer.prepare(image, record["caption"])
        if not all(tokens_in_span(word, prepared[2]) for word in words):
            raise BadRecord("the tokenizer leaves out a word of the caption")
        return record, has_map, prepared

    def process(batch):
        any_map = any(has_map for _, has_map, _ in batch)
        results = scorer([prepared for _, _, prepared in batch], any_map)
        outputs = []
        for (record, has_map, prepared), (rows, gains, offsets, *maps) in zip(batch, results):
            output = score_record(record, rows, gains, offsets)
            if has_map:
                grid = visual_grid(model, prepared[0][0])
                output["attention"] = attention_record(output, grid, offsets, *maps)
            outputs.append([output])
        return outputs

    return prepare, process


def main():
    args = parse_args()
    rank, _, device = setup_distributed()
    root = image_root(args.image_root, args.data)
    settings = {"stage": "score_dependency"}
    for name in ("layers", "max_pixels", "limit", "ablation", "page", "correction"):
        settings[name] = getattr(args, name)
    settings |= {"model": fingerprint(args.model), "data": fingerprint(args.data)}

    start = partial(start_scoring, args, root, rank, device)
    finish = partial(correct_scores, correction=args.correction)
    records = records_with_maps(args)
    counts = map_records(records, start, args.out, settings, args.data, args.batch_size, finish)
    message = (
        f"{args.data}: none of its {counts['records']} records could be scored; it should hold "
        "{id, image, caption}, and images relative to --image-root"
    )
    require_output(args.out, counts, message)
    if rank == 0:
        title = f"{'/'.join(Path(args.model).parts[-2:])} on {Path(args.data).name}"
        write_dependency_page(args.out, root, f"{args.out}.html", title, args.correction)
        print_listing(args.out, args.correction)
        if counts["written"] < 20 and args.correction == "position":
            print("So few captions make a weak baseline: --correction density needs only one.")
        written = f"{counts['written']} captions scored, {counts['skipped']} skipped"
        print(f"{args.out}: {written}.\nNext: build_masks.py --scores {args.out}")


if __name__ == "__main__":
    run_script(main)
