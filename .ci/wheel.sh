#!/usr/bin/env bash
# The wheel as users have it: built, installed into a fresh environment of each PYTHON, and run outside of the
# tree by a user who has no home; with the first of them also by one with a home, and by one whose home cannot
# be written to.
#
#   .ci/wheel.sh [PYTHON]...
#
# PYTHON: interpreters, by default those of 3.11 to 3.13 that are on the PATH or that pyenv has.
set -euo pipefail
cd "$(dirname "$0")/.."
pythons=("$@")
if [ ${#pythons[@]} -eq 0 ]; then
  for version in 3.11 3.12 3.13; do
    for found in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$version.*/bin/python python$version; do
      "$found" -c '' 2> /dev/null && pythons+=("$found") && break
    done
  done
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"${pythons[0]}" -m venv "$work/build"
"$work/build/bin/python" -m pip wheel --quiet --quiet --no-deps --wheel-dir "$work" .

# as_user HOME COMMAND...: with that home ("" = none), as ${user[@]} says.
as_user() {
  local home=("HOME=$1")
  [ -n "$1" ] || home=(-u HOME)
  shift
  (cd "$work/elsewhere" && env -u PYTHONPATH -u JMOE_CACHE_DIR -u XDG_CACHE_HOME "${home[@]}" TMPDIR="$work/tmp" \
    JAX_PLATFORMS=cpu "${user[@]}" "$@")
}

homes=("$work/home" /proc/no-home "")
for python in "${pythons[@]}"; do
  version=$("$python" -c 'import platform; print(platform.python_version())')
  env="$work/$version"
  rm -rf "$work/tmp" "$work/elsewhere" "$work/home"
  mkdir -p "$work/tmp" "$work/elsewhere" "$work/home"
  chmod 1777 "$work/tmp"
  "$python" -m venv "$env"
  "$env/bin/python" -m pip install --quiet --quiet "$work"/jmoe-*.whl
  user=(setpriv --reuid=54321 --regid=54321 --clear-groups)  # nobody has this number, so it has no home
  if as_user "" "$env/bin/python" -c '' 2> /dev/null; then chown 54321 "$work/home"; else user=(); fi
  for home in "${homes[@]}"; do
    as_user "$home" "$env/bin/python" -c 'import jmoe; assert "site-packages" in jmoe.__file__, jmoe.__file__'
    said=$(as_user "$home" "$env/bin/jmoe" doctor tiny 2> "$work/errors") || { cat "$work/errors"; exit 1; }
    kernels=$(grep '^grouped experts' <<< "$said")
    [ -z "$(command -v c++)" ] || grep -q ': cpu' <<< "$kernels" || { echo "slow kernels: $kernels"; exit 1; }
    if [ "$home" = /proc/no-home ] || { [ -z "$home" ] && [ ${#user[@]} -gt 0 ]; }; then
      grep -q "is kept in $work/tmp" "$work/errors" || { echo "no warning"; exit 1; }
    fi
    printf 'Python %-7s home %-14s %s\n' "$version" "${home##"$work"/}" "$kernels"
  done
  as_user "" "$env/bin/jmoe" generate tiny --prompt "Once upon a time" --max-tokens 8 --temperature 0 2> /dev/null
  homes=("")
done
