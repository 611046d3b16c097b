"""Nothing fails in silence: what is damaged, hostile, or of another program's kind."""
import json
import os
import re
import shutil
import signal
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import sample
import train
from data import SAMPLES, open_episodes
from dynamicrafter.checkpoint import read_checkpoint, read_lightning
from episodes.npz import read_npy
from episodes.tfrecord import write_records
from model.saving import TINY_WORLD, load_model, load_world_model, preset_of
from sample import load_world
from support.errors import CheckpointError, UserError
from testing.commands import folder, raises, refused, run_command
from testing.episodes import make_episode, make_pictures, make_rt1, shard_of
from testing.worlds import (SMALL, Exploit, losses, save_world, small_checkpoint, small_preset,
                            train_words, write_safetensors)
from unet import load_dynamicrafter


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
# Bytes changed at random


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
