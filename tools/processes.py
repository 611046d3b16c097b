"""A training run among processes: those that torchrun started, and those that send it signals."""
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm


def join_processes() -> tuple[int, int, torch.device]:
    """Rank and number of the processes that torchrun started (0 of 1 without it), and this one's device."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:  # the timeout is for the others, while the first trains the autoencoder or draws a strip
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    return int(os.environ.get("RANK", 0)), world, device


def across_processes(loss: float, stop: bool, device: torch.device) -> tuple[float, bool]:
    """The mean loss, and whether any process was told to stop."""
    if not dist.is_initialized():
        return loss, stop
    both = torch.tensor([loss, float(stop)], device=device, dtype=torch.float64)
    dist.all_reduce(both)
    return both[0].item() / dist.get_world_size(), both[1].item() > 0


def stop_on_signals() -> list[int]:
    """A list that Ctrl-C or SIGTERM writes its number into. A second one acts at once."""
    stop: list[int] = []

    def note(number: int, _) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step; once more to stop at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return stop


def ignore_interrupt(_: int) -> None:
    """Ctrl-C reaches the data workers as well; only the main process is to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
