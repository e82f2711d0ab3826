#!/usr/bin/env bash
# All that only a GPU can show, in one go: engines built side by side, `pytest -m gpu`, the founding table, the ablation of
# the fp16 recipe, `sdtrt verify`, `sdtrt bench`, start-up and tuning. Reports go to FOLDER/reports, logs to FOLDER/logs.
#
#     PYTHON=python bash benchmarks/on_gpu.sh FOLDER
#
# Builds take most of the time, a processor core each: on an H200 with TensorRT 8.6, 6 to 8 minutes for a UNet of
# Stable Diffusion 1.5's size with two others beside it. Nothing is timed while anything is built or tested on the same
# GPU: with two of them the UNets that are timed are built on the first, all else on the second, where the tests run
# while the first one measures; with one, they follow each other. All stays in FOLDER for a second call.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"/{logs,engines,reports,gpu-test-models,ablation,ablation-gain}
out=$(cd "$1" && pwd) python=${PYTHON:-python}
model=$out/gpu-test-models/sd1-random
last=$(($(nvidia-smi -L | wc -l) - 1))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_GPU_TEST_ENGINE_DIR=$out/engines SDTRT_ENGINE_DIR=$out/engines
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # else each of the exports side by side starts a thread a core
layers=$("$python" -c "from sdtrt.tracing import WIDE_LAYERS; print(WIDE_LAYERS)" 2>/dev/null)
declare -A jobs
failed=()

start() { # GPU NAME COMMAND...: run it beside what else runs
    local gpu=$1 name=$2
    shift 2
    CUDA_VISIBLE_DEVICES=$gpu "$@" >"$out/logs/$name.log" 2>&1 &
    jobs[$name]=$!
    echo "$(date +%T) start: $name on GPU $gpu"
}

finish() { # NAME...: wait for them
    local name
    for name in "$@"; do
        [ -n "${jobs[$name]:-}" ] || continue
        if wait "${jobs[$name]}"; then echo "$(date +%T) done: $name"; else
            echo "$(date +%T) FAILED: $name, see $out/logs/$name.log"
            failed+=("$name")
        fi
        unset "jobs[$name]"
    done
}

measure() { # NAME COMMAND...: run it alone on the first GPU
    start 0 "$@"
    finish "$1"
}

large() { # WIDTH COMPONENT...: build engines of the large model, 512 pixels high
    local width=$1
    shift
    "$python" -m sdtrt build --model "$model" --backend tensorrt --batch 2 --height 512 --width "$width" \
        $(printf -- '--component %s ' "$@")
}

default_engine() { # the ablation's row of the default is the engine that is there already
    "$python" - "$(grep -h '^/.*/unet-tensorrt-' "$out/logs/unet-512.log" | tail -n 1)" "$out/ablation/$layers" <<'PYTHON'
import json, pathlib, sys
entry, variant = map(pathlib.Path, sys.argv[1:])
info = json.loads((entry / "entry.json").read_text())["info"]
variant.mkdir(exist_ok=True)
plan = variant / "engine.plan"
plan.unlink(missing_ok=True)
plan.symlink_to(entry / "engine.plan")
(variant / "build.json").write_text(json.dumps(info))
PYTHON
}

ablation() { # FOLDER MODEL OPTION...
    local folder=$1 of=$2
    shift 2
    "$python" benchmarks/fidelity.py layers --model "$of" --folder "$out/$folder" "$@"
}

gain() { # a second model, and its engines with no fp32 convolutions and with the default's
    [ -e "$model-gain" ] || "$python" scripts/make_random_model.py "$model-gain" --residual-gain 16 || return
    ablation ablation-gain "$model-gain" --variants 0 "$layers" --build-only --output "$out/reports/none"
}

start "$last" test-dynamic "$python" tests/gpu/gpu_engines.py --one dynamic
if [ ! -e "$model" ]; then
    start 0 model "$python" scripts/make_random_model.py "$model"
    finish model
fi
start 0 unet-512 large 512 unet
start 0 unet-768 large 768 unet
start 0 ablation-build ablation ablation "$model" --variants 0 --build-only --output "$out/reports/none"
start "$last" parts-512 large 512 text_encoder vae_decoder vae_encoder
start "$last" parts-768 large 768 vae_decoder vae_encoder
start "$last" gain-build gain
start "$last" test-fp32 "$python" tests/gpu/gpu_engines.py --one fp32
start "$last" tiny "$python" -m sdtrt build --model tiny --backend tensorrt --optimization-level 0 --batch 2 \
    --component text_encoder --component vae_decoder --component vae_encoder
finish test-dynamic test-fp32 tiny unet-512 unet-768 parts-512 parts-768 ablation-build gain-build

[ "$last" -eq 0 ] || start "$last" tests "$python" -m pytest -m gpu tests -q -rs --durations=10
measure founding "$python" benchmarks/founding.py --model "$model" --output "$out/reports/founding.json"
measure default-engine default_engine
measure ablation ablation ablation "$model" --variants 0 "$layers" --output "$out/reports/layers.json"
measure ablation-gain ablation ablation-gain "$model-gain" --variants 0 "$layers" --output "$out/reports/layers-gain.json"
measure startup "$python" benchmarks/startup.py --model "$model" --backend tensorrt --height 512 --width 512 \
    --output "$out/reports/startup.json"
measure bench "$python" -m sdtrt bench --model "$model" --backend tensorrt --task txt2img --height 512 --width 512 \
    --no-build --overwrite --repeats 3 --output "$out/reports"
measure test-large env SDTRT_GPU_TEST_LARGE=1 "$python" -m pytest -m gpu tests/gpu -q -s -k large_unet
measure verify "$python" -m sdtrt verify --backend tensorrt --no-build --output "$out/reports" --json
[ "$last" -ne 0 ] || start 0 tests "$python" -m pytest -m gpu tests -q -rs --durations=10
finish tests
measure tuning "$python" benchmarks/tuning.py --folder "$out/tuning" --output "$out/reports/tuning.json" \
    --variants product padded-heads linear-projections native-norms
measure tuning-level-3 timeout 1500 "$python" benchmarks/tuning.py --folder "$out/tuning" --variants level-3 \
    --output "$out/reports/tuning-level-3.json"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
