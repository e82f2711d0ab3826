#!/usr/bin/env bash
# From the shell to the first step with Inductor's engines, on a GPU, by itself: what `auto` builds and why, where the time
# of a command goes, with bytecode and without, and what CUDA graphs hold of the GPU's memory. All goes to FOLDER.
#
#     PYTHON=python bash benchmarks/first_step.sh FOLDER MODEL [HEIGHT [WIDTH]]
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 FOLDER MODEL [HEIGHT [WIDTH]]" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd) model=$2 height=${3:-512} width=${4:-${3:-512}} python=${PYTHON:-python} failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_ENGINE_DIR=${SDTRT_ENGINE_DIR:-$out/engines}
echo "PYTHONDONTWRITEBYTECODE: ${PYTHONDONTWRITEBYTECODE-not set}"
size=(--height "$height" --width "$width")

step() { # NAME COMMAND...
    local name=$1
    shift
    echo "$(date +%T) $name"
    "$@" >"$out/$name.log" 2>&1 || { echo "FAILED: $name, see $out/$name.log"; failed=1; }
    tail -n 60 "$out/$name.log"
}

step doctor "$python" -m sdtrt doctor
step build "$python" -m sdtrt build --model "$model" "${size[@]}"
grep -h "backend: " "$out/build.log" || failed=1
backend=$(sed -n 's/^backend: \([a-z-]*\) .*/\1/p' "$out/build.log" | head -1)
for steps in 1 3; do # a CUDA graph is captured in the second one
    step "startup-$steps" "$python" benchmarks/startup.py --model "$model" --backend "${backend:-inductor}" "${size[@]}" \
        --steps "$steps" --repeats 3 --output "$out/startup-$steps.json"
done
step graph-memory "$python" benchmarks/graph_memory.py --model "$model" --backend "${backend:-inductor}" "${size[@]}" \
    --output "$out/graph-memory.json"
exit "$failed"
