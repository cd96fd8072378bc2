#!/bin/sh
# Installs the wheels that lie beside it, with no network: sh install.sh [PYTHON]
#
# PYTHON is the interpreter to install for, of a virtual environment as a rule (default: python3).
# Where torch or more is the machine's own, make that environment with --system-site-packages.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${1:-python3}
wanted=$(sed -n 's/^# python: //p' "$here/requirements.txt")
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != "$wanted" ]; then
  echo "error: $python: got Python $found, expected $wanted, which the wheels are for" >&2
  exit 2
fi
"$python" -m pip install --no-index --find-links "$here" --require-hashes \
  -r "$here/requirements.txt"
echo "installed; to see whether this machine computes rightly: babyllama-ds doctor"
