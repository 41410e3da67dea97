#!/bin/bash
# Unmodified scripts on two GPUs, in under four minutes: `trl sft` and a script of the run_clm kind, zero3 and qlora, ten
# steps each on a random Qwen3-1.7B shape, vLLM answering in one of them.
#
#   benchmarks/gpu/run_scripts.sh [more arguments of run_scripts.py …]
#
# Environment as for run.sh: PROCESSES=2 BUDGET_S=240 WORK=runs/run-scripts; OUT, a folder that results and logs are
# copied to; SETUP, a shell file to source first; VLLM_ARGS, more arguments for vLLM as one string.
set -uo pipefail
cd "$(dirname "$0")/../.."
WORK=${WORK:-runs/run-scripts}
mkdir -p "$WORK/results"
WORK=$(cd "$WORK" && pwd)
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions
finish() {
  [ -n "${OUT:-}" ] || return 0
  cp "$WORK"/results/*-run-scripts-* "$OUT"/
  (cd "$WORK" && tar -czf "$OUT/logs-run-scripts.tar.gz" ./*.log)
}
trap finish EXIT
python3 benchmarks/run_scripts.py --work "$WORK" --out "$WORK/results" --processes "${PROCESSES:-2}" \
  --budget_s "${BUDGET_S:-240}" --vllm_args="${VLLM_ARGS:-}" "$@"
