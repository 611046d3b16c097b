"""The page in a real browser, from the first key to the saved animation.

    python -m testing.try_in_browser --screenshot play.png

Needs `pip install selenium`, a Chromium and its chromedriver (Debian: chromium chromium-driver).
Starts `python -m play`, presses keys, reads the gripper's place off the page's picture before and
after (evaluation/controllability.py), branches from the film strip, saves the GIF. With --data csgo
it walks through the hall instead, with keys and mouse.
"""
import argparse
import base64
import subprocess
import sys
import tempfile
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data import SAMPLES, open_episodes
from evaluation.controllability import GripperReader, train_reader

REPOSITORY = Path(__file__).parent.parent


def open_browser(downloads: str):
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError:
        raise SystemExit(
            "skipped: pip install selenium, and have chromium and chromedriver") from None
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--window-size=1100,900", "--disable-gpu"):
        options.add_argument(option)
    options.add_experimental_option("prefs", {"download.default_directory": downloads})
    try:
        return webdriver.Chrome(options=options)
    except WebDriverException as error:
        raise SystemExit(f"skipped: no browser ({str(error).splitlines()[0]})") from None


class Page:
    def __init__(self, browser, reader: GripperReader | None):
        self.browser, self.reader = browser, reader

    def frame(self) -> int:
        return int(self.browser.execute_script(
            "return document.getElementById('screen').dataset.frame || 0"))

    def is_beyond(self, frame: int) -> bool:
        return self.frame() > frame

    def until(self, true, what: str, seconds: float = 20) -> float:
        start = time.time()
        while not true():
            if time.time() > start + seconds:
                raise SystemExit(f"FAILED: {what} (waited {seconds} s)")
            time.sleep(0.01)
        return time.time() - start

    def picture(self) -> np.ndarray:
        url = self.browser.execute_script(
            "return document.getElementById('screen').toDataURL('image/png')")
        return np.asarray(Image.open(BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))

    def gripper(self) -> np.ndarray:
        return self.reader.read(self.picture()[None])[0]

    def key(self, kind: str, key: str) -> None:
        """Through the browser's own input pipeline, as from a keyboard."""
        self.browser.execute_cdp_cmd("Input.dispatchKeyEvent",
                                     {"type": kind, "key": key, "text": key if len(key) == 1
                                      and kind == "keyDown" else ""})

    def hold(self, key: str, frames: int) -> None:
        until = self.frame() + frames
        self.key("keyDown", key)
        self.until(lambda: self.frame() >= until, f"holding {key} brings {frames} frames")
        self.key("keyUp", key)
        self.settle()

    def settle(self) -> None:
        """Until no more frames come."""
        last = -1
        while last != self.frame():
            last = self.frame()
            time.sleep(1.5)


def save_gif(page: Page, downloads: Path) -> Path:
    page.browser.find_element("id", "save").click()
    page.until(lambda: any(downloads.glob("*.gif")), "the GIF is saved")
    path = next(downloads.glob("*.gif"))
    print(f"saved a GIF of {Image.open(path).n_frames} frames")
    return path


def walk(page: Page, downloads: Path, screenshot: str | None, gif: str | None) -> None:
    """A game: the mouse turns, every key changes the picture."""
    browser, latencies = page.browser, []
    page.until(lambda: page.frame() == 1, "the first frame is shown")
    canvas = browser.find_element("id", "screen")
    canvas.click()
    page.until(lambda: browser.execute_script("return playing()"), "a click gives the mouse away")
    place, seen = dict(canvas.rect), set()
    x, y = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    page.key("keyDown", "w")

    def turn() -> bool:
        nonlocal x
        x += 8
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
        seen.add(browser.find_element("id", "action").text)
        time.sleep(0.05)
        if screenshot and page.frame() == 6:
            browser.save_screenshot(screenshot)
        return page.frame() >= 8

    page.until(turn, "w and the mouse bring 8 frames")
    page.key("keyUp", "w")
    page.settle()
    if not any("mouse +" in text and "w" in text for text in seen):
        raise SystemExit(f"FAILED: the mouse turns while w is held: {sorted(seen)}")
    page.key("keyDown", "Escape")
    browser.execute_script("document.exitPointerLock()")

    for key, frames in (("s", 4), ("d", 4), ("a", 4), ("ArrowRight", 30), ("w", 4),
                        ("ArrowLeft", 8), ("Enter", 2)):
        before, start = page.picture(), page.frame()
        page.key("keyDown", key)
        latencies.append(page.until(partial(page.is_beyond, start), f"{key} brings a frame"))
        page.hold(key, frames)
        change = np.abs(page.picture().astype(float) - before).mean()
        speed = browser.find_element("id", "fps").text
        print(f"{key}: the picture changed by {change:.1f} of 255, {speed} frames a second")
    print(f"from key to picture: {1000 * np.median(latencies):.0f} ms (median of {len(latencies)})")
    saved = save_gif(page, downloads)
    if gif:
        Path(gif).write_bytes(saved.read_bytes())
    print("all is well: keys, mouse, GIF")


def play(page: Page, downloads: Path, screenshot: str | None) -> None:
    browser = page.browser
    page.until(lambda: page.frame() == 1, "the first frame is shown")
    latencies = []
    # Up first: above the drawer there is room on all sides.
    for key, axis, sign, where in (("w", 1, -1, "up"), ("ArrowRight", 0, 1, "right"),
                                   ("ArrowLeft", 0, -1, "left"), ("s", 1, 1, "down")):
        before, start = page.gripper(), page.frame()
        page.key("keyDown", key)
        changed = partial(page.is_beyond, start)
        latencies.append(page.until(changed, "a key changes the picture"))
        page.hold(key, 5)
        moved = page.gripper() - before
        print(f"{key}: the gripper moved by {moved[0]:+.1f}, {moved[1]:+.1f} pixels")
        if sign * moved[axis] < 3:
            raise SystemExit(f"FAILED: {key} does not move the gripper {where}")
    print(f"from key to picture: {1000 * np.median(latencies):.0f} ms (median of {len(latencies)})")

    strip = browser.find_elements("css selector", "#strip button")
    chosen = strip[-4]
    number = int(chosen.get_attribute("data-frame"))
    chosen.click()
    page.until(lambda: page.frame() == number, "a click on the strip goes back")
    left = len(browser.find_elements("css selector", "#strip button"))
    if left != len(strip) - 3:
        raise SystemExit(f"FAILED: {left} frames on the strip after going back by 3 from "
                         f"{len(strip)}")
    page.hold("w", 3)
    pad = browser.find_element("css selector", '#pad [data-key="ArrowUp"]')
    start = page.frame()
    pad.click()
    page.until(partial(page.is_beyond, start), "a click on the pad moves the world")
    if screenshot:
        page.key("keyDown", "ArrowRight")
        time.sleep(1.5)
        browser.save_screenshot(screenshot)
        page.key("keyUp", "ArrowRight")
    print("frames per second on the page:", browser.find_element("id", "fps").text)
    save_gif(page, downloads)
    print("all is well: keys, strip, pad, GIF")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Try the page in a real browser.")
    parser.add_argument("--data", choices=["rt1", "csgo"], default="rt1", help="which world")
    parser.add_argument("--screenshot", help="where to write a picture of the page")
    parser.add_argument("--gif", help="where to write the walk through a game")
    parser.add_argument("--port", type=int, default=8124)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        browser = open_browser(downloads)
        game = args.data == "csgo"
        reader = None if game else train_reader(open_episodes("rt1", SAMPLES, "train"))
        words = [sys.executable, "-m", "play", "--data", args.data, "--port", str(args.port)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        try:
            for line in server.stdout:
                if "play at" in line:
                    break
            browser.get(f"http://127.0.0.1:{args.port}/")
            if game:
                walk(Page(browser, None), Path(downloads), args.screenshot, args.gif)
            else:
                play(Page(browser, reader), Path(downloads), args.screenshot)
        finally:
            browser.quit()
            server.terminate()
