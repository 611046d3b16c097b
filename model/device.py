"""Where to compute: CUDA, Apple's mps, or the CPU."""
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FALLBACK = "PYTORCH_ENABLE_MPS_FALLBACK"  # PyTorch reads it when it is imported


@cache
def best_device() -> str:
    """CUDA where there is one. On a Mac the GPU if operations that it lacks may fall back to the
    CPU, which only the environment can allow; PyTorch then names each of them once."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        if os.environ.get(FALLBACK) == "1":
            return "mps"
        print(f"on the CPU; {FALLBACK}=1 in the environment uses this Mac's GPU")
    return "cpu"


def bf16_is_quick() -> bool:
    """Whether training computes in bfloat16 unless it is told otherwise: on CUDA, and on CPUs with
    units for it (AVX512_BF16 or AMX)."""
    units = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported",
                                                         "_is_amx_tile_supported"))
    return torch.cuda.is_available() or any(supported() for supported in units)


def bf16_is_emulated(device: torch.device) -> bool:
    """CPUs without AVX-512 compute bfloat16 in software: convolutions take twenty times as long."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def math_attention_on_cpu(device: torch.device, bf16: bool, small: bool) -> AbstractContextManager:
    """Within it, a small network in bfloat16 on a CPU trains with explicit attention: the fused
    kernel's backward pass takes several times as long there (`python -m testing.speed
    --layers`). A large network cannot spare the memory for it."""
    written_out = device.type == "cpu" and bf16 and small
    return sdpa_kernel(SDPBackend.MATH) if written_out else nullcontext()
