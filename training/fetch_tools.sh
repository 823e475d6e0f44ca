#!/bin/sh
# Puts the synthesisers that training/speech.py runs below training/build/tts (about 24 MB), to travel to a machine
# without packages or network: flite from Debian with its libraries, eSpeak NG from PyPI with its English data.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$here/build/tts
python=${PYTHON:-python3}
command -v flite >/dev/null || { echo "flite is missing: apt-get install flite" >&2; exit 1; }
rm -rf "$out" && mkdir -p "$out/lib" "$out/wheel"
cp "$(command -v flite)" "$out/flite"
ldd "$out/flite" | awk '$3 ~ /flite|asound/ {print $3}' | while read -r library; do
    cp -L "$library" "$out/lib/"
done
"$python" -m pip download --quiet --no-deps --dest "$out/wheel" espeakng-loader==0.2.4
"$python" -m zipfile -e "$out"/wheel/*.whl "$out"
rm -rf "$out/wheel" "$out"/*.dist-info "$out"/espeakng_loader/libespeak-ng.so "$out"/espeakng_loader/libespeak-ng.so.1.*
data=$out/espeakng_loader/espeak-ng-data
find "$data" -maxdepth 1 -name '*_dict' ! -name 'en_dict' -delete
find "$data/lang" -type f ! -path '*/gmw/en*' -delete
du -sh "$out"
