"""One player's world: its frames, the orders it is given, and the way back to an earlier frame."""
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from PIL import Image

from data import DataSet, Episodes
from model.memory import trim_malloc_heap
from model.vid2world import to_frames
from play.keys import Keyboard
from sample import Window, WorldModel
from support.errors import UserError
from support.pictures import enlarge, write_gif

RING, LONGEST_GIF = 16, 600  # frames that one can go back to, and that an animation has at most


class BadRequest(UserError):
    """A request that cannot be answered: an HTTP status, and one sentence for the player."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Moment:
    """A frame of the play, and the world as it was then."""
    frame: np.ndarray  # uint8 [H, W, 3]
    window: Window
    rest: np.ndarray  # the action [A] that no key would have made then


class Session:
    """One player's world: its stream makes frames, requests say what is to happen next."""

    def __init__(self, world: WorldModel, dataset: DataSet, episodes: Episodes,
                 network: threading.Lock):
        self.world, self.dataset, self.episodes = world, dataset, episodes
        self.network = network  # held while the network runs: it serves one world at a time
        self.changed = threading.Condition()  # guards what follows
        self.keyboard = Keyboard(dataset)
        self.orders: deque[tuple[str, object]] = deque(maxlen=32)
        self.paused, self.idle_moves, self.ended = False, False, False
        self.moments: OrderedDict[int, Moment] = OrderedDict()  # number of a frame -> what it was
        self.played: deque[tuple[int, np.ndarray]] = deque(maxlen=LONGEST_GIF)
        self.number, self.start = 0, -1

    # What requests do

    def press(self, keys: list[str], motion: list[float]) -> None:
        with self.changed:
            self.keyboard.press(keys)
            self.keyboard.move(motion)
            self.changed.notify()

    def order(self, command: str, value: object) -> None:
        with self.changed:
            if command == "branch" and value not in self.moments:
                raise BadRequest(404, f"frame {value} is no longer kept")
            self.orders.append((command, value))
            self.changed.notify()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify()

    def gif(self) -> bytes:
        with self.changed:
            frames = [frame for _, frame in self.played]
        if not frames:
            raise BadRequest(404, "nothing has been played yet")
        images = [Image.fromarray(enlarge(frame[None], 256)[0]) for frame in frames]
        write_gif(file := BytesIO(), images, self.dataset.fps)
        del images
        trim_malloc_heap()
        return file.getvalue()

    # What the stream does

    def wait(self, seconds: float) -> tuple[str, object] | np.ndarray | None:
        """An order, or the next action, or None if there is nothing to do for so long."""
        def moving() -> bool:
            return not self.paused and (self.idle_moves or bool(self.keyboard))

        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.orders or moving(), seconds)
            if self.orders:
                return self.orders.popleft()
            return self.keyboard.take_action() if moving() else None

    def execute(self, command: str, value: object) -> None:
        if command == "reset":
            self.begin()
        elif command == "branch":
            self.go_back(value)
        elif command == "pause":
            self.paused = value
        elif command == "idle":
            self.idle_moves = value
        elif command == "guidance":
            self.world.sampling = replace(self.world.sampling, guidance=value)

    def begin(self) -> None:
        """The first frames of the next episode."""
        self.start = (self.start + 1) % len(self.episodes)
        frames, actions = self.episodes[self.start].read(0, self.dataset.context_frames)
        with self.network:
            self.world.reset(frames, actions[:-1])
        with self.changed:
            self.keyboard.begin(actions[-1])
        self.remember(to_frames(self.world.window.pixels)[0, -1], anew=True)
        trim_malloc_heap()

    def step(self, action: np.ndarray) -> None:
        with self.network:
            frame = self.world.step(action)
        # Play has no end, and a window needs no more.
        latents = self.world.latents[:, -self.world.model.num_frames :]
        self.world.window = replace(self.world.window, latents=latents)
        self.remember(frame)

    def remember(self, frame: np.ndarray, anew: bool = False) -> None:
        with self.changed:
            if anew:
                self.moments.clear()
                self.played.clear()
            self.number += 1
            self.moments[self.number] = Moment(frame, self.world.window, self.keyboard.rest)
            self.played.append((self.number, frame))
            while len(self.moments) > RING:
                self.moments.popitem(last=False)

    def go_back(self, number: int) -> None:
        """The world as it was at a frame that is still kept; later frames are forgotten."""
        with self.changed:
            if number not in self.moments:
                return
            for later in [n for n in self.moments if n > number]:
                del self.moments[later]
            while self.played and self.played[-1][0] > number:
                self.played.pop()
            self.world.restore(self.moments[number].window)
            self.keyboard.rest = self.moments[number].rest
        trim_malloc_heap()

    def newest(self) -> tuple[int, np.ndarray, list[int]]:
        """Number and picture of the newest frame, and the numbers of all that are kept."""
        with self.changed:
            number = next(reversed(self.moments))
            return number, self.moments[number].frame, list(self.moments)
