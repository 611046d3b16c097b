"""Record a walk through a hall of Doom's (ViZDoom) in CS:GO's 51 numbers.

    pip install vizdoom
    python -m bundled.record_arena --world arena --split train --episodes 1200 --out recorded/arena
    python -m bundled.record_arena --world arena --split val --out recorded/arena
    python -m bundled.record_arena --world others --split train --episodes 1200 --out recorded/halls

`arena` is one hall, small enough to be known by heart: each of its four walls has a colour, shaded
from end to end, and a picture of its own; two pillars stand in it; and a rail that cannot be seen
keeps the player off walls and pillars. `others` are 200 halls drawn at random in Freedoom's art,
for pretraining a passive video model: their actions are not written down. `textured` is one more of
these, with actions.

One frame spans four of the game's 35 tics a second. The mouse turns by at most five degrees a
frame, in CS:GO's bins. What an action does must not be a habit, so episodes differ in behaviour:

    wander   forward for the most part, turning smoothly
    strafe   sideways, turning slowly
    turn     on the spot, at one speed
    wall     straight on, until the wall stops it and beyond
    pause    a few steps, then nothing for a while but a shot now and then
    keys     any keys, each held for a while

The maps are written here, as text; the game builds the rest. The player's true place (x, y in map
units, and angle in degrees) is recorded beside each frame.
"""
import json
import tempfile
import zlib
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bundled import record_drawer
from bundled.record_drawer import held, record_files, smooth_noise, to_jpeg
from episodes.csgo import MOUSE_X, csgo_action
from episodes.tfrecord import encode_example
from support.errors import optional
from support.options import option, program

HEIGHT, WIDTH = 64, 80
TICS = 4  # of the game, per frame
DEGREES = 0.05  # that one count of the mouse turns
FASTEST = 100  # counts a frame
BEHAVIOURS = ("wander", "strafe", "turn", "wall", "pause", "keys")
# Art with little detail: what 64×80 pixels cannot show, a network cannot learn.
WALLS = ("FLOOR1_6", "FLAT14", "BIGMURAL", "GRAY1", "ASHWALL7", "BIGWALL", "GRAYBIG", "CRACKLE2",
         "FIRELAV3", "GRASS1", "ROCKRED2", "BROWN1", "FLAT1", "CRATE1", "CARLRT2", "CEIL5_1")
FLOORS = ("FLOOR0_1", "FLAT5_5", "FLOOR7_1", "RROCK10", "GRASS1", "FLAT19", "FLOOR4_6", "FLAT5")
CEILINGS = ("CEIL5_1", "CEIL3_5", "FLAT1", "CEIL5_3", "CEIL4_1", "FLAT5_5", "FLOOR7_1")
# The arena's own: name -> its width, the colours of its two ends and, on a wall, a shape and the
# shape's colour. No wall is of one colour all along: even a frame that it fills tells the place.
PAINTED = {
    "SUN": (512, (232, 60, 60), (96, 12, 12), "disc", (236, 200, 72)),
    "DOOR": (512, (84, 84, 255), (0, 0, 104), "door", (224, 224, 224)),
    "CROSS": (512, (96, 208, 88), (24, 52, 16), "cross", (28, 36, 28)),
    "PEAKS": (512, (255, 224, 188), (140, 104, 72), "peaks", (88, 56, 32)),
    "PURPLE": (56, (255, 0, 255), (110, 0, 108)),
    "ORANGE": (56, (255, 160, 60), (180, 70, 0)),
    "GROUND": (512, (132, 132, 132), (36, 36, 36)),
    "SKY": (64, (160, 160, 160), (160, 160, 160))}
ARENA = {"half": (256, 256), "walls": ["SUN", "DOOR", "CROSS", "PEAKS"],
         "pillars": [(130, 110, 28, "PURPLE"), (-130, -90, 28, "ORANGE")],
         "floor": "GROUND", "ceiling": "SKY", "height": 160, "light": 255, "rail": 48}
TEXTURED = ARENA | {"walls": ["FLOOR1_6", "FLAT14", "BIGMURAL", "GRAY1"],
                    "pillars": [(130, 110, 28, "GRASS1"), (-130, -90, 28, "CEIL5_1")],
                    "floor": "FLOOR0_1", "ceiling": "CEIL5_1", "rail": 0}


# --------------------------------------------------------------------------------------------------
# Maps


def draw_hall(seed: int) -> dict:
    """A hall at random: half its sides, the textures of its four walls, its pillars (x, y, half a
    side, texture), floor, ceiling, height, light, and the rails' distance from walls (0: none)."""
    random = np.random.default_rng(seed)
    half = tuple(int(side) for side in random.integers(192, 385, 2))
    pillars = []
    for x, y in random.uniform(-0.75, 0.75, (int(random.integers(1, 4)), 2)) * half:
        if max(abs(x), abs(y)) > 90:  # the player begins in the middle
            half_side, texture = int(random.integers(16, 41)), str(random.choice(WALLS))
            pillars.append((int(x), int(y), half_side, texture))
    return {"half": half, "walls": [str(wall) for wall in random.choice(WALLS, 4, replace=False)],
            "pillars": pillars, "floor": str(random.choice(FLOORS)),
            "ceiling": str(random.choice(CEILINGS)), "height": int(random.integers(112, 209)),
            "light": int(random.integers(192, 256)), "rail": 0}


def map_text(hall: dict) -> str:
    """A hall in UDMF, Doom's format for maps as text. A rail is a line that stops the player and
    cannot be seen: both its sides are the hall's one sector."""
    def block(kind: str, **values: object) -> str:
        return kind + " { " + " ".join(f"{name} = {json.dumps(value)};"
                                       for name, value in values.items()) + " }\n"

    (w, h), rail = hall["half"], hall["rail"]
    # Middle, half the sides, textures. The walls go round the other way: they face inwards.
    loops = [(0, 0, w, -h, hall["walls"][1:] + hall["walls"][:1])]
    loops += [(x, y, r, r, [texture] * 4) for x, y, r, texture in hall["pillars"]]
    if rail:
        loops.append((0, 0, w - rail, h - rail, ["-"] * 4))
        loops += [(x, y, r + rail, r + rail, ["-"] * 4) for x, y, r, _ in hall["pillars"]]
    text, first = 'namespace = "zdoom";\n', 0
    for x, y, a, b, textures in loops:
        corners = ((x - a, y - b), (x + a, y - b), (x + a, y + b), (x - a, y + b))
        for i, (corner, texture) in enumerate(zip(corners, textures, strict=True)):
            text += block("vertex", x=float(corner[0]), y=float(corner[1]))
            text += block("sidedef", sector=0, texturemiddle=texture)
            back = {"sideback": first + i, "twosided": True} if texture == "-" else {}
            text += block("linedef", v1=first + i, v2=first + (i + 1) % 4, sidefront=first + i,
                          blocking=True, **back)
        first += 4
    skills = {f"skill{level}": True for level in range(1, 6)}
    return text + block(
        "sector", heightfloor=0, heightceiling=hall["height"], texturefloor=hall["floor"],
        textureceiling=hall["ceiling"], lightlevel=hall["light"]) + block(
        "thing", x=0.0, y=0.0, angle=0, type=1, single=True, **skills)


def paint(width: int, left: tuple, right: tuple, shape: str = "", shape_colour: tuple = ()
          ) -> Image.Image:
    """A texture of the arena, a pixel per unit of the map, from one colour to another."""
    shades = np.linspace(left, right, width).astype(np.uint8)
    wall = Image.fromarray(np.tile(shades, (512, 1, 1)))
    draw = ImageDraw.Draw(wall)
    if shape == "disc":
        draw.ellipse((196, 20, 316, 140), shape_colour)
    elif shape == "door":
        draw.rectangle((206, 30, 306, 160), shape_colour)
    elif shape == "cross":
        draw.rectangle((236, 16, 276, 144), shape_colour)
        draw.rectangle((192, 60, 320, 100), shape_colour)
    elif shape == "peaks":
        for foot in (76, 216, 316):
            draw.polygon([(foot, 160), (foot + 60, 40), (foot + 120, 160)], shape_colour)
    return wall


def write_wad(path: Path, lumps: list[tuple[str, bytes]]) -> None:
    """A WAD, Doom's archive: header, lumps, and a directory of (offset, size, name in 8 bytes)."""
    data, directory = b"", b""
    for name, content in lumps:
        directory += np.array([12 + len(data), len(content)], "<i4").tobytes()
        directory += name.encode().ljust(8, b"\0")
        data += content
    counts = np.array([len(lumps), 12 + len(data)], "<i4")
    path.write_bytes(b"PWAD" + counts.tobytes() + data + directory)


def lumps_of(hall: dict) -> list[tuple[str, bytes]]:
    """A hall as Doom reads it: the map, and what is painted for it."""
    textures = []
    for name, how in PAINTED.items():
        paint(*how).save(file := BytesIO(), "PNG")
        textures.append((name, file.getvalue()))
    return [("MAP01", b""), ("TEXTMAP", map_text(hall).encode()), ("ENDMAP", b""),
            ("TX_START", b""), *textures, ("TX_END", b"")]


# --------------------------------------------------------------------------------------------------
# The game


doom = partial(optional, "vizdoom", "recording needs the game")


class Game:
    """One hall, seen by the player."""

    def __init__(self, hall: dict):
        vizdoom, folder = doom(), Path(tempfile.mkdtemp())
        wad = folder / "hall.wad"
        write_wad(wad, lumps_of(hall))
        self.game = game = vizdoom.DoomGame()
        game.set_doom_scenario_path(str(wad))
        game.set_doom_config_path(str(folder / "doom.ini"))
        game.set_doom_map("map01")
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_render_hud(False)
        game.set_render_crosshair(False)
        game.set_render_decals(False)
        game.set_window_visible(False)
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons([
            button.MOVE_FORWARD, button.MOVE_LEFT, button.MOVE_BACKWARD, button.MOVE_RIGHT,
            button.ATTACK, button.TURN_LEFT_RIGHT_DELTA])
        game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y,
                                           variable.ANGLE])
        game.set_episode_timeout(0)
        game.init()

    def begin(self, seed: int) -> None:
        self.game.set_seed(seed)
        self.game.new_episode()
        self.game.make_action([0, 0, 0, 0, 0, 0], 14)  # the pistol is raised

    def look(self) -> tuple[np.ndarray, np.ndarray]:
        """The frame uint8 [64, 80, 3], and x, y and angle of the player."""
        picture = Image.fromarray(self.game.get_state().screen_buffer[:, 10:-10])  # 5:4
        return np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)), self.pose()

    def pose(self) -> np.ndarray:
        return np.array(self.game.get_state().game_variables, np.float32)

    def act(self, pressed: set[str], x: int) -> None:
        """Keys "w a s d", "left click", and counts of the mouse."""
        keys = [float(key in pressed) for key in ("w", "a", "s", "d", "left click")]
        self.game.set_action([*keys, DEGREES * x / TICS])
        for tic in range(TICS):
            self.game.advance_action(1, tic == TICS - 1)


# --------------------------------------------------------------------------------------------------
# Behaviour


def plan(behaviour: str, random: np.random.Generator, frames: int) -> list[tuple[set[str], int]]:
    """Keys and mouse counts of every frame."""
    counts = 60 * smooth_noise(random, (frames,), memory=0.85)
    keys: list[set[str]] = [set()] * frames
    if behaviour == "wander":
        keys = held(random, frames, lambda: {"w"} if random.random() < 0.8 else set(), 3, 12)
    elif behaviour == "strafe":
        counts *= 0.4
        keys = held(random, frames, lambda: {str(random.choice(["a", "d"]))}, 4, 12)
    elif behaviour == "turn":
        counts = np.array(held(random, frames, lambda: random.choice(MOUSE_X[5:-5]), 12, 60), float)
        counts += np.sign(counts) * 40
    elif behaviour == "wall":
        counts *= 0.2
        keys = held(random, frames, lambda: {"w"} if random.random() < 0.9 else {"s"}, 10, 30)
    elif behaviour == "pause":
        moves = np.array(held(random, frames, lambda: random.random() < 0.4, 4, 12))
        counts, keys = counts * moves, [{"w"} if moving else set() for moving in moves]
    else:
        counts = np.array(held(random, frames, lambda: 50 * random.standard_normal(), 1, 8))
        keys = held(random, frames, lambda: {key for key in "wasd" if random.random() < 0.3}, 2, 10)
    shots = random.random(frames) < (0.1 if behaviour == "pause" else 0.03)
    counts = [nearest(count) for count in np.clip(counts, -FASTEST, FASTEST)]
    return [(set(down) | ({"left click"} if shot else set()), count)
            for down, shot, count in zip(keys, shots, counts, strict=True)]


def nearest(count: float) -> int:
    return min(MOUSE_X, key=lambda bin: abs(bin - count))


def record(game: Game, reach: tuple[float, float], behaviour: str, random: np.random.Generator,
           frames: int) -> dict:
    """One episode: frame t shows the hall before action t. It begins where a walk has led, at most
    `reach` (x and y, in map units) from the middle."""
    game.begin(int(random.integers(2**31)))
    for t, (down, count) in enumerate(plan("keys", random, 400)):
        game.act(down - {"left click"}, 3 * count)
        x, y, _ = np.abs(game.pose())
        if t > 60 and x < reach[0] and y < reach[1]:
            break  # anywhere but at a wall
    for _ in range(2):
        game.act(set(), 0)
    rows: dict[str, list] = {"frames": [], "actions": [], "pose": []}
    for down, count in plan(behaviour, random, frames):
        frame, pose = game.look()
        seen = frame, csgo_action(sorted(down), x=count), pose
        for name, value in zip(rows, seen, strict=True):
            rows[name].append(value)
        game.act(down, count)
    return rows


@dataclass
class Settings(record_drawer.Settings):
    world: str = option("arena", "what is recorded", choices=("arena", "textured", "others"))
    episodes: int = option(32, "in all")
    frames: int = option(40, "per episode")
    per_file: int = option(12, "episodes per file")
    out: str = option("recorded/arena", "folder for the files")


def record_episodes(args: Settings, numbers: range) -> list[bytes]:
    examples, others = [], args.world == "others"
    seed = zlib.crc32(f"{args.world} {args.split}".encode())
    hall = (draw_hall(1 + numbers[0] // args.per_file % 200) if others else
            {"arena": ARENA, "textured": TEXTURED}[args.world])
    game, reach = Game(hall), tuple(0.75 * (side - hall["rail"]) for side in hall["half"])
    for i in numbers:
        rows = record(game, reach, BEHAVIOURS[i % len(BEHAVIOURS)],
                      np.random.default_rng([seed, i]), args.frames)
        examples.append(encode_example({
            "steps/observation/image": [to_jpeg(frame, args.quality) for frame in rows["frames"]],
            "steps/action": np.array(rows["actions"]).ravel() * (not others),
            "steps/observation/pose": np.array(rows["pose"]).ravel()}))
    game.game.close()
    return examples


main = program(__name__, "record_arena", partial(
    record_files, "csgo_arena", record_episodes, doom), Settings,
    "Record episodes of a walk through a hall.")
