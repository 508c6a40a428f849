#!/usr/bin/env bash
# Renders, trains and exports the bundled worlds from nothing: `bash run.sh [work folder]`. Every step resumes.
# Needs the project's .venv with the recipe's extra (`pip install resvg-py`), and Node for DiceBear.
set -eu
cd "$(dirname "$0")"
work=${1:-work}
python=../../.venv/bin/python
[ -d node_modules ] || npm install
[ -f "$work/data/train.npz" ] || $python data.py --out "$work/data"
$python train_clip.py --data "$work/data" --out "$work/run"
$python train_noisy_clip.py --data "$work/data" --out "$work/run"
$python train_judge.py --data "$work/data" --out "$work/run"
$python train_adm.py --data "$work/data" --out "$work/run" --compile
$python export.py --data "$work/data" --out "$work/run"
# The latent test world: latents of an autoencoder of these pictures, three models of them, a NoisyCLIP of their view.
$python train_autoencoder.py --data "$work/data" --out "$work/run" --processes 2
$python train_noisy_clip_linear.py --data "$work/data" --out "$work/run"
for prediction in v eps flow; do $python train_latent.py $prediction --out "$work/run" --compile; done
$python export_latent.py --out "$work/run"
# The parts of a 128 px world: an autoencoder, a diffusion model of its latents, a CLIP, NoisyCLIPs, a judge.
[ -f "$work/world/train_labels.npy" ] || $python world_data.py --out "$work/world"
world="--data $work/world --out $work/run"
$python train_world_autoencoder.py $world
$python train_world_clip.py $world
$python train_world_judge.py $world
for view in latents pixels; do $python train_world_noisy_clip.py $view $world; done
$python train_world_latent.py --out "$work/run" --compile
$python export_world.py $world
