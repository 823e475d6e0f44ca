#!/bin/sh
# Downloads the speech synthesisers for training/speech.py to training/build/tts (about 20 MB), which can be copied to
# a machine without network: flite from Debian with its libraries, eSpeak NG from PyPI with its English, French and
# German data.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$here/build/tts
python=${PYTHON:-python3}
libraries=/usr/lib/$(uname -m)-linux-gnu
test -e "$libraries/libflite.so.1" || { echo "flite is missing: apt-get install libflite1" >&2; exit 1; }
rm -rf "$out" && mkdir -p "$out/lib" "$out/wheel"
for name in flite flite_usenglish flite_cmulex flite_cmu_us_slt flite_cmu_us_rms flite_cmu_us_awb flite_cmu_us_kal16; do
    cp -L "$libraries/lib$name.so.1" "$out/lib/"
done
cp -L "$libraries/libasound.so.2" "$out/lib/"
"$python" -m pip download --quiet --no-deps --dest "$out/wheel" espeakng-loader==0.2.4
"$python" -m zipfile -e "$out"/wheel/*.whl "$out"
rm -rf "$out/wheel" "$out"/*.dist-info "$out"/espeakng_loader/libespeak-ng.so "$out"/espeakng_loader/libespeak-ng.so.1.*
data=$out/espeakng_loader/espeak-ng-data
find "$data" -maxdepth 1 -name '*_dict' ! -name 'en_dict' ! -name 'de_dict' ! -name 'fr_dict' -delete
find "$data/lang" -type f ! -path '*/gmw/en*' ! -path '*/gmw/de' ! -path '*/roa/fr*' -delete
du -sh "$out"
