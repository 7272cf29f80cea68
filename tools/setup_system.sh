#!/usr/bin/env bash
# Install what make's targets need of the system: setup_system.sh demo|test
# As root with apt-get it does so; else it stops at once and says what to run.
set -euo pipefail
python=${PYTHON:-python3}
missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }

if command -v "$python" >/dev/null; then
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
else
  missing+=(python3 python3-venv)
fi
if [ "${1:-demo}" = test ]; then
  [ -n "${CXX:-}" ] || command -v clang++ >/dev/null || need g++ g++
  need curl curl
  need node nodejs
  need npm npm
  need openssl openssl
  need prometheus prometheus
  need promtool prometheus
  need chromium chromium
fi
[ ${#missing[@]} -gt 0 ] || exit 0

mapfile -t packages < <(printf '%s\n' "${missing[@]}" | sort -u)
command="apt-get install -y --no-install-recommends ${packages[*]}"
if ! command -v apt-get >/dev/null; then
  echo "missing: ${packages[*]} (Debian's names): install them, and run this again" >&2
  exit 1
elif [ "$(id -u)" -ne 0 ]; then
  echo "missing packages: run   sudo $command" >&2
  exit 1
fi
echo "$command" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "the lists of packages could not be brought up to date" >&2
$command >/dev/null || { echo "that failed: see above, or run it by hand" >&2; exit 1; }
