"""Every claim that a CPU can check: `python test_all.py`, or `python test_all.py future` for the
tests with that word, or pytest. No GPU, no network, no downloads.

A test's name is the claim. Sections follow the files. `testing/` builds what they need; `golden/`
holds inputs and outputs of the original networks at small sizes.
"""
import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import SkipTest, mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import causal_attention
import sample
import train
from action_guidance import action_embedding, align_actions, drop_actions, guide
from causal_attention import TemporalTransformer
from causal_conv import TRANSFER_METHODS, TemporalConv, TemporalConvBlock, transfer_weights
from diffusion_forcing import NoiseSchedule, diffusion_forcing_loss, draw_levels
from data import DATA_SETS, open_episodes
from dynamicrafter import checkpoint
from dynamicrafter.autoencoder import Autoencoder, AutoencoderConfig
from dynamicrafter.checkpoint import read_checkpoint
from dynamicrafter.clip import ImageTower, ImageTowerConfig, TextTower, TextTowerConfig, preprocess
from dynamicrafter.layers import sinusoidal_embedding
from dynamicrafter.resampler import Resampler, ResamplerConfig
from episodes.tfrecord import (encode_example, write_records)
from baselines.clips import sample_jointly
from model import saving
from model.memory import encode_once, recompute_activations
from model.saving import (TINY_BASE, TINY_WORLD, from_dynamicrafter, from_vid2world, load_model,
                          preset_of)
from model.vid2world import (PRESETS, TINY, TUNED_SAMPLING, Model, ModelConfig, to_frames,
                             to_pixels)
from sample import Sampling, WorldModel
from support.errors import CheckpointError, RequestError
from temporal.captured import captured
from temporal.norm import TemporalNorm, past_by_definition
from temporal.streaming import Cache
from testing.commands import folder, raises, refused, run_command
from testing.episodes import (encode_jpeg, make_episode, make_rt1)
from testing.golden import (error_of, full_size_parts, golden, names_of, network_inputs, recipe,
                            released_names, with_recipe)
from testing.worlds import (SMALL, WORLD, Exploit, causal_network, losses, passes_of,
                            small_checkpoint, small_episode, small_preset, small_world, train_words,
                            write_safetensors)
from training.recorder import Recorder
from training.settings import Settings, parse_arguments
from training.start import build_model, start_or_resume
from training.tiny_autoencoder import fit_autoencoder, vary_colours
from unet import (ResBlock, SpatialTransformer, UNet, UNetConfig, load_dynamicrafter,
                  load_vid2world)

HERE = Path(__file__).parent
PROCESSES = min(2, os.cpu_count() or 1)  # that share the tests


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
                              atol=5e-6)
        assert torch.allclose(norms["frame"](x)[:, :, t], plain(x[:, :, t]), atol=5e-6)
    assert torch.allclose(norms["past"](x)[:, :, -1], norms["clip"](x)[:, :, -1], atol=5e-6)


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
    assert error_of(y, g["y"].transpose(1, 2)) < 5e-6


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
    assert error_of(y, g["y_4"].transpose(1, 2)) < 5e-6
    # the third quirk: a clip that is not full
    all_tokens = image.flatten(1, 2)[:, None].expand(-1, 3, -1, -1)
    y = network(x[:, :3], k[:, :3], text, all_tokens, g["fps"], actions[:, :3], mask[:, :3])
    assert error_of(y, g["y_3"].transpose(1, 2)) < 5e-6


@torch.no_grad()
def test_autoencoder_agrees_with_the_original_both_ways():
    g = golden("autoencoder_tiny")
    autoencoder = with_recipe(Autoencoder(AutoencoderConfig(32, (1, 2, 2), 1, latent_scale=1.0)),
                              "first_stage_model.")
    assert error_of(autoencoder.moments(g["image"]), g["moments"]) < 5e-6
    assert error_of(autoencoder.decode(g["latent"][None])[0], g["decoded"]) < 5e-6
    mean, log_variance = g["moments"].chunk(2, dim=1)
    noise = torch.randn(mean.shape)
    sample_of = mean + noise * (0.5 * log_variance).exp()
    assert error_of(autoencoder.encode(g["image"][None], noise[None])[0], sample_of) < 5e-6
    autoencoder.config = replace(autoencoder.config, latent_scale=0.5)
    assert error_of(autoencoder.encode(g["image"][None])[0], 0.5 * mean) < 5e-6
    assert error_of(autoencoder.decode(0.5 * g["latent"][None])[0], g["decoded"]) < 5e-6


@torch.no_grad()
def test_resampler_and_both_towers_agree_with_the_originals():
    g = golden("resampler_tiny")
    resampler = with_recipe(Resampler(ResamplerConfig(48, 2, 3, 16, 4, 64, 48, 4)),
                            "image_proj_model.")
    assert error_of(resampler(g["tokens"]), g["y"]) < 2e-6
    g = golden("clip_image_tiny")
    tower = with_recipe(ImageTower(ImageTowerConfig(28, 14, 64, 2, 4, 48)),
                        "embedder.model.visual.")
    assert error_of(tower(g["normalised_image"]), g["tokens"]) < 2e-6
    g = golden("clip_text_tiny")
    tower = with_recipe(TextTower(TextTowerConfig(77, 49408, 48, 3, 3, 48)),
                        "cond_stage_model.model.")
    assert error_of(tower(g["token_ids"]), g["y"]) < 2e-6
    assert torch.equal(tower.empty_caption(), tower(g["token_ids"])[0])


def test_preprocessing_agrees_with_the_original():
    g = golden("clip_preprocess")
    assert error_of(preprocess(g["image"]), g["y"]) < 5e-7


def test_schedule_agrees_with_the_original():
    g = golden("schedule")
    schedule = NoiseSchedule(0.7)
    assert error_of(schedule.alphas_cumprod,
                    g["alphas_cumprod"]) < 1e-7 and schedule.alphas_cumprod[999] == 0
    assert error_of(schedule.scale, g["scale_512"][:1000]) < 1e-7
    assert error_of(NoiseSchedule(0.3).scale, g["scale_1024"][:1000]) < 1e-7
    for steps in (5, 10, 25, 50):
        assert schedule.ddim_levels(steps)[::-1] == g[f"trailing_{steps}"].tolist()
    levels = schedule.ddim_levels(50)
    sigmas = [schedule.ddim_sigma(k, after, 1.0, like=torch.zeros(1)) for k,
              after in zip(levels, levels[1:] + [0], strict=True)]
    assert error_of(torch.cat(sigmas[::-1]), g["ddim50_sigmas_eta1"]) < 4e-7
    embedding = sinusoidal_embedding(torch.tensor([0, 39, 999]), 64)
    original = g["timestep_embedding_0_39_999_dim64"]
    angles = torch.tensor([0.0, 39, 999])[:, None] * 10000 ** (-torch.arange(32) / 32)
    last_place = torch.cat([angles, angles], dim=-1) * 2**-23  # of a frequency: processors differ
    assert error_of(embedding, original) < 4e-6
    assert ((embedding - torch.as_tensor(original)).abs() <= last_place + 2e-7).all()


def test_every_norm_has_the_originals_epsilon():
    transformer = TemporalTransformer(32, 1, 32, causal=True, norm_scope="past")
    block, spatial = TemporalConvBlock(32, True, "past"), SpatialTransformer(64, SMALL)
    residual = ResBlock(32, 32, SMALL)
    encoder = Autoencoder(AutoencoderConfig(32, (1,), 1)).encoder
    for eps, norms in ((1e-6, (transformer.norm, spatial.norm, encoder.norm_out)),
                       (1e-5, (block.conv1[0], block.conv4[0], residual.in_layers[0]))):
        for norm in norms:
            groups = 1e-3 * torch.randn(1, 32, norm.num_channels // 32, 1, 20, 20)
            mean, var = groups.mean((2, 4, 5), keepdim=True), groups.var((2, 4, 5), keepdim=True,
                                                                         correction=0)
            wanted = ((groups - mean) / (var + eps).sqrt()).flatten(1, 2)  # where var is near ε
            temporal = isinstance(norm, TemporalNorm)
            y = norm(groups.flatten(1, 2) if temporal else groups.flatten(1, 2)[:, :, 0])
            assert error_of(y.view_as(wanted), wanted) < 1e-6


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
        done = f"32 temporal kernels transferred by '{method}', action embedding new"
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
    assert same(load({"state_dict": {name: w.half() for name, w in weights.items()}}), 5e-4)
    assert same(load({"state_dict": {name: w.bfloat16() for name, w in weights.items()}}), 4e-3)
    pruned = folder() / "pruned_fp16.safetensors"
    write_safetensors(pruned, {name: w.half() for name, w in weights.items()
                               if "ln_final" not in name})
    assert same(load_dynamicrafter(pruned, SMALL).state_dict(), 5e-4)
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
            assert error_of(first, whole[:, :t]) < 7e-6, (scope, t)


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
    assert error_of(outputs[1], outputs[0]) < 6e-6 and error_of(outputs[2], outputs[0]) < 6e-6


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
    begins = "proj_out.weight", "conv4.3.weight", "out_layers.3.weight"  # in every block
    assert set(zero) >= {name for name, _ in network.named_parameters() if name.endswith(begins)}


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (lambda network: None, recompute_activations):
        network, inputs = causal_network("past")
        recompute(network)
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
    shared = draw_levels((50, 4), generator, shared_level=True)
    assert (shared == shared[:, :1]).all() and len(shared.unique()) > 40
    clear = draw_levels((5000, 4), generator, low_noise_prob=0.6)
    assert abs((clear < 100).float().mean() - (0.6 + 0.4 * 0.1)) < 0.02
    lowered = clear[clear < 100].float()
    assert abs(lowered.mean() - 49.5) < 1.5 and clear.max() > 990


def test_velocity_and_noise_determine_each_other():
    schedule, k = NoiseSchedule(), torch.tensor([[0, 39, 999], [250, 500, 750]])
    z, noise = torch.randn(2, 2, 3, 4, 5, 6)
    x, v = schedule.add_noise(z, k, noise), schedule.velocity(z, k, noise)
    alpha = schedule.alphas_cumprod[k].view(2, 3, 1, 1, 1)
    scale = schedule.scale[k].view(2, 3, 1, 1, 1)
    assert torch.allclose(alpha.sqrt() * x - (1 - alpha).sqrt() * v, scale * z, atol=1e-6)
    assert torch.allclose(alpha.sqrt() * v + (1 - alpha).sqrt() * x, noise, atol=1e-6)
    assert torch.equal(x[0, 2], noise[0, 2])  # level 999 is noise alone


def test_sampling_with_the_true_velocity_returns_the_clean_latents():
    schedule, z, noise = NoiseSchedule(), *torch.randn(2, 1, 1, 4, 5, 6)
    for steps in (1, 10, 50):
        levels = schedule.ddim_levels(steps)
        x = schedule.add_noise(z, levels[0], noise)
        for k, k_next in zip(levels, levels[1:] + [0], strict=True):
            x = schedule.ddim_step(x, schedule.velocity(z, k, noise), k, k_next, eta=0.0)
            assert torch.allclose(x, schedule.add_noise(z, k_next, noise), atol=1e-5)
    alpha = schedule.alphas_cumprod[0]  # and at the end no signal scale is left in
    assert torch.allclose((x - (1 - alpha).sqrt() * noise) / alpha.sqrt(), z, atol=1e-5)


def test_fresh_noise_keeps_the_variance_of_a_level():
    schedule = NoiseSchedule()
    z, noise, fresh = torch.zeros(1, 1, 100_000), *torch.randn(2, 1, 1, 100_000)
    for eta in (0.0, 0.5, 1.0):
        x = schedule.ddim_step(noise * (1 - schedule.alphas_cumprod[499]).sqrt(),
                               schedule.velocity(z, 499, noise), 499, 299, eta, fresh)
        assert abs(x.var().item() / (1 - schedule.alphas_cumprod[299]).item() - 1) < 0.03, eta
    from_level, to_level = schedule.alphas_cumprod[[499, 299]]
    whole = ((1 - to_level) / (1 - from_level) * (1 - from_level / to_level)).sqrt()
    for eta in (0.0, 0.3, 1.0):
        assert torch.allclose(schedule.ddim_sigma(499, 299, eta, torch.zeros(1)), eta * whole)


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
    loss = diffusion_forcing_loss(lambda x, k: guess, schedule, z, k, noise, weighting="x0")
    alpha = schedule.alphas_cumprod[k].view(2, 3, 1, 1, 1)
    scale = schedule.scale[k].view(2, 3, 1, 1, 1)
    clean = alpha.sqrt() * schedule.add_noise(z, k, noise) - (1 - alpha).sqrt() * guess
    assert torch.allclose(loss, (clean - scale * z).square().mean(), rtol=1e-6)


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
    assert torch.allclose(rescaled.std((-3, -2, -1)), v_cond.std((-3, -2, -1)), rtol=1e-6)
    half = guide(v_cond, v_uncond, 3.0, rescale=0.7)
    assert torch.allclose(half, 0.7 * rescaled + 0.3 * guide(v_cond, v_uncond, 3.0), atol=1e-5)


def test_he_initialisation_maps_actions_to_the_size_of_the_noise_level():
    torch.manual_seed(0)
    dataset = DATA_SETS["rt1"]
    sizes = {}
    for words in ([], ["--set", "action_init=pytorch"], ["--base", str(TINY_WORLD)]):
        settings = train.parse_arguments(["--data", "rt1", *words])
        other = replace(dataset, actions=dataset.actions[:1])  # of another width
        unet = train.build_model(settings, other).unet
        actions = torch.randn(500, other.action_dim)
        noise = unet.time_embed(sinusoidal_embedding(torch.arange(0, 1000, 20), 64)).std(dim=0)
        sizes[words[-1] if words else ""] = (unet.action_emb_proj(actions).std(dim=0).mean()
                                             / noise.mean()).item()
    weight = action_embedding(500, 64, "he")[0].weight
    assert abs(weight.std() * (500 / 2)**0.5 - 1) < 0.02  # He: the deviation is √(2 / inputs)
    small = sizes.pop("action_init=pytorch")
    assert small < 0.2 and all(0.5 < size < 4 for size in sizes.values()), (small, sizes)


# --------------------------------------------------------------------------------------------------
# sample.py


def test_the_same_seed_gives_the_same_world():
    frames, actions = small_episode(3)
    def roll(world: WorldModel) -> np.ndarray:
        return sample.rollout(world, frames, actions, context_frames=2)
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
    assert error_of(world.latents, g["latents"]) < 8e-6 and next(tape, None) is None


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
    assert bundled.sampling == Sampling(**TUNED_SAMPLING["tiny"])  # as a run of this size
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
        assert [len(world.branches(k)) for k in (299, 300, 699, 700)] == [1, 2, 2, 1]
        v = torch.randn(2, 1, 1, 4, 8, 8)
        assert torch.equal(world.guided(v), guide(*v, 3.0, rescale=0.7))
        latents[streaming] = world.latents
    assert (latents[True] - latents[False]).abs().max() < 4e-5
    for levels, same_as in (((0, 1000), {"guidance": 3.0}), ((0, 0), {"guidance": 1.0})):
        limited, plain = small_world(guidance=3.0, guidance_levels=levels), small_world(**same_as)
        assert np.array_equal(sample.rollout(limited, frames, actions[:2]),
                              sample.rollout(plain, frames, actions[:2]))
    for steps, high, warns in ((2, 300, True), (2, 500, False), (4, 300, False)):
        with contextlib.redirect_stdout(words := io.StringIO()):
            small_world(guidance=3.0, steps=steps, guidance_levels=(0, high))
        assert ("guidance 3 changes nothing" in words.getvalue()) == warns


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
    tokens = world.model.image_tokens(world.window.pixels[:, 2])
    assert not torch.allclose(tokens, world.model.image_tokens(world.window.pixels[:, 3]))
    world.step(actions[3])
    assert torch.allclose(world.window.tokens, tokens, atol=5e-6)
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


def test_a_finished_frame_joins_the_history_with_the_noise_of_its_level():
    world = small_world(history_level=500)
    frames, actions = small_episode(2)
    world.reset(frames[:1])
    world.step(actions[0])
    alpha, scale = (buffer[500] for buffer in (world.model.schedule.alphas_cumprod,
                                               world.model.schedule.scale))
    noise = world.window.history - alpha.sqrt() * scale * world.latents
    for frame in noise[0]:  # the given one and the new one
        assert abs(frame.std() / (1 - alpha).sqrt() - 1) < 0.2


def test_actions_chosen_for_a_rollout_begin_with_those_of_the_given_frames():
    recorded = np.arange(20, dtype=np.float32).reshape(10, 2)
    for given in (1, 3):
        chosen, origin = sample.choose_actions(sample.Settings(frames=6), recorded, given)
        assert np.array_equal(chosen, recorded[:5]) and origin == "the episode's"
        repeated, _ = sample.choose_actions(sample.Settings(frames=6, repeat_action=[]), recorded,
                                            given)
        assert np.array_equal(repeated[: given - 1], recorded[: given - 1])
        assert len(repeated) == 5 and (repeated[given - 1 :] == recorded[given - 1]).all()


def test_pixels_are_rounded_to_the_nearest():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    assert np.array_equal(to_frames(to_pixels(frames)), frames)
    assert to_frames(torch.tensor([0.4, 0.6]).view(1, 1, 1, 1, 2) / 127.5).ravel().tolist() == [
        128, 128]  # of 127.9 and 128.1


def test_fresh_noise_is_drawn_at_every_step_unless_eta_is_zero():
    for eta, draws in ((0.0, 2), (1.0, 2 + 3)):  # the start, each step, the history's
        world, drawn = small_world(eta=eta, steps=3), []
        frames, actions = small_episode(2)
        world.reset(frames[:1])
        noise = world.noise
        world.noise = lambda B, T, noise=noise, drawn=drawn: (drawn.append(T), noise(B, T))[1]
        world.step(actions[0])
        assert drawn == [1] * draws


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
        assert error_of(one.latents, almost.latents) < 5e-6


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
            assert error < 4e-5, (scope, guidance, worlds, context, t)
            recomputing.restore(streaming.window)


def test_graphs_imagine_the_same_frames_bit_for_bit():
    # at every place of the window, over slides and a return, with guidance at some of the levels
    frames, actions = small_episode(4)
    for scope, guidance, kinds in (("past", 2.5, 3), ("frame", 1.0, 2)):
        world = small_world(scope, guidance=guidance, guidance_levels=(0, 600))
        assert captured(world.model) == world.model.denoise  # whose weights still learn
        graphs = captured(world.model.requires_grad_(False)).graphs
        def roll(enough: float, world: WorldModel = world) -> list[np.ndarray]:
            with mock.patch("temporal.captured.ENOUGH", enough):
                world.reset(frames[:1])
                imagined = [world.step(actions[t % 4]) for t in range(6)]
                kept = world.window
                imagined += [world.step(actions[t % 4]) for t in range(3)]
                world.restore(kept)
                return imagined + [world.step(actions[0])]
        plain = roll(np.inf)
        assert not graphs and np.array_equal(roll(1), plain) and len(graphs) == kinds


@torch.inference_mode()
def test_every_memory_matters():
    frames, actions = small_episode(3)
    def roll(forget: type[nn.Module] | None) -> Tensor:
        world = small_world("past", steps=2)
        world.reset(frames[:2], actions[:1])
        world.step(actions[1])
        for layer, memory in world.cache.cached.items():
            if isinstance(layer, forget or ()):
                world.cache.cached[layer] = tuple(tensor + 0.1 for tensor in memory)
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
        cache.branches = 1
        cache.begin(frames=1)
    cache.branches = 0
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
    assert sample_jointly(world, frames[None], actions[None, :3]).shape == (1, 4, 16, 16, 3)
    assert [mask.unique().tolist() for _, _, mask in passes] == [[1], [0]] * 3
    assert all(k.unique().numel() == 1 and mask.shape == (1, 4) for _, k, mask in passes)
    told, denoise = [], world.model.denoise
    world.model.denoise = lambda *asked: (told.append(asked[4]), denoise(*asked))[1]
    sample_jointly(world, frames[None], actions[None, :3])
    wanted = torch.from_numpy(np.concatenate([np.zeros((1, 13)), actions[:3]]))
    assert all(torch.allclose(led_to[0], wanted.float()) for led_to in told) and len(told) == 6
    with raises(RequestError, "6 frames do not fit into one clip of 4"):
        sample_jointly(world, frames[None], np.zeros((1, 5, 13)))


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
    sample_jointly(world, frames[None], actions[None, :3])
    assert np.array_equal(world.step(actions[1]), undisturbed.step(actions[1]))


def test_a_world_goes_back_to_an_earlier_window():
    frames, actions = small_episode(4)
    world = small_world()
    world.reset(frames[:1])
    world.step(actions[0])
    window, first = world.window, world.step(actions[1])
    world.step(actions[2])
    world.restore(window)
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
        return sample.choose_actions(settings, recorded, context_frames=3)[0][:, 0].tolist()
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

    # the step of the lowest held-out loss is kept beside the last, and is a world as well
    vals = iter([0.5, 0.3, 0.4, 0.35, 0.2])
    with mock.patch.object(train, "validate", lambda *_: {"val": next(vals)}):
        for steps, best in ((7, 6), (8, 6), (9, 9)):
            code, printed = run_command(train.main, "--resume", "--out", halves, "--set",
                                        "val_every=1", "--steps", steps)
            kept = read_checkpoint(halves / "best.pt")
            assert code == 0 and kept["step"] == best and "optimizer" not in kept, printed
            assert ("best.pt is the world then" in printed) == (best == 6), printed
    assert load_model(halves / "best.pt").config == load_model(halves).config

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


class Written(nn.Module):
    """In place of a Model: writes down what it is asked, and answers with numbers that are easy to
    follow. Latents are a frame's mean colour, and where noise is given that as well."""
    action_dim, schedule, latent_shape = 2, NoiseSchedule(), (1, 2, 2)

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        return pixels.mean((2, 3, 4))[..., None, None, None] + 0.1 * noise

    def standardise(self, actions: Tensor) -> Tensor:
        return 2 * actions

    def image_tokens(self, anchor: Tensor) -> Tensor:
        self.anchor_image = anchor
        return anchor.mean((1, 2, 3))

    def context(self, tokens: Tensor, slots) -> tuple:
        return tokens, list(slots)

    def denoise(self, *asked) -> Tensor:
        self.asked = asked
        return torch.full_like(asked[0], 0.5)


def test_a_step_of_training_is_the_papers():
    frames = torch.randint(256, (2, 3, 4, 4, 3), dtype=torch.uint8)
    actions, k = torch.randn(2, 3, 2), torch.tensor([[0, 400, 999], [10, 39, 700]])
    noise, posterior = torch.randn(2, 2, 3, 1, 2, 2)
    mask, keep_image = torch.tensor([[1.0, 0, 1], [0, 1, 1]]), torch.tensor([1.0, 0])
    random = {"k": k, "noise": noise, "posterior": posterior, "action_mask": mask,
              "keep_image": keep_image}
    pixels = to_pixels(frames)
    latents = pixels.mean((2, 3, 4))[..., None, None, None] + 0.1 * posterior
    schedule = NoiseSchedule()
    error = (0.5 - schedule.velocity(latents, k, noise)).square()
    share = (1 - schedule.alphas_cumprod[k]).view(2, 3, 1, 1, 1)
    for weighting, wanted in (("velocity", error.mean()), ("x0", (share * error).mean())):
        loss = train.PostTraining(model := Written(), False, weighting)(frames, actions, random)
        assert torch.allclose(loss, wanted, rtol=1e-5), weighting
        x, levels, anchor, (tokens, slots), led_to, hidden = model.asked
        assert torch.equal(x, schedule.add_noise(latents, k, noise)) and torch.equal(levels, k)
        assert torch.equal(anchor, latents[:, :1]) and torch.equal(hidden, mask)
        assert torch.equal(led_to, align_actions(2 * actions)) and slots == [0, 1, 2]
        assert torch.equal(model.anchor_image, pixels[:, 0] * keep_image.view(2, 1, 1, 1))
    model.action_dim = 0  # a passive model is told none
    train.PostTraining(model, False)(frames, actions, random)
    assert model.asked[4] is None


def test_what_is_drawn_for_a_clip_is_of_the_papers_shares():
    drawn = train.random_inputs(Written(), torch.randn(2000, 3, 2), range(2000), Settings())
    assert abs(drawn["keep_image"].mean() - 0.95) < 0.015
    assert abs(drawn["action_mask"].mean() - 0.8) < 0.015
    noise = torch.stack([drawn["noise"].flatten(), drawn["posterior"].flatten()])
    assert (noise.cov() - torch.eye(2)).abs().max() < 0.03  # independent, standard Gaussian


def test_the_learning_rate_rises_and_falls_in_lines():
    settings = Settings(steps=20, lr=0.1, cooldown=5)
    settings.warmup = 10
    rates = [train.learning_rate(step, settings) for step in range(20)]
    assert np.allclose(rates[:10], np.arange(1, 11) / 100) and np.allclose(rates[10:16], 0.1)
    assert np.allclose(rates[15:], [0.1, 0.08, 0.06, 0.04, 0.02])


def test_every_clip_is_taken_once_and_gradients_of_a_step_are_a_mean():
    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, i: int) -> dict:
            return {"frames": np.zeros((2, 1, 1, 3), np.uint8), "damaged": [f"clip {i}"] * (i == 9),
                    "actions": np.full((2, 2), i, np.float32), "index": i}

    settings = Settings(steps=3, batch=2, workers=0)
    settings.accumulate = 2
    taken = [[batch["index"] for batch in train.load_batches(Numbers(), settings, 1, rank, 2)]
             for rank in (0, 1)]  # from the second step on, by two processes
    assert taken == [[[first, first + 1] for first in range(8 + 2 * rank, 24, 4)]
                     for rank in (0, 1)]

    class Slope(nn.Module):  # the loss is the mean of the actions, times w
        w = nn.Parameter(torch.ones(()))

        def forward(self, frames: Tensor, actions: Tensor, random: dict) -> Tensor:
            return self.w * actions.mean()

    model = SimpleNamespace(device=torch.device("cpu"), latent_shape=(1, 2, 2))
    batches = train.load_batches(Numbers(), settings, 1, 0, 2)
    loss, damaged = train.add_gradients(slope := Slope(), model, batches, settings)
    mean = (8 + 9 + 12 + 13) / 4
    assert loss == mean and slope.w.grad.item() == mean and damaged == ["clip 9"]


@small_preset()
def test_the_optimizer_is_adamw_and_a_gradient_is_clipped():
    root, moved = make_rt1([8] * 6), {}
    for limit, warmup in ((0.5, 0), (1e-13, 0), (0.5, 4)):
        words = train_words(root, folder() / "run", 1, 2, f"clip_grad={limit}", f"warmup={warmup}")
        assert run_command(train.main, *words, "--lr", 1e-3, "--cooldown", 0)[0] == 0
        saved = read_checkpoint(Path(words[words.index("--out") + 1]) / "checkpoint.pt")
        group, = saved["optimizer"]["param_groups"]
        assert tuple(group["betas"]) == (0.9, 0.999) and group["weight_decay"] == 0.01
        moved[limit, warmup] = saved["weights"]["unet.out.2.bias"].abs().max().item()  # from zero
    # Adam's first step is as long as the rate, unless the gradient is far below its epsilon
    assert 0.9e-3 < moved[0.5, 0] < 1.1e-3 and moved[1e-13, 0] < 1e-7, moved
    assert 0.9 * 0.25e-3 < moved[0.5, 4] < 1.1 * 0.25e-3, moved


def test_validation_says_whether_a_world_follows_its_actions():
    root = make_rt1([8] * 12)
    held_out = open_episodes("rt1", root, "val")
    settings, seen = Settings(frames=4, size=[64, 80], bf16=False), []
    settings.val_clips = 3

    class Follows(nn.Module):  # is wrong by how far the actions are from the clip's own
        def __init__(self, model, bf16):
            super().__init__()

        def forward(self, frames, actions, random):
            seen.append(actions)
            return (actions - seen[len(seen) - 1 & ~1]).square().mean()

    class Ignores(Follows):
        def forward(self, frames, actions, random):
            return frames.float().mean()

    model = Model(replace(TINY, unet=replace(TINY.unet, causal=True, action_dim=13)))
    measured = train.validate(model, held_out, settings, Follows)
    own, others = seen[::2], seen[1::2]
    assert all(torch.equal(others[i], own[(i + 1) % 3]) for i in range(3))
    apart = [(other - mine).square().mean().item()
             for mine, other in zip(own, others, strict=True)]
    assert measured["val"] == 0 and abs(measured["gap"] - np.mean(apart)) < 1e-6
    assert abs(measured["gap_error"] - np.std(apart, ddof=1) / 3**0.5) < 1e-6 and max(apart) > 0
    assert train.validate(model, held_out, settings, Ignores)["gap"] == 0
    passive = train.validate(Model(TINY), held_out, settings, Ignores)
    assert list(passive) == ["val"]

    def said(*vals, gap):
        rows = [{"step": i, "val": val, "gap": gap, "gap_error": 0.1}
                for i, val in enumerate(vals)]
        recorder = SimpleNamespace(model=model, log=SimpleNamespace(rows=rows), out=Path())
        return run_command(lambda _: Recorder.say_how_it_went(recorder))[1]

    # always the same noise, and nothing hidden, whatever the run trains with
    for parameter in model.unet.parameters():  # or the action would not reach the output
        parameter.data += 0.05 * torch.randn_like(parameter)
    first = train.validate(model.train(), held_out, settings)
    assert model.training and any(isinstance(layer, nn.Dropout) and layer.p
                                  for layer in model.modules())
    settings.action_dropout, settings.image_dropout, settings.shared_level = 1, 1, True
    assert train.validate(model, held_out, settings) == first and first["gap"] != 0

    assert "does not follow its actions" in said(0.3, 0.2, gap=0.19)
    assert "lowest" not in said(0.3, 0.2, gap=0.21) and "world follows" in said(0.2, gap=0.21)
    assert "lowest at step 1: 0.2000; now it is 0.3000" in said(0.4, 0.2, 0.3, gap=0)


def test_a_small_autoencoder_gets_latents_of_unit_deviation_and_draws_the_same():
    pixels, noise = torch.rand(16, 3, 8, 8) * 2 - 1, torch.randn(1, 16, 4, 4, 4)

    def fitted() -> Autoencoder:
        torch.manual_seed(0)
        autoencoder = Autoencoder(AutoencoderConfig(32, (1, 2), 1, latent_scale=1.0))
        with contextlib.redirect_stderr(io.StringIO()), mock.patch(
                "training.tiny_autoencoder.vary_colours", lambda pixels: pixels):
            return fit_autoencoder(autoencoder, iter([pixels] * 2), 2)

    with mock.patch.object(torch.Tensor, "std", lambda latents: torch.tensor(1.0)):
        as_learned = fitted()
    scaled = fitted()
    with torch.no_grad():
        theirs, ours = (each.encode(pixels[None], noise) for each in (as_learned, scaled))
        assert abs(scaled.encode(pixels[None]).std() - 1) < 0.05 < abs(theirs.std() - 1)
        assert error_of(scaled.decode(ours), as_learned.decode(theirs)) < 1e-5
    with contextlib.redirect_stderr(io.StringIO()):  # tuning the decoder leaves them as they are
        fit_autoencoder(scaled, iter([pixels]), 1, decoder_only=True)
    with torch.no_grad():
        assert torch.equal(scaled.encode(pixels[None], noise), ours)
        assert error_of(scaled.decode(ours), as_learned.decode(theirs)) > 1e-3


def test_colours_are_varied_picture_by_picture():
    torch.manual_seed(0)
    red = torch.tensor([0.8, -0.8, -0.8]).view(1, 3, 1, 1).expand(400, 3, 2, 2)
    varied = vary_colours(red)
    assert varied.shape == red.shape and varied.abs().max() <= 1
    assert (varied == varied[:, :, :1, :1]).all()  # a picture's pixels alike
    brightest = varied[:, :, 0, 0].argmax(dim=1)
    # half of the pictures have their colours exchanged, so red becomes green in a sixth
    assert abs((brightest == 1).float().mean() - 1 / 6) < 0.06
    assert len(varied[:, 0, 0, 0].unique()) > 100


def test_what_a_run_starts_from_is_what_was_asked():
    dataset = DATA_SETS["rt1"]
    with contextlib.redirect_stdout(io.StringIO()):
        base = from_dynamicrafter(TINY_BASE, TINY)
        scratch, kept = (build_model(parse_arguments(["--base", str(TINY_BASE), *words]), dataset)
                         for words in (["--scratch"], []))
    names = ("unet.input_blocks.1.0.in_layers.2.weight", "resampler.proj_in.weight",
             "autoencoder.decoder.conv_in.weight", "image_tower.conv1.weight")
    theirs = dict(base.named_parameters())
    for model, same in ((kept, (True,) * 4), (scratch, (False, False, True, True))):
        ours = dict(model.named_parameters())
        assert tuple(torch.equal(ours[name], theirs[name]) for name in names) == same
        assert [ours[name].requires_grad for name in names] == [True, True, False, False]
    settings = parse_arguments(["--out", str(folder() / "new"), "--set", "dropout=0.3"])
    episodes = SimpleNamespace(dataset=dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        model, saved = start_or_resume(settings, train.WORLD, episodes, torch.device("cpu"))
    assert saved is None
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.3}


def test_a_frozen_autoencoder_encodes_a_frame_once():
    autoencoder, calls = Model(TINY).autoencoder, []
    pixels = torch.rand(2, 3, 3, 16, 16)
    wanted = autoencoder.encode(pixels)
    autoencoder.encoder.register_forward_hook(lambda *call: calls.append(len(call[1][0])))
    encode_once(autoencoder, most=4)
    with torch.no_grad():
        for clip in (pixels[:1], pixels[:1].flip(1), pixels):
            autoencoder.encode(clip)
        assert calls == [3, 3] and torch.allclose(autoencoder.encode(pixels), wanted, atol=1e-5)
        autoencoder.encode(torch.rand(1, 2, 3, 16, 16))
        autoencoder.encode(new := torch.rand(1, 2, 3, 16, 16))
        assert calls == [3, 3, 2, 2]  # six are known, more than four
        autoencoder.encode(new)
        assert calls == [3, 3, 2, 2, 2]


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
    assert run.returncode == 128 + signal.SIGTERM and "resume:" in printed, printed
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
    assert (small.steps, small.batch, small.preset, small.size) == (1000, 2, "tiny", [64, 80])
    assert small.augment is False and full.augment is None
    assert small.decoder_steps == 200 and parse_arguments(["--passive"]).decoder_steps == 0
    assert (full.steps, full.batch, full.lr, full.action_dropout) == (100_000, 8, 1e-5, 0.2)
    changed = parse_arguments(["--set", "low_noise_prob=0.6", "loss_weighting=x0", "dropout=0",
                                     "val_clips=3"])
    found = changed.low_noise_prob, changed.loss_weighting, changed.dropout, changed.val_clips
    assert found == (0.6, "x0", 0, 3)
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
    assert code == 0 and "(default: 1000)" in printed and "100000" not in printed
    options = set(re.findall(r"^  --([a-z-]+)", printed, re.M))
    assert len(options) <= 24, options
    printed = run_command(sample.main, "--help")[1]
    assert len(set(re.findall(r"^  --([a-z-]+)", printed, re.M))) <= 14


def test_noise_and_masks_belong_to_the_clip_not_to_the_batch():
    model = small_world().model
    actions, settings = torch.randn(4, 5, 13), Settings(action_dropout=0.5, image_dropout=0.5)
    together = train.random_inputs(model, actions, [0, 1, 2, 3], settings)
    apart = train.random_inputs(model, actions[2:], [2, 3], settings)
    assert all(torch.equal(together[name][2:], apart[name]) for name in together)
    assert len(together["k"].unique()) > 10  # a level for every frame
    shared = train.random_inputs(model, actions, [0, 1, 2, 3], replace(settings, shared_level=True))
    assert all(len(levels.unique()) == 1 for levels in shared.pop("k")) and len(shared) == 4
    assert all(torch.equal(together[name], shared[name]) for name in shared)
    clear = train.random_inputs(model, actions, [0, 1, 2, 3], replace(settings, low_noise_prob=0.5))
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
