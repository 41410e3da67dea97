#!/bin/bash
# One step of the GPU benchmark on a host without network:  benchmarks/gpu/run.sh STEP [arguments of main_job.py …]
#
#   one     1 process a cell, random Qwen3-1.7B shape (LANES cells at a time)
#   several PROCESSES processes a cell, the same model
#   real, real-several   the same on the model in MODEL (or unpacked from GGUF)
#   smoke   two cells, to see that everything starts
#
# Environment: LANES (default 1), PROCESSES (default 2), BUDGET_S (default 480), WORK (/tmp/bench), OUT (copied to at the
# end), MODEL, GGUF, CHUNKS (archives with missing packages, unpacked once into SITE).
set -uo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?smoke, one, several, real or real-several}; shift
LANES=${LANES:-1} PROCESSES=${PROCESSES:-2} BUDGET_S=${BUDGET_S:-480} WORK=${WORK:-/tmp/bench}
RESULTS=$WORK/results
mkdir -p "$WORK" "$RESULTS"

if [ -n "${CHUNKS:-}" ]; then
  [ -e "${SITE:-/tmp/site}/vllm" ] || bash "$CHUNKS/unpack.sh" || exit 1
  . "$CHUNKS/env.sh"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1

bench() {
  python3 benchmarks/main_job.py --work "$WORK" --out "$RESULTS" --vllm_args='--attention-backend FLASH_ATTN' "$@"
}
finish() {
  [ -n "${OUT:-}" ] || return 0
  cp "$RESULTS"/*-main-job-* "$OUT"/
  tar -C "$WORK" -czf "$OUT/logs-$STEP.tar.gz" logs
}
trap finish EXIT

model() {  # the real model: a folder, or a GGUF file unpacked once
  [ -n "${MODEL:-}" ] && return
  MODEL=$WORK/real
  [ -e "$MODEL/config.json" ] || python3 benchmarks/standin.py --gguf "$GGUF" --out "$MODEL"
}
EXTRACTION=(--name "${NAME:-SmolLM2-135M-Instruct}" --steps 30 --offload_steps 30 --micro_batch_size 32 --length 1024
  --prompts 96 --new_tokens 112 --cell_s 120)

case $STEP in
  smoke)
    bench --shape 1.7b --presets lora zero2 --no_export zero2 --steps 6 --lanes "$LANES" --budget_s "$BUDGET_S" "$@" ;;
  one)
    bench --shape 1.7b --presets zero2 lora qlora zero3 zero3_offload --no_export zero3 zero3_offload \
      --plain zero2 lora zero2_fp32 --generate --lanes "$LANES" --budget_s "$BUDGET_S" "$@" ;;
  several)
    bench --shape 1.7b --presets zero2 zero3 qlora_zero2 lora_zero2 zero3_offload lora qlora \
      --no_export zero3 zero3_offload lora qlora lora_zero2 --no_evaluation lora qlora --plain zero2 \
      --processes "$PROCESSES" --budget_s "$BUDGET_S" "$@" ;;
  real)
    model
    bench --model "$MODEL" "${EXTRACTION[@]}" --presets zero2 lora qlora zero3 zero3_offload --plain zero2 lora \
      --generate --lanes "$LANES" --budget_s "$BUDGET_S" "$@" ;;
  real-several)
    model
    bench --model "$MODEL" "${EXTRACTION[@]}" --presets zero2 qlora_zero2 zero3 lora_zero2 --processes "$PROCESSES" \
      --budget_s "$BUDGET_S" "$@" ;;
  *) echo "unknown step $STEP" >&2; exit 2 ;;
esac
