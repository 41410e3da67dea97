#!/bin/bash
# The GPU benchmark in steps that fit a short loan of a machine, for hosts with or without a network:
#
#   benchmarks/gpu/run.sh STEP [more arguments of main_job.py …]
#
#   smoke          two short cells, to see that everything starts (exit code 1 if not)
#   one            1 process a cell, random Qwen3-1.7B shape, LANES cells at a time
#   several        PROCESSES processes a cell, the same model
#   real           1 process a cell, the model in MODEL (a folder, or a GGUF file that is unpacked once)
#   real-several   PROCESSES processes a cell, the same model
#
# Environment: LANES=1 PROCESSES=2 BUDGET_S=480 WORK=runs/benchmark; OUT, a folder that results and logs are copied to;
# SETUP, a shell file to source first; VLLM_ARGS, more arguments for vLLM as one string; NAME, what to call MODEL.
set -uo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?smoke, one, several, real or real-several}; shift
LANES=${LANES:-1} PROCESSES=${PROCESSES:-2} BUDGET_S=${BUDGET_S:-480} WORK=${WORK:-runs/benchmark}
mkdir -p "$WORK/results" "$WORK/logs"
WORK=$(cd "$WORK" && pwd) RESULTS=$WORK/results
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions

bench() {
  python3 benchmarks/main_job.py --work "$WORK" --out "$RESULTS" --budget_s "$BUDGET_S" --vllm_args="${VLLM_ARGS:-}" "$@"
}
on_shape() { bench --shape 1.7b "$@"; }
on_model() {
  local model=${MODEL:?a model folder or a GGUF file}
  if [ -f "$model" ]; then
    [ -e "$WORK/model-gguf/config.json" ] || python3 benchmarks/standin.py --gguf "$model" --out "$WORK/model-gguf" || return
    model=$WORK/model-gguf
  fi
  bench --model "$model" --name "${NAME:-SmolLM2-135M-Instruct}" --steps 30 --offload_steps 30 --micro_batch_size 32 \
    --length 1024 --prompts 96 --new_tokens 112 --cell_s 300 "$@"  # offload compiles CPUAdam first
}
finish() {
  [ -n "${OUT:-}" ] || return 0
  cp "$RESULTS"/*-main-job-* "$OUT"/
  tar -C "$WORK" -czf "$OUT/logs-$STEP.tar.gz" logs
}
trap finish EXIT

case $STEP in
  smoke)
    on_shape --presets zero2 lora --no_export zero2 --steps 6 --lanes "$LANES" "$@" ;;
  one)
    on_shape --presets zero2 lora qlora zero3 zero3_offload --no_export zero3 zero3_offload \
      --plain zero2 lora zero2_fp32 --generate --lanes "$LANES" "$@" ;;
  several)
    on_shape --presets zero2 lora zero3 qlora zero3_offload lora_zero2 qlora_zero2 \
      --no_export zero2 lora zero3 qlora zero3_offload lora_zero2 qlora_zero2 --no_evaluation lora_zero2 qlora_zero2 \
      --plain zero2 --processes "$PROCESSES" "$@" ;;
  real)
    on_model --presets zero2 lora qlora zero3 zero3_offload --plain zero2 lora --generate --lanes "$LANES" "$@" ;;
  real-several)
    on_model --presets zero2 lora qlora zero3 --processes "$PROCESSES" "$@" ;;
  *)
    echo "unknown step $STEP: smoke, one, several, real or real-several" >&2
    exit 2 ;;
esac
