"""CLIP models that cannot be loaded, and texts that do not fit into their context."""

import json

import pytest
import torch
from tiny import random_image, tokenizer_of

from reward import ClipScorer


def folder_with_a_hub_tokenizer(clip_folder, tmp_path):
    """As clip_folder, but its tokenizer pads with another id than 0, as that of SigLIP does."""
    import open_clip

    tokenizer = tokenizer_of("qwen3_vl")
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "this folder",
        "pool_type": "last",
    }
    weights = open_clip.CLIP(**config["model_cfg"]).state_dict()
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("has_hub_tokenizer", [False, True])
def test_texts_beyond_the_context_are_counted(clip_folder, tmp_path, has_hub_tokenizer):
    folder = clip_folder
    if has_hub_tokenizer:
        folder = folder_with_a_hub_tokenizer(clip_folder, tmp_path)
    scorer = ClipScorer(str(folder))
    scorer(
        [random_image(1)],
        [["a cat", "the red circle " * 12, "one", "a large area " * 20]],
        "answers",
    )
    assert scorer.truncated == 2


@pytest.mark.parametrize(
    "name, weights",
    [
        ("no-such-model", None),
        ("ViT-B-32", "no-such-tag"),
        ("hf-hub:no/such", None),
        ("empty", None),
        # these two would load with random weights and reward noise
        ("ViT-S-32-alt", None),
        ("no weights", None),
    ],
)
def test_a_clip_that_cannot_be_loaded_ends_in_one_line(clip_folder, tmp_path, name, weights):
    for folder in ("empty", "no weights"):
        (tmp_path / folder).mkdir()
    config = (clip_folder / "open_clip_config.json").read_text()
    (tmp_path / "no weights" / "open_clip_config.json").write_text(config)
    if (tmp_path / name).exists():
        name = str(tmp_path / name)
    with pytest.raises(SystemExit) as error:
        ClipScorer(name, weights)
    message = str(error.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 500
