#!/usr/bin/env bash
# What the image starts. A job, with its overrides and options, is given to the `deepspeed` launcher:
# one rank a GPU, two CPU ranks where there is none. A command of `babyllama-ds` (check, plan,
# doctor, ...) is done by it. NPROC: how many ranks; RUNS: where runs lie; MASTER_PORT: where ranks
# meet.
#
#   entrypoint.sh JOB [KEY=VALUE ...]      entrypoint.sh COMMAND ...
set -euo pipefail
launcher=$(cd "$(dirname "$0")/.." && pwd)/launcher/run.py
runs=${RUNS:-runs}

fail() { # WHERE GOT EXPECTED HINT
  printf 'error: %s: got %s, expected %s\n    hint: %s\n' "$@" >&2
  exit 2
}

commands() {
  python -c 'from babyllama_ds.cli.parser import command_line; print(*command_line().commands)'
}

check_runs() {
  local reason
  mkdir -p "$runs" 2>/dev/null || true
  if ! reason=$({ : >"$runs/.writable-$$"; } 2>&1); then
    fail "$runs" "${reason##*: }, for user $(id -u) and group $(id -g)" "a folder that can be written" \
      "mount a folder of that user there (-v \"\$PWD/runs:/runs\" --user \"\$(id -u):\$(id -g)\"), without :ro"
  fi
  rm -f "$runs/.writable-$$"
}

count_gpus() {
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

# The launcher dies of a SIGTERM at once and leaves its ranks to themselves. Here that would be the
# end of all of them: so they are waited for while they notice it and checkpoint. They are not told
# themselves: nor is the process between, which would kill those that take more than 30 s.
launch() {
  set -m # a process group of its own
  deepspeed "$@" &
  local group=$! status=0
  trap 'kill -TERM "$group" 2>/dev/null' TERM INT
  wait "$group" || status=$?
  while kill -0 -- "-$group" 2>/dev/null; do
    sleep 0.2 || true
  done
  exit "$status"
}

if [ "${1:-}" = babyllama-ds ]; then
  shift
fi
case ${1:-} in
  '' | -*) exec babyllama-ds "${@:---help}" ;;
esac
if [[ " $(commands) " == *" $1 "* ]]; then
  exec babyllama-ds "$@"
fi

if [[ " $* " != *" --check "* && " $* " != *" --runs"* ]]; then
  check_runs
fi
gpus=$(count_gpus)
ranks=${NPROC:-$gpus}
if [ "$gpus" -eq 0 ]; then
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  ranks=${NPROC:-2}
  if [ "${BABYLLAMA_DS_FORM:-}" = cuda ]; then
    echo "no GPU in this container (docker run --gpus all): $ranks CPU ranks" >&2
  fi
fi
# On the host's network another run may have the launcher's port.
port=(${MASTER_PORT:+--master_port "$MASTER_PORT"})
launch --quiet --num_gpus "$ranks" "${port[@]}" "$launcher" --runs "$runs" "$@"
