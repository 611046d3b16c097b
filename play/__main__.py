"""Drive an imagined world from a browser: python -m play"""
from dataclasses import dataclass

import torch

from data import DATA_SETS, bundled_world
from play.keys import with_keys
from play.server import PlayServer
from sample import WorldModel, load_world, open_data
from support.errors import RequestError
from support.options import option, program

FASTEST = 8.0  # frames per second: faster than this, nobody could steer


@dataclass
class Settings:
    """What is left out comes from the checkpoint; without one, the bundled world is played."""
    checkpoint: str | None = option(None, "run folder of train.py, or a released checkpoint")
    data: str | None = option(None, "data set", choices=DATA_SETS)
    root: str | None = option(None, "its folder")
    guidance: float | None = option(
        None, "1 follows the action as trained, more amplifies it", type=float)
    steps: int | None = option(None, "denoising steps per frame", type=int)
    host: str = option("127.0.0.1", "address to listen at")
    port: int = option(8000, "port to listen at", least=0)


def check(settings: Settings) -> None:
    if not settings.host:
        raise RequestError("host is empty; name an address of this machine, such as 127.0.0.1 or "
                           "0.0.0.0")
    if not 0 <= settings.port < 65536:
        raise RequestError(f"port is {settings.port}; it must be between 0 and 65535")


def play(settings: Settings) -> None:
    """Serve until Ctrl-C. Raises OSError if the port is taken."""
    model = load_world(settings.checkpoint or bundled_world(settings.data)).model
    options = {"guidance": settings.guidance, "steps": settings.steps}
    WorldModel(model, **options)  # refuses here what would otherwise end every player's stream
    name, episodes = open_data(settings, model)
    # half of the cores for the browser: if it takes the core of one thread, all others wait
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    server = PlayServer((settings.host, settings.port), lambda: WorldModel(model, **options),
                        with_keys(episodes.dataset, model), episodes, FASTEST)
    try:
        if settings.host not in ("127.0.0.1", "localhost"):
            print(f"warning: everyone who can reach {settings.host} can play here, and there is no "
                  "password")
        print(f"play at {server.url}   (Ctrl-C ends it)", flush=True)
        server.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        print()
    finally:
        server.end()


main = program(__name__, "play", play, Settings, "Drive an imagined world from the keyboard, in a "
               "browser. What is left out comes from the checkpoint; without one, the "
               "bundled world is played.", check)
