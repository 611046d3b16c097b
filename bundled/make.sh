#!/usr/bin/env bash
# Everything that is bundled, from the simulator to both checkpoints. Seeds are fixed. Two CPU cores take about six hours.
# Besides the four packages: pip install metaworld mujoco packaging, and Debian's libosmesa6 (or another renderer in MUJOCO_GL).
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. Episodes: other tasks without actions, the drawer with, and the few of the drawer that are bundled.
python -m bundled.record_drawer --world others --split train --episodes 1280 --out recorded/others
python -m bundled.record_drawer --world others --split val --episodes 32 --out recorded/others
python -m bundled.record_drawer --world drawer --split train --episodes 1280 --out recorded/drawer
python -m bundled.record_drawer --world drawer --split val --episodes 32 --out recorded/drawer
python -m bundled.record_drawer --world drawer --split train --episodes 64 --out samples
python -m bundled.record_drawer --world drawer --split val --episodes 32 --out samples

# 2. The base: a passive video model of the other tasks.
python train.py --data rt1 --root recorded/others --passive --out runs/base --autoencoder-steps 3000 --steps 1500 \
    --cooldown 500 --warmup 100 --dropout 0 --bf16 --sample-every 100000
python -m bundled.bundle_checkpoint base runs/base checkpoints/tiny_base.pt

# 3. The world: that base made causal, post-trained on the drawer with actions. Most frames of a clip are clear, as the history of a rollout
# is, and the loss is measured where that matters. Then a decoder that has seen drawers.
# (The bundled file came by a longer way to the same number of steps: 2600 with noise levels and loss as in the paper and 3100 with clear
# frames, both on an earlier recording, where the arm was not at rest at the start; 921 on this one; and from there as below. The optimizer's
# state was estimated anew at steps 2600 and 6621, the decoder is from step 5700, and the base saw the earlier recording too.)
python train.py --data rt1 --root recorded/drawer --out runs/world --steps 11600 --cooldown 3550 --clear-frames 0.6 --measure clean \
    --dropout 0 --bf16 --sample-every 1000
python -m bundled.tune_decoder runs/world --steps 1500 --bf16
python -m bundled.bundle_checkpoint world runs/world checkpoints/tiny_world.pt
