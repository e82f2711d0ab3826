#!/usr/bin/env bash
# All that only a GPU can show, in one go: engines built side by side, the founding table, the ablation of the fp16
# recipe, `sdtrt bench`, `sdtrt verify`, start-up, `pytest -m gpu`. (`tuning.py` is apart.)
# Reports go to FOLDER/reports, logs to FOLDER/logs.
#
#     PYTHON=python bash benchmarks/on_gpu.sh FOLDER
#
# The model has Stable Diffusion 1.5's architecture and random weights, with activations as large as trained ones.
# Builds take most of the time, a processor core or two each, and spoil each other's timings where many share a GPU.
# Nothing is timed while anything is built or tested on the same GPU, neither PyTorch nor the start-up while anything is
# on that host, and nothing is built where the tests run, which fill a GPU's memory. With two GPUs the first one builds, at
# first only what is timed at 512x512; the last one builds the tests' engines, tests, and measures what the host does not
# limit; then all that is left. With one, all follows in turn. All stays in FOLDER for a second call.
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"/{logs,engines,reports,gpu-test-models,ablation}
out=$(cd "$1" && pwd) python=${PYTHON:-python}
model=$out/gpu-test-models/sd1-random
last=$(($(nvidia-smi -L | wc -l) - 1))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_GPU_TEST_ENGINE_DIR=$out/engines SDTRT_ENGINE_DIR=$out/engines
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # else each of the exports side by side starts a thread a core
# Where libraries were unpacked without .pyc files, each of the many processes would compile them all.
echo "PYTHONDONTWRITEBYTECODE: ${PYTHONDONTWRITEBYTECODE-not set}"
unset PYTHONDONTWRITEBYTECODE
layers=$("$python" -c "from sdtrt.exports.fp16_recipe import WIDE_LAYERS; print(WIDE_LAYERS)" 2>/dev/null)
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

measure() { # NAME COMMAND...: run it alone on the last GPU
    start "$last" "$@"
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
for plan in entry.glob("engine.plan*"):
    (variant / plan.name).unlink(missing_ok=True)
    (variant / plan.name).symlink_to(plan)
(variant / "build.json").write_text(json.dumps(info))
PYTHON
}

ablation() { # OPTION...
    "$python" benchmarks/fidelity.py layers --model "$model" --folder "$out/ablation" "$@"
}

tests() { # OPTION...
    "$python" -m pytest -m gpu -q -rsP --durations=10 "$@"
}

bench() { # FOLDER TASK WIDTH BASELINES
    "$python" -m sdtrt bench --model "$model" --backend tensorrt --task "$2" --height 512 --width "$3" --baselines "$4" \
        --no-build --overwrite --repeats 3 --output "$out/reports/$1"
}

builders="tests/gpu/test_gpu_norm_cut.py tests/gpu/test_gpu_group_norm.py tests/reports/test_bench.py"
start "$last" test-dynamic "$python" tests/gpu/gpu_engines.py --one dynamic
start "$last" test-fp32 "$python" tests/gpu/gpu_engines.py --one fp32
start "$last" test-split "$python" tests/gpu/gpu_engines.py --one split
start "$last" tiny "$python" -m sdtrt build --model tiny --backend tensorrt --optimization-level 0 --batch 2 \
    --component text_encoder --component vae_decoder --component vae_encoder
if [ ! -e "$model" ]; then
    start 0 model "$python" scripts/make_random_model.py "$model" --residual-gain 16
    finish model
fi
start 0 unet-512 large 512 unet
start 0 parts-512 large 512 text_encoder vae_decoder vae_encoder
finish test-dynamic test-fp32 test-split tiny
[ "$last" -eq 0 ] || start "$last" tests tests tests $(printf -- '--ignore %s ' $builders)
finish unet-512 parts-512
start 0 unet-768 large 768 unet
start 0 parts-768 large 768 vae_decoder vae_encoder
start 0 ablation-build ablation --variants $((layers - 1)) --build-only --output "$out/reports/none"
[ "$last" -ne 0 ] || finish unet-768 parts-768 ablation-build
[ "$last" -ne 0 ] || start 0 tests tests tests $(printf -- '--ignore %s ' $builders)
finish tests

measure verify "$python" -m sdtrt verify --backend tensorrt --no-build --output "$out/reports" --json
measure attention "$python" benchmarks/attention.py --output "$out/reports/attention.json"
SDTRT_GPU_TEST_LARGE=1 measure tests-large tests tests/gpu/test_gpu_tensorrt.py -k large
finish unet-768 parts-768 ablation-build
measure bench bench txt2img txt2img 512 torch-fp32,torch-tf32,torch-fp16,torch-graph
measure bench-img2img bench img2img img2img 768 torch-fp32,torch-fp16,torch-graph
measure bench-compile bench compile txt2img 512 torch-fp32,torch-compile
measure bench-onnxruntime bench ort txt2img 512 torch-graph,onnxruntime-cuda # a row with the reason where it is the CPU's
measure founding "$python" benchmarks/founding.py --model "$model" --output "$out/reports/founding.json"
measure startup "$python" benchmarks/startup.py --model "$model" --backend tensorrt --height 512 --width 512 --repeats 3 \
    --output "$out/reports/startup.json"
"$python" -m sdtrt engines list --json >"$out/reports/engines.json" 2>"$out/logs/engines.log" || failed+=(engines)
start 0 tests-that-build tests $builders
[ "$last" -ne 0 ] || finish tests-that-build
measure default-engine default_engine
measure ablation ablation --variants $((layers - 1)) "$layers" --output "$out/reports/layers.json"
finish tests-that-build

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
