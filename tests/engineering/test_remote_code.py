"""Checkpoints that bring code of their own: none of it runs, nothing asks, one line says so."""

from common.script import run_script

import json
import shutil

import pytest
from inputs import assert_one_line, write
from tiny import random_image

import evaluate
import grpo_train
import score_dependency
from common.judges import OpenVocabularyDetector

# classes that note that they were imported
CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path({mark!r}).write_text("code of the checkpoint ran")
class Config(PretrainedConfig):
    model_type = "its-own"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
REFUSED = "needs code of its own, which only --model with --trust-remote-code may run"


@pytest.fixture
def world(tmp_path):
    random_image(0, (40, 40)).save(tmp_path / "0.png")
    random_image(1, (40, 40)).save(tmp_path / "1.png")
    text = "There is a [MASK]."
    masks = []
    for name in ("0", "1"):
        record = {"id": name, "image": f"{name}.png", "answer": "thing"}
        masks.append({**record, "masked_caption": text, "sentence": text})
    write(tmp_path / "masks.jsonl", masks)
    captions = [{"id": "0", "image": "0.png", "caption": "A red circle."}]
    write(tmp_path / "captions.jsonl", captions)
    return tmp_path


@pytest.fixture
def asked(monkeypatch):
    """What was asked on the terminal, where somebody says yes to everything."""
    questions = []

    def answer_yes(question=""):
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer_yes)
    return questions


def add_code(folder, mark, **auto_map):
    """Writes code.py into a folder, which writes the file `mark` when it is imported."""
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    for name, entry in auto_map.items():
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | entry))


def clip_with_code(source, folder, mark, kind):
    """A CLIP folder: its tokenizer, or its text tower, has code; it may switch that on itself."""
    shutil.copytree(source, folder)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    text = config["model_cfg"]["text_cfg"]
    if kind == "text tower":
        tower = folder / "tower"
        tower.mkdir()
        entry = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config"}}
        add_code(tower, mark, config=entry)
        text["hf_model_name"] = str(tower)
    else:
        entry = {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
        add_code(folder, mark, tokenizer_config=entry)
        text["hf_tokenizer_name"] = "in this folder"
    if kind == "tokenizer that trusts itself":
        text["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["tokenizer", "tokenizer that trusts itself", "text tower"])
@pytest.mark.parametrize("module", [grpo_train, evaluate])
def test_no_clip_has_its_code_run(kind, module, world, stage, checkpoint, clip_folder, asked):
    mark = world / "mark"
    clip = clip_with_code(clip_folder, world / "clip", mark, kind)
    flags = ["--model", checkpoint("idefics3"), "--data", world / "masks.jsonl"]
    flags += ["--out", world / "out", "--clip", clip]
    # the flag is about the code of --model
    if module is grpo_train:
        flags += ["--steps", 1, "--reward", "visual=1", "--trust-remote-code"]
    error, _ = stage(module, *flags)
    assert_one_line(error, f"--clip {clip} cannot be loaded", REFUSED)
    assert not asked and not mark.exists()


@pytest.mark.parametrize("part", ["config", "processor_config", "tokenizer_config"])
def test_no_model_has_its_code_run(part, world, stage, checkpoint, asked):
    mark = world / "mark"
    model = shutil.copytree(checkpoint("idefics3"), world / "model")
    auto_map = {
        "config": {"AutoConfig": "code.Config"},
        "processor_config": {"AutoProcessor": "code.Processor"},
        "tokenizer_config": {"AutoTokenizer": [None, "code.Tokenizer"]},
    }[part]
    # where transformers has a class of its own, it takes that one, and no code is needed
    entry = {"auto_map": auto_map}
    if part == "config":
        entry["model_type"] = "its-own"
    add_code(model, mark, **{part: entry})
    paths = ["--data", world / "captions.jsonl", "--out", world / "out"]
    error, _ = stage(score_dependency, "--model", model, *paths)
    assert error is None or REFUSED in error, error
    assert (part == "config") <= (error is not None)
    assert not asked and not mark.exists()


def test_no_detector_has_its_code_run(world, asked):
    folder = world / "detector"
    folder.mkdir()
    entry = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config"}}
    add_code(folder, world / "mark", config=entry)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: OpenVocabularyDetector(str(folder), None, "cpu"))
    assert_one_line(str(end.value), f"--detector {folder} cannot be loaded")
    assert not asked and not (world / "mark").exists()
