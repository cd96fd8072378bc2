#!/usr/bin/env bash
# Writes what the image installs, every file of it by SHA-256, in four parts (`make lock`):
#   runtime.lock  what this package needs at run time, in either form of the image, but for torch
#   cuda.lock     torch built for CUDA, with the libraries that it brings
#   flash.lock    FlashAttention, which is built against that torch
#   build.lock    what builds packages that come as source, and what torch needs to be imported there
# Versions are those of constraints.txt; what it does not name, since no CPU has it, is resolved.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}

compile() { # OUTPUT OPTION...
  local output=$1
  shift
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
    --custom-compile-command 'make lock' --constraints constraints.txt --output-file "$output" "$@"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What torch brings for CUDA: the same names are left out of one file and kept in the other.
compile "$work/all.lock" pyproject.toml
mapfile -t cuda < <(grep -oE '^(torch|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+)=' "$work/all.lock" | tr -d =)
compile docker/runtime.lock pyproject.toml "${cuda[@]/#/--no-emit-package=}"

# DeepSpeed asks for nvidia-ml-py where it is built for CUDA.
pins() { for name in "${cuda[@]}"; do grep -E "^$name==" "$work/all.lock" | sed -E 's/ *\\$//'; done; }
{ pins; echo nvidia-ml-py; } >"$work/cuda.in"
compile docker/cuda.lock --no-deps "$work/cuda.in"

# Its requirements (torch, einops) stand in the others; it cannot be asked for them without torch.
echo 'flash-attn>=2.8' >"$work/flash.in"
compile docker/flash.lock --no-deps "$work/flash.in"

printf '%s\n' 'setuptools>=77' wheel ninja psutil torch >"$work/build.in"
compile docker/build.lock "${cuda[@]/#/--no-emit-package=}" "$work/build.in"
