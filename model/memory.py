"""Memory: frozen parts in half precision, activations computed again, a heap that is kept."""
import ctypes
import sys
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dynamicrafter.autoencoder import Autoencoder
from model.vid2world import Model
from unet import UNet


def frozen_to_bf16(model: Model) -> None:
    """The autoencoder and the image tower in bfloat16, if they are frozen: for runs that compute in
    bfloat16 anyway."""
    for part in (model.autoencoder, model.image_tower):
        if not any(parameter.requires_grad for parameter in part.parameters()):
            for parameter in part.parameters():
                parameter.data = parameter.data.bfloat16()


def encode_once(autoencoder: Autoencoder, most: int = 100_000) -> None:
    """Encode a frame once: training meets it again and again, and the encoder is a seventh of a
    small world's step. Keeps the moments of up to `most` frames (1 GB), found by their pixels.
    The autoencoder must be frozen."""
    encode, known = autoencoder.moments, {}

    def moments(pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, 2·C, h, w]
        keys = [hash(frame.tobytes()) for frame in pixels.numpy()]
        new = [i for i, key in enumerate(keys) if key not in known]
        found = dict(zip([keys[i] for i in new], encode(pixels[new]), strict=True)) if new else {}
        if len(known) < most:
            known.update(found)
        return torch.stack([known[key] if key in known else found[key] for key in keys])

    autoencoder.moments = moments


def recompute_activations(unet: UNet) -> None:
    """Less memory for more time: the backward pass computes the layers' activations again."""
    for block in [*unet.input_blocks, unet.init_attn, unet.middle_block, *unet.output_blocks]:
        for layer in block:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def keep_malloc_heap() -> None:
    """On Linux: do not hand memory back to the system after every operation, which would have to
    zero it again for the next.

    About a fifth of a pass on the CPU would be spent on that. Other systems are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap
        # M_ARENA_MAX: one heap for all threads, or each that comes and goes keeps its own
        libc.mallopt(-8, 1)


def trim_malloc_heap() -> None:
    """On Linux: hand back what was kept. In play, worlds of all lengths come and go, and leave ever
    more gaps between them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
