#!/usr/bin/env bash
# All that only a GPU can show, in one go: engines built side by side, `pytest -m gpu`, the founding table, the ablation of
# the fp16 recipe, `sdtrt verify`, `sdtrt bench`, start-up and tuning. Reports go to FOLDER/reports, logs to FOLDER/logs.
#
#     PYTHON=python bash benchmarks/on_gpu.sh FOLDER
#
# Builds take most of the time, a processor core each: on an H200 with TensorRT 8.6, 6 to 8 minutes for a UNet of
# Stable Diffusion 1.5's size with two others beside it. With two GPUs the UNets that are timed are built on the first,
# all else on the second, and there the tests run while the first one measures. All stays in FOLDER for a second call.
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
        if wait "${jobs[$name]}"; then echo "$(date +%T) done: $name"; else
            echo "$(date +%T) FAILED: $name, see $out/logs/$name.log"
            failed+=("$name")
        fi
    done
}

large() { # WIDTH COMPONENT...: build engines of the large model, 512 pixels high; without the plugin if it fails with it
    local width=$1 command
    shift
    command=("$python" -m sdtrt build --model "$model" --backend tensorrt --batch 2 --height 512 --width "$width")
    command+=($(printf -- '--component %s ' "$@"))
    "${command[@]}" || "${command[@]}" --no-norm-plugins
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
finish test-dynamic test-fp32 tiny
start "$last" tests "$python" -m pytest -m gpu tests -q -rs --durations=10
finish unet-512 unet-768 parts-512 parts-768 ablation-build

start 0 founding "$python" benchmarks/founding.py --model "$model" --output "$out/reports/founding.json"
finish gain-build founding
"$python" - "$(grep -h '^/' "$out/logs/unet-512.log")" "$out/ablation/$layers" <<'PYTHON' # the default's engine is there
import json, pathlib, sys
entry, variant = map(pathlib.Path, sys.argv[1:])
variant.mkdir(exist_ok=True)
if not (variant / "build.json").exists():
    (variant / "engine.plan").symlink_to(entry / "engine.plan")
    (variant / "build.json").write_text(json.dumps(json.loads((entry / "entry.json").read_text())["info"]))
PYTHON
start 0 ablation ablation ablation "$model" --variants 0 "$layers" --output "$out/reports/layers.json"
finish ablation
start 0 ablation-gain ablation ablation-gain "$model-gain" --variants 0 "$layers" --output "$out/reports/layers-gain.json"
finish ablation-gain
start 0 startup "$python" benchmarks/startup.py --model "$model" --backend tensorrt --height 512 --width 512 \
    --output "$out/reports/startup.json"
finish startup
start 0 bench "$python" -m sdtrt bench --model "$model" --backend tensorrt --task txt2img --height 512 --width 512 \
    --no-build --overwrite --repeats 3 --output "$out/reports"
finish tests
start "$last" verify "$python" -m sdtrt verify --backend tensorrt --no-build --output "$out/reports" --json
start "$last" test-large env SDTRT_GPU_TEST_LARGE=1 "$python" -m pytest -m gpu tests/gpu -q -s -k large_unet
finish verify test-large bench
start "$last" tuning "$python" benchmarks/tuning.py --folder "$out/tuning" --output "$out/reports/tuning.json" \
    --variants product padded-heads linear-projections native-norms level-3
finish tuning

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
