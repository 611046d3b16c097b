"""Claims about what other programs recorded: LeRobot, RLDS, films, tables."""
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from data import open_episodes
from episodes import from_lerobot, from_rlds, from_video, video
from episodes.images import decode
from episodes.tfrecord import encode_example, write_records
from testing.commands import folder, needs, refused, run_command
from testing.episodes import encode_jpeg, shard_of

HERE = Path(__file__).parent.parent


def lerobot(version: str = "v2.1") -> Path:
    root = folder() / "set"
    shutil.copytree(HERE / "testing" / "lerobot" / version, root)
    return root


def change_info(root: Path, **changes: object) -> None:
    path = root / "meta" / "info.json"
    info = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(info), encoding="utf-8")


def test_lerobot_metadata_of_other_programs_is_read_or_refused_in_a_sentence():
    needs("pyarrow", "av")
    names = {"names": {"dx": 0, "grip": 2, "dy": 1}, "shape": [3], "dtype": "float32"}
    root, out = lerobot(), folder() / "out"
    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    change_info(root, features=info["features"] | {"action": names})
    listed = root / "meta" / "episodes.jsonl"
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    rows[0]["tasks"] = ["pick\u2028and place\x85it"]
    listed.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
                      encoding="utf-8")
    code, said = run_command(from_lerobot.main, root, out, "--camera", "front")
    assert code == 0 and "3 episodes in" in said, said
    converted = json.loads((out / "info.json").read_text(encoding="utf-8"))
    assert converted["names"] == ["dx", "dy", "grip"]
    refused(from_lerobot.main, root, out, "--camera", "wrist", saying="name another folder")
    wide = {"data_path": "{episode_index:9999999999999d}"}
    for changes, saying in ((wide, "not a path inside|left out|no episode"),
                            ({"data_path": "/etc/passwd"}, "not a path inside"),
                            ({"data_path": "../{episode_index}"}, "not a path inside"),
                            ({"data_path": "{secret}"}, "a path with {secret}"),
                            ({"fps": "ten"}, "fps is 'ten'"), ({"chunks_size": 0}, "chunks_size"),
                            ({"features": [1]}, "features is"), ({"data_path": 3}, "data_path")):
        change_info(other := lerobot(), **changes)
        refused(from_lerobot.main, other, folder() / "out", saying=saying)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for pattern in ("*.mp4", "*.parquet", "episodes.jsonl", "info.json"):
        other = lerobot()
        for path in other.rglob(pattern):
            path.write_bytes(pointer)
        refused(from_lerobot.main, other, folder() / "out", saying="Git LFS pointer")


def test_two_episodes_that_claim_the_same_pictures_are_left_out():
    needs("pyarrow", "av")
    import pyarrow
    import pyarrow.parquet as parquet
    root = lerobot("v3.0")
    path, = (root / "meta" / "episodes").rglob("*.parquet")
    table = parquet.read_table(path)
    for end in ("from", "to"):
        name = f"videos/observation.images.front/{end}_timestamp"
        times = table[name].to_pylist()
        times[1] = times[0] + (0 if end == "from" else 1.7)
        column = table.column_names.index(name)
        table = table.set_column(column, name, pyarrow.array(times))
    parquet.write_table(table, path)
    code, said = run_command(from_lerobot.main, root, folder() / "out", "--camera", "front")
    assert code == 0 and "1 episodes in" in said and "2 left out" in said, said
    assert "claims the same stretch of" in said


def film(path: Path, frames: int = 6, codec: str = "libx264", seed: int = 0,
         **options: object) -> None:
    import av
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(frames):
            picture = np.random.default_rng(seed + t).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = picture.repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def films(head: str = "dx,dy\n", row: str = "1,2\n", frames: int = 6) -> Path:
    source = folder()
    for name in "ab":
        film(source / f"{name}.mp4", frames)
        (source / f"{name}.csv").write_text(head + row * frames, encoding="utf-8")
    return source


def test_tables_that_excel_saved_are_read_and_names_are_not_taken_twice():
    needs("av")
    for head, names in (("\ufeffdx,dy\n", ["dx", "dy"]), ("\ufeff", None)):
        source, out = films(head), folder() / "out"
        code, said = run_command(from_video.main, source, out)
        assert code == 0 and np.load(out / "a" / "actions.npy").shape == (6, 2), said
        info = json.loads((out / "info.json").read_text(encoding="utf-8"))
        assert info.get("names") == names
    shutil.copy(source / "a.mp4", source / "a.mkv")
    (source / "a.csv").write_bytes(b"\xff\xfe1\x002\x00")  # the first table is damaged
    code, said = run_command(from_video.main, source, out := folder() / "out")
    assert code == 0 and "1 episodes in" in said and "2 left out" in said, said
    (source / "a.csv").write_text("1,2\n" * 6, encoding="utf-8")
    code, said = run_command(from_video.main, source, folder() / "out")
    assert "2 episodes in" in said and "there is another episode of this name" in said, said


def test_films_of_two_cameras_stand_side_by_side():
    needs("av")
    source, out = folder(), folder() / "out"
    for name, frames in (("a_front", 6), ("a_wrist", 6), ("b_front", 6), ("b_wrist", 5),
                         ("c_front", 6), ("d_wrist", 6)):
        film(source / f"{name}.mp4", frames, seed=10 * name.endswith("wrist"))
        (source / f"{name[0]}.csv").write_text("1,2\n" * 6, encoding="utf-8")
    code, said = run_command(from_video.main, source, out, "--camera", "front", "wrist")
    assert code == 0 and "1 episodes in" in said and "2 left out" in said, said
    assert "b: b_wrist.mp4 has 5 frames for 6 rows" in said and "c_wrist.mp4" in said, said
    both = decode((out / "a" / "000003.jpg").read_bytes()).astype(int)
    assert both.shape == (48, 128, 3)
    for camera, half in (("front", both[:, :64]), ("wrist", both[:, 64:])):
        run_command(from_video.main, source, alone := folder() / "out", "--camera", camera)
        assert np.abs(half - decode((alone / "a" / "000003.jpg").read_bytes())).mean() < 3
    assert np.abs(both[:, :64] - both[:, 64:]).mean() > 30
    code, said = run_command(from_video.main, source, out, "--camera", "front")
    assert code == 2 and "name another folder" in said, said


def test_a_film_that_the_decoder_had_to_guess_is_left_out():
    needs("av")
    source = films(frames=20)
    whole, marked = (source / "a.mp4").read_bytes(), 0
    for place in range(400, len(whole) - 1200, (len(whole) - 1600) // 16):
        damaged = bytearray(whole)
        damaged[place] ^= 255
        (source / "a.mp4").write_bytes(damaged)
        code, said = run_command(from_video.main, source, folder() / "out")
        assert code == 0 and "Traceback" not in said, said
        marked += "a.mp4 is damaged at" in said
    assert marked >= 2, marked


def test_pictures_are_turned_as_the_camera_was_held():
    needs("av")
    # 64×48 pixels, and beside them the word that the camera was turned by a quarter
    _, frame = next(video.decode(HERE / "testing" / "turned.mp4"))
    pixels = frame.to_ndarray(format="rgb24")
    assert pixels.shape == (48, 64, 3) and np.array_equal(video.upright(frame), np.rot90(pixels))
    picture, file, exif = Image.fromarray(pixels), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, the other way round
    picture.save(file, "PNG", exif=exif)
    assert np.array_equal(decode(file.getvalue()), np.rot90(pixels, -1))


def test_a_film_without_a_frame_rate_is_timed_by_its_frames():
    needs("av")
    film(path := folder() / "a.webm", codec="libvpx")
    assert abs(video.frame_rate(path) - 10) < 0.2
    silent = mock.MagicMock()
    silent.open.return_value.__enter__.return_value.streams.video = [mock.Mock(average_rate=None)]
    times = [(t / 8, None) for t in range(5)]
    with mock.patch.object(video, "import_av", lambda: silent), \
            mock.patch.object(video, "decode", lambda path: iter(times)):
        assert video.frame_rate(path) == 8


def rlds(root: Path, pictures: list[bytes], actions: int, steps: int, shards: int = 1) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    payload = encode_example({
        "steps/observation/image": pictures, "steps/action": np.zeros(actions, np.float32),
        "steps/is_first": np.zeros(steps, np.int64)})
    for i in range(shards):
        write_records(root / f"my_data-train.tfrecord-{i:05d}-of-{shards:05d}", [payload])
    return root


def test_an_rlds_episode_has_a_picture_for_every_step_in_a_format_that_is_read():
    picture = np.arange(32 * 40 * 3, dtype=np.uint8).reshape(32, 40, 3)
    jpeg = encode_jpeg(picture)
    refused(from_rlds.main, rlds(folder() / "a", [jpeg] * 12, 84, steps=6), folder() / "out",
            saying="12 pictures in .* and 6 steps")
    Image.fromarray(picture).save(gif := io.BytesIO(), "GIF")
    root, out = folder() / "b", folder() / "out"
    for name in "xy":  # shards of one name in two folders
        rlds(root / name, [gif.getvalue()] * 6, 12, steps=6, shards=2)
    shard_of(root / "y").write_bytes(b"damaged")
    code, said = run_command(from_rlds.main, root, out)
    assert code == 0 and "3 episodes in" in said and "left out" in said, said
    assert [e.frames.shape for e in open_episodes("folder", out, fps=5)] == [(6, 32, 40, 3)] * 3
