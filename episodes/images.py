"""Encoded pictures, and what can be wrong with them."""
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from errors import DataError

LARGEST = 2**24  # pixels: a frame of more is a decompression bomb, or at least no frame


def decode(image: bytes | memoryview | Path | np.ndarray) -> np.ndarray:
    """An encoded picture, its file, or one that is an array already, to uint8 [H, W, 3]. Raises
    DataError."""
    if isinstance(image, np.ndarray):
        return image
    name = "a frame"
    if isinstance(image, Path):
        name, image = image.name, image.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(image))
        if picture.width * picture.height > LARGEST:
            raise DataError(f"{name} has {picture.width}×{picture.height} pixels")
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
            eight_bits = np.asarray(picture).astype(np.int64) >> 8
            picture = Image.fromarray(eight_bits.clip(0, 255).astype(np.uint8))
        return np.asarray(picture.convert("RGB"))
    except DataError:
        raise
    except Exception:  # a damaged picture makes its decoder raise almost anything
        raise DataError(f"{name} is no readable picture") from None


def decode_all(images: Iterable) -> np.ndarray:
    """Pictures to uint8 [T, H, W, 3]. Raises DataError for a bad one, or for different sizes."""
    frames = [decode(image) for image in images]
    sizes = sorted({frame.shape for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width, _ in sizes[:3])
        raise DataError(f"its frames have different sizes ({listed})")
    return np.stack(frames)
