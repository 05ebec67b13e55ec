"""The processes that torchrun started: joining them, and what they tell each other."""

import ctypes
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist


def setup_distributed():
    """(rank, world size, device) of this process, which joins the others if torchrun started it."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        # no rank writes on when torchrun was killed
        die_with_parent()
    if world > 1 and not dist.is_initialized():
        _join(rank, world, device)
    return rank, world, device


def _join(rank, world, device):
    # torch#135712: torchrun's store still holds the addresses of dead ranks when it restarts
    # them, hence the prefix. Nodes may count restarts differently: several of them need
    # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead
    prefix = "0"
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        prefix = os.environ["TORCHELASTIC_RESTART_COUNT"]
    timeout = datetime.timedelta(minutes=30)
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )


def barrier():
    """Waits for all ranks, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def broadcast(value):
    """The value that rank 0 passed, on every rank."""
    if dist.is_initialized():
        box = [value]
        dist.broadcast_object_list(box)
        value = box[0]
    return value


def print_once(line):
    """Prints a line, on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line)


def gather(value):
    """The values that all ranks passed, in the order of ranks, on every rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def die_with_parent():
    """On Linux, has this process killed when its parent ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
