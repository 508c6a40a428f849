#!/usr/bin/env bash
# Renders, trains and exports the bundled worlds from nothing: `bash run.sh [work folder]`. Every step resumes.
# With CARD=1 a CUDA card trains what the 128 px world's pictures and guidance rest on.
# Needs the project's .venv with the recipe's extra (`pip install resvg-py`), and Node for DiceBear.
set -eu
cd "$(dirname "$0")"
work=${1:-work}
python=../../.venv/bin/python
[ -d node_modules ] || npm install
[ -f "$work/data/train.npz" ] || $python data.py --out "$work/data"
$python train_judge.py --data "$work/data" --out "$work/run"
$python export.py --data "$work/data" --out "$work/run"
# The 128 px world, and the pixel world's ADM and NoisyCLIP, which learn its renders: an autoencoder, a diffusion model of its latents, a CLIP, its NoisyCLIP, a judge.
[ -f "$work/world/train_labels.npy" ] || $python world_data.py --out "$work/world"
world="--data $work/world --out $work/run"
$python train_world_autoencoder.py $world
$python train_world_judge.py $world
if [ -n "${CARD:-}" ]; then
  $python train_world_on_card.py $world
else
  $python train_world_clip.py $world
  $python train_world_noisy_clip.py latents $world
  $python train_world_noisy_clip.py pixels $world
  $python train_world_latent.py --out "$work/run" --compile
  $python train_adm.py $world --compile
fi
$python train_classifier.py $world
$python export_world.py $world
