"""Frames at the size of a model: fitted to it, cut free again, and varied for training."""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance


def fit_frames(frames: np.ndarray, height: int, width: int, how: str = "pad") -> np.ndarray:
    """Resize frames uint8 [T, H, W, 3] bilinearly to height × width, their aspect kept.

    how  "pad"   the whole frame, and black beside it: the published models saw RT-1, 256×320, as
                 320×400 with 56 black columns on either side
         "crop"  as large as fills the picture; what stands over is cut off evenly
    """
    if frames.shape[1:3] == (height, width):
        return frames
    rows, columns = fitted_size(frames.shape[1:3], height, width, how)
    left, top = int((columns - width) / 2), int((rows - height) / 2)  # negative: room left
    box = (left, top, left + width, top + height)
    resized = (Image.fromarray(frame).resize((columns, rows), Image.Resampling.BILINEAR)
               for frame in frames)
    # black outside of the frame
    return np.stack([np.asarray(frame.crop(box)) for frame in resized])


def fitted_size(aspect: tuple[int, int], height: int, width: int, how: str = "pad"
                ) -> tuple[int, int]:
    """Height and width of a frame of this aspect that just fits in, or just fills."""
    H, W = aspect
    wider = height * W > width * H  # whether the frame is wider, for its height, than the picture
    if wider == (how == "pad"):
        return -(-H * width // W), width
    return height, -(-W * height // H)


def cut_bars(frames: np.ndarray, aspect: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [..., H, W, 3] that `fit_frames` padded, without the black bars.

    aspect  of the frames before, height and width up to a factor
    """
    H, W = frames.shape[-3:-1]
    rows, columns = fitted_size(aspect, H, W)
    top, left = (H - rows) // 2, (W - columns) // 2
    return frames[..., top : top + rows, left : left + columns, :]


def for_metrics(frames: np.ndarray, aspect: tuple[int, int], compare_at: tuple[int, int] | None
                ) -> np.ndarray:
    """Frames uint8 [..., H, W, 3] of a model, as the published figures compare them: with the bars
    for RT-1; for CS:GO without, and at the size at which they were recorded, `compare_at`."""
    if not compare_at:
        return frames
    frames = cut_bars(frames, aspect)
    pixels = torch.from_numpy(frames.reshape(-1, *frames.shape[-3:])).movedim(-1, 1).float()
    small = F.interpolate(pixels, compare_at, mode="bilinear")
    small = small.round().to(torch.uint8).movedim(1, -1).numpy()
    return small.reshape(*frames.shape[:-3], *small.shape[1:])


def augment(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One clip uint8 [T, H, W, 3] in other light and a little moved. Paper: appendix C.1.

    Factors of brightness, contrast and saturation in 0.9 .. 1.1, a hue shift within ±0.05 of the
    circle, and a shift of up to 2 pixels, where the border is repeated: the same for all frames.
    """
    brightness, contrast, saturation = rng.uniform(0.9, 1.1, 3)
    hue = int(rng.integers(-12, 13))  # of 256
    down, right = rng.integers(-2, 3, 2)
    T, H, W, _ = frames.shape
    rows, columns = (np.arange(H) - down).clip(0, H - 1), (np.arange(W) - right).clip(0, W - 1)
    varied = []
    for frame in frames[:, rows][:, :, columns]:
        picture = ImageEnhance.Brightness(Image.fromarray(frame)).enhance(brightness)
        picture = ImageEnhance.Contrast(picture).enhance(contrast)
        hsv = np.array(ImageEnhance.Color(picture).enhance(saturation).convert("HSV"))
        hsv[..., 0] += np.uint8(hue % 256)
        varied.append(np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")))
    return np.stack(varied)
