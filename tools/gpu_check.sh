#!/usr/bin/env bash
# Checks fused_sam on a machine with a GPU: smoke tests, a build for that GPU, the GPU tests, benchmarks, profiles.
#
#   tools/gpu_check.sh OUTDIR [smoke] [tests] [bench] [profile] [sweep] [sanitizer] [more]     runs all if none is named
#
# It needs python3 with torch, pytest, pybind11, cmake and ninja, and nvcc, but no network. It builds in a copy of the
# source tree (FUSED_SAM_SCRATCH, else under TMPDIR) that later runs use again. It ends within FUSED_SAM_SECONDS (570);
# steps for which no time is left are skipped by name, and a later run with the stages' names measures them.
# OUTDIR gets logs and JSON; after every step OUTDIR/all.tgz has all of them, so that one file is enough to bring home.
# summary.json has the commit, and for each step ok, failed or skipped, its seconds, the last line of its output, and
# for tests how many passed, were skipped and failed. No failure ends the run: without the CUDA module Triton is still
# measured, and without a GPU every step that needs one fails with its own reason. A table of results comes last.
set -uo pipefail

usage() { sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
[ $# -ge 1 ] || usage
out=$1; shift
[ $# -gt 0 ] || set -- smoke tests bench profile sweep sanitizer more
for stage in "$@"; do
  case $stage in
    smoke | tests | bench | profile | sweep | sanitizer | more) ;;
    *) echo "unknown stage: $stage" >&2; usage ;;
  esac
done

source_tree=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
scratch=${FUSED_SAM_SCRATCH:-${TMPDIR:-/tmp}/fused_sam_gpu_check}
python=${PYTHON:-python3}
limit=${FUSED_SAM_SECONDS:-570}
grace=${FUSED_SAM_GRACE:-10} # seconds between asking a step to end and leaving it behind
rows=()
failed=0
cuda= # "yes" if the CUDA module is built

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || gpu=
export FUSED_SAM_COMMIT=${FUSED_SAM_COMMIT:-$(git -C "$source_tree" describe --always --dirty=+ --exclude='*' 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1
echo "GPU: ${gpu:-none}; commit: $FUSED_SAM_COMMIT; source: $source_tree; scratch: $scratch; results: $out"

pack() { # writes all.tgz with everything in OUTDIR; a step left behind may still write, of which tar warns
  mkdir -p "$scratch"
  tar czf "$scratch/all.tgz" -C "$out" --exclude=./all.tgz . 2>/dev/null
  mv -f "$scratch/all.tgz" "$out/all.tgz"
}
trap pack EXIT
trap 'exit 130' INT TERM HUP

note() { # NAME RESULT SECONDS [TEXT] [MORE JSON]: writes summary.json and packs at once, because the run may be killed
  local row text=
  rows+=("  {\"step\": \"$1\", \"result\": \"$2\", \"seconds\": $3, \"note\": \"${4:-}\"${5:-}}")
  for row in "${rows[@]}"; do text+="${text:+,
}$row"; done
  printf '{"gpu": "%s", "commit": "%s", "seconds": %s, "steps": [\n%s\n]}\n' \
    "$gpu" "$FUSED_SAM_COMMIT" "$SECONDS" "$text" >"$out/summary.json"
  printf '%-18s %-8s %4s s  %s\n' "$1" "$2" "$3" "${4:-}"
  [ "$2" = ok ] || failed=1
  pack
}

plain() { LC_ALL=C tr -cd '\11\12\40-\176' | tr -d '"\\' | tr '\11' ' '; } # what a JSON string allows

last_line() { # FILE: prints its last line with text
  plain <"$1" | { grep -v '^[ =]*$' || true; } | tail -n 1 | cut -c 1-200
}

run() { # SECONDS LOG COMMAND...: its exit status; 124 if it took longer, 125 if it cannot even be ended
  local most=$1 log=$2 pid waited=0
  shift 2
  (cd "$scratch/tree" && PYTHONPATH="$scratch/tree" exec timeout -k "$grace" "$most" "$@") >"$log" 2>&1 &
  pid=$!
  # A process that waits for a GPU that hangs may not even be killed. It is then left behind.
  while kill -0 "$pid" 2>/dev/null; do
    [ "$waited" -lt $((10 * (most + 2 * grace))) ] || return 125
    sleep 0.1
    waited=$((waited + 1))
  done
  wait "$pid"
}

step() { # NAME SECONDS COMMAND...: runs it within these seconds and the time left, with output to OUTDIR/NAME.log
  local name=$1 most=$2 begin=$SECONDS code=0 counts= words=
  shift 2
  local left=$((limit - SECONDS))
  [ "$left" -lt "$most" ] && most=$left
  if [ "$most" -le 5 ]; then
    note "$name" skipped 0 "no time left of $limit s"
    return 1
  fi
  rm -f "$out/$name.xml"
  run "$most" "$out/$name.log" "$@" || code=$?
  [ ! -f "$out/$name.xml" ] || counts=$(counts_of "$out/$name.xml")
  words=$(last_line "$out/$name.log")
  case $code in
    0) ;;
    124 | 137) words="ended after $most s: $words" ;;
    125) words="hangs since $most s and was left behind: $words" ;;
    *) words="exit status $code, see $name.log: $words" ;;
  esac
  if [ "$code" -eq 0 ] && [[ $counts == *'"passed": 0,'* ]]; then
    code=1
    words="nothing was tested: $words"
  fi
  if [ "$code" -eq 0 ]; then
    note "$name" ok $((SECONDS - begin)) "$words" "$counts"
  else
    note "$name" failed $((SECONDS - begin)) "$words" "$counts"
    tail -n 15 "$out/$name.log"
    return 1
  fi
}

counts_of() { # FILE: prints what pytest's junit.xml counts, as JSON
  sed -n 's/.*<testsuite [^>]*errors="\([0-9]*\)" failures="\([0-9]*\)" skipped="\([0-9]*\)" tests="\([0-9]*\)".*/\1 \2 \3 \4/p' \
    "$1" | head -n 1 | {
    read -r errors failures skipped tests || return 0
    printf ', "passed": %s, "skipped": %s, "failed": %s' \
      $((tests - errors - failures - skipped)) "$skipped" $((errors + failures))
  }
}

copy_to() { # FOLDER: copies the source tree; tar keeps times, so that unchanged files are not compiled again
  local left_out=(--exclude=./build --exclude='./.?*' --exclude='*.so' --exclude='*.so.*' --exclude=__pycache__)
  mkdir -p "$1" && (cd "$source_tree" && tar cf - "${left_out[@]}" .) |
    (cd "$1" && tar xf - --keep-directory-symlink)
}

wants() { # STAGE
  local stage
  for stage in "${stages[@]}"; do [ "$stage" != "$1" ] || return 0; done
  return 1
}

needs_cuda() { # NAME: returns false, with a note, if the CUDA module was not built
  [ -n "$cuda" ] && return 0
  note "$1" skipped 0 "the CUDA module was not built, see build.log"
  return 1
}

has() { # NAME PACKAGES: returns false, with a note, if one of them is missing
  "$python" -c "import $2" 2>"$out/$1.log" && return 0
  note "$1" skipped 0 "$(last_line "$out/$1.log")"
  return 1
}

# ---- the stages, in the order of what they decide -----------------------------------------------------------

build() { # Triton's smoke test needs no build, and comes first
  copy_to "$scratch/tree" || { note copy failed 0 "the source tree was not copied to $scratch/tree"; return; }
  ! wants smoke || step smoke_triton 60 "$python" tools/gpu_smoke.py triton --out "$out"
  step machine 60 "$python" tools/machine.py
  step build 300 env FUSED_SAM_CUDA=1 FUSED_SAM_CUDA_ARCHS="$archs" "$python" setup.py build_ext --inplace && cuda=yes
  step info 60 "$python" -m fused_sam info
  ! wants smoke || ! needs_cuda smoke_cuda || step smoke_cuda 60 "$python" tools/gpu_smoke.py cuda --out "$out"
}

smoke() { :; } # with the build

tests() { # other files may import packages that this machine lacks
  local backend files
  for backend in cuda triton; do
    [ "$backend" != cuda ] || needs_cuda tests_cuda || continue
    mapfile -t files < <(cd "$scratch/tree" && grep -l 'mark\.gpu' tests/test_*"$backend"*.py)
    step "tests_$backend" 200 "$python" -m pytest -q -p no:cacheprovider -o faulthandler_timeout=60 -m gpu \
      --durations=10 --junitxml="$out/tests_$backend.xml" "${files[@]}"
  done
}

bench() {
  # The targets are measured first, one by one, because a peer with other results ends a benchmark.
  local peers=(--peer ours-triton)
  [ -z "$cuda" ] || peers=(--peer ours-cuda --peer ours-triton)
  local ours=(--device cuda "${peers[@]}" --seconds 5 --shape 128x1048576 --shape resnet50)
  ! needs_cuda kernels || step kernels 110 "$python" tools/gpu_kernels.py --out "$out"
  step kernels_triton 60 "$python" tools/gpu_kernels.py --quick --backend triton --out "$out"
  step step 60 "$python" tools/gpu_step.py --out "$out"
  if has ours "typer, rich, matplotlib, numpy"; then
    step ours 50 "$python" -m bench side-by-side "${ours[@]}" --out "$out/ours"
    step ours_adamw 50 "$python" -m bench adamw "${ours[@]}" --out "$out/ours"
  fi
  step targets 20 "$python" tools/gpu_targets.py "$out"
  if has side_by_side "typer, rich, matplotlib, numpy"; then
    step side_by_side 80 "$python" -m bench side-by-side --device cuda --seconds 4 --shape 128x1048576 \
      --shape resnet50 --shape 44x262144 --shape 1000x256 --out "$out"
    step adamw 60 "$python" -m bench adamw --device cuda --seconds 4 --out "$out"
  fi
}

profile() {
  local tool=ncu shape name
  command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/ncu
  if ! command -v "$tool" >/dev/null; then
    note profile skipped 0 "ncu is missing (NVIDIA Nsight Compute, of the CUDA toolkit)"
    return
  fi
  needs_cuda profile || return
  for shape in "134M in 128" "25.6M in 161"; do
    name=profile_${shape%%[!0-9]*}
    step "$name" 120 "$tool" --clock-control none --set full --profile-from-start off --csv --page raw \
      --log-file "$out/$name.csv" "$python" tools/gpu_launches.py --shape "$shape"
  done
}

# Compiler flags of the builds with other numbers than csrc/cuda/tuning.h has.
variants=("threads128 -DFUSED_SAM_THREADS=128" "threads512 -DFUSED_SAM_THREADS=512" "elements32 -DFUSED_SAM_ELEMENTS=32")

sweep() {
  local variant name flags begin=$SECONDS pids=()
  ! needs_cuda sweep || step sweep 90 "$python" tools/gpu_sweep.py --out "$out"
  needs_cuda variants || return
  if [ $((limit - SECONDS)) -lt 60 ]; then
    note variants skipped 0 "no time left of $limit s"
    return
  fi
  for variant in "${variants[@]}"; do # side by side
    name=${variant%% *} flags=${variant#* }
    copy_to "$scratch/$name"
    (cd "$scratch/$name" && CUDAFLAGS=$flags FUSED_SAM_CUDA=1 FUSED_SAM_CUDA_ARCHS=$archs \
      exec timeout -k "$grace" 240 "$python" setup.py build_ext --inplace) >"$out/build_$name.log" 2>&1 &
    pids+=("$!")
  done
  for variant in "${variants[@]}"; do
    name=${variant%% *}
    if wait "${pids[0]}"; then
      note "build_$name" ok $((SECONDS - begin)) "$(last_line "$out/build_$name.log")"
      step "$name" 40 env PYTHONPATH="$scratch/$name" "$python" "$scratch/$name/tools/gpu_kernels.py" --quick \
        --label "$name" --out "$out"
    else
      note "build_$name" failed $((SECONDS - begin)) "see build_$name.log: $(last_line "$out/build_$name.log")"
    fi
    pids=("${pids[@]:1}")
  done
}

sanitizer() {
  local tool=compute-sanitizer check only few="reference or finite or finish or draws or vectors"
  command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
  if ! command -v "$tool" >/dev/null; then
    note sanitizer skipped 0 "compute-sanitizer is missing (CUDA toolkit)"
    return
  fi
  needs_cuda sanitizer || return
  # Every tensor has its own allocation, so that an access outside of it is an error. initcheck covers torch's kernels
  # too, because memory that an unchecked kernel wrote counts as unwritten.
  for check in memcheck racecheck initcheck; do
    only=(--kernel-name kernel_substring=fused_sam)
    [ "$check" != initcheck ] || only=()
    step "$check" 170 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 FUSED_SAM_SANITIZER=1 \
      "$tool" --tool "$check" "${only[@]}" --error-exitcode 86 --report-api-errors no --print-limit 20 \
      "$python" -m pytest -q --maxfail=3 -p no:cacheprovider tests/test_cuda_gpu.py -k "$few" \
      --junitxml="$out/$check.xml"
  done
}

more() { # takes long measurements that decide nothing
  if has memory "typer, rich, matplotlib, numpy"; then
    step memory 60 "$python" -m bench memory --device cuda --shape resnet50 --out "$out"
    step compiled 120 "$python" -m bench side-by-side --device cuda --seconds 5 --peer ours-cuda --peer compiled \
      --shape resnet50 --out "$out/compiled"
  fi
  ! has micro pytest_benchmark || step micro 60 env BENCH_DEVICE=cuda "$python" -m pytest -q -p no:cacheprovider \
    --rootdir=bench bench/micro --benchmark-json="$out/micro.json"
}

stages=("$@")
archs=native
[ -n "$gpu" ] || archs=${FUSED_SAM_CUDA_ARCHS:-90}
build
if [ -d "$scratch/tree/tools" ]; then
  for stage in "${stages[@]}"; do "$stage"; done
fi
"$python" "$source_tree/tools/gpu_report.py" "$out" 2>&1 | tee "$out/report.txt"
exit "$failed"
