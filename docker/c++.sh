#!/usr/bin/env bash
# The compiler of the image's kernels: c++, but for what its callers fix in their code.
#   -march=native  DeepSpeed's kernels of the host must run on others than the one that built them:
#                  x86-64-v3 (AVX2) is what every host of the cards named has
#   -std=c++17     torch's headers need C++20
set -euo pipefail
words=("${@/#-march=native/-march=x86-64-v3}")
words=("${words[@]/#-D__AVX512__/-D__AVX256__}")
exec c++ "${words[@]/#-std=c++17/-std=c++20}"
