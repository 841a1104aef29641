#!/usr/bin/env bash
# The CPU backend's kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and those of Arm under an emulator.
#
#     tools/cpu_sanitize.sh [PYTHON]
#
# 1. check/main.cpp, sanitized: every kernel of every instruction set of this machine, in buffers of their exact size.
# 2. The same for 64-bit Arm, where aarch64-linux-gnu-g++ and qemu-aarch64 are installed.
# 3. The conformance suite of each instruction set on a sanitized module, with PYTHON (default: python3), which has
#    awq-rt and pybind11 and no awq-rt-cpu. Leaks are not looked for: an interpreter keeps what it has at its end.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
sanitizers=address,undefined

cmake -S backends/cpu -B "$build/check" -DCHECK=ON -DSANITIZE=$sanitizers >/dev/null
cmake --build "$build/check"
"$build/check/check"

if command -v aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null; then
  cmake -S backends/cpu -B "$build/arm" -DCHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
  cmake --build "$build/arm"
  qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/arm/check"
else
  echo "64-bit Arm: not run, aarch64-linux-gnu-g++ or qemu-aarch64 is missing"
fi

cmake -S backends/cpu -B "$build/module" -DSANITIZE=$sanitizers -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="${pybind11_DIR:-$("$python" -m pybind11 --cmakedir)}" >/dev/null
cmake --build "$build/module"
cp -r backends/cpu/awq_rt_cpu "$build/package"
mkdir "$build/path" && mv "$build/package" "$build/path/awq_rt_cpu"
cp "$build"/module/_native*.so "$build/path/awq_rt_cpu/"
# The sanitizers' libraries must be the first that the interpreter loads.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH="$build/path:."
for isa in $("$python" -c 'from awq_rt_cpu import _native; print(*(name for name, _ in _native.offered()))'); do
  AWQ_RT_CPU_ISA=$isa "$python" -c 'import sys
from awq_rt.testing.conformance import report
from awq_rt_cpu import _native, backend
assert _native.__file__.startswith(sys.argv[1]), f"{_native.__file__} is not the sanitized module; uninstall awq-rt-cpu"
print(*_native.chosen())
sys.exit(report(backend))' "$build"
done
echo "no sanitizer complained"
