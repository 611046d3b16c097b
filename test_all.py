"""Every claim that a CPU can check: `python test_all.py`, or `python test_all.py future` for the
tests with that word, or pytest. No GPU, no network, no downloads.

A test's name is the claim. Sections follow the files. `testing/` builds what they need; `golden/`
holds inputs and outputs of the original networks at small sizes.
"""
import ast
import contextlib
import gc
import gzip
import importlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import action_guidance
import causal_attention
import causal_conv
import data
import diffusion_forcing
import sample
import train
import unet
from action_guidance import align_actions, drop_actions, guide
from baselines import (
    action_finetuning,
    classifier_guidance,
    clips,
    controlnet,
    diamond,
    language_finetuning,
    train_diamond,
)
from baselines.tokenizer import Tokenizer
from bundled import record_arena
from bundled.bundle_checkpoint import bundle_base, bundle_world
from bundled.tune_decoder import tune_decoder
from causal_conv import TRANSFER_METHODS, TemporalConv, transfer_weights
from commands import parse
from data import DATA_SETS, SAMPLES, Clips, collate, fit_frames, open_episodes
from diffusion_forcing import NoiseSchedule, diffusion_forcing_loss, draw_levels
from dynamicrafter import autoencoder, checkpoint
from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig
from dynamicrafter.checkpoint import read_checkpoint, read_lightning
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig, preprocess
from dynamicrafter.layers import sinusoidal_embedding
from dynamicrafter.resampler import Resampler, ResamplerConfig
from episodes import from_lerobot, from_rlds, from_video, tfrecord
from episodes.actions import csgo_action, describe_csgo
from episodes.crc32c import crc32c
from episodes.frames import cut_bars
from episodes.images import decode, decode_all
from episodes.npz import read_npy
from episodes.tfrecord import (
    encode_example,
    encode_field,
    feature_numbers,
    parse_example,
    write_records,
)
from errors import CheckpointError, DataError, RequestError, UserError
from evaluation import (
    ablations,
    baselines,
    causality,
    contact,
    controllability,
    drift,
    evaluate,
    game,
    metrics,
    plan,
    policies,
    speed,
    transfers,
)
from evaluation.nar import imagine_together
from model import device, saving
from model.memory import halve_frozen
from model.sampling import MEASURED
from model.saving import (
    ARENA_WORLD,
    TINY_BASE,
    TINY_WORLD,
    from_dynamicrafter,
    from_vid2world,
    from_world,
    frozen_weights,
    load_model,
    preset_of,
    save,
    trained_weights,
)
from model.vid2world import PRESETS, Model, ModelConfig, to_frames
from play import __main__ as play
from play.keys import Keyboard, with_keys
from play.server import PlayServer
from sample import Sampling, WorldModel
from temporal import norm
from temporal.cache import Cache
from temporal.norm import TemporalNorm, past_by_definition
from testing import full_size
from testing.commands import folder, free_port, needs, raises, refused, run_command
from testing.episodes import (
    encode_jpeg,
    flip_byte,
    make_csgo,
    make_episode,
    make_pictures,
    make_rt1,
    shard_of,
)
from testing.golden import (
    error_of,
    full_size_parts,
    golden,
    names_of,
    network_inputs,
    recipe,
    released_names,
    with_recipe,
)
from testing.networks import small_networks
from testing.player import Player, picture_of, play_server
from testing.worlds import (
    SMALL,
    WORLD,
    Exploit,
    causal_network,
    losses,
    passes_of,
    save_world,
    small_checkpoint,
    small_episode,
    small_preset,
    small_world,
    train_words,
    write_safetensors,
)
from training.recorder import Recorder
from training.settings import Settings, parse_arguments
from unet import UNet, UNetConfig, load_dynamicrafter, load_vid2world
from viewing import pictures
from viewing.psnr import psnr

HERE = Path(__file__).parent
DIAMOND = diamond.DiamondConfig(action_dim=0, channels=(32, 32), attention=(False, True), blocks=1,
                                cond=32)
PROCESSES = min(2, os.cpu_count() or 1)  # that share the tests
os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp()  # indexes of this run's data


# --------------------------------------------------------------------------------------------------
# causal_conv.py


def old_and_new(method: str, x: Tensor, size: int = 3) -> tuple[Tensor, Tensor]:
    """A centred convolution's output on x [B, C, T, H, W], and that of its causal version."""
    torch.manual_seed(0)
    old = TemporalConv(x.shape[1], size).double()
    new = TemporalConv(x.shape[1], size, causal=True).double()
    new.load_state_dict({"weight": transfer_weights(old.weight.detach(), method),
                         "bias": old.bias.detach()})
    with torch.no_grad():
        return old(x), new(x)


def test_each_transfer_is_its_formula():
    w = torch.randn(2, 3, 3, 1, 1)
    past, now, future = w[:, :, 0], w[:, :, 1], w[:, :, 2]
    zero, mean = 0 * now, (past + now + future) / 3
    by_hand = {"shift": (past, now, future), "masked": (zero, past, now),
               "mixed": (mean, past, now),
               "extrapolative": (zero, past - future, now + 2 * future)}
    for method, taps in by_hand.items():
        assert torch.allclose(transfer_weights(w, method), torch.stack(taps, dim=2)), method


def test_transfers_hold_for_any_odd_kernel():
    w = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 1, 5, 1, 1)  # on frames t-2 .. t+2
    expected = {"shift": [1, 2, 3, 4, 5], "masked": [0, 0, 1, 2, 3], "mixed": [3, 3, 1, 2, 3],
                "extrapolative": [0, 0, 1, 2 - 4 - 2 * 5, 3 + 2 * 4 + 3 * 5]}
    for method, taps in expected.items():
        assert transfer_weights(w, method).flatten().tolist() == taps, method
        assert torch.equal(transfer_weights(w[:, :, :1], method),
                           w[:, :, :1]), f"{method} of a kernel of one frame"


def test_shift_reproduces_the_old_output_one_frame_late():
    for size in (3, 5):
        old, new = old_and_new("shift", torch.randn(1, 4, 9, 2, 2, dtype=torch.float64), size)
        late = (size - 1) // 2
        assert torch.allclose(new[:, :, late:], old[:, :, :-late])


def test_extrapolative_is_exact_on_inputs_linear_in_time():
    for size in (3, 5):
        start, slope = torch.randn(2, 1, 4, 1, 2, 2, dtype=torch.float64)
        old, new = old_and_new("extrapolative", start + slope * torch.arange(9).view(9, 1, 1), size)
        assert torch.allclose(new[:, :, 2:-2], old[:, :, 2:-2])  # the ends are padded
        old, new = old_and_new("masked", start + slope * torch.arange(9).view(9, 1, 1), size)
        assert not torch.allclose(new[:, :, 2:-2], old[:, :, 2:-2])


def test_masked_and_mixed_keep_the_old_output_where_the_future_is_zero():
    x = torch.randn(1, 4, 6, 2, 2, dtype=torch.float64)
    x[:, :, 4:] = 0
    old, masked = old_and_new("masked", x)
    assert torch.allclose(masked[:, :, 3], old[:, :, 3])  # frame 4 is zero
    _, mixed = old_and_new("mixed", x)
    unseen_before = x.clone()
    unseen_before[:, :, 1] = 0
    old_alone, mixed_alone = old_and_new("mixed", unseen_before)
    # and so is frame 1, which only the mean looks at
    assert torch.allclose(mixed_alone[:, :, 3], old_alone[:, :, 3])
    torch.manual_seed(0)
    mean = TemporalConv(4).double().weight.detach().mean(dim=2)[:, :, 0, 0]
    assert torch.allclose(mixed[:, :, 3] - old[:, :, 3],
                          torch.einsum("oi,bihw->bohw", mean, x[:, :, 1]))


def test_kernels_in_half_precision_are_carried_over_in_float32():
    half = torch.randn(4, 4, 3, 1, 1).half()
    for method in TRANSFER_METHODS:
        carried = transfer_weights(half, method)
        assert carried.dtype == torch.float32
        assert torch.equal(carried, transfer_weights(half.float(), method))


def test_transfer_refuses_what_it_does_not_know():
    with raises(ValueError, "mixed, shift, masked, extrapolative"):
        transfer_weights(torch.zeros(1, 1, 3, 1, 1), "magic")
    with raises(ValueError, "odd"):
        transfer_weights(torch.zeros(1, 1, 4, 1, 1), "mixed")


def test_norm_scopes_see_the_frames_they_name():
    x = 3 * torch.randn(2, 64, 5, 3, 4) + torch.randn(5).view(5, 1, 1)
    norms = {scope: TemporalNorm(32, 64, scope=scope) for scope in ("clip", "past", "frame")}
    for each in norms.values():
        nn.init.normal_(each.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(each.bias, generator=torch.Generator().manual_seed(2))
    plain = nn.GroupNorm(32, 64)
    plain.load_state_dict(norms["clip"].state_dict())
    assert torch.equal(norms["clip"](x), plain(x))
    for t in range(5):
        assert torch.allclose(past_by_definition(plain, x)[:, :, t],
                              plain(x[:, :, : t + 1])[:, :, t])
        assert torch.allclose(norms["past"](x)[:, :, t], past_by_definition(plain, x)[:, :, t],
                              atol=1e-5)
        assert torch.allclose(norms["frame"](x)[:, :, t], plain(x[:, :, t]), atol=1e-5)
    assert torch.allclose(norms["past"](x)[:, :, -1], norms["clip"](x)[:, :, -1], atol=1e-5)


def test_past_norms_compute_in_float32_under_autocast():
    x = torch.randn(1, 64, 4, 3, 4) + 8  # a mean of 8 deviations, which bfloat16 would blur
    norm = TemporalNorm(32, 64, scope="past")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = norm(x)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, norm(x))


# --------------------------------------------------------------------------------------------------
# unet.py, causal_attention.py: agreement with the originals


@torch.no_grad()
def test_unet_agrees_with_dynamicrafter():
    g = golden("unet_tiny")
    x, text, image = network_inputs(g)
    network = with_recipe(UNet(SMALL), "model.diffusion_model.")
    y = network(x, g["timesteps"], text, image, fps=g["fps"])
    assert error_of(y, g["y"].transpose(1, 2)) < 1e-5


@torch.no_grad()
def test_released_vid2world_agrees_with_the_authors():
    path = folder() / "vid2world.ckpt"
    config = replace(SMALL, action_dim=13, default_fps=3)
    torch.save({"state_dict": recipe(released_names(config))}, path)
    network = load_vid2world(path, config).eval()
    g = golden("vid2world_tiny")
    x, text, image = network_inputs(g)
    k, actions, mask = g["timesteps"], align_actions(g["actions"]), g["action_mask"]
    y = network(x, k, text, image, g["fps"], actions, mask)
    assert error_of(y, g["y_4"].transpose(1, 2)) < 1e-5
    # the third quirk: a clip that is not full
    all_tokens = image.flatten(1, 2)[:, None].expand(-1, 3, -1, -1)
    y = network(x[:, :3], k[:, :3], text, all_tokens, g["fps"], actions[:, :3], mask[:, :3])
    assert error_of(y, g["y_3"].transpose(1, 2)) < 1e-5


@torch.no_grad()
def test_autoencoder_agrees_with_the_original_both_ways():
    g = golden("autoencoder_tiny")
    autoencoder = with_recipe(Autoencoder(AutoencoderConfig(32, (1, 2, 2), 1, latent_scale=1.0)),
                              "first_stage_model.")
    assert error_of(autoencoder.moments(g["image"]), g["moments"]) < 1e-5
    assert error_of(autoencoder.decode(g["latent"][None])[0], g["decoded"]) < 1e-5


@torch.no_grad()
def test_resampler_and_both_towers_agree_with_the_originals():
    g = golden("resampler_tiny")
    resampler = with_recipe(Resampler(ResamplerConfig(48, 2, 3, 16, 4, 64, 48, 4)),
                            "image_proj_model.")
    assert error_of(resampler(g["tokens"]), g["y"]) < 1e-5
    g = golden("clip_image_tiny")
    tower = with_recipe(ImageTower(ImageTowerConfig(28, 14, 64, 2, 4, 48)),
                        "embedder.model.visual.")
    assert error_of(tower(g["normalised_image"]), g["tokens"]) < 1e-5
    g = golden("clip_text_tiny")
    tower = with_recipe(TextTower(TextTowerConfig(77, 49408, 48, 3, 3, 48)),
                        "cond_stage_model.model.")
    assert error_of(tower(g["token_ids"]), g["y"]) < 1e-5
    assert torch.equal(tower.empty_caption(), tower(g["token_ids"])[0])


def test_preprocessing_agrees_with_the_original():
    g = golden("clip_preprocess")
    assert error_of(preprocess(g["image"]), g["y"]) < 1e-5


def test_schedule_agrees_with_the_original():
    g = golden("schedule")
    schedule = NoiseSchedule(0.7)
    assert error_of(schedule.alphas_cumprod,
                    g["alphas_cumprod"]) < 1e-5 and schedule.alphas_cumprod[999] == 0
    assert error_of(schedule.scale, g["scale_512"][:1000]) < 1e-5
    assert error_of(NoiseSchedule(0.3).scale, g["scale_1024"][:1000]) < 1e-5
    for steps in (5, 10, 25, 50):
        assert schedule.ddim_levels(steps)[::-1] == g[f"trailing_{steps}"].tolist()
    levels = schedule.ddim_levels(50)
    sigmas = [schedule.ddim_sigma(k, after, 1.0, like=torch.zeros(1)) for k,
              after in zip(levels, levels[1:] + [0], strict=True)]
    assert error_of(torch.cat(sigmas[::-1]), g["ddim50_sigmas_eta1"]) < 1e-5
    embedding = sinusoidal_embedding(torch.tensor([0, 39, 999]), 64)
    assert error_of(embedding, g["timestep_embedding_0_39_999_dim64"]) < 1e-5


def test_full_size_names_and_shapes_are_the_checkpoints():
    theirs = {}
    listed = (HERE / "golden/dynamicrafter_512_keys.tsv").read_text(encoding="utf-8")
    for line in listed.splitlines():
        name, _, shape = line.partition("\t")
        theirs[name] = tuple(int(n) for n in shape.split(",") if n)
    # or a buffer
    leftover = re.compile(
        r"embedder\.model\.(?!visual\.)|cond_stage_model\.model\.logit_scale$|[a-z0-9_]+$")
    theirs = {name: shape for name, shape in theirs.items() if not leftover.match(name)}
    assert len(theirs) == 2500 and names_of(full_size_parts()) == theirs


def test_becoming_causal_changes_no_parameter_but_the_actions():
    parts = full_size_parts(causal=True, norm_scope="past", action_dim=13)
    new = set(names_of(parts)) - set(names_of(full_size_parts()))
    assert new == {f"model.diffusion_model.action_emb_proj.{i}.{leaf}" for i in (0, 2, 4)
                   for leaf in ("weight", "bias")}
    assert sum(isinstance(layer, TemporalConv)
               for layer in parts["model.diffusion_model."].modules()) == 88


# --------------------------------------------------------------------------------------------------
# unet.py: loading


def test_a_dynamicrafter_checkpoint_loads_with_every_transfer():
    path = small_checkpoint()
    stored = {name.removeprefix("model.diffusion_model."): w for name,
              w in read_checkpoint(path)["state_dict"].items()}
    for method in TRANSFER_METHODS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            network = load_dynamicrafter(path, WORLD, transfer=method)
        done = f"32 temporal kernels carried over by '{method}', action embedding new"
        assert done in printed.getvalue()
        for name, tensor in network.state_dict().items():
            if re.search(r"temopral_conv\.conv\d\.[23]\.weight", name):
                assert torch.equal(tensor, transfer_weights(stored[name], method)), name
            elif name.startswith("action_emb_proj"):
                assert name not in stored and tensor.isfinite().all() and tensor.abs().max() > 0
            else:
                assert torch.equal(tensor, stored[name]), name
    passive = load_dynamicrafter(path, SMALL)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in passive.state_dict().items())


def test_loading_takes_no_second_copy():
    path, maps = small_checkpoint(), Path("/proc/self/maps")
    load_dynamicrafter(path, SMALL)  # copied: who writes over the file changes nothing here
    assert not maps.exists() or str(path) not in maps.read_text(encoding="utf-8")
    with mock.patch.object(checkpoint, "SMALL", 0):
        network = load_dynamicrafter(path, SMALL)
    # the weights of a large one are still those of the file
    assert not maps.exists() or str(path) in maps.read_text(encoding="utf-8")
    assert next(network.parameters()).requires_grad


def test_a_checkpoint_that_does_not_fit_is_refused_by_name():
    prefix = "model.diffusion_model."
    missing = small_checkpoint(**{prefix + "out.0.bias": None, prefix + "out.2.bias": None})
    with raises(CheckpointError, r"2 missing \(out.0.bias, out.2.bias\)"):
        load_dynamicrafter(missing, SMALL)
    with raises(CheckpointError, r"1 unexpected \(surprise.weight\)"):
        load_dynamicrafter(small_checkpoint(**{prefix + "surprise.weight": torch.zeros(3)}), SMALL)
    with raises(CheckpointError, r"1 misshapen \(out.0.bias \[7\] for \[32\]\)"):
        load_dynamicrafter(small_checkpoint(**{prefix + "out.0.bias": torch.zeros(7)}), SMALL)
    learnable_scale = {prefix
                       + "input_blocks.1.1.transformer_blocks.0.attn2.alpha": torch.zeros(())}
    with raises(CheckpointError, "DynamiCrafter-256"):
        load_dynamicrafter(small_checkpoint(**learnable_scale), SMALL)
    with raises(CheckpointError, "no checkpoint at"):
        load_dynamicrafter("nowhere.ckpt", SMALL)
    whole = small_checkpoint()
    whole.write_bytes(whole.read_bytes()[:-1000])
    with raises(CheckpointError, "is damaged: it is truncated"):
        load_dynamicrafter(whole, SMALL)


def test_a_checkpoint_that_would_execute_code_is_refused_and_does_not():
    mark, path = folder() / "executed", folder() / "evil.ckpt"
    torch.save({"state_dict": {}, "hook": Exploit(mark)}, path)
    with raises(CheckpointError, "refused"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Exploit(mark)))
    with raises(CheckpointError, "old format or a bare pickle"):
        read_checkpoint(path)
    assert not mark.exists()


def test_checkpoints_that_others_pruned_halved_or_wrapped_load_alike():
    path = small_checkpoint()
    weights = read_checkpoint(path)["state_dict"]
    expected = load_dynamicrafter(path, SMALL).state_dict()

    def load(content: dict, name: str = "other.ckpt") -> dict[str, Tensor]:
        other = folder() / name
        torch.save(content, other)
        return load_dynamicrafter(other, SMALL).state_dict()

    def same(ours: dict[str, Tensor], tolerance: float) -> bool:
        return all(w.dtype == torch.float32 and torch.allclose(w, expected[name], atol=tolerance)
                   for name, w in ours.items())

    assert same(load({"state_dict": {f"module.{name}": w for name, w in weights.items()}}), 0)
    assert same(load({"module": {f"_forward_module.{name}": w for name, w in weights.items()}}), 0)
    averaged = {f"ema.{name}": w + 1 for name, w in weights.items()}
    assert same(load({"state_dict": weights | averaged}), 0)  # the weights themselves are preferred
    assert same(load({"state_dict": {name: w.half() for name, w in weights.items()}}), 1e-3)
    assert same(load({"state_dict": {name: w.bfloat16() for name, w in weights.items()}}), 1e-2)
    pruned = folder() / "pruned_fp16.safetensors"
    write_safetensors(pruned, {name: w.half() for name, w in weights.items()
                               if "ln_final" not in name})
    assert same(load_dynamicrafter(pruned, SMALL).state_dict(), 1e-3)
    with raises(CheckpointError, "holds no model.diffusion_model"):
        load({"state_dict": {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3)}})
    with raises(CheckpointError, "holds several models .a., b.."):
        load({"state_dict": {f"{wrap}.{name}": w for wrap in "ab" for name, w in weights.items()}})


def test_a_checkpoint_is_found_in_a_folder_that_hugging_face_has_left():
    root = folder() / "models--Doubiiu--DynamiCrafter_512"
    (root / "blobs").mkdir(parents=True)
    (snapshot := root / "snapshots" / "0a1b").mkdir(parents=True)
    shutil.copy(TINY_BASE, root / "blobs" / "f00")
    (snapshot / "model.ckpt").symlink_to("../../blobs/f00")
    (snapshot / "small.safetensors").write_bytes(b"0")
    assert saving.checkpoint_file(root) == snapshot / "model.ckpt"
    assert preset_of(root) == "tiny"
    model = from_dynamicrafter(root, PRESETS["tiny"])
    assert sum(p.numel() for p in model.unet.parameters()) > 5e6
    with raises(CheckpointError, "is a folder without a checkpoint.pt"):
        preset_of(root / "blobs")


def test_a_1024_checkpoint_is_told_from_a_512_one_by_its_signal_scale():
    scales = {"512": NoiseSchedule(0.7).scale, "1024": NoiseSchedule(0.3).scale}
    for preset, scale in scales.items():
        assert preset_of(small_checkpoint(scale_arr=scale.half())) == preset
    assert preset_of(small_checkpoint(scale_arr=None)) == "512" and preset_of(TINY_BASE) == "tiny"


def test_a_file_that_is_no_checkpoint_is_called_what_it_is():
    out = folder()
    files = {"empty.ckpt": b"", "lfs.ckpt": b"version https://git-lfs.github.com/spec/v1\noid "
                                            b"sha256:0", "page.ckpt": b"<html>"}
    for (name, content), words in zip(files.items(),
                                      ("is empty", "git lfs pull", "no PyTorch checkpoint"),
                                      strict=True):
        (out / name).write_bytes(content)
        with raises(CheckpointError, words):
            read_checkpoint(out / name)
    with raises(CheckpointError, "is a folder"):
        read_checkpoint(out)
    torch.save([1, 2], out / "list.ckpt")
    with raises(CheckpointError, "holds a list"):
        read_checkpoint(out / "list.ckpt")
    torch.save({"state_dict": {}, "callbacks": {"stopping": signal.Signals.SIGTERM}},
               out / "lightning.ckpt")
    with raises(CheckpointError, "Lightning file.*refused"):
        read_checkpoint(out / "lightning.ckpt")


def test_a_large_checkpoint_is_checked_once():
    path = small_checkpoint()
    with mock.patch.object(checkpoint, "SMALL", 0):
        assert not checkpoint.remembered_checks(path).exists()
        read_checkpoint(path)
        assert checkpoint.remembered_checks(path).exists()
        os.utime(path, ns=(1, 1))  # another file
        assert not checkpoint.remembered_checks(path).exists()


# --------------------------------------------------------------------------------------------------
# unet.py: causality


def leaks(network: UNet, inputs: dict[str, Tensor], t: int = 2) -> list[str]:
    """The inputs after frame t that reach outputs up to t, by value or by gradient."""
    found = []
    with torch.no_grad():
        y = network(**inputs)[:, : t + 1]
        for name in ("x", "k", "image", "actions", "action_mask"):
            changed = inputs[name].clone()
            changed[:, t + 1 :] = 7 if name == "k" else 0.5
            if not torch.equal(network(**inputs | {name: changed})[:, : t + 1], y):
                found.append(name)
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "image", "actions")}
    network(**inputs | leaves)[:, : t + 1].square().sum().backward()
    found += [f"gradient of {name}" for name, leaf in leaves.items()
              if leaf.grad[:, t + 1 :].abs().max() > 0]
    return found


def test_future_frames_never_reach_the_past():
    for scope in ("past", "frame"):
        network, inputs = causal_network(scope)
        assert leaks(network, inputs) == [], scope
        y = network(**inputs)
        for name in ("x", "k", "image", "actions", "action_mask"):  # and yet the past is looked at
            changed = inputs[name].clone()
            changed[:, 2] = 7 if name == "k" else 0.5
            assert not torch.equal(network(**inputs | {name: changed})[:, 3:],
                                   y[:, 3:]), f"{scope}: {name} has no effect"


@torch.no_grad()
def test_the_first_frames_alone_give_the_same_outputs():
    for scope in ("past", "frame"):
        network, inputs = causal_network(scope)
        whole = network(**inputs)
        for t in range(1, 6):
            first = network(**{name: value if name == "text" else value[:, :t] for name,
                               value in inputs.items()})
            assert error_of(first, whole[:, :t]) < 1e-5, (scope, t)


def test_norms_over_the_whole_clip_leak_the_future():
    network, inputs = causal_network("clip")
    found = leaks(network, inputs)
    assert "x" in found and "gradient of x" in found and "actions" in found


@torch.no_grad()
def test_norm_scopes_agree_on_a_single_frame():
    outputs = []
    for scope in ("clip", "past", "frame"):
        network, inputs = causal_network(scope)
        outputs.append(network(**{name: value if name == "text" else value[:, :1] for name,
                                  value in inputs.items()}))
    assert error_of(outputs[1], outputs[0]) < 1e-5 and error_of(outputs[2], outputs[0]) < 1e-5


def test_a_new_network_predicts_zero_and_its_temporal_layers_change_nothing():
    network = UNet(WORLD)
    _, inputs = causal_network("frame")
    assert network(**inputs).abs().max() == 0
    zero = [name for name, w in network.named_parameters() if name.endswith("weight")
            and w.ndim > 1 and not w.any()]
    kinds = {re.sub(r"^(\w+_blocks?\.[\d.]+|init_attn\.0\.)", "", name) for name in zero}
    assert kinds == {"temopral_conv.conv4.3.weight", "out_layers.3.weight", "proj_out.weight",
                     "out.2.weight",
                     "fps_embedding.2.weight"}


def test_recomputing_activations_changes_no_gradient():
    network, inputs = causal_network("past")
    gradients = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(**inputs).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()
                                    if p.grad is not None]))
    assert error_of(gradients[1], gradients[0]) < 1e-6


# --------------------------------------------------------------------------------------------------
# diffusion_forcing.py


def test_levels_are_uniform_and_independent_per_frame():
    generator = torch.Generator().manual_seed(0)
    k = draw_levels((5000, 4), generator)
    assert k.min() >= 0 and k.max() <= 999 and abs(k.float().mean() - 499.5) < 5
    assert torch.corrcoef(k.T.float())[0, 1:].abs().max() < 0.05
    shared = draw_levels((50, 4), generator, shared=True)
    assert (shared == shared[:, :1]).all() and len(shared.unique()) > 40
    clear = draw_levels((5000, 4), generator, clear=0.6)
    assert abs((clear < 100).float().mean() - (0.6 + 0.4 * 0.1)) < 0.02


def test_velocity_and_noise_determine_each_other():
    schedule, k = NoiseSchedule(), torch.tensor([[0, 39, 999], [250, 500, 750]])
    z, noise = torch.randn(2, 2, 3, 4, 5, 6)
    x, v = schedule.add_noise(z, k, noise), schedule.velocity(z, k, noise)
    alpha = schedule.alphas_cumprod[k].view(2, 3, 1, 1, 1)
    scale = schedule.scale[k].view(2, 3, 1, 1, 1)
    assert torch.allclose(alpha.sqrt() * x - (1 - alpha).sqrt() * v, scale * z, atol=1e-5)
    assert torch.allclose(alpha.sqrt() * v + (1 - alpha).sqrt() * x, noise, atol=1e-5)
    assert torch.equal(x[0, 2], noise[0, 2])  # level 999 is noise alone


def test_sampling_with_the_true_velocity_returns_the_clean_latents():
    schedule, z, noise = NoiseSchedule(), *torch.randn(2, 1, 1, 4, 5, 6)
    for steps in (1, 10, 50):
        levels = schedule.ddim_levels(steps)
        x = schedule.add_noise(z, levels[0], noise)
        for k, k_next in zip(levels, levels[1:] + [0], strict=True):
            x = schedule.ddim_step(x, schedule.velocity(z, k, noise), k, k_next, eta=0.0)
            assert torch.allclose(x, schedule.add_noise(z, k_next, noise), atol=1e-4)
    alpha = schedule.alphas_cumprod[0]  # and at the end no signal scale is left in
    assert torch.allclose((x - (1 - alpha).sqrt() * noise) / alpha.sqrt(), z, atol=1e-3)


def test_fresh_noise_keeps_the_variance_of_a_level():
    schedule = NoiseSchedule()
    z, noise, fresh = torch.zeros(1, 1, 100_000), *torch.randn(2, 1, 1, 100_000)
    for eta in (0.0, 0.5, 1.0):
        x = schedule.ddim_step(noise * (1 - schedule.alphas_cumprod[499]).sqrt(),
                               schedule.velocity(z, 499, noise), 499, 299, eta, fresh)
        assert abs(x.var().item() / (1 - schedule.alphas_cumprod[299]).item() - 1) < 0.03, eta


def test_the_loss_is_zero_for_a_network_that_knows_and_compares_velocities():
    schedule, k = NoiseSchedule(), torch.randint(1000, (2, 3))
    z, noise = torch.randn(2, 2, 3, 4, 5, 6)
    assert diffusion_forcing_loss(lambda x, k: schedule.velocity(z, k, noise), schedule, z, k,
                                  noise) == 0
    nothing = diffusion_forcing_loss(lambda x, k: torch.zeros_like(x), schedule, z, k, noise)
    assert torch.allclose(nothing, schedule.velocity(z, k, noise).square().mean())


def test_the_loss_in_clean_latents_is_the_error_of_what_the_velocity_stands_for():
    schedule, k = NoiseSchedule(), torch.randint(1000, (2, 3))
    z, noise = torch.randn(2, 2, 3, 4, 5, 6)
    guess = torch.randn_like(z)
    loss = diffusion_forcing_loss(lambda x, k: guess, schedule, z, k, noise, weighting="clean")
    alpha = schedule.alphas_cumprod[k].view(2, 3, 1, 1, 1)
    scale = schedule.scale[k].view(2, 3, 1, 1, 1)
    clean = alpha.sqrt() * schedule.add_noise(z, k, noise) - (1 - alpha).sqrt() * guess
    assert torch.allclose(loss, (clean - scale * z).square().mean(), rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# action_guidance.py


def test_actions_are_aligned_with_the_frame_they_lead_to():
    actions = torch.arange(1.0, 7).view(1, 3, 2)
    assert align_actions(actions).tolist() == [[[0, 0], [1, 2], [3, 4]]]


def test_actions_are_dropped_independently_per_frame():
    mask = drop_actions(torch.zeros(4000, 8, 3), 0.2, torch.Generator().manual_seed(0))
    dropped = 1 - mask
    assert set(mask.unique().tolist()) == {0, 1} and abs(dropped.mean() - 0.2) < 0.01
    together = (dropped[:, 1:] * dropped[:, :-1]).mean()
    assert abs(together - 0.2**2) < 0.005


@torch.no_grad()
def test_a_dropped_action_is_not_an_action_of_zeros():
    network, inputs = causal_network("frame")
    zeros = network(**inputs | {"actions": torch.zeros(1, 6, 13)})
    dropped = network(**inputs | {"action_mask": torch.zeros(1, 6)})
    without = network(**{name: value for name, value in inputs.items()
                         if not name.startswith("action")})
    assert torch.equal(dropped, without) and not torch.allclose(zeros, dropped)


def test_guidance_exaggerates_and_rescale_restores_the_contrast():
    v_cond, v_uncond = torch.randn(2, 2, 3, 4, 5, 6)
    assert torch.allclose(guide(v_cond, v_uncond, 1.0), v_cond,
                          atol=1e-6) and torch.equal(guide(v_cond, v_uncond, 0.0), v_uncond)
    assert torch.allclose(guide(v_cond, v_uncond, 3.0), 3 * v_cond - 2 * v_uncond, atol=1e-5)
    rescaled = guide(v_cond, v_uncond, 3.0, rescale=1.0)
    assert torch.allclose(rescaled.std((-3, -2, -1)), v_cond.std((-3, -2, -1)), rtol=1e-4)


# --------------------------------------------------------------------------------------------------
# data.py, episodes/


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
    assert any("short is damaged: it has 6 frames and 4 actions" in complaint
               for complaint in open_episodes("rt1", root).complaints)
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
        with raises(DataError, "no readable picture|pixels"):
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


def test_train_and_validation_are_disjoint_stable_and_follow_shard_names():
    root = make_rt1([4] * 40, shards=4)
    names = {split: {e.name for e in open_episodes("rt1", root, split)}
             for split in ("train", "val", "all")}
    assert not names["train"] & names["val"] and len(names["val"]) == 5
    assert names["train"] | names["val"] == names["all"]
    held_out = ("import data, sys; "
                "print(sorted(e.name for e in data.open_episodes('rt1', sys.argv[1], 'val')))")
    other = subprocess.run([sys.executable, "-c", held_out, root], cwd=HERE, capture_output=True,
                           text=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert other.stdout.strip() == str(sorted(names["val"]))  # not by Python's hash
    named, val = make_rt1([4] * 3, name="x-train"), make_rt1([5] * 2, name="y-val")
    shard_of(val).rename(named / "y-val.tfrecord-00000-of-00001")
    assert [e.length for e in open_episodes("rt1", named, "val")] == [5, 5]
    assert [e.length for e in open_episodes("rt1", named, "train")] == [4, 4, 4]


def test_clips_are_the_same_in_any_number_of_workers():
    episodes = open_episodes("rt1", make_rt1([6, 9, 12, 7]), min_length=5)
    streams = []
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Clips(episodes, 5, (32, 32), seed=3),
                                             collate_fn=collate, num_workers=workers,
                                             batch_sampler=[[0, 1], [2, 3], [4, 5]])
        streams.append([(batch["frames"], batch["actions"]) for batch in loader])
    for stream in streams[1:]:
        assert all(torch.equal(a, b) for batch, other in zip(streams[0], stream, strict=True) for a,
                   b in zip(batch, other, strict=True))
    other_seed = Clips(episodes, 5, (32, 32), seed=4)
    assert any(not np.array_equal(other_seed[i]["actions"], streams[0][0][1][i]) for i in (0, 1))


def test_every_place_of_every_episode_is_drawn_equally_often():
    episodes = open_episodes("rt1", make_rt1([5, 8]), min_length=5)
    clips, seen = Clips(episodes, 5, (32, 32), seed=0), []
    read = data.Episode.read
    def spy(self, start, stop):
        seen.append((self.length, start))
        return read(self, start, stop)
    data.Episode.read = spy
    try:
        for i in range(300):
            clips[i]
    finally:
        data.Episode.read = read
    counts = {place: seen.count(place) for place in set(seen)}
    assert set(counts) == {(5, 0), (8, 0), (8, 1), (8, 2), (8, 3)} and min(counts.values()) > 35


def test_frames_are_fitted_as_the_published_models_saw_them():
    rt1 = fit_frames(np.full((1, 256, 320, 3), 200, np.uint8), 320, 512)  # 320×400, and bars
    assert rt1.shape == (1, 320, 512, 3) and rt1[:, :, 56:-56].min() == 200
    assert rt1[:, :, :56].max() == 0 and rt1[:, :, -56:].max() == 0
    csgo = fit_frames(np.full((1, 150, 280, 3), 200, np.uint8), 320, 512)  # 275×512
    assert (csgo[0, :, 0, 0] > 0).sum() == 275 and csgo[0, :22].max() == 0 < csgo[0, 22].min()
    half = np.zeros((1, 64, 64, 3), np.uint8)
    half[:, :, 32:] = 200
    cropped = fit_frames(half, 64, 80, "crop")
    assert cropped.shape == (1, 64, 80, 3)
    assert cropped[0, :, :38].max() == 0 and cropped[0, :, 42:].min() == 200
    assert np.array_equal(fit_frames(half, 64, 64), half)
    ramp = np.zeros((1, 4, 4, 3), np.uint8) + np.arange(0, 200, 50, dtype=np.uint8)[:, None, None]
    # bilinear
    assert fit_frames(ramp, 8, 8)[0, :, 0, 0].tolist() == [0, 13, 38, 63, 88, 113, 138, 150]


def test_training_clips_vary_in_light_and_place_alike_in_all_frames():
    clip = np.tile(open_episodes("rt1", SAMPLES, "val")[0].read(0, 1)[0], (3, 1, 1, 1))
    varied = [data.augment(clip, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.array_equal(v[0], v[1]) and v.shape == clip.shape and v.dtype == np.uint8
               for v in varied)
    brightness = np.array([v.mean() for v in varied]) / clip.mean()
    assert brightness.std() > 0.02 and (np.abs(brightness - 1) < 0.15).all()
    dot = np.full((1, 16, 16, 3), 100, np.uint8)
    dot[0, 8, 8] = 255
    moves = set()
    for seed in range(40):
        moved = data.augment(dot, np.random.default_rng(seed))[0].sum(-1)
        moves.add(tuple(np.abs(np.subtract(np.unravel_index(moved.argmax(), (16, 16)), 8))))
    assert moves == {(y, x) for y in range(3) for x in range(3)}
    episodes = open_episodes("rt1", make_rt1([6] * 4), min_length=5)
    plain, augmented = (Clips(episodes, 5, (32, 40), seed=0, augment=a)[0] for a in (False, True))
    assert np.array_equal(plain["actions"], augmented["actions"])
    assert not np.array_equal(plain["frames"], augmented["frames"])
    again = Clips(episodes, 5, (32, 40), seed=0, augment=True)[0]
    assert np.array_equal(again["frames"], augmented["frames"])


def test_a_damaged_episode_is_skipped_and_reported():
    root = make_rt1([6] * 8)
    shard = shard_of(root)
    flip_byte(shard, shard.stat().st_size // 2)
    episodes = open_episodes("rt1", root, min_length=5)
    clips = [Clips(episodes, 5, (32, 32), seed=0)[i] for i in range(60)]
    messages = {message for clip in clips for message in clip["damaged"]}
    assert all(clip["frames"] is not None
               for clip in clips) and len(messages) == 1 and "checksum" in messages.pop()


def test_bad_data_is_named_and_refused():
    with raises(DataError, "no folder /nowhere"):
        open_episodes("rt1", "/nowhere")
    with raises(DataError, "holds no episodes"):
        open_episodes("rt1", folder())
    with raises(DataError, "no data set 'rt2'"):
        open_episodes("rt2", folder())
    root = make_rt1([5, 6])
    with raises(DataError, "2 shorter than 16 frames; the longest has 6"):
        open_episodes("rt1", root, min_length=16)
    with raises(DataError, "does not hold this data set: there is no feature "
                           "'steps/observation/image_0'"):
        open_episodes("bridge", root)
    cut = make_rt1([5, 6])
    shard_of(cut).write_bytes(shard_of(cut).read_bytes()[:-50])
    with raises(DataError, "is truncated"):
        open_episodes("rt1", cut)
    header = make_rt1([5, 6])
    flip_byte(shard_of(header), 0)
    with raises(DataError, "fails its checksum"):
        open_episodes("rt1", header)
    payload = make_rt1([5])
    flip_byte(shard_of(payload), 600)
    with raises(DataError, "checksum does not match|1 damaged"):
        _ = open_episodes("rt1", payload)[0].frames


def test_a_folder_of_pictures_is_a_data_set():
    keys = {"ArrowUp": {"up": 9.5}, " ": {"across": 1, "toggles": True, "label": "hand"}}
    root = make_pictures([12, 5, 7, 6], fps=5, names=["up", "across"], keys=keys)
    np.savez(root / "more.npz", image=np.zeros((8, 32, 40, 3), np.uint8), action=np.ones((8, 2)))
    episodes = open_episodes("folder", root)
    dataset = episodes.dataset
    assert {e.name: e.length for e in episodes} == {
        "episode_000": 12, "episode_001": 5, "episode_002": 7, "episode_003": 6, "more": 8}
    assert dataset.action_dim == 2 and dataset.aspect == (32, 40) and dataset.fps == 5
    assert dataset.names == ("up", "across") and dataset.keys["ArrowUp"].value == 9.5
    assert dataset.keys[" "].label == "hand" and dataset.keys[" "].toggles
    frames, actions = make_episode(12, seed=0)
    first = next(e for e in episodes if e.name == "episode_000")
    assert np.array_equal(first.frames, frames)  # 10.png after 9.png
    assert np.array_equal(first.actions, (3 + 50 * actions[:, 10:12]).astype(np.float32))
    part, taken = first.read(9, 12)
    assert np.array_equal(part, frames[9:]) and np.array_equal(taken, first.actions[9:])
    val, rest = (open_episodes("folder", root, split) for split in ("val", "train"))
    assert len(val) == 1 and {e.name for e in val} | {e.name for e in rest} == {
        e.name for e in episodes}
    assert open_episodes("folder", root, fps=7).dataset.fps == 7  # the user goes before info.json
    # actions of one number may be a row
    (root / "info.json").unlink()
    for path in root.glob("*/actions.npy"):
        np.save(path, np.load(path)[:, 0])
    (root / "more.npz").unlink()
    assert open_episodes("folder", root)[0].actions.shape == (12, 1)


def test_a_folder_is_indexed_again_where_a_picture_came_or_went():
    root = make_pictures([6, 6, 6])
    assert len(open_episodes("folder", root)) == 3
    gone = root / "episode_001" / "5.png"
    content = gone.read_bytes()
    gone.unlink()
    short = open_episodes("folder", root)
    assert len(short) == 2 and short.damaged == 1
    gone.write_bytes(content)
    assert len(open_episodes("folder", root)) == 3


def test_bad_folders_are_named_and_refused():
    refused(train.main, "--data", "folder", saying="name it with --root")
    with raises(DataError, "expected folders of pictures with an actions.npy"):
        open_episodes("folder", folder())
    with raises(DataError, "one episode, and to learn and to measure takes at least two"):
        open_episodes("folder", make_pictures([6]), "val")
    (make_pictures([6], bare := folder()) / "episode_000" / "actions.npy").unlink()
    code, words = run_command(train.main, "--data", "folder", "--root", bare)
    assert code == 2 and "pictures and no actions.npy (episode_000)" in words, words
    root = make_pictures([6, 6, 6, 6, 6])
    (root / "episode_001" / "actions.npy").unlink()
    (root / "episode_002" / "3.png").unlink()
    (root / "episode_003" / "2.png").write_text("no picture", encoding="utf-8")
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        episodes = open_episodes("folder", root)
    assert "1 folders hold pictures and no actions.npy (episode_001)" in words.getvalue()
    assert list(episodes.complaints) == [
        "episode episode_002 is damaged: it has 5 pictures and 6 rows in actions.npy"]
    with raises(DataError, "episode_003 is damaged: 2.png is no readable picture"):
        _ = next(e for e in episodes if e.name == "episode_003").frames
    np.save(root / "episode_004" / "actions.npy", np.zeros((6, 3)))
    with raises(DataError, "episode_004.*its actions have 3 numbers, not 2"):
        open_episodes("folder", root)
    for content, saying in (
            ("{", "JSONDecodeError"), ("[]", "expected a table"), ('{"fsp": 3}', "has 'fsp'"),
            ('{"fps": "3"}', "fps is '3'"), ('{"names": ["a"]}', "expected 2 different names"),
            ('{"names": ["a", "a"]}', "expected 2 different names"),
            ('{"absolute": 1}', "absolute is 1"), ('{"keys": []}', r"keys is \[\]; .*a table"),
            ('{"names": ["a", "b"], "keys": {"w": {"c": 1}}}', "the name one of a, b"),
            ('{"keys": {"w": {"a": 1}}}', "there are none"),
            ('{"names": ["a", "b"], "keys": {"w": ["a", 1]}}', "keys.w is .*a table"),
            ('{"names": ["a", "b"], "keys": {"w": {"a": 1, "b": 1}}}', "one number"),
            ('{"names": ["a", "b"], "keys": {"w": {"a": NaN}}}', "one number")):
        bad = make_pictures([6])
        (bad / "info.json").write_text(content, encoding="utf-8")
        with raises(DataError, saying):
            open_episodes("folder", bad)


def test_actions_of_your_own_are_learned_in_units_of_their_deviation():
    root = make_pictures([6, 9, 7, 5, 6, 8], width=13)
    episodes = open_episodes("folder", root, "train")
    mean, deviation = data.action_statistics(episodes)
    taken = np.concatenate([e.actions for e in episodes]).astype(np.float64)
    assert np.allclose(mean, taken.mean(0)) and np.allclose(deviation, taken.std(0))
    model = small_world().model
    plain = torch.full((2, 13), 1e6)
    assert torch.equal(model.standardise(plain), plain)
    model.set_action_statistics(mean, deviation)
    learned = model.standardise(torch.from_numpy(taken).float())
    assert (learned[:, :2].mean(0).abs() < 1e-5).all() and torch.allclose(
        learned[:, :2].std(0, correction=0), torch.ones(2))
    assert not learned[:, 2:].any()  # what never varies is left alone
    assert model.standardise(plain)[0, :3].tolist() == [5, 5, 1e6]
    # training and a rollout hand the network the same numbers
    read = []
    def spy(x, k, anchor, context, actions, mask, *others):
        read.append(actions)
        return torch.zeros_like(x)
    model.denoise = spy
    frames, actions = torch.zeros(1, 4, 16, 16, 3, dtype=torch.uint8), torch.from_numpy(taken[:4])
    actions = actions.float()[None]
    draws = train.draw(model, actions, [0], Settings(action_dropout=0))
    train.PostTraining(model, bf16=False)(frames, actions, draws)
    assert torch.equal(read[0], align_actions(model.standardise(actions)))
    world = WorldModel(model, overlap=2, steps=1, guidance=1.0, streaming=False)
    world.reset(frames[0, :3].numpy(), actions[0, :2].numpy())
    world.step(actions[0, 2].numpy())
    assert torch.equal(read[-1], read[0])


@small_preset()
def test_a_folder_of_your_own_trains_rolls_out_and_plays():
    root, out = make_pictures([6] * 9, width=3, fps=5, names=["up", "across", "idle"]), folder()
    words = ["--data", "folder", "--root", root, "--base", save_world(out / "other"), "--out",
             out / "run", "--frames", 4, "--size", 32, 32, "--batch", 2, "--workers", 0, "--steps",
             1, "--set", "val_clips=2"]
    code, output = run_command(train.main, *words)
    assert code == 0 and "action idle never varies" in output, output
    assert "action embedding new" in output, output
    code, output = run_command(train.main, "--resume", "--out", out / "run", "--steps", 2)
    assert code == 0, output
    world = sample.load_world(out / "run", steps=1, guidance=1.0)
    mean, deviation = data.action_statistics(open_episodes("folder", root, "train"))
    assert np.allclose(world.model.action_statistics[0, :2], mean[:2])
    assert world.model.config.unet.default_fps == 5
    passes, denoise = [], world.model.denoise  # what the network reads is standardised
    def spy(x, k, anchor, context, actions, *others):
        passes.append(actions)
        return denoise(x, k, anchor, context, actions, *others)
    world.model.denoise = spy
    world.reset(np.zeros((1, 32, 40, 3), np.uint8))
    world.step(mean + deviation)
    assert torch.allclose(passes[-1][0, -1, :2], torch.ones(2), atol=1e-4)
    # sample.py and play know the data set from the checkpoint
    code, output = run_command(sample.main, "--checkpoint", out / "run", "--steps", 1, "--frames",
                               3, "--out", out)
    assert code == 0 and "data: folder" in output and "warning" not in output, output
    dataset = with_keys(open_episodes("folder", root).dataset, world.model)
    assert [key.label for key in dataset.keys.values()] == ["-up", "+up", "-across", "+across"]
    keyboard = Keyboard(dataset)
    keyboard.press(["ArrowRight"])
    assert np.allclose(keyboard.take_action()[:2], mean[:2] + [2 * deviation[0], 0])
    # another frame rate is told, other actions are refused
    other = make_pictures([6] * 3, width=3, fps=9, names=["up", "across", "idle"])
    code, output = run_command(sample.main, "--checkpoint", out / "run", "--root", other, "--steps",
                               1, "--frames", 3, "--out", out)
    assert code == 0 and "9 frames a second, but this model has learned from 5" in output, output
    other = make_pictures([6] * 3, width=3, fps=5, names=["across", "up", "idle"])
    refused(sample.main, "--checkpoint", out / "run", "--root", other,
            saying="across, up, idle, but this model has learned from up, across, idle")
    refused(sample.main, "--checkpoint", out / "run", "--root", make_pictures([6] * 3),
            saying="actions of 2 numbers, but this model takes 3")


@small_preset()
def test_a_world_goes_on_with_other_actions():
    one = load_model(path := save_world(folder() / "one"))
    theirs = dict(one.named_parameters())
    for width, kept in ((3, False), (13, True)):
        unet = replace(one.config.unet, action_dim=width, default_fps=5)
        two = from_world(path, replace(one.config, unet=unet, size=(32, 48)))
        assert two.action_dim == width and two.config.size == (32, 48)
        assert two.unet.config.default_fps == 5 and two.action_statistics.shape == (3, width)
        for name, weight in two.named_parameters():
            same = weight.shape == theirs[name].shape and torch.equal(weight, theirs[name])
            assert same or ("action_emb" in name and not kept), name
    passive = save_world(folder() / "passive", causal=False, action_dim=None)
    with raises(CheckpointError, "is a passive run: bundle it first"):
        from_world(passive, one.config)


def test_a_strip_says_what_led_to_each_frame():
    video, out = np.zeros((10, 64, 80, 3), np.uint8), folder()
    pictures.save_strip(out / "plain.png", {"imagined": video})
    captions = ["", *["w, left click, mouse +1000, -200"] * 9]
    pictures.save_strip(out / "told.png", {"imagined": video}, captions=captions)
    plain, told = (np.asarray(Image.open(out / f"{name}.png").convert("L")).astype(int)
                   for name in ("plain", "told"))
    assert told.shape[1] == plain.shape[1] and told.shape[0] > plain.shape[0] + 2 * 30
    below = told[26 + 128 :][:30]  # the frames are shown 128 pixels high
    assert (below[:, :160] == 255).all() and all((below[:, 162 * x :][:, :160] < 128).any()
                                                 for x in range(1, 8))
    lines = pictures.wrap("w, left click, mouse +1000, -200", 150, ImageFont.load_default(13))
    assert lines.replace("\n", " ") == captions[1] and "\n" in lines


def test_the_51_numbers_of_csgo_are_read_in_words():
    assert describe_csgo(csgo_action(["w", "left click"], x=30)) == "w, left click, mouse +30, 0"
    assert describe_csgo(csgo_action()) == "mouse 0, 0"
    assert describe_csgo(csgo_action(["ctrl"], x=-1000, y=200)) == "ctrl, mouse -1000, +200"
    assert csgo_action().sum() == 2 and len(csgo_action()) == 51
    keyboard = Keyboard(DATA_SETS["csgo"])
    assert np.array_equal(keyboard.take_action(), csgo_action())
    keyboard.press(["w", "ArrowRight", "Enter"])
    assert data.describe_action(DATA_SETS["csgo"], keyboard.take_action()) == (
        "w, left click, mouse +60, 0")
    keyboard.press(["w"])
    keyboard.move([20, 0])
    keyboard.move([70, -3])  # the nearest bins of 90 and -3
    assert describe_csgo(keyboard.take_action()) == "w, mouse +100, -4"
    assert describe_csgo(keyboard.take_action()) == "w, mouse 0, 0"


def test_the_arena_is_recorded_in_csgos_layout():
    text = record_arena.map_text(hall := record_arena.draw_hall(0))
    assert text.count("linedef") == text.count("vertex") == 4 + 4 * len(hall["pillars"])
    assert set(hall["walls"]) <= set(re.findall(r'texturemiddle = "(\w+)"', text))
    record_arena.write_wad(path := folder() / "hall.wad", text)
    content = path.read_bytes()
    count, directory = np.frombuffer(content[4:12], "<i4")
    lumps = {}
    for entry in (content[directory + 16 * i :][:16] for i in range(count)):
        begin, size = np.frombuffer(entry[:8], "<i4")
        lumps[entry[8:].rstrip(b"\0")] = content[begin : begin + size]
    assert list(lumps) == [b"MAP01", b"TEXTMAP", b"ENDMAP"] and lumps[b"TEXTMAP"] == text.encode()
    random, payloads = np.random.default_rng(0), []
    for behaviour in record_arena.BEHAVIOURS:
        planned = record_arena.plan(behaviour, random, 24)
        counts = np.array([count for _, count in planned])
        assert len(planned) == 24 and abs(counts).max() <= record_arena.FASTEST
        actions = np.array([csgo_action(sorted(down), x=count) for down, count in planned])
        frames = random.integers(0, 256, (24, 64, 80, 3), dtype=np.uint8)
        payloads.append(encode_example({
            "steps/observation/image": [encode_jpeg(frame) for frame in frames],
            "steps/action": actions.ravel(), "steps/observation/pose": np.zeros(72, np.float32)}))
    write_records(path.parent / "csgo_arena-val.tfrecord-00000-of-00001", payloads)
    episodes = open_episodes("csgo", path.parent, "val")
    assert len(episodes) == 6 and episodes.dataset.aspect == (64, 80)
    assert episodes.dataset.network_fps == 9 and episodes[0].actions.shape == (24, 51)
    assert np.array_equal(episodes[5].actions, actions)
    assert episodes[0].feature("steps/observation/pose").shape == (24, 3)
    assert data.as_compared(episodes[0].frames, episodes.dataset).shape == (24, 64, 80, 3)


def test_the_held_out_clips_of_csgo_are_the_published_ones():
    # The published evaluation draws 500 first frames and hands them to its files in the order of
    # their paths, two hundred files to a folder.
    lines = DATA_SETS["csgo"].protocol.read_text(encoding="utf-8").split("\n")[:-1]
    begins = {name: int(first) for name, first in map(str.split, lines)}
    def path(name: str) -> str:
        first = (int(re.search(r"_(\d+)\.", name)[1]) - 1) // 200 * 200 + 1
        return f"{first}-{first + 199}/{name}"
    drawn = np.random.RandomState(42).randint(0, 984, 500)
    assert [begins[name] for name in sorted(begins, key=path)] == drawn.tolist()


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


def test_a_released_csgo_checkpoint_rolls_out():
    needs("h5py")
    root, out = make_csgo(["hdf5_dm_july2021_3.hdf5"], frames=390), folder()
    config = ModelConfig(unet=replace(SMALL, default_fps=3), size=(32, 48),
                         autoencoder=AutoencoderConfig(32, (1, 2), 1),
                         image_tower=ImageTowerConfig(28, 14, 64, 2, 4, 48),
                         text_tower=TextTowerConfig(77, 49408, 48, 3, 3, 48),
                         resampler=ResamplerConfig(48, 1, 3, 16, 16, 64, 48, 4))
    names = released_names(replace(SMALL, action_dim=51, action_table=True))
    assert any("action_emb_preprocess" in name for name in names)
    released = {name: torch.randn(shape) * 0.05 for name, shape in names.items()}
    passive = [f"model.diffusion_model.{name}" for name in UNet(SMALL).state_dict()]
    path, before = small_checkpoint(**dict.fromkeys(passive) | released), sample.load_world
    saving.from_vid2world = partial(from_vid2world, config=config)
    sample.load_world = partial(sample.load_world, overlap=2)
    try:
        code, output = run_command(
            sample.main, "--checkpoint", path, "--data", "csgo", "--root", root, "--steps", 1,
            "--frames", 6, "--guidance", 1, "--out", out)
        assert code == 0 and output.count("PSNR") == 2, output  # four of the six are given
        assert (out / "csgo_val0_guidance1.png").exists()
        world = sample.load_world(path, steps=1, guidance=1.0)
        episodes = open_episodes("csgo", root, "val")
        tally = evaluate.evaluate(world, episodes, frames=6, context=4)
        assert tally.sums["psnr"].shape == (2,) and "psnr without bars" not in tally.sums
    finally:
        sample.load_world, saving.from_vid2world = before, from_vid2world


def test_frames_are_compared_as_the_published_figures_were():
    frames = np.random.default_rng(0).integers(0, 256, (2, 150, 280, 3), dtype=np.uint8)
    smooth = np.stack([np.asarray(Image.fromarray(frame).resize((7, 5)).resize((280, 150)))
                       for frame in frames])
    fitted = fit_frames(smooth, 320, 512)
    compared = data.as_compared(fitted, DATA_SETS["csgo"])
    assert compared.shape == smooth.shape and psnr(compared, smooth).min() > 35
    assert data.as_compared(fitted[None], DATA_SETS["csgo"]).shape == (1, 2, 150, 280, 3)
    rt1 = fit_frames(smooth[:, :, :187], 320, 512)  # the aspect of 256×320
    assert np.array_equal(data.as_compared(rt1, DATA_SETS["rt1"]), rt1)
    assert cut_bars(rt1, (256, 320)).shape == (2, 320, 400, 3)


def test_a_lerobot_data_set_is_converted_frame_by_frame():
    # testing/lerobot was written by the lerobot package: 0.3.3 (v2.1) and 0.4.4 (v3.0), by
    # testing/write_lerobot.py. Each picture shows the number of its frame in a row of bits.
    needs("pyarrow", "av")
    def number(frame: np.ndarray) -> int:
        return sum(1 << bit for bit in range(8)
                   if frame[10:15, bit * 8 + 2 : bit * 8 + 6].mean() > 135)
    random = np.random.default_rng(0)
    actions = [random.standard_normal((length, 3)).astype(np.float32) for length in (20, 17, 23)]
    for version in ("v2.1", "v3.0"):
        source, out = HERE / "testing" / "lerobot" / version, folder() / "converted"
        words = [source, out, "--camera", "wrist"]
        code, output = run_command(from_lerobot.main, *words)
        assert code == 0 and "3 episodes in" in output, output
        episodes = open_episodes("folder", out)
        assert [e.length for e in episodes] == [20, 17, 23] and episodes.dataset.fps == 10
        assert episodes.dataset.names == ("x", "y", "g")
        for i, episode in enumerate(episodes):
            assert np.load(episode.path).dtype == np.float32
            assert np.array_equal(np.load(episode.path), actions[i])
            assert [number(frame) for frame in episode.frames] == list(range(32 * i, 32 * i +
                                                                             episode.length))
        # interrupted and started again: what is there stays, the rest comes
        kept = out / "episode_000000" / "actions.npy"
        stamp = kept.stat().st_mtime_ns
        shutil.rmtree(out / "episode_000001")
        assert run_command(from_lerobot.main, *words)[0] == 0
        assert len(open_episodes("folder", out)) == 3 and kept.stat().st_mtime_ns == stamp
    refused(from_lerobot.main, source, out, "--camera", "top", saying="there is no camera 'top'")
    refused(from_lerobot.main, source, out, "--action", "act", saying="there is no 'act'")
    refused(from_lerobot.main, folder(), out, saying="is no LeRobot data set")
    shutil.copytree(source, broken := folder() / "broken")
    for name, content, saying in (("info.json", '{"codebase_version": "v1.6"}', "has no features"),
                                  ("info.json", "{", "cannot be read .JSONDecodeError")):
        (broken / "meta" / name).write_text(content, encoding="utf-8")
        refused(from_lerobot.main, broken, out, saying=saying)


def test_a_lerobot_episode_that_does_not_match_itself_is_left_out():
    needs("pyarrow", "av")
    source, out = folder() / "damaged", folder() / "converted"
    shutil.copytree(HERE / "testing" / "lerobot" / "v2.1", source)
    videos = source / "videos" / "chunk-000" / "observation.images.front"
    # as when a recording is split at the wrong place: the pictures of another episode
    shutil.copy(videos / "episode_000002.mp4", videos / "episode_000001.mp4")
    (videos / "episode_000002.mp4").write_bytes(b"no video")
    code, output = run_command(from_lerobot.main, source, out, "--camera", "front")
    assert code == 0 and "1 episodes in" in output and "2 left out" in output, output
    assert "episode_000001: episode_000001.mp4 goes on after its 17 rows" in output
    assert re.search("episode_000002: .*episode_000002.mp4 cannot be read", output)
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["episode_000000"]
    (source / "meta" / "episodes.jsonl").write_text('{"episode_index": 0', encoding="utf-8")
    refused(from_lerobot.main, source, out, saying="the list of episodes in .* cannot be read")


def test_an_rlds_data_set_of_any_schema_is_converted():
    root, out = make_rt1([5, 7], shards=2), folder() / "converted"
    words = [root, out, "--fps", 3, "--action", "steps/action/world_vector",
             "steps/action/terminate_episode"]
    assert run_command(from_rlds.main, *words)[0] == 0
    theirs, ours = open_episodes("rt1", root), open_episodes("folder", out)
    assert ours.dataset.fps == 3 and [e.length for e in ours] == [e.length for e in theirs]
    for one, other in zip(theirs, ours, strict=True):
        assert np.array_equal(one.frames, other.frames)  # the same JPEG, byte for byte
        assert np.array_equal(one.actions[:, [10, 11, 12, 7, 8, 9]], other.actions)
    refused(from_rlds.main, root, out, "--image", "steps/picture",
            saying="no feature 'steps/picture'; a step has steps/action/base_displacement_vector")


def test_a_videos_frames_are_matched_to_rows_by_time():
    needs("av")
    import av
    source, out = folder(), folder() / "converted"
    def video(name: str, frames: int, lost: int = -1) -> None:
        with av.open(str(source / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for t in set(range(frames)) - {lost}:
                frame = np.full((32, 32, 3), 10 * t, np.uint8)
                frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    def table(name: str, times: np.ndarray) -> None:
        rows = [f"{float(time)!r},{1 / 3 + i!r}" for i, time in enumerate(times)]
        (source / f"{name}.csv").write_text("\n".join(["timestamp,speed", *rows]), encoding="utf-8")
    ticks = np.arange(20) / 10
    for name, times in (("whole", ticks + 0.03), ("late", ticks[:12] + 0.48),
                        ("gap", np.delete(ticks, 7)), ("beyond", ticks + 0.2),
                        ("backwards", ticks[::-1]), ("lost", ticks)):
        video(name, 20, lost=7 if name == "lost" else -1)
        table(name, times)
    video("alone", 5)
    code, output = run_command(from_video.main, source, out)
    assert code == 0 and "2 episodes in" in output and "5 left out" in output, output
    for saying in ("lost: lost.mp4 has no frame for row 7, due at 0.700 s: the next one is at 0.8",
                   "gap: gap.mp4 has a frame at 0.700 s that no row is for",
                   "beyond: beyond.mp4 has frames for 18 of 20 rows", "does not rise",
                   "alone: there is no alone.csv beside it"):
        assert saying in output, output
    episodes = {e.name: e for e in open_episodes("folder", out)}
    assert episodes["whole"].dataset.names == ("speed",) and episodes["whole"].dataset.fps == 10
    assert np.array_equal(np.load(episodes["whole"].path)[:, 0], 1 / 3 + np.arange(20))
    for name, first in (("whole", 0), ("late", 5)):
        shades = episodes[name].frames.mean((1, 2, 3))
        assert np.abs(shades - 10 * (first + np.arange(len(shades)))).max() < 3, name
    # without a time, a row for every frame
    (source / "whole.csv").write_text("1\n2\n", encoding="utf-8")
    for path in source.glob("*.csv"):
        if path.stem != "whole":
            path.unlink()
    refused(from_video.main, source, folder() / "none", saying="whole.mp4 has 20 frames for 2 rows")


def test_optional_packages_are_imported_where_they_are_used():
    optional = {"h5py", "pyarrow", "av", "vizdoom", "metaworld", "mujoco"}
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # at the top
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not optional & {name.split(".")[0] for name in names}, path


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
# sample.py


def test_the_same_seed_gives_the_same_world():
    frames, actions = small_episode(3)
    def roll(world: WorldModel) -> np.ndarray:
        return sample.rollout(world, frames, actions, context=2)
    world = small_world(seed=1, steps=2)
    first = roll(world)
    assert np.array_equal(roll(small_world(seed=1, steps=2)), first)
    assert not np.array_equal(roll(small_world(seed=2, steps=2)), first)
    assert np.array_equal(roll(world), first)  # reset begins anew


def test_the_published_samplers_rollout_is_repeated():
    # Weights, context, actions and every random number are given; 16 frames of latents are
    # compared.
    g = golden("rollout_tiny")
    published = g["config"]
    config = UNetConfig(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1,
                        head_channels=16, context_dim=24,
                        default_fps=3, dropout=0.0, action_dim=13)
    path = folder() / "released.ckpt"
    torch.save({"state_dict": recipe(released_names(config))}, path)
    network = load_vid2world(path, config)
    around = replace(PRESETS["tiny"], unet=network.config, size=(16, 16),
                     autoencoder=AutoencoderConfig(32, (1, 2), 1),
                     base_scale=published["base_scale"], all_tokens_unless_full=True)
    model = Model(around)
    model.unet, model.text = network, g["text"][0]
    model.encode, model.image_tokens = (lambda pixels: g["context_latents"]), (
        lambda anchor: g["image_tokens"])
    steps = published["steps"]
    world = WorldModel(model, published["guidance"], steps=steps, eta=published["eta"],
                       rescale=published["rescale"],
                       history_level=model.schedule.ddim_levels(steps)[-2])
    tape = iter(g["noise"].split(1, dim=1))
    world.noise = lambda B, T: next(tape)
    world.reset(np.zeros((1, 16, 16, 3), np.uint8))
    for action in g["actions"][0, :15]:
        world.step(action)
    assert error_of(world.latents, g["latents"]) < 1e-5 and next(tape, None) is None


def test_what_is_left_out_comes_from_the_checkpoint_else_from_the_paper():
    model = small_world().model
    paper = Sampling(guidance=2.5, guidance_levels=(0, 1000), rescale=0.7, steps=50, eta=1.0,
                     history_level=39)
    assert WorldModel(model, overlap=2).sampling == paper
    model.sampling = {"steps": 6, "eta": 0.0, "guidance_levels": (0, 300)}
    carried = replace(paper, steps=6, eta=0.0, guidance_levels=(0, 300))
    assert WorldModel(model, overlap=2).sampling == carried
    chosen = WorldModel(model, steps=9, guidance=1.0, overlap=2).sampling
    assert chosen == replace(carried, steps=9, guidance=1.0)
    bundled = sample.load_world(TINY_WORLD)
    assert bundled.sampling == Sampling(**MEASURED["tiny"])  # as a run of this size
    assert bundled.sampling == sample.load_world(TINY_WORLD, eta=bundled.sampling.eta).sampling


def test_guidance_applies_at_its_levels_and_saves_the_second_pass_elsewhere():
    frames, actions = small_episode(3)
    latents = {}
    for streaming in (True, False):
        world = small_world(guidance=3.0, steps=5, guidance_levels=(300, 700), streaming=streaming)
        passes = passes_of(world)
        sample.rollout(world, frames, actions[:2])
        versions = [mask.shape[1] - (i == 0) if streaming else len(mask) for i,
                    (_, _, mask) in enumerate(passes[:5])]
        assert versions == [1, 1, 2, 2, 1]  # at levels 999, 799, 599, 399, 199
        latents[streaming] = world.latents
    assert (latents[True] - latents[False]).abs().max() < 1e-4
    for levels, same_as in (((0, 1000), {"guidance": 3.0}), ((0, 0), {"guidance": 1.0})):
        limited, plain = small_world(guidance=3.0, guidance_levels=levels), small_world(**same_as)
        assert np.array_equal(sample.rollout(limited, frames, actions[:2]),
                              sample.rollout(plain, frames, actions[:2]))


def test_a_rollout_goes_on_past_the_window_and_remembers_all_latents():
    frames, actions = small_episode(12)
    world = small_world()
    imagined = sample.rollout(world, frames, actions)
    assert imagined.shape == (13, 16, 16, 3) and world.latents.shape == (1, 13, 4, 8, 8)
    assert world.latents.isfinite().all() and world.window.history.shape[
        1] <= 4 and world.window.pixels.shape[1] <= 4


def test_a_full_window_starts_over_with_its_last_frames():
    world = small_world()
    frames, actions = small_episode(4)
    world.reset(frames, actions[:3])
    history, latents = world.window.history.clone(), world.latents.clone()
    world.step(actions[3])
    assert torch.equal(world.window.history[:, :2], history[:, 2:])  # noised once and kept
    # the new anchor is the oldest frame that stays
    assert torch.equal(world.window.anchor, latents[:, 2:3])
    assert torch.equal(world.window.actions[0, 0],
                       torch.zeros(13)) and world.window.action_mask[0].tolist() == [1, 1, 1]
    assert torch.equal(world.window.actions[0, 1:], torch.from_numpy(actions[2:4]))


def test_the_window_slides_in_latents_and_nothing_is_encoded_again():
    for streaming in (True, False):
        world, encoded = small_world(streaming=streaming), []
        frames, actions = small_episode(10)
        encode = world.model.encode
        world.model.encode = lambda pixels, encode=encode, encoded=encoded: (
            encoded.append(pixels.shape[1]), encode(pixels))[1]
        world.reset(frames[:2], actions[:1])
        for t in range(1, 10):  # windows of 4 frames slide at every second step
            world.step(actions[t])
            first = 2 + t - world.window.length
            assert torch.equal(world.window.anchor[:, 0], world.latents[:, first])
        assert encoded == [2], encoded  # the given frames, once


def test_history_is_held_at_level_39_whatever_the_steps():
    world = small_world(steps=6, streaming=False)
    assert {small_world(steps=steps).sampling.history_level for steps in (1, 2, 50)} == {39}
    seen = passes_of(world)
    frames, actions = small_episode(3)
    world.reset(frames, actions[:2])
    world.step(actions[2])
    levels = world.model.schedule.ddim_levels(6)
    assert [k[0].tolist() for _, k, _ in seen] == [[39, 39, 39, level] for level in levels]
    assert all(torch.equal(x[:, :3], seen[0][0][:, :3]) for x, _, _ in seen)
    for _, _, mask in seen:  # the second pass hides the newest action and nothing else
        assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_level_of_the_history_may_be_chosen():
    world = small_world(steps=4, history_level=20)
    passes = passes_of(world)
    frames, actions = small_episode(3)
    sample.rollout(world, frames, actions[:1])
    assert passes[0][1][0].tolist() == [20, 999, 999]


def test_unknown_past_actions_are_hidden_not_zero():
    world = small_world()
    frames, actions = small_episode(3)
    world.reset(frames)
    assert world.window.action_mask.tolist() == [[1, 0, 0]]
    world.reset(frames, actions[:2])
    assert world.window.action_mask.tolist() == [[1, 1, 1]]


def test_guidance_1_is_one_conditional_pass():
    frames, actions = small_episode(3)
    for streaming in (True, False):
        one = small_world(guidance=1.0, streaming=streaming)
        almost = small_world(guidance=1.0 + 1e-9, rescale=0.0, streaming=streaming)
        passes = passes_of(one)
        sample.rollout(one, frames, actions[:2])
        sample.rollout(almost, frames, actions[:2])
        assert [x.shape[:2] for x, _, _ in passes] == ([(1, 2), (1, 1), (1, 1)] * 2 if streaming
                                                       else [(1, 2)] * 3 + [(1, 3)] * 3)
        assert error_of(one.latents, almost.latents) < 1e-4


def test_streaming_runs_one_frame_at_a_time():
    world = small_world(guidance=2.0)
    passes = passes_of(world)
    frames, actions = small_episode(2)
    sample.rollout(world, frames, np.concatenate([actions] * 3))
    # 3 steps over the new frame's two versions; the first takes along the frame before, or the last
    # 2 of a full window.
    assert [x.shape[1] for x, _, _ in passes] == [3, 2, 2] * 3 + [4, 2, 2] + [3, 2, 2] + [4, 2, 2]
    assert [mask.tolist() for _, k, mask in passes[3:6]] == [[[1, 1, 0]], [[1, 0]], [[1, 0]]]


def test_streaming_imagines_the_same_frames():
    # as recomputing does, over many windows; with and without guidance, for one world and for two,
    # from one frame and from four. A random network amplifies rounding from frame to frame, so
    # every frame starts both ways from one window; what streaming remembers is its own throughout.
    for scope, guidance, worlds, context in (
            ("past", 1, 2, 4), ("past", 2.5, 1, 1), ("frame", 1, 1, 4), ("frame", 2.5, 2, 1)):
        episodes = [small_episode(4, seed) for seed in range(worlds)]
        frames, actions = (np.stack(arrays) for arrays in zip(*episodes, strict=True))
        streaming, recomputing = (small_world(scope, guidance=guidance, steps=2, streaming=way)
                                  for way in (True, False))
        for world in (streaming, recomputing):
            world.reset(frames[:, :context], actions[:, : context - 1])
        for t in range(context, 8):
            streaming.step(actions[:, t % 4])
            recomputing.step(actions[:, t % 4])
            error = (streaming.latents[:, -1] - recomputing.latents[:, -1]).abs().max()
            assert error < 1e-4, (scope, guidance, worlds, context, t)
            recomputing.go_back(streaming.window)


@torch.inference_mode()
def test_every_memory_matters():
    frames, actions = small_episode(3)
    def roll(forget: type[nn.Module] | None) -> Tensor:
        world = small_world("past", steps=2)
        world.reset(frames[:2], actions[:1])
        world.step(actions[1])
        for layer, memory in world.cache.memory.items():
            if isinstance(layer, forget or ()):
                world.cache.memory[layer] = tuple(tensor + 0.1 for tensor in memory)
        world.step(actions[2])
        return world.latents
    right = roll(None)
    for kind in (TemporalConv, TemporalNorm, causal_attention.Attention):
        assert error_of(roll(kind), right) > 1e-3, kind


def test_an_interrupted_step_leaves_the_world_as_it_was():
    frames, actions = small_episode(3)
    def roll(interrupt: bool) -> Tensor:
        world = small_world("past", steps=2, eta=0.0)
        world.reset(frames[:1])
        world.noise = lambda B, T: torch.full((B, T, 4, 8, 8), 0.3)
        world.step(actions[0])
        if interrupt:  # while the memory is being written
            layer = world.model.unet.middle_block[0].temopral_conv
            right = layer.forward
            layer.forward = lambda *inputs: 1 / 0
            with raises(ZeroDivisionError, ""):
                world.step(actions[1])
            layer.forward = right
        world.step(actions[1])
        return world.latents
    assert error_of(roll(True), roll(False)) < 1e-5


def test_the_cache_of_the_full_network_is_as_large_as_stated():
    with torch.device("meta"):
        network = UNet(replace(UNetConfig(), causal=True, norm_scope="frame"))
        cache = Cache(capacity=16)
        network(torch.empty(1, 8, 8, 40, 64), torch.empty(1, 8), torch.empty(1, 77, 1024),
                torch.empty(1, 8, 16, 1024), cache=cache)
    assert round(cache.nbytes / 2 / 1e9, 2) == 1.34  # in bfloat16, half of what float32 takes


def test_streaming_a_network_that_is_not_strictly_causal_is_announced():
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        default, asked = small_world("clip"), small_world("clip", streaming=True)
    assert not default.streaming and asked.streaming and words.getvalue().count("approximates") == 1
    frames, actions = small_episode(3)
    exact, approximate = (sample.rollout(world, frames, actions) for world in (default, asked))
    assert approximate.shape == exact.shape and error_of(asked.latents, default.latents) > 1e-3


def test_a_cache_refuses_what_it_cannot_remember():
    network, inputs = causal_network("frame")
    inputs = {name: tensor[:, :1] if name != "text" else tensor for name, tensor in inputs.items()}
    cache = Cache(capacity=2)
    with raises(ValueError, "append a frame before"):
        cache.begin(frames=1, alternatives=1)
    for _ in range(2):
        network(**inputs, cache=cache)
    with raises(ValueError, "has room for 0"):
        network(**inputs, cache=cache)
    with raises(ValueError, "needs causal=True"):
        UNet(SMALL)(**{name: inputs[name] for name in ("x", "k", "text", "image")}, cache=Cache(2))


def test_several_worlds_run_side_by_side():
    frames, actions = small_episode(3)
    world = small_world()
    world.reset(np.stack([frames, frames[::-1]]), np.stack([actions[:2]] * 2))
    pictures = world.step(np.stack([actions[2], actions[2]]))
    assert pictures.shape == (2, 16, 16, 3) and world.latents.shape[:2] == (2, 4)
    # Each world is the one that it would be alone, but for the noise that it draws.
    alone = small_world(eta=0.0)
    alone.noise = lambda B, T: torch.full((B, T, 4, 8, 8), 0.3)
    both = small_world(eta=0.0)
    both.noise = alone.noise
    alone.reset(frames[::-1], actions[:2])
    alone.step(actions[2])
    both.reset(np.stack([frames, frames[::-1]]), np.stack([actions[:2]] * 2))
    both.step(np.stack([actions[2], actions[2]]))
    assert error_of(both.latents[1:], alone.latents) < 1e-5


def test_frames_of_any_size_are_fitted():
    world = small_world()
    world.reset(np.zeros((1, 30, 50, 3), np.uint8))
    assert world.step(np.zeros(13)).shape == (16, 16, 3)


def test_sampling_all_frames_together_hides_every_action():
    world = small_world()
    passes = passes_of(world)
    frames, actions = small_episode(4)
    assert imagine_together(world, frames, actions[:3]).shape == (4, 16, 16, 3)
    assert [mask.unique().tolist() for _, _, mask in passes] == [[1], [0]] * 3
    assert all(k.unique().numel() == 1 and mask.shape == (1, 4) for _, k, mask in passes)
    with raises(RequestError, "6 frames do not fit into one window of 4"):
        imagine_together(world, frames, np.zeros((5, 13)))


def test_impossible_requests_are_refused_and_leave_the_world_as_it_was():
    world = small_world()
    with raises(RequestError, "reset"):
        world.step(np.zeros(13))
    frames, actions = small_episode(2)
    world.reset(frames, actions[:1])
    before = world.latents.clone()
    for action, words in ((np.full(13, np.nan), "not finite"), (np.full(13, np.inf), "not finite"),
                          (np.zeros(7), r"\[1, 7\]")):
        with raises(RequestError, words):
            world.step(action)
    assert torch.equal(world.latents, before)
    with raises(RequestError, "uint8"):
        world.reset(frames.astype(np.float32))
    for options in ({"guidance": float("nan")}, {"steps": 0}, {"history_level": 1000},
                    {"overlap": 4}, {"eta": 2.0}, {"rescale": -1.0}):
        with raises(RequestError, next(iter(options))):
            small_world(**options)


def test_a_refused_reset_leaves_the_world_as_it_was():
    world = small_world()
    frames, actions = small_episode(3)
    with raises(RequestError, "expected .1, 2, 13."):
        world.reset(frames, actions[:1])
    with raises(RequestError, "call reset"):  # there is still no world
        world.step(actions[0])
    world.reset(frames, actions[:2])
    window = world.window
    with raises(RequestError, "not finite"):
        world.reset(frames[::-1], np.full((2, 13), np.nan))
    assert world.window is window


def test_sampling_together_leaves_the_world_as_it_was():
    frames, actions = small_episode(4)
    world, undisturbed = small_world(), small_world()
    for each in (world, undisturbed):
        each.reset(frames[:1])
        each.step(actions[0])
    imagine_together(world, frames, actions[:3])
    assert np.array_equal(world.step(actions[1]), undisturbed.step(actions[1]))


def test_a_world_goes_back_to_an_earlier_window():
    frames, actions = small_episode(4)
    world = small_world()
    world.reset(frames[:1])
    world.step(actions[0])
    window, first = world.window, world.step(actions[1])
    world.step(actions[2])
    world.go_back(window)
    assert np.array_equal(world.step(actions[1]), first)


def test_actions_that_are_no_numbers_are_refused():
    for actions, words in ((np.zeros(13, complex), "complex128"),
                           (np.zeros(13, "M8[s]"), "datetime64"), (["1"] * 13, "type <U1"),
                           ([[1], [1, 2]], "no regular array"), (np.full(13, 1e300), "not finite"),
                           (np.zeros(13, object), "type object")):
        with raises(RequestError, words):
            sample.to_numbers(actions)
    assert sample.to_numbers(np.ones(3, bool)).tolist() == [1, 1, 1]


def test_given_frames_came_by_their_own_actions():
    recorded = np.arange(8.0, dtype=np.float32)[:, None].repeat(2, axis=1)
    def chosen(**words) -> list[float]:
        settings = sample.Settings(frames=6, **words)
        return sample.choose_actions(settings, recorded, context=3)[0][:, 0].tolist()
    assert chosen() == [0, 1, 2, 3, 4]
    assert chosen(repeat_action=[9, 9]) == [0, 1, 9, 9, 9]
    assert chosen(repeat_action=[]) == [0, 1, 2, 2, 2]
    np.save(path := folder() / "future.npy", np.full((2, 2), 7))
    assert chosen(actions=str(path)) == [0, 1, 7, 7]


def test_whole_models_come_from_original_and_released_checkpoints():
    config = ModelConfig(unet=WORLD, autoencoder=AutoencoderConfig(32, (1, 2), 1), size=(16, 16),
                         image_tower=ImageTowerConfig(28, 14, 64, 2, 4, 48),
                         text_tower=TextTowerConfig(77, 49408, 48, 3, 3, 48),
                         resampler=ResamplerConfig(48, 1, 3, 16, 16, 64, 48, 4))
    released = {name: torch.randn(shape) * 0.05 for name,
                shape in released_names(replace(SMALL, action_dim=13)).items()}
    passive = [f"model.diffusion_model.{name}" for name in UNet(SMALL).state_dict()]
    path = small_checkpoint(**dict.fromkeys(passive) | released)
    frames, actions = small_episode(2)
    for model in (from_dynamicrafter(small_checkpoint(), config),
                  from_vid2world(path, replace(config, unet=SMALL))):
        assert model.text.shape == (77, 48) and model.config.unet.action_dim == 13
        imagined = sample.rollout(WorldModel(model, steps=2, overlap=2), frames[:1], actions)
        assert imagined.shape == (3, 16, 16, 3)
    assert model.config.all_tokens_unless_full and model.config.unet.norm_scope == "clip"
    with raises(CheckpointError, "takes no actions"):
        from_vid2world(small_checkpoint())


@torch.no_grad()
def test_a_released_checkpoint_gets_all_tokens_unless_the_clip_is_full():
    model = small_world().model
    tokens = torch.randn(2, 16, 48)
    assert torch.equal(model.image_context(tokens, 3), tokens.unflatten(1, (4, 4))[:, :3])
    model.config = replace(model.config, all_tokens_unless_full=True)
    assert torch.equal(model.image_context(tokens, 3)[:, 2], tokens)
    assert torch.equal(model.image_context(tokens, 4), tokens.unflatten(1, (4, 4)))


# --------------------------------------------------------------------------------------------------
# train.py


@small_preset()
def test_the_whole_path_trains_resumes_and_rolls_out():
    root, whole, halves = make_rt1([8] * 6), folder() / "whole", folder() / "halves"
    code, printed = run_command(train.main, *train_words(root, whole))
    assert code == 0, printed
    written = {path.name for path in whole.iterdir()}
    assert {"checkpoint.pt", "frozen.pt", "log.jsonl", "loss.png", "step_0000004.png"} <= written

    # Stopped by a signal after two steps, and taken up again: the losses of the run that was never
    # stopped.
    batch_loss, calls = train.batch_loss, []
    def stop_at_second(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*inputs)
    train.batch_loss = stop_at_second
    try:
        code, printed = run_command(train.main, *train_words(root, halves))
    finally:
        train.batch_loss = batch_loss
    assert code == 128 + signal.SIGTERM and "--resume" in printed, printed
    assert read_checkpoint(halves / "checkpoint.pt")["step"] == 2
    code, printed = run_command(train.main, "--resume", "--out", halves)
    assert code == 0 and "at step 2" in printed, printed
    assert losses(halves) == losses(whole) and len(losses(whole)) == 4
    ours, theirs = load_model(whole).state_dict(), load_model(halves).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    refused(train.main, *train_words(root, whole), saying="holds a run: --resume")
    out = folder()
    code, printed = run_command(sample.main, "--checkpoint", whole, "--steps", 2, "--frames", 6,
                                "--out", out)
    assert code == 0 and printed.count("PSNR") == 5, printed
    assert {path.suffix for path in out.iterdir()} == {".png", ".gif"}
    gif = Image.open(next(out.glob("*.gif")))
    assert gif.n_frames == 6
    code, printed = run_command(sample.main, "--checkpoint", whole, "--steps", 1, "--repeat-action",
                                "--frames", 3, "--out", out)
    assert code == 0 and "PSNR" not in printed, printed
    refused(sample.main, "--checkpoint", whole, "--data", "bridge", "--out", out,
            saying="does not hold this data set")
    content = (whole / "checkpoint.pt").read_bytes()
    (whole / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    refused(sample.main, "--checkpoint", whole, saying="truncated")


def test_bad_input_to_training_is_refused_in_a_sentence():
    root, out = make_rt1([8] * 6), folder() / "run"
    refused(train.main, *train_words(folder() / "none", out), saying="no folder")
    refused(train.main, *train_words(folder(), out), saying="holds no episodes")
    refused(train.main, *train_words(make_rt1([3] * 6), out), saying="shorter than 4 frames")
    refused(train.main, *train_words(root, out), "--base", "nothing.ckpt",
            saying="no checkpoint at")
    refused(train.main, *train_words(root, out, 4, 2, "preset=512"), saying="--base")
    refused(train.main, *train_words(root, out), "--size", 30, 32, saying="multiples of")
    assert not out.exists()
    other = folder()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    refused(train.main, *train_words(root, other), "--overwrite", saying="other files")
    assert (other / "thesis.txt").read_text(encoding="utf-8") == "mine"


@small_preset()
def test_a_network_of_another_action_size_is_refused():
    root, out = make_rt1([8] * 6), folder() / "run"
    assert run_command(train.main, *train_words(root, out, steps=1))[0] == 0
    frames, actions = make_episode(8, seed=0)
    bridge = folder()
    payload = encode_example({"steps/observation/image_0": [encode_jpeg(f) for f in frames],
                              "steps/action": actions[:, :7].ravel()})
    write_records(bridge / "bridge_dataset-train.tfrecord-00000-of-00001", [payload] * 3)
    refused(train.main, "--resume", "--out", out, "--data", "bridge", "--root", bridge,
            saying="7 numbers.*takes 13")
    refused(sample.main, "--checkpoint", out, "--data", "bridge", "--root", bridge,
            saying="7 numbers.*takes 13")


def test_resuming_what_is_no_run_is_refused():
    nowhere, other = folder() / "mistyped", folder()
    refused(train.main, "--resume", "--out", nowhere, saying="no run in .*mistyped to resume")
    assert not nowhere.exists()
    (other / "thesis.txt").write_text("mine", encoding="utf-8")
    refused(train.main, "--resume", "--out", other, saying="no run in")
    (other / "arguments.json").write_text("{", encoding="utf-8")
    refused(train.main, "--resume", "--out", other, saying="no run in")


def test_signals_are_a_callers_own_again_after_a_run():
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    words = train_words(make_rt1([8] * 6), folder() / "run", 1, 1)
    assert train.train(train.parse_arguments([str(word) for word in words])) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_signal_to_the_whole_process_group_saves_the_run():
    out = folder() / "run"
    words = ["--steps", 500, "--save-every", 1000, "--workers", 2, "--scratch", "--frames", 4,
             "--size", 32, 32, "--batch", 1,
             "--root", make_rt1([8] * 6), "--out", out, "--set", "autoencoder_steps=1",
             "val_clips=1"]
    run = subprocess.Popen([sys.executable, HERE / "train.py", *map(str, words)],
                           start_new_session=True, cwd=HERE,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.time() + 120
    while not (out / "log.jsonl").exists() or len(losses(out)) < 3:
        assert time.time() < until and run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "go on:" in printed, printed
    assert read_checkpoint(out / "checkpoint.pt")["step"] == len(losses(out)) >= 3


def test_training_says_how_long_it_will_take():
    settings = Settings(out=str(folder()), steps=600)
    words = io.StringIO()
    recorder = Recorder.__new__(Recorder)
    recorder.settings = settings
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        recorder.announce_end(step=11, seconds=3.0)
    assert re.search(r"3.00 s a step: about 29 minutes.*--steps 150",
                     words.getvalue()), words.getvalue()


def test_settings_are_those_of_the_kind_of_model_and_can_be_changed():
    small, full = parse_arguments([]), Settings()
    assert (small.steps, small.batch, small.preset, small.size) == (500, 4, "tiny", [64, 80])
    assert small.augment is False and full.augment is None
    assert (full.steps, full.batch, full.lr, full.action_dropout) == (100_000, 8, 1e-5, 0.2)
    changed = parse_arguments(["--set", "clear_frames=0.6", "weighting=clean", "dropout=0",
                                     "val_clips=3"])
    found = changed.clear_frames, changed.weighting, changed.dropout, changed.val_clips
    assert found == (0.6, "clean", 0, 3)
    base = small_checkpoint(scale_arr=NoiseSchedule(0.3).scale)
    large = parse_arguments(["--base", str(base)])
    assert (large.preset, large.size, large.steps) == ("1024", [576, 1024], 100_000)
    for words, saying in ((["--set", "magic=1"], "knows no 'magic'"),
                          (["--set", "val_clips=x"], "expected a whole number"),
                          (["--seed", 2**64], "between 0 and 2.63"), (["--seed", -1], "between 0"),
                          (["--steps", 0], "at least 1"),
                          (["--workers", -1], "at least 0"), (["--out", "a\0b"], "null byte"),
                          (["--set", "preset=huge"], "preset is 'huge'"),
                          (["--set", "norm_scope=x"], "norm_scope is 'x'")):
        refused(train.main, *words, saying=saying)
    code, printed = run_command(train.main, "--help")
    # what will be used
    assert code == 0 and "(default: 500)" in printed and "100000" not in printed
    options = set(re.findall(r"^  --([a-z-]+)", printed, re.M))
    assert len(options) <= 24, options
    printed = run_command(sample.main, "--help")[1]
    assert len(set(re.findall(r"^  --([a-z-]+)", printed, re.M))) <= 14


def test_noise_and_masks_belong_to_the_clip_not_to_the_batch():
    model = small_world().model
    actions, settings = torch.randn(4, 5, 13), Settings(action_dropout=0.5, image_dropout=0.5)
    together = train.draw(model, actions, [0, 1, 2, 3], settings)
    apart = train.draw(model, actions[2:], [2, 3], settings)
    assert all(torch.equal(together[name][2:], apart[name]) for name in together)
    assert len(together["k"].unique()) > 10  # a level for every frame
    shared = train.draw(model, actions, [0, 1, 2, 3], replace(settings, shared_level=True))
    assert all(len(levels.unique()) == 1 for levels in shared.pop("k")) and len(shared) == 4
    assert all(torch.equal(together[name], shared[name]) for name in shared)
    clear = train.draw(model, actions, [0, 1, 2, 3], replace(settings, clear_frames=0.5))
    # some frames of the clip, each by itself, to the lowest tenth of the levels
    lowered = clear["k"] != together["k"]
    assert 0 < lowered.sum() < lowered.numel() and (clear["k"] < 100)[lowered].all()


@small_preset()
def test_a_passive_model_learns_without_actions_and_without_causality():
    out = folder() / "passive"
    words = train_words(make_rt1([6] * 9), out, steps=3)
    code, output = run_command(train.main, *words, "--passive", "--cooldown", 2, "--set",
                               "warmup=1")
    assert code == 0 and "sample.py" not in output
    config = load_model(out).config.unet
    assert not config.causal and config.action_dim is None and len(losses(out)) == 3
    refused(sample.main, "--checkpoint", out, "--out", folder(), saying="passive")


def in_two_processes(*words: object) -> str:
    """What train.py prints under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
              HERE / "train.py"]
    done = subprocess.run([*map(str, launch), *map(str, words)], cwd=HERE, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def weights_of(run: Path) -> Tensor:
    return torch.cat([weight.flatten() for weight in load_model(run).parameters()])


def test_two_processes_take_the_steps_of_one_with_twice_the_batch():
    root, one, two = make_rt1([8] * 6), folder() / "one", folder() / "two"
    words = ["dropout=0", "norm_scope=past"]
    assert run_command(train.main, *train_words(root, one, 2, 2, *words))[0] == 0
    in_two_processes(*train_words(root, two, 2, 1, *words))
    assert np.allclose(losses(one), losses(two), rtol=1e-5)
    assert error_of(weights_of(two), weights_of(one)) < 1e-5


def test_what_adds_gradients_up_does_not_outlive_the_processes():
    alive = []

    def join() -> tuple[int, int, torch.device]:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder()}/meeting",
                                             rank=0, world_size=1)
        return 0, 2, torch.device("cpu")

    def leave() -> None:
        alive.append([thing for thing in gc.get_objects()
                      if isinstance(thing, DistributedDataParallel)])
        torch.distributed.destroy_process_group()

    words = train_words(make_rt1([8] * 6), folder() / "run", 1, 1)
    with mock.patch.object(train, "join_processes", join):
        with mock.patch.object(train, "leave_processes", leave):
            assert run_command(train.main, *words)[0] == 0
    assert alive == [[]]


def test_a_sharded_run_is_that_of_one_process_and_goes_on_with_any_number():
    root, one, other = make_rt1([8] * 6), folder() / "one", folder() / "other"
    # clipped so far that what AdamW does depends on the gradient's length
    words = ["dropout=0", "clip_grad=1e-6", "--cooldown", 0, "--frames", 2]
    assert run_command(train.main, *train_words(root, one, 3, 2, *words))[0] == 0
    in_two_processes(*train_words(root, other, 1, 1, *words), "--shard")
    go_on = ["--resume", "--out", other]
    assert run_command(train.main, *go_on, "--steps", 2, "--batch", 2)[0] == 0
    in_two_processes(*go_on, "--steps", 3, "--batch", 1, "--shard")
    assert np.allclose(losses(one), losses(other), rtol=1e-5), (losses(one), losses(other))
    assert error_of(weights_of(other), weights_of(one)) < 1e-5
    refused(train.main, *train_words(root, folder() / "run"), "--shard", saying="torchrun")


def test_temporal_layers_can_learn_alone():
    root, out = make_rt1([8] * 6), folder() / "run"
    words = train_words(root, out, 1, 1, "warmup=1", "--lr", 1e-3, "--trainable", "temporal")
    assert run_command(train.main, *words)[0] == 0
    begun = load_model(out).state_dict()
    frozen = read_checkpoint(out / "frozen.pt")["weights"]
    assert run_command(train.main, "--resume", "--out", out, "--steps", 4)[0] == 0
    moved = {name for name, weight in load_model(out).state_dict().items()
             if not torch.equal(weight, begun[name])}
    assert moved and not moved & set(frozen)
    for name in moved:
        assert re.search(r"temopral_conv|init_attn|\.2\.|middle_block|action_emb|unet\.out", name)
    for part in ("temopral_conv", "attn1.to_q", "action_emb_proj", "unet.out."):
        assert any(part in name for name in moved), part
    assert "unet.input_blocks.1.0.in_layers.2.weight" in frozen


# --------------------------------------------------------------------------------------------------
# evaluation/


def noisy_pictures() -> tuple[np.ndarray, np.ndarray]:
    """A real frame and the same with noise, [2, H, W, 3] both, then two random ones."""
    random = np.random.RandomState(0)
    frame = open_episodes("rt1", SAMPLES, "val")[0].read(0, 1)[0]
    noise = random.randint(-20, 21, frame.shape)
    pairs = [(frame, np.clip(frame.astype(int) + noise, 0, 255).astype(np.uint8)),
             random.randint(0, 256, (2, *frame.shape)).astype(np.uint8)]
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return ours, theirs


def test_psnr_and_ssim_are_scikit_images():
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=255, channel_axis=-1), 0.26.0
    ours, theirs = noisy_pictures()
    assert np.allclose(metrics.psnr(ours, theirs), [26.670384, 7.745417], atol=1e-4)
    assert np.allclose(metrics.ssim(ours, theirs), [0.692203, -0.002591], atol=1e-4)
    assert metrics.ssim(ours, ours).tolist() == [1, 1]
    with raises(ValueError, "at least 11"):
        metrics.ssim(ours[:, :10], theirs[:, :10])


def statistics_of(features: Tensor, batch: int = 7) -> metrics.Statistics:
    statistics = metrics.Statistics(features.shape[1])
    for chunk in features.split(batch):
        statistics.add(chunk)
    return statistics


def test_streamed_statistics_are_those_of_two_passes():
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0),
                           dtype=torch.float64) * 3 + 1000
    statistics = statistics_of(features)
    assert error_of(statistics.mean, features.mean(0)) < 1e-12
    assert error_of(statistics.covariance, torch.cov(features.T)) < 1e-10


def test_the_frechet_distance_is_the_formula_with_the_matrix_root():
    generator = torch.Generator().manual_seed(0)
    for count in (100, 5):  # 5 vectors of 8 numbers: singular covariances
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        a, b = (randn(count, 8) @ randn(8, 8) + i for i in range(2))
        # of C1 C2, whose root's trace is wanted
        eigenvalues = np.linalg.eigvals((torch.cov(a.T) @ torch.cov(b.T)).numpy()).astype(complex)
        traces = torch.cov(a.T).trace() + torch.cov(b.T).trace()
        apart = (a.mean(0) - b.mean(0)).square().sum()
        formula = apart + traces - 2 * np.sqrt(eigenvalues).real.sum()
        ours = metrics.frechet_distance(statistics_of(a), statistics_of(b))
        assert abs(ours - float(formula)) < 1e-6 * float(formula), (count, ours, float(formula))
        assert abs(metrics.frechet_distance(statistics_of(a), statistics_of(a))) < 1e-3
    with raises(ValueError, "at least two"):
        metrics.frechet_distance(statistics_of(a[:1]), statistics_of(b))


def test_the_evaluation_command_measures_continues_and_shares():
    out, networks = folder(), small_networks()
    words = ["--episodes", 3, "--batch", 1, "--frames", 3, "--steps", 1]
    words += [word for name in ("--inception", "--lpips", "--i3d")
              for word in (name, networks[name])]
    code, printed = run_command(evaluate.main, *words, "--out", out / "whole")
    assert code == 0, printed
    whole = json.loads((out / "whole" / "result.json").read_text(encoding="utf-8"))
    assert set(whole["result"]) == {"psnr", "ssim", "lpips", "fid", "fvd",
                                    "psnr of repeating"} and not whole["absent"]
    assert whole["episodes"] == 3 and len(whole["by_frame"]["psnr"]) == 2
    assert (out / "whole" / "lpips.png").exists()

    # Interrupted in its third batch, it goes on there.
    right, calls = evaluate.score, []
    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        right(*inputs)
    evaluate.score = interrupted
    try:
        assert run_command(evaluate.main, *words, "--out", out / "halves")[0] == 130
    finally:
        evaluate.score = right
    code, printed = run_command(evaluate.main, *words, "--out", out / "halves")
    assert code == 0 and "going on after 2 batches" in printed
    halves = json.loads((out / "halves" / "result.json").read_text(encoding="utf-8"))
    assert halves["result"] == whole["result"]

    # Two processes share the batches, as torchrun would start them.
    command = [sys.executable, "-m", "evaluation.evaluate", *map(str, words), "--out",
               out / "shared"]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL, env=os.environ | meeting
                             | {"RANK": rank, "OMP_NUM_THREADS": "1"}) for rank in "01"]
    assert [process.wait(timeout=150) for process in both] == [0, 0]
    shared = json.loads((out / "shared" / "result.json").read_text(encoding="utf-8"))["result"]
    assert all(abs(shared[name] - value) < 1e-3 * abs(value) for name,
               value in whole["result"].items()), (shared, whole["result"])

    code, printed = run_command(evaluate.main, "--episodes", 1, "--frames", 3, "--steps", 1,
                                "--nar", "--out", out / "nar")
    assert code == 0 and printed.count("absent") == 3 and "no --inception network" in printed
    for bad, saying in ((["--inception", "none.pt"], "no network for Inception at none.pt"),
                        (["--i3d", HERE / "README.md"], "no TorchScript"),
                        (["--inception", networks["flat"]], r"expected .*features. of Inception"),
                        (["--lpips", networks["--i3d"]], "cannot be asked as LPIPS")):
        refused(evaluate.main, *words[:8], "--out", out / "bad", *bad, saying=saying)


# --------------------------------------------------------------------------------------------------
# The bundled world


def test_the_bundled_world_predicts_what_actions_do():
    episodes = open_episodes("rt1", SAMPLES, "val").where(np.arange(3))
    world = sample.load_world(TINY_WORLD, guidance=1.0, steps=2)
    (frames, actions), = evaluate.read_batches(episodes, 10, 3, world.model.config)
    tally = evaluate.evaluate(world, episodes, frames=10, context=1, batch=3)
    right, repeating = (tally.sums[name].mean() / 3 for name in ("psnr", "psnr of repeating"))
    others = evaluate.imagine(world, frames, np.roll(actions, 1, axis=0)[:, :-1])
    misled = metrics.psnr(others, frames)[:, 1:].mean()
    assert tally.sums["psnr"].shape == (9,)
    assert right > repeating + 4 and right > misled + 4, (right, repeating, misled)


def test_the_bundled_game_beats_standing_still():
    episodes = open_episodes("csgo", SAMPLES, "val").where(np.array([0, 1, 2]))
    world = sample.load_world(ARENA_WORLD)
    tally = evaluate.evaluate(world, episodes, frames=12, context=4, batch=3)
    imagined, repeating = (tally.sums[name].mean() / 3 for name in ("psnr", "psnr of repeating"))
    assert imagined > repeating + 2, (imagined, repeating)


def test_the_bundled_files_are_small_and_halved():
    for path in (TINY_BASE, TINY_WORLD, ARENA_WORLD):
        content = read_checkpoint(path)
        weights = content.get("state_dict") or content["weights"]
        kinds = {tensor.dtype for name, tensor in weights.items() if name != "action_statistics"}
        assert path.stat().st_size < 16e6 and kinds == {torch.float16}, path
    assert sum(path.stat().st_size for path in (HERE / "samples").iterdir()) < 13e6
    assert sum(p.numel() for p in from_dynamicrafter(TINY_BASE,
                                                     PRESETS["tiny"]).unet.parameters()) < 8e6


def test_without_data_or_checkpoint_the_commands_take_the_bundled_ones_and_say_so():
    before = os.getcwd()
    os.chdir(folder())  # where there is no datasets/
    try:
        code, said = run_command(train.main, "--steps", 2, "--batch", 1, "--frames", 4,
                                 "--workers", 0, "--set", "val_clips=1")
        assert code == 0 and "python sample.py --checkpoint runs/default" in said, said
        assert "rt1 from samples (bundled)" in said and "base: tiny_base.pt (bundled)" in said
        code, said = run_command(sample.main, "--guidance", 2.0, "--frames", 3)
        assert code == 0 and said.count("PSNR") == 2, said
        assert "tiny_world.pt (bundled)" in said and "samples (bundled)" in said
        code, said = run_command(sample.main, "--data", "csgo", "--frames", 5)
        assert code == 0 and said.count("PSNR") == 1, said
        assert "arena_world.pt (bundled), data: csgo from samples (bundled)" in said
    finally:
        os.chdir(before)


@small_preset()
def test_runs_are_bundled_as_a_base_and_as_a_world():
    root, runs, out = make_rt1([8] * 6), folder(), folder()
    words = ["--lr", 1e-3, "--set", "warmup=0"]
    assert run_command(train.main, *train_words(root, runs / "base", steps=1), *words,
                       "--passive")[0] == 0
    bundle_base(runs / "base", out / "tiny_base.pt")
    words = [word for word in train_words(root, runs / "world", steps=2)
             if word != "--scratch"] + words
    assert run_command(train.main, *words, "--base", out / "tiny_base.pt")[0] == 0
    bundle_world(runs / "world", out / "tiny_world.pt", "tiny_base.pt")
    frames, actions = make_episode(4, seed=1)
    ours, theirs = (sample.load_world(path, steps=2)
                    for path in (out / "tiny_world.pt", runs / "world"))
    for world in (ours, theirs):
        sample.rollout(world, frames, actions[:-1])
    assert error_of(ours.latents, theirs.latents) < 1e-2
    assert not any(name.startswith("autoencoder.")
                   for name in read_checkpoint(out / "tiny_world.pt")["weights"])
    tune_decoder(runs / "world", steps=1)
    bundle_world(runs / "world", out / "tiny_world.pt", "tiny_base.pt")
    kept = read_checkpoint(out / "tiny_world.pt")["weights"]
    assert any(name.startswith("autoencoder.decoder.") for name in kept)
    assert not any(name.startswith(("autoencoder.encoder.", "image_tower.")) for name in kept)


def test_the_gripper_is_read_off_frames_and_its_directions_off_episodes():
    episodes = open_episodes("rt1", SAMPLES, "train").where(np.arange(16))
    reader = controllability.train_reader(episodes, steps=160, size=8)
    held_out = open_episodes("rt1", SAMPLES, "val").where(np.arange(4))
    frames, places = controllability.recorded(held_out)
    with torch.no_grad():
        assert (reader(frames) - places).norm(dim=1).mean() < 4  # and about 20 for the mean place
    across, up = controllability.directions(episodes)
    # x and y go to the right of the picture, z goes up
    assert across[0] > 0 and across[1] > 0 and up[2] < 0


def test_transfers_and_ablations_are_compared():
    levels, methods = transfers.LEVELS, transfers.TRANSFER_METHODS
    transfers.LEVELS, transfers.TRANSFER_METHODS = (500,), ("masked", "extrapolative")
    try:
        code, printed = run_command(transfers.main, "--clips", 1, "--frames", 4, "--out", folder())
    finally:
        transfers.LEVELS, transfers.TRANSFER_METHODS = levels, methods
    rows = [row.split("|") for row in printed.splitlines()
            if re.match(r"\| (mixed|shift|masked|extrapolative), (past|frame) ", row)]
    assert code == 0 and len(rows) == 4 and all(0 < float(row[2].strip(" *")) < 10 for row in rows)
    out = folder()
    words = ["--variants", "baseline", "from scratch", "--seeds", 1, "--steps", 1, "--cooldown", 1,
             "--batch", 1, "--frames", 4, "--workers", 0,
             "--val-clips", 1, "--episodes", 1, "--denoising-steps", 1, "--out", out]
    code, printed = run_command(ablations.main, *words)
    assert code == 0 and "| baseline |" in printed and "| from scratch |" in printed, printed
    again = run_command(ablations.main, *words)[1]  # what is done is not done again
    assert "at step" not in again and again.strip() == printed[
        printed.index("| variant |") :].strip()
    # and never taken for what other settings would have given
    alone = words[:2] + words[3:]  # the baseline
    other = run_command(ablations.main, *alone, "--denoising-steps", 2)[1]
    (psnr,), (other_psnr,) = (re.findall(r"\| baseline \|.*\| (\S+) ±", table)
                              for table in (printed, other))
    assert psnr != other_psnr, other
    refused(ablations.main, *alone, "--steps", 2, saying="has steps 1, and here it is 2")


def test_commands_refuse_bad_words_in_a_sentence():
    out = folder()
    np.savez(out / "archive.npz", a=np.zeros(3))
    np.save(out / "records.npy", np.zeros(3, [("x", float), ("y", float)]))
    np.save(out / "complex.npy", np.zeros((3, 13), complex))
    np.save(out / "narrow.npy", np.zeros((3, 7)))
    np.save(out / "nan.npy", np.full((3, 13), np.nan))
    np.save(out / "huge.npy", np.zeros((3, 13), np.float32))
    header = (out / "huge.npy").read_bytes()
    (out / "huge.npy").write_bytes(header.replace(b"(3, 13), }           ",
                                                  b"(999999999999, 13), }"))
    model, load = load_model(TINY_WORLD), sample.load_world_model
    sample.load_world_model = lambda path: model  # once is enough
    for words, saying in (
            (["--seed", 2**64], "between 0 and 2.63"), (["--out", "a\0b"], "null byte"),
            (["--frames", 1], "leave a frame to imagine"),
            (["--context", 0], "context is 0"), (["--episode", -1], "episode is -1"),
            (["--steps", 0], "steps is 0"),
            (["--eta", 2], "eta is 2"), (["--guidance", "nan"], "guidance is nan"),
            (["--steps", "x"], "invalid int"), (["--episode", 99], "no episode 99"),
            (["--actions", out / "narrow.npy"], r"expected .N, 13."),
            (["--actions", out / "nan.npy"], "not finite"),
            (["--guidance-levels", 5, 4], "low <= high"),
            (["--repeat-action", 1, 2], r"expected .N, 13."),
            (["--actions", out / "archive.npz"], "is an .npz archive"),
            (["--actions", out / "records.npy"], "real numbers"),
            (["--actions", out / "complex.npy"], "complex128"),
            (["--actions", out / "huge.npy"], "huge.npy cannot be read"),
            (["--actions", out / "none.npy"], "No such file"),
            (["--actions", out], "Is a directory")):
        refused(sample.main, *words, saying=saying)
    sample.load_world_model = load
    for words, saying in ((["--port", 99999], "port is 99999"), (["--host", ""], "host is empty"),
                          (["--steps", 0], "steps is 0"),
                          (["--host", "nowhere.invalid"], "play: ")):
        refused(play.main, *words, saying=saying)


def test_measurements_refuse_what_they_cannot_measure():
    refused(evaluate.main, "--episodes", 99, saying="32 of at least 16 frames are held out")
    refused(evaluate.main, "--checkpoint", "none.pt", saying="no checkpoint at")
    refused(controllability.main, "--data", "bridge", saying="no bridge in datasets")
    refused(transfers.main, "--base", "none.pt", saying="no checkpoint at")
    for main, name in ((ablations.main, "seeds"), (baselines.main, "episodes"),
                       (causality.main, "frames"), (contact.main, "batch"), (drift.main, "frames"),
                       (game.main, "reader-steps"), (policies.main, "horizon"),
                       (speed.main, "rounds"), (transfers.main, "clips")):
        for number in (0, -1):
            refused(main, f"--{name}", number,
                    saying=f"--{name} is {number}; it must be at least")


# --------------------------------------------------------------------------------------------------
# baselines/


def test_diamonds_network_has_a_task_of_unit_size_at_every_noise_level():
    # which is what EDM's scaling is for: a network that answers 0 is then off by 1, on pixels of
    # the deviation that is assumed
    network = diamond.Diamond(replace(DIAMOND, action_dim=2))
    pixels, actions = diamond.SIGMA_DATA * torch.randn(500, 5, 3, 8, 8), torch.zeros(500, 5, 2)
    before = diamond.draw_sigma
    try:
        for sigma in (0.01, 0.1, 1.0, 10.0):
            diamond.draw_sigma = lambda n, sigma=sigma: torch.full((n,), sigma)
            assert abs(diamond.loss_of(network, pixels, actions).item() - 1) < 0.1, sigma
    finally:
        diamond.draw_sigma = before
    assert np.allclose(diamond.noise_levels(1), [5, 0])
    levels = diamond.noise_levels(3)
    assert np.allclose(levels[::2], [5, 0.002]) and levels == sorted(levels)[::-1]


def test_diamond_learns_what_actions_do():
    # a picture that the last action paints: white or black
    torch.manual_seed(0)
    network = diamond.Diamond(replace(DIAMOND, action_dim=1))
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    def clips(n: int) -> tuple[Tensor, Tensor]:
        actions = torch.randint(2, (n, 6, 1)).float()
        pixels = torch.full((n, 6, 3, 8, 8), -0.6)
        pixels[:, 1:] += 1.2 * actions[:, :5, :, None, None]
        return pixels, actions
    for _ in range(60):
        loss = diamond.loss_of(network, *clips(16))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    frames, actions = (to_frames(clips(1)[0]), clips(1)[1].numpy())
    world = diamond.DiamondWorld(network, steps=3)
    means = []
    for action in (1, 0, 0, 1):
        world.reset(frames[:, :4], actions[:, :3])
        means.append(world.step(np.array([[action]], np.float32)).mean())
    assert min(means[0], means[3]) > max(means[1], means[2]) + 60, means
    with raises(RequestError, "DIAMOND needs 4"):
        world.reset(frames[:, :3], actions[:, :2])


def test_diamond_trains_and_rolls_out():
    root, out = make_rt1([8] * 8), folder()
    words = ["--data", "rt1", "--root", root, "--out", out]
    code, output = run_command(train_diamond.main, "train", *words, "--minutes", 0.02, "--batch", 2,
                               "--workers", 0)
    assert code == 0 and "7.3 M parameters" in output, output
    for sampling in diamond.STEPS:
        code, output = run_command(train_diamond.main, "sample", *words, "--checkpoint",
                                   out / "checkpoint.pt", "--sampling", sampling, "--frames", 6)
        assert code == 0 and "2 frames at" in output, output
    refused(train_diamond.main, "sample", *words, "--checkpoint", TINY_WORLD,
            saying="is no checkpoint of baselines/train_diamond.py")


def test_places_in_the_hall_are_compared_across_the_turn_of_a_circle():
    distance, turned = game.apart(np.array([[3.0, 4.0, -170.0]]), np.array([[0.0, 0.0, 170.0]]))
    assert distance.tolist() == [5] and turned.tolist() == [20]
    assert game.apart(np.array([0, 0, 90.0]), np.array([0, 0, 350.0]))[1] == 100


def test_a_pose_reader_learns_and_is_kept():
    episodes = open_episodes("csgo", SAMPLES, "train").where(np.arange(6))
    reader = game.open_reader(path := folder() / "reader.pt", episodes, steps=60)
    frames = np.concatenate([episodes[i].frames for i in range(6)])
    poses = np.concatenate([episodes[i].feature(game.POSE) for i in range(6)])
    distance, turned = game.apart(game.read_poses(reader, frames), poses)
    _, chance = game.apart(poses, np.roll(poses, 16, axis=0))
    assert np.median(abs(turned)) < np.median(abs(chance)) / 2, np.median(abs(turned))
    again = game.open_reader(path, episodes, steps=0)
    assert np.array_equal(again.read(frames), reader.read(frames))
    other = game.open_reader(path, episodes, steps=0, source="another hall")
    assert not np.array_equal(other.read(frames), reader.read(frames))


def test_a_game_is_measured_against_diamond_and_standing_still():
    config = replace(DIAMOND, action_dim=51, size=(64, 80))
    save(path := folder() / "diamond.pt", {"diamond": asdict(config),
                                           "weights": diamond.Diamond(config).state_dict()})
    words = ["--episodes", 2, "--steps", 1, "--reader-steps", 2, "--out", path.parent]
    code, said = run_command(game.main, *words, "--quick", "--diamond", path)
    result = json.loads((path.parent / "result.json").read_text(encoding="utf-8"))["short"]
    assert code == 0 and list(result) == ["repeating", "DIAMOND, fast", "DIAMOND, hq", "Vid2World"]
    assert result["repeating"]["frames above repeating"] == 0 and "12 frames of own" in said
    starts = game.Starts(np.zeros((2, 16, 64, 80, 3), np.uint8), np.zeros((2, 16, 51)), None)
    clips = game.roll(game.Still(), starts, batch=1, action=csgo_action(["w"]), new=20)
    assert clips.shape == (2, 24, 64, 80, 3)  # longer than the episode
    refused(game.main, *words, "--frames", 500, saying="the longest has 104")


def test_the_drift_of_a_long_rollout_is_measured():
    grey = np.full((3, 8, 8, 3), 100, np.uint8)
    grey[1] += 10
    grey[2, ::2] += 20
    assert np.allclose(drift.colour_shift(grey), [0, 300**0.5, 300**0.5])
    assert np.allclose(drift.sharpness(grey), [0, 0, 10])
    code, said = run_command(drift.main, "--data", "csgo", "--episodes", 1, "--frames", 9,
                             "--steps", 1, "--out", out := folder())
    means = json.loads((out / "drift_csgo.json").read_text(encoding="utf-8"))["means"]
    assert code == 0 and len(means["psnr"]["imagined"]) == 9 and "| 8 |" in said
    assert (out / "sharpness_csgo.png").exists()


def test_rank_violations_are_those_of_the_published_example():
    true = np.array([0, 0.889, 0.926, 0.741, 0.630, 0.519])  # SIMPLER's drawer, six policies
    imagined = np.array([0.278, 0.667, 0.861, 0.891, 0.343, 0.444])
    assert round(policies.pearson(true, imagined), 3) == 0.771
    assert round(policies.mmrv(true, imagined), 3) == 0.123
    assert policies.mmrv(true, true) == 0 and np.isnan(policies.pearson(true, 0 * true))
    low, high = policies.interval(45, 50)
    assert abs(low - 0.786) < 2e-3 and abs(high - 0.957) < 2e-3  # Wilson's, as in tables
    assert policies.interval(0, 10)[0] == 0 and policies.interval(10, 10)[1] == 1


def test_a_policy_acts_on_what_it_is_shown_and_shuffled_worlds_get_anothers_action():
    class Counter:  # a world whose frames count up by the action
        def reset(self, frames):
            self.frames = frames[:, -1]

        def step(self, actions):
            self.frames = self.frames + actions.astype(np.uint8)[:, :, None, None]
            return self.frames

    starts = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    for shuffled in (False, True):
        videos = policies.roll_out(Counter(), lambda frames: 2 ** frames[:, :, 0, 0] % 3 + 1,
                                   starts, shuffled, horizon=1)
        assert videos.shape == (3, 2, 1, 1, 1)
        moved = (videos[:, 1] - starts).ravel()
        assert np.array_equal(moved, np.roll([2, 3, 2], 1) if shuffled else [2, 3, 2])
    assert policies.to_action(np.array([[2.0, -0.5, 0, 1]])).tolist() == [
        [0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, -0.5, 0]]


def test_policies_are_judged_by_the_verifier_or_a_person():
    out = folder()
    shutil.copy(TINY_BASE, out)
    world = shutil.copy(TINY_WORLD, out)
    options = ["--starts", 3, "--horizon", 2, "--steps", 1, "--out", out, "--checkpoint", world]
    code, said = run_command(policies.main, *options, "--controls", "--judge")
    assert code == 0 and said.count("| untrained | 0 % |") == 3, said
    names = re.findall('name="([^"]+)"', page := (out / "judge.html").read_text(encoding="utf-8"))
    assert len(names) == 3 * 6 * 3 == page.count("data:image/png")  # worlds, policies, starts

    again = AssertionError("rolled out")
    with mock.patch.object(policies, "roll_out", side_effect=again):  # all is known
        assert run_command(policies.main, *options, "--controls")[0] == 0
        verdicts = {name: "Vid2World" in name and "/4000 steps/" in name for name in names}
        (out / "verdicts.json").write_text(json.dumps(verdicts), encoding="utf-8")
        code, said = run_command(policies.main, *options, "--verdicts", out / "verdicts.json")
        os.utime(world, (0, 0))  # it has learned on: nothing is known of it
        with raises(AssertionError, "rolled out"):
            run_command(policies.main, *options)
    assert code == 0 and "| 4000 steps | 100 % |" in said and "| 90 steps | 0 % |" in said, said
    assert (out / "agreement.md").read_text(encoding="utf-8").count("Vid2World") == 1


def test_contact_is_read_off_openings():
    true = np.array([[0.1, 0.1], [0.1, 0.02], [0.1, 0.1]])
    imagined = np.array([[0.1, 0.05], [0.1, 0.04], [0.1, 0.1]])
    # one of three drawers moves, and does so in the model; so does one of the two others
    assert contact.describe(true, imagined) == "1 of 3 | 100 % | 50 % | 20 | -10"
    assert contact.describe(true[1:2], true[1:2]) == "1 of 1 | 100 % | – | 0 | +0"

    class Still:
        def reset(self, frames):
            self.actions = []
            assert frames.shape == (3, 1, 2, 2, 3)

        def step(self, actions):
            self.actions.append(actions)
            return starts + len(self.actions)

    starts, numbers = np.zeros((3, 2, 2, 3), np.uint8), np.random.uniform(-1, 1, (3, 5, 4))
    videos = contact.replay(world := Still(), starts, numbers)
    assert videos[:, :, 0, 0, 0].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert np.allclose(np.stack(world.actions, 1)[..., 10:], numbers[..., :3], atol=1e-6)


def clip_baselines() -> tuple[np.ndarray, np.ndarray, Model, dict[str, tuple]]:
    """A clip's first frame and actions, the passive base, and each baseline's method and model."""
    settings = train.parse_arguments(["--data", "rt1"])
    episodes = open_episodes("rt1", SAMPLES, "val")
    frames, actions = episodes[0].read(0, 4)
    methods = {"action": action_finetuning.METHOD, "controlnet": controlnet.METHOD,
               "classifier": classifier_guidance.METHOD, "language": language_finetuning.method()}
    built = {name: (method, method.build(settings, episodes.dataset))
             for name, method in methods.items()}
    return frames[None], actions[None, :3], clips.base_of(settings, episodes.dataset), built


def test_baselines_start_exactly_as_the_base_and_follow_actions_once_they_have_learned():
    frames, actions, base, built = clip_baselines()
    as_base = clips.imagine_clips(base, frames, actions, steps=2)
    nothing = np.zeros((1, 3, 4), np.float32)  # the empty caption
    for name, told in (("controlnet", actions), ("classifier", actions), ("language", nothing)):
        imagined = clips.imagine_clips(built[name][1], frames, told, steps=2)
        assert np.array_equal(imagined, as_base), name
    steer = classifier_guidance.towards_actions(built["classifier"][1], weight=1.0)
    steered = clips.imagine_clips(built["classifier"][1], frames, actions, steps=4, steer=steer)
    unsteered = clips.imagine_clips(base, frames, actions, steps=4)
    assert not np.array_equal(steered, unsteered)
    for layer in built["controlnet"][1].unet.copy.zero_convs:
        nn.init.normal_(layer.weight, std=0.1)
    for name in ("action", "controlnet"):
        one, other = (clips.imagine_clips(built[name][1], frames, sign * actions, steps=2)
                      for sign in (1, -1))
        assert not np.array_equal(one, other), name
    refused_frames = np.zeros((1, 20, 13), np.float32)
    with raises(RequestError, "21 frames do not fit into one clip of 16"):
        clips.imagine_clips(base, frames, refused_frames)


def test_the_classifiers_accuracy_is_the_share_of_right_bins():
    model = clip_baselines()[3]["classifier"][1]
    clip, actions = (torch.rand(1, 5, 64, 80, 3) * 255).byte().numpy(), np.zeros((1, 5, 13))
    actions[0, :, 0], actions[0, 2:, 1] = 0.5, -0.5
    last = model.unet.classifier.head[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.0, 1, 0]).repeat(13)  # always "about zero"
    right = baselines.named_right(model, clip, actions, 500)
    assert right.shape == (1, 4, 13) and right.mean(axis=(0, 1))[:3].tolist() == [0, 0.5, 1]


def test_gradients_reach_what_a_baseline_trains_and_nothing_else():
    _, _, base, built = clip_baselines()
    episodes = open_episodes("rt1", SAMPLES, "train")
    batch, said = (collate([Clips(each, 4, (64, 80), seed=0)[0]]) for each in (
        episodes, language_finetuning.CaptionedEpisodes(episodes)))
    settings = replace(train.parse_arguments(["--data", "rt1"]), shared_level=True,
                       action_dropout=0.0)
    learns = {"action": ("unet.", "resampler."), "controlnet": ("unet.copy.",),
              "classifier": ("unet.classifier.",), "language": ("unet.", "resampler.", "words.")}
    for name, (method, model) in built.items():
        train.batch_loss(method.loss(model, False), model, said if name == "language" else batch,
                         settings).backward()
        reached = {key for key, p in model.named_parameters() if p.grad is not None}
        wanted = {key for key, p in model.named_parameters() if p.requires_grad}
        assert reached <= wanted and all(key.startswith(learns[name]) for key in wanted), name
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        if name in ("controlnet", "classifier"):  # every weight of the base is untouched
            theirs = dict(base.unet.named_parameters())
            assert all(torch.equal(p, theirs[key]) for key, p in model.unet.named_parameters()
                       if key in theirs), name


def test_a_saved_baseline_gives_the_same_samples():
    frames, actions, _, built = clip_baselines()
    for name, (method, model) in built.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01
        out = folder()
        save(out / "frozen.pt", {"weights": frozen_weights(model)})
        save(out / "checkpoint.pt", {"config": asdict(model.config), "frozen": "frozen.pt",
                                     "weights": trained_weights(model), "step": 0})
        again = load_model(out, kind=method.kind)
        told = np.ones((1, 3, 4), np.float32) if name == "language" else actions
        # PyTorch multiplies matrices in another way, and rounds differently, if they may learn.
        ours, theirs = (clips.imagine_clips(each.requires_grad_(False), frames, told, steps=2)
                        for each in (model, again))
        assert np.array_equal(ours, theirs), name


def test_a_baseline_is_trained_by_the_loop_of_train_py():
    out = folder() / "run"
    words = ["--data", "rt1", "--root", SAMPLES, "--out", out, "--steps", 1, "--batch", 1,
             "--frames", 4, "--workers", 0, "--set", "val_clips=1"]
    code, said = run_command(controlnet.main, *words)
    assert code == 0 and "done at step 1" in said, said
    code, said = run_command(controlnet.main, *words[:6], "--resume", "--steps", 2)
    assert code == 0 and "resuming" in said and "done at step 2" in said, said
    refused(controlnet.main, *words, "--overwrite", "--scratch", "--passive",
            saying="starts from a passive model")


def test_captions_say_what_the_arm_did_and_reach_the_network():
    motion = np.zeros((8, 13), np.float32)
    motion[:, 10], motion[:, 12], motion[:, 3] = 0.5, -0.3, 1
    assert language_finetuning.describe_motion(motion) == ["right", "down", "closes"]
    assert language_finetuning.word_numbers(["right"]).tolist() == [2, 0, 0, 0]
    frames, _, base, built = clip_baselines()
    model = built["language"][1]
    nn.init.normal_(model.words.weight)
    told = (np.tile(language_finetuning.word_numbers([word]), (1, 3, 1))
            for word in ("left", "right"))
    left, right = (clips.imagine_clips(model, frames, caption, steps=2) for caption in told)
    assert not np.array_equal(left, right)
    root = folder()
    write_records(root / "fractal20220817_data-val.tfrecord-00000-of-00001", [encode_example({
        "steps/observation/image": [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * 2,
        language_finetuning.INSTRUCTION: [b"open middle drawer"] * 2,
        **{name: np.zeros((2, width), np.float32) for name, width in DATA_SETS["rt1"].actions}})])
    episodes = open_episodes("rt1", root)
    assert episodes[0].text(language_finetuning.INSTRUCTION) == "open middle drawer"
    spoken = language_finetuning.CaptionedEpisodes(
        episodes, tokenizer=lambda caption: np.array([len(caption)]))
    expected = len("Robot arm performs the task: open middle drawer")
    assert spoken[0].read(0, 2)[1].tolist() == [[expected]] * 2
    with raises(DataError, "no feature 'nothing'"):
        episodes[0].text("nothing")


def test_byte_pairs_are_merged_in_their_order():
    pairs = ["o p", "op e", "ope n</w>", "d r"] + [f"x{i} y" for i in range(48890)]
    path = folder() / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress(("#version\n" + "\n".join(pairs) + "\n").encode()))
    tokenizer = Tokenizer(path)
    assert tokenizer.split("open") == ["open</w>"] and tokenizer.split("odr") == ["o", "d", "r</w>"]
    assert tokenizer.split("drop") == ["dr", "o", "p</w>"]
    row = tokenizer("  OPEN&amp;amp; 7 ")
    number = tokenizer.numbers
    assert row.shape == (77,) and row[:6].tolist() == [
        49406, number["open</w>"], number["&</w>"], number["7</w>"], 49407, 0]
    assert number["!"] == 0 and number["op"] == 512
    long = tokenizer("open " * 100)
    assert long[-1] == 49407 and (long[1:-1] == number["open</w>"]).all()
    path.write_bytes(b"no gzip")
    with raises(DataError, "is no vocabulary of CLIP's"):
        Tokenizer(path)


def test_memory_is_counted_as_it_is():
    """Against arithmetic, and against what a real step leaves alive."""
    tiny = PRESETS["tiny"]
    config = replace(tiny, size=(32, 32), resampler=replace(tiny.resampler, num_frames=4),
                     unet=replace(tiny.unet, channel_mult=(1, 2), num_frames=4))
    half, peak = plan.count(lambda: torch.nn.Linear(1000, 1000, bias=False), lambda layer: layer(
        torch.zeros(500, 1000)).sum().backward())
    assert abs(half - 4e-3) < 1e-5  # 1000² weights
    assert 9.9e-3 < peak < 14.1e-3  # weights 4, their gradient 4, in 2, out 2 and its gradient 2
    weights, keeping = plan.count(lambda: plan.build_model(config),
                                  lambda model: plan.train_step(model, 8, checkpointing=False))
    _, recomputing = plan.count(lambda: plan.build_model(config),
                                lambda model: plan.train_step(model, 8, checkpointing=True))
    _, sampling = plan.count(lambda: plan.build_model(config), partial(plan.sample_frame, given=3))
    assert weights < sampling < recomputing < keeping
    model = plan.build_model(config)
    total = sum(tensor.numel() * tensor.element_size()
                for tensor in [*model.parameters(), *model.buffers()])
    assert abs(weights - total / 1e9) < 1e-5
    assert recomputing > 4 * weights * 0.8  # weights, gradients, two moments of what learns
    _, temporal = plan.count(lambda: plan.build_model(config),
                             lambda model: plan.train_step(model, 8, trainable="temporal"))
    (_, two), (_, four) = plan.count_pieces(config, (2, 4))
    assert temporal < recomputing and four < two < recomputing


def test_frozen_parts_may_be_halved_and_frames_coded_one_by_one():
    root, out = make_rt1([8] * 6), folder() / "run"
    words = ["--bf16", "--base", TINY_BASE]
    with mock.patch.object(train, "quick_attention") as quick:
        assert run_command(train.main, *train_words(root, out, 2, 1), *words)[0] == 0
    # and the loop learns with quick attention
    quick.assert_called_once_with(torch.device("cpu"), True, True)
    quick.return_value.__enter__.assert_called_once()
    weights = read_checkpoint(out / "frozen.pt")["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert (out / "step_0000002.png").exists() or (out / "step_0000000.png").exists()
    model = load_model(out)
    frames = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    together = model.encode(frames), model.decode(model.encode(frames))
    with mock.patch.object(autoencoder, "AT_ONCE", 1):
        latents = model.encode(frames)
        assert error_of(latents, together[0]) < 1e-5
        assert error_of(model.decode(latents), together[1]) < 1e-5
    model.autoencoder.requires_grad_(False)
    halve_frozen(model)
    assert {part: next(getattr(model, part).parameters()).dtype for part in (
        "autoencoder", "image_tower", "unet")} == {
        "autoencoder": torch.bfloat16, "image_tower": torch.float32, "unet": torch.float32}


def test_the_best_device_is_found_and_a_mac_is_told_once():
    choose = device.best_device.__wrapped__
    with (mock.patch("torch.cuda.is_available", return_value=False),
          mock.patch("torch.backends.mps.is_available", return_value=True)):
        with mock.patch.dict(os.environ, {device.FALLBACK: "1"}):
            assert choose() == "mps"
        with mock.patch.dict(os.environ), mock.patch("builtins.print") as said:
            os.environ.pop(device.FALLBACK, None)
            assert choose() == "cpu" and device.FALLBACK in said.call_args[0][0]
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert choose() == "cuda"


def test_a_small_network_learns_in_bfloat16_with_attention_written_out():
    def learn(*choice: bool) -> tuple[Tensor, bool]:
        """Gradients, and whether the fused kernel made them."""
        generator = torch.Generator().manual_seed(0)
        heads = torch.randn(3, 2, 4, 20, 16, generator=generator).bfloat16().requires_grad_()
        with device.quick_attention(torch.device("cpu"), *choice), torch.profiler.profile() as seen:
            nn.functional.scaled_dot_product_attention(*heads).square().sum().backward()
        return heads.grad, any("flash" in event.name for event in seen.events())

    (written_out, fused), (plain, plain_fused) = learn(True, True), learn(True, False)
    assert plain_fused and not fused and learn(False, True)[1]
    assert error_of(written_out.float(), plain.float()) < 2e-2


def test_a_small_networks_new_action_embedding_is_as_loud_as_the_noise_level():
    torch.manual_seed(0)
    dataset = DATA_SETS["rt1"]
    loudness = {}
    for words in ([], ["--set", "loud_actions=false"], ["--base", str(TINY_WORLD)]):
        settings = train.parse_arguments(["--data", "rt1", *words])
        other = replace(dataset, actions=dataset.actions[:1])  # of another width
        unet = train.build_model(settings, other).unet
        actions = torch.randn(500, other.action_dim)
        noise = unet.time_embed(sinusoidal_embedding(torch.arange(0, 1000, 20), 64)).std(dim=0)
        loudness[words[-1] if words else ""] = (unet.action_emb_proj(actions).std(dim=0).mean()
                                                / noise.mean()).item()
    faint = loudness.pop("loud_actions=false")
    assert faint < 0.2 and all(0.5 < loud < 4 for loud in loudness.values()), (faint, loudness)


class NoDoubles(TorchDispatchMode):
    """Refuses what Apple's GPUs refuse: numbers of 64 bits that are no integers."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            assert not isinstance(tensor, Tensor) or tensor.dtype != torch.float64, func
        return result


def test_nothing_needs_doubles_that_a_mac_lacks():
    world = small_world(guidance=2.0, eta=1.0)
    frames, actions = small_episode(4)
    model, settings = world.model, Settings(batch=1)
    batch = {"frames": torch.from_numpy(frames[None]), "actions": torch.from_numpy(actions[None]),
             "index": [0]}
    with NoDoubles():
        world.reset(frames[:2], actions[:1])
        world.step(actions[1])
        train.batch_loss(train.PostTraining(model, False, "clean"), model, batch,
                         settings).backward()


def test_a_large_checkpoint_is_written_in_pieces_and_read():
    shapes = {name: tuple(w.shape) for name, w in read_lightning(small_checkpoint()).items()}
    keys, path = folder() / "keys.tsv", folder() / "model.safetensors"
    keys.write_text("\n".join(f"{name}\t{','.join(map(str, shape))}"
                              for name, shape in shapes.items()), encoding="utf-8")
    with mock.patch.object(full_size, "KEYS", keys):
        assert run_command(lambda words: full_size.write(path))[0] is None
    weights = read_lightning(path)
    assert {name: tuple(w.shape) for name, w in weights.items()} == shapes
    wide = weights["model.diffusion_model.input_blocks.1.0.in_layers.2.weight"].float()
    assert 0.8 < wide.std() * wide[0].numel() ** 0.5 < 1.2


def test_the_ways_to_steer_are_compared():
    words = ["--quick", "--out", out := folder() / "table", "--frames", 4, "--rows", "base",
             "classifier guidance", "language-conditioned", "Vid2World-NAR"]
    before, controllability_steps = dict(baselines.METHODS), baselines.train_reader
    baselines.train_reader = partial(controllability_steps, steps=2, size=2)
    try:
        code, printed = run_command(baselines.main, *words)
        again = run_command(baselines.main, *words)[1]  # what is done is not done again
        refused(baselines.main, "--rows", "classifier guidance", "--frames", 4, "--out", out,
                saying="has steps 10, and here it is 1000")
    finally:
        baselines.train_reader = controllability_steps
    assert code == 0 and before == baselines.METHODS, printed
    assert "| accuracy |" in printed and re.search(r"told so in \d+ % of 2 pairs", printed), printed
    rows = [line for line in printed.splitlines() if line.count("±") == 3]
    assert len(rows) == 4 and again.endswith(printed[printed.rindex("| base"):]), printed
    assert Image.open(out / "baselines.png").height == 5 * (128 + 28)  # the truth and four rows
    refused(baselines.main, "--rows", "magic", saying="there is no row 'magic'")


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


# --------------------------------------------------------------------------------------------------
# The house: what runs, what is imported, what the README says


def demonstration(module) -> str:
    """What a file prints when it is run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        module.demo()
    return printed.getvalue()


def test_every_idea_runs_and_prints_what_it_says():
    kernels = demonstration(causal_conv)
    for row in ("centred        ( 1,  2,  3)   3, 4, 5      26",
                "shift          ( 1,  2,  3)   2, 3, 4      20  one frame late",
                "masked         ( 0,  1,  2)   2, 3, 4      11",
                "mixed          ( 2,  1,  2)   2, 3, 4      15",
                "extrapolative  ( 0, -2,  8)   2, 3, 4      26  exact on anything linear"):
        assert row in kernels, row
    attention = demonstration(causal_attention)
    assert re.search(r"^ +0 .* 1.00  0.00  0.00  0.00$", attention, re.M)
    assert "they differ by 0.0" in attention
    forcing = demonstration(diffusion_forcing)
    assert "0000000000000009" in forcing and re.search(r" 999 +0.00000   0.700 +0.0000", forcing)
    assert "199 ->   0   0.000" in forcing and re.search(r"  39 +0.96026   0.971 +22.7696", forcing)
    guidance = demonstration(action_guidance)
    assert all(f"guidance {n}: v = {v}" in guidance for n, v in enumerate((1, 3, 5, 7)))
    assert re.search(r"1110 in training +10.\d% .*= 10.2%", guidance)
    leaks = demonstration(unet)
    assert re.search(r"clip  +[1-9]\d*\.\d\d %", leaks) and leaks.count("  0.00 %") == 6
    norms = demonstration(norm)
    assert "frames [0, 1, 2, 3]" in norms and norms.count("frames [3]") == 2
    done = subprocess.run([sys.executable, "temporal/norm.py"], cwd=HERE, capture_output=True,
                          text=True)
    assert done.stdout == norms, done.stderr


LAYERS = (  # a folder or file imports what stands on lines below its own, or in the same folder
    "test_all", "testing", "play", "bundled", "evaluation", "baselines", "train", "training",
    "sample", "data", "model", "unet", "causal_attention causal_conv action_guidance",
    "dynamicrafter temporal diffusion_forcing", "episodes viewing", "commands support", "errors")


def test_imports_run_down_only():
    level = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
    for name in level:
        file, room_of = HERE / f"{name}.py", HERE / name
        for path in [file] if file.exists() else room_of.glob("*.py"):
            imports = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                       if isinstance(node, (ast.Import, ast.ImportFrom))]
            for node in imports:
                modules = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module]
                for room in {module.split(".")[0] for module in modules} & set(level):
                    assert room == name or level[room] > level[name], f"{path} imports {room}"
                    assert node.col_offset == 0, f"{path} imports {room} inside a function"


def test_the_readmes_code_is_the_projects_and_its_files_exist():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    excerpts = re.findall(r"<!-- from ([\w/]+\.py) -->\n```python\n(.*?)```", readme, re.S)
    assert len(excerpts) == 5
    for name, code in excerpts:
        lines = [line.strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
        quoted = [line.strip() for line in code.splitlines() if line.strip()]
        assert len(quoted) <= 6 and all(line in lines for line in quoted), (name, quoted)
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (HERE / target).exists(), target
    assert len(readme.splitlines()) <= 180


def test_the_readmes_commands_are_understood():
    modules = {"train.py": parse_arguments, "sample.py": partial(parse, sample.Settings, "")}
    commands = re.findall(r"^    .*?python (\w+\.py) ?(.*?)(?:  +.*)?$",
                          (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    assert ("sample.py", "--guidance 2.0") in commands and ("train.py", "--data rt1") in commands
    for words in commands:
        if words[0] in modules and "--resume" not in words[1] and "--base" not in words[1]:
            modules[words[0]](words[1].split())
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m ([a-z_.]+)", readme)):
        path = HERE / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


# --------------------------------------------------------------------------------------------------


def run_test(name: str) -> tuple[str, str]:
    """One test, in a process that runs others before and after; its outcome, and its line."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    torch.manual_seed(0)
    start, outcome = time.time(), "ok"
    try:
        globals()[name]()
    except SkipTest as reason:
        outcome = f"skipped, {reason}"
    except Exception:
        outcome = f"FAILED\n{traceback.format_exc()}"
    took = f"({time.time() - start:.1f} s)"
    return outcome.split()[0], f"{name[5:].replace('_', ' ')} ... {outcome} {took}"


def claims_of_the_house() -> dict[str, Callable]:
    """The tests in testing/claims_*.py, about formats, play, measurements, baselines and damage."""
    files = sorted((HERE / "testing").glob("claims_*.py"))
    modules = [importlib.import_module(f"testing.{file.stem}") for file in files]
    return {name: test for module in modules for name, test in vars(module).items()
            if name.startswith("test_")}


globals().update(claims_of_the_house())


def run_all(words: list[str]) -> int:
    """Run the tests whose names contain one of the words, or all, in as many processes as help."""
    names = [name for name, test in globals().items() if name.startswith("test_")
             and callable(test) and (not words or any(word in name for word in words))]
    count = Counter()
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as processes:
        for outcome, line in processes.map(run_test, names):
            count[outcome.strip(",")] += 1
            print(line, flush=True)
    print(f"{count['ok']} passed, {count['FAILED']} failed")
    return int(count["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(run_all(sys.argv[1:]))
