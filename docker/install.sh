#!/usr/bin/env bash
# The steps of the image's build stage, in their order: `install.sh torch|flash|packages|babyllama_ds`.
# Enters: the locks, $FORM and the architectures. Leaves: packages in the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -f /etc/ssl/ca.pem ]; then
  export PIP_CERT=/etc/ssl/ca.pem
fi

locked() {
  pip install --no-deps --no-build-isolation --require-hashes -r "docker/$1.lock"
}

build_for_cuda() {
  # There is no GPU while an image is built, from which DeepSpeed would otherwise know.
  export DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1
  # Never a wheel that was built elsewhere, for which it would look first.
  export FLASH_ATTENTION_FORCE_BUILD=TRUE
  # One architecture after another in each compiler, so that MAX_JOBS counts all that run at a time:
  # by itself it takes four threads, and the memory of as many.
  export NVCC_THREADS=1
  # torch's headers are C++20; FlashAttention asks its compilers for C++17.
  export CXX="$PWD/docker/c++.sh" NVCC_APPEND_FLAGS=-std=c++20
}

if [ "$FORM" = cuda ]; then
  build_for_cuda
fi

case $1,$FORM in
  torch,cuda)
    locked build
    locked cuda
    ;;
  torch,cpu)
    locked build
    # Its files differ by platform, so the version alone is pinned. The words are pip's options.
    # shellcheck disable=SC2086
    pip install --no-deps $TORCH_FROM "$(grep '^torch==' constraints.txt)"
    ;;
  flash,cuda)
    if [ "$FLASH_ATTN_CUDA_ARCHS" = none ]; then
      echo 'FlashAttention is left out'
    elif [[ $FLASH_ATTN_CUDA_ARCHS =~ ^[0-9]+(;[0-9]+)*$ ]]; then
      locked flash
    else
      echo "FLASH_ATTN_CUDA_ARCHS: got '$FLASH_ATTN_CUDA_ARCHS', expected 80;90;100, some of them, or none" >&2
      exit 2
    fi
    ;;
  flash,cpu) echo 'FlashAttention is for CUDA: not in this form' ;;
  packages,*) locked runtime ;;
  babyllama_ds,*)
    pip install --no-deps --no-build-isolation .
    pip check
    ;;
  *)
    echo "install.sh: got $1 for $FORM, expected torch, flash, packages or babyllama_ds for cuda or cpu" >&2
    exit 2
    ;;
esac
