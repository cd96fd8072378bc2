#!/usr/bin/env bash
# `make docker-test`: builds the CPU form of the image, runs the nursery in it and reads its student
# outside. With Docker where its daemon answers, else with buildah (root, no daemon) on a Debian
# that debootstrap makes and build/docker/ keeps.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
suite=bookworm
most_bytes=2500000000
most_seconds=1200
kept=build/docker
work=$(mktemp -d "${TMPDIR:-/tmp}/babyllama-docker-test.XXXXXX")
mkdir -p "$kept" "$work/wheels" "$work/runs"
chmod 1777 "$work/runs" # the image's user is not the one who mounts
container=
image=babyllama_ds:test-$$

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
  engine=docker
elif command -v buildah >/dev/null && command -v debootstrap >/dev/null && [ "$(id -u)" -eq 0 ]; then
  engine=buildah
else
  echo "docker-test: got no Docker daemon, expected one, or root with buildah and debootstrap" >&2
  exit 2
fi

# With the driver that it takes by itself (overlay); STORAGE_DRIVER=vfs works everywhere, slowly.
buildah_() {
  buildah ${STORAGE_DRIVER:+--storage-driver "$STORAGE_DRIVER"} \
    --root "$work/storage" --runroot "$work/run" "$@"
}

clean_up() {
  if [ "$engine" = docker ]; then
    docker image rm --force "$image" >/dev/null 2>&1 || true
    # Files there belong to the image's user.
    docker run --rm --user 0 --entrypoint rm --volume "$work:/work" debian:$suite-slim -rf /work/runs || true
  else
    buildah_ rm --all >/dev/null 2>&1 || true
    buildah_ rmi --all --force >/dev/null 2>&1 || true
  fi
  rm -rf "$work"
}
trap clean_up EXIT

told() { printf '\n-- %s (%d s)\n' "$1" "$SECONDS"; }

# -- what this machine gives to the build -----------------------------------------------------------

base_of_debian() { # prints the image to build on
  if [ "$engine" = docker ]; then
    echo "debian:$suite-slim"
    return
  fi
  if [ ! -f "$kept/$suite.tar" ]; then
    debootstrap --variant=minbase "$suite" "$work/debian" >"$kept/debootstrap.log"
    rm -rf "$work"/debian/var/{cache/apt/archives,lib/apt/lists,log}/*
    tar --create --file "$work/debian.tar" --directory "$work/debian" --exclude='./dev/*' .
    mv "$work/debian.tar" "$kept/$suite.tar"
    rm -rf "$work/debian"
  fi
  local scratch
  scratch=$(buildah_ from scratch)
  buildah_ add --quiet "$scratch" "$kept/$suite.tar" / >/dev/null
  buildah_ commit --quiet --rm "$scratch" debian-base >/dev/null
  echo localhost/debian-base
}

arguments=(
  --file docker/Dockerfile
  --tag "$image"
  --build-arg FORM=cpu
  --build-arg PYTHON=python3.11
  --build-arg VERSION="$("$python" -c 'import babyllama_ds; print(babyllama_ds.__version__)')"
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
  --build-context "wheels=$work/wheels"
)

# A wheel of torch for CPUs that pip here is set up to find needs no other index.
torch=$(sed -n 's/^torch==//p' constraints.txt)
if "$python" -m pip download --quiet --no-deps --python-version 3.11 --only-binary :all: \
  --dest "$work/wheels" "torch==$torch+cpu" >"$work/torch.log" 2>&1; then
  echo "torch: the wheel that pip here finds"
  arguments+=(--build-arg TORCH_FROM="--no-index --find-links /wheels")
else
  echo "torch: from its own index"
fi

# The same index and authority as pip's here.
setting() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }
authority=${PIP_CERT:-$(setting cert)}
index=${PIP_INDEX_URL:-$(setting index-url)}
if [ -n "$authority" ]; then
  arguments+=(--secret "id=ca,src=$authority")
fi
if [ -n "$index" ]; then
  printf '[global]\nindex-url = %s\n' "$index" >"$work/pip.conf"
  arguments+=(--secret "id=pip,src=$work/pip.conf")
fi

# -- build --------------------------------------------------------------------------------------------

told 'base'
base=$(base_of_debian)
arguments+=(--build-arg BASE_DEVEL="$base" --build-arg BASE_RUNTIME="$base")
told 'build'
if [ "$engine" = docker ]; then
  DOCKER_BUILDKIT=1 docker build "${arguments[@]}" .
  size=$(docker image inspect --format '{{.Size}}' "$image")
  run() { docker run --rm --network none --volume "$work/runs:/runs$1" "$image" "${@:2}"; }
else
  # The format of Docker's images has health checks.
  buildah_ build --format docker --isolation chroot --network host --layers=false \
    "${arguments[@]}" . >"$kept/build.log" 2>&1 || { tail -n 40 "$kept/build.log" >&2; exit 1; }
  container=$(buildah_ from --pull-never "$image")
  size=$(du --summarize --block-size=1 "$(buildah_ mount "$container")" | cut -f1)
  entrypoint=$(buildah_ inspect --type image --format '{{index .Docker.Config.Entrypoint 0}}' "$image")
  # Containers of this kind are on the host's network.
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  run() {
    buildah_ run --isolation chroot --volume "$work/runs:/runs$1" "$container" -- \
      env MASTER_PORT="$port" "$entrypoint" "${@:2}"
  }
fi

# -- run ----------------------------------------------------------------------------------------------

told 'run'
run '' doctor --quick --runs /runs
# A shorter nursery; what is tried is the image.
run '' nursery corpus.words=20000 student.training.epochs=4 \
  teachers.0.training.epochs=4 teachers.1.training.epochs=4

told 'a folder that cannot be written'
if run ':ro' nursery 2>"$work/refused.txt"; then
  echo 'docker-test: a folder of runs that cannot be written was not refused' >&2
  exit 1
fi
cat "$work/refused.txt"
grep -q 'error: /runs: got' "$work/refused.txt"

told 'the student, outside'
"$python" - "$work/runs/nursery-1/student" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer("The little dog", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0]))
PYTHON

printf '\nimage: %d MB (at most %d); all: %d s (at most %d)\n' \
  "$((size / 1000000))" "$((most_bytes / 1000000))" "$SECONDS" "$most_seconds"
[ "$size" -le "$most_bytes" ] && [ "$SECONDS" -le "$most_seconds" ]
