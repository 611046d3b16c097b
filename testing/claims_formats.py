"""Claims about file formats, TFRecord, npz, HDF5 and pictures, and the index of a folder."""
import contextlib
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

import data
from data import open_episodes
from episodes import recon, tfrecord
from episodes.crc32c import crc32c
from episodes.images import decode, decode_all
from episodes.tfrecord import encode_example, encode_field, feature_numbers, parse_example
from support.errors import DataError
from testing.commands import folder, needs, raises
from testing.episodes import encode_jpeg, make_csgo, make_episode, make_pictures, make_rt1, shard_of


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(bytes(range(32))) == 0x46DD794E
    text = np.random.default_rng(0).bytes(5000)
    # the fast way above 256 bytes against the plain one below
    for cut in (255, 256, 257, 1000, 4999):
        crc = 0xFFFFFFFF
        for byte in text[:cut]:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        assert crc32c(text[:cut]) == crc ^ 0xFFFFFFFF, cut


def test_episodes_come_back_as_they_were_written():
    root = make_rt1([5, 9, 7], shards=2)
    episodes = open_episodes("rt1", root)
    assert sorted(len(e.frames) for e in episodes) == [5, 7, 9]
    assert sorted(e.length for e in episodes) == [5, 7, 9]
    frames, actions = make_episode(9, seed=1)
    episode = next(e for e in episodes if e.length == 9)
    assert np.array_equal(episode.actions, actions) and episode.actions.dtype == np.float32
    # it is JPEG
    assert episode.frames.shape == frames.shape and np.abs(
        episode.frames.astype(int) - frames).mean() < 3
    part, part_actions = episode.read(2, 6)
    assert np.array_equal(part, episode.frames[2:6]) and np.array_equal(part_actions, actions[2:6])
    for root_too in (root.parent, root / "0.1.0"):  # a folder above, the version folder
        assert len(open_episodes("rt1", root_too)) == 3


def test_lists_of_numbers_may_be_packed_or_not():
    floats = np.array([1.5, -2.0, 3.25], "<f4")
    loose = b"".join(b"\x0d" + value.tobytes() for value in floats)  # field 1, 4 bytes, three times
    entry = encode_field(1, b"f") + encode_field(2, encode_field(2, loose))
    assert feature_numbers(parse_example(memoryview(encode_field(1, encode_field(1, entry)))),
                           "f").tolist() == floats.tolist()
    example = parse_example(memoryview(encode_example({"f": floats,
                                                       "i": np.array([5, -3, 2**40])})))
    assert feature_numbers(example, "f").tolist() == floats.tolist()
    assert feature_numbers(example, "i").tolist() == [5, -3, 2**40]
    loose = b"\x08\x05\x08" + b"\xfd" + b"\xff" * 8 + b"\x01"  # 5 and -3, one field each
    entry = encode_field(1, b"i") + encode_field(2, encode_field(3, loose))
    assert feature_numbers(parse_example(memoryview(encode_field(1, encode_field(1, entry)))),
                           "i").tolist() == [5, -3]


def test_npz_episodes_are_read_too():
    root = folder()
    frames, actions = make_episode(6, seed=0)
    np.savez(root / "one.npz", image=frames, action=actions)
    episode = open_episodes("rt1", root)[0]
    assert episode.name == "one"
    assert np.array_equal(episode.frames, frames) and np.array_equal(episode.actions, actions)
    np.savez(root / "two.npz", image=frames)
    with raises(DataError, "two.npz has no action"):
        open_episodes("rt1", root)


def test_npz_episodes_of_another_kind_are_refused_or_damaged():
    root = folder()
    frames, actions = make_episode(6, seed=0)
    np.savez(root / "narrow.npz", image=frames, action=actions[:, :7])
    with raises(DataError, "narrow.npz does not hold this data set: its actions have 7 numbers, "
                           "not 13"):
        open_episodes("rt1", root)
    (root / "narrow.npz").unlink()
    np.savez(root / "good.npz", image=frames, action=actions)
    np.savez(root / "short.npz", image=frames, action=actions[:4])
    np.savez(root / "complex.npz", image=frames, action=actions.astype(np.complex64))
    (root / "text.npz").write_text("not an archive", encoding="utf-8")
    episodes = {episode.name: episode for episode in open_episodes("rt1", root)}
    assert set(episodes) == {"good", "complex"}
    assert any("short is damaged: it has 6 frames and 4 actions" in problem
               for problem in open_episodes("rt1", root).problems)
    with raises(DataError, "complex is damaged: action is complex64"):
        _ = episodes["complex"].frames


def test_pictures_of_every_kind_are_read_or_called_damaged():
    def png(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    # 16 bits, as bright as 100 of 255
    grey = png(Image.fromarray(np.full((4, 4), 100 * 257, np.uint16)))
    assert decode(grey).shape == (4, 4, 3) and (decode(grey) == 100).all()
    assert (decode(png(Image.new("L", (4, 4), 100))) == 100).all()
    assert (decode(png(Image.new("RGBA", (4, 4), (1, 2, 3, 4)))) == [1, 2, 3]).all()
    bomb = bytearray(png(Image.new("L", (4, 4))))
    bomb[16:24] = (30000).to_bytes(4, "big") * 2  # a header that claims 900 million pixels
    for broken in (bytes(bomb), grey[:40], b"", b"\x89PNG"):
        with raises(DataError, "not a readable picture|pixels"):
            decode(broken)
    with raises(DataError, "a frame has 5000×5000 pixels"):
        decode(png(Image.new("1", (5000, 5000))))
    with raises(DataError, "different sizes .4×4, 8×4"):
        decode_all([grey, png(Image.new("L", (4, 8)))])


def test_the_index_is_built_once_and_again_for_a_shard_that_changed():
    root, walked = make_rt1([4, 5, 6, 7], shards=2), []
    walk = tfrecord.walk_records
    tfrecord.walk_records = lambda path: walked.append(path.name) or walk(path)
    try:
        first = open_episodes("rt1", root)
        assert len(walked) == 2
        again = open_episodes("rt1", root)
        assert len(walked) == 2 and np.array_equal(first.records, again.records)
        os.utime(shard_of(root, 1), ns=(1, 1))
        open_episodes("rt1", root)
        assert walked[2:] == [shard_of(root, 1).name]
    finally:
        tfrecord.walk_records = walk


def test_an_interrupted_index_keeps_what_it_knew():
    root, walked = make_rt1([4] * 6, shards=6), []
    open_episodes("rt1", root)
    for i in (1, 4):
        os.utime(shard_of(root, i), ns=(1, 1))
    walk = tfrecord.walk_records
    def interrupted(path: Path):
        walked.append(path.name)
        if len(walked) == 2:
            raise KeyboardInterrupt
        return walk(path)
    tfrecord.walk_records = interrupted
    try:
        with contextlib.suppress(KeyboardInterrupt):
            open_episodes("rt1", root)
        assert len(open_episodes("rt1", root)) == 6
    finally:
        tfrecord.walk_records = walk
    assert walked == [shard_of(root, i).name for i in (1, 4, 4)]  # and not those that come later


def test_links_are_followed_and_the_newest_version_is_read():
    root, elsewhere = folder(), make_rt1([5] * 3)
    (root / "link").symlink_to(elsewhere)
    (root / "circle").symlink_to(root)
    assert [e.length for e in open_episodes("rt1", root)] == [5, 5, 5]
    newer = elsewhere / "0.10.0"
    newer.mkdir()
    shard_of(make_rt1([7] * 2)).rename(newer / "fractal20220817_data-train.tfrecord-00000-of-00001")
    (newer / "fractal20220817_data-train.tfrecord-00000-of-00001.gstmp").write_bytes(b"half")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert [e.length for e in open_episodes("rt1", elsewhere)] == [7, 7]
    assert "0.1.0, 0.10.0 the newest is read, 0.10.0" in printed.getvalue()


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


def test_csgo_is_read_as_h5py_reads_it():
    needs("h5py")
    import h5py
    root = make_csgo(["hdf5_dm_july2021_1.hdf5", "hdf5_dm_july2021_3.hdf5",
                      "hdf5_dm_july2021_2.hdf5"], frames=390)
    train_set, held_out = (open_episodes("csgo", root, split) for split in ("train", "val"))
    assert [e.name for e in train_set] == ["hdf5_dm_july2021_1", "hdf5_dm_july2021_2"]
    assert [(e.name, e.length) for e in held_out] == [("hdf5_dm_july2021_3", 390 - 372)]
    with h5py.File(train_set[1].path) as file:
        frames, actions = train_set[1].read(30, 33)
        for i, frame in enumerate(frames):
            assert np.array_equal(frame, file[f"frame_{30 + i}_x"][()][:, :, ::-1])
            assert np.array_equal(actions[i], file[f"frame_{30 + i}_y"][()])
    with h5py.File(held_out[0].path) as file:  # begins at the protocol's frame 372
        assert np.array_equal(held_out[0].frames[1], file["frame_373_x"][()][:, :, ::-1])
        assert np.array_equal(held_out[0].actions[17], file["frame_389_y"][()])
    shard = root / "1-200" / "hdf5_dm_july2021_2.hdf5"
    shard.write_bytes(shard.read_bytes()[:5000])
    assert open_episodes("csgo", root, "train").damaged == 1
    with h5py.File(root / "1-200" / "hdf5_dm_july2021_4.hdf5", "w") as file:
        file["something"] = 1
    with raises(DataError, "4.hdf5 does not hold this data set"):
        open_episodes("csgo", root)


def test_recon_is_a_drive_in_the_robots_own_frame():
    needs("h5py")
    import h5py
    root = folder()
    # from the origin, looking north: two metres ahead, a quarter to the left, one metre ahead, and
    # a turn to the right across the end of the circle
    place = np.array([[0, 0, 9], [0, 2, 9], [0, 2, 9], [-1, 2, 9], [-1, 2, 9]], float)
    yaw = np.array([np.pi / 2, np.pi / 2, np.pi, np.pi, -np.pi + 0.1])
    frames = [np.full((48, 64, 3), 40 * t, np.uint8) for t in range(5)]
    for name in ("jackal_2019-08-02-16-23-29_0_r00", "jackal_b", "jackal_c"):
        with h5py.File(root / f"{name}.hdf5", "w") as file:
            pictures = file.create_dataset("images/rgb_left", 5, h5py.vlen_dtype(np.uint8))
            for t, frame in enumerate(frames):
                pictures[t] = np.frombuffer(encode_jpeg(frame), np.uint8)
            file["jackal/position"], file["jackal/yaw"] = place, yaw[:, None]
    (root / "test").mkdir()
    (root / "test" / "traj_names.txt").write_text("jackal_b\n", encoding="utf-8")
    train_set, held_out = (open_episodes("recon", root, split) for split in ("train", "val"))
    assert [e.name for e in held_out] == ["jackal_b"] and len(train_set) == 2
    assert train_set[0].length == 5 and train_set.dataset.action_dim == 3
    expected = [[2, 0, 0], [0, 0, np.pi / 2], [1, 0, 0], [0, 0, 0.1], [0, 0, 0]]
    assert np.allclose(train_set[0].actions, expected, atol=1e-6)
    seen, taken = train_set[0].read(2, 4)
    assert seen.shape == (2, 320, 320, 3) and abs(seen[0].mean() - 80) < 2
    assert np.allclose(taken, expected[2:4], atol=1e-6)
    driven = recon.motions(np.array([[0, 0], [0, 1], [1, 1]]), np.array([0, 0.5, 0.7]))
    assert np.allclose(driven, [[0, 1, 0.5], [np.cos(0.5), -np.sin(0.5), 0.2]])
    assert data.describe_action(train_set.dataset, train_set[0].actions[0]) == "ahead"
    path = root / "jackal_c.hdf5"
    path.write_bytes(path.read_bytes()[:1500])
    assert open_episodes("recon", root, "train").damaged == 1
    with h5py.File(path, "w") as file:
        file["something"] = 1
    with raises(DataError, "jackal_c.hdf5 does not hold this data set"):
        open_episodes("recon", root)
