#!/bin/bash
# Evaluation by generation on a GPU host, in calls that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/evaluation.sh SET… [more arguments of evaluation.py …]
#
#   one      jobs of one GPU, 8B: training with vLLM on the same GPU (full, LoRA, QLoRA); the same 512 prompts by the engine of
#            a run, by vLLM alone and by transformers; vLLM's start, eager and compiled, with empty and filled caches.
#            On 4 GPUs 8 minutes, on one 25
#   four     jobs of up to 4 GPUs, 8B to 32B: training with vLLM on a GPU of its own, each beside the same without vLLM;
#            generate on shards; 32B with vLLM on all four. 20 minutes
#   learn    1 GPU, 7 minutes: 8,000 samples, an evaluation every 100 steps, the best checkpoint by score, the report page;
#            MODEL is a folder or a GGUF file, or PARTS the pieces of one in order
#   cpu      no GPU: one job of each kind on the tiny shape, to see that it runs
#
# Minutes are estimates; a call ends after BUDGET_S and the next one goes on where it stopped.  Several words are one call:
# `four learn` uses GPUs that four leaves free.  Full fine-tuning of 8B on one GPU needs one of 100 GiB or more.
#
# Environment: BUDGET_S=550 WORK=runs/evaluation FAST=/dev/shm/evaluation (models and run folders: 16 to 120 GB); OUT, a folder
# that results are copied to after every job, and from which an earlier call's results are taken (EARLIER); SETUP, a shell file
# to source first; VLLM_ARGS, more arguments for vLLM as one string.
set -uo pipefail
cd "$(dirname "$0")/../.."
BUDGET_S=${BUDGET_S:-550} WORK=${WORK:-runs/evaluation} FAST=${FAST:-/dev/shm/evaluation}
SETS=()
while [[ ${1:-} =~ ^(one|four|learn|cpu)$ ]]; do SETS+=("$1"); shift; done
[ ${#SETS[@]} -gt 0 ] || { echo "one, four, learn or cpu?" >&2; exit 2; }
mkdir -p "$WORK/results" "$FAST"
WORK=$(cd "$WORK" && pwd)
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1
if [ -n "${EARLIER:-}" ] && [ ! -e "$WORK/results/evaluation.json" ]; then cp -r "$EARLIER"/. "$WORK/results/"; fi
finish() { [ -z "${OUT:-}" ] || tar -C "$WORK" -czf "$OUT/logs-evaluation.tar.gz" logs 2> /dev/null || true; }
trap finish EXIT
evaluation() {
  python3 benchmarks/evaluation.py "$@" --out "$WORK/results" --work "$WORK" ${OUT:+--copy_to "$OUT"} \
    --budget_s $((BUDGET_S - SECONDS)) --vllm_args="${VLLM_ARGS:-}"
}

if [[ " ${SETS[*]} " == *" cpu "* ]]; then
  evaluation one four --fast "$WORK" --device cpu --gpus 1 --evaluations 2 --every 2 --length 128 --micro_batch_size 2 \
    --prompts 8 --new_tokens 4 --only full lora 8b-zero2-1 start-eager-cold start-eager-warm alone-eager hf sharded-zero3 "$@"
  exit
fi
model=${MODEL:-}
if [[ " ${SETS[*]} " == *" learn "* ]]; then
  if [ -n "${PARTS:-}" ]; then
    model=$FAST/model.gguf
    cat $PARTS > "$model" || exit
  fi
  if [ -f "$model" ]; then
    [ -e "$FAST/model-gguf/config.json" ] || python3 benchmarks/standin.py --gguf "$model" --out "$FAST/model-gguf" || exit
    model=$FAST/model-gguf
  fi
fi
evaluation "${SETS[@]}" --fast "$FAST" ${model:+--model "$model"} "$@"
