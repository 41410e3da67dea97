#!/bin/bash
# Exports and serving on a GPU host, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/export.sh STEP
#
#   write    the random models and adapters of SHAPES, in memory (FAST)
#   merge    LoRA and QLoRA exports of SHAPES against PEFT by hand, in memory
#   disk     the LoRA exports from memory onto the disk (WORK)
#   zero     a ZeRO-3 checkpoint of ZERO_SHAPE on PROCESSES GPUs (with Adam: 12 bytes a parameter in FAST), converted by us
#            and by DeepSpeed
#   serve    exports of the first two SHAPES on one GPU behind one address, then an adapter against its merged model
#
# Environment: SHAPES="8b 14b" ZERO_SHAPE=8b PROCESSES=4 WORK=runs/export FAST=/dev/shm/export; OUT, a folder that results
# are copied to; COMPARE=--no_compare where reading both results back takes too long; SETUP, a shell file to source first;
# VLLM_ARGS, more arguments for vLLM; LIMIT_S, seconds for each part.
set -uo pipefail
cd "$(dirname "$0")/../.."
STEP=${1:?write, merge, disk, zero or serve}
SHAPES=${SHAPES:-8b 14b} ZERO_SHAPE=${ZERO_SHAPE:-8b} PROCESSES=${PROCESSES:-4} LIMIT_S=${LIMIT_S:-240}
WORK=${WORK:-runs/export} FAST=${FAST:-/dev/shm/export}
mkdir -p "$WORK" "$FAST"
WORK=$(cd "$WORK" && pwd)
RESULTS=$WORK/results
mkdir -p "$RESULTS"
[ -z "${SETUP:-}" ] || . "$SETUP"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TORCH_EXTENSIONS_DIR=$WORK/extensions HF_HUB_OFFLINE=1
finish() { [ -z "${OUT:-}" ] || cp "$RESULTS"/* "$OUT"/ 2>/dev/null || true; }
trap finish EXIT
speed() { timeout "$LIMIT_S" python3 benchmarks/export_speed.py "$@"; }

case $STEP in
  write)
    for shape in $SHAPES; do
      speed write --shape "$shape" --work "$FAST" || exit
    done ;;
  merge)
    for shape in $SHAPES; do
      speed merge --shape "$shape" --kind lora --work "$FAST" --no_proof ${COMPARE:-} --out "$RESULTS/merge-$shape-lora-memory.json"
      speed merge --shape "$shape" --kind qlora --work "$FAST" ${COMPARE:-} --out "$RESULTS/merge-$shape-qlora-memory.json"
    done ;;
  disk)
    for shape in $SHAPES; do # read from memory, as if the base were in the page cache; written to the disk
      mkdir -p "$WORK/disk" && ln -sfn "$FAST/base-$shape" "$WORK/disk/base-$shape"
      speed merge --shape "$shape" --work "$WORK/disk" --no_proof --only_ours --out "$RESULTS/merge-$shape-lora-disk.json"
      rm -rf "$WORK/disk"
    done ;;
  zero)
    timeout "$LIMIT_S" torchrun --nproc_per_node "$PROCESSES" benchmarks/export_speed.py checkpoint \
      --shape "$ZERO_SHAPE" --work "$FAST" && CUDA_VISIBLE_DEVICES= speed zero --shape "$ZERO_SHAPE" --work "$FAST" \
      --out "$RESULTS/zero-$ZERO_SHAPE.json"
    rm -rf "$FAST/zero-$ZERO_SHAPE" ;;
  serve)
    paths=()
    for shape in $SHAPES; do
      run=$FAST/run-$shape-lora
      [ -e "$run" ] || speed merge --shape "$shape" --work "$FAST" --no_proof > /dev/null
      began=$(date +%s.%N)
      python3 -m hf_dsvllm export "$run" --out "$FAST/export-$shape" --overwrite || exit
      echo "{\"shape\": \"$shape\", \"export_began_unix\": $began, \"exported_unix\": $(date +%s.%N)}" > "$RESULTS/exported-$shape.json"
      paths+=("m$shape=$FAST/export-$shape")
    done
    timeout $((LIMIT_S * 2)) python3 benchmarks/serve_several.py "${paths[@]}" --out "$RESULTS/serve.json" \
      --vllm_args="${VLLM_ARGS:-}"
    first=${SHAPES%% *}
    timeout $((LIMIT_S * 2)) python3 benchmarks/serve_several.py "merged=$FAST/export-$first" --out "$RESULTS/serve-merged.json" \
      --vllm_args="${VLLM_ARGS:-}"
    timeout $((LIMIT_S * 2)) python3 benchmarks/serve_several.py "adapter=$FAST/run-$first-lora/snapshots/step-1" \
      --out "$RESULTS/serve-adapter.json" --vllm_args="${VLLM_ARGS:-}" ;;
  *)
    echo "unknown step $STEP: write, merge, disk, zero or serve" >&2
    exit 2 ;;
esac
