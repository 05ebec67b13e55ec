"""The benchmarks: one entry each, with what is asked, what is right, and what is reported."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import extraction, gold, scores


@dataclass(frozen=True)
class Benchmark:
    """How one kind of benchmark is asked, read and scored."""

    # (record) -> the gold answer
    gold: Callable
    # (record, final answer as text) -> the extracted answer, or None
    extract: Callable
    # (gold, extracted) -> whether it is right
    equal: Callable
    # (predictions) -> scores; None: the benchmark's own grader decides
    score: Callable | None
    # the request after the question
    ending: str = ""
    # regular expression of its file's name, in lower case
    file_pattern: str | None = None
    # the answer that counts where none could be extracted; None: it is wrong
    fallback: str | None = None
    # CircularEval: rotations are made if the file holds none
    circular: bool = False
    # an image that occurs in two categories is two units
    unit_by_category: bool = False


CHOOSE = "Please select the correct answer from the options above."
YES_NO = " Please answer yes or no."
SHORT = "\nAnswer the question using a single word or phrase."

# the kind of a file whose name says nothing is told by its columns: see kind_of()
BENCHMARKS = {
    "mmbench": Benchmark(
        file_pattern=r"mmbench|ccbench",
        ending=CHOOSE,
        gold=gold.gold_option,
        extract=extraction.extract_option,
        equal=gold.same,
        score=scores.score_options,
        circular=True,
    ),
    "mcq": Benchmark(
        file_pattern=r"mmstar|blink",
        ending=CHOOSE,
        gold=gold.gold_option,
        extract=extraction.extract_option,
        equal=gold.same,
        score=scores.score_options,
    ),
    "wemath": Benchmark(
        file_pattern=r"we-?math",
        ending=CHOOSE,
        gold=gold.gold_wemath,
        extract=extraction.extract_wemath,
        equal=gold.same,
        score=scores.score_wemath,
    ),
    "pope": Benchmark(
        file_pattern=r"pope",
        ending=YES_NO,
        gold=gold.gold_yes_no,
        extract=extraction.extract_pope,
        equal=gold.same,
        score=scores.score_pope,
        fallback="yes",
    ),
    "mme": Benchmark(
        # MME-RealWorld is multiple choice
        file_pattern=r"(?<![a-z])mme(?![a-z-])",
        ending=YES_NO,
        gold=gold.gold_yes_no,
        extract=extraction.extract_mme,
        equal=gold.same,
        score=scores.score_mme,
        unit_by_category=True,
    ),
    "hallusion": Benchmark(
        file_pattern=r"hallusion",
        ending=YES_NO,
        gold=gold.gold_hallusion,
        extract=extraction.extract_yes_no,
        equal=gold.same,
        score=scores.score_hallusion,
    ),
    "yesno": Benchmark(
        ending=YES_NO,
        gold=gold.gold_yes_no,
        extract=extraction.extract_yes_no,
        equal=gold.same,
        score=scores.accuracy,
    ),
    "chartqa": Benchmark(
        file_pattern=r"chartqa",
        ending=SHORT,
        gold=gold.gold_texts,
        extract=extraction.extract_text,
        equal=gold.any_relaxed,
        score=scores.score_chartqa,
    ),
    "mathvista": Benchmark(
        file_pattern=r"mathvista",
        gold=gold.gold_math,
        extract=extraction.extract_math,
        equal=gold.same,
        score=scores.score_math,
    ),
    "mmvet": Benchmark(
        file_pattern=r"mm-?vet",
        gold=gold.gold_text,
        extract=extraction.extract_text,
        equal=gold.not_graded,
        score=None,
    ),
    "exact": Benchmark(
        ending=SHORT,
        gold=gold.gold_texts,
        extract=extraction.extract_text,
        equal=gold.any_same,
        score=scores.accuracy,
    ),
}


def kind_of(path, table):
    """The name in BENCHMARKS that fits a file, by its name, else by its columns and answers."""
    stem = Path(path).stem.lower()
    for name, benchmark in BENCHMARKS.items():
        if benchmark.file_pattern and re.search(benchmark.file_pattern, stem):
            return name

    columns = set(table.columns)
    records = [record for _, record in table.records if isinstance(record, dict)]
    answers = {record["answer"].strip().lower() for record in records} - {""}
    if {"A", "B"} <= columns:
        return "mcq"
    if {"question_type", "answer_type"} <= columns:
        return "mathvista"
    if answers and answers <= {"yes", "no"}:
        return "yesno"
    return "exact"
