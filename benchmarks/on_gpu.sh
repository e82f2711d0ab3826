#!/usr/bin/env bash
# All that only a GPU can show, in one go: engines built side by side, `pytest -m gpu`, the founding table, the ablation of
# the fp16 recipe, `sdtrt verify` and `sdtrt bench`. Reports go to FOLDER/reports, logs to FOLDER/logs.
#
#     PYTHON=python bash benchmarks/on_gpu.sh FOLDER
#
# Builds take most of the time, a processor core each: on an H200 with TensorRT 8.6, 6 to 10 minutes for a UNet of
# Stable Diffusion 1.5's size when several are built at once. Engines stay in FOLDER/engines: a second call only measures.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"/{logs,engines,reports,gpu-test-models}
out=$(cd "$1" && pwd) python=${PYTHON:-python}
model=$out/gpu-test-models/sd1-random
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_GPU_TEST_ENGINE_DIR=$out/engines SDTRT_ENGINE_DIR=$out/engines
declare -A jobs
failed=()

start() { # NAME COMMAND...: run it beside what else runs
    local name=$1
    shift
    "$@" >"$out/logs/$name.log" 2>&1 &
    jobs[$name]=$!
}

finish() { # NAME...: wait for them
    local name
    for name in "$@"; do
        if wait "${jobs[$name]}"; then echo "$(date +%T) done: $name"; else
            echo "$(date +%T) FAILED: $name, see $out/logs/$name.log"
            failed+=("$name")
        fi
    done
}

measure() { # NAME COMMAND...: run it alone
    start "$@"
    finish "$1"
}

build() { # NAME WIDTH COMPONENT...: engines of the large model, 512 pixels high
    local name=$1 width=$2
    shift 2
    start "$name" "$python" -m sdtrt build --model "$model" --backend tensorrt --batch 2 --height 512 --width "$width" \
        --optimization-level 1 $(printf -- '--component %s ' "$@")
}

for engine in dynamic fp32; do start "test-$engine" "$python" tests/gpu/gpu_engines.py --one "$engine"; done
[ -e "$model" ] || measure model "$python" scripts/make_random_model.py "$model"
build unet-512 512 unet
build unet-768 768 unet
build parts-512 512 text_encoder vae_decoder vae_encoder
build parts-768 768 vae_decoder vae_encoder
[ -e "$out/reports/levels.json" ] || start levels "$python" benchmarks/fidelity.py levels --model "$model" --levels 0 1 2 \
    --folder "$out" --output "$out/reports/levels.json"
start tiny "$python" -m sdtrt build --model tiny --backend tensorrt --optimization-level 0 --batch 2 \
    --component text_encoder --component vae_decoder --component vae_encoder
finish test-dynamic test-fp32 tiny
start tests "$python" -m pytest -m gpu tests -q -rs --durations=10
finish unet-512 unet-768 parts-512 parts-768 tests
[ -z "${jobs[levels]:-}" ] || finish levels

measure founding "$python" benchmarks/founding.py --model "$model" --output "$out/reports/founding.json"
measure test-large env SDTRT_GPU_TEST_LARGE=1 "$python" -m pytest -m gpu tests/gpu -q -s -k large_unet
measure verify "$python" -m sdtrt verify --backend tensorrt --no-build --output "$out/reports" --json
measure convolutions "$python" benchmarks/fidelity.py convolutions --output "$out/reports/convolutions.json"
measure bench "$python" -m sdtrt bench --model "$model" --backend tensorrt --task txt2img --height 512 --width 512 \
    --no-build --output "$out/reports"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
