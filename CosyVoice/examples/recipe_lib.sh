# shellcheck shell=bash
# Numbered stages made of steps, each with a `.done` mark, for the recipes beside this file. Sourced, never run.
#
# A step is one command whose result is kept. Its mark, <WORK_DIR>/.done/<step>.done, is written last and holds the
# command and the size and time of every file it read: while these stay the same and the results are there, the step is
# skipped.
#
#     if stage 3 "Parquet shards"; then
#         needs 2 "$folder/utt2speech_token.pt"    # the stage that makes them, and the files
#         gives "$folder/parquet/data.list"        # what is there afterwards
#         clears "$folder/parquet"                 # what --force removes first
#         how --num_processes "$JOBS"              # words that change the speed alone, not the result
#         step 3-train "$PYTHON" make_parquet_list.py --src_dir "$folder" --des_dir "$folder/parquet"
#     fi
#
# The script has sourced cosyvoice/utils/settings.sh and has the settings WORK_DIR, STAGE, STOP_STAGE and FORCE.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or later is needed, this is $BASH_VERSION"

SOME_FAILED=3  # exit code of a tool that finished, but could not use some of the recordings
RESULT=0       # exit code of the recipe
NEEDS=() MAKERS=() GIVES=() CLEARS=() HOW=()
WORDS_GIVEN=() # on the command line

# Take note of the command line, read it, and make sure that nobody else works in the same folder.
begin_recipe() {
    local name
    WORDS_GIVEN=("$@")
    read_flags "$@"
    for name in STAGE STOP_STAGE; do
        [[ "${!name}" =~ ^-?[0-9]+$ ]] || refuse_usage "$name is '${!name}', expected a stage's number"
    done
    ((STAGE <= STOP_STAGE)) || refuse_usage "--stage $STAGE comes after --stop-stage $STOP_STAGE"
    [[ "$FORCE" == true || "$FORCE" == false ]] || refuse_usage "FORCE is '$FORCE', expected true or false"
    mkdir -p -- "$WORK_DIR/.done" "$WORK_DIR/log"
    WORK_DIR="$(cd -- "$WORK_DIR" && pwd)"
    exec {RECIPE_LOCK}>>"$WORK_DIR/.recipe.lock" # held until this script and what it started have ended
    flock --nonblock "$RECIPE_LOCK" || fail "another run.sh works in $WORK_DIR; wait for it or give another --work-dir"
    printf '%s\n' "$(basename -- "$SCRIPT")" && list_settings | tee "$WORK_DIR/log/settings.txt"
}

# expect_number NAME...: make sure that these settings are whole numbers of at least 1.
expect_number() {
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || refuse_usage "$name is '${!name}', expected a whole number, at least 1"
    done
}

# stage NUMBER TITLE: whether it is to be done; says so.
stage() {
    ((STAGE <= $1 && $1 <= STOP_STAGE)) || return 1
    printf '\n== stage %s: %s\n' "$1" "$2"
}

needs() { # MAKER FILE...: what the next step reads, and the stage (a number) or the command (words) that makes it
    local maker="$1" file
    shift
    for file in "$@"; do NEEDS+=("$file") MAKERS+=("$maker"); done
}

gives() { GIVES+=("$@"); } # FILE...

clears() { CLEARS+=("$@"); } # FILE...: what --force removes first, so that the command does not go on from there

how() { HOW+=("$@"); } # WORD...

# step NAME COMMAND...: run the command unless its mark says that this was done.
step() {
    local name="$1" mark="$WORK_DIR/.done/$1.done" wanted status=0 file
    shift
    expect_needs "$name"
    wanted="$(describe_step "$@")"
    if [[ "$FORCE" == false ]] && is_done "$mark" "$wanted"; then
        echo "$name: done before and nothing has changed since; --force does it again"
    else
        rm -f -- "$mark"
        [[ "$FORCE" == false || ${#CLEARS[@]} == 0 ]] || rm -rf -- "${CLEARS[@]}"
        echo "$name: $(quoted "$@" "${HOW[@]}")"
        run_stoppable "$@" "${HOW[@]}" || status=$?
        ((status == 0 || status == SOME_FAILED)) || stop_after "$name" "$status"
        for file in "${GIVES[@]}"; do
            [[ -e "$file" ]] || fail "$name ended well, but did not write $file"
        done
        ((status == 0)) || RESULT=$SOME_FAILED # said above by the tool, with the list's name; the others go on
        printf '%s\n' "$wanted" >"$mark.tmp" && mv -- "$mark.tmp" "$mark"
    fi
    NEEDS=() MAKERS=() GIVES=() CLEARS=() HOW=()
}

# together JOBS FUNCTION ARGUMENT...: `FUNCTION ARGUMENT` for each argument, so many at a time, each with its own log.
together() {
    local jobs="$1" body="$2" stop="" told=false worst=0 pid status
    local -a waiting
    local -A running=()
    shift 2
    waiting=("$@")
    trap 'stop=INT' INT
    trap 'stop=TERM' TERM HUP
    while ((${#waiting[@]} || ${#running[@]})); do
        if [[ -n "$stop" ]]; then
            waiting=()
            [[ "$told" == true || ${#running[@]} == 0 ]] || kill "-$stop" "${!running[@]}" 2>/dev/null || true
            told=true
        fi
        while ((${#waiting[@]} && ${#running[@]} < jobs)); do
            echo "${waiting[0]}: started; tail -f $WORK_DIR/log/$body-${waiting[0]}.log"
            set -m # a process group of its own: Ctrl-C comes through the trap alone
            (
                trap - INT TERM HUP
                "$body" "${waiting[0]}"
                exit "$RESULT"
            ) >>"$WORK_DIR/log/$body-${waiting[0]}.log" 2>&1 &
            set +m
            running[$!]="${waiting[0]}"
            waiting=("${waiting[@]:1}")
        done
        sleep 0.3 || true # Ctrl-C ends it
        for pid in "${!running[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            status=0
            wait "$pid" || status=$?
            report_job "$body" "${running[$pid]}" "$status"
            ((status == 0 || (worst != 0 && status == SOME_FAILED))) || worst=$status
            unset "running[$pid]"
        done
    done
    trap - INT TERM HUP
    ((worst == 0 || worst == SOME_FAILED)) || exit "$worst"
    ((worst == 0)) || RESULT=$worst
    [[ -z "$stop" ]] || exit 130
}

# at_most_epochs FOLDER NUMBER: so many, but no more than a quarter of a training's epochs (rounded up): with fewer, the
# first ones, which know little yet, would be averaged in.
at_most_epochs() {
    local -a epochs
    mapfile -t epochs < <(find "$1" -maxdepth 1 -name 'epoch_*.yaml' ! -name '*_step_*' 2>/dev/null)
    local quarter=$(((${#epochs[@]} + 3) / 4))
    echo "$((quarter > 0 && quarter < $2 ? quarter : $2))"
}

end_recipe() {
    printf '\nstages %s to %s are done' "$STAGE" "$STOP_STAGE"
    ((RESULT == 0)) && echo || echo "; some recordings could not be used (see above)"
    exit "$RESULT"
}

# ---- what the functions above are made of

report_job() { # FUNCTION ARGUMENT STATUS
    local log="$WORK_DIR/log/$1-$2.log"
    case "$3" in
        0 | "$SOME_FAILED") echo "$2: done" ;;
        130 | 143) echo "$2: stopped" ;;
        *)
            printf 'error: %s failed with exit code %s; the others go on. The end of %s:\n' "$2" "$3" "$log" >&2
            tail -n 8 -- "$log" >&2
            ;;
    esac
}

expect_needs() { # STEP
    local place problems="" first="" next=""
    for place in "${!NEEDS[@]}"; do
        [[ ! -e "${NEEDS[place]}" ]] || continue
        if [[ "${MAKERS[place]}" =~ ^-?[0-9]+$ ]]; then
            problems+=$'\n'"  ${NEEDS[place]} (stage ${MAKERS[place]} makes it)"
            [[ -n "$first" ]] && ((first <= MAKERS[place])) || first="${MAKERS[place]}"
        else
            problems+=$'\n'"  ${NEEDS[place]} (${MAKERS[place]})"
        fi
    done
    [[ -n "$problems" ]] || return 0
    # of two --stage the last one counts
    [[ -z "$first" ]] || next=$'\n'"run: $(quoted bash "$SCRIPT" "${WORDS_GIVEN[@]}" --stage "$first")"
    fail "$1 needs what is not there:$problems$next"
}

describe_step() { # COMMAND...
    printf 'command: %s\n' "$(quoted "${@:2}")" # without the interpreter
    ((${#NEEDS[@]} == 0)) || stat --printf 'input: %n, %s bytes, %y\n' -- "${NEEDS[@]}"
}

is_done() { # MARK WANTED
    local file
    [[ -f "$1" && "$(<"$1")" == "$2" ]] || return 1
    for file in "${GIVES[@]}"; do
        [[ -e "$file" ]] || return 1
    done
}

stop_after() { # STEP STATUS
    case "$2" in
        130 | 143) echo "$1: stopped; the same command goes on from here" >&2 ;;
        *) echo "error: $1 failed with exit code $2 (see above); the same command goes on from here" >&2 ;;
    esac
    exit "$2"
}

# The words as one could type them.
quoted() {
    local line
    printf -v line ' %q' "$@"
    printf '%s' "${line# }"
}
