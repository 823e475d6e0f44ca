#!/bin/sh
# One training session on every GPU of a machine without network:
#     training/session.sh OUT RESUME SECONDS STAGE=MINUTES...
# OUT gets at most eight files: the state, its log and pictures. They are also there when SECONDS are over before
# the stages are. PACKED, a folder, may hold what the machine lacks: wheels, tts.tar.xz (`training/build/tts`) and
# the .npz files of `training/record.py`.
set -eu
out=$1 resume=$2 seconds=$3
shift 3
python=${PYTHON:-python3}
state=training/build/state
mkdir -p "$out" training/build
if [ -n "${PACKED:-}" ]; then
    site=$PWD/training/build/site
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$PACKED"/*.whl
    [ -d training/build/tts ] || tar -xJf "$PACKED/tts.tar.xz" -C training/build
    for file in "$PACKED"/*.npz; do [ ! -e "$file" ] || cp "$file" training/build/; done
    PYTHONPATH=$site:${PYTHONPATH:-}
fi
export PYTHONPATH="src:.:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export TORCHINDUCTOR_CACHE_DIR="$PWD/training/build/inductor"
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
launch="-m training.run"
[ "$gpus" -lt 2 ] || launch="-m torch.distributed.run --standalone --nproc_per_node=$gpus $launch"
ended=0
timeout -k 5 "$seconds" "$python" $launch --stages "$@" ${CONFIG:+--config "$CONFIG"} --resume "$resume" --out "$state" \
    > "$out/log.txt" 2>&1 || ended=$?
cp "$state"/pocket-*.safetensors "$state"/state.json "$out/"
for file in "$state"/curves.png "$state"/sheet_*.jpg; do [ ! -e "$file" ] || cp "$file" "$out/"; done
grep -v "Loading weights" "$out/log.txt" | tail -n 60
exit "$ended"
