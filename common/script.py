"""How a script ends: Ctrl-C, a full disk or a lost rank cost one line.

A script imports this file first, since its other imports take seconds in which Ctrl-C may come.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = "error: interrupted; the same command continues from here"
# as a shell has it: 128 + SIGINT
INTERRUPTED_STATUS = 130
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
LOST_PEER = re.compile("gloo.*(by peer|pipe)|ncclRemoteError", re.DOTALL | re.IGNORECASE)


# ---------------------------------------------------------------- Ctrl-C


def end_silently(signum, frame):
    """Ends the process within this line: files are whole at any moment, so none is lost."""
    os._exit(INTERRUPTED_STATUS)


def end_at_once(signum, frame):
    """The same, with a message."""
    os.write(2, f"\n{INTERRUPTED}\n".encode())
    end_silently(signum, frame)


def interrupt(signum, frame):
    """Raises KeyboardInterrupt; a second Ctrl-C waits for nothing."""
    signal.signal(signal.SIGINT, end_at_once)
    raise KeyboardInterrupt


def handle_interrupts(handler):
    """Has `handler` called on Ctrl-C, unless this process was started to ignore it (nohup, &)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def is_our_script():
    """Whether this process was started as one of the scripts, and is no test and no notebook."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return script is not None and Path(script).resolve().parent in (ROOT, ROOT / "lvrpo")


if is_our_script():
    handle_interrupts(end_at_once)


# ---------------------------------------------------------------- running a script


def run_script(main):
    """Runs a stage's main(). A full disk, Ctrl-C or a lost rank ends it in one line.

    What was written stays whole. If one rank fails, all ranks stop, and torchrun prints the
    failing rank's error last.
    """
    # not at the top, which is read before Ctrl-C is handled
    import torch.distributed as dist
    from tqdm import tqdm
    from transformers import dynamic_module_utils
    from transformers.utils import logging as hf_logging

    from common.locks import release_outputs
    from common.records import fail

    lost_peer = False
    # "Loading weights" and the like: the stages have bars of their own for what takes long
    hf_logging.disable_progress_bar()
    # where nobody passes trust_remote_code, transformers refuses a checkpoint's code: it would ask
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    previous_handler = signal.getsignal(signal.SIGINT)
    handle_interrupts(interrupt)
    try:
        try:
            main()
        except OSError as error:
            fail(
                f"{error.filename or 'output'}: {error.strerror or error}; what was written is "
                "kept, and the same command continues from there"
            )
        except (MemoryError, RuntimeError) as error:
            # torch's is a RuntimeError
            if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
                fail(
                    "out of memory: lower --max-pixels, --batch-size or --tokens-per-forward, or "
                    "--group-size and --max-new-tokens"
                )
            lost_peer = LOST_PEER.search(str(error)) is not None
            if not lost_peer:
                raise
            fail(f"rank {os.environ['RANK']}: another rank ended; its message says why")
        if dist.is_initialized():
            # not after an error: NCCL could wait for the others
            dist.destroy_process_group()
    except (SystemExit, KeyboardInterrupt) as end:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()  # or the message would stand behind it
        if isinstance(end, KeyboardInterrupt):
            print(INTERRUPTED, file=sys.stderr)
            if signal.getsignal(signal.SIGINT) is end_at_once:
                signal.signal(signal.SIGINT, end_silently)
            raise SystemExit(INTERRUPTED_STATUS) from None
        if isinstance(end.code, str):
            _report_to_torchrun(end.code, lost_peer)
        raise
    finally:
        release_outputs()
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, previous_handler)


def _report_to_torchrun(message, lost_peer):
    """torchrun shows the earliest error as the cause: that of a lost peer is dated later."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        timestamp = int(time.time()) + (60 if lost_peer else 0)
        report = {"message": message, "extraInfo": {"timestamp": timestamp}}
        Path(path).write_text(json.dumps({"message": report}))
