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
from collections.abc import Callable

import torch
from torch import Tensor, nn

from temporal.streaming import Cache

ENOUGH = 30  # passes of a kind


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

    def __call__(self, x: Tensor, k: Tensor, anchor: Tensor, context: dict, actions: Tensor,
                 action_mask: Tensor, cache: Cache) -> Tensor:
        """As `Model.denoise`."""
        kind = x.shape, cache.branches
        self.seen[kind] += 1
        if not cache.frames or self.seen[kind] <= ENOUGH:
            return self.denoise(x, k, anchor, context, actions, action_mask, cache)
        cache.begin(x.shape[1])
        inputs = (x, k, anchor, tuple(context.values()), actions, action_mask,
                  tuple(cache.cached.values()), cache.visible(x.device))
        if kind not in self.graphs:
            self.graphs[kind] = self.trace(inputs, list(context), list(cache.cached), cache)
        with torch.jit.optimized_execution(False):  # the other way takes seconds and gains nothing
            v, cached = self.graphs[kind](*inputs)
        cache.pending = dict(zip(cache.cached, cached, strict=True))
        cache.commit()
        return v

    def trace(self, inputs: tuple, readers: list, writers: list, cache: Cache) -> Callable:
        """The graph of a kind of pass: the velocity, and what the layers that write have cached."""
        capacity, branches = cache.capacity, cache.branches

        def run(x, k, anchor, context, actions, action_mask, cached, visible) -> tuple:
            inside = Cache(capacity)
            inside.frames, inside.branches, inside.visible = 1, branches, lambda device: visible
            inside.cached = dict(zip(writers, cached, strict=True))
            v = self.denoise(x, k, anchor, dict(zip(readers, context, strict=True)), actions,
                             action_mask, inside)
            return v, tuple(inside.cached.values())

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's decisions, which hold for the kind
            return torch.jit.trace(run, inputs, check_trace=False)
