"""The page's server: the page and this file talk in four sentences.

    GET  /api/stream          opens a world of one's own; every frame comes as a server-sent event
                              as soon as it is imagined; the world lives as long as the connection
    POST /api/keys            {"session", "keys"}: which keys are down; "mouse": its motion since
                              the last time, where a data set has one
    POST /api/command         {"session", "command", "value"}: reset, pause, idle, guidance, branch
    GET  /api/gif?session=…   what was played, as an animation

One world model network serves all players, one frame at a time; what differs between worlds is
their frames, and those are small.

It is a server on a person's own machine. It listens to that machine only, unless told otherwise,
and a page from elsewhere cannot talk to it through the person's browser: `Host`, `Origin` and
`Sec-Fetch-Site` of a request must be its own. When it ends, it closes every connection and waits
for every thread.
"""
import base64
import contextlib
import json
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from data import DataSet, Episodes, describe_action
from play.session import BadRequest, Session
from sample import WorldModel

PAGE = Path(__file__).with_name("index.html")
MOST_SESSIONS, LARGEST_REQUEST, MOST_GUIDANCE = 4, 4096, 10.0
COMMANDS = ("reset", "pause", "idle", "guidance", "branch")


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
    keys, known = content.get("keys"), dataset.keys
    if not isinstance(keys, list) or len(keys) > len(known) or not all(
            isinstance(key, str) and key in known for key in keys):
        raise BadRequest(400, f"keys must be a list of some of {', '.join(known)}")
    return keys


def check_mouse(content: dict, dataset: DataSet) -> list[float]:
    """Counts sideways and down."""
    motion = content.get("mouse", [0, 0])
    two = isinstance(motion, list) and len(motion) == 2
    if not two or any(type(count) not in (int, float) or abs(count) > 10_000 for count in motion):
        raise BadRequest(400, "mouse must be two counts of at most 10000")
    return motion if dataset.mouse else [0, 0]


def check_command(content: dict) -> tuple[str, object]:
    command, value = content.get("command"), content.get("value")
    if not isinstance(command, str) or command not in COMMANDS:
        raise BadRequest(400, f"command must be one of {', '.join(COMMANDS)}")
    if command in ("pause", "idle") and type(value) is not bool:
        raise BadRequest(400, f"{command} needs a value that is true or false")
    if command == "guidance":
        if type(value) not in (int, float) or not 0 <= value <= MOST_GUIDANCE:  # NaN included
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
        """Refuse what a foreign page, or a foreign name of this machine, makes a browser send."""
        host, origin = self.headers.get("Host", "").lower(), self.headers.get("Origin")
        site = self.headers.get("Sec-Fetch-Site")  # which browsers send, and pages cannot change
        if not self.server.answers_to(host):
            raise BadRequest(403, "this server answers to its own name only: open it as "
                                  "127.0.0.1 or localhost, or name --host")
        foreign_site = site not in (None, "same-origin", "none")
        foreign_resource = foreign_site and self.path.startswith("/api/")
        if (origin or f"http://{host}").lower() != f"http://{host}" or foreign_resource:
            raise BadRequest(403, "this server answers to its own page only")

    def send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        policy = ("default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
                  "frame-ancestors 'none'")
        headers = {"Content-Type": kind, "Content-Length": str(len(body)),
                   "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                   "X-Frame-Options": "DENY", "Content-Security-Policy": policy} | headers
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
        session.press(check_keys(content, session.dataset), check_mouse(content, session.dataset))
        self.send(200, "application/json", b"{}")

    def take_command(self) -> None:
        session, content = self.read_request()
        session.order(*check_command(content))
        self.send(200, "application/json", b"{}")

    def send_gif(self) -> None:
        session = self.server.session(parse_qs(urlsplit(self.path).query).get("session", [None])[0])
        self.send(200, "image/gif", session.gif(),
                  Content_Disposition='attachment; filename="vid2world.gif"')

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
            sampling = session.world.sampling
            keys = {key: what.label for key, what in session.dataset.keys.items()}
            self.event("hello", session=name, keys=keys, steps=sampling.steps,
                       guidance=sampling.guidance, mouse=bool(session.dataset.mouse))
            self.event("reset", **self.picture(session))
            self.play(session)
        finally:
            self.server.close_session(name)

    def play(self, session: Session) -> None:
        took: deque[float] = deque(maxlen=8)  # seconds of the last frames
        while not session.ended:
            todo = session.wait(seconds=2)
            if todo is None:
                self.wfile.write(b": still here\n\n")  # fails when the tab is closed
            elif isinstance(todo, tuple):
                command, value = todo
                session.execute(command, value)
                if command in ("reset", "branch"):
                    self.event(command, **self.picture(session))
                else:
                    self.event("setting", **{command: value})
            else:
                start = time.monotonic()
                session.step(todo)
                took.append(time.monotonic() - start)
                self.event("frame", action=[round(float(a), 3) for a in todo],
                           words=describe_action(session.dataset, todo),
                           fps=round(len(took) / sum(took), 1), **self.picture(session))
                time.sleep(max(0, start + 1 / self.server.fastest - time.monotonic()))

    def picture(self, session: Session) -> dict:
        number, frame, kept = session.newest()
        file = BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        return {"frame": number, "kept": kept, "png": base64.b64encode(file.getvalue()).decode()}

    def event(self, kind: str, **content: object) -> None:
        self.wfile.write(f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()


class PlayServer(ThreadingHTTPServer):
    """Serves the page and the worlds.

    address     (host, port) to listen at; port 0 takes any that is free
    make_world  makes a world model, whose network all worlds share
    fastest     frames per second at most

    Raises OSError if the address cannot be had.
    """
    daemon_threads, request_queue_size = False, 32  # threads run torch, so `end` waits for them

    def __init__(self, address: tuple[str, int], make_world: Callable[[], WorldModel],
                 dataset: DataSet,
                 episodes: Episodes, fastest: float):
        self.make_world, self.dataset, self.episodes = make_world, dataset, episodes
        self.fastest = fastest
        self.sessions: dict[str, Session] = {}
        self.connections: set[socket.socket] = set()
        self.lock, self.network, self.ending = threading.Lock(), threading.Lock(), False
        super().__init__(address, Handler)
        bound, port = self.server_address[:2]
        self.anywhere = bound == "0.0.0.0"
        self.hosts = {f"{name}:{port}".lower() for name in (address[0], bound)}
        self.url = f"http://{'127.0.0.1' if self.anywhere else address[0]}:{port}/"

    def answers_to(self, host: str) -> bool:
        """Whether a request to this Host is meant for this server. This machine's own names are,
        at any port, for a tunnel may begin at another one; a foreign page sends its own name."""
        name = re.sub(r":\d+$", "", host)
        return self.anywhere or host in self.hosts or name in ("localhost", "127.0.0.1", "[::1]")

    def process_request(self, request: socket.socket, client_address) -> None:
        with self.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def open_session(self) -> tuple[str, Session]:
        with self.lock:
            if self.ending:
                raise BadRequest(503, "the server is about to end")
            if len(self.sessions) >= MOST_SESSIONS:
                raise BadRequest(503, f"{MOST_SESSIONS} worlds are being played in already; close "
                                      "one and load the page again")
            name = secrets.token_urlsafe(16)
            self.sessions[name] = Session(self.make_world(), self.dataset, self.episodes,
                                          self.network)
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
        """Close every connection, and wait for every thread and the frame under way."""
        with self.lock:
            self.ending = True
            sessions, connections = list(self.sessions.values()), list(self.connections)
        for session in sessions:
            session.end()
        for connection in connections:
            with contextlib.suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()  # joins the threads

    def handle_error(self, *_) -> None:
        """A tab that was closed in the middle of a frame is not an error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            traceback.print_exc()
