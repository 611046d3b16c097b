"""A pass of a small network as a graph.

A pass of a rollout is over one frame or two: a thousand operations of a few microseconds each, and
Python takes a third of the time. So a kind of pass that comes often is traced: PyTorch notes what
it does, and from then on does the same without Python, bit for bit. Tracing costs as much as thirty
passes gain, so the first thirty do without.

A graph knows nothing but tensors: what the layers have cached is handed in, and what they cache
comes out beside the velocity. It holds for every length of the history, which layers read off the
mask (`Cache.visible`). Not in the paper.
"""
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from temporal.streaming import Cache

ENOUGH = 30  # passes of a kind
Tensors = dict[nn.Module, tuple[Tensor, ...]]  # of every layer


def captured(model: nn.Module) -> Callable:
    """`model.denoise` with a cache, by graphs where that pays: for a small network on a CPU whose
    weights have finished learning. All worlds of a model share them."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    if learns or not model.config.small or model.device.type != "cpu":
        return model.denoise
    if not hasattr(model, "graphs"):
        model.graphs = Captured(model.denoise)
    return model.graphs


class Captured:
    """`Model.denoise` with a cache, by graphs."""

    def __init__(self, denoise: Callable):
        self.denoise, self.graphs, self.seen = denoise, {}, Counter()

    def __call__(self, x: Tensor, k: Tensor, anchor: Tensor, context: Tensors, actions: Tensor,
                 action_mask: Tensor, cache: Cache) -> Tensor:
        kind = x.shape, cache.branches
        self.seen[kind] += 1
        if not cache.frames or self.seen[kind] <= ENOUGH:
            return self.denoise(x, k, anchor, context, actions, action_mask, cache)
        cache.begin(x.shape[1])
        inputs = [x, k, anchor, actions, action_mask, cache.visible(x.device),
                  *flatten(context), *flatten(cache.cached)]
        if kind not in self.graphs:
            self.graphs[kind] = self.trace(inputs, context, cache)
        with torch.jit.optimized_execution(False):  # the other way takes seconds and gains nothing
            v, *cached = self.graphs[kind](*inputs)
        cache.pending = unflatten(cached, cache.cached)
        cache.commit()
        return v

    def trace(self, inputs: list[Tensor], context: Tensors, cache: Cache) -> Callable:
        """The graph of this kind of pass: tensors in, the velocity and all that is cached out."""
        held, branches = context | cache.cached, cache.branches

        def run(x, k, anchor, actions, action_mask, visible, *tensors: Tensor) -> tuple:
            inside = Cache(cache.capacity)
            inside.frames, inside.branches, inside.cached = 1, branches, unflatten(tensors, held)
            inside.visible = lambda device: visible
            v = self.denoise(x, k, anchor, inside.cached, actions, action_mask, inside)
            return v, *flatten({layer: inside.cached[layer] for layer in cache.cached})

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's decisions, which hold for the kind
            return torch.jit.trace(run, inputs, check_trace=False)


def flatten(held: Tensors) -> list[Tensor]:
    return [tensor for tensors in held.values() for tensor in tensors]


def unflatten(tensors: Iterable[Tensor], like: Tensors) -> Tensors:
    tensors = iter(tensors)
    return {layer: tuple(islice(tensors, len(each))) for layer, each in like.items()}
