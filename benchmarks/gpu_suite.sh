#!/usr/bin/env bash
# What a GPU machine has to do, in one call: tests first, then timings. Up to 10 minutes.
#
#   benchmarks/gpu_suite.sh                    everything
#   benchmarks/gpu_suite.sh tests molora       these parts, in this order
#   benchmarks/gpu_suite.sh --dry-run [PART…]  print the commands
#
# Parts: tests base_product molora routing importance importance_ops importance_8b sanitizer
# PYTHON  the interpreter that has torch and triton (default: python3)
# OUT     where results and logs go (default: a new directory under the system's temporary one)
#
# Without a GPU every part is skipped, with the reason. Exit code 1 if a part failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
ALL=(tests base_product molora routing importance importance_ops importance_8b sanitizer)

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
export PYTHONPATH=".:python:tests${PYTHONPATH:+:$PYTHONPATH}"
on_gpu=(env CITI_BACKEND=triton CITI_TEST_DEVICE=cuda)
kernel_tests=(tests/citi_kernels/test_molora_linear.py tests/citi_kernels/test_molora_linear_autograd.py
  tests/citi_kernels/test_molora_linear_reliability.py tests/citi_kernels/test_layer.py
  tests/citi_kernels/triton_kernels)
importance=("$PYTHON" benchmarks/importance.py --device cuda --dtype bf16)
small_case=(tests/citi_kernels/test_molora_linear.py -k fp16-dense)

# sets `command`
command_of() {
  local pytest=("$PYTHON" -m pytest -p no:cacheprovider)
  case "$1" in
    tests) command=("${on_gpu[@]}" "${pytest[@]}" -n 4 "${kernel_tests[@]}") ;;
    base_product) command=("$PYTHON" benchmarks/base_product.py --write) ;;
    molora) command=("$PYTHON" benchmarks/molora_linear.py --device cuda --dtype bf16 --seconds 2
      --json "$OUT/molora_linear.json") ;;
    routing) command=("$PYTHON" benchmarks/molora_routing.py --device cuda --json "$OUT/molora_routing.json") ;;
    importance) command=("${importance[@]}" --model smollm2 --rounds 7 --json "$OUT/importance.json") ;;
    importance_ops) command=("${importance[@]}" --ops --seconds 1 --json "$OUT/importance_ops.json") ;;
    importance_8b) command=("${importance[@]}" --model llama-8b --checkpointing --rounds 3
      --json "$OUT/importance_8b.json") ;;
    sanitizer) command=("${on_gpu[@]}" PYTORCH_NO_CUDA_MEMORY_CACHING=1
      compute-sanitizer --error-exitcode 1 "${pytest[@]}" "${small_case[@]}") ;;
  esac
}

why_not() {
  [ "$dry_run" = 0 ] || return 0
  "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "$PYTHON finds no GPU through torch"; return; }
  [ "$1" != sanitizer ] || command -v compute-sanitizer >/dev/null || echo "compute-sanitizer is not installed"
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
  if "${command[@]}" >"$OUT/$part.log" 2>&1; then word=passed; else word=FAILED; failed=1; fi
  tail -n 12 "$OUT/$part.log"
  echo "$part: $word in $((SECONDS - start)) s, log in $OUT/$part.log" >>"$summary"
done
[ ! -f citi_kernels/triton_kernels/base_product.json ] || cp citi_kernels/triton_kernels/base_product.json "$OUT/"
[ "$dry_run" = 1 ] || cat "$summary"
exit $failed
