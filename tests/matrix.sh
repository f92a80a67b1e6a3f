#!/usr/bin/env bash
# Runs the tests under the conditions of other machines: other instruction sets, fewer CPUs, another
# order of tests or of the terms of sums, other locales, users and paths.
#
#   tests/matrix.sh             every configuration that has no result yet
#   tests/matrix.sh --list      names of the configurations
#   tests/matrix.sh avx2 user   only these configurations
#
# Each leaves a line in build/matrix/NAME.result (remove it to run the configuration again), and
# pytest's output in build/matrix/NAME.log. A configuration that this machine cannot run is "not run".
# The exit code is 1 if one failed. Those of the whole suite take as long as make test, or longer.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD out=$PWD/build/matrix
mkdir -p "$out"

# Files that compare floating-point results of different computations.
floats=(tests/test_{chunked,functional,gemm,gradients,hard_inputs,hf,hf_trainer,losses,ops}.py
  tests/test_{parallel,peers,precision,reference,rows,sink,sparse,token_loss,triton_rows,trl}.py
  tests/training/test_{architectures,evaluate,four_bits,lora,merge,optimizer,padding,ranks,report,rollout}.py
  tests/training/test_{step,tolerance,trainer}.py)
# Files that start processes and wait for them.
processes=(tests/test_{bench,cli,gpu_proof}.py
  tests/training/test_{cached_folder,completions,grading,interrupt,launch,package_index,records,resume}.py
  tests/training/test_{select,server,stopped}.py)
# Files that read, write and print text, or format times.
texts=(tests/test_{bench,cli,cli_measuring,docs}.py
  tests/training/test_{completions,data,evaluate,grading,plan_command,records,report,server,setup,trackers}.py)
# Files that create folders and files.
paths=(tests/test_{cli,docs,gpu_proof,layers}.py
  tests/training/test_{cached_folder,checkpoint,demo_model,failures,free_memory,gguf,launch,merge,package_index,records,resume}.py
  tests/training/test_{select,setup,stopped,trackers}.py)

whole=(default default-2 default-3 scalar avx2 one-cpu random)
parts=(other-sums onednn-avx512 onednn-avx512-bf16 one-thread busy c-locale kathmandu user space)

suite() { .venv/bin/python -m pytest -n auto --dist worksteal -p no:cacheprovider "$@"; }
has_flags() { for flag; do grep -qw "$flag" /proc/cpuinfo || return; done; }
not_run() { echo "not run: $*" >"$out/$name.why"; return 75; }

# Runs a configuration; its case below is all that distinguishes it.
run() {
  case $1 in
    default*) suite ;;
    scalar) ATEN_CPU_CAPABILITY=default suite ;;
    avx2)
      has_flags avx2 || not_run "this CPU has no AVX2" || return
      ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 suite ;;
    one-cpu) taskset -c 0 .venv/bin/python -m pytest -n auto --dist worksteal -p no:cacheprovider ;;
    random) suite --random-order --random-order-bucket=module --random-order-seed="${SEED:-$RANDOM}" ;;
    other-sums)  # It copies operands, so tests of memory do not hold.
      suite --other-sums="${SEED:-$RANDOM}" -k 'not memory' "${floats[@]}" ;;
    onednn-avx512)
      has_flags avx512f avx512bw || not_run "this CPU has no AVX-512" || return
      ONEDNN_MAX_CPU_ISA=AVX512_CORE suite "${floats[@]}" ;;
    onednn-avx512-bf16)
      has_flags avx512_bf16 || not_run "this CPU has no AVX512-BF16" || return
      ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 suite "${floats[@]}" ;;
    one-thread) OMP_NUM_THREADS=1 suite "${floats[@]}" ;;
    busy) beside_busy_loops suite "${processes[@]}" ;;
    c-locale) LC_ALL=C suite "${texts[@]}" ;;
    kathmandu) TZ=Asia/Kathmandu suite "${texts[@]}" ;;
    user) as_another_user ;;
    space) in_a_folder_with_a_space ;;
  esac
}

beside_busy_loops() {
  local loops=() code
  for _ in 1 2; do
    (while :; do :; done) &
    loops+=($!)
  done
  "$@"
  code=$?
  kill "${loops[@]}"
  return $code
}

# Tests a clone as another user, by the README's commands, with a Python that all users can read.
as_another_user() {
  [ "$(id -u)" = 0 ] || not_run "only root can become another user" || return
  local home python
  python=$(for p in /usr/bin/python3.1[0-9] /usr/local/bin/python3; do
    "$p" -c 'import venv, ensurepip' 2>/dev/null && echo "$p" && break; done)
  [ -n "$python" ] || not_run "no Python outside a home folder has venv" || return
  home=$(mktemp -d) && git clone --quiet "$root" "$home/em_kernels" && chown -R 65534:65534 "$home"
  (cd "$home/em_kernels" && HOME=$home TMPDIR=$home setpriv --reuid=65534 --regid=65534 --clear-groups \
    make test PYTHON="$python" TEST_ARGS="${paths[*]}")
  local code=$?
  rm -rf "$home"
  return $code
}

# Tests a clone whose path, home and temporary folder have a space, and lead through a link.
in_a_folder_with_a_space() {
  local real link
  real=$(mktemp -d) && link=$real/link && mkdir "$real/a folder" && ln -s "$real/a folder" "$link"
  mkdir "$link/home" "$link/tmp of it" && git clone --quiet "$root" "$link/em kernels"
  (cd "$link/em kernels" && HOME="$link/home" TMPDIR="$link/tmp of it" \
    make test TEST_ARGS="${paths[*]}")
  local code=$?
  rm -rf "$real"
  return $code
}

[ "${1-}" = --list ] && { printf '%s\n' "${whole[@]}" "${parts[@]}"; exit; }
[ $# -gt 0 ] || set -- "${whole[@]}" "${parts[@]}"
for name; do
  printf '%s\n' "${whole[@]}" "${parts[@]}" | grep -qxF -- "$name" || {
    echo "matrix: no configuration is called $name; tests/matrix.sh --list names them" >&2; exit 2; }
done
make --no-print-directory .venv/.installed || exit
failed=0
for name; do
  if [ ! -e "$out/$name.result" ]; then
    rm -f "$out/$name.why"
    began=$(date +%s)
    run "$name" </dev/null >"$out/$name.log" 2>&1
    code=$?
    counts=$(grep -oE '[0-9]+ (passed|failed|errors?|skipped)' "$out/$name.log" | tail -n 4 | paste -sd' ')
    [ $code -eq 0 ] && verdict=passed || verdict=FAILED
    [ $code -ne 75 ] || { verdict=$(cat "$out/$name.why") counts=; }
    printf '%-18s %-10s %s; %s s, %s\n' "$name" "$verdict" "$counts" $(($(date +%s) - began)) \
      "$(git describe --always --dirty)" >"$out/$name.result"
  fi
  cat "$out/$name.result"
  grep -q ' FAILED ' "$out/$name.result" && failed=1
done
exit $failed
