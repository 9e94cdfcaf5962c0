#!/usr/bin/env bash
# Checks fused_sam on a machine with a GPU: builds for that GPU, runs the GPU tests, compute-sanitizer and benchmarks.
#
#   tools/gpu_check.sh OUTDIR [build] [tests] [bench] [sanitizer] [more]     runs all five if none is named
#
# It needs python3 with torch, pytest, pybind11, cmake and ninja, and nvcc, but no network. It builds in a copy of the
# source tree (FUSED_SAM_SCRATCH, else under TMPDIR) that later runs use again. It ends within FUSED_SAM_SECONDS (570).
# OUTDIR gets logs, JSON and PNG. summary.json has for each step ok, failed or skipped, its seconds and the last line of
# its output. bench also writes targets.json: targets of the GPU backends, the numbers they reached, and a verdict.
# Without a GPU the build is for FUSED_SAM_CUDA_ARCHS (90), and the steps that need a GPU are skipped by name.
set -euo pipefail

usage() { sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
[ $# -ge 1 ] || usage
out=$1; shift
[ $# -gt 0 ] || set -- build tests bench sanitizer more
for stage in "$@"; do
  case $stage in build | tests | bench | sanitizer | more) ;; *) echo "unknown stage: $stage" >&2; usage ;; esac
done

source_tree=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=${FUSED_SAM_SCRATCH:-${TMPDIR:-/tmp}/fused_sam_gpu_check}
python=${PYTHON:-python3}
limit=${FUSED_SAM_SECONDS:-570}
rows=()
failed=0

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || gpu=
echo "GPU: ${gpu:-none}; source: $source_tree; scratch: $scratch; results: $out"

note() { # NAME RESULT SECONDS [TEXT]: writes summary.json at once, because the run may be killed later
  local row text=
  rows+=("  {\"step\": \"$1\", \"result\": \"$2\", \"seconds\": $3, \"note\": \"${4:-}\"}")
  for row in "${rows[@]}"; do text+="${text:+,
}$row"; done
  printf '{"gpu": "%s", "seconds": %s, "steps": [\n%s\n]}\n' "$gpu" "$SECONDS" "$text" >"$out/summary.json"
  printf '%-22s %-8s %4s s  %s\n' "$1" "$2" "$3" "${4:-}"
}

last_line() { # FILE: prints its last line with text, without the characters that a JSON string does not allow
  LC_ALL=C tr -cd '\11\12\40-\176' <"$1" | tr -d '"\\' | tr '\11' ' ' | { grep -v '^[ =]*$' || true; } |
    tail -n 1 | cut -c 1-200
}

step() { # NAME SECONDS COMMAND...: runs it within these seconds and the time left, with output to OUTDIR/NAME.log
  local name=$1 most=$2 begin=$SECONDS code=0
  shift 2
  local left=$((limit - SECONDS))
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -le 5 ]; then
    note "$name" skipped 0 "no time left of $limit s"
    failed=1
    return 1
  fi
  (cd "$scratch/tree" && PYTHONPATH="$scratch/tree" timeout -k 10 "$most" "$@") >"$out/$name.log" 2>&1 || code=$?
  if [ "$code" -eq 0 ]; then
    note "$name" ok $((SECONDS - begin)) "$(last_line "$out/$name.log")"
  else
    note "$name" failed $((SECONDS - begin)) "exit status $code, see $name.log: $(last_line "$out/$name.log")"
    tail -n 15 "$out/$name.log"
    failed=1
    return 1
  fi
}

ready() { # makes the copy and builds the modules in it, which takes seconds if nothing has changed
  [ -n "${is_ready:-}" ] && return 0
  mkdir -p "$scratch/tree"
  # tar keeps times, so that unchanged files are not compiled again.
  local left_out=(--exclude=./build --exclude='./.?*' --exclude='*.so' --exclude='*.so.*' --exclude=__pycache__)
  (cd "$source_tree" && tar cf - "${left_out[@]}" .) |
    (cd "$scratch/tree" && tar xf - --keep-directory-symlink)
  local archs=native
  [ -n "$gpu" ] || archs=${FUSED_SAM_CUDA_ARCHS:-90}
  step machine 60 "$python" tools/machine.py || true
  step build 300 env FUSED_SAM_CUDA=1 FUSED_SAM_CUDA_ARCHS="$archs" "$python" setup.py build_ext --inplace || return 1
  step info 60 "$python" -m fused_sam info || return 1
  # With a GPU a skipped test must not look like a passed one, so both backends are checked first.
  local backend
  local choose='import sys, torch; from fused_sam.backends import choose; '
  choose+='print(choose(sys.argv[1], torch.device("cuda")))'
  for backend in cuda triton; do
    [ -z "$gpu" ] || step "$backend" 60 "$python" -c "$choose" "$backend" || [ "$backend" != cuda ] || return 1
  done
  is_ready=1
}

with_gpu() { # NAME: returns false, with a note, if there is no GPU
  [ -n "$gpu" ] && return 0
  note "$1" skipped 0 "no GPU"
  return 1
}

tests() {
  # Without a GPU the tests skip with a reason. Other files may import packages that this machine lacks.
  local files
  mapfile -t files < <(cd "$scratch/tree" && grep -l 'mark\.gpu' tests/test_*.py)
  step tests 240 "$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=60 -m gpu --durations=15 \
    --junitxml="$out/tests.xml" "${files[@]}" || true
}

bench() {
  with_gpu bench || return 0
  # The targets are measured first, one by one, because a peer with other results ends a benchmark.
  step step 60 "$python" tools/gpu_step.py --out "$out" || true
  local ours=(--device cuda --peer ours-cuda --peer ours-triton --seconds 5 --shape 128x1048576 --shape resnet50)
  if can_bench ours; then
    step ours 50 "$python" -m bench side-by-side "${ours[@]}" --out "$out/ours" || true
    step ours_adamw 50 "$python" -m bench adamw "${ours[@]}" --out "$out/ours" || true
  fi
  step targets 20 "$python" tools/gpu_targets.py "$out" || true
  step kernels 90 "$python" tools/gpu_kernels.py --out "$out" || true
  if can_bench side_by_side; then
    step side_by_side 80 "$python" -m bench side-by-side --device cuda --seconds 4 --shape 128x1048576 \
      --shape resnet50 --shape 44x262144 --shape 1000x256 --out "$out" || true
    step adamw 60 "$python" -m bench adamw --device cuda --seconds 4 --out "$out" || true
  fi
}

sanitizer() {
  with_gpu sanitizer || return 0
  local tool=compute-sanitizer check only few="reference or finite or finish or draws or vectors"
  command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
  if ! command -v "$tool" >/dev/null; then
    note sanitizer skipped 0 "compute-sanitizer is missing (CUDA toolkit)"
    return 0
  fi
  # Every tensor has its own allocation, so that an access outside of it is an error. initcheck covers torch's kernels
  # too, because memory that an unchecked kernel wrote counts as unwritten.
  for check in memcheck racecheck initcheck; do
    only=(--kernel-name kernel_substring=fused_sam)
    [ "$check" != initcheck ] || only=()
    step "$check" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 FUSED_SAM_SANITIZER=1 \
      "$tool" --tool "$check" "${only[@]}" --error-exitcode 86 --report-api-errors no --print-limit 20 \
      "$python" -m pytest -q --maxfail=3 -p no:cacheprovider tests/test_cuda_gpu.py -k "$few" || true
  done
}

more() { # takes long measurements that decide nothing
  with_gpu more || return 0
  if can_bench memory; then
    step memory 60 "$python" -m bench memory --device cuda --shape resnet50 --out "$out" || true
    step compiled 120 "$python" -m bench side-by-side --device cuda --seconds 5 --peer ours-cuda --peer compiled \
      --shape resnet50 --out "$out/compiled" || true
  fi
  if "$python" -c 'import pytest_benchmark' 2>"$out/micro.log"; then
    step micro 60 env BENCH_DEVICE=cuda "$python" -m pytest -q -p no:cacheprovider --rootdir=bench bench/micro \
      --benchmark-json="$out/micro.json" || true
  else
    note micro skipped 0 "$(last_line "$out/micro.log")"
  fi
}

can_bench() { # NAME: returns false, with a note, if a package of the benchmarks' command line is missing
  "$python" -c 'import typer, rich, matplotlib, numpy' 2>"$out/$1.log" && return 0
  note "$1" skipped 0 "$(last_line "$out/$1.log")"
  return 1
}

ready || exit 1
for stage in "$@"; do
  [ "$stage" = build ] || "$stage"
done
exit "$failed"
