"""Pictures for people: film strips, animations, curves, drawn with pillow alone; and PSNR."""
import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, FAINT = (40, 40, 40), (220, 220, 220)
COLOURS = [(31, 90, 180), (214, 90, 20), (40, 140, 60), (150, 60, 150), (120, 180, 240),
           (240, 180, 90), (140, 210, 140), (220, 150, 220),
           (120, 120, 120), (150, 90, 50)]


def psnr(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio, 10 log10(255² / MSE) dB; equal frames count as 1e-10 apart."""
    error = ((frames.astype(np.float64) - truth) ** 2).mean(axis=(-3, -2, -1))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))


def enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Repeat pixels until uint8 frames [T, H, W, 3] are at least `height` high."""
    factor = max(1, -(-height // frames.shape[1]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def save_strip(path: str | Path, rows: dict[str, np.ndarray], columns: int = 8,
               captions: Sequence[str] = ()) -> None:
    """One row of frames per entry, uint8 [T, H, W, 3], under each other, labelled.

    columns   frames side by side; longer videos continue below
    captions  what led to each frame, written below
    """
    rows = {label: enlarge(frames, 96) for label, frames in rows.items()}
    height, width = next(iter(rows.values())).shape[1:3]
    frames = max(len(frames) for frames in rows.values())
    blocks, small = range(0, frames, columns), ImageFont.load_default(13)
    captions = [textwrap.fill(text, max(1, (width - 4) // 7)) for text in captions]
    lines = max((text.count("\n") + 1 for text in captions if text), default=0)
    below = 16 * lines + 4 * bool(lines)
    block_height = len(rows) * (height + 28) + below
    size = min(columns, frames) * (width + 2) - 2, len(blocks) * block_height
    sheet = Image.new("RGB", size, "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(18), 0
    for first in blocks:
        for label, video in rows.items():
            place = f", frames {first} to {first + columns - 1}" if len(blocks) > 1 else ""
            draw.text((2, y + 2), label + place, fill=INK, font=font)
            for x, frame in enumerate(video[first : first + columns]):
                sheet.paste(Image.fromarray(frame), (x * (width + 2), y + 26))
            y += height + 28
        for x, text in enumerate(captions[first : first + columns]):
            draw.multiline_text((x * (width + 2) + 2, y), text, fill=INK, font=small, spacing=2)
        y += below
    sheet.save(path)


def save_gif(path: str | Path, columns: dict[str, np.ndarray], fps: float,
             captions: Sequence[str] = ()) -> None:
    """An animation of labelled videos side by side, uint8 [T, H, W, 3].

    captions  what led to each frame, written below
    """
    columns = {label: enlarge(frames, 256) for label, frames in columns.items()}
    height, width = next(iter(columns.values())).shape[1:3]
    below, font = 26 if captions else 0, ImageFont.load_default(16)
    images = []
    for t in range(max(len(frames) for frames in columns.values())):
        size = len(columns) * (width + 4) - 4, height + 24 + below
        image = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(image)
        for x, (label, frames) in enumerate(columns.items()):
            draw.text((x * (width + 4) + 2, 1), f"{label}, frame {t}", fill=INK, font=font)
            image.paste(Image.fromarray(frames[min(t, len(frames) - 1)]), (x * (width + 4), 24))
        if captions:
            draw.text((2, height + 27), f"action: {captions[t]}", fill=INK, font=font)
        images.append(image)
    write_gif(path, images, fps)


def write_gif(file: str | Path | BytesIO, images: Sequence[Image.Image], fps: float) -> None:
    """An animation that ends with a pause. It shows at most 50 pictures a second and leaves out the
    others: browsers show delays below 20 ms as 100 ms, and a GIF counts in hundredths of a second.
    """
    stride = -(-round(fps) // 50)
    first, *others = images[::stride]
    durations = [max(20, 10 * round(100 * stride / fps))] * len(others) + [1000]
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def save_curves(path: str | Path, curves: dict[str, Sequence[tuple[float, ...]]],
                x_label: str, least: float = 0) -> None:
    """A line per entry through points (x, y) or (x, y, lowest y, highest y); y from `least` on."""
    curves = {label: points for label, points in curves.items() if len(points)}
    width, height, left, top, right, bottom = 900, 400, 60, 20, 210, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    x_max = max([point[0] for points in curves.values() for point in points], default=1) or 1
    y_max = max([max(point[1:]) for points in curves.values() for point in points], default=1)
    y_range = 1.05 * (y_max - least) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / x_max, (y - least) / y_range
        return (left + across * (width - left - right),
                height - bottom - up * (height - top - bottom))

    for i in range(6):
        x, y = x_max * i / 5, least + y_range * i / 5
        draw.line([place(0, y), place(x_max, y)], fill=FAINT)
        draw.text((8, place(0, y)[1] - 6), f"{y:.3g}", fill=INK)
        draw.text((place(x, least)[0] - 8, height - bottom + 6), f"{x:.4g}", fill=INK)
    draw.text(((width + left - right) // 2, height - 16), x_label, fill=INK)
    for i, (label, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        if len(points) > 1:
            draw.line([place(*point[:2]) for point in points], fill=colour, width=2)
        else:
            x, y = place(*points[0][:2])
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        for x, _, *interval in points:
            if interval:
                draw.line([place(x, y) for y in interval], fill=colour)
        draw.text((width - right + 10, top + 14 * i), label, fill=colour)
    image.save(path)
