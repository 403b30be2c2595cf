#!/usr/bin/env bash
# Sets jmoe up in .venv and runs it on the bundled model: serves it, asks it something, shows the streamed
# answer, what the experts did, and an answer in the form of a JSON schema.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
exec .venv/bin/python scripts/demo.py "$@"
