"""The runner: asks every record of a benchmark under every condition, and keeps the predictions.

    real       with its images
    without    without any image: what the question alone gives away
    shuffled   with the images of another record

OUT/predictions.jsonl has a line for each record and condition; common/results.py and
report/results.py make scores and a page of it.
"""

import collections
import copy
from pathlib import Path

from benchmarks.extraction import final_answer
from benchmarks.registry import BENCHMARKS, kind_of
from benchmarks.tsv import load_images, parse_list, question_text, read_tsv, rotations
from common.captions import load_image
from common.exactness import choose_computation
from common.policy import Policy, generate
from common.prompts import two_lengths
from common.records import BadRecord, fail, fingerprint, require_file, write_json
from common.results import evaluate_records, other_image, print_scores, read_predictions
from common.vlm import chat_prompt, encode_prompt, load_vlm
from report.results import write_results_page

BENCHMARK_CONDITIONS = ("real", "without", "shuffled")

# fields of a record that stay with its predictions: the question, what scores are listed by, and
# what ties records together
QUESTION_FIELDS = ("index", "truth", "group", "copy", "options", "unit")
LISTED_FIELDS = ("category", "l2-category", "split", "task", "question_type", "answer_type")
KEPT_FIELDS = (*QUESTION_FIELDS, *LISTED_FIELDS, "figure", "pair", "key")


# ---------------------------------------------------------------- the records to ask


def records_to_ask(records, benchmark, limit=None):
    """[(line, record or BadRecord)] in the order of the file, each with its gold answer and unit.

    records: those of a Table. `truth` is the gold answer; `unit` is what the bootstrap draws: the
    image, since the answers to questions about one image are not independent. limit counts
    questions; their copies come with them.
    """
    has_copies = any(record["copy"] for _, record in records if isinstance(record, dict))
    groups = set()
    units = {}

    to_ask = []
    for line, record in records:
        if isinstance(record, BadRecord):
            to_ask.append((line, record))
            continue

        group = record["group"]
        if limit is None or len(groups) < limit:
            groups.add(group)
        if group not in groups:
            continue
        record["unit"] = units.setdefault(group, _unit(record, benchmark))

        try:
            record["truth"] = benchmark.gold(record)
        except BadRecord as error:
            to_ask.append((line, BadRecord(f"record {record['index']}: {error}")))
            continue

        if benchmark.circular and not has_copies:
            to_ask += [(line, rotation) for rotation in rotations(record)]
        else:
            to_ask.append((line, record))
    return to_ask


def _unit(record, benchmark):
    """The name of the image, or of the record if it has none."""
    image = record.get("image_path") or record["image"] or record["index"]
    if benchmark.unit_by_category:
        return f"{record.get('category')} {image}"
    return image


# ---------------------------------------------------------------- asking


class ImageStore:
    """The images of a benchmark, as their records name them: in the TSV, or files below a root."""

    def __init__(self, path, table, root, max_pixels):
        self.path = path
        self.table = table
        self.root = root
        self.max_pixels = max_pixels

    def __call__(self, name):
        """[PIL image, ...] of a record's `image`; [] of ""."""
        if not name:
            return []
        if name in self.table.image_offsets:
            column = self.table.columns.index("image")
            offset = self.table.image_offsets[name]
            return load_images(self.path, column, offset, self.max_pixels)
        paths = parse_list(name) or [name]
        if not all(isinstance(path, str) for path in paths):
            raise BadRecord("image_path must be a path, or a list of paths")
        return [load_image(self.root, path, self.max_pixels) for path in paths]


class Examiner:
    """Asks records: prepare() and process() for map_records(), with the model they need.

    image_names: what number_images() returned, from which the shuffled image is chosen.
    """

    def __init__(self, args, device, benchmark, conditions, load, image_names):
        self.model, self.processor = load_vlm(args.model, device, args.trust_remote_code)
        self.policy = Policy(self.model, self.processor, temperature=0)
        # prepare() runs in a thread, and tokenizers cannot be shared between threads
        self.thread_processor = copy.deepcopy(self.processor)
        self.max_new_tokens = args.max_new_tokens
        self.benchmark = benchmark
        self.conditions = conditions
        self.load = load
        self.image_names = image_names

    def prepare(self, record):
        """(record, {condition: (number of images, encoded prompt)})."""
        try:
            return record, self._prompts(record)
        except BadRecord as error:
            raise BadRecord(f"record {record['index']}: {error}") from None

    def _prompts(self, record):
        images = {"real": self.load(record["image"]), "without": []}
        if record["image"] and "shuffled" in self.conditions:
            shuffled = other_image(self.image_names, record["image_place"], self.load)
            if shuffled is not None:
                images["shuffled"] = shuffled

        text = question_text(record, self.benchmark.ending)
        prompts = {}
        for condition in self.conditions:
            if condition in images:
                shown = images[condition]
                prompts[condition] = (len(shown), self._encode(text, shown))
        return prompts

    def check(self, records):
        """Has the policy choose its computation, from the first records."""

        def encode(record):
            text = question_text(record, self.benchmark.ending)
            return self._encode(text, self.load(record["image"]))

        choose_computation(self.policy, two_lengths(encode, records))

    def _encode(self, text, images):
        prompt = chat_prompt(self.thread_processor, text, len(images))
        return encode_prompt(self.model, self.thread_processor, prompt, images, self.max_new_tokens)

    def process(self, prepared):
        """[[prediction, ...], ...] of what prepare() returned: one list per record."""
        predictions = [[] for _ in prepared]
        for condition in self.conditions:
            asked = [b for b, (_, prompts) in enumerate(prepared) if condition in prompts]
            completions = self.ask([prepared[b][1][condition] for b in asked])
            for b, completion in zip(asked, completions):
                record, prompts = prepared[b]
                images, _ = prompts[condition]
                prediction = judge(record, completion, condition, images, self.benchmark)
                predictions[b].append(prediction)
        return predictions

    def ask(self, prompts):
        """One completion per (number of images, encoded prompt), as a text.

        Prompts with the same number of images, and the same tensors, run together.
        """
        alike = collections.defaultdict(list)
        for place, (images, prompt) in enumerate(prompts):
            alike[images, *prompt].append(place)

        completions = [None] * len(prompts)
        for places in alike.values():
            encoded = [prompts[place][1] for place in places]
            texts = generate(self.policy, self.processor, encoded, self.max_new_tokens)
            for place, text in zip(places, texts):
                completions[place] = text
        return completions


def judge(record, completion, condition, images, benchmark):
    """The prediction record of one completion: what was extracted, and whether it is right."""
    extracted = benchmark.extract(record, final_answer(completion))
    answer = benchmark.fallback if extracted is None else extracted
    right = answer is not None and bool(benchmark.equal(record["truth"], answer))
    return {
        **{field: record[field] for field in KEPT_FIELDS if field in record},
        "condition": condition,
        "images": images,
        "prediction": completion,
        "extracted": extracted,
        "unparsed": extracted is None,
        "right": right,
    }


# ---------------------------------------------------------------- the run


def run_benchmark(args, root, rank, device):
    """Evaluates args.model on the TSV args.data: predictions, results.json and a page in args.out.

    args: the flags of evaluate.py. root: the folder that image paths are relative to.
    """
    require_file(args.data)
    table = read_tsv(args.data)
    kind = args.kind or kind_of(args.data, table)
    benchmark = BENCHMARKS[kind]
    if args.backbone_accuracy is not None and kind != "mcq":
        fail(
            "--backbone-accuracy is for the leakage of MMStar and similar multiple choice; "
            f"{args.data} is read as {kind}"
        )

    records = records_to_ask(table.records, benchmark, args.limit)
    image_names = number_images(records)
    load = ImageStore(args.data, table, root, args.max_pixels)
    conditions = [c for c in BENCHMARK_CONDITIONS if c in args.conditions]
    if benchmark.score is None:
        conditions = [c for c in conditions if c == "real"]

    def start():
        examiner = Examiner(args, device, benchmark, conditions, load, image_names)
        examiner.check([record for _, record in records if isinstance(record, dict)])
        return examiner.prepare, examiner.process

    by_index = {record["index"]: record for _, record in records if isinstance(record, dict)}

    def load_example(index):
        record = by_index[index]
        return load(record["image"]), question_text(record, "")

    settings = {
        "stage": "evaluate",
        "kind": kind,
        "conditions": conditions,
        "model": fingerprint(args.model),
        "data": fingerprint(args.data),
        "limit": args.limit,
        "max_pixels": args.max_pixels,
        "max_new_tokens": args.max_new_tokens,
    }
    results = evaluate_records(args, rank, records, start, settings, kind, benchmark.score)
    if rank == 0:
        if benchmark.score is None:
            write_mmvet(args.out, table.indices)
        print_scores(results)
        write_results_page(args, results, load_example)


def write_mmvet(out, indices):
    """OUT/mmvet.json, {v1_index: answer}, which MM-Vet's grader reads: it needs every index.

    An answer comes without the thought before it, and is empty where no record could be asked.
    """
    predictions, _ = read_predictions(out)
    answers = dict.fromkeys(indices, "")
    for record in predictions["real"]:
        answers[record["index"]] = final_answer(record["prediction"])
    named = {f"v1_{index.removeprefix('v1_')}": answer for index, answer in answers.items()}
    write_json(Path(out, "mmvet.json"), named)


def number_images(records):
    """The images of all records that have one, in order; each record gets its `image_place`."""
    names = []
    for _, record in records:
        if isinstance(record, dict) and record["image"]:
            record["image_place"] = len(names)
            names.append(record["image"])
    return names
