#!/usr/bin/env bash
# A server at Stable Diffusion 1.5's size: its pictures a second beside sdtrt bench's own of the same batch, and beside a
# server without batches; times, batch sizes and memory under load.
#
#     bash benchmarks/serve_on_gpu.sh FOLDER
#
# A model with random weights goes to FOLDER/sd15, engines of 1, 2, 4 and 8 pictures to FOLDER/engines, reports to
# FOLDER/reports. The last line is the share of bench's pictures a second that the server holds: 0.95 is the goal.
# GPUS=0,1 loads a server on both, too, and says how many times the pictures of one it makes: 1.9 is the goal.
# To try it elsewhere: MODEL=tiny SIDE=64 STEPS=4 BATCH=2 REQUESTS=20 CLIENTS=4 BACKEND=onnxruntime.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
cd "$(dirname "$0")/.."
mkdir -p "$1/reports"
out=$(cd "$1" && pwd) python=${PYTHON:-python} backend=${BACKEND:-inductor}
model=${MODEL:-$out/sd15} side=${SIDE:-512} steps=${STEPS:-50} batch=${BATCH:-8}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} SDTRT_ENGINE_DIR=$out/engines
size="--height $side --width $side"

[ "$model" = tiny ] || [ -e "$model" ] || "$python" scripts/make_random_model.py "$model"
for ((images = 1; images <= batch; images *= 2)); do
    echo "$(date +%T) engines of $images"
    for part in text_encoder unet vae_decoder; do
        "$python" -m sdtrt build --model "$model" --backend "$backend" --batch $((2 * images)) $size --component $part \
            ${PRECISION:+--precision $PRECISION} --quiet >/dev/null
    done
done
echo "$(date +%T) bench"
"$python" -m sdtrt bench --model "$model" --backend "$backend" $size --steps "$steps" --batch-size "$batch" --task txt2img \
    --baselines none --no-build --overwrite --output "$out/reports/bench" --quiet >/dev/null
echo "$(date +%T) load"
"$python" benchmarks/serve_load.py --model "$model" --backend "$backend" --sizes "${side}x$side" --steps "$steps" \
    --requests "${REQUESTS:-400}" --clients "${CLIENTS:-64}" --engine-dir "$out/engines" \
    --output "$out/reports/serve-load.json" >/dev/null
"$python" - "$out/reports" <<'PYTHON'
import json
import sys
from pathlib import Path

reports = Path(sys.argv[1])
(row,) = (one for one in json.loads((reports / "bench" / "bench.json").read_text())["rows"] if one["baseline"] is None)
load = json.loads((reports / "serve-load.json").read_text())
own, served = row["images_per_s"], load["batched"]["pictures_per_s"]
print(f"bench {own:.2f}/s, server {served:.2f}/s in batches of {load['batched']['pictures_per_batch']}: {served / own:.3f}")
PYTHON
[ -n "${GPUS:-}" ] || exit 0
for gpus in "${GPUS%%,*}" "$GPUS"; do
    echo "$(date +%T) load on $gpus"
    "$python" benchmarks/serve_load.py --model "$model" --backend "$backend" --sizes "${side}x$side" --steps "$steps" \
        --requests "${REQUESTS:-400}" --alone 20 --clients "${CLIENTS:-64}" --engine-dir "$out/engines" --gpus "$gpus" \
        --output "$out/reports/serve-load-${gpus//,/-}.json" >/dev/null
done
"$python" - "$out/reports" "${GPUS%%,*}" "${GPUS//,/-}" <<'PYTHON'
import json
import sys
from pathlib import Path

one, all_ = (
    json.loads(Path(sys.argv[1], f"serve-load-{name}.json").read_text())["batched"]["pictures_per_s"]
    for name in sys.argv[2:]
)
print(f"one GPU {one:.2f}/s, all {all_:.2f}/s: {all_ / one:.3f}")
PYTHON
