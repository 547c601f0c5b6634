#!/usr/bin/env bash
# Proves and measures the GPU kernels, offline, on a machine with torch, Triton, nvcc, CMake, Ninja
# and pybind11. Ten minutes. Results: $1, or benchmarks/results/<GPU>.
set -uo pipefail
cd "$(dirname "$0")/.."
gpu=$(python3 -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
out=${1:-benchmarks/results/$gpu}
mkdir -p "$out"
failed=()
step() {  # step NAME SECONDS COMMAND...: its log goes to $out/NAME.log
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then local end=ok; else local end=FAILED; fi
  [ $end = ok ] || failed+=("$name")
  echo "$name: $end, $((SECONDS - start)) s"
}

# Built where the package is imported from, in place.
python3 -m pybind11 --cmakedir >/dev/null || { echo "pybind11 is missing"; exit 1; }
step build 90 env PYFAST_CUDA=1 PYFAST_CUDA_ARCHS=90a-real python3 setup.py build_ext --inplace
links=build/gpu_check  # kernels and benchmarks as an installed package has them
rm -rf $links && mkdir -p $links && cp -r pyfast $links/pyfast
cp -r kernels $links/pyfast/kernels && cp -r benchmarks $links/pyfast/benchmarks
export PYTHONPATH=$PWD/$links PYTHONSAFEPATH=1  # and not what lies beside the script
step info 20 python3 -m pyfast info

# Every backend that runs on a GPU, against the float64 oracles: in parts, because most of the time
# is Triton's compiler.
step tests 300 bash -c "seq 0 13 | OMP_NUM_THREADS=1 xargs -P 14 -I{} python3 -m pytest tests \
  --part {}/14 --maxfail=3 -k 'cuda or triton' --ignore tests/test_compiled_code.py \
  --ignore tests/test_compiled_attention.py --ignore tests/test_compiled_optimizer.py"

# The CUDA C++ kernels under the sanitizer, and everything 250 times, bit for bit.
step repeats 40 python3 benchmarks/gpu_repeat.py 250
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    step $tool 60 compute-sanitizer --tool $tool --error-exitcode 9 \
      python3 benchmarks/gpu_repeat.py 1 cuda
  else
    echo "$tool: compute-sanitizer is missing"; failed+=("$tool")
  fi
done

step overview 90 python3 -m pyfast.benchmarks.gpu_overview --out "$out/overview.json"
step attention 110 python3 -m pyfast.benchmarks.gpu_attention --lengths 4096 --out "$out/attention.json"
step optimizers 60 python3 -m pyfast bench --device cuda --op optimizer_step --json "$out/optimizer_step.json"
step models 90 python3 -m pyfast bench --quick --device cuda --op models --json "$out/models.json"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
