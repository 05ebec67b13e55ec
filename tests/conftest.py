"""Shared by every test: the repository root on the path, no network, two threads, and one tiny checkpoint a family."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub fails here, not at a user's
# Two threads that spin for each other on a busy machine take ten times as long as two that sleep (17 s against 1.7 s)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402 (the lines above only work before torch and transformers are imported)
import torch  # noqa: E402

from tiny import build  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> folder of a tiny checkpoint, built once a session. Read it, never write into it."""
    built = {}

    def get(family):
        if family not in built:
            built[family] = build(family, tmp_path_factory.mktemp("tiny") / family)
        return built[family]

    return get
