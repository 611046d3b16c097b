"""Record a simulated Sawyer arm at a drawer (Meta-World, rendered by MuJoCo) in RT-1's format.

    pip install metaworld mujoco packaging     (and Debian's libosmesa6, to render off-screen)
    python -m bundled.record_drawer --world drawer --split train --out recorded/drawer
    python -m bundled.record_drawer --world drawer --split val --episodes 32 --out recorded/drawer
    python -m bundled.record_drawer --world contact --split train --frames 40 --out recorded/contact
    python -m bundled.record_drawer --world others --split train --out recorded/others

`drawer` is for the world model; in `contact` every other episode is of an expert astray. `others`
is for pretraining a passive video model: all other tasks, without actions (zeros stand for them),
half of the episodes each with another camera, in other light, in other colours.

One frame spans six steps of the simulator. A world model learns what actions do only if they are
not habits: a scripted expert always reaches for the drawer, and a network that knows this need not
look at the action. So a quarter of the episodes each come from

    expert   the scripted policy with strong smooth noise
    random   smooth noise alone
    pause    motion and stillness in turn
    sweep    one direction at a time, at full speed
    astray   (`contact` alone) the scripted policy, told of a drawer that is somewhere else

and in all but the experts' the gripper opens and closes at random.

And it learns only what it can see. Meta-World's actions move a point that pulls the hand, and where
the hand cannot follow, that point runs away from it: many an action then seems to do nothing, for a
reason that no frame shows. So here the point stays within three centimetres of the hand.

A file's episodes depend on the seed, the split and its number; files that exist are left alone.
"""
import multiprocessing
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from episodes.tfrecord import encode_example, write_records
from support.errors import optional
from support.options import option, program

FRAMES, STEPS_PER_FRAME = 24, 6  # of an episode, if nothing is said; of the simulator, held
HEIGHT, WIDTH = 64, 80  # of a recorded frame; rendered at twice that
CAMERA, CAMERA_POSITION = "corner2", (0.75, 0.075, 0.7)
CAMERA_REACH = (0.15, 0.12, 0.1)  # metres, per axis, by which another view is moved at the most
EVERYWHERE = ("basic_floor", "table_wood", "table_col", "wall_metal", "xyz_col")  # materials
# where the hand starts and turns back, in metres
LOW, HIGH = np.array([-0.4, 0.45, 0.06]), np.array([0.4, 0.9, 0.42])
LEAD = 0.03  # metres, per axis, that the point which pulls the hand may be ahead of it
WORLDS = {
    "drawer": ("drawer-close-v3", "drawer-open-v3"),
    "contact": ("drawer-close-v3",),
    "others": (),  # every task of Meta-World but those at the drawer
}
BEHAVIOURS = ("expert", "random", "pause", "sweep")
CONTACT = ("expert", "astray", "random", "astray", "pause", "astray", "sweep", "astray")
ASTRAY = np.array([0.1, 0.06, 0.12])  # metres, per axis, that the expert is wrong by at the most
DRAWER = slice(4, 7)  # the drawer's place in an observation


def meta_world() -> tuple:
    """MuJoCo, and Meta-World's environments and expert policies by task. Raises RequestError where
    they are not installed."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    mujoco, metaworld, policies = (
        optional(module, "recording needs the simulator", "metaworld mujoco packaging")
        for module in ("mujoco", "metaworld", "metaworld.policies"))
    return mujoco, metaworld.ALL_V3_ENVIRONMENTS, policies.ENV_POLICY_MAP


class Simulator:
    """One task of Meta-World, seen by our camera."""

    def __init__(self, task: str):
        mujoco, environments, policies = meta_world()
        self.mujoco = mujoco
        self.env = environments[task](render_mode="rgb_array", camera_name=CAMERA,
                                      width=2 * WIDTH, height=2 * HEIGHT)
        # a new layout at every reset
        self.env._freeze_rand_vec, self.env._set_task_called = False, True
        self.env.max_path_length = 10**9
        self.policy = policies[task]()
        self.camera = mujoco.mj_name2id(self.env.model, mujoco.mjtObj.mjOBJ_CAMERA, CAMERA)
        self.env.model.cam_pos[self.camera] = CAMERA_POSITION
        model = self.env.model
        self.painted = {name: getattr(model, name).copy()
                        for name in ("mat_rgba", "light_diffuse", "cam_pos")}
        # four times faster
        self.flags_off = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)

    def reset(self, rng: np.random.Generator) -> None:
        """A new layout, with the drawer (if there is one) and the hand anywhere."""
        self.env.seed(int(rng.integers(2**31)))
        np.random.seed(int(rng.integers(2**31)))  # Meta-World's scripted layouts draw from it
        self.observation, _ = self.env.reset()
        if "drawer" in type(self.env).__name__.lower():
            self.env.data.joint("goal_slidey").qpos[0] = rng.uniform(-0.16, 0)
        target = rng.uniform(LOW, HIGH)
        gripper = rng.choice([-1.0, 1.0])
        for _ in range(80):
            self.advance(np.append(np.clip(10 * (target - self.hand), -1, 1), gripper))
        self.env.data.mocap_pos[0] = self.hand
        for _ in range(20):  # come to rest
            self.advance(np.array([0, 0, 0, gripper]))

    def vary(self, rng: np.random.Generator) -> None:
        """Another view, other light, other colours, each in half of the episodes. What a base has
        met in one colour alone, its decoder paints in that colour."""
        model = self.env.model
        for name, values in self.painted.items():
            getattr(model, name)[:] = values
        if rng.random() < 0.5:
            model.cam_pos[self.camera] += rng.uniform(-1, 1, 3) * CAMERA_REACH
        if rng.random() < 0.5:
            model.light_diffuse *= rng.uniform(0.5, 1.5)
        if rng.random() < 0.5:
            for i in range(model.nmat):
                everywhere = model.mat(i).name in EVERYWHERE
                if not everywhere or rng.random() < 0.25:
                    model.mat_rgba[i, :3] = rng.uniform(0.5 * everywhere, 1, 3)

    def advance(self, action: np.ndarray) -> None:
        self.observation, *_ = self.env.step(action.astype(np.float32))
        lead = self.env.data.mocap_pos[0] - self.hand
        self.env.data.mocap_pos[0] = self.hand + np.clip(lead, -LEAD, LEAD)

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """All that `restore` needs to go on from here again."""
        mujoco, kind = self.mujoco, self.mujoco.mjtState.mjSTATE_INTEGRATION
        saved = np.empty(mujoco.mj_stateSize(self.env.model, kind))
        mujoco.mj_getState(self.env.model, self.env.data, saved, kind)
        return saved, self.observation

    def restore(self, state: tuple[np.ndarray, np.ndarray]) -> None:
        saved, self.observation = state
        self.mujoco.mj_setState(self.env.model, self.env.data, saved,
                                self.mujoco.mjtState.mjSTATE_INTEGRATION)
        self.mujoco.mj_forward(self.env.model, self.env.data)

    @property
    def hand(self) -> np.ndarray:
        return self.observation[:3]

    def render(self) -> np.ndarray:
        """uint8 [64, 80, 3]. This camera hangs upside down."""
        viewer = self.env.mujoco_renderer._get_viewer("rgb_array")
        viewer.make_context_current()  # of the many simulators of a process, this one draws
        for flag in self.flags_off:
            viewer.scn.flags[flag] = 0
        picture = Image.fromarray(self.env.render()).rotate(180)
        return np.array(picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX))

    def gripper(self) -> tuple[np.ndarray, np.ndarray]:
        """Place of the fingertips: position [3] in metres, and pixel [2] (x right, y down)."""
        position = self.env.tcp_center
        offset = position - self.env.data.cam_xpos[self.camera]
        seen = self.env.data.cam_xmat[self.camera].reshape(3, 3).T @ offset
        focal = HEIGHT / 2 / np.tan(np.radians(self.env.model.cam_fovy[self.camera]) / 2)
        projected = np.array([seen[0], -seen[1]]) / -seen[2]
        upside_down = np.array([WIDTH, HEIGHT]) / 2 + focal * projected
        return position, np.array([WIDTH, HEIGHT]) - upside_down


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> np.ndarray:
    """Numbers [T, ...] that wander (an Ornstein-Uhlenbeck process of standard deviation 1)."""
    noise = rng.standard_normal(shape)
    for t in range(1, len(noise)):
        noise[t] = memory * noise[t - 1] + np.sqrt(1 - memory**2) * noise[t]
    return noise


def held(rng: np.random.Generator, frames: int, draw: Callable, shortest: int, longest: int
         ) -> list:
    """A row of draws, each held for some frames."""
    rows = []
    while len(rows) < frames:
        rows += [draw()] * int(rng.integers(shortest, longest + 1))
    return rows[:frames]


def plan(behaviour: str, rng: np.random.Generator, frames: int) -> np.ndarray:
    """What the hand means to do, [frames, 4]; the expert's own action comes on top of its noise."""
    strength = rng.uniform(0, 0.4) if behaviour == "astray" else rng.uniform(0.4, 1.0)
    motion = strength * smooth_noise(rng, (frames, 3), memory=0.8)
    if behaviour == "pause":
        motion *= np.array(held(rng, frames, lambda: rng.integers(2), 2, 6))[:, None]
    if behaviour == "sweep":
        def one_direction() -> np.ndarray:
            return rng.uniform(0.5, 1) * rng.choice([-1, 1]) * np.eye(3)[rng.integers(3)]

        motion = np.array(held(rng, frames, one_direction, 3, 8))
    gripper = np.array(held(rng, frames, lambda: rng.choice([-1.0, 1.0]), 4, 12))
    return np.concatenate([motion, gripper[:, None]], axis=1)


def record(simulator: Simulator, behaviour: str, rng: np.random.Generator, frames: int = FRAMES,
           varied: bool = False) -> dict[str, np.ndarray]:
    """One episode: frame t shows the world before action t. varied: see `Simulator.vary`."""
    simulator.reset(rng)
    if varied:
        simulator.vary(rng)
    rows = {"frames": [], "actions": [], "position": [], "pixel": []}
    turn, wrong = np.ones(3), np.zeros((frames, 3))
    if behaviour == "astray":
        wrong = held(rng, frames, lambda: rng.uniform(-ASTRAY, ASTRAY), 8, 20)
    for action, error in zip(plan(behaviour, rng, frames), wrong, strict=True):
        if behaviour in ("expert", "astray"):
            believed = simulator.observation.copy()
            believed[DRAWER] += error
            scripted = simulator.policy.get_action(believed)
            action = np.append(action[:3] + scripted[:3], scripted[3])
        else:  # turn back at the borders
            outward = np.where(simulator.hand < LOW, -1, np.where(simulator.hand > HIGH, 1, 0))
            turn = np.where(outward * action[:3] * turn > 0, -turn, turn)
            action = np.append(action[:3] * turn, action[3])
        action = np.clip(action, -1, 1)
        position, pixel = simulator.gripper()
        for name, value in zip(rows, (simulator.render(), action, position, pixel), strict=True):
            rows[name].append(value)
        for _ in range(STEPS_PER_FRAME):
            simulator.advance(action)
    return {name: np.array(values) for name, values in rows.items()}


def encode(episode: dict[str, np.ndarray], with_actions: bool, quality: int) -> bytes:
    """An Example in RT-1's schema, with the gripper's place beside it."""
    actions = episode["actions"] * with_actions
    T = len(actions)
    terminate = np.zeros((T, 3), np.int64)
    terminate[:, 1] = 1  # go on
    terminate[-1] = (1, 0, 0)
    return encode_example({
        "steps/observation/image": [to_jpeg(frame, quality) for frame in episode["frames"]],
        "steps/action/base_displacement_vector": np.zeros((T, 2), np.float32),
        "steps/action/base_displacement_vertical_rotation": np.zeros((T, 1), np.float32),
        "steps/action/gripper_closedness_action": actions[:, 3:].astype(np.float32),
        "steps/action/rotation_delta": np.zeros((T, 3), np.float32),
        "steps/action/terminate_episode": terminate * with_actions,
        "steps/action/world_vector": actions[:, :3].astype(np.float32),
        "steps/observation/gripper_position": episode["position"].astype(np.float32),
        "steps/observation/gripper_pixel": episode["pixel"].astype(np.float32),
    })


def to_jpeg(frame: np.ndarray, quality: int) -> bytes:
    file = BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue()


simulator_of = cache(Simulator)


@dataclass
class Settings:
    world: str = option("drawer", "what is recorded", choices=WORLDS)
    split: str = option("train", "of the data set", choices=("train", "val"))
    episodes: int = option(1200, "in all")
    frames: int = option(FRAMES, "per episode")
    per_file: int = option(32, "episodes per file")
    out: str = option("recorded/drawer", "folder for the files")
    quality: int = option(88, "of its JPEGs")
    seed: int = option(0, "random seed", least=0)
    processes: int = option(2, "files recorded at a time")


def record_episodes(args: Settings, numbers: range) -> list[bytes]:
    tasks = WORLDS[args.world] or sorted(set(meta_world()[1]) - set(WORLDS["drawer"]))
    behaviours = CONTACT if args.world == "contact" else BEHAVIOURS
    others = args.world == "others"
    world, examples = zlib.crc32(f"{args.world} {args.split}".encode()), []
    for i in numbers:
        episode = record(simulator_of(tasks[i // len(BEHAVIOURS) % len(tasks)]),
                         behaviours[i % len(behaviours)],
                         np.random.default_rng([args.seed, world, i]), args.frames, varied=others)
        examples.append(encode(episode, not others, args.quality))
    return examples


Record = Callable[[object, range], list[bytes]]  # episodes of these numbers, as Examples


def record_file(name: str, record: Record, args: Settings, files: int, number: int) -> int:
    """Record file `number` of `files`, unless it is there; returns how many episodes it holds."""
    path = Path(args.out) / f"{name}-{args.split}.tfrecord-{number:05d}-of-{files:05d}"
    numbers = range(number * args.per_file, min((number + 1) * args.per_file, args.episodes))
    if not path.exists():
        unfinished = path.with_name(path.name + ".partial")  # this file's: others are being written
        write_records(unfinished, record(args, numbers))
        unfinished.replace(path)
    return len(numbers)


def record_files(name: str, record: Record, simulator: Callable, args: Settings) -> None:
    """All episodes, several files at a time.

    name       how the files' names begin
    simulator  imports it, or raises RequestError
    """
    simulator()  # where it is missing, that is said here and not in a process of the pool
    Path(args.out).mkdir(parents=True, exist_ok=True)
    files = -(-args.episodes // args.per_file)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool, tqdm(
            total=args.episodes, unit="episode") as bar:
        for recorded in pool.imap_unordered(partial(record_file, name, record, args, files),
                                            range(files)):
            bar.update(recorded)


main = program(__name__, "record_drawer", partial(
    record_files, "fractal20220817_data", record_episodes, meta_world), Settings,
    "Record episodes of a simulated robot arm.")
