"""Play for ten minutes like a child at a keyboard, and see whether the server minds.

    python -m testing.try_randomly

Starts `python -m play`, opens a world, presses keys at random, pauses, resets, branches, changes
guidance, sends nonsense, saves animations, closes the tab in mid-frame and opens another. Once a
minute it prints how many frames came, how fast they were made (the page's own figure, which leaves
out the waiting for keys), and the server's memory.
"""
import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import mean

REPOSITORY = Path(__file__).parent.parent


def memory(process: int) -> float:
    """Resident memory in MB (Linux)."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


class Tab:
    """Listens to the stream in a thread of its own, and keeps the rates that come with frames."""

    def __init__(self, port: int):
        self.port, self.rates, self.kept, self.session = port, [], [], None
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.request("GET", "/api/stream")
        self.answer = self.connection.getresponse()
        threading.Thread(target=self.listen, daemon=True).start()
        while self.session is None:
            time.sleep(0.01)

    def listen(self) -> None:
        try:
            for line in self.answer:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    self.session = event.get("session", self.session)
                    self.kept = event.get("kept", self.kept)
                    if "fps" in event:
                        self.rates.append(event["fps"])
        except (OSError, ValueError, AttributeError):
            pass  # the tab was closed

    def ask(self, method: str, path: str, content: object = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, json.dumps(content) if content else None,
                           {"Content-Type": "application/json"})
        status = connection.getresponse().status
        connection.close()
        return status


def play(port: int, process: int, minutes: float) -> int:
    keys = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "w", "s", " "]
    tab, rates = Tab(port), []
    begin = mark = time.time()
    errors = 0
    while time.time() < begin + 60 * minutes:
        what, session = random.random(), tab.session
        if what < 0.7:
            pressed = random.sample(keys, random.randint(0, 2))
            status = tab.ask("POST", "/api/keys", {"session": session, "keys": pressed})
        elif what < 0.96:
            command, value = random.choice([("guidance", random.uniform(0, 4)),
                                            ("idle", random.random() < 0.7), ("pause", False),
                                            ("reset", None),
                                            ("branch", random.choice(tab.kept or [1]))])
            status = tab.ask("POST", "/api/command",
                             {"session": session, "command": command, "value": value})
            # the frame may have left the ring meanwhile
            status = 200 if command == "branch" else status
        elif what < 0.98:
            status = 200 if tab.ask("POST", "/api/command",
                                    {"session": session,
                                     "command": random.choice([None, 7, "x" * 900])}) == 400 else 0
        elif what < 0.99:
            status = tab.ask("GET", f"/api/gif?session={session}")
        else:
            rates += tab.rates
            tab.answer.close()
            tab.connection.close()
            tab, status = Tab(port), 200
        errors += status != 200
        time.sleep(random.uniform(0, 0.3))
        if time.time() > mark + 60:
            rates, tab.rates = rates + tab.rates, []
            print(f"minute {(time.time() - begin) / 60:.0f}: {len(rates)} frames at "
                  f"{mean(rates or [0]):.1f} frames/s, {memory(process):.0f} MB, {errors} "
                  "unexpected answers", flush=True)
            rates, mark = [], time.time()
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Play at random, and watch frame rate and memory.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "play", "--port", str(args.port)],
                              stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        for line in server.stdout:
            if "play at" in line:
                break
        sys.exit(play(args.port, server.pid, args.minutes) > 0)
    finally:
        server.terminate()
