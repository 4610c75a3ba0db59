# shellcheck shell=bash
# Makes this repository's packages importable, from whatever folder a script is called. Sourced by run.sh.
REPOSITORY="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../../.." && pwd)"
export PYTHONPATH="$REPOSITORY:$REPOSITORY/CosyVoice${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUTF8=1 # texts are UTF-8, whatever the locale says
