"""A training run among processes: those of torchrun, those that load, those that signal."""
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from model.device import best_device
from support.errors import RequestError
from training.settings import Settings


def join_processes() -> tuple[int, int, torch.device]:
    """Rank and number of torchrun's processes (0 of 1 without it), and this one's device."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(best_device())
    if cuda := device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # clips are of one size
    # the timeout is for the others, while the first trains the autoencoder or draws a strip
    if processes > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    return int(os.environ.get("RANK", 0)), processes, device


def across_processes(loss: float, stop: bool, device: torch.device) -> tuple[float, bool]:
    """The mean loss, and whether any process was told to stop."""
    if not dist.is_initialized():
        return loss, stop
    both = torch.tensor([loss, float(stop)], device=device, dtype=torch.float64)
    dist.all_reduce(both)
    return both[0].item() / dist.get_world_size(), both[1].item() > 0


def make_optimizer(parameters: list[nn.Parameter], settings: Settings, device: torch.device
                   ) -> torch.optim.Optimizer:
    """AdamW; with `--shard` each of n processes keeps the moments of an nth of the parameters
    (ZeRO, stage 1). Raises RequestError for one process."""
    options = {"lr": settings.lr, "fused": device.type != "mps"}
    if not settings.shard:
        return torch.optim.AdamW(parameters, **options)
    if not dist.is_initialized():
        raise RequestError("--shard spreads a run over processes: start it with torchrun "
                           "--nproc_per_node=N train.py …")
    with warnings.catch_warnings():  # of what else PyTorch keeps there
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **options)


def gather_moments(optimizer: torch.optim.Optimizer) -> None:
    """Before the first process saves: all have to call this."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(0)


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list into which Ctrl-C or SIGTERM writes its number. A second one acts at once."""
    stop: list[int] = []

    def note(number: int, _) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_: int) -> None:
    """For data workers. Ctrl-C, and a SIGTERM to the process group, reach them as well; only the
    main process is to act on it, and needs them until its step is done. They end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
