#!/usr/bin/env bash
# Installs the kit that it lies in, offline: bash setup.sh [DIR]   (default: /tmp/babyllama)
#
# DIR/code is the checkout, with an environment beside it (DIR/code/.venv) that sees all packages of
# the machine's own Python; DIR/data the corpus; DIR/runs the store, with the job's tokenizer and
# tokens in it. Afterwards:   source DIR/env.sh
#
# PYTHON names the machine's Python (default: python3). Nothing is compiled, nothing is downloaded.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:-/tmp/babyllama}
python=${PYTHON:-python3}

if ! (cd "$here" && sha256sum --quiet --check SHA256SUMS); then
  echo "error: $here: got files that differ from SHA256SUMS, expected the kit as it was made" >&2
  exit 2
fi
if [ -e "$target" ]; then
  echo "error: $target: got a folder that is there, expected a new one: bash setup.sh DIR" >&2
  exit 2
fi
mkdir -p "$target"
target=$(cd "$target" && pwd)

"$python" - "$here" "$target" <<'END'
import sys
import tarfile
from pathlib import Path

here, target = map(Path, sys.argv[1:])
for name, place in (("code", "code"), ("text", "data"), ("store", "runs/store")):
    with tarfile.open(here / f"{name}.tar.xz") as archive:
        archive.extractall(target / place, filter="data")
END

# The machine's Python may be an environment itself, which --system-site-packages would not see.
environment=$target/code/.venv
"$python" -m venv --without-pip "$environment"
"$python" - "$environment/bin/python" "$target/code" <<'END'
import subprocess
import sys
import sysconfig
from pathlib import Path

python, code = sys.argv[1:]
ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
theirs = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
lines = [code, *(f"import site; site.addsitedir({each!r})" for each in theirs)]
Path(site.strip(), "machine.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
END

shopt -s nullglob
wheels=("$here"/wheels/*.whl)
if [ "${#wheels[@]}" -gt 0 ]; then
  "$python" -m pip --disable-pip-version-check --python "$environment/bin/python" install --quiet \
    --no-index --no-deps --no-compile --no-cache-dir --ignore-installed "${wheels[@]}"
fi
touch "$environment/.ready" # `make` finds its environment made

# Without git the checkout cannot say which commit it is, and reports name it.
revision=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["commit"])' \
  "$here/kit.json")

cat >"$target/env.sh" <<END
command -v git >/dev/null || export BABYLLAMA_DS_REVISION='$revision'
export BABYLM_DATA='$target/data'
export RUNS='$target/runs'
export HF_HUB_OFFLINE=1
export PATH='$environment/bin':"\$PATH"
cd '$target/code'
END
"$environment/bin/python" -c 'import babyllama_ds, torch
print(f"babyllama_ds {babyllama_ds.__version__} beside torch {torch.__version__}")'
echo "installed; now: source $target/env.sh && python tests/gpu/proof.py --out DIR"
