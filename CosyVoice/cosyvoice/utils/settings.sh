# shellcheck shell=bash
# Turns the UPPER_CASE settings at the top of a shell script into its command line, as settings.py does for
# Python, and runs commands so that a signal lets them save their work. Sourced by the script, never run.
#
#     BATCH_SIZE="${BATCH_SIZE:-16}"  # recordings at once
#
# becomes `--batch-size VALUE` (dashes or underscores), with the comment as its help. A setting that is `false` in the
# script is a switch: `--force` alone makes it `true`. The script calls `read_flags "$@"` first.

SCRIPT="$(cd -- "$(dirname -- "${BASH_SOURCE[1]}")" && pwd)/$(basename -- "${BASH_SOURCE[1]}")"
SETTINGS="$(sed -n 's/^\([A-Z_]*\)="\${\1:-.*/\1/p' "$SCRIPT")" # their names, one a line
SWITCHES="$(sed -n 's/^\([A-Z_]*\)="\${\1:-false}".*/\1/p' "$SCRIPT")" # those that are on or off

show_help() {
    sed -n '2,/^set /{/^#/{s/^# \{0,1\}//;p}}' "$SCRIPT"
    echo
    sed -n 's/^\([A-Z_]*\)="\${\1:-\(.*\)}" *# \(.*\)/--\L\1\E\t\3 (\2)/p' "$SCRIPT" |
        while IFS=$'\t' read -r flag help; do printf '  %-22s %s\n' "${flag//_/-}" "$help"; done
}

refuse_usage() {
    printf 'error: %s; see: bash %s --help\n' "$1" "$(basename -- "$SCRIPT")" >&2
    exit 2
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

read_flags() {
    local flag value name is_given
    while (($#)); do
        is_given=true
        case "$1" in
            -h | --help) show_help && exit 0 ;;
            --?*=*) flag="${1%%=*}" value="${1#*=}" ;;
            --?*) flag="$1" value="" is_given=false ;;
            *) refuse_usage "unexpected argument '$1'" ;;
        esac
        shift
        name="${flag#--}" && name="${name//-/_}" && name="${name^^}"
        grep -qxF -- "$name" <<<"$SETTINGS" || refuse_usage "there is no flag $flag"
        if [[ "$is_given" == false ]]; then
            if grep -qxF -- "$name" <<<"$SWITCHES" && [[ $# == 0 || "$1" == --* ]]; then
                value=true
            else
                (($#)) || refuse_usage "$flag needs a value"
                value="$1" && shift
            fi
        fi
        printf -v "$name" '%s' "$value"
    done
}

# Print every setting's value, one a line.
list_settings() {
    local name
    for name in $SETTINGS; do printf '  %-18s %s\n' "$name" "${!name}"; done
}

# Set PYTHON where the person has not: the virtual environment of the repository, else whatever is called python3.
find_python() {
    local repository="$1"
    if [[ -z "$PYTHON" ]]; then
        PYTHON="$repository/.venv/bin/python"
        [[ -x "$PYTHON" ]] || PYTHON=python3
    fi
    command -v -- "$PYTHON" >/dev/null ||
        fail "there is no interpreter $PYTHON; run 'make setup', or give --python PATH"
}

# Run a command so that a signal to this script reaches it once, and wait until it has saved its work.
run_stoppable() {
    local child status=0 stopped=0
    set -m # a process group of its own: Ctrl-C comes through the trap alone
    "$@" &
    child=$!
    trap 'stopped=130; kill -INT "$child"' INT
    trap 'stopped=143; kill -TERM "$child"' TERM HUP
    wait "$child" || status=$?
    while kill -0 "$child" 2>/dev/null; do # a trap ended the wait, not the child
        status=0
        wait "$child" || status=$?
    done
    trap - INT TERM HUP
    set +m
    ((stopped == 0 || status == 0)) || status=$stopped # a launcher of several processes ends with 1 then
    return "$status"
}
