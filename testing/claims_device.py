"""Claims about memory, devices and number formats."""
import os
import re
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from dynamicrafter import autoencoder
from dynamicrafter.checkpoint import read_checkpoint, read_lightning
from model import device
from model.memory import frozen_to_bf16
from model.saving import TINY_BASE, load_model
from model.vid2world import PRESETS
from testing import full_size, on_a_gpu, plan
from testing.commands import folder, run_command
from testing.episodes import make_rt1
from testing.golden import error_of
from testing.worlds import small_checkpoint, small_episode, small_world, train_words
from training.settings import Settings


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
    assert temporal < recomputing


def test_frozen_parts_may_be_halved_and_frames_coded_one_by_one():
    root, out = make_rt1([8] * 6), folder() / "run"
    words = ["--bf16", "--base", TINY_BASE]
    with mock.patch.object(train, "math_attention_on_cpu") as quick:
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
        assert error_of(latents, together[0]) < 2e-6
        assert error_of(model.decode(latents), together[1]) < 6e-6
    model.autoencoder.requires_grad_(False)
    frozen_to_bf16(model)
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
        assert choose() == "cuda" and train.parse_arguments([]).bf16 is True


def test_training_computes_in_bfloat16_where_the_cpu_has_units_for_it():
    for avx512, amx in ((False, False), (True, False), (False, True)):
        with (mock.patch("torch.cuda.is_available", return_value=False),
              mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=avx512, create=True),
              mock.patch("torch.cpu._is_amx_tile_supported", return_value=amx, create=True)):
            assert train.parse_arguments([]).bf16 is (avx512 or amx)
            assert train.parse_arguments(["--no-bf16"]).bf16 is False


def test_a_small_network_learns_in_bfloat16_with_attention_written_out():
    def learn(*choice: bool) -> tuple[Tensor, bool]:
        """Gradients, and whether the fused kernel made them."""
        generator = torch.Generator().manual_seed(0)
        heads = torch.randn(3, 2, 4, 20, 16, generator=generator).bfloat16().requires_grad_()
        quick = device.math_attention_on_cpu(torch.device("cpu"), *choice)
        with quick, torch.profiler.profile() as seen:
            nn.functional.scaled_dot_product_attention(*heads).square().sum().backward()
        return heads.grad, any("flash" in event.name for event in seen.events())

    (written_out, fused), (plain, plain_fused) = learn(True, True), learn(True, False)
    assert plain_fused and not fused and learn(False, True)[1]
    assert error_of(written_out.float(), plain.float()) < 2e-2


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


def test_what_is_measured_on_a_gpu_runs_on_a_cpu():
    with mock.patch.object(on_a_gpu, "TRAININGS", ((1, True),)):
        code, said = run_command(on_a_gpu.main, "--rehearse")
    assert code == 0 and "failed" not in said and said.count("steps with guidance") == 4
    assert float(re.search(r"float32: the original U-Net's output to (\S+),", said)[1]) < 5e-6
    assert "a pass over two branches of frame 16" in said and "a training step, 1 clips" in said


def test_a_part_that_fails_on_a_gpu_is_named_and_the_others_go_on():
    def time_pass(*_):
        raise ValueError("too slow")

    quick = {"compare": mock.Mock(), "time_frames": mock.Mock(), "time_training": mock.Mock()}
    with mock.patch.multiple(on_a_gpu, time_pass=time_pass, **quick):
        code, said = run_command(on_a_gpu.main, "--rehearse")
    assert code == 1 and "time_pass failed: ValueError: too slow" in said
    assert quick["time_training"].call_count == len(on_a_gpu.TRAININGS)
