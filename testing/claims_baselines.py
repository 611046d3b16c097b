"""Claims about the other ways to steer a video model."""
import sys
import re
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

import train
from baselines import (action_finetuning, avid, classifier_guidance, clips, controlnet,
                       language_finetuning)
from data import DATA_SETS, SAMPLES, Clips, collate, open_episodes
from diffusion_forcing import NoiseSchedule
from episodes.tfrecord import encode_example, write_records
from evaluation import baselines, comparison
from model.saving import frozen_weights, load_model, save, trained_weights
from model.vid2world import Model
from support.errors import DataError, RequestError
from testing.commands import folder, raises, refused, run_command
from testing.episodes import encode_jpeg
from testing.golden import error_of
from training.run_folder import read_settings


def clip_baselines() -> tuple[np.ndarray, np.ndarray, Model, dict[str, tuple]]:
    """A clip's first frame and actions, the passive base, and each baseline's recipe and model."""
    settings = train.parse_arguments(["--data", "rt1"])
    episodes = open_episodes("rt1", SAMPLES, "val")
    frames, actions = episodes[0].read(0, 4)
    recipes = {"action": action_finetuning.RECIPE, "controlnet": controlnet.RECIPE,
               "avid": avid.RECIPE,
               "classifier": classifier_guidance.RECIPE, "language": language_finetuning.recipe()}
    built = {name: (recipe, recipe.build(settings, episodes.dataset))
             for name, recipe in recipes.items()}
    return frames[None], actions[None, :3], clips.base_of(settings, episodes.dataset), built


def test_baselines_start_exactly_as_the_base_and_follow_actions_once_they_have_learned():
    frames, actions, base, built = clip_baselines()
    as_base = clips.sample_clips(base, frames, actions, steps=2)
    nothing = np.zeros((1, 3, 4), np.float32)  # the empty caption
    assert not any(layer.weight.any() for layer in built["controlnet"][1].unet.copy.zero_convs)
    for name, told in (("controlnet", actions), ("classifier", actions), ("language", nothing)):
        imagined = clips.sample_clips(built[name][1], frames, told, steps=2)
        off = abs(imagined.astype(int) - as_base)  # some processors round a sum with zero anew
        assert off.max() <= 1 and off.mean() < 1e-3, name
    steer = classifier_guidance.towards_actions(built["classifier"][1], weight=1.0)
    steered = clips.sample_clips(built["classifier"][1], frames, actions, steps=4, steer=steer)
    unsteered = clips.sample_clips(base, frames, actions, steps=4)
    assert not np.array_equal(steered, unsteered)
    for layer in built["controlnet"][1].unet.copy.zero_convs:
        nn.init.normal_(layer.weight, std=0.1)
    for parameter in built["avid"][1].unet.adapter.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name in ("action", "avid", "controlnet"):
        one, other = (clips.sample_clips(built[name][1], frames, sign * actions, steps=2)
                      for sign in (1, -1))
        assert not np.array_equal(one, other), name
    refused_frames = np.zeros((1, 20, 13), np.float32)
    with raises(RequestError, "21 frames do not fit into one clip of 16"):
        clips.sample_clips(base, frames, refused_frames)


def test_clips_are_sampled_under_the_actions_that_led_to_their_frames():
    frames, actions, _, built = clip_baselines()
    model, told = built["action"][1], []
    denoise = model.denoise
    model.denoise = lambda *asked: (told.append(asked[4]), denoise(*asked))[1]
    imagined = clips.sample_clips(model, frames, actions, steps=2)
    wanted = np.concatenate([np.zeros_like(actions[:, :1]), actions], axis=1)
    assert len(told) == 2 and all(np.allclose(led_to, wanted, atol=1e-6) for led_to in told)
    assert np.array_equal(imagined[:, 0], frames[:, 0])
    assert not np.array_equal(imagined[:, 1], frames[:, 1])


def test_a_perfect_classifier_pulls_the_clip_to_the_action():
    schedule, target = NoiseSchedule(), torch.randn(1, 3, 1, 2, 2)
    # log p = -|x - target|² / 2, whose gradient is target - x
    model = SimpleNamespace(schedule=schedule, log_likelihood=lambda x, *_: -(
        x - target).square() / 2)
    steer = classifier_guidance.towards_actions(model, weight=0.3)
    follow = steer(lambda x, k: torch.zeros_like(x), None, None, None)
    x = torch.randn(1, 3, 1, 2, 2)
    for level in (100, 400, 700):
        k = torch.full((1, 3), level)
        alpha = schedule.alphas_cumprod[level]
        wanted = -0.3 * ((1 - alpha) / alpha).sqrt() * (target - x)
        assert torch.allclose(follow(x, k), wanted, atol=1e-5)
        # and what the velocity stands for is nearer to it
        ends = [schedule.ddim_step(x, v, k, level - 100, eta=0.0)
                for v in (torch.zeros_like(x), follow(x, k))]
        assert (ends[1] - target).norm() < (ends[0] - target).norm()
    assert not follow(x, torch.full((1, 3), 999)).any()  # noise alone is not corrected
    actions = torch.tensor([[[-0.5], [0.1], [0.5]]])  # the last leads out of the clip
    assert classifier_guidance.bins_of(actions).tolist() == [[[0], [1]]]


def test_a_classifier_learns_on_noisy_latents():
    asked, schedule = [], NoiseSchedule()
    frames, actions = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8), torch.randn(2, 3, 2)
    latents, noise = torch.randn(2, 2, 3, 1, 2, 2)

    def log_likelihood(*inputs):
        asked.append(inputs)
        return torch.tensor([-1.0, -3.0])

    model = SimpleNamespace(schedule=schedule, encode=lambda pixels, noise: latents,
                            image_tokens=lambda anchor: None, context=lambda tokens, slots: None,
                            log_likelihood=log_likelihood)
    k = torch.tensor([[0, 300, 999], [50, 500, 700]])
    loss = classifier_guidance.ClassifierTraining(model, False)(
        frames, actions, {"k": k, "noise": noise, "posterior": noise})
    x, levels, anchor, _, told = asked[0]
    assert loss == 2 and torch.equal(x, schedule.add_noise(latents, k, noise))
    assert torch.equal(levels, k) and torch.equal(anchor, latents[:, :1]) and told is actions


def test_what_the_copy_makes_is_added_to_the_skips_and_to_the_middle():
    _, _, base, built = clip_baselines()
    model = built["controlnet"][1].eval()
    x, k = torch.randn(1, 2, 8, 16, 20), torch.full((1, 2), 500)
    text, image = torch.zeros(1, 1, 64), torch.randn(1, 2, 4, 64)
    block = base.unet.eval().output_blocks[0][0]  # reads the middle and the last skip connection
    middle, skip = (conv.out_channels for conv in (model.unet.copy.zero_convs[-1],
                                                   model.unet.copy.zero_convs[-2]))
    for conv, change in ((model.unet.copy.zero_convs[-1], slice(0, middle)),
                         (model.unet.copy.zero_convs[-2], slice(middle, middle + skip))):
        nn.init.constant_(conv.bias, 0.3)
        def add(_, inputs, change=change):
            h = inputs[0].clone()
            h[:, change] += 0.3
            return h, *inputs[1:]
        hook = block.register_forward_pre_hook(add)
        with torch.no_grad():
            ours, theirs = model.unet(x, k, text, image), base.unet(x, k, text, image)
        assert error_of(ours, theirs) < 1e-5
        hook.remove()
        nn.init.zeros_(conv.bias)


def test_an_adapter_is_believed_where_its_mask_says_so():
    _, _, base, built = clip_baselines()
    unet, passive = built["avid"][1].eval().unet, base.unet.eval()
    x, k, actions = torch.randn(1, 2, 8, 16, 20), torch.full((1, 2), 500), torch.randn(1, 2, 13)
    text, image, seen = torch.zeros(1, 1, 64), torch.randn(1, 2, 4, 64), []
    unet.adapter.input_blocks[0][0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    last = unet.adapter.out[-1]
    with torch.no_grad():
        theirs = passive(x, k, text, image)
        ours = unet(x, k, text, image, actions=actions)
        answer = 2 * ours - theirs  # the mask begins at a half
        assert answer.std() > 0.05 and error_of(seen[0][0][:, 8:], theirs[0]) < 1e-5
        for logit, wanted in ((20.0, theirs), (-20.0, answer)):
            last.bias[4] = logit
            assert error_of(unet(x, k, text, image, actions=actions), wanted) < 1e-5


def test_gradients_reach_what_a_baseline_trains_and_nothing_else():
    _, _, base, built = clip_baselines()
    episodes = open_episodes("rt1", SAMPLES, "train")
    batch, said = (collate([Clips(each, 4, (64, 80), seed=0)[0]]) for each in (
        episodes, language_finetuning.CaptionedEpisodes(episodes)))
    settings = replace(train.parse_arguments(["--data", "rt1"]), shared_level=True,
                       action_dropout=0.0)
    learns = {"action": ("unet.", "resampler."), "controlnet": ("unet.copy.",),
              "avid": ("unet.adapter.",), "classifier": ("unet.classifier.",),
              "language": ("unet.", "resampler.", "words.")}
    for name, (recipe, model) in built.items():
        loss = (recipe.loss or train.PostTraining)(model, False)
        train.batch_loss(loss, model, said if name == "language" else batch, settings).backward()
        reached = {key for key, p in model.named_parameters() if p.grad is not None}
        wanted = {key for key, p in model.named_parameters() if p.requires_grad}
        assert reached <= wanted and all(key.startswith(learns[name]) for key in wanted), name
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        if name in ("avid", "controlnet", "classifier"):  # every weight of the base is untouched
            theirs = dict(base.unet.named_parameters())
            assert all(torch.equal(p, theirs[key]) for key, p in model.unet.named_parameters()
                       if key in theirs), name


def test_a_saved_baseline_gives_the_same_samples():
    frames, actions, _, built = clip_baselines()
    for name, (recipe, model) in built.items():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.01
        out = folder()
        save(out / "frozen.pt", {"weights": frozen_weights(model)})
        save(out / "checkpoint.pt", {"config": asdict(model.config), "frozen": "frozen.pt",
                                     "weights": trained_weights(model), "step": 0})
        again = load_model(out, kind=recipe.model_class)
        told = np.ones((1, 3, 4), np.float32) if name == "language" else actions
        # PyTorch multiplies matrices in another way, and rounds differently, if they may learn.
        ours, theirs = (clips.sample_clips(each.requires_grad_(False), frames, told, steps=2)
                        for each in (model, again))
        assert np.array_equal(ours, theirs), name


def test_a_baseline_is_trained_by_the_loop_of_train_py():
    out = folder() / "run"
    words = ["--data", "rt1", "--root", SAMPLES, "--out", out, "--steps", 1, "--batch", 1,
             "--frames", 4, "--workers", 0, "--set", "val_clips=1"]
    code, said = run_command(controlnet.main, *words)
    assert code == 0 and "done at step 1" in said, said
    begun = read_settings(out)  # one level a clip, and no action hidden
    assert begun["shared_level"] is True
    assert begun["action_dropout"] == begun["low_noise_prob"] == 0
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
    left, right = (clips.sample_clips(model, frames, caption, steps=2) for caption in told)
    assert not np.array_equal(left, right)
    both = np.stack([language_finetuning.word_numbers([word]) for word in ("left", "right")])
    x, k = torch.randn(2, 3, *model.latent_shape), torch.full((2, 3), 500)
    captions, tokens = torch.from_numpy(both)[:, None].expand(2, 3, 4), torch.randn(2, 64, 64)
    with torch.no_grad():
        together, *apart = (model.denoise(x[i], k[i], x[i][:, :1],
                                          model.context(tokens[i], range(3)), captions[i])
                            for i in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert torch.allclose(together, torch.cat(apart), atol=4e-6)  # each clip hears its own
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


def test_captions_at_full_size_are_clips_tokens():
    clip = mock.Mock(tokenize=lambda texts, context_length: torch.arange(context_length)[None])
    with mock.patch.dict(sys.modules, {"open_clip": clip}):
        assert language_finetuning.clip_tokens("open").tolist() == list(range(77))
    with mock.patch.dict(sys.modules, {"open_clip": None}):
        with raises(RequestError, "pip install open_clip_torch"):
            language_finetuning.clip_tokens("open")


def test_the_ways_to_steer_are_compared():
    words = ["--seeds", 1, "--steps", 10, "--cooldown", 5, "--episodes", 2, "--batch", 1,
             "--val-clips", 1, "--denoising-steps", 2, "--out", out := folder() / "table",
             "--decoder-steps", 0,
             "--frames", 4, "--rows", "base",
             "classifier guidance", "language-conditioned", "Vid2World-NAR"]
    before, train_reader = dict(baselines.RECIPES), comparison.train_reader
    comparison.train_reader = partial(train_reader, steps=2, size=2)
    try:
        code, printed = run_command(baselines.main, *words)
        drawn = Image.open(out / "baselines.png").height
        (out / "base_0.npy").unlink()  # as from a table whose clips were not kept
        again = run_command(baselines.main, *words)[1]  # what is done is not done again
        refused(baselines.main, *words, "--rows", "classifier guidance", "--steps", 11,
                saying="has steps 10, and here it is 11")
    finally:
        comparison.train_reader = train_reader
    assert code == 0 and before == baselines.RECIPES, printed
    rows = re.findall(r"^\| [\w-]+(?: \w+)? \| [\d.]+ \| 0.\d+ \| [\d.]+ \|", printed, re.M)
    assert len(rows) == 4 and again.endswith(printed[printed.rindex("| base"):]), printed
    assert drawn == 5 * (128 + 28)  # the truth and four rows
    assert Image.open(out / "baselines.png").height == 4 * (128 + 28)
    refused(baselines.main, "--rows", "magic", saying="there is no row 'magic'")
