#!/usr/bin/env bash
# What a GPU machine has to do, in one call: tests first, then timings. Up to 10 minutes.
#
#   benchmarks/gpu_suite.sh                    everything
#   benchmarks/gpu_suite.sh tests layer        these parts, in this order
#   benchmarks/gpu_suite.sh --dry-run [PART…]  print the commands
#
# Parts: build tests tests_cuda base_product layer routing importance training sanitizer counters
# PYTHON  the interpreter that has torch and triton (default: python3)
# PART_LIMIT  seconds after which a part is stopped (default: 300)
# OUT     where results and logs go (default: a new directory under the system's temporary one)
#
# Without a GPU every part is skipped, with the reason. Exit code 1 if a part failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
ALL=(build tests tests_cuda base_product layer routing importance training sanitizer counters)

dry_run=0
parts=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *)
      if [[ " ${ALL[*]} " != *" $argument "* ]]; then
        echo "gpu_suite.sh: no part '$argument'; there are: ${ALL[*]}" >&2
        exit 2
      fi
      parts+=("$argument")
      ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=("${ALL[@]}")

mkdir -p "$OUT" || exit 2
export PATH="$PATH:/usr/local/cuda/bin"
export PYTHONPATH=".:python:tests${PYTHONPATH:+:$PYTHONPATH}"
on_gpu=(env CITI_TEST_DEVICE=cuda CITI_BACKEND=triton)
on_gpu_cuda=(env CITI_TEST_DEVICE=cuda CITI_BACKEND=cuda)
kernel_tests=(tests/citi_kernels/test_molora_linear.py tests/citi_kernels/test_molora_linear_autograd.py
  tests/citi_kernels/test_molora_linear_reliability.py tests/citi_kernels/test_molora_on_gpu.py
  tests/citi_kernels/test_layer.py tests/citi_kernels/test_importance_on_gpu.py
  tests/citi_kernels/test_importance_row_dots.py tests/citi_kernels/test_importance_parameters.py)
bench=("$PYTHON" -m citi bench --device cuda --dtype bf16 --patience 2)
# what needs no GPU was run where there is none
triton_tests=(tests/citi_kernels/triton_kernels --ignore-glob '*/test_offline_compile.py'
  --ignore-glob '*/test_importance_kernels.py' --ignore-glob '*/test_launches.py' --ignore-glob '*/test_source.py')
workers=$(($(nproc) < 12 ? $(nproc) : 12))
small_case=(tests/citi_kernels/test_molora_linear.py -k fp16-dense)

# sets `command`
command_of() {
  local pytest=("$PYTHON" -m pytest -p no:cacheprovider)
  case "$1" in
    build) command=("$PYTHON" setup.py build_ext --inplace) ;;
    tests) command=("${on_gpu[@]}" "${pytest[@]}" -n "$workers" --dist worksteal
      "${kernel_tests[@]}" "${triton_tests[@]}") ;;
    tests_cuda) command=("${on_gpu_cuda[@]}" "${pytest[@]}" -n "$workers" --dist worksteal "${kernel_tests[@]}"
      tests/citi_kernels/test_extended_gemm_on_hopper.py
      tests/citi_kernels/test_routed_gemm_on_hopper.py) ;;
    base_product) command=("$PYTHON" benchmarks/base_product.py --write) ;;
    layer) command=("${bench[@]}" layer linears ceilings --seconds 2 --json "$OUT/layer.json") ;;
    routing) command=("${bench[@]}" top-k decode scaling --seconds 1 --json "$OUT/routing.json") ;;
    importance) command=("${bench[@]}" "importance ops" importance --seconds 2 --json "$OUT/importance.json") ;;
    training) command=("${bench[@]}" training generation --seconds 2 --json "$OUT/training.json") ;;
    sanitizer) command=("${on_gpu_cuda[@]}" PYTORCH_NO_CUDA_MEMORY_CACHING=1
      compute-sanitizer --error-exitcode 1 "${pytest[@]}" "${small_case[@]}") ;;
    counters) command=(ncu --csv --log-file "$OUT/counters.csv" --metrics dram__bytes.sum,gpu__time_duration.sum
      "$PYTHON" benchmarks/one_layer.py) ;;
  esac
}

why_not() {
  [ "$dry_run" = 0 ] || return 0
  "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "$PYTHON finds no GPU through torch"; return; }
  case "$1" in
    build) command -v nvcc >/dev/null || echo "there is no nvcc" ;;
    tests_cuda) "$PYTHON" -c 'import citi_kernels._C' 2>/dev/null || echo "citi_kernels._C is not built" ;;
    sanitizer) command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not installed" ;;
    counters) command -v ncu >/dev/null || echo "ncu is not installed" ;;
  esac
}

failed=0
summary="$OUT/summary.txt"
: >"$summary"
for part in "${parts[@]}"; do
  command_of "$part"
  reason=$(why_not "$part")
  if [ "$dry_run" = 1 ]; then
    echo "$part: ${command[*]}" | tee -a "$summary"
    continue
  fi
  if [ -n "$reason" ]; then
    echo "$part: skipped, $reason" >>"$summary"
    continue
  fi
  start=$SECONDS
  echo "== $part: ${command[*]}"
  # One part that hangs must not cost those after it.
  if timeout "${PART_LIMIT:-300}" "${command[@]}" >"$OUT/$part.log" 2>&1; then word=passed; else word="FAILED ($?)"; failed=1; fi
  tail -n 12 "$OUT/$part.log"
  echo "$part: $word in $((SECONDS - start)) s, log in $OUT/$part.log" >>"$summary"
done
[ ! -f citi_kernels/triton_kernels/base_product.json ] || cp citi_kernels/triton_kernels/base_product.json "$OUT/"
[ "$dry_run" = 1 ] || cat "$summary"
exit $failed
