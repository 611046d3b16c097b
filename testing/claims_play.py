"""Claims about the page and its server."""
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from unittest import SkipTest

import numpy as np
from PIL import Image

import data
from data import DATA_SETS, SAMPLES, open_episodes
from play.server import PlayServer
from play.session import Session
from testing.commands import folder
from testing.player import Player, picture_of, play_server
from testing.worlds import small_world

HERE = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------------
# play/


def test_a_player_drives_a_world_of_their_own():
    with play_server() as server:
        player = Player(server)
        assert player.hello["keys"]["ArrowRight"] == "+x" and player.hello["steps"] == 1
        first = player.next("reset")
        assert picture_of(first).shape == (16, 16, 3) and first["kept"] == [1]
        player.press("ArrowRight", "w")  # both are held: frame follows frame
        events = [player.next("frame") for _ in range(20)]
        assert all(event["action"] == [0] * 10 + [1, 0, 1] for event in events)
        assert all(event["words"] == "+x  +z" for event in events)
        player.press()
        player.command("pause", True)
        newest = (events + player.until("setting"))[-1]
        assert newest["kept"] == list(range(newest["frame"] - 15, newest["frame"] + 1))
        # a tap while paused counts once play goes on, and the gripper changes its direction with
        # every press
        player.press(" ")
        player.press()
        player.command("pause", False)
        player.next("setting")
        assert player.next("frame")["action"][3] == -1
        player.press(" ")
        assert player.next("frame")["action"][3] == 1
        player.press()
        player.leave()


def test_a_player_goes_back_and_branches_off():
    with play_server() as server:
        player = Player(server)
        player.next("reset")
        def play(key: str) -> dict:
            player.press(key)
            player.press()
            return player.next("frame")
        for _ in range(3):
            last = play("w")
        player.command("branch", last["frame"] - 1)
        back = player.next("branch")
        assert back["kept"] == [1, 2, 3] and back["frame"] == 3
        again = play("w")  # the same key: the same world, with its noise
        assert np.array_equal(picture_of(again), picture_of(last)) and again["kept"] == [1, 2, 3, 5]
        player.command("branch", 3)
        player.next("branch")
        assert not np.array_equal(picture_of(play("s")), picture_of(last))
        code, gif = player.ask("GET", f"/api/gif?session={player.hello['session']}")
        assert code == 200 and Image.open(io.BytesIO(gif)).n_frames == 4
        player.command("guidance", 1.5)
        assert player.next("setting") == {"guidance": 1.5}
        player.command("idle", True)  # without a key, an action of zeros
        player.next("setting")
        assert player.next("frame")["action"] == [0] * 13
        player.command("idle", False)
        player.command("reset")
        player.until("reset")
        player.leave()


def test_play_keeps_no_more_than_a_window_and_an_animation_what_a_browser_shows():
    world, episodes = small_world(), open_episodes("rt1", SAMPLES, "val")
    session = Session(world, replace(DATA_SETS["rt1"], fps=100), episodes, threading.Lock())
    session.begin()
    for _ in range(6):
        session.step(np.zeros(13, np.float32))
    assert world.latents.shape[1] == world.model.num_frames == 4
    session.played.clear()
    for number in range(5):
        frame = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        session.played.append((number, frame))
    assert Image.open(BytesIO(session.gif())).n_frames == 3  # every second, 50 a second


def test_malformed_requests_are_refused_and_harm_nobody():
    with play_server() as server:
        player = Player(server)
        player.next("reset")
        keys, command = "/api/keys", "/api/command"
        refusals = [
            (400, "POST", keys, b"{"), (400, "POST", keys, b"[1]"),
            (400, "POST", keys, b"\xff\xfe"), (400, "POST", keys, b'{"frame": NaN}'),
            (400, "POST", keys, b"[" * 4000), (404, "POST", keys, b"{}"),
            (404, "POST", keys, b'{"session": 7}'),
            (400, "POST", keys, {"keys": "w"}), (400, "POST", keys, {"keys": ["q"]}),
            (400, "POST", keys, {"keys": [["w"]]}), (400, "POST", keys, {"keys": ["w"] * 99}),
            (400, "POST", keys, {"keys": None}), (400, "POST", keys, {}),
            (400, "POST", keys, {"keys": [], "mouse": 3}),
            (400, "POST", keys, {"keys": [], "mouse": [1, "2"]}),
            (400, "POST", keys, {"keys": [], "mouse": [10**400, 0]}),
            (400, "POST", command, {"command": "format"}),
            (400, "POST", command, {"command": ["reset"]}),
            (400, "POST", command, {"command": "pause", "value": 1}),
            (400, "POST", command, {"command": "guidance", "value": "2"}),
            (400, "POST", command, {"command": "guidance", "value": 10**400}),
            (400, "POST", command, {"command": "guidance", "value": -1}),
            (400, "POST", command, {"command": "guidance", "value": True}),
            (400, "POST", command, {"command": "branch", "value": 1.0}),
            (404, "POST", command, {"command": "branch", "value": 10**30}),
            (413, "POST", keys, b" " * 5000),
            (404, "GET", "/../data.py", None), (404, "GET", "/api/keys", None),
            (404, "POST", "/", {}), (404, "GET", "/api/gif?session=x", None),
            (404, "GET", "/api/gif", None), (501, "PUT", keys, {})]
        for code, method, path, body in refusals:
            answer = player.ask(method, path, body)
            told = (code, method, path, body, answer)
            assert answer[0] == code and b"Traceback" not in answer[1], told
        assert player.ask("POST", keys, {"keys": []}, Content_Type="text/plain")[0] == 415
        assert player.ask("POST", keys, {"keys": []}, Origin="http://evil.example")[0] == 403
        assert player.ask("GET", "/", None, Host="evil.example")[0] == 403
        host = "{}:{}".format(*player.address)
        assert player.ask("POST", keys, {"keys": []}, Origin=f"http://{host}")[0] == 200
        code, page = player.ask("GET", "/")
        assert code == 200 and b"<canvas" in page and not re.search(rb"(src|href)=.https?:", page)
        for garbage in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                        b"POST /api/keys HTTP/1.1\r\nHost: " + host.encode() +
                        b"\r\nContent-Type: application/json\r\nContent-Length: -5\r\n\r\n"):
            with socket.create_connection(player.address, timeout=20) as raw:
                raw.sendall(garbage)
                assert re.search(rb"Error code: 400| 403 | 411 ", raw.recv(2000))
        player.press("w")
        assert player.next("frame")["action"][12] == 1  # and the world goes on
        player.press()
        player.leave()


def test_other_sites_can_neither_embed_nor_frame_the_page():
    with play_server() as server:
        player = Player(server)
        player.next("reset")
        # as <img src=".../api/stream"> on another site would send it
        for site in ("cross-site", "same-site"):
            assert player.head_of("/api/stream", Sec_Fetch_Site=site)[0] == 403
        assert player.ask("POST", "/api/keys", {"keys": []}, Sec_Fetch_Site="same-origin")[0] == 200
        assert len(server.sessions) == 1
        # a link to the page is no harm
        status, headers = player.head_of("/", Sec_Fetch_Site="cross-site")
        assert status == 200 and headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        player.leave()


def test_a_server_answers_to_the_name_that_it_was_given():
    world, episodes = small_world(), open_episodes("rt1", SAMPLES, "val")
    own = ["localhost", "127.0.0.1", "[::1]", "localhost:9931", "127.0.0.1:{port}"]
    for host, names, others in (("localhost", own, ["evil.example:{port}", "localhost.evil", ""]),
                                ("127.0.0.1", own, ["evil.example", "127.0.0.1.evil:{port}"]),
                                ("0.0.0.0", [*own, "robot.lan:{port}"], [])):
        server = PlayServer((host, 0), lambda: world, data.DATA_SETS["rt1"], episodes, fastest=1)
        port = server.server_address[1]
        server.server_close()
        assert all(server.answers_to(name.format(port=port)) for name in names)
        assert not any(server.answers_to(name.format(port=port)) for name in others)
        assert server.url == f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"


def test_a_server_that_ends_waits_for_every_thread():
    with play_server() as server:  # which asserts it
        players = [Player(server) for _ in range(3)]
        for player in players:
            player.next("reset")
        players[0].press("w")  # frames are being made when the server ends
        # a connection without a request
        idle = socket.create_connection(server.server_address[:2], timeout=20)
        players[0].next("frame")
        end = time.time()
    assert time.time() - end < 10  # and it does not wait until a silent connection times out
    idle.close()


def test_ctrl_c_with_a_key_held_ends_play_cleanly():
    command = [sys.executable, "-m", "play", "--port", "0", "--steps", "1"]
    # A parent that runs in the background may ignore Ctrl-C, and its children inherit that.
    server = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        address = next(line for line in server.stdout if line.startswith("play at"))
        player = Player(address=("127.0.0.1", int(re.search(r":(\d+)/", address)[1])))
        player.next("reset")
        player.press("w")
        player.next("frame")
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0, server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_four_may_play_at_once_and_a_closed_tab_makes_room():
    with play_server() as server:
        players = [Player(server) for _ in range(4)]
        fifth = Player(server)
        assert fifth.answer.status == 503 and "4 worlds" in json.loads(fifth.answer.read())["error"]
        for player, key in zip(players, ("w", "s", "ArrowUp", "ArrowLeft"), strict=True):
            player.next("reset")
            player.press(key)
        worlds = [[player.next("frame") for _ in range(3)] for player in players]
        assert len({tuple(events[0]["action"]) for events in worlds}) == 4
        players[0].leave()  # in mid-frame
        until = time.time() + 20
        while len(server.sessions) > 3 and time.time() < until:
            time.sleep(0.05)
        assert len(server.sessions) == 3 and Player(server).hello
        for player in players[1:]:
            player.leave()


def test_the_notebooks_cells_run_as_a_script():
    path, here = HERE / "play" / "notebook.ipynb", os.getcwd()
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(line for line in cell["source"] if not line.startswith("!"))
            for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 4 and not any(cell.get("outputs") for cell in cells)
    shown, out = {}, folder()
    os.chdir(HERE / "play")  # where it is opened
    try:
        for cell in code:
            # pictures into a folder of this test, and few frames
            cell = re.sub(r'"(\w+\.png)"', rf'r"{out}/\1"', cell).replace("(0, 16)", "(0, 4)")
            exec(cell.replace("range(8)", "range(2)").replace("[:8]", "[:2]"), shown)
    finally:
        os.chdir(here)
    assert {path.name for path in out.iterdir()} == {"strip.png", "sweeps.png", "guidance.png"}
    futures = shown["futures"].astype(int)
    assert futures.shape[:2] == (6, 2) and abs(futures[0] - futures[1]).max() > 60


def test_a_key_is_known_by_its_letter_and_else_by_its_place():
    if not shutil.which("node"):
        raise SkipTest("needs node")
    page = (HERE / "play" / "index.html").read_text(encoding="utf-8")
    named = re.search(r"const named = e => \{.*?\n\};", page, re.S)[0]
    script = ("const own = ['w', 's', 'a', 'd'], actions = {r: 1}, buttonOf = k => own.includes(k);"
              + named + "console.log(JSON.stringify(JSON.parse(process.argv[1]).map("
              "([key, code]) => named({key, code}))))")
    keys = [("w", "KeyW"), ("W", "KeyW"), ("ц", "KeyW"), ("ς", "KeyW"), ("z", "KeyW"),
            ("Process", "KeyW"), ("ы", "KeyS"), ("a", "KeyQ"), ("r", "KeyR"), (" ", "Space"),
            ("ArrowUp", "ArrowUp")]
    done = subprocess.run(["node", "-e", script, json.dumps(keys)], capture_output=True, text=True,
                          encoding="utf-8")
    assert json.loads(done.stdout) == ["w", "w", "w", "w", "w", "w", "s", "a", "r", " ", "ArrowUp"]
