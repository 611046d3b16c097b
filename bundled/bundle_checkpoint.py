"""From a run of train.py to a bundled checkpoint, in half precision.

    python -m bundled.bundle_checkpoint base runs/base checkpoints/tiny_base.pt
    python -m bundled.bundle_checkpoint world runs/world checkpoints/tiny_world.pt \\
        --base tiny_base.pt

A base is laid out as DynamiCrafter's own checkpoint, so that `train.py --base` reads both alike. A
world holds everything, or, with --base, lies beside the base that it was trained from, which holds
the parts that stayed as they were.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynamicrafter.checkpoint import read_checkpoint
from model.saving import PARTS, PREFIXES, rename_keys, load_model, preset_of, save
from model.vid2world import TUNED_SAMPLING
from support.options import argument, option, program


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    exact = ("action_statistics",)  # a few numbers, in units that a user compares with
    return {name: tensor if name in exact else tensor.half() for name, tensor in weights.items()}


def bundle_base(run: Path, out: Path) -> None:
    weights = half(load_model(run).state_dict())
    save(out, {"preset": preset_of(run), "state_dict": {
        theirs + name.removeprefix(ours): tensor for name, tensor in weights.items()
        for ours, theirs in PREFIXES.items() if name.startswith(ours)}})


def bundle_world(run: Path, out: Path, beside: str | None) -> None:
    content, world = read_checkpoint(run / "checkpoint.pt"), load_model(run).state_dict()
    base = rename_keys(read_checkpoint(out.with_name(beside))["state_dict"]) if beside else {}
    changed = {name for name, tensor in world.items()
               if name not in base or not torch.equal(tensor, base[name].float())}
    learned = tuple(part for part in PARTS if any(name.startswith(part) for name in changed))
    changed = {name: tensor for name, tensor in world.items()
               if name in changed or name.startswith(learned)}
    save(out, {"config": asdict(load_model(run).config),
               "sampling": TUNED_SAMPLING[preset_of(run)],
               "weights": half(changed),
               "frozen": beside, "data": content["data"] | {"root": None},
               "step": content["step"]})


@dataclass
class Settings:
    what: str = argument("what to make of it", choices=("base", "world"))
    run: str = argument("folder of a run")
    out: str = argument("checkpoint to write")
    base: str | None = option(None, "name of the bundled base next to a world")


def bundle(settings: Settings) -> None:
    run, out = Path(settings.run), Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if settings.what == "base":
        bundle_base(run, out)
    else:
        bundle_world(run, out, settings.base)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


main = program(__name__, "bundle_checkpoint", bundle, Settings, "Make a bundled checkpoint.")
