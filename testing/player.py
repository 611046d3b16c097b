"""A player without a browser, and a server to play with."""
import base64
import contextlib
import http.client
import io
import json
import threading

import numpy as np
from PIL import Image
from tqdm import TMonitor

from data import DATA_SETS, SAMPLES, open_episodes
from play.server import PlayServer
from sample import WorldModel
from testing.worlds import small_world


class Player:
    """A browser tab, without the browser: a stream of events, and requests beside it."""

    def __init__(self, server: PlayServer | None = None, address: tuple[str, int] | None = None):
        self.address = address or server.server_address[:2]
        self.connection = http.client.HTTPConnection(*self.address, timeout=20)
        self.connection.request("GET", "/api/stream")
        self.answer = self.connection.getresponse()
        self.hello = self.next("hello") if self.answer.status == 200 else None

    def event(self) -> tuple[str, dict]:
        while (line := self.answer.readline().decode().strip()).startswith(":") or not line:
            pass
        return line.removeprefix("event: "), json.loads(
            self.answer.readline().decode().removeprefix("data: "))

    def next(self, kind: str) -> dict:
        """The next event, which must be of this kind."""
        found, content = self.event()
        assert found == kind, (found, content)
        return content

    def until(self, kind: str) -> list[dict]:
        """The frames before the next event of this kind."""
        frames = []
        while (event := self.event())[0] != kind:
            frames.append(event[1])
        return frames

    def ask(self, method: str, path: str, body: bytes | dict | None = None,
            **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        if isinstance(body, dict):
            session = self.hello and self.hello["session"]
            body = json.dumps({"session": session} | body).encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {"Content-Type": "application/json"} | sent)
        answer = connection.getresponse()
        content = answer.status, answer.read()
        connection.close()
        return content

    def head_of(self, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage]:
        """Status and headers of an answer whose body is not read, since a stream's never ends."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", path, headers=sent)
        answer = connection.getresponse()
        connection.close()
        return answer.status, answer.headers

    def press(self, *keys: str) -> None:
        assert self.ask("POST", "/api/keys", {"keys": keys}) == (200, b"{}")

    def command(self, command: str, value: object = None) -> None:
        content = {"command": command, "value": value}
        assert self.ask("POST", "/api/command", content) == (200, b"{}")

    def leave(self) -> None:
        self.answer.close()
        self.connection.close()


@contextlib.contextmanager
def play_server(steps: int = 1):
    """A server with small worlds. When it is left, every thread that it started has ended."""
    world, before = small_world(steps=steps), set(threading.enumerate())
    server = PlayServer(("127.0.0.1", 0), lambda: WorldModel(world.model, steps=steps, overlap=2),
                        DATA_SETS["rt1"], open_episodes("rt1", SAMPLES, "val"), fastest=1000)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.end()
        thread.join()
        left = [thread for thread in set(threading.enumerate()) - before
                if not isinstance(thread, TMonitor)]  # tqdm's own, which runs no torch
        assert not left, left


def picture_of(event: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["png"]))))
