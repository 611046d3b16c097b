#!/usr/bin/env bash
# Everything that is bundled, from the simulator to both checkpoints. Seeds are fixed. Two CPU cores take about four hours.
# Besides the four packages: pip install metaworld mujoco packaging, and Debian's libosmesa6 (or another renderer in MUJOCO_GL).
set -euo pipefail
cd "$(dirname "$0")/.."

# 1. Episodes: other tasks without actions, the drawer with, and the few of the drawer that are bundled.
python -m tools.record_drawer --world others --split train --episodes 1280 --out recorded/others
python -m tools.record_drawer --world others --split val --episodes 32 --out recorded/others
python -m tools.record_drawer --world drawer --split train --episodes 1280 --out recorded/drawer
python -m tools.record_drawer --world drawer --split val --episodes 32 --out recorded/drawer
python -m tools.record_drawer --world drawer --split train --episodes 64 --out samples
python -m tools.record_drawer --world drawer --split val --episodes 32 --out samples

# 2. The base: a passive video model of the other tasks.
python train.py --data rt1 --root recorded/others --passive --out runs/base --autoencoder-steps 3000 --steps 1500 \
    --cooldown 500 --warmup 100 --dropout 0 --bf16 --sample-every 100000
python -m tools.bundle_checkpoint base runs/base checkpoints/tiny_base.pt

# 3. The world: that base made causal, post-trained on the drawer with actions, at first with noise levels as the paper draws them, then
# with most frames clear, as the history of a rollout is; and a decoder that has seen drawers.
# (The bundled file's second stretch began without the optimizer's state, estimated anew, and with 150 steps of the first kind.)
python train.py --data rt1 --root recorded/drawer --out runs/world --steps 2600 --cooldown 900 --dropout 0 --bf16
python train.py --resume --out runs/world --steps 5700 --cooldown 2700 --clear-frames 0.6
python -m tools.tune_decoder runs/world --steps 1500 --bf16
python -m tools.bundle_checkpoint world runs/world checkpoints/tiny_world.pt
