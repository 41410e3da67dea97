#!/bin/bash
# Exports and serving on a GPU host, in steps that fit a short loan of a machine, with or without a network:
#
#   benchmarks/gpu/export.sh STEP
#
#   write    the random models and adapters of SHAPES, in memory (FAST)
#   merge    LoRA and QLoRA exports of SHAPES against PEFT by hand, in memory; what a shape wrote is deleted before the next
#   disk     the LoRA exports from memory onto the disk (WORK)
#   zero     a ZeRO-3 checkpoint of ZERO_SHAPE on PROCESSES GPUs (with Adam: 12 bytes a parameter in FAST), converted by us
#            and by DeepSpeed
#   serve    exports of the first two SHAPES on one GPU behind one address (needs the gateway extra), then an adapter
#            against its merged model; with one shape without a gateway
#
# FAST holds a base and two results at a time: 46 GiB for 8B, 83 for 14B.  A call ends after BUDGET_S; parts that have a result
# are not run again where WORK is still there, or where an earlier call's results are given (EARLIER).
#
# Environment: SHAPES="8b 14b" ZERO_SHAPE=8b PROCESSES=4 BUDGET_S=560 WORK=runs/export FAST=/dev/shm/export; OUT, a folder that
# results are copied to after every part; CHECKPOINT=--no_moments for a ZeRO checkpoint of 4 bytes a parameter;
# COMPARE=--no_compare where reading both results back takes too long; SETUP, a shell file to source first; VLLM_ARGS, more
# arguments for vLLM; LIMIT_S, seconds for each part.
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
BUDGET_S=${BUDGET_S:-560}
if [ -n "${EARLIER:-}" ]; then cp -n "$EARLIER"/*.json "$RESULTS"/ 2> /dev/null; fi
finish() { [ -z "${OUT:-}" ] || cp "$RESULTS"/* "$OUT"/ 2> /dev/null || true; }
trap finish EXIT
limited() { # limited SECONDS COMMAND…: no longer than what is left of the call
  local left=$((BUDGET_S - SECONDS)) limit=$1
  shift
  [ "$left" -gt 20 ] || { echo "no time left for: $*" >&2; return 1; }
  timeout "$((limit < left ? limit : left))" "$@"
}
part() { # part NAME SECONDS COMMAND…: a result that is not there yet, kept at once
  local result=$RESULTS/$1.json limit=$2
  shift 2
  [ ! -e "$result" ] || return 0
  limited "$limit" "$@" --out "$result"
  local code=$?
  finish
  return $code
}
speed() { limited "$LIMIT_S" python3 benchmarks/export_speed.py "$@"; }
SPEED="python3 benchmarks/export_speed.py"

case $STEP in
  write)
    for shape in $SHAPES; do
      speed write --shape "$shape" --work "$FAST" || exit
    done ;;
  merge)
    for shape in $SHAPES; do
      part "merge-$shape-lora-memory" "$LIMIT_S" $SPEED merge --shape "$shape" --kind lora --work "$FAST" --no_proof ${COMPARE:-}
      part "merge-$shape-qlora-memory" "$LIMIT_S" $SPEED merge --shape "$shape" --kind qlora --work "$FAST" ${COMPARE:-}
      rm -rf "$FAST/base-$shape" "$FAST"/out-*
    done ;;
  disk)
    for shape in $SHAPES; do # read from memory, as if the base were in the page cache; written to the disk
      speed write --shape "$shape" --work "$FAST" || exit
      mkdir -p "$WORK/disk" && ln -sfn "$FAST/base-$shape" "$WORK/disk/base-$shape"
      part "merge-$shape-lora-disk" "$LIMIT_S" $SPEED merge --shape "$shape" --work "$WORK/disk" --no_proof --only_ours
      rm -rf "$WORK/disk"
    done ;;
  zero)
    if [ ! -e "$RESULTS/zero-$ZERO_SHAPE.json" ]; then
      limited "$LIMIT_S" python3 -m torch.distributed.run --nproc_per_node "$PROCESSES" benchmarks/export_speed.py checkpoint \
        --shape "$ZERO_SHAPE" --work "$FAST" ${CHECKPOINT:-} || exit
    fi
    CUDA_VISIBLE_DEVICES= part "zero-$ZERO_SHAPE" "$LIMIT_S" $SPEED zero --shape "$ZERO_SHAPE" --work "$FAST"
    rm -rf "$FAST/zero-$ZERO_SHAPE" ;;
  serve)
    paths=()
    for shape in $SHAPES; do
      run=$FAST/run-$shape-lora
      speed write --shape "$shape" --work "$FAST" || exit
      if [ ! -e "$FAST/export-$shape/export_report.json" ]; then
        began=$(date +%s.%N)
        limited "$LIMIT_S" python3 -m hf_dsvllm export "$run" --out "$FAST/export-$shape" --overwrite || exit
        echo "{\"shape\": \"$shape\", \"export_began_unix\": $began, \"exported_unix\": $(date +%s.%N)}" > "$RESULTS/exported-$shape.json"
      fi
      paths+=("m$shape=$FAST/export-$shape")
    done
    first=${SHAPES%% *}
    serve="python3 benchmarks/serve_several.py"
    [ ${#paths[@]} -lt 2 ] || part serve $((LIMIT_S * 2)) $serve "${paths[@]}" --vllm_args="${VLLM_ARGS:-}"
    part serve-merged $((LIMIT_S * 2)) $serve "merged=$FAST/export-$first" --vllm_args="${VLLM_ARGS:-}"
    part serve-adapter $((LIMIT_S * 2)) $serve "adapter=$FAST/run-$first-lora/snapshots/step-1" --vllm_args="${VLLM_ARGS:-}" ;;
  *)
    echo "unknown step $STEP: write, merge, disk, zero or serve" >&2
    exit 2 ;;
esac
