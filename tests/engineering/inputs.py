"""Files and records that the tests of this folder give to the stages, and how they read them."""

import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.text import split_sentences, split_words

FAMILY = "qwen2_5_vl"  # its image token is <|image_pad|>


def write(path, records):
    """Writes a JSONL file, returns its path; a record that is a string is a line as it is."""
    lines = []
    for record in records:
        if not isinstance(record, str):
            record = json.dumps(record, ensure_ascii=False)
        lines.append(record + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def shares(value):
    """What score_dependency.py writes about a span whose D_vis is `value`, before corrections."""
    return {"score": value, "d_vis": value, "position_baseline": 0.0, "density": value}


def scored(caption, values=(0.5,), **change):
    """A line of score_dependency.py; the k-th word has the score values[k], and so on in a circle.

    change: replaces fields of its sentences.
    """
    sentences = []
    count = 0
    for start, end in split_sentences(caption):
        words = []
        for word_start, word_end in split_words(caption, start, end):
            value = values[count % len(values)]
            count += 1
            word = {"start": word_start, "end": word_end, **shares(value)}
            words.append({**word, "producing": shares(value)})
        mean = sum(word["d_vis"] for word in words) / len(words)
        sentence = {"text": caption[start:end], "start": start, "end": end, **shares(mean)}
        sentences.append({**sentence, "words": words, **change})
    return {"id": "x", "image": "0.png", "caption": caption, "sentences": sentences}


def completion(answer):
    return f"<think>I look.</think><answer>{answer}</answer>"


def text_only(folder, source):
    """Writes a checkpoint of a text model with the tokenizer of `source` to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def assert_one_line(error, *parts):
    """That a stage ended with one line, in which all `parts` occur."""
    assert error and "\n" not in error and "Traceback" not in error, error
    assert all(str(part) in error for part in parts), (error, parts)


def skipped(printed):
    """The lines in which a stage named records that it could not use."""
    lines = printed.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("skipped ")]
