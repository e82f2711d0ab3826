#!/usr/bin/env bash
# What a pipeline's engines take of a GPU's memory, with one pool for all and with one for each, and where the time of a
# call goes outside of the UNet, by itself. The GPU tests of the pool come first. All goes to FOLDER.
#
#     PYTHON=python bash benchmarks/memory_and_call.sh FOLDER MODEL [HEIGHT [WIDTH]]
#
# BACKEND and PRECISION are inductor and fp16 without a word. TESTS=0 leaves the tests out.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 FOLDER MODEL [HEIGHT [WIDTH]]" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"
out=$(cd "$1" && pwd) model=$2 height=${3:-512} width=${4:-${3:-512}} python=${PYTHON:-python} failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_ENGINE_DIR=${SDTRT_ENGINE_DIR:-$out/engines}
size=(--model "$model" --backend "${BACKEND:-inductor}" --height "$height" --width "$width")

step() { # NAME COMMAND...
    local name=$1
    shift
    echo "$(date +%T) $name"
    "$@" >"$out/$name.log" 2>&1 || { echo "FAILED: $name, see $out/$name.log"; failed=1; }
    tail -n 30 "$out/$name.log"
}

if [ "${TESTS:-1}" = 1 ]; then
    step tests "$python" -m pytest -m gpu -rP -q -o addopts= tests/gpu/test_gpu_graph_pool.py \
        "tests/gpu/test_gpu_memory.py::test_the_check_counts_what_graphs_hold"
fi
step graph-memory "$python" benchmarks/graph_memory.py "${size[@]}" --steps "${STEPS:-5}" --output "$out/graph-memory.json"
for task in img2img txt2img; do
    for way in "" --own; do
        step "call-$task$way" "$python" benchmarks/call_profile.py "${size[@]}" --precision "${PRECISION:-fp16}" \
            --steps "${STEPS:-50}" --task "$task" $way --trace "$out/call-$task$way.trace.json" \
            --output "$out/call-$task$way.json"
    done
done
exit "$failed"
