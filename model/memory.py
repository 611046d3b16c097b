"""What the C library does with memory that PyTorch gives back on the CPU."""
import ctypes
import sys


def keep_freed_memory() -> None:
    """On Linux: do not hand memory back to the system after every operation, which would have to
    zero it anew for the next.

    About a fifth of a pass on the CPU would be spent on that. Other systems are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap as well
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap
        # M_ARENA_MAX: one heap for all threads, or each that comes and goes keeps its own
        libc.mallopt(-8, 1)


def return_freed_memory() -> None:
    """On Linux: hand back what was kept. In play, worlds of all lengths come and go, and leave ever
    more gaps between them."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
