"""Encoded pictures, and what can be wrong with them."""
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.errors import DataError, reading, stand_in

LARGEST = 2**24  # pixels: a frame of more is a decompression bomb, or at least no frame


def decode(image: bytes | memoryview | Path | np.ndarray) -> np.ndarray:
    """An encoded picture, its file, or an array, to uint8 [H, W, 3]. Raises DataError."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise DataError(f"a frame is {image.dtype} {list(image.shape)}; expected uint8 "
                            "[H, W, 3]")
        return image
    name, fault = "a frame", "is not a readable picture"
    if isinstance(image, Path):
        with reading(image):
            name, fault, image = image.name, stand_in(image) or fault, image.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(BytesIO(image))
            if picture.format == "PNG":  # whose checksums are else passed over
                picture.verify()
                picture = Image.open(BytesIO(image))
        if picture.width * picture.height > LARGEST:
            raise DataError(f"{name} has {picture.width}×{picture.height} pixels")
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
            eight_bits = np.asarray(picture).astype(np.int64) >> 8
            picture = Image.fromarray(eight_bits.clip(0, 255).astype(np.uint8))
        # a camera that was held upright says so beside the pixels
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except DataError:
        raise
    except Exception:  # a damaged picture makes its decoder raise almost anything
        raise DataError(f"{name} {fault}") from None


def decode_all(images: Iterable) -> np.ndarray:
    """Pictures to uint8 [T, H, W, 3]. Raises DataError for a bad one, or for different sizes."""
    frames = [decode(image) for image in images]
    if not frames:
        raise DataError("it has no frames")
    sizes = sorted({frame.shape for frame in frames})
    if len(sizes) > 1:
        listed = ", ".join(f"{height}×{width}" for height, width, _ in sizes[:3])
        raise DataError(f"its frames have different sizes ({listed})")
    return np.stack(frames)
