#!/bin/bash
# Weights into vLLM, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/sync.sh STEP
#
#   shared   1 GPU: full, LoRA and QLoRA by CUDA IPC into a vLLM that sleeps in between
#   spare    2 GPUs: full by NCCL under ZeRO-2 and ZeRO-3 on one, vLLM on the other
#   several  PROCESSES + 1 GPUs: the same, sharded over PROCESSES
#   cpu      no GPU: the tiny shape through snapshots, to see that it runs
#
# Environment: SHAPE=8b PROCESSES=3 WORK=runs/sync LIMIT_S=280; OUT, a folder that results and logs are copied to; SETUP, a
# shell file to source first; VLLM_ARGS, more arguments for vLLM as one string.
set -uo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?shared, spare, several or cpu}
SHAPE=${SHAPE:-8b} PROCESSES=${PROCESSES:-3} LIMIT_S=${LIMIT_S:-280} WORK=${WORK:-runs/sync}
mkdir -p "$WORK/results"
WORK=$(cd "$WORK" && pwd)
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1
finish() {
  [ -n "${OUT:-}" ] || return 0
  cp "$WORK"/results/* "$OUT"/
  tar -C "$WORK" -czf "$OUT/logs-sync-$STEP.tar.gz" --exclude='*.safetensors' --exclude=extensions .
}
trap finish EXIT
measure() { # NAME PROCESSES arguments…
  local name=$1 processes=$2
  shift 2
  timeout "$LIMIT_S" torchrun --nproc_per_node "$processes" benchmarks/gpu/sync.py --work "$WORK/$name" \
    --out "$WORK/results/sync-$name.json" --vllm_args="${VLLM_ARGS:-}" "$@" > "$WORK/results/sync-$name.log" 2>&1 \
    || { echo "$name failed:"; tail -n 30 "$WORK/results/sync-$name.log"; }
}

case $STEP in
  shared)
    for kind in full lora qlora; do
      measure "shared-$kind-$SHAPE" 1 --placement shared --kind "$kind" --shape "$SHAPE"
    done ;;
  spare)
    for stage in 2 3; do
      measure "spare-zero$stage-$SHAPE" 1 --placement spare --zero "$stage" --shape "$SHAPE"
    done ;;
  several)
    for stage in 2 3; do
      measure "spare-zero$stage-$SHAPE-on-$PROCESSES" "$PROCESSES" --placement spare --zero "$stage" --shape "$SHAPE"
    done ;;
  cpu)
    measure cpu 1 --device cpu --shape tiny --rounds 2 ;;
  *)
    echo "unknown step $STEP: shared, spare, several or cpu" >&2
    exit 2 ;;
esac
