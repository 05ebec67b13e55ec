"""What a model draws for held-out prompts, and how much of what they ask for is in the drawings.

For every prompt, --samples images are drawn into the folders that GenEval's own tools read, so that
these can judge any model. With --detector, GenEval's rules (common/geneval.py) judge them here:

    right      all that the prompt asks for is there; also per tag
    overall    the mean over tags of `right`, which is GenEval's number
    graded     the share of what the prompt asks for that is there
    sem, kn    rewards of lvrpo/reward.py: with --clip, against other prompts; with --knowledge
    diversity  the share of distinct images among the samples of a prompt

Percentages with a 95% bootstrap interval over prompts; gains over --compare are paired. Verdicts of
another detector than GenEval's own cannot be compared with published ones (docs/lvrpo.md).

    python -m lvrpo.evaluate --model CKPT --prompts evaluation_metadata.jsonl --out DIR
    torchrun --nproc_per_node 8 -m lvrpo.evaluate --model ... --prompts ... --out ...

in:   JSONL of GenEval {tag, include, exclude?, prompt}, or any with {prompt, id?}
out:  OUT/00000/metadata.jsonl, the line of the prompt, and OUT/00000/samples/0000.png ..., or
      OUT/<id>.png with --layout wise. An image depends on seed, line and sample alone
      OUT/drawings.jsonl: {id, number (line, from 0), tag, prompt, sample, image (path in OUT),
      distinct (not an earlier sample again), right, graded, clauses [[text, holds], ...], sem, kn}
      OUT/results.json: {model, prompts, guidance, temperature, seed, records, written, skipped,
      drawing: {metric: {value, low, high, n}}, compared_with, compared: {drawing: {metric: ...}}}
      OUT/drawings.png: the first drawings of the first eight prompts
"""

from common.script import run_script  # first: the other imports take seconds

import collections
import copy
import json
import re
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from common.drawing_prompts import read_prompts, sentences_of
from common.drawings import drawings_of_codes, encode_drawing, require_drawing
from common.geneval import clauses, graded
from common.judges import asks_colour
from common.policy import Policy, repeat_prompts
from common.ranks import setup_distributed
from common.records import BadRecord, fail, load_records, write_atomically, write_json
from common.results import interval
from common.run import settings_of
from common.sheets import save_image, sheet
from common.stage import (
    make_parser,
    map_records,
    non_negative,
    parse,
    positive_int,
    require_output,
)
from common.stats import paired_difference, share, with_intervals
from common.training import uniforms_of
from common.vlm import join_prompts, load_vlm
from lvrpo.reward import DrawingReward, draw_rivals, load_judges


def score_drawings(drawings):
    """The metrics as scores of common/stats.py, which takes means."""
    scores = {}
    by_tag = collections.defaultdict(list)
    for drawing in drawings:
        if "right" in drawing:
            by_tag[drawing["tag"]].append(drawing)
    if by_tag:
        parts = [share(of_tag) for of_tag in by_tag.values()]
        scores["overall"] = (100 / len(parts), parts, sum(by_tag.values(), []))
    for metric in ("right", "graded", "sem", "kn", "distinct"):
        measured = [drawing for drawing in drawings if metric in drawing]
        if measured:
            name = "diversity" if metric == "distinct" else metric
            scores[name] = (100, [share(measured, metric)], measured)
    for tag, of_tag in by_tag.items():
        scores[f"right, {tag}"] = (100, [share(of_tag)], of_tag)
    return scores


class Evaluator:
    """prepare() and process() for map_records(), with the models they need."""

    def __init__(self, args, prompts, device):
        self.args = args
        model, self.processor = load_vlm(args.model, device)
        self.policy = Policy(model, self.processor, args.temperature, args.guidance)
        require_drawing(self.policy, args.model)
        # prepare() runs in a thread, and tokenizers cannot be shared between threads
        self.thread_processor = copy.deepcopy(self.processor)
        self.detect, self.reward = judges_of(args, prompts, device)

    def prepare(self, record):
        if self.args.clip and not sentences_of(record):
            raise BadRecord("CLIP cannot judge a prompt without words")
        return record, encode_drawing(self.policy.model, self.thread_processor, record["prompt"])

    @torch.no_grad()
    def process(self, prepared):
        """[[drawing, ...], ...]: for each prompt a record per sample, whose image is written."""
        records, prompts = zip(*prepared)
        G = self.args.samples
        length = self.policy.media["image"].length
        numbers = [record["number"] for record in records]
        uniforms = uniforms_of(0, numbers, G, length, self.args.seed).to(self.policy.model.device)

        batch = repeat_prompts(join_prompts(self.policy.model, prompts), G)
        if self.policy.media["image"].rows == 2:
            batch = self.policy.with_unconditional(batch)
        prompt_end, cache = self.policy.prefill(batch)
        codes, _ = self.policy.sample(batch, prompt_end, cache, uniforms, "image")
        images = drawings_of_codes(self.policy.model, self.processor, codes)  # (B*G)
        return [self.finish(r, images[b * G : b * G + G]) for b, r in enumerate(records)]

    def finish(self, record, images):
        """Writes and judges the samples of one prompt: alone, so that no batch changes a score."""
        drawings = []
        for sample, image in enumerate(images):
            name = f"{record['number']:05d}/samples/{sample:04d}.png"
            if self.args.layout == "wise":
                name = f"{record['id']}.png"
            save_image(image, Path(self.args.out, name))
            drawing = {field: record[field] for field in ("id", "number", "tag", "prompt")}
            drawing |= {"sample": sample, "image": name}
            if self.args.samples > 1:
                drawing["distinct"] = int(image not in images[:sample])
            drawings.append(drawing)
        if self.args.layout == "geneval":
            path = Path(self.args.out, f"{record['number']:05d}", "metadata.jsonl")
            write_atomically(path, [record["line"] + "\n"])

        if self.detect and (record.get("include") or record.get("exclude")):
            for drawing, objects in zip(drawings, self.detect(images, [record] * len(images))):
                drawing["clauses"] = clauses(objects, record)
                drawing["graded"] = round(graded(objects, record), 6)
                drawing["right"] = int(drawing["graded"] == 1)
        for name, values in self.reward([record], [images]).items():
            for drawing, value in zip(drawings, values[0].tolist()):
                drawing[name] = round(value, 6)
        return drawings


def judges_of(args, prompts, device):
    """(detector or None, DrawingReward of sem and kn); sem compares with other prompts of all."""
    flags = {"sem": args.clip, "ins": args.detector, "kn": args.knowledge}
    # without a usable prompt there is nothing to judge, and main() says so
    names = {name for name, judge in flags.items() if judge and prompts}
    if "ins" in names and not any(p.get("include") or p.get("exclude") for p in prompts):
        fail(f"--detector: no prompt of {args.prompts} has include or exclude to judge by")
    is_model = "ins" in names and ":" not in args.detector
    if is_model and not args.clip and any(map(asks_colour, prompts)):
        fail("--detector: some prompts ask for colours, which need --clip to be named")
    clip, detector, knowledge = load_judges(args, names, device)
    weights = dict.fromkeys(names - {"ins"}, 1.0)
    rivals = draw_rivals(text for prompt in prompts for text in sentences_of(prompt))
    return detector, DrawingReward(weights, clip, None, knowledge, rivals)


def read_numbered(args):
    """[(line number, record with its number and line, or BadRecord), ...] of --prompts."""
    numbered = list(islice(read_prompts(args.prompts), args.limit))
    lines = Path(args.prompts).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    names = {"drawings"}  # the sheet
    for i, (number, record) in enumerate(numbered):
        if isinstance(record, BadRecord):
            continue
        record |= {"number": number - 1, "line": lines[number - 1], "tag": record.get("tag", "all")}
        if args.layout == "wise":
            if record["id"] in names or not re.fullmatch(r"\w[\w.-]{,49}", record["id"]):
                numbered[i] = (number, BadRecord("its id is taken, or cannot name a file"))
            names.add(record["id"])
    return numbered


def read_drawings(out):
    """(records, settings) of a finished --out; the bootstrap draws prompts."""
    path = Path(out, "drawings.jsonl")
    try:
        settings = json.loads(Path(f"{path}.run.json").read_text())["settings"]
        drawings = load_records(path)
    except (OSError, ValueError, LookupError):
        fail(f"{out} holds no finished drawings of lvrpo.evaluate")
    for drawing in drawings:
        drawing["unit"] = drawing["number"]
        drawing["index"] = (drawing["number"], drawing["sample"])
        drawing["unparsed"] = False
    return drawings, settings


def summarise(args, counts, others):
    """Writes OUT/results.json and OUT/drawings.png, and prints the scores."""
    drawings, _ = read_drawings(args.out)
    names = ("model", "prompts", "guidance", "temperature", "seed")
    results = {name: getattr(args, name) for name in names} | counts
    results["drawing"] = with_intervals(score_drawings(drawings))
    gains = {}
    if args.compare:
        gains = paired_difference(score_drawings, drawings, others)
        results |= {"compared_with": args.compare, "compared": {"drawing": gains}}
    for name, entry in results["drawing"].items():
        del entry["unparsed"]
        line = f"{name:28s}{interval(entry):22s}"
        if name in gains:
            line += f"{interval(gains[name], '+')} {gains[name]['verdict']}"
        print(line.rstrip())
    print(f"{args.out}: {counts['written']} drawings, {counts['skipped']} prompts skipped")
    write_json(Path(args.out, "results.json"), results)

    columns = min(args.samples, 4)
    shown = [drawing for drawing in drawings if drawing["sample"] < 4][: 8 * columns]
    images = [Image.open(Path(args.out, drawing["image"]), formats=["PNG"]) for drawing in shown]
    captions = [drawing["prompt"] for drawing in shown]
    save_image(sheet(images, captions, columns), Path(args.out, "drawings.png"))


def parse_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint that draws: hub id or folder")
    add("--prompts", required=True, help="JSONL of prompts that were not trained on")
    add("--out", required=True, help="folder of the drawings and results")
    add("--samples", type=positive_int, default=4, help="images per prompt (%(default)s)")
    add("--guidance", type=non_negative, default=1.0, help="1 is none (%(default)s)")
    add("--temperature", type=non_negative, default=1.0, help="0 is greedy (%(default)s)")
    add("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add("--batch-size", type=positive_int, default=16, help="prompts per pass (%(default)s)")
    add("--limit", type=positive_int, help="only the first N prompts")
    add("--layout", choices=("geneval", "wise"), default="geneval", help="(%(default)s)")
    add("--detector", help="Owlv2 or GroundingDINO: hub id or folder; or module:function")
    add("--clip", help="judges sem, and colours: open_clip model name, or a folder")
    add("--clip-weights", help="open_clip tag or file; not for a folder")
    add("--knowledge", help="judges kn: a vision-language model, hub id or folder")
    add("--compare", help="--out of another model: report the gains over it")
    return parse(parser)


def main():
    args = parse_args()
    rank, _, device = setup_distributed()
    if args.samples > 1 and (args.temperature == 0 or args.layout == "wise"):
        fail("--temperature 0 and --layout wise have one image per prompt: use --samples 1")
    paths = ("model", "prompts", "detector", "clip", "clip_weights", "knowledge")
    settings = settings_of(args, paths)
    settings |= {"stage": "lvrpo.evaluate", "compare": None, "batch_size": None}

    others = []
    if args.compare:
        others, other_settings = read_drawings(args.compare)
        names = [n for n in settings if n not in ("model", "layout")]
        differ = " and ".join(n for n in names if other_settings.get(n) != settings[n])
        if differ:
            fail(f"--compare {args.compare}: made with another {differ}; both must have the same")

    records = read_numbered(args)
    prompts = [record for _, record in records if isinstance(record, dict)]

    def start():
        evaluator = Evaluator(args, prompts, device)
        return evaluator.prepare, evaluator.process

    out = Path(args.out, "drawings.jsonl")
    counts = map_records(records, start, out, settings, args.prompts, args.batch_size)
    require_output(out, counts, f"{args.prompts}: none of its prompts could be drawn; see above")
    if rank == 0:
        summarise(args, counts, others)


if __name__ == "__main__":
    run_script(main)
