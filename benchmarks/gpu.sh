#!/bin/sh
# Everything that needs a GPU, in under nine minutes on one H200, with random weights of real shapes.
#
#   sh benchmarks/gpu.sh            # writes benchmarks/results/gpu/, then the pages of docs/
#   SMALL=1 sh benchmarks/gpu.sh    # a dry run on a CPU: narrow shapes, into a temporary folder
#   SERVE=1 sh benchmarks/gpu.sh    # instead of all that vLLM under load, where vLLM is installed
#
# What did not fit into the time is named at the end; a step that is stopped keeps the runs it did.
# PYTHON, RESULTS, DOCS (folder of the pages) and LIMIT (seconds) may be set from outside.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/src:$PWD/packages/vlmprune-embedded/src${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-525}
START=$(date +%s)
FAILED=
if [ "${SMALL:-}" = 1 ]; then
  SCRATCH=$(mktemp -d)
  RESULTS=${RESULTS:-$SCRATCH}
  [ -n "${DOCS:-}" ] || { DOCS=$SCRATCH && cp docs/benchmarks.md docs/serving.md "$DOCS"; }
fi
RESULTS=${RESULTS:-benchmarks/results}
DOCS=${DOCS:-docs}
mkdir -p "$RESULTS/gpu"

render() {
  "$PYTHON" benchmarks/render.py --results "$RESULTS" --docs "$DOCS" || FAILED="$FAILED render"
}

# vLLM wants an environment and nine minutes of its own.
if [ "${SERVE:-}" = 1 ]; then
  MODELS=$(mktemp -d)
  if [ "${SMALL:-}" = 1 ]; then
    LOAD="--shape tiny --clients 4 --requests 8 --arriving 8 --tokens 8 --rounds 1"
  else
    LOAD="--shape llava-1.5-7b --keep 288 --keep 192 --keep 128 --keep 64 --keep 32 --open-keep 64
      --load 0.5 --load 0.9 --load 1.2 --clients 64 --requests 256 --arriving 256 --tokens 64"
  fi
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/serve.py $LOAD --limit "$LIMIT" --folder "$MODELS" \
    --json "$RESULTS/serve-gpu.json" || FAILED=" serve-gpu.json"
  render
  rm -rf "$MODELS"
  [ -z "$FAILED" ] || echo "not finished:$FAILED" >&2
  [ -z "$FAILED" ]
  exit
fi

if [ "${SMALL:-}" = 1 ]; then
  NEXT="--shape small-next --layers 3 --tower-layers 2"
  LLAVA="--shape small --layers 3 --tower-layers 2"
  QWEN="--shape small-qwen --layers 3 --visual-tokens 64 --visual-tokens 256"
  COMMON="--device cpu --repeat 1 --new-tokens 2"
  BATCHES="--batch 1"
  DECODE="--device cpu --shape small --batch 1 --tokens 64 --repeat 2"
  SELECT="--device cpu --crops 1 --repeat 2 --tower-repeat 1"
  COMPILED="--device cpu --shape small --layers 2 --tower-layers 2 --keep 8 --tokens 2 --repeat 1
    --backend eager"
else
  NEXT="--shape llava-next-7b"
  LLAVA="--shape llava-1.5-7b"
  QWEN="--shape qwen2.5-vl-7b --visual-tokens 4096 --visual-tokens 16384"
  COMMON="--device cuda --dtype bfloat16 --repeat 5 --new-tokens 16"
  BATCHES="--batch 1 --batch 4"
  DECODE="--device cuda --shape llava-1.5-7b --batch 1 --batch 16 --tokens 2880 --repeat 5"
  SELECT="--device cuda --crops 1 --crops 5"
  COMPILED="--device cuda --shape llava-1.5-7b --repeat 5"
fi
RUNS=$RESULTS/gpu

# step SECONDS FILE COMMAND…: runs a command in the time that is left, and at most in its own.
step() {
  most=$1 file=$2
  shift 2
  left=$((LIMIT - $(date +%s) + START))
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -lt 15 ]; then
    FAILED="$FAILED $file (no time left)"
    return
  fi
  rm -f "$RUNS/$file"
  echo "== $file: $*"
  timeout "$most" "$@" || FAILED="$FAILED $file (exit $?)"
}

# PLPHP with dr=0 cuts every layer alike: with random weights its groups of layers mean nothing.
CUT=plphp:r=0.4,dr=0

# Paths that exist for a GPU alone; each is compared with what runs everywhere.
if [ "${SMALL:-}" != 1 ]; then
  step 90 tests.xml "$PYTHON" -m pytest -m cuda --junitxml "$RUNS/tests.xml"
fi

# LLaVA-NeXT: 5 crops of 576, so that 128, 64 and 32 a crop are 640, 320 and 160 of 2880.
# shellcheck disable=SC2086
step 180 llava-next.json "$PYTHON" -m vlmprune bench $NEXT $COMMON $BATCHES \
  --method vispruner:keep=1.0 --method vispruner:keep=128 --method vispruner:keep=64 \
  --method vispruner:keep=32 --method $CUT --method vispruner:keep=64+$CUT \
  --method fastv:keep=0.11 --out "$RUNS/llava-next.json"

# shellcheck disable=SC2086
step 170 qwen2.5-vl.json "$PYTHON" -m vlmprune bench $QWEN $COMMON \
  --method vispruner:keep=0.22 --method vispruner:keep=0.11 --method $CUT \
  --method vispruner:keep=0.22+$CUT --method fastv:keep=0.11 --out "$RUNS/qwen2.5-vl.json"

# shellcheck disable=SC2086
step 120 llava-1.5.json "$PYTHON" -m vlmprune bench $LLAVA $COMMON \
  --method vispruner:keep=192 --method vispruner:keep=128 --method vispruner:keep=64 \
  --method vispruner:keep=32 --method $CUT --method vispruner:keep=128+$CUT \
  --method fastv:keep=0.22 --out "$RUNS/llava-1.5.json"

# shellcheck disable=SC2086
step 60 selection.json "$PYTHON" benchmarks/selection.py $SELECT --json "$RUNS/selection.json"

# shellcheck disable=SC2086
step 90 decode.json "$PYTHON" benchmarks/decode.py $DECODE --json "$RUNS/decode.json"

# shellcheck disable=SC2086
step 60 compiled.json "$PYTHON" benchmarks/compiled.py $COMPILED --json "$RUNS/compiled.json"

render
echo "$(($(date +%s) - START)) seconds; figures in $RUNS, pages in $DOCS"
if [ -n "$FAILED" ]; then
  echo "not finished:$FAILED" >&2
  exit 1
fi
