#!/usr/bin/env bash
# The Inductor backend's figures beside their baselines, a stage at a time: engines are built side by side first, and
# nothing is built while anything is timed.
#
#     bash benchmarks/inductor_on_gpu.sh FOLDER models build-sd15 bench-sd15 packages-sd15
#     bash benchmarks/inductor_on_gpu.sh FOLDER build-sdxl bench-sdxl bench-sdxl-30 batches-sdxl packages-sdxl batches-sd15
#
# Models go to FOLDER/models, engines to FOLDER/engines (packages are small: carry that folder to the next sitting),
# reports to FOLDER/reports, logs to FOLDER/logs. Models have random weights. The reports' names are those that
# docs/speed.md has its tables from: copy them to benchmarks/, and run scripts/doc_tables.py.
# To try it elsewhere: SD15=tiny SDXL=tiny SDXL_PARTS= SIDE15=64 WIDE15=96 SIDEXL=64 STEPS=2 BATCHES=1,2 BASELINES=none CHANGES=4.
set -uo pipefail
[ $# -ge 2 ] || { echo "usage: $0 FOLDER STAGE..." >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"/{models,engines,reports,logs}
out=$(cd "$1" && pwd) python=${PYTHON:-python}
shift
sd15=${SD15:-$out/models/sd15} sdxl=${SDXL:-$out/models/sdxl}
side15=${SIDE15:-512} wide15=${WIDE15:-768} sidexl=${SIDEXL:-1024}
batches=${BATCHES:-1,4,8,16} batches_xl=${BATCHES_XL:-$batches} at_once=${AT_ONCE:-4}
changes=${CHANGES:-200} strong=${BASELINES:-torch-graph,torch-compile} compiled=${BASELINES:-torch-compile}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_ENGINE_DIR=$out/engines
failed=()

run() { # NAME COMMAND...: run it alone, and say how it went
    local name=$1 begin=$SECONDS
    shift
    "$@" >"$out/logs/$name.log" 2>&1 && echo "$(date +%T) done: $name, $((SECONDS - begin)) s" && return
    echo "$(date +%T) FAILED: $name, see $out/logs/$name.log"
    failed+=("$name")
}

build() { # NAME MODEL OPTION...: build engines beside others, when fewer than AT_ONCE are being built
    local name=$1 model=$2
    shift 2
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
    echo "$(date +%T) start: $name"
    { "$python" -m sdtrt build --model "$model" --backend inductor "$@" >"$out/logs/$name.log" 2>&1 ||
        { echo "$(date +%T) FAILED: $name, see $out/logs/$name.log"; touch "$out/logs/$name.failed"; }; } &
}

built() { # wait for all that is being built
    wait
    local mark
    for mark in "$out"/logs/*.failed; do
        [ -e "$mark" ] || continue
        failed+=("$(basename "$mark" .failed)")
        rm "$mark"
    done
}

parts="--component text_encoder --component vae_decoder"

fixed() { # NAME MODEL SIDE BATCHES OPTION...: the engines of a picture, or of several at once; UNets take longest
    local name=$1 model=$2 side=$3 batches=${4//,/ } images size
    size="--height $side --width $side"
    for images in $batches; do build "build-$name-$images" "$model" --batch $((2 * images)) $size --component unet; done
    for images in $batches; do
        build "build-$name-$images-parts" "$model" --batch $((2 * images)) $size $parts "${@:5}"
    done
}

anonymous() { # a report without the machine's own paths
    sed -e "s#$out#FOLDER#g"
}

bench() { # NAME MODEL STEPS BASELINES OPTION...
    run "$1" "$python" -m sdtrt bench --model "$2" --backend inductor --steps "${STEPS:-$3}" --baselines "$4" --no-build \
        --overwrite --output "$out/reports/$1" "${@:5}"
    [ ! -e "$out/reports/$1/bench.json" ] || anonymous <"$out/reports/$1/bench.json" >"$out/reports/$1-h200.json"
}

packages() { # NAME MODEL SIDE BATCHES OPTION...
    run "$1" "$python" benchmarks/packages.py --model "$2" --height "$3" --width "$3" --batches "$4" \
        --engine-dir "$out/engines" --changes "$changes" --output "$out/reports/$1.json" "${@:5}"
    [ ! -e "$out/reports/$1.json" ] || anonymous <"$out/reports/$1.json" >"$out/reports/$1-h200.json"
}

stage() {
    case $1 in
    models)
        [ -e "$sd15" ] || run model-sd15 "$python" scripts/make_random_model.py "$sd15"
        [ -e "$sdxl" ] || run model-sdxl "$python" scripts/make_random_model.py "$sdxl" --architecture sdxl
        ;;
    build-sd15)
        fixed sd15 "$sd15" "$side15" "$batches"
        build build-sd15-wide "$sd15" --batch 2 --height "$side15" --width "$wide15" --component unet
        build build-sd15-wide-parts "$sd15" --batch 2 --height "$side15" --width "$wide15" $parts --component vae_encoder
        build build-sd15-batch "$sd15" --batch 2:2:8 --height "$side15" --width "$side15" --component unet
        build build-sd15-sizes "$sd15" --batch 2 --height "$side15:$side15:$wide15" \
            --width "$side15:$side15:$wide15" --component unet
        built
        ;;
    build-sdxl)
        fixed sdxl "$sdxl" "$sidexl" "$batches_xl" ${SDXL_PARTS---component text_encoder_2}
        built
        ;;
    bench-sd15)
        bench bench-inductor "$sd15" 50 "$strong" --task txt2img --height "$side15" --width "$side15"
        bench bench-inductor-img2img "$sd15" 50 "$strong" --task img2img --height "$side15" --width "$wide15"
        ;;
    batches-sd15)
        bench bench-batches "$sd15" 50 "$compiled" --task txt2img --height "$side15" --width "$side15" \
            --batch-size "$batches" --repeats 3
        ;;
    bench-sdxl)
        bench bench-sdxl "$sdxl" 50 "$strong" --task txt2img --height "$sidexl" --width "$sidexl"
        ;;
    bench-sdxl-30)
        bench bench-sdxl-30 "$sdxl" 30 "$compiled" --task txt2img --height "$sidexl" --width "$sidexl"
        ;;
    batches-sdxl)
        bench bench-sdxl-batches "$sdxl" 20 "$compiled" --task txt2img --height "$sidexl" --width "$sidexl" \
            --batch-size "$batches_xl" --repeats 3
        ;;
    packages-sd15)
        packages packages-sd15 "$sd15" "$side15" "$batches" --profile batch=2:2:8 --profile "width=$wide15" \
            --profile "height=$side15:$side15:$wide15,width=$side15:$side15:$wide15"
        ;;
    packages-sdxl) packages packages-sdxl "$sdxl" "$sidexl" "$batches_xl" ;;
    *)
        echo "there is no stage $1" >&2
        exit 2
        ;;
    esac
}

for name in "$@"; do stage "$name"; done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
