"""Drive an imagined world from a browser: python sample.py --play

The page and this server talk in three sentences:

    GET  /api/stream               opens a world of one's own; every frame comes as a server-sent event as soon as it is imagined.
                                   The world lives as long as this connection does.
    POST /api/keys                 {"session", "frame", "keys"}: which keys are down, and the newest frame that the player had seen
    POST /api/command              {"session", "command", "value"}: reset, pause, idle, guidance, branch
    GET  /api/gif?session=…        what was played, as an animation

One world model network serves all players, one frame at a time; what differs between worlds is their frames, and those are small. The
state of the last 16 frames is kept, so that a player may go back to one and branch off.

It is a server on a person's own machine. It listens to that machine only, unless told otherwise, and a page from elsewhere
cannot talk to it through the person's browser: the `Host` and `Origin` of a request must be its own.
"""
import base64
import json
import math
import secrets
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

from data import DataSet, Episodes
from dynamicrafter.model import return_freed_memory, to_frames
from sample import WorldModel

PAGE = Path(__file__).with_name("index.html")
MOST_SESSIONS, RING, LONGEST_GIF, LARGEST_REQUEST = 4, 16, 600, 4096
MOST_GUIDANCE = 10.0
COMMANDS = ("reset", "pause", "idle", "guidance", "branch")
STATE = ("pixels", "latents", "history", "actions", "action_mask", "anchor", "tokens")


class BadRequest(ValueError):
    """A request that cannot be answered: an HTTP status, and one sentence for the player."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------------
# A world and who plays in it


@dataclass
class Moment:
    """A frame of the play, and the world as it was then."""
    frame: np.ndarray  # uint8 [H, W, 3]
    state: dict
    number: int


class Session:
    """One player's world. Its stream makes the frames; requests, in other threads, say what is to happen next."""

    def __init__(self, world: WorldModel, dataset: DataSet, episodes: Episodes, lock: threading.Lock):
        self.world, self.dataset, self.episodes = world, dataset, episodes
        self.network = lock  # held while the network runs: it serves one world at a time
        self.changed = threading.Condition()  # guards what follows
        self.down: set[str] = set()  # keys that are pressed
        self.tapped: set[str] = set()  # keys that were pressed since the last frame, if only for a moment
        self.orders: deque[tuple[str, object]] = deque(maxlen=32)
        self.paused, self.idle_moves, self.grip = False, False, 1.0
        self.moments: OrderedDict[int, Moment] = OrderedDict()
        self.played: deque[tuple[int, np.ndarray]] = deque(maxlen=LONGEST_GIF)
        self.number, self.start = 0, -1

    # What requests do

    def press(self, keys: list[str]) -> None:
        with self.changed:
            self.tapped |= set(keys) - self.down
            self.down = set(keys)
            self.changed.notify()

    def order(self, command: str, value: object) -> None:
        with self.changed:
            if command == "branch" and value not in self.moments:
                raise BadRequest(404, f"frame {value} is no longer kept")
            self.orders.append((command, value))
            self.changed.notify()

    # What the stream does

    def wait(self, seconds: float) -> tuple[str, object] | np.ndarray | None:
        """An order, or the next action, or None if there is nothing to do for so long."""
        with self.changed:
            self.changed.wait_for(lambda: self.orders or (not self.paused and (self.idle_moves or self.down or self.tapped)), seconds)
            if self.orders:
                return self.orders.popleft()
            if self.paused or not (self.idle_moves or self.down or self.tapped):
                return None
            keys, fresh, self.tapped = self.down | self.tapped, self.tapped, set()
        action = np.zeros(self.dataset.action_dim, np.float32)
        for key in sorted(keys):
            what = self.dataset.keys[key]
            if what.toggles and key in fresh:
                self.grip = -self.grip
            action[what.index] += what.value * (self.grip if what.toggles else 1)
        return action

    def obey(self, command: str, value: object) -> None:
        if command == "reset":
            self.begin()
        elif command == "branch":
            self.go_back(value)
        elif command == "pause":
            self.paused = value
        elif command == "idle":
            self.idle_moves = value
        elif command == "guidance":
            self.world.guidance = value

    def begin(self) -> None:
        """The first frame of the next episode."""
        self.start = (self.start + 1) % len(self.episodes)
        with self.network:
            self.world.reset(self.episodes[self.start].read(0, 1)[0])
        self.moments.clear()
        self.played.clear()
        self.remember(to_frames(self.world.pixels)[0, 0])
        return_freed_memory()

    def step(self, action: np.ndarray) -> None:
        with self.network:
            frame = self.world.step(action)
        self.world.latents = self.world.latents[:, -self.world.num_frames :]  # a window needs no more, and play has no end
        self.remember(frame)

    def remember(self, frame: np.ndarray) -> None:
        state = {name: getattr(self.world, name) for name in STATE} | {"generator": self.world.generator.get_state()}
        with self.changed:
            self.number += 1
            self.moments[self.number] = Moment(frame, state, self.number)
            self.played.append((self.number, frame))
            while len(self.moments) > RING:
                self.moments.popitem(last=False)

    def go_back(self, number: int) -> None:
        """The world as it was at a frame that is still kept; later frames are forgotten."""
        with self.changed:
            if number not in self.moments:
                return
            moment = self.moments[number]
            for later in [n for n in self.moments if n > number]:
                del self.moments[later]
            while self.played and self.played[-1][0] > number:
                self.played.pop()
        for name in STATE:
            setattr(self.world, name, moment.state[name])
        self.world.generator.set_state(moment.state["generator"])
        self.world.forget()
        return_freed_memory()

    def gif(self) -> bytes:
        with self.changed:
            frames = [frame for _, frame in self.played]
        factor = max(1, 256 // frames[0].shape[0])
        images = [Image.fromarray(frame.repeat(factor, 0).repeat(factor, 1)) for frame in frames]
        file = BytesIO()
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / self.dataset.fps), loop=0)
        del images
        return_freed_memory()
        return file.getvalue()


# ---------------------------------------------------------------------------------------------------------
# Requests


def read_json(body: bytes) -> dict:
    """A JSON object without NaN and infinities. Raises BadRequest for anything else."""
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")
    try:
        content = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise BadRequest(400, "the request is not JSON") from None
    if not isinstance(content, dict):
        raise BadRequest(400, "the request is not a JSON object")
    return content


def check_keys(content: dict, dataset: DataSet) -> list[str]:
    keys, frame = content.get("keys"), content.get("frame")
    if type(frame) is not int or not 0 <= frame < 2**53:
        raise BadRequest(400, "frame must be the number of a frame")
    if not isinstance(keys, list) or len(keys) > len(dataset.keys) or not all(isinstance(key, str) and key in dataset.keys for key in keys):
        raise BadRequest(400, f"keys must be a list of some of {', '.join(dataset.keys)}")
    return keys


def check_command(content: dict) -> tuple[str, object]:
    command, value = content.get("command"), content.get("value")
    if not isinstance(command, str) or command not in COMMANDS:
        raise BadRequest(400, f"command must be one of {', '.join(COMMANDS)}")
    if command in ("pause", "idle") and type(value) is not bool:
        raise BadRequest(400, f"{command} needs a value that is true or false")
    if command == "guidance":
        if type(value) not in (int, float) or not abs(value) <= MOST_GUIDANCE or not math.isfinite(value) or value < 0:
            raise BadRequest(400, f"guidance needs a value between 0 and {MOST_GUIDANCE:g}")
        value = float(value)
    if command == "branch" and type(value) is not int:
        raise BadRequest(400, "branch needs the number of a frame")
    return command, value


class Handler(BaseHTTPRequestHandler):
    """One request. `self.server` is the PlayServer."""
    protocol_version, timeout = "HTTP/1.1", 20
    server_version, sys_version = "Vid2World", ""

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"/": self.send_page, "/api/stream": self.stream, "/api/gif": self.send_gif})

    def do_POST(self) -> None:
        self.answer({"/api/keys": self.take_keys, "/api/command": self.take_command})

    def answer(self, routes: dict) -> None:
        try:
            self.check_sender()
            path = urlsplit(self.path).path
            if path not in routes:
                raise BadRequest(404, "there is nothing here")
            routes[path]()
        except BadRequest as error:
            self.close_connection = True  # what is left of the request is not read
            self.send(error.status, "application/json", json.dumps({"error": str(error)}).encode())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def check_sender(self) -> None:
        """Refuse what a foreign page, or a name that points at this machine (DNS rebinding), makes the browser send."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.hosts and host not in self.server.hosts:
            raise BadRequest(403, "this server answers to its own name only")
        if origin not in (None, f"http://{host}"):
            raise BadRequest(403, "this server answers to its own page only")

    def send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff",
                            "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def read_request(self) -> tuple[Session, dict]:
        if self.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise BadRequest(415, "a request must be application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise BadRequest(411, "a request must say how long it is")
        if len(length) > 9 or int(length) > LARGEST_REQUEST:
            raise BadRequest(413, f"a request has at most {LARGEST_REQUEST} bytes")
        content = read_json(self.rfile.read(int(length)))
        return self.server.session(content.get("session")), content

    def send_page(self) -> None:
        self.send(200, "text/html; charset=utf-8", PAGE.read_bytes())

    def take_keys(self) -> None:
        session, content = self.read_request()
        session.press(check_keys(content, session.dataset))
        self.send(200, "application/json", b"{}")

    def take_command(self) -> None:
        session, content = self.read_request()
        session.order(*check_command(content))
        self.send(200, "application/json", b"{}")

    def send_gif(self) -> None:
        session = self.server.session(parse_qs(urlsplit(self.path).query).get("session", [None])[0])
        self.send(200, "image/gif", session.gif(), Content_Disposition='attachment; filename="vid2world.gif"')

    def stream(self) -> None:
        """A world from its first frame to the end of the connection."""
        self.close_connection = True
        name, session = self.server.open_session()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")
            self.end_headers()
            session.begin()
            world = session.world
            self.event("hello", session=name, keys={key: what.label for key, what in session.dataset.keys.items()},
                       actions=session.dataset.action_dim, steps=len(world.levels), guidance=world.guidance)
            self.event("reset", **self.picture(session))
            took: deque[float] = deque(maxlen=8)
            while not self.server.ending:
                todo = session.wait(seconds=2)
                if todo is None:
                    self.wfile.write(b": still here\n\n")  # fails when the tab is closed
                elif isinstance(todo, tuple):
                    session.obey(*todo)
                    if todo[0] in ("reset", "branch"):
                        self.event(todo[0], **self.picture(session))
                    else:
                        self.event("setting", **{todo[0]: todo[1]})
                else:
                    start = time.monotonic()
                    session.step(todo)
                    took.append(time.monotonic() - start)
                    self.event("frame", action=[round(float(a), 3) for a in todo], fps=round(len(took) / sum(took), 1),
                               **self.picture(session))
                    time.sleep(max(0, start + 1 / self.server.fastest - time.monotonic()))
        finally:
            self.server.close_session(name)

    def picture(self, session: Session) -> dict:
        with session.changed:
            moment = next(reversed(session.moments.values()))
            kept = list(session.moments)
        file = BytesIO()
        Image.fromarray(moment.frame).save(file, "PNG")
        return {"frame": moment.number, "kept": kept, "png": base64.b64encode(file.getvalue()).decode()}

    def event(self, kind: str, **content: object) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


class PlayServer(ThreadingHTTPServer):
    """Serves the page and the worlds.

    make_world  makes a world model, whose network all worlds share
    fastest     frames per second at most
    """
    daemon_threads, request_queue_size = True, 32

    def __init__(self, address: tuple[str, int], make_world, dataset: DataSet, episodes: Episodes, fastest: float):
        super().__init__(address, Handler)
        self.make_world, self.dataset, self.episodes, self.fastest = make_world, dataset, episodes, fastest
        self.sessions: dict[str, Session] = {}
        self.lock, self.network, self.ending = threading.Lock(), threading.Lock(), False
        host, port = self.server_address[:2]
        names = {"127.0.0.1": ("127.0.0.1", "localhost"), "0.0.0.0": ()}.get(host, (host,))
        self.hosts = {f"{name}:{port}" for name in names}  # empty: whatever name this machine has in its network

    def open_session(self) -> tuple[str, Session]:
        with self.lock:
            if len(self.sessions) >= MOST_SESSIONS:
                raise BadRequest(503, f"{MOST_SESSIONS} worlds are being played in already; close one and load the page again")
            name = secrets.token_urlsafe(16)
            self.sessions[name] = Session(self.make_world(), self.dataset, self.episodes, self.network)
            return name, self.sessions[name]

    def close_session(self, name: str) -> None:
        with self.lock:
            self.sessions.pop(name, None)

    def session(self, name: object) -> Session:
        session = self.sessions.get(name) if isinstance(name, str) else None
        if session is None:
            raise BadRequest(404, "there is no such world (any more); load the page again")
        return session

    def end(self) -> None:
        """No more frames: waits for the one under way, and never lets go of the network."""
        self.ending = True
        self.network.acquire()

    def handle_error(self, *_) -> None:
        """A tab that was closed in the middle of a frame is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            traceback.print_exc()


def play(make_world, dataset: DataSet, episodes: Episodes, host: str, port: int, fastest: float = 8.0) -> None:
    """Serve until Ctrl-C. Raises OSError if the port is taken."""
    # Half of the cores are left to the browser: threads that wait for each other all stand still when it takes the core of one.
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    with PlayServer((host, port), make_world, dataset, episodes, fastest) as server:
        if host not in ("127.0.0.1", "localhost"):
            print(f"warning: everyone who can reach {host} can play here, and there is no password")
        print(f"play at http://{'127.0.0.1' if host == '0.0.0.0' else host}:{server.server_address[1]}/   (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print()
        server.end()
