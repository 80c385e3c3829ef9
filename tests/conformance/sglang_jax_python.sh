#!/bin/sh
# An interpreter for serve.engine_python: sglang-jax's environment, whose `-m gpt_oss_sglang_jax` runs on a CPU.
here=$(dirname "$0")
python="${CONFORMANCE_VENVS:-$here/../../.venv-conformance}/sglang_server/bin/python"
if [ "$1" = -m ]; then
  shift 2
  exec "$python" "$here/sglang_jax_cpu.py" "$@"
fi
exec "$python" "$@"
