"""How do you know? Plant a fault, and see whether a test notices: python -m testing.mutants

Each fault below changes one line that decides what the method is, what a measurement says, or what
a baseline learns. They are planted one by one in a copy of the project; then the tests whose names
contain one of the words beside the file are run. A fault that no test notices survives, and then a
claim of this project is one that nothing could refute.

    python -m testing.mutants                       all of them, about an hour on one core
    python -m testing.mutants train.py "guid"       those of files, or with effects, of such names
"""
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.options import argument, program

HERE = Path(__file__).parent.parent
FILES_ONLY = ("checkpoints", "figures", "golden", "samples")  # linked, and not copied

# file, words of tests: what stands there, what is put in its place, what that does
FAULTS = {
    # ---------------------------------------------------------------------------------- the method
    ("causal_conv.py", "transfer kernel extrapolative masked_and future_frames half_precision"): [
        ("kernel.mean(dim=2, keepdim=True)", "kernel.mean(dim=2, keepdim=True) / 2",
         "`mixed` gives the frame at t-2 half of the mean"),
        ("(1 + j) * future", "j * future", "the line through two frames misses the last one"),
        ("causal[:, :, -2] -= j", "causal[:, :, -2] += j", "the line runs backwards"),
        ("causal[:, :, m:] = past_and_present", "causal[:, :, : m + 1] = past_and_present",
         "weights in place lie on frames that are too early"),
        ("(kernel_size - 1, 0) if causal", "(side, side) if causal",
         "a causal convolution looks ahead"),
        ("kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))", "pass",
         "the sums of a kernel in half precision are rounded"),
    ],
    ("causal_attention.py", "epsilon unet_agrees authors future_frames new_network"): [
        ("is_causal=self.causal", "is_causal=False", "attention sees the future"),
        ("x = x + self.attn2(self.norm2(x), cache)", "x = x + self.attn2(self.norm1(x), cache)",
         "the second attention takes the first one's norm"),
        ("eps=1e-6, scope=norm_scope", "eps=1e-5, scope=norm_scope",
         "the norm of a transformer has the epsilon of the others"),
        ("self.proj_out = zero_init(projection(inner, channels))",
         "self.proj_out = projection(inner, channels)",
         "a new transformer changes what was pretrained"),
    ],
    ("temporal/norm.py", "epsilon norm_scopes past_norms"): [
        ("correction=0", "correction=1", "variances are those of samples"),
        ("device=x.device).tril()", "device=x.device)", "norms over the past see the future"),
        ("((var[..., None, :] + spread) * share)", "(var[..., None, :] * share)",
         "the spread of the frames' means is left out"),
        ("eps: float = 1e-5, scope", "eps: float = 1e-6, scope", "the epsilon of temporal norms"),
        ("with torch.autocast(x.device.type, enabled=False):", "if True:",
         "norms over the past compute in half precision"),
    ],
    ("temporal/streaming.py", "streaming_imagines memory_matters a_cache"): [
        ("mask.tril(self.frames)", "mask.tril(self.frames + 1)",
         "an appended frame sees the next one"),
        ("= itself", "= True", "the two branches see each other"),
        ("self.frames += self.appended", "self.frames += self.appended + self.branches",
         "branches stay in the cache"),
        ("frames[:, :, cache.appended : -1].clone()", "past",
         "a convolution remembers the frames before those of the last pass"),
        ("* q.shape[-1] ** -0.5", "* 1.0", "written-out attention forgets √d"),
        ("mean = torch.cat([past[0], mean], dim=-1)", "mean = torch.cat([mean, past[0]], dim=-1)",
         "means and variances are of different frames"),
    ],
    ("unet.py", "unet_agrees authors dropped_action loads_with"): [
        ("(action if action_mask is None else action * action_mask[..., None])", "action",
         "no action is ever hidden"),
        ("+ self.fps_embedding(sinusoidal_embedding(fps, width))[:, None]", "",
         "the frame rate is not told"),
        ("return x + self.ff(self.norm3(x))", "return x + self.ff(x)",
         "a feed-forward without its norm"),
        ("transfer_weights(weights[name], transfer)", 'transfer_weights(weights[name], "shift")',
         "every transfer is `shift`"),
        ("emb_layers(conditions.emb).flatten(0, 1)", "emb_layers(conditions.emb[:, :1].expand_as("
         "conditions.emb)).flatten(0, 1)", "every frame is told the level of the first"),
    ],
    ("diffusion_forcing.py", "levels_are schedule velocity fresh_noise the_loss sampling_with "
                             "history_is"): [
        ("k = torch.randint(LEVELS, shape, generator=generator)",
         "k = torch.randint(LEVELS, shape, generator=generator)[..., :1].expand(shape)",
         "all frames of a clip have one level: no diffusion forcing"),
        ("return k[..., :1].expand(shape)", "return k", "a shared level is not shared"),
        ("low_noise, k // 10, k", "low_noise, k // 2, k",
         "low-noise frames have half of the noise"),
        ("(1 - alpha).sqrt() * error", "alpha.sqrt() * error",
         "the loss on clean latents weighs the wrong end"),
        ("- schedule.velocity(latents, k, noise)", "- noise", "the network learns the noise"),
        ("torch.linspace(1, base_scale, 400", "torch.linspace(1, 1, 400",
         "the signal keeps its scale over the first levels"),
        ("[history_level] * history", "[0] * history", "the history is told to be clean"),
        ("return eta * (", "return eta**2 * (", "η is squared"),
        ("(1 - alpha_next - sigma**2)", "(1 - alpha_next)", "fresh noise adds to the old"),
        ("* (scale_next / scale)", "", "a step leaves the signal's scale as it was"),
    ],
    ("action_guidance.py", "actions_are guidance_ex he_init several_worlds"): [
        ("torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], dim=1)", "actions",
         "an action stands beside the frame it was taken at"),
        ("(u >= probability)", "(u[:, :1].expand_as(u) >= probability)",
         "a clip's actions are hidden together"),
        ("v_uncond + guidance * (", "v_cond + guidance * (", "λ counts from the wrong end"),
        ("rescale * rescaled + (1 - rescale) * v", "(1 - rescale) * rescaled + rescale * v",
         "rescaling is turned around"),
        ("v.std(frame, keepdim=True)", "v.std()", "all worlds of a batch share one contrast"),
        ('nonlinearity="relu"', 'nonlinearity="linear"', "He's factor is missing"),
    ],
    ("sample.py", "full_window history_is samplers unknown_past guidance_applies earlier_window "
                  "streaming_imag checkpoint_else joins_the actions_chosen unless_eta without_data "
                  "deviation"): [
        ("tokens=self.model.image_tokens(pixels[:, 0])",
         "tokens=self.model.image_tokens(pixels[:, -1])",
         "after the window slid, image tokens are those of the last frame"),
        ("anchor=window.latents[:, -length, None]", "anchor=window.latents[:, -1, None]",
         "after the window slid, the anchor is the last frame"),
        ("        actions[:, 0] = 0\n", "", "an action leads to the anchor"),
        ("window = self.slide(window, self.overlap)",
         "window = self.slide(window, self.overlap - 1)",
         "one frame too few stays"),
        ("action_mask[:, 1:] = 0", "action_mask[:, 1:] = 1",
         "unknown actions are actions of zeros"),
        ("history = self.to_history(latents)", "history = latents",
         "new frames join without noise"),
        ("and low <= k < high", "and low <= k <= high", "guidance applies at one level too many"),
        ("self.generator.set_state(window.random_state)", "pass",
         "a step that is taken again gives another frame"),
        ("model.sampling | named", "named | model.sampling", "the checkpoint overrules the user"),
        ("torch.cat([past, newest * keep], dim=1)", "torch.cat([past, newest], dim=1)",
         "without the cache, both branches know the action"),
        ("[newest * keep for keep in keep_action]", "[newest for keep in keep_action]",
         "with the cache, both branches know the action"),
        ("recorded[context_frames - 1 : -1]", "recorded[context_frames:]",
         "actions come a frame too early"),
        ("theirs[context_frames - 1 : context_frames]", "theirs[:1]",
         "the command's baseline repeats the first frame"),
        ("return self.model.standardise(actions)", "return actions",
         "a world takes actions in other units than training"),
        ("self.sampling.guidance, self.sampling.rescale)", "self.sampling.guidance, 0.0)",
         "guidance is never rescaled"),
        ("self.sampling.eta, draw_noise", "1.0, draw_noise", "η is always 1"),
        ("self.noise(B, 1), partial(velocity, window)", "0 * self.noise(B, 1), partial(velocity, "
         "window)", "a new frame starts from nothing"),
        ("window.action_mask, (0, 1), value=1.0", "window.action_mask, (0, 1), value=0.0",
         "the newest action is hidden"),
    ],
    ("model/vid2world.py", "all_tokens pixels samplers deviation"): [
        ("[:, :frames]", "[:, -frames:]", "short clips read the image tokens of the last slots"),
        ("and frames != slots", "and frames == slots", "released checkpoints get the wrong tokens"),
        (".clamp(-most, most)", "", "actions are not clipped"),
        ("* 127.5).round()", "* 127.5)", "pixels are rounded down"),
        ("torch.cat([x, anchor.expand_as(x)], dim=2)", "torch.cat([anchor.expand_as(x), x], dim=2)",
         "anchor and noisy latents change places"),
    ],
    ("dynamicrafter/autoencoder.py", "autoencoder_agrees"): [
        ("(0.5 * log_variance.clamp(-30, 20)).exp()", "log_variance.clamp(-30, 20).exp()",
         "the posterior's deviation is its variance"),
        ("return mean * self.config.latent_scale", "return mean", "latents keep their own size"),
    ],
    # ----------------------------------------------------------------------------------- training
    ("train.py", "step_of_training drawn_for learning_rate every_clip belong_to_the_clip "
                 "validation_says optimizer_is trains_resumes"): [
        ('noise=random["posterior"]', "noise=None", "the posterior's mean in place of a sample"),
        ("anchor_image = pixels[:, 0]", "anchor_image = pixels[:, -1]",
         "image tokens are those of the last frame"),
        ("latents[:, :1], context", "latents[:, -1:], context", "the anchor is the last frame"),
        ('led_to, random["action_mask"])', "led_to, None)", "no action is hidden in training"),
        ("align_actions(model.standardise(actions))", "align_actions(actions)",
         "actions are learned in the data's own units"),
        ('* random["keep_image"].view(-1, 1, 1, 1)', "", "the anchor image is never blank"),
        ('random["noise"], self.weighting)', 'random["noise"])', "the weighting is ignored"),
        ("settings.shared_level, settings.low_noise_prob)", "settings.shared_level)",
         "no frame has little noise by design"),
        (">= settings.image_dropout", "< settings.image_dropout", "anchor images are mostly blank"),
        ("batch_loss(loss_module, model, batch, settings) / settings.accumulate",
         "batch_loss(loss_module, model, batch, settings)", "accumulated gradients are a sum"),
        ("(number * processes + rank) * settings.batch", "rank * settings.batch",
         "the same batch again and again"),
        ("rise = (step + 1) / max(settings.warmup, 1)", "rise = 1", "no warmup"),
        ("fall = (settings.steps - step) / max(settings.cooldown, 1)", "fall = 1", "no cooldown"),
        ("lr=settings.lr, fused", "lr=settings.lr, betas=(0.5, 0.9), fused", "Adam's betas"),
        ("clip_grad_norm_(parameters, settings.clip_grad)", "clip_grad_norm_(parameters, 1e9)",
         "gradients are not clipped"),
        ("            optimizer.zero_grad()", "            pass", "gradients of all steps add up"),
        ("manual_seed(mix_seeds(settings.seed, clip))", "manual_seed(torch.seed())",
         "noise is new every time, in validation too"),
        ("action_dropout=0, image_dropout=0, low_noise_prob=0,", "low_noise_prob=0,",
         "validation hides actions and images"),
        ("shared_level=not model.config.unet.causal)", "shared_level=settings.shared_level)",
         "held-out losses of two kinds of training cannot be compared"),
        ("shuffled.item() - losses[-1]", "losses[-1] - shuffled.item()",
         "a world that follows its actions is said not to"),
        ("optimizer.param_groups[0][\"lr\"] = learning_rate(step, settings)", "pass",
         "the rate never changes"),
        ("                    shared_level=not model.config.unet.causal)\n    model.eval()\n",
         "                    shared_level=not model.config.unet.causal)\n",
         "validation drops out neurons"),
        ("            gaps.append(shuffled.item() - losses[-1])\n    model.train()\n",
         "            gaps.append(shuffled.item() - losses[-1])\n",
         "after a validation nothing is dropped out any more"),
    ],
    ("training/start.py", "run_starts_from folder_of_your_own"): [
        ("        part.requires_grad_(False)\n    if settings.trainable", "        pass\n    if "
         "settings.trainable", "nothing stays frozen"),
        ("UNet(config.unet), Resampler(config.resampler)",
         "model.unet, Resampler(config.resampler)",
         "from scratch is not from scratch"),
        ("layer.p = settings.dropout", "layer.p = 0.5", "dropout is not what was asked for"),
        ("if not saved and episodes.dataset.standardise",
         "if episodes.dataset.standardise and False",
         "actions of one's own are not standardised"),
    ],
    ("training/tiny_autoencoder.py", "small_autoencoder colours_are"): [
        ("scale = 1 / mean.std()", "scale = 1", "latents have no unit deviation"),
        ("autoencoder.post_quant_conv.weight /= scale", "pass",
         "the decoder reads latents of another size"),
        ("    if decoder_only:\n        return autoencoder\n", "",
         "tuning a decoder moves the latents"),
    ],
    # --------------------------------------------------------------------------------------- data
    ("training/recorder.py", "whole_path"): [
        ('held_out["val"] < self.lowest', "held_out", "the last step validated counts as the best"),
        ('self.lowest = time.monotonic(), (saved or {}).get("lowest", float("inf"))',
         'self.lowest = time.monotonic(), float("inf")', "a resumed run forgets its best step"),
    ],
    ("episodes/show.py", "shifted_is"): [
        ("gains > HELPS * whole)[-1]", "gains > HELPS * whole)[0]",
         "the first row that helps counts"),
        ("left[~seen] = y[~seen] - mean - x[~seen] @ weights",
         "left = y - mean - x @ np.linalg.lstsq(x, y - mean, rcond=None)[0]",
         "what is explained was learned from"),
    ],
    ("episodes/recon.py", "recon_is"): [
        ("np.cos(heading) * north - np.sin(heading) * east",
         "np.cos(heading) * north + np.sin(heading) * east", "left is right when facing east"),
        ("(np.diff(yaw) + np.pi) % (2 * np.pi) - np.pi", "np.diff(yaw)",
         "a turn across the end of the circle is a whole one"),
        ("heading = np.diff(position, axis=0).T, yaw[:-1]",
         "heading = np.diff(position, axis=0).T, yaw[1:]", "the frame after the turn"),
    ],
    ("data.py", "frame_rate_that every_place clips_are_the_same deviation"): [
        ("fps=16, conditioning_fps=3", "fps=16, conditioning_fps=None",
         "CS:GO's network is told 16 frames a second"),
        ("np.cumsum(episodes.lengths - frames + 1)", "np.cumsum(np.ones_like(episodes.lengths))",
         "a clip always begins with its episode"),
        ("np.sqrt(scatter / count)", "scatter / count", "variances are taken for deviations"),
        ("default_rng([self.seed, i, attempt])", "default_rng([self.seed, i // 2, attempt])",
         "every clip is drawn twice"),
        ("aspect=(256, 320),\n        augment=True,", "aspect=(256, 320),",
         "RT-1 is not augmented"),
        ("(\"steps/action/base_displacement_vector\", 2),\n                 "
         "(\"steps/action/base_displacement_vertical_rotation\", 1),",
         "(\"steps/action/base_displacement_vertical_rotation\", 1),\n                 "
         "(\"steps/action/base_displacement_vector\", 2),", "RT-1's numbers in another order"),
        ("context_frames=4, compare_at=(150, 280)", "context_frames=1, compare_at=(150, 280)",
         "CS:GO is given one frame"),
        ("context_frames=4, compare_at=(150, 280)", "context_frames=4, compare_at=None",
         "CS:GO is compared with its bars, at the network's size"),
    ],
    ("episodes/frames.py", "light_and_place fitted_as compared_as"): [
        ("hsv[..., 0] += np.uint8(hue % 256)", "pass", "hue never varies"),
        ("brightness, contrast, saturation = rng.uniform(0.9, 1.1, 3)",
         "brightness, contrast, saturation = rng.uniform(0.9, 1.1), 1, 1",
         "contrast and saturation never vary"),
        ("down, right = rng.integers(-2, 3, 2)", "down, right = 0, 0", "the picture never moves"),
        ("Image.Resampling.BILINEAR", "Image.Resampling.BICUBIC", "frames are resized otherwise"),
        ("    frames = cut_bars(frames, aspect)\n", "", "black bars are compared"),
    ],
    ("episodes/hdf5.py", "h5py_reads"): [
        ("frame[..., ::-1]", "frame", "blue is taken for red"),
    ],
    ("episodes/index.py", "disjoint smallest_hashes"): [
        ("records[validation if split == \"val\" else ~validation]",
         "records[validation] if split == \"val\" else records", "training sees what is held out"),
        ("sorted(np.flatnonzero(usable).tolist(), key=keys.__getitem__)",
         "np.flatnonzero(usable).tolist()", "what is held out are the first episodes"),
    ],
    ("episodes/tfrecord.py", "bad_data random_damage"): [
        ("or masked_crc32c(payload) != int.from_bytes(crc, \"little\")", "",
         "a damaged episode is read"),
    ],
    ("bundled/record_drawer.py", "simulator"): [
        ("viewer.make_context_current()", "pass", "another simulator's meshes are drawn"),
        ("getattr(model, name)[:] = values", "pass", "views wander off from episode to episode"),
    ],
    # ------------------------------------------------------------------------------- measurements
    ("evaluation/metrics.py", "psnr_and_ssim frechet lpips drift"): [
        ("frames.mean(axis=(-3, -2)) - given.mean", "frames.mean(axis=(-3, -2)) - frames.mean",
         "no colour ever shifts"),
        ("+ np.abs(np.diff(pixels, axis=-3)).mean(axis=(-3, -2, -1))) / 2", ") / 2",
         "only edges from left to right are sharp"),
        ("c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2", "c1, c2 = 0.01 * 255, 0.03 * 255",
         "SSIM's constants"),
        ("ours.covariance.trace() + theirs.covariance.trace() - 2 * cross",
         "ours.covariance.trace() + theirs.covariance.trace() - cross", "the Fréchet distance"),
        ("* (self.count * count / total)", "* (self.count / total)",
         "the scatter between two batches"),
    ],
    ("evaluation/evaluate.py", "lpips evaluation_gives drift evaluation_command"): [
        ("truth[:, first - 1 : first]", "truth[:, :1]",
         "the baseline repeats the first frame and not the last given"),
        ("(ours - theirs).square().sum(dim=1)", "(ours - theirs).abs().sum(dim=1)",
         "LPIPS without the square"),
        ("np.arange(b * batch, b * batch + len(truth)) + 1",
         "np.arange(b * batch, b * batch + len(truth))", "the other actions are an episode's own"),
        ("/ number**0.5", "/ number", "the interval shrinks with the number of episodes"),
        ("networks[\"fid\"](pictures[whose])", "networks[\"fid\"](pictures[whose][:1])",
         "FID sees one frame of a batch"),
        ("result = {name: float(row.mean())", "result = {name: float(row[-1])",
         "the result is that of the last frame"),
    ],
    ("evaluation/controllability.py", "bootstrap gripper_is controllability"): [
        ("reader.read(imagined[:, -1]) - truth[:, -1]", "reader.read(imagined[:, 0]) - truth[:, 0]",
         "the gripper's error is that of the given frame"),
        ("sign * moved @ axes[:, axis]", "moved @ axes[:, axis]", "the sign of a sweep is ignored"),
        ("psnr(imagined, clips)[:, 1:]", "psnr(imagined, clips)", "the given frame counts as well"),
        ("np.roll(actions, 1, axis=0), truth", "actions, truth",
         "shuffled actions are an episode's own"),
        ("rcond=None)[0][:3].T", "rcond=None)[0][1:].T", "directions are of other axes"),
    ],
    ("evaluation/intervals.py", "bootstrap wilson seed_by_seed"): [
        ("(2.5, 97.5)", "(25, 75)", "the interval is one of 50 %"),
        ("middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)", "middle = rate",
         "an interval with the rate in its middle, and not Wilson's"),
        ("ddof=1", "ddof=0", "deviations of seeds as if there were no others"),
    ],
    ("evaluation/comparison.py", "seed_by_seed row_of_the"): [
        ("np.subtract(numbers, [run[name] for run in baseline])",
         "np.subtract([run[name] for run in baseline], numbers)", "the sign of a difference"),
        ("feature(PIXEL)[frames - 1]", "feature(PIXEL)[0]",
         "the gripper is compared with where it was"),
        ("psnr(imagined, self.truth)[:, 1:]", "psnr(imagined, self.truth)",
         "the given frame counts as well"),
    ],
    ("evaluation/ablations.py", "without_dropout table_2"): [
        ("settings.guidance if knows_hidden else 1.0", "settings.guidance",
         "guidance without a network that knows hidden actions"),
        ('(", no guidance", {"action_dropout": 0.0})', '(", no guidance", {})',
         "a row of Table 2 is not what it says"),
    ],
    ("evaluation/policies.py", "policy_acts success_is rank verdict_of_your classifier_learns"): [
        ("actions = policy(frames[-1])", "actions = policy(frames[0])",
         "the policy acts on the first frame for ever"),
        ("self.opening(videos[:, -1])", "self.opening(videos[:, 0])",
         "the verdict is read off the first frame"),
        ("network.read(videos[:, -1])[..., 0] > 0.5", "network.read(videos[:, 0])[..., 0] > 0.5",
         "your own classifier sees the first frame"),
        ("bool(int(row[\"success\"]))", "bool(row[\"success\"])", "every outcome is a success"),
        ("np.roll(actions, 1, axis=0) if shuffled", "actions if shuffled",
         "shuffled actions are not shuffled"),
        ("(true[:, None] > true) != (imagined[:, None] > imagined)",
         "(true[:, None] > true) == (imagined[:, None] > imagined)",
         "ranks that agree are violated"),
        ("(true[:, None] > true) != (imagined[:, None] > imagined)",
         "(true[:, None] < true) != (imagined[:, None] < imagined)",
         "ties count against the worse policy"),
        (".max(axis=1).mean())", ".mean(axis=1).mean())", "MMRV without its maximum"),
        ("true = {name: content[name][: settings.starts, -1] < CLOSED",
         "true = {name: content[name][: settings.starts, 0] < CLOSED",
         "true success is that of the first frame"),
        ("np.clip(numbers, -1, 1)", "numbers", "a policy may ask for more than full speed"),
    ],
    ("evaluation/planning.py", "a_plan_is"): [
        ("noise[ends.argmin()]", "noise[ends.argmax()]", "the worst proposal is followed"),
        ("ends.argsort()[:ELITE]", "ends.argsort()[-ELITE:]", "CEM draws about the worst"),
        ("np.roll(action, 1, axis=0) if shuffled", "action if shuffled",
         "shuffled actions are not shuffled"),
        ("        self.frames, self.actions = seen, done\n", "", "what was tried stays done"),
        ("super().noise(1, T).expand(B, -1, -1, -1, -1)", "super().noise(B, T)",
         "proposals differ by luck"),
        ("start.follow(followed)", "start.follow(noise[::-1][: len(followed)])",
         "the end of a proposal is followed first"),
    ],
    ("evaluation/policies.py", "contact"): [
        ("(imagined - true)[:, -1].mean()", "(true - imagined)[:, -1].mean()",
         "the sign of the drawer's error"),
        ("np.abs(openings[:, -1] - openings[:, 0]) > MOVED",
         "openings[:, -1] - openings[:, 0] > MOVED",
         "only drawers that open move"),
    ],
    ("evaluation/game.py", "players_place hall"): [
        ("(turned_right < 0)", "(turned_right > 0)", "right is left"),
        ("+ 180) % 360 - 180", "+ 0) % 360",
         "a turn across the circle's end is nearly a whole one"),
        ("starts.frames[:, GIVEN - 1, None]", "starts.frames[:, 0, None]",
         "the baseline repeats the first frame"),
        ("starts.poses[:, last]", "starts.poses[:, GIVEN - 1]",
         "where the player is is compared with where they were"),
        ("(turned_left > 0)", "(turned_left < 0)", "left is right"),
        ("apart(ahead[:, t + 6], ahead[:, t])", "apart(ahead[:, t + 6], ahead[:, t + 5])",
         "six frames ahead are one"),
    ],
    ("baselines/clips.py", "together gradients_reach"): [
        ("    model.requires_grad_(False)\n", "", "the base learns as well"),
        ("predict(x, k, 0.0)", "predict(x, k, 1.0)", "both passes know the actions"),
        ("context, align_actions(actions), mask)", "context, actions, mask)",
         "actions are not aligned"),
    ],
    ("evaluation/baselines.py", "row_of_the"): [
        ("np.repeat(truth[:, :1], settings.frames, axis=1)",
         "np.repeat(truth[:, -1:], settings.frames, axis=1)", "repeating knows the last frame"),
    ],
    ("evaluation/transfers.py", "distance_of_a_transfer"): [
        ("(off / size).sqrt()", "off.sqrt()", "the distance is not relative"),
        ("line = 2 * x[:, :, :, 1:-1] - x[:, :, :, :-2]", "line = x[:, :, :, 1:-1]",
         "the line through two frames is the last of them"),
    ],
    ("evaluation/futures.py", "futures_that"): [
        ("(1 + 1 / S) * variance", "variance", "a mean of few draws counts as the truth's own"),
        ("/ (S - 1)", "/ S", "the deviation of a sample without n - 1"),
        ("(mean - truth) ** 2", "(imagined[0] - truth) ** 2", "the error of one future"),
    ],
    # ---------------------------------------------------------------------------------- baselines
    ("baselines/clips.py", "trained_by_the_loop clips_are_sampled"): [
        ("shared_level=True, action_dropout=0.0", "shared_level=False, action_dropout=0.0",
         "a baseline trains with a level per frame"),
        ("led_to = align_actions(taken)", "led_to = taken",
         "a baseline samples with actions beside the wrong frames"),
        ("imagined[:, 0] = given[:, 0]", "pass", "the given frame is imagined as well"),
    ],
    ("baselines/classifier_guidance.py", "perfect_classifier classifier_learns"): [
        ("return v - weight * ratio", "return v + weight * ratio",
         "the classifier pushes away from the action"),
        ("((1 - alpha) / alpha.clamp(min=1e-2)).sqrt()", "(1 - alpha).sqrt()",
         "the gradient corrects the noise and not the velocity"),
        ("bucketize(actions[:, :-1]", "bucketize(actions[:, 1:]",
         "the classifier learns the action after the one that led to a frame"),
        ("x = model.schedule.add_noise(latents, k, draws[\"noise\"])", "x = latents",
         "the classifier learns without noise"),
        ("return -model.log_likelihood", "return model.log_likelihood",
         "the classifier learns to be wrong"),
    ],
    ("baselines/controlnet.py", "baselines_start copy_makes gradients_reach"): [
        ("zero_init(nn.Conv2d(width, width, 1))", "nn.Conv2d(width, width, 1)",
         "the copy does not start in silence"),
        ("plain.emb + self.copy.action_emb(actions)", "plain.emb", "the copy knows no action"),
        ("h = h + added.pop()", "added.pop()", "the copy's middle is not heard"),
        ("skips.pop() + added.pop()", "skips.pop() - added.pop()", "the copy is subtracted"),
    ],
    ("baselines/avid.py", "adapter gradients"): [
        ("mask * base + (1 - mask) * v", "base + mask * v", "the adapter adds"),
        ("torch.cat([x, base], dim=2)", "torch.cat([x, 0 * base], dim=2)",
         "the adapter does not hear the base"),
        ("last.reset_parameters()  #", "pass  #", "the adapter begins by saying zero"),
        ("        nn.init.zeros_(last.bias[channels:])\n", "", "the mask begins anywhere"),
    ],
    ("baselines/language_finetuning.py", "captions_say"): [
        ("numbers = actions[:, -1]", "numbers = actions.roll(1, 0)[:, -1]",
         "captions are mixed up between clips"),
        ("above if means[i] > 0 else below", "below if means[i] > 0 else above", "right is left"),
        ("PREFIX + self.text(INSTRUCTION)", "self.text(INSTRUCTION)",
         "the instruction without its frame"),
        ("abs(means[i]) > 0.1", "abs(means[i]) > 0.9", "only strong motions have words"),
    ],
    ("baselines/diamond.py", "diamonds diamond_learns"): [
        ("total * SIGMA_DATA / root", "total / root", "EDM's c_out"),
        ("self.noise(total.log() / 4)", "self.noise(total.log())", "EDM's c_noise"),
        ("        pixels[t] = rounded(clean.detach())\n", "",
         "predictions are not fed back in training"),
        ("(total + SIGMA_DATA**2) / (total * SIGMA_DATA**2)", "1 / total",
         "the loss weighs the levels otherwise"),
        ("/ sigma * (smaller - sigma)", "/ sigma * (sigma - smaller)", "Euler walks back"),
        ("actions[:, t - PAST : t]", "actions[:, t - PAST + 1 : t + 1]",
         "the action after the frame is learned"),
        ("self.past = torch.cat([self.past[:, 1:], x[:, None]], dim=1)", "pass",
         "DIAMOND's past stands still"),
        ("F.group_norm(x, groups(x.shape[1])) * (1 + scale) + shift",
         "F.group_norm(x, groups(x.shape[1]))",
         "neither actions nor levels reach a layer"),
        ("x = self.norm(x)  #", "pass  #", "attention sees what is not normalised"),
        ("max(1, channels // 32)", "max(1, channels // 16)", "other groups of channels"),
        ("torch.cat([h, skips.pop()], dim=1), cond", "torch.cat([skips.pop(), h], dim=1), cond",
         "what comes from below and the skip change places"),
        ("1.2 * torch.randn(n) - 1.2", "1.2 * torch.randn(n) - 0.4", "the levels of training"),
    ],
    # --------------------------------------------------------------------------------------- play
    ("play/keys.py", "player_drives key_is folder_of_your_own 51_numbers"): [
        ("self.signs[name] = -self.signs[name]", "pass", "the gripper never opens again"),
        ("-2 * std[i]", "2 * std[i]", "both arrows go the same way"),
        ("self.tapped |= set(keys) - self.down", "pass", "a tap is lost"),
        ("np.abs(np.subtract(bins, count)).argmin()", "np.abs(np.subtract(bins, -count)).argmin()",
         "the mouse turns the other way"),
    ],
    ("play/session.py", "play_keeps branches_off"): [
        ("self.world.restore(self.moments[number].window)", "pass",
         "going back shows a frame and stays in the later world"),
        ("gif_stride(self.dataset.fps)]", "1]", "an animation has frames that no browser shows"),
        ("self.world.latents[:, -self.world.model.num_frames :]", "self.world.latents",
         "play remembers every frame for ever"),
    ],
}


@dataclass
class Settings:
    words: list[str] = argument("of files or effects; if left out, all", nargs="*")


def chosen(words: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """File, tests, what stands there, what is put in its place, the effect."""
    for (file, tests), faults in FAULTS.items():
        for before, after, effect in faults:
            if not words or any(word in f"{file}: {effect}" for word in words):
                yield file, tests, before, after, effect


def copy_project(to: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True,
                            check=True).stdout.split("\n")[:-1]
    for name in listed:
        if not name.startswith(FILES_ONLY):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / name, to / name)
    for name in FILES_ONLY:
        (to / name).symlink_to(HERE / name)


RUN = """import sys, test_all
named = [name for word in sys.argv[1:] for name in vars(test_all)
         if name.startswith("test_") and word in name]
for name in dict.fromkeys(named):  # those of the first word first
    outcome, line = test_all.run_test(name)
    if outcome == "FAILED":
        sys.exit("FAILED: " + line)
"""


def first_failure(project: Path, tests: str) -> str | None:
    """The first test that fails there, of those whose names contain one of the words."""
    try:
        ran = subprocess.run([sys.executable, "-c", RUN, *tests.split()], cwd=project,
                             capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "a test that hangs"
    failed = re.search(r"^FAILED: (.+) \.\.\. FAILED", ran.stderr, re.MULTILINE)
    return failed[1] if failed else "the tests do not start" if ran.returncode else None


def run(settings: Settings) -> int:
    planted, survived = 0, []
    with tempfile.TemporaryDirectory() as folder:
        copy_project(project := Path(folder))
        for tests in sorted({tests for _, tests, *_ in chosen(settings.words)}):
            if failed := first_failure(project, tests):
                print(f"nothing is planted yet, and this fails: {failed}")
                return 1
        print("| file | fault | noticed by |\n| --- | --- | --- |")
        for file, tests, before, after, effect in chosen(settings.words):
            text = (project / file).read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{file} has {text.count(before)} times: {before}"
            (project / file).write_text(text.replace(before, after), encoding="utf-8")
            failed = first_failure(project, tests)
            (project / file).write_text(text, encoding="utf-8")
            planted += 1
            survived += [effect] * (not failed)
            print(f"| {file} | {effect} | {failed or '**survives**'} |", flush=True)
    print(f"\n{planted} planted, {planted - len(survived)} noticed, {len(survived)} survive")
    return int(bool(survived))


main = program(__name__, "mutants", run, Settings, "Plant faults, and see whether a test notices.")
