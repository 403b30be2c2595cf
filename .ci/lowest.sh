#!/usr/bin/env bash
# The lowest versions that pyproject.toml allows, in an environment of their own: what reads files, follows
# grammars and speaks HTTP is tested with them.
set -euo pipefail
cd "$(dirname "$0")/.."
env=$(mktemp -d)
trap 'rm -rf "$env"' EXIT
.venv/bin/python -m venv "$env"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$env/bin/uv" pip install --quiet --python "$env/bin/python" --resolution lowest-direct -r pyproject.toml
"$env/bin/uv" pip install --quiet --python "$env/bin/python" pytest pytest-xdist hypothesis httpx optax jsonschema openai
"$env/bin/uv" pip freeze --python "$env/bin/python" | grep -E '^(jax|flax|orbax|msgspec|starlette|llguidance)' | xargs
PYTHONPATH="$PWD:$PWD/kernels" "$env/bin/python" -m pytest --numprocesses 2 --dist loadfile -p no:warnings \
  tests/checkpoint/test_convert.py tests/checkpoint/test_load.py tests/config/test_reading.py tests/server/test_serve.py \
  tests/server/wire/test_http.py tests/server/watch/test_metrics.py tests/server/template/test_sandbox.py tests/engine/grammar/test_grammar.py
