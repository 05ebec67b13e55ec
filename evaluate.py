"""Stage 5: what was gained, and does it come from the image?

On captions that were not trained on, the model fills each mask greedily under three conditions:

    real       with the image of the caption
    blank      with a grey image of the same size
    shuffled   with the image of another record

gain_over_blank and gain_over_shuffled, the gaps between the real image and the other two, measure
how much the model relies on it. Each prediction has these metrics:

    exact_match     1 if the answer is the hidden text, after normalisation
    prefix_credit   1 if exact, or a prefix that ends on a token boundary
    rouge_l         ROUGE-L F1 of the words; at most 0.99 unless exact
    image_pmi       with --clip: the sigmoid of the pointwise mutual information of image and filled
                    sentence, relative to other images (pmi_over_images() in reward.py), times the
                    brevity penalty; always against the real image, whatever image the model was
                    shown
    format_ok       1 if the completion has the form <think>...</think><answer>...</answer>
    prior_reliance  1 if the model gives the same answer with the image of another record, if both
                    can be read; lower is better, and no truth is needed. Also for frequent hidden
                    texts (in more captions than the median one) and for rare ones (all others)

exact_match compares with the caption, which may be wrong; toy_world.py knows the truth and measures
against it too. Scores are percentages with a 95% bootstrap interval over captions, since masks of
one caption are not independent. Gains between conditions, and over the model of --compare, are
paired. A .tsv is a benchmark of VLMEvalKit: see benchmarks/.

    python evaluate.py --model run/checkpoint-500 --data masks_val.jsonl --out eval \\
        --compare eval_base
    python evaluate.py --model run/checkpoint-500 --data MMBench_DEV_EN.tsv --out mmb
    torchrun --nproc_per_node 8 evaluate.py --model ... --data ... --out ...

in:   JSONL of build_masks.py, or a .tsv
out:  OUT/predictions.jsonl: {id, image, sentence, start, end, answer, frequency (captions
      in --data that contain the hidden text), condition, prediction, and the metrics above};
      if no other image is readable, there is no shuffled prediction
      OUT/results.json: {model, data, kind, records, written, skipped,
      real: {metric: {value, low, high, n, unparsed}}, blank, shuffled,
      gain_over_*: {metric: {value, low, high, n, verdict}}, compared: {condition: {metric: ...}}}
      OUT/results.html: examples, training curves and the scores
"""

from common.script import run_script  # first: the other imports take seconds

import copy
import statistics

import torch
from PIL import Image

from benchmarks.registry import BENCHMARKS
from benchmarks.run import BENCHMARK_CONDITIONS, run_benchmark
from common.answers import brevity_penalty, exact_match
from common.captions import image_root, load_image
from common.clip import load_other_images
from common.exactness import choose_computation
from common.masks import read_masks
from common.policy import Policy, generate
from common.prompts import two_lengths
from common.ranks import setup_distributed
from common.records import BadRecord, fail, fingerprint
from common.results import evaluate_records, mask_index, other_image, print_scores
from common.stage import make_parser, number_between, parse, positive_int
from common.stats import share
from common.text import MASK, phrase_counts
from common.vlm import chat_prompt, encode_prompt, load_vlm
from report.results import write_results_page
from reward import (
    FILL_PROMPT,
    ClipScorer,
    add_clip_flags,
    fill,
    parse_completion,
    semantic_credit,
)

# ---------------------------------------------------------------- the three conditions

MASK_CONDITIONS = ("real", "blank", "shuffled")
GREY = (127, 127, 127)


def images_by_condition(names, i, load):
    """{condition: PIL image} for the record whose image is names[i]; load(name) reads one."""
    real = load(names[i])
    images = {"real": real, "blank": Image.new("RGB", real.size, GREY)}
    shuffled = other_image(names, i, load)
    if shuffled is not None:
        images["shuffled"] = shuffled
    return images


# ---------------------------------------------------------------- their metrics

METRICS = ("exact_match", "prefix_credit", "rouge_l", "image_pmi", "format_ok", "prior_reliance")


def text_metrics(record, prediction, tokenizer):
    """The metrics of one completion that need no model; without an answer all are 0.

    For the hidden text 'red circle', the answer 'red' has an exact_match of 0, a prefix_credit of 1
    and a rouge_l of 2/3.
    """
    answer = parse_completion(prediction)
    metrics = {"exact_match": 0.0, "prefix_credit": 0.0, "rouge_l": 0.0}
    if answer:
        target = record["answer"]
        metrics["exact_match"] = exact_match(answer, target)
        metrics["prefix_credit"] = semantic_credit(answer, target, "prefix", tokenizer)
        metrics["rouge_l"] = semantic_credit(answer, target, "rouge_l", tokenizer)
    metrics["format_ok"] = float(answer is not None)
    return metrics


def image_pmi(clip, records, images, predictions):
    """[float, ...]: how much better each filled sentence fits its image than it fits others.

    clip: a ClipScorer with other images. images: the real ones. The brevity penalty keeps short and
    long answers from being rewarded for saying less or more than the hidden text does; no answer
    gets 0.
    """
    answers = [parse_completion(prediction) for prediction in predictions]
    sentences = []
    penalties = []
    for record, answer in zip(records, answers):
        sentences.append([fill(record, answer)])
        penalties.append(brevity_penalty(answer or "", record["answer"]))

    agreement = clip(images, sentences, "images")[:, 0]  # (B,)
    return (agreement * torch.tensor(penalties)).tolist()


def same_answer(prediction, other):
    """Whether two completions give the same answer, 1 or 0; None if one of them has none."""
    answers = (parse_completion(prediction), parse_completion(other))
    if None in answers:
        return None
    return exact_match(*answers)


def score_masks(predictions):
    """Describes each metric as a score of common/stats.py, which takes the mean."""
    scores = {}
    for metric in METRICS:
        measured = [p for p in predictions if metric in p]
        if measured:
            scores[metric] = (100, [share(measured, metric)], measured)

    compared = [p for p in predictions if "prior_reliance" in p]
    median = statistics.median([p["frequency"] for p in compared] or [0])
    frequent = [p for p in compared if p["frequency"] > median]
    rare = [p for p in compared if p["frequency"] <= median]
    for name, part in (("frequent", frequent), ("rare", rare)):
        if part:
            scores[f"prior_reliance, {name} text"] = (100, [share(part, "prior_reliance")], part)
    return scores


# ---------------------------------------------------------------- masks to predictions


class MaskEvaluator:
    """prepare() and process() for map_records(), with the models they need.

    records: all usable mask records; record["place"] is the index of a record among them.
    """

    # fields of a record that stay with its predictions
    KEPT = ("id", "image", "sentence", "start", "end", "answer", "frequency")

    def __init__(self, args, records, root, device):
        self.args = args
        self.root = root
        self.names = [record["image"] for record in records]
        self.model, self.processor = load_vlm(args.model, device, args.trust_remote_code)
        self.policy = Policy(self.model, self.processor, temperature=0)
        # prepare() runs in a thread, and tokenizers cannot be shared between threads
        self.thread_processor = copy.deepcopy(self.processor)
        first = two_lengths(lambda record: self.prepare(record)[2]["real"], records)
        choose_computation(self.policy, first)

        self.clip = None
        if args.clip:
            others = load_other_images(records, root, args.max_pixels, args.clip_others)
            self.clip = ClipScorer(args.clip, args.clip_weights, others, device)

    def load(self, name):
        return load_image(self.root, name, self.args.max_pixels)

    def prepare(self, record):
        """(record, its image, {condition: encoded prompt})."""
        images = images_by_condition(self.names, record["place"], self.load)
        text = FILL_PROMPT.format(masked_caption=record["masked_caption"])
        prompt = chat_prompt(self.thread_processor, text)
        room = self.args.max_new_tokens
        prompts = {}
        for condition, image in images.items():
            prompts[condition] = encode_prompt(
                self.model, self.thread_processor, prompt, [image], room
            )
        return record, images["real"], prompts

    def process(self, prepared):
        """[[prediction, ...], ...]: for each record one prediction per condition."""
        outputs = [[] for _ in prepared]
        for condition in MASK_CONDITIONS:
            present = [b for b, (_, _, prompts) in enumerate(prepared) if condition in prompts]
            if present:
                predictions = self.predict(condition, [prepared[b] for b in present])
                for b, prediction in zip(present, predictions):
                    outputs[b].append(prediction)

        for real, *_, other in outputs:
            if other["condition"] == "shuffled":
                is_same = same_answer(real["prediction"], other["prediction"])
                if is_same is not None:
                    real["prior_reliance"] = is_same
        return outputs

    def predict(self, condition, prepared):
        """The prediction records of one condition, with their metrics."""
        records = [record for record, _, _ in prepared]
        images = [image for _, image, _ in prepared]
        prompts = [prompts[condition] for _, _, prompts in prepared]
        texts = generate(self.policy, self.processor, prompts, self.args.max_new_tokens)

        predictions = []
        for record, text in zip(records, texts):
            prediction = {field: record[field] for field in self.KEPT if field in record}
            prediction["condition"] = condition
            prediction["prediction"] = text
            prediction |= text_metrics(record, text, self.processor.tokenizer)
            predictions.append(prediction)

        if self.clip:
            agreements = image_pmi(self.clip, records, images, texts)
            for prediction, agreement in zip(predictions, agreements):
                prediction["image_pmi"] = round(agreement, 6)
        return predictions


def count_hidden_texts(records):
    """Adds to each mask its frequency: how many of the masked captions contain its hidden text."""
    captions = {record["masked_caption"].replace(MASK, record["answer"]) for record in records}
    counts = phrase_counts([record["answer"] for record in records], captions)
    for record, count in zip(records, counts):
        record["frequency"] = count


def evaluate_masks(args, root, rank, device):
    """Evaluates args.model on the masks args.data: predictions, results.json and a page."""
    records = list(read_masks(args.data))
    # of all, whatever the limit, so that models judged on fewer masks can be compared
    count_hidden_texts([record for _, record in records if not isinstance(record, BadRecord)])
    records = records[: args.limit]
    usable = [record for _, record in records if not isinstance(record, BadRecord)]
    if not usable:
        fail(
            f"{args.data}: none of its records is a mask that can be used; it should be the output "
            "of build_masks.py"
        )
    for place, record in enumerate(usable):
        record["place"] = place

    def start():
        evaluator = MaskEvaluator(args, usable, root, device)
        return evaluator.prepare, evaluator.process

    by_index = {mask_index(record): record for record in usable}

    def load_example(index):
        record = by_index[index]
        return [load_image(root, record["image"], args.max_pixels)], record["sentence"]

    settings = {
        "stage": "evaluate",
        "kind": "masks",
        "prompt": FILL_PROMPT,
        "model": fingerprint(args.model),
        "data": fingerprint(args.data),
        "limit": args.limit,
        "max_pixels": args.max_pixels,
        "max_new_tokens": args.max_new_tokens,
        "clip": fingerprint(args.clip) if args.clip else None,
        "clip_weights": fingerprint(args.clip_weights) if args.clip_weights else None,
        "clip_others": args.clip_others,
    }
    results = evaluate_records(args, rank, records, start, settings, "masks", score_masks)
    if rank == 0:
        print_scores(results)
        write_results_page(args, results, load_example)


# ---------------------------------------------------------------- flags


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder")
    add("--data", required=True, help="masks of captions not trained on, or a benchmark's .tsv")
    add("--out", required=True, help="folder of the results")
    add("--image-root", help="what image paths are relative to (the folder of --data)")
    add("--compare", help="--out of another model on the same data: report the gains over it")
    add("--limit", type=positive_int, help="only the first N masks, or N questions")
    note = "prompts per pass and rank: changes speed only (%(default)s)"
    add("--batch-size", type=positive_int, default=32, help=note)
    add(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        help="cap of a completion: room for a thought and an answer (%(default)s)",
    )
    add("--max-pixels", type=positive_int, default=1003520, help="per image: 1,280 tokens of 28^2")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add_clip_flags(parser.add_argument_group("image_pmi, only with --clip"), None, None)

    group = parser.add_argument_group("benchmarks (a .tsv)")
    group.add_argument("--kind", choices=BENCHMARKS, help="(by the file's name, or its columns)")
    group.add_argument(
        "--conditions",
        nargs="+",
        choices=BENCHMARK_CONDITIONS,
        default=BENCHMARK_CONDITIONS,
        help="(all of them)",
    )
    group.add_argument(
        "--backbone-accuracy",
        type=number_between(0, 100),
        help="of the text-only backbone, in percent: for MMStar's leakage",
    )
    return parse(parser)


def main():
    args = parse_args()
    rank, _, device = setup_distributed()
    root = image_root(args.image_root, args.data)
    if args.data.endswith(".tsv"):
        run_benchmark(args, root, rank, device)
    else:
        evaluate_masks(args, root, rank, device)


if __name__ == "__main__":
    run_script(main)
