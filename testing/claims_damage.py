"""Nothing fails in silence: what is damaged, hostile, or of another program's kind."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np
import torch
from PIL import Image

import sample
import train
from data import SAMPLES, open_episodes
from dynamicrafter.checkpoint import read_checkpoint, read_lightning
from episodes import from_lerobot, from_rlds, from_video, video
from episodes.images import decode
from episodes.npz import read_npy
from episodes.tfrecord import encode_example, write_records
from evaluation import evaluate
from model.saving import TINY_WORLD, load_model, load_world_model, preset_of
from sample import load_world
from support.errors import CheckpointError, DataError, UserError
from support.pictures import save_gif
from testing.commands import folder, needs, raises, refused, run_command
from testing.episodes import encode_jpeg, make_csgo, make_episode, make_pictures, make_rt1, shard_of
from testing.networks import small_networks
from testing.worlds import (SMALL, Exploit, losses, save_world, small_checkpoint, small_preset,
                            train_words, write_safetensors)
from unet import load_dynamicrafter

HERE = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------------
# Checkpoints


def spoiled(change) -> Path:
    """A run folder whose checkpoint was changed: change(content)."""
    run = save_world(folder() / "run")
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    change(content)
    torch.save(content, run / "checkpoint.pt")
    return run


def test_weights_that_are_not_finite_numbers_are_refused_by_name():
    name = "unet.out.2.weight"
    for value in (float("nan"), float("inf")):
        for place in (name, "text"):
            def spoil(content, place=place, value=value):
                content["weights"][place].view(-1)[3] = value
            with raises(CheckpointError, f"not of finite numbers .{place}"):
                load_world_model(spoiled(spoil))
    for kind in (torch.bool, torch.int64, torch.complex64):
        def spoil(content, kind=kind):
            content["weights"][name] = content["weights"][name].to(kind)
        with raises(CheckpointError, f"not of finite numbers .{name}"):
            load_world_model(spoiled(spoil))
    for row, value in ((0, float("nan")), (1, 0.0), (1, float("inf")), (2, -1.0)):
        def spoil(content, row=row, value=value):
            content["weights"]["action_statistics"][row, 2] = value
        with raises(CheckpointError, "action_statistics must be"):
            load_world_model(spoiled(spoil))
    assert load_world_model(spoiled(lambda content: None)).action_dim == 13


def test_fields_of_the_wrong_kind_are_refused_by_name():
    def put(content, path, value):
        *outer, last = path.split(".")
        for name in outer:
            content = content[name]
        content[last] = value

    for path, value in (("config.base_scale", float("nan")), ("config.base_scale", 0),
                        ("config.size", "wide"), ("config.size", [63, 80]),
                        ("config.unet", None), ("config.unet.num_res_blocks", 10**12),
                        ("config.unet.model_channels", 64.0), ("config.unet.norm_scope", "all"),
                        ("config.unet.channel_mult", [1] * 99), ("sampling", [3]),
                        ("data", {"name": 3}), ("frozen", "../frozen.pt"), ("weights", [1])):
        with raises(CheckpointError, "not a checkpoint of this project"):
            load_world_model(spoiled(lambda content, p=path, v=value: put(content, p, v)))
    for field, value in (("steps", 0), ("guidance", "much"), ("eta", float("nan")), ("x", 1)):
        with raises(UserError, "steps is 0|sampling of the checkpoint"):
            load_world(spoiled(lambda content, f=field, v=value: put(content["sampling"], f, v)))
    with raises(CheckpointError, "config has no size"):
        load_world_model(spoiled(lambda content: content["config"].pop("size")))
    for value in (torch.eye(3).to_sparse(), torch.eye(3, device="meta")):
        with raises(CheckpointError, r"weights.text is not an ordinary tensor"):
            load_world_model(spoiled(lambda c, v=value: put(c["weights"], "text", v)))
    torch.save({"preset": ["tiny"], "state_dict": {}}, path := folder() / "base.pt")
    with raises(CheckpointError, "is of preset"):
        preset_of(path)


def test_a_hole_in_a_checkpoint_is_not_filled_from_the_base():
    out = folder()
    shutil.copy(TINY_WORLD.with_name("tiny_base.pt"), out)
    whole = torch.load(TINY_WORLD, weights_only=True)
    for name in ("unet.out.2.bias", "autoencoder.decoder.conv_out.weight", "resampler.latents",
                 "text"):
        weights = {other: w for other, w in whole["weights"].items() if other != name}
        torch.save(whole | {"weights": weights, "data": whole["data"] | {"fps": None}},
                   out / "world.pt")
        with raises(CheckpointError, f"lacks {name}, which learned|missing .{name}"):
            load_model(out / "world.pt")
    torch.save(whole, out / "world.pt")
    assert load_model(out / "world.pt").action_dim == 13


def test_an_archive_whose_parts_are_not_what_they_say_is_refused():
    good = save_world(folder() / "run") / "checkpoint.pt"
    path = good.with_name("other.pt")

    def pack(compression: int, shorter: int | None = None) -> None:
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", compression) as new:
            parts = [name for name in old.namelist() if old.getinfo(name).file_size > 400]
            for name in old.namelist():
                cut = -4 if shorter is not None and name == parts[shorter] else None
                new.writestr(name, old.read(name)[:cut])

    pack(zipfile.ZIP_DEFLATED)
    with raises(CheckpointError, "packed again with compression"):
        read_checkpoint(path)
    for part in (2, -1):
        pack(zipfile.ZIP_STORED, part)
        with raises(CheckpointError, "is damaged: .* is not there with its"):
            read_checkpoint(path)
    pack(zipfile.ZIP_STORED)
    assert read_checkpoint(path)["weights"].keys() == read_checkpoint(good)["weights"].keys()


def test_a_small_checkpoint_that_is_written_over_changes_nothing_that_was_read():
    path = save_world(folder() / "run") / "checkpoint.pt"
    weight = read_checkpoint(path)["weights"]["unet.input_blocks.0.0.weight"]
    before = weight.clone()
    path.write_bytes(b"\0" * 100)
    assert torch.equal(weight, before)


def test_weights_in_eight_bits_load_with_their_own_values():
    weights = read_checkpoint(small_checkpoint())["state_dict"]
    for kind, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2"),
                       (torch.float16, "F4_E2M1")):
        header, data = {}, b""
        for key, w in weights.items():
            raw = w.to(kind).view(-1).view(torch.uint8).numpy().tobytes()
            header[key] = {"dtype": name, "shape": list(w.shape),
                           "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        path = folder() / f"{name}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        if name == "F4_E2M1":
            with raises(CheckpointError, "is stored as 'F4_E2M1'; read are .*F8_E4M3"):
                load_dynamicrafter(path, SMALL)
            continue
        ours = load_dynamicrafter(path, SMALL).state_dict()["input_blocks.0.0.weight"]
        theirs = weights["model.diffusion_model.input_blocks.0.0.weight"].to(kind).float()
        assert torch.equal(ours, theirs)


def test_a_pipe_is_not_waited_for():
    os.mkfifo(pipe := folder() / "pipe.pt")
    with raises(CheckpointError, "is not a regular file"):
        load_world(pipe)
    os.mkfifo(pipe := folder() / "actions.npy")
    refused(sample.main, "--actions", pipe, saying="is not a regular file")


# --------------------------------------------------------------------------------------------------
# Training


@small_preset()
def test_training_ends_at_the_first_loss_that_is_not_a_number():
    out = folder() / "run"
    loss, calls = train.batch_loss, []

    def breaks(trainee, model, batch, settings):
        calls.append(1)
        found = loss(trainee, model, batch, settings)
        return found * float("nan") if model.training and len(calls) == 3 else found

    words = train_words(SAMPLES, out, 6, 2, "val_every=100")
    with mock.patch.object(train, "batch_loss", breaks):
        code, said = run_command(train.main, *words)
    assert code == 2 and re.search(r"step 3: .* nan, not a finite number; .*--resume", said), said
    assert len(losses(out)) == 2
    saved = read_checkpoint(out / "checkpoint.pt")
    assert saved["step"] == 2 and all(w.isfinite().all() for w in saved["weights"].values())
    assert run_command(train.main, "--resume", "--out", out, "--lr", 1e-4)[0] == 0
    assert len(losses(out)) == 6


@small_preset()
def test_weights_that_are_no_numbers_do_not_overwrite_a_checkpoint():
    out, added = folder() / "run", train.add_gradients

    def explode(loss_module, model, *others):
        found = added(loss_module, model, *others)
        next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")
        return found

    with mock.patch.object(train, "add_gradients", explode):
        code, said = run_command(train.main, *train_words(SAMPLES, out, 2), "--save-every", 1)
    assert code == 2 and "holds numbers that are not finite" in said, said
    assert read_checkpoint(out / "checkpoint.pt")["step"] == 0


@small_preset()
def test_a_second_run_in_one_folder_is_refused_while_the_first_lives():
    out, added = folder() / "run", train.add_gradients
    said = []

    def meddle(*inputs):
        if len(said) < 2:
            said.append(run_command(train.main, *train_words(SAMPLES, out), "--overwrite"))
            said.append(run_command(train.main, "--resume", "--out", out))
        return added(*inputs)

    with mock.patch.object(train, "add_gradients", meddle):
        assert run_command(train.main, *train_words(SAMPLES, out, 2))[0] == 0
    assert all(code == 2 and "another process trains in" in words for code, words in said), said
    assert len(losses(out)) == 2

    def replace(*inputs):
        shutil.rmtree(out)
        out.mkdir()
        return added(*inputs)

    with mock.patch.object(train, "add_gradients", replace):
        code, words = run_command(train.main, "--resume", "--out", out, "--steps", 4)
    assert code == 2 and "was removed or replaced while this run wrote to it" in words, words
    assert not list(out.iterdir())


@small_preset()
def test_what_a_resumed_run_is_told_holds_for_the_next_command():
    out, added = folder() / "run", train.add_gradients
    assert run_command(train.main, *train_words(SAMPLES, out, 2))[0] == 0

    def interrupt(*inputs):
        os.kill(os.getpid(), signal.SIGINT)
        return added(*inputs)

    with mock.patch.object(train, "add_gradients", interrupt):
        run_command(train.main, "--resume", "--out", out, "--steps", 5, "--lr", 1e-4)
    assert len(losses(out)) == 3
    assert run_command(train.main, "--resume", "--out", out)[0] == 0 and len(losses(out)) == 5
    assert json.loads((out / "arguments.json").read_text(encoding="utf-8"))["lr"] == 1e-4


def test_numbers_on_the_command_line_have_bounds():
    for words, saying in ((["--lr", "nan"], "lr is nan"), (["--lr", "1e30"], "at most 1000"),
                          (["--lr", -1], "lr is -1.0; it must be at least")):
        refused(train.main, *words, saying=saying)
    refused(sample.main, "--guidance", "inf", saying="guidance is inf; .*finite")


# --------------------------------------------------------------------------------------------------
# Recordings


def test_what_is_damaged_is_left_out_before_the_split_is_drawn():
    root = make_pictures([6] * 8)
    held_out, = open_episodes("folder", root, "val", fps=5)
    (root / held_out.name / "3.png").unlink()
    other, = open_episodes("folder", root, "val", fps=5)
    assert other.name != held_out.name
    learned = open_episodes("folder", root, "train", fps=5)
    assert len(learned) == 6 and learned.damaged == 1
    # what is held out among all is so among the long ones
    root = make_pictures([6, 9, 6, 9, 9, 6, 9, 9, 6, 9])
    among_all = {e.name for e in open_episodes("folder", root, "val", fps=5) if e.length > 8}
    among_long = {e.name for e in open_episodes("folder", root, "val", 8, fps=5)}
    assert among_all <= among_long and len(among_long) == 1


def test_hidden_files_of_a_mac_are_passed_over():
    root = make_pictures([6, 6])
    for path in [*root.rglob("*.png"), *root.rglob("*.npy")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert [e.length for e in open_episodes("folder", root, fps=5)] == [6, 6]
    arrays = folder()
    for i in range(2):
        np.savez(arrays / f"{i}.npz", image=np.zeros((6, 8, 8, 3), np.uint8), action=np.eye(6))
        (arrays / f"._{i}.npz").write_bytes(b"\0\5\26\7")
    episodes = open_episodes("folder", arrays, fps=5)
    assert len(episodes) == 2 and not episodes.damaged


def test_a_damaged_hdf5_file_leaves_the_others_in_use_and_none_reads_another_file():
    needs("h5py")
    import h5py
    root = make_csgo([f"hdf5_dm_july2021_{i}.hdf5" for i in range(3)], frames=3)
    first, secret = sorted(root.rglob("*.hdf5"))[0], folder() / "secret"
    whole = first.read_bytes()
    secret.write_bytes(bytes(range(256)) * 600)
    frame = h5py.VirtualLayout((150, 280, 3), "u1")
    frame[:] = h5py.VirtualSource(root / "other.hdf5", "frame_0_x", (150, 280, 3))

    def lies_elsewhere(file: h5py.File) -> None:
        file.create_dataset("frame_0_x", (150, 280, 3), "u1",
                            external=[(str(secret), 0, 150 * 280 * 3)])

    for change in (lies_elsewhere, lambda file: file.create_virtual_dataset("frame_0_x", frame),
                   lambda file: file.update({"frame_0_x": h5py.ExternalLink(str(first), "a")}),
                   lambda file: file.update({"frame_0_x": np.zeros((2, 2))}),
                   lambda file: file.update({"frame_0_x": "text"})):
        first.write_bytes(whole)
        with h5py.File(first, "r+") as file:
            del file["frame_0_x"]
            change(file)
        episodes = open_episodes("csgo", root)
        with raises(DataError, f"episode {first.stem} is damaged"):
            _ = next(e for e in episodes if e.path == first).frames
    for value in (np.zeros(7), np.zeros((3, 17)), "text"):
        first.write_bytes(whole)
        with h5py.File(first, "r+") as file:
            del file["frame_1_y"]
            file["frame_1_y"] = value
        episodes = open_episodes("csgo", root)
        assert len(episodes) == 2 and episodes.damaged == 1
    first.write_bytes(whole[:3000])
    assert len(open_episodes("csgo", root)) == 2


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


def test_random_damage_ends_in_the_projects_own_errors_and_executes_nothing():
    random, mark = np.random.default_rng(0), folder() / "executed"
    frames, actions = make_episode(5, seed=0)
    files = folder()
    np.savez(files / "episode.npz", image=frames[:, :8, :8], action=actions)
    np.save(files / "actions.npy", actions)
    torch.save({"state_dict": {"model.diffusion_model.w": torch.randn(40)}, "step": 7},
               files / "model.ckpt")
    write_safetensors(files / "model.safetensors", {"model.diffusion_model.w": torch.randn(40)})
    torch.save({"state_dict": {}, "hook": Exploit(mark)}, files / "evil.ckpt")
    write_records(files / "rt1.tfrecord-00000-of-00001",
                  [shard_of(make_rt1([4])).read_bytes()[12:-4]])
    (files / "info.json").write_text('{"fps": 5, "names": ["up", "across"], "absolute": true, '
                                     '"keys": {"w": {"up": 1}, " ": {"up": 2, "toggles": true}}}',
                                     encoding="utf-8")
    Image.fromarray(frames[0]).save(files / "2.png")

    def read_episodes(root: Path, name: str = "rt1") -> None:
        for episode in open_episodes(name, root):
            episode.read(0, episode.length)

    def read_own(path: Path) -> None:  # a good folder but for this file
        root = make_pictures([4])
        shutil.copy(path, root if path.suffix == ".json" else root / "episode_000")
        read_episodes(root, "folder")

    readers = {".npz": lambda path: read_episodes(path.parent),
               ".npy": lambda path: [sample.to_numbers(read_npy(path)), read_own(path)],
               ".png": read_own, ".json": read_own,
               ".tfrecord-00000-of-00001": lambda path: read_episodes(path.parent),
               ".ckpt": read_lightning,
               ".safetensors": read_lightning}
    refused_cases = 0
    originals = sorted(files.iterdir())
    for case in range(280):
        original = originals[case % len(originals)]
        content = bytearray(original.read_bytes())
        damage, place = case // len(originals) % 4, int(random.integers(len(content)))
        if damage == 0:
            del content[place:]
        elif damage == 1:
            content[place] ^= int(random.integers(1, 256))
        elif damage == 2:
            content[place : place + 16] = random.bytes(16)
        else:
            content[place : place + 64] = bytes(64)
        damaged = folder() / original.name
        damaged.write_bytes(content)
        read = next(reader for suffix, reader in readers.items() if original.name.endswith(suffix))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(damaged)
        except UserError as error:
            refused_cases += 1
            assert "\n" not in str(error), error
    assert refused_cases > 160 and not mark.exists()


def test_damage_that_only_a_checksum_shows_is_found_in_a_checkpoint():
    path = small_checkpoint()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a weight
    path.write_bytes(content)
    with raises(CheckpointError, "a checksum does not match"):
        read_checkpoint(path)


# --------------------------------------------------------------------------------------------------
# Measurements, pictures, other systems


def test_a_distance_of_few_videos_says_so():
    words = ["--frames", 4, "--steps", 1, "--i3d", small_networks()["--i3d"], "--out"]
    code, said = run_command(evaluate.main, "--episodes", 1, *words, out := folder() / "one")
    assert code == 0 and "| FVD | absent | one of the videos has no covariance |" in said, said
    assert json.loads((out / "result.json").read_text(encoding="utf-8"))["absent"]
    code, said = run_command(evaluate.main, "--episodes", 2, *words, folder() / "two")
    assert code == 0 and "of 2 videos: too few to be compared with published" in said, said


def test_an_animation_is_as_fast_as_a_browser_shows_it():
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 80, 3), dtype=np.uint8)
    for fps, shown, number in ((60, 30, 6), (50, 20, 12), (30, 30, 12), (5, 200, 12)):
        save_gif(path := folder() / "a.gif", {"imagined": frames}, fps)
        with Image.open(path) as animation:
            assert animation.info["duration"] == shown and animation.n_frames == number


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


def test_every_file_is_utf8_whatever_the_code_page():
    unsaid = re.compile(r"(?<![\w.])open\(|\.read_text\(\)|\.write_text\(")
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        source = path.read_text(encoding="utf-8")
        for call in unsaid.finditer(source):
            words = source[call.start() : call.start() + 400]
            allowed = re.match(r'[^\n]*"[rwa]b"', words) or "encoding=" in words
            defined = source[: call.start()].endswith("def ")
            assert allowed or defined, f"{path}: {words[:60]}"
    out = folder()
    odd = os.fsencode(out) + b"/\xff.npy"
    for words in (["diffusion_forcing.py"], ["action_guidance.py"],
                  ["sample.py", "--steps", "1", "--frames", "2", "--out", out],
                  ["sample.py", "--actions", odd]):
        done = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "cp1252"})
        assert done.returncode == (2 if odd in words else 0), done.stderr.decode()
        assert b"Traceback" not in done.stderr
    assert rb"\udcff.npy" in done.stderr
