#!/bin/bash
# Training speed on a GPU host, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/train_speed.sh STEP [more arguments of train_speed.py …]
#
#   four      4 GPUs, 10 minutes for the first arms, 25 for all: full 8B and 14B, offload 14B, scaling, then on 2 and 1
#             GPUs, side by side, what two and one measure
#   one       1 GPU, 8 minutes for the first arms, 25 for all: full 4B, LoRA 8B, chat-like mix, QLoRA, LoRA 14B and 32B
#   two       2 GPUs, 8 minutes for the first arms, 25 for all: scaling, offload 8B, full 8B, sequence parallel, and one's
#   long      1 GPU, 10 minutes: the longest sequence
#   nvme      1 GPU, 4 minutes: optimizer and weights on NVMe
#   onebit    2 GPUs, 4 minutes, with a DeepSpeed of 0.19.6 or older
#   parity    1 GPU, 10 minutes for the first arms, 25 for all: 200 steps of a real model (MODEL: a folder or a GGUF
#             file), three seeds, plain TRL against presets; --gpus 4 runs four at a time
#
# Minutes are estimates; a call ends after BUDGET_S and the next one goes on where it stopped.  Arms with the feature
# `fused`, a default, need liger-kernel and fail without it.
#
# Environment: BUDGET_S=540 WORK=runs/speed; OUT, a folder that results are copied to after every arm, and from which an
# earlier call's results are taken (EARLIER); SETUP, a shell file to source first.
set -uo pipefail
cd "$(dirname "$0")/../.."
ONE_GPU="full4 lora8 mix8 mix4 qlora8 lora14 lora32"
STEP=${1:?one, two, four, long, nvme, onebit or parity}; shift
BUDGET_S=${BUDGET_S:-540} WORK=${WORK:-runs/speed}
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1
if [ -n "${EARLIER:-}" ]; then
  for name in cells rates; do [ -e "$WORK/$name.json" ] || cp "$EARLIER/$name.json" "$WORK/" 2>/dev/null || true; done
fi
speed() {
  python3 benchmarks/train_speed.py --out "$WORK" ${OUT:+--copy_to "$OUT"} --budget_s "$BUDGET_S" "$@"
}

case $STEP in
  one) speed --gpus 1 --only $ONE_GPU "$@" ;;
  two) speed --gpus 2 --only scale8 scale off8 lora8z3 off8z3 full8x2 sp8 $ONE_GPU "$@" ;;
  four) speed --gpus 4 --only full8 full14 off14 scale scale8 off8 full8x2 sp8x4 $ONE_GPU "$@" ;;
  long) speed --gpus 1 --cell_s 200 --only long8 long32 longf "$@" ;;
  nvme) speed --gpus 1 --cell_s 200 --only nvme "$@" ;;
  onebit) speed --gpus 2 --only onebit "$@" ;;
  parity)
    model=${MODEL:?a model folder or a GGUF file}
    if [ -f "$model" ]; then
      [ -e "$WORK/model-gguf/config.json" ] || python3 benchmarks/standin.py --gguf "$model" --out "$WORK/model-gguf" || exit
      model=$WORK/model-gguf
    fi
    [ -e "$WORK/data/train.jsonl" ] || python3 recipes/data/make_extraction.py --out "$WORK/data" --train 1600 || exit
    python3 benchmarks/parity.py --model "$model" --data "$WORK/data/train.jsonl" --out "$WORK/parity" \
      ${OUT:+--copy_to "$OUT"} --budget_s "$BUDGET_S" "$@" ;;
  *)
    echo "unknown step $STEP: one, two, four, long, nvme, onebit or parity" >&2
    exit 2 ;;
esac
