#!/usr/bin/env bash
# What features cost on a GPU, with Inductor's engines and random weights: LoRA, ControlNet, IP-Adapter, few steps, refiner
# and second pass, guidance in a part of the steps. Each script runs twice: all side by side first, which builds the engines, and whose figures are thrown
# away; then one after the other.
#
#     PYTHON=python bash benchmarks/features_on_gpu.sh FOLDER [lora controlnet ip-adapter few-steps stages interval]
#
# Models, engines, reports and logs go to FOLDER. To try it elsewhere: SMALL=1, with the built-in model.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [NAME...]" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1"/{models,logs}
out=$(cd "$1" && pwd) python=${PYTHON:-python} failed=0
shift
names=("${@:-lora}")
[ $# -gt 0 ] || names=(lora controlnet ip-adapter few-steps stages interval)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
model=$out/models/sd15 size=(--height 512 --width 512) few=()
[ -z "${SMALL:-}" ] || { model=tiny size=(--height 64 --width 64 --steps 2 --repeats 1) few=(--small); }
[ "$model" = tiny ] || [ -e "$model" ] || "$python" scripts/make_random_model.py "$model" >"$out/logs/model.log" 2>&1

run() { # NAME OUTPUT
    case $1 in
    lora) "$python" benchmarks/lora_change.py --model "$model" "${size[@]}" --folder "$out" --output "$2" ;;
    controlnet) "$python" benchmarks/controlnet_step.py --model "$model" "${size[@]}" --folder "$out" --output "$2" ;;
    ip-adapter)
        "$python" benchmarks/ip_adapter_step.py --model "$model" "${size[@]}" --rows none one --folder "$out" --output "$2"
        ;;
    few-steps) "$python" benchmarks/few_steps.py "${few[@]}" --folder "$out" --output "$2" ;;
    stages)
        "$python" benchmarks/stages.py --model "$model" --size "${size[1]}" --engine-dir "$out/engines" --output "$2"
        ;;
    interval)
        interval=(--model "$model" --backend inductor --guidance-interval 0.1:0.7 --engine-dir "$out/engines")
        "$python" -m sdtrt verify "${interval[@]}" "${size[@]:0:4}" --timesteps 6 --output "$out/pictures" &&
            "$python" -m sdtrt bench "${interval[@]}" "${size[@]}" --task txt2img --baselines none --json >"$2"
        ;;
    *) echo "there is no $1" >&2 && return 2 ;;
    esac
}

for name in "${names[@]}"; do run "$name" "$out/$name-first.json" >"$out/logs/$name-first.log" 2>&1 & done
wait
for name in "${names[@]}"; do
    begin=$SECONDS
    if run "$name" "$out/$name.json" >"$out/logs/$name.log" 2>&1; then how=done; else how=FAILED failed=1; fi
    echo "$(date +%T) $how: $name, $((SECONDS - begin)) s, see $out/logs/$name.log"
done
exit "$failed"
