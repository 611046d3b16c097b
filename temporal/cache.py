"""The memory of a rollout: what the frames so far leave behind for the next one.

A causal network never looks ahead, so a new frame changes nothing about the frames before. A
rollout therefore runs the network on the new frame alone, and each temporal layer keeps the little
that the new frame will ask of the past:

    frames    0   1   2   3   4  |  5        convolution   its inputs at 3 and 4 (kernel of 3)
              ────────────────── |  ─        attention     keys and values of 0 .. 4
              remembered         |  new      norm "past"   mean and variance of each of 0 .. 4

Guidance needs two versions of frame 5, with its action and without. Both are `alternatives` for the
same place: each sees the remembered frames and itself, and neither sees the other.

    a pass over frame 4, and two alternatives        sees    0  1  2  3   4   5  5'
    for frame 5, while 0 .. 3 are remembered            4    ■  ■  ■  ■   ■
                                                        5    ■  ■  ■  ■   ■   ■
                                                        5'   ■  ■  ■  ■   ■      ■

Frame 4 is appended to the memory; the alternatives are not.
"""
import torch
from torch import Tensor, nn


class Cache:
    """The memory of one rollout (or of B rollouts side by side).

    capacity  frames that the cache can hold, beside one alternative

    The memory of a full window takes, in numbers per rollout:

        2 (capacity + 1) · Σ H·W·inner      temporal attentions: keys and values
        3 · Σ H·W·channels                  temporal convolutions: two inputs and their contribution
        2 · frames · Σ 32                   norms of scope "past": mean and variance of each group

    For DynamiCrafter-512 with 16 frames these are 580 M + 90 M numbers: 1.34 GB in bfloat16.
    """

    def __init__(self, capacity: int):
        self.capacity, self.frames = capacity, 0
        self.appended, self.alternatives = 0, 0  # frames of the pass under way
        self.memory: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.pending: dict[nn.Module, tuple[Tensor, ...]] = {}
        self.mask: Tensor | None = None  # who sees whom in the pass under way

    def begin(self, frames: int, alternatives: int = 0) -> None:
        """Start a pass over new frames, of which the last `alternatives` are not to be appended.

        Raises ValueError if the frames do not fit, or if there is nothing yet that alternatives
        could follow.
        """
        if not self.frames and frames == alternatives:
            raise ValueError("the cache is empty: append a frame before reading it")
        room = self.capacity - self.frames + (alternatives > 0)
        if frames > room:
            raise ValueError(f"{frames} frames do not fit into the cache, which has room for "
                             f"{room}")
        self.appended, self.alternatives = frames - alternatives, alternatives
        self.pending, self.mask = {}, None

    def recall(self, layer: nn.Module) -> tuple[Tensor, ...] | None:
        return self.memory.get(layer)

    def keep(self, layer: nn.Module, *tensors: Tensor) -> None:
        """Remember tensors for a layer, once the whole pass has succeeded."""
        self.pending[layer] = tensors

    def commit(self) -> None:
        """The pass has succeeded: its appended frames are remembered from now on."""
        self.memory |= self.pending
        self.frames += self.appended
        self.pending = {}

    def sees(self, device: torch.device) -> Tensor:
        """Which frames each new frame sees, bool [new, remembered + new]."""
        if self.mask is not None:  # all layers ask in the same pass
            return self.mask
        new = self.appended + self.alternatives
        sees = torch.ones(new, self.frames + new, dtype=torch.bool, device=device).tril(self.frames)
        itself = torch.eye(self.alternatives, dtype=torch.bool, device=device)
        sees[self.appended :, self.frames + self.appended :] = itself
        self.mask = sees
        return sees

    @property
    def nbytes(self) -> int:
        kept = [tensor for tensors in self.memory.values() for tensor in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
