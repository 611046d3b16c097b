"""Golden weights, which both sides of a comparison draw by one recipe."""
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from causal_conv import TemporalConv
from dynamicrafter.autoencoder import Autoencoder
from dynamicrafter.clip import ImageTower, TextTower
from dynamicrafter.resampler import Resampler
from unet import UNet, UNetConfig

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name: str) -> dict:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: json.loads(str(arrays[key])) if key == "config"
                else torch.from_numpy(arrays[key]) for key in arrays}


def recipe(names_and_shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The golden weights: seeded by the full name of each parameter."""
    weights = {}
    for name, shape in names_and_shapes.items():
        w = np.random.RandomState(crc32(name.encode())).standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            w /= np.sqrt(np.prod(shape[1:]))
        else:
            w = 0.1 * w + (len(shape) == 1 and name.endswith("weight"))
        weights[name] = torch.as_tensor(w, dtype=torch.float32)
    return weights


def with_recipe(network: nn.Module, prefix: str) -> nn.Module:
    weights = recipe({prefix + name: tuple(tensor.shape) for name,
                      tensor in network.state_dict().items()})
    network.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return network.eval()


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def network_inputs(g: dict) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, C, H, W], text [B, 77, D] and image [B, T, 16, D] from the originals' layout."""
    T = g["x"].shape[2]
    return g["x"].transpose(1, 2), g["context"][:, :77], g["context"][:, 77:].unflatten(1, (T, 16))


def released_names(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released Vid2World U-Net, which wraps its causal convolutions."""
    with torch.device("meta"):
        network = UNet(replace(config, causal=True, height_causal_out=True))
    layers = dict(network.named_modules())
    names = {}
    for name, tensor in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        infix = "conv3d." if isinstance(layers[layer],
                                        TemporalConv) else "conv2d." if layer == "out.2" else ""
        names[f"model.diffusion_model.{layer}.{infix}{leaf}"] = tuple(tensor.shape)
    return names


@cache
def full_size_parts(**changes: object) -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {"model.diffusion_model.": UNet(replace(UNetConfig(), **changes)),
                "first_stage_model.": Autoencoder(), "image_proj_model.": Resampler(),
                "embedder.model.visual.": ImageTower(), "cond_stage_model.model.": TextTower()}


def names_of(parts: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(t.shape) for prefix, part in parts.items() for name,
            t in part.state_dict().items()}
