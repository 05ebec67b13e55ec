"""Shared by every test: the root on the path, no network, two threads, tiny checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub fails here, not at a user's
# Two threads that spin for each other on a busy machine take ten times as long as two that sleep
# (17 s against 1.7 s)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402 (the lines above only work before torch and transformers are imported)
import torch  # noqa: E402
from tiny import FAMILIES, build  # noqa: E402
from tiny_more import build_more  # noqa: E402

torch.set_num_threads(2)
CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> folder of a tiny checkpoint, built once per session.

    Read it, never write into it.
    """
    built = {}

    def get(family):
        if family not in built:
            make = build if family in FAMILIES else build_more
            built[family] = make(family, tmp_path_factory.mktemp("tiny") / family)
        return built[family]

    return get


@pytest.fixture
def stage(monkeypatch, capsys):
    """stage(module, *arguments) -> (error, printed): runs a script's main() in this process.

    That saves the seconds of starting Python and importing torch.
    """
    from common.script import run_script

    def run(module, *arguments):
        error = None
        capsys.readouterr()
        with monkeypatch.context() as m:
            m.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
            try:
                run_script(module.main)
            except SystemExit as e:
                error = str(e.code)
        return error, "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random open_clip model with a context of 12 tokens, as a folder for --clip.

    Read it, never write into it.
    """
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": 16,
            "layers": 1,
            "head_width": 8,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 8,
            "heads": 1,
            "layers": 1,
        },
    }
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 16}})
    )
    return folder


@pytest.fixture
def browser(tmp_path):
    """browser(page, *flags) -> standard output of a headless chromium that opens it."""
    if not CHROMIUM.exists():
        pytest.skip(f"no browser: {CHROMIUM} is not installed (apt-get install chromium)")

    def run(page, *flags, until=""):
        # on a busy machine it may stop before it has drawn
        for _ in range(5):
            dom = subprocess.run(
                [
                    CHROMIUM,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-quic",
                    "--no-first-run",
                    "--disable-background-networking",
                    "--disable-component-update",
                    "--disable-sync",
                    "--virtual-time-budget=3000",
                    f"--user-data-dir={tmp_path / 'profile'}",
                    *flags,
                    page.as_uri(),
                ],
                capture_output=True,
                text=True,
                timeout=120,
                env={**os.environ, "HOME": str(tmp_path)},
            ).stdout
            if until in dom:
                break
        return dom

    return run
