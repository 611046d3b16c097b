"""Small models and checkpoints with random weights, spied passes, short runs."""
import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig
from dynamicrafter.resampler import Resampler, ResamplerConfig
from model.saving import save
from model.vid2world import PRESETS, Model
from sample import WorldModel
from testing.commands import folder
from testing.golden import names_of, with_recipe
from unet import UNet, UNetConfig

SMALL = UNetConfig(model_channels=32, num_res_blocks=1, channel_mult=(1, 2), head_channels=16,
                   context_dim=48, num_frames=4)
WORLD = replace(SMALL, causal=True, norm_scope="frame", action_dim=13)


def small_checkpoint(**changes: object) -> Path:
    """A small DynamiCrafter checkpoint. A change of None leaves the name out."""
    parts = {"model.diffusion_model.": UNet(SMALL),
             "embedder.model.visual.": ImageTower(ImageTowerConfig(28, 14, 64, 2, 4, 48)),
             "cond_stage_model.model.": TextTower(TextTowerConfig(77, 49408, 48, 3, 3, 48)),
             "image_proj_model.": Resampler(ResamplerConfig(48, 1, 3, 16, 16, 64, 48, 4)),
             "first_stage_model.": Autoencoder(AutoencoderConfig(32, (1, 2), 1))}
    names = names_of(parts) | {"betas": (1000,), "scale_arr": (1400,),
                               "cond_stage_model.model.logit_scale": (),
                               "embedder.model.logit_scale": (),
                               "embedder.model.ln_final.bias": (48,)}
    weights = {name: torch.randn(shape) * 0.05 for name, shape in names.items()} | changes
    path = folder() / "model.ckpt"
    torch.save({"state_dict": {name: w for name, w in weights.items() if w is not None},
                "global_step": 0}, path)
    return path


def write_safetensors(path: Path, weights: dict[str, Tensor]) -> None:
    """The format as its makers describe it: length of the header, header, tensors."""
    names = {torch.float16: "F16", torch.float32: "F32"}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        start, end = end, end + w.nbytes
        offsets = [start, end]
        header[name] = {"dtype": names[w.dtype], "shape": list(w.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = b"".join(w.contiguous().numpy().tobytes() for w in weights.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


class Exploit:
    """Unpickling this leaves a file behind."""
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def causal_network(scope: str) -> tuple[UNet, dict[str, Tensor]]:
    """A causal network with random weights everywhere, and inputs for it."""
    network = with_recipe(UNet(replace(WORLD, norm_scope=scope)), "any.")
    random = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(1, 6, 8, 8, 8, generator=random),
              "k": torch.randint(1000, (1, 6), generator=random),
              "text": torch.randn(1, 77, 48, generator=random),
              "image": torch.randn(1, 6, 4, 48, generator=random),
              "actions": torch.randn(1, 6, 13, generator=random), "action_mask": torch.ones(1, 6)}
    return network, inputs


def small_world(scope: str = "frame", **options: object) -> WorldModel:
    """A world model with random weights everywhere: 4 slots, 16×16 pixels."""
    config = replace(PRESETS["tiny"], size=(16, 16),
                     unet=replace(WORLD, norm_scope=scope),
                     autoencoder=AutoencoderConfig(32, (1, 2), 1, latent_scale=1.0),
                     resampler=ResamplerConfig(48, 1, 3, 16, 4, 64, 48, 4))
    torch.manual_seed(0)
    model = Model(config)
    with_recipe(model.unet, "any.")
    return WorldModel(model, **{"steps": 3, "overlap": 2} | options)


def small_episode(T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (T, 16, 16, 3),
                           dtype=np.uint8), random.standard_normal((T, 13)).astype(np.float32)


def save_world(out: Path, **changes: object) -> Path:
    """A run folder with the preset's model as it was before its first step."""
    tiny = PRESETS["tiny"]
    unet = replace(tiny.unet, **{"causal": True, "norm_scope": "frame", "action_dim": 13} | changes)
    model = Model(replace(tiny, unet=unet, size=(32, 32)))
    out.mkdir(parents=True)
    save(out / "frozen.pt", {"weights": {}})
    save(out / "checkpoint.pt", {"config": asdict(model.config), "weights": model.state_dict(),
                                 "sampling": {"steps": 1}, "frozen": "frozen.pt", "step": 0})
    return out


def passes_of(world: WorldModel) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A list that fills with x, k and action mask of every pass of the network from now on."""
    passes, denoise = [], world.model.denoise
    def spy(x, k, anchor, context, actions, mask, *others):
        passes.append((x.clone(), k.clone(), mask.clone()))
        return denoise(x, k, anchor, context, actions, mask, *others)
    world.model.denoise = spy
    return passes


@contextlib.contextmanager
def small_preset():
    """Runs of train.py in this process are of a network of a fifth of the size."""
    tiny = PRESETS["tiny"]
    PRESETS["tiny"] = replace(tiny, unet=replace(
        tiny.unet, model_channels=32, channel_mult=(1, 1, 1), attention_resolutions=(4,)))
    try:
        yield
    finally:
        PRESETS["tiny"] = tiny


def train_words(root: Path, out: Path, steps: int = 4, batch: int = 2,
                *settings: str) -> list[object]:
    """Words of train.py for a short run from scratch on a small RT-1."""
    return ["--data", "rt1", "--root", root, "--scratch", "--out", out, "--frames", 4, "--size", 32,
            32,
            "--steps", steps, "--batch", batch, "--save-every", 2, "--workers", 0, "--no-bf16",
            "--set", "autoencoder_steps=2", "val_clips=2", "val_every=4", *settings]


def losses(out: Path) -> list[float]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]
