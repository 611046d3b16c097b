"""What fits where: the memory of sampling and of training, counted without a GPU.

    python -m testing.plan

The whole step is run on tensors that have a shape and no content, and every byte that would be
alive is counted: weights, gradients, optimizer, activations, the copies in half precision, the
rollout's cache. Not counted is what the allocator loses between blocks, and the half gigabyte that
CUDA takes for itself.
"""
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.memory import frozen_to_bf16, recompute_activations
from model.vid2world import PRESETS, Model, ModelConfig
from temporal.streaming import Cache
from train import PostTraining
from training.start import freeze_spatial_layers

CARDS = {"24 GB": 24, "48 GB": 48, "80 GB": 80}
RESERVED = 1.5  # GB that a card has for nobody: CUDA's own, and what lies between blocks


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive; `.peak` is the most there were."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


def count(build: Callable[[], Model], work: Callable[[Model], object]) -> tuple[float, float]:
    """GB of a model by itself, and at the most while it works."""
    with FakeTensorMode(), LiveMemory() as memory:
        model = build()
        for tensor in [*model.parameters(), *model.buffers()]:
            memory.see(tensor)
        weights = memory.now
        memory.peak = weights
        work(model)
        return weights / 1e9, memory.peak / 1e9


def build_model(config: ModelConfig, action_dim: int = 13) -> Model:
    unet = replace(config.unet, causal=True, norm_scope="frame", action_dim=action_dim)
    return Model(replace(config, unet=unet))


def sample_frame(model: Model, given: int = 15, half: bool = True) -> None:
    """One frame after those given: one pass over it with its action and without, and the decoder.
    With 15 given it is the last that fits into the window, and the memory of the others is full.

    half  in bfloat16, as on GPUs
    """
    config, T = model.config, given
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        pixels = torch.zeros(1, T, 3, *config.size)
        latents = torch.cat([model.encode(pixels[:, t : t + 1]) for t in range(T)], dim=1)
        tokens, cache = model.image_tokens(pixels[:, 0]), Cache(config.unet.num_frames)
        actions, n = torch.zeros(1, T + 2, model.action_dim), 2
        context = model.context(tokens, range(T))
        model.denoise(latents, torch.zeros(1, T, dtype=torch.long), latents[:, :1], context,
                      actions[:, :T], torch.ones(1, T), cache)
        context, cache.branches = model.context(tokens, [T] * n), n
        new = latents[:, :1].repeat(1, n, 1, 1, 1)
        model.denoise(new, torch.zeros(1, n, dtype=torch.long), latents[:, :1], context,
                      actions[:, :n], torch.ones(1, n), cache)
        model.decode(latents[:, :1])


def begin_training(model: Model, checkpointing: bool, trainable: str = "all", half: bool = True
                   ) -> list[nn.Parameter]:
    """As `train.py` sets it up; returns the trainable parameters."""
    for part in (model.autoencoder, model.image_tower):
        part.requires_grad_(False)
    if half:
        frozen_to_bf16(model)
    if trainable == "temporal":
        freeze_spatial_layers(model)
    if checkpointing:
        recompute_activations(model.unet)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # its mask is small
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def add_gradients(model: Model, batch: int, half: bool = True) -> None:
    """Forward and backward."""
    T, size, shape = model.num_frames, model.config.size, model.latent_shape
    frames = torch.zeros(batch, T, *size, 3, dtype=torch.uint8)
    draws = {"k": torch.zeros(batch, T, dtype=torch.long), "noise": torch.zeros(batch, T, *shape),
             "posterior": torch.zeros(batch, T, *shape), "action_mask": torch.ones(batch, T),
             "keep_image": torch.ones(batch)}
    loss = PostTraining(model, half)(frames, torch.zeros(batch, T, model.action_dim), draws)
    loss.backward()


def train_step(model: Model, batch: int = 1, checkpointing: bool = True, trainable: str = "all",
               half: bool = True) -> None:
    """One step of `train.py`: forward, backward, AdamW."""
    learn = begin_training(model, checkpointing, trainable, half)
    optimizer = torch.optim.AdamW(learn, foreach=False)
    add_gradients(model, batch, half)
    optimizer.step()


PLAN: dict[str, Callable[[Model], object]] = {
    "sampling": sample_frame,
    **{f"training, {batch} clip{'s' * (batch > 1)}, {words} activations":
       partial(train_step, batch=batch, checkpointing=checkpointing)
       for batch in (1, 2, 4)
       for checkpointing, words in ((True, "recomputing"), (False, "keeping"))},
    "training, 1 clip, recomputing activations, `--trainable temporal`":
        partial(train_step, trainable="temporal"),
}


def print_plan(config: ModelConfig) -> None:
    """Markdown: settings, gigabytes, and the smallest card that they fit."""
    def card(peak: float) -> str:
        fits = [name for name, size in CARDS.items() if peak + RESERVED <= size]
        return fits[0] if fits else "none of these"

    print("| | weights (GB) | at the most (GB) | fits |\n| --- | --- | --- | --- |")
    for name, work in PLAN.items():
        weights, peak = count(lambda: build_model(config), work)
        print(f"| {name} | {weights:.1f} | {peak:.1f} | {card(peak)} |", flush=True)


if __name__ == "__main__":
    print_plan(PRESETS["512"])
