#!/bin/bash
# Training speed on a GPU host, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/train_speed.sh STEP [more arguments of train_speed.py …]
#
#   one       1 GPU: LoRA 8B, full 4B, chat-like mix, QLoRA, LoRA 14B and 32B
#   two       2 GPUs: full 8B, offload 8B, scaling, sequence parallel, chat-like mix and LoRA beside each other
#   four      4 GPUs: full 8B and 14B, offload 14B, scaling
#   long      1 GPU: the longest sequence
#   nvme      1 GPU: optimizer and weights on NVMe
#   onebit    2 GPUs, with a DeepSpeed of 0.19.6 or older
#   parity    200 steps of a real model (MODEL: a folder or a GGUF file), three seeds, plain TRL against presets
#
# Environment: BUDGET_S=540 WORK=runs/speed; OUT, a folder that results are copied to after every arm, and from which an
# earlier call's results are taken (EARLIER); SETUP, a shell file to source first.
set -uo pipefail
cd "$(dirname "$0")/../.."
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
  one) speed --gpus 1 --only lora8 full4 mix8 qlora8 mix4 lora14 lora32 "$@" ;;
  two) speed --gpus 2 --only full8x2 off8 scale scale8 sp8 mix8 lora8 full4 qlora8 mix4 "$@" ;;
  four) speed --gpus 4 --only full8 full14 off14 scale scale8 sp8x4 "$@" ;;
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
