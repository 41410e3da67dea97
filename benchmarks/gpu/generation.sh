#!/bin/bash
# Evaluation by generation on a GPU host, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/generation.sh STEP
#
#   starts    1 GPU: vLLM started eager and compiled, each twice, and 512 prompts answered after each start
#   answers   1 GPU: the same prompts by vLLM alone and by transformers' generate
#   sharded   PROCESSES GPUs: by generate on the model as it lies under ZeRO-2 and ZeRO-3
#   learn     1 GPU: 8,000 samples, an evaluation every 100 steps, the best checkpoint by score, the report page; MODEL is a
#             folder or a GGUF file
#   cpu       no GPU: the tiny shape, to see that it runs
#
# Environment: SHAPE=8b PROCESSES=2 WORK=runs/generation LIMIT_S=280; OUT, a folder that results are copied to; SETUP, a shell file
# to source first; VLLM_ARGS, more arguments for vLLM as one string.
set -uo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?starts, answers, sharded, learn or cpu}
SHAPE=${SHAPE:-8b} PROCESSES=${PROCESSES:-2} LIMIT_S=${LIMIT_S:-280} WORK=${WORK:-runs/generation}
mkdir -p "$WORK/results"
WORK=$(cd "$WORK" && pwd) RESULTS=$WORK/results
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1
finish() {
  [ -z "${OUT:-}" ] || cp -r "$RESULTS"/. "$OUT"/
}
trap finish EXIT
way() { # WAY NAME arguments…: one row, by one process
  local way=$1 name=$2
  shift 2
  timeout "$LIMIT_S" python3 benchmarks/generation.py "$way" --shape "$SHAPE" --work "$WORK" --out "$RESULTS" --name "$name" \
    "$@" > "$RESULTS/$way-$name.log" 2>&1 || { echo "$way $name failed:"; tail -n 30 "$RESULTS/$way-$name.log"; }
}
model() {
  [ -e "$WORK/model-$SHAPE/config.json" ] ||
    python3 benchmarks/generation.py write --shape "$SHAPE" --work "$WORK" "$@" || exit
}
vllm() { way "$1" "$2" --vllm_args="${VLLM_ARGS:-}" "${@:3}"; }

case $STEP in
  starts)
    model
    vllm engine first
    vllm engine second
    vllm engine first --compiled
    vllm engine second --compiled ;;
  answers)
    model
    vllm alone ""
    vllm alone "" --compiled
    way hf "" --prompts 128 --batch 64 128 --new_tokens 128 ;;
  sharded)
    for stage in 2 3; do
      timeout "$LIMIT_S" torchrun --nproc_per_node "$PROCESSES" benchmarks/generation.py sharded --shape "$SHAPE" --zero "$stage" \
        --work "$WORK" --out "$RESULTS" --prompts $((64 * PROCESSES)) --batch 64 --new_tokens 48 \
        > "$RESULTS/sharded-$stage.log" 2>&1 || { echo "ZeRO-$stage failed:"; tail -n 30 "$RESULTS/sharded-$stage.log"; }
    done ;;
  learn)
    model=${MODEL:?a model folder or a GGUF file}
    if [ -f "$model" ]; then
      [ -e "$WORK/model-gguf/config.json" ] || python3 benchmarks/standin.py --gguf "$model" --out "$WORK/model-gguf" || exit
      model=$WORK/model-gguf
    fi
    [ -e "$WORK/data/train.jsonl" ] ||
      python3 recipes/data/make_extraction.py --out "$WORK/data" --train 8000 --test 96 --difficulty 2 || exit
    timeout "$LIMIT_S" accelerate launch --num_processes 1 recipes/sft.py --model_name_or_path "$model" \
      --dataset_name "$WORK/data/train.jsonl" --ds_preset "${PRESET:-zero2}" --output_dir "$WORK/learn" --num_train_epochs 1 \
      --per_device_train_batch_size 8 --learning_rate 1e-4 --lr_scheduler_type cosine --max_length 512 --logging_steps 10 \
      --save_strategy no --report_to none --gen_eval_file "$WORK/data/test.jsonl" --gen_eval_steps 100 \
      --gen_eval_max_new_tokens 112 --metric_for_best_model eval_gen_test_exact_match --load_best_model_at_end \
      --vllm_args="${VLLM_ARGS:-}" > "$RESULTS/learn.log" 2>&1 || { echo "learn failed:"; tail -n 40 "$RESULTS/learn.log"; }
    python3 -m hf_dsvllm report "$WORK/learn" > "$RESULTS/report.log" 2>&1
    find "$WORK/learn" -maxdepth 2 \( -name '*.html' -o -name run.json -o -name scores.jsonl \) -exec cp {} "$RESULTS"/ \; ;;
  cpu)
    SHAPE=tiny
    small=(--device cpu --prompts 6 --new_tokens 4)
    model --device cpu
    way engine "" "${small[@]}"
    way alone "" "${small[@]}"
    way hf "" "${small[@]}" --batch 2 3
    torchrun --nproc_per_node 2 benchmarks/generation.py sharded --shape tiny --zero 3 --work "$WORK" --out "$RESULTS" \
      "${small[@]}" > "$RESULTS/sharded.log" 2>&1 || tail -n 30 "$RESULTS/sharded.log" ;;
  *)
    echo "unknown step $STEP: starts, answers, sharded, learn or cpu" >&2
    exit 2 ;;
esac
[ "$STEP" = learn ] || python3 benchmarks/generation.py report --out "$RESULTS"
