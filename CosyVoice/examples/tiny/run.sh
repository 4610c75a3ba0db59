#!/usr/bin/env bash
# Make all of CosyVoice-tiny from nothing: a synthesised corpus, and every network of the folder trained on it.
#
#     0 corpus             ->  <WORK_DIR>/corpus/{audio,train,phrases,lively,dev,test,lively_dev}; needs flite
#     1 S3 tokenizer       ->  <WORK_DIR>/s3_tokenizer/speech_tokenizer_v1.onnx
#     2 speaker encoder    ->  <WORK_DIR>/speaker_encoder/campplus.onnx
#     3 speaker vectors    ->  corpus/<split>/{utt2embedding,spk2embedding}.pt
#     4 speech tokens      ->  corpus/<split>/utt2speech_token.pt
#     5 Parquet shards     ->  corpus/<split>/parquet/
#     6 llm, flow, hifigan ->  <WORK_DIR>/exp/<model>/, trained side by side
#     7 Whisper encoder    ->  <WORK_DIR>/whisper/
#     8 assembly           ->  <WORK_DIR>/CosyVoice-tiny/, checked part by part
#     9 evaluation         ->  <WORK_DIR>/evaluation/, and the results in the model's README.md
#
#     bash run.sh                                                       # about three hours on two CPU cores
#     bash run.sh --device cuda --minutes-hifigan 60                    # where there is a GPU
#     bash run.sh --stage 8 --stop-stage 8 --output CosyVoice-tiny      # put the result into the repository
#
# Run the same command again after any stop: what is done is skipped, what was begun goes on. Exit codes: 0 all good,
# 1 error, 2 wrong usage, 3 finished but some recordings could not be used, 130/143 stopped by Ctrl-C or SIGTERM.
#
# Settings: edit them here, or give --lower-case-name VALUE (dashes or underscores), or set the variable of that name.
# What stands here is relative to this file; what is given is relative to the working directory.
set -euo pipefail
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
REPOSITORY="$(cd -- "$HERE/../../.." && pwd)"
# shellcheck source=../../cosyvoice/utils/settings.sh
source "$REPOSITORY/CosyVoice/cosyvoice/utils/settings.sh"
source "$HERE/../recipe_lib.sh"

STAGE="${STAGE:-0}"                            # first stage to do
STOP_STAGE="${STOP_STAGE:-9}"                  # last stage to do
FORCE="${FORCE:-false}"                        # remove these stages' results and do them again
WORK_DIR="${WORK_DIR:-$HERE/work}"             # folder of everything that is made
OUTPUT="${OUTPUT:-}"                           # the model's folder; empty takes <WORK_DIR>/CosyVoice-tiny
CONFIG="${CONFIG:-$HERE/conf/cosyvoice.yaml}"  # sizes, data pipeline and training
HOURS="${HOURS:-3.0}"                          # speech in the training set
LIVELY_HOURS="${LIVELY_HOURS:-1.0}"            # speech whose words have rates of their own; 0 leaves it out
DEV_SIZE="${DEV_SIZE:-100}"                    # utterances in dev, and in lively_dev
TEST_SIZE="${TEST_SIZE:-200}"                  # utterances in test
TOKENIZER_EPOCHS="${TOKENIZER_EPOCHS:-}"       # passes over the corpus, S3 tokenizer; empty takes the script's number
OPEN_EPOCHS="${OPEN_EPOCHS:-}"                 # of them, at the start, without the quantizer
SPEAKER_EPOCHS="${SPEAKER_EPOCHS:-}"           # the same, speaker encoder
MINUTES_LLM="${MINUTES_LLM:-75}"               # of training the language model, all runs together
MINUTES_FLOW="${MINUTES_FLOW:-35}"             # the same, flow
MINUTES_HIFIGAN="${MINUTES_HIFIGAN:-40}"       # the same, vocoder
MINUTES_WHISPER="${MINUTES_WHISPER:-}"         # the same, Whisper encoder; empty takes the script's number of steps
BATCH_FACTOR="${BATCH_FACTOR:-1}"              # times the usual batches in stages 6 and 7; 4 on a GPU
CHECK_EVERY="${CHECK_EVERY:-1}"                # epochs between two cross-validations of flow, vocoder; 8 on a GPU
MAX_EPOCH="${MAX_EPOCH:-}"                     # passes of flow, vocoder; empty takes the configuration's
MAX_STEPS="${MAX_STEPS:-}"                     # so many steps in stages 6 and 7, whatever the minutes; empty sets no limit
EVALUATED="${EVALUATED:-}"                     # test utterances measured in stage 9; empty takes all
REAL_MANIFEST="${REAL_MANIFEST:-}"             # .jsonl of recordings of people, measured in stage 9 too
AVERAGE_NUM="${AVERAGE_NUM:-5}"                # epochs averaged, of lowest loss; at most a quarter of all
DTYPE="${DTYPE:-fp32}"                         # of training flow and vocoder in stage 6: fp32, bf16, fp16
DTYPE_LLM="${DTYPE_LLM:-auto}"                 # of training the language model: float32, bfloat16; auto: what is fast
DEVICE="${DEVICE:-auto}"                       # of stages 1, 4, 6 and 7: auto, cpu, cuda
NUM_THREADS="${NUM_THREADS:-}"                 # CPU threads in all; empty takes every core
JOBS="${JOBS:-2}"                              # trainings at the same time in stage 6
PYTHON="${PYTHON:-}"                           # interpreter; empty takes the repository's .venv, else python3

SPLITS=(train phrases lively dev test lively_dev)
LLM_SPLITS=(train phrases lively) # what the language model learns from
WHISPER_SPLITS=(train lively)     # what the Whisper encoder learns from
PACKED=(train lively dev)         # what train.py reads
COSYVOICE="$REPOSITORY/CosyVoice"
export PYTHONPATH="$REPOSITORY:$COSYVOICE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUTF8=1 # texts are UTF-8, whatever the locale says

# Give the flag with its value to FLAGS where the value is not empty.
flag() { [[ -z "$2" ]] || FLAGS+=("$1" "$2"); }

make_corpus() {
    command -v flite >/dev/null || fail "flite is not installed; run: apt-get update && apt-get install -y flite"
    gives "$CORPUS"/{train,phrases,lively,dev,test,lively_dev}/{wav.scp,text,utt2spk,spk2utt,phones}
    clears "$CORPUS"
    step stage0 "$PYTHON" "$HERE/make_corpus.py" --work-dir "$WORK_DIR" \
        --hours "$HOURS" --lively-hours "$LIVELY_HOURS" --dev "$DEV_SIZE" --test "$TEST_SIZE"
}

train_tokenizer() {
    needs 0 "$CORPUS"/{train,dev,test}/{wav.scp,phones}
    gives "$S3_TOKENIZER"
    clears "$WORK_DIR/s3_tokenizer"
    FLAGS=()
    flag --epochs "$TOKENIZER_EPOCHS"
    flag --open-epochs "$OPEN_EPOCHS"
    how --num-threads "$NUM_THREADS" --device "$DEVICE"
    step stage1 "$PYTHON" "$HERE/train_s3_tokenizer.py" --work-dir "$WORK_DIR" "${FLAGS[@]}"
}

train_speaker_encoder() {
    needs 0 "$CORPUS"/{train,dev,test}/wav.scp
    gives "$SPEAKER_ENCODER"
    clears "$WORK_DIR/speaker_encoder"
    FLAGS=()
    flag --epochs "$SPEAKER_EPOCHS"
    how --threads "$NUM_THREADS"
    step stage2 "$PYTHON" "$HERE/train_speaker_encoder.py" --work-dir "$WORK_DIR" "${FLAGS[@]}"
}

embed_split() {
    needs 0 "$CORPUS/$1/wav.scp" "$CORPUS/$1/utt2spk"
    needs 2 "$SPEAKER_ENCODER"
    gives "$CORPUS/$1/utt2embedding.pt" "$CORPUS/$1/spk2embedding.pt"
    clears "$CORPUS/$1/utt2embedding.pt" "$CORPUS/$1/utt2embedding.chunks"
    how --num_thread "$NUM_THREADS"
    step "stage3-$1" "$PYTHON" "$COSYVOICE/tools/extract_embedding.py" --dir "$CORPUS/$1" --onnx_path "$SPEAKER_ENCODER"
}

tokenize_split() {
    needs 0 "$CORPUS/$1/wav.scp"
    needs 1 "$S3_TOKENIZER"
    gives "$CORPUS/$1/utt2speech_token.pt"
    clears "$CORPUS/$1/utt2speech_token.pt" "$CORPUS/$1/utt2speech_token.chunks"
    how --num_thread "$NUM_THREADS" --device "$DEVICE"
    step "stage4-$1" "$PYTHON" "$COSYVOICE/tools/extract_speech_token.py" --dir "$CORPUS/$1" --onnx_path "$S3_TOKENIZER"
}

pack_split() {
    needs 0 "$CORPUS/$1/wav.scp" "$CORPUS/$1/text" "$CORPUS/$1/utt2spk"
    needs 3 "$CORPUS/$1/utt2embedding.pt" "$CORPUS/$1/spk2embedding.pt"
    needs 4 "$CORPUS/$1/utt2speech_token.pt"
    gives "$CORPUS/$1/parquet/data.list"
    clears "$CORPUS/$1/parquet"
    how --num_processes "$NUM_THREADS"
    step "stage5-$1" "$PYTHON" "$COSYVOICE/tools/make_parquet_list.py" \
        --src_dir "$CORPUS/$1" --des_dir "$CORPUS/$1/parquet" --num_utts_per_parquet 100
}

# keep FILE: let FILE.new take its place, unless both are the same: a mark knows a file by its time.
# shellcheck disable=SC2317 # `together` runs it
keep() {
    cmp -s "$1.new" "$1" || cp "$1.new" "$1"
    rm "$1.new"
}

# The language model begins with the sounds of its tokens and units, and is shown which token is spoken when: by itself it
# learns to babble, and looks at its text late or never.
# shellcheck disable=SC2317 # `together` runs it
train_llm() {
    local start="$WORK_DIR/llm_start/llm.pt" split
    needs 0 "$CORPUS"/{train,phrases,lively,dev}/{text,phones}
    needs 1 "$S3_TOKENIZER"
    needs "--config" "$CONFIG"
    gives "$start"
    how --threads "$THREADS_A_JOB" --device "$DEVICE"
    step stage6-start "$PYTHON" "$HERE/start_llm.py" --work-dir "$WORK_DIR" --config "$CONFIG"
    for split in "${LLM_SPLITS[@]}" dev; do
        needs 0 "$CORPUS/$split"/{wav.scp,text,utt2spk,phones}
        needs 3 "$CORPUS/$split/utt2embedding.pt"
        needs 4 "$CORPUS/$split/utt2speech_token.pt"
    done
    needs 6 "$start"
    needs "--config" "$CONFIG"
    gives "$EXP/llm/llm.pt"
    clears "$EXP/llm"
    FLAGS=(--minutes "$MINUTES_LLM")
    [[ -z "$MAX_STEPS" ]] || FLAGS=(--steps "$MAX_STEPS")
    how --threads "$THREADS_A_JOB" --device "$DEVICE"
    step stage6-llm "$PYTHON" "$HERE/teach_reading.py" --work-dir "$WORK_DIR" --config "$CONFIG" \
        --splits "$(IFS=, && echo "${LLM_SPLITS[*]}")" --batch-positions $((2000 * BATCH_FACTOR)) --dtype "$DTYPE_LLM" \
        "${FLAGS[@]}"
}

# begin_flow FILE: where the flow's training begins.
# shellcheck disable=SC2317 # `together` runs it
begin_flow() {
    needs 0 "$CORPUS"/train/{wav.scp,text,utt2spk,phones}
    needs 1 "$S3_TOKENIZER"
    needs "--config" "$CONFIG"
    gives "$1"
    step stage6-flow-start "$PYTHON" "$HERE/start_flow.py" --work-dir "$WORK_DIR" --config "$CONFIG"
}

# shellcheck disable=SC2317 # `together` runs it
train_model() {
    if [[ "$1" == llm ]]; then
        train_llm
        return
    fi
    local minutes="MINUTES_${1^^}" config="$WORK_DIR/$1.yaml" data="$CORPUS/train/parquet/data.list"
    local start="$WORK_DIR/flow_start/flow.pt"
    [[ "$1" != flow ]] || begin_flow "$start"
    needs 5 "$CORPUS"/{train,dev}/parquet/data.list
    if [[ "$1" == flow && " ${SPLITS[*]} " == *" lively "* ]]; then
        needs 5 "$CORPUS/lively/parquet/data.list"
        expect_needs stage6-flow
        data="$WORK_DIR/flow_data.list"
        cat "$CORPUS"/{train,lively}/parquet/data.list >"$data.new"
        keep "$data"
    fi
    sed -e "s/max_frames_in_batch: .*/max_frames_in_batch: $((1000 * BATCH_FACTOR))/" \
        -e "s/^    batch_size: 8$/    batch_size: $((8 * BATCH_FACTOR))/" "$CONFIG" >"$config.new"
    keep "$config"
    needs "--config" "$config"
    gives "$EXP/$1/metrics.jsonl"
    clears "$EXP/$1" "$WORK_DIR/tensorboard/$1"
    FLAGS=()
    if [[ "$1" == flow ]]; then
        needs 6 "$start"
        FLAGS=(--checkpoint "$start")
    fi
    flag --max_epoch "$MAX_EPOCH"
    flag --max_steps "$MAX_STEPS"
    flag --total_minutes "${!minutes}"
    how --num_threads "$THREADS_A_JOB" --device "$DEVICE" --check_every "$CHECK_EVERY"
    step "stage6-$1" "$PYTHON" "$COSYVOICE/cosyvoice/bin/train.py" --model "$1" --config "$config" \
        --train_data "$data" --cv_data "$CORPUS/dev/parquet/data.list" \
        --model_dir "$EXP/$1" --tensorboard_dir "$WORK_DIR/tensorboard/$1" --dtype "$DTYPE" "${FLAGS[@]}"
    needs 6 "$EXP/$1/metrics.jsonl"
    gives "$EXP/$1/$1.pt"
    step "stage6-$1-average" "$PYTHON" "$COSYVOICE/cosyvoice/bin/average_model.py" --dst_model "$EXP/$1/$1.pt" \
        --src_path "$EXP/$1" --num "$(at_most_epochs "$EXP/$1" "$AVERAGE_NUM")" --val_best
}

train_whisper() {
    local split
    for split in "${WHISPER_SPLITS[@]}" dev; do
        needs 0 "$CORPUS/$split"/{wav.scp,text,phones}
        needs 4 "$CORPUS/$split/utt2speech_token.pt"
    done
    needs 1 "$S3_TOKENIZER"
    needs 6 "$EXP/llm/llm.pt"
    gives "$WORK_DIR/whisper/model.safetensors"
    clears "$WORK_DIR/whisper"
    FLAGS=()
    flag --minutes "$MINUTES_WHISPER"
    [[ -z "$MAX_STEPS" ]] || FLAGS=(--steps "$MAX_STEPS")
    how --threads "$NUM_THREADS" --device "$DEVICE"
    step stage7 "$PYTHON" "$HERE/train_whisper.py" --work-dir "$WORK_DIR" --text-embedding "$EXP/llm/llm.pt" \
        --frames-per-batch $((2500 * BATCH_FACTOR)) \
        --splits "$(IFS=, && echo "${WHISPER_SPLITS[*]}")" "${FLAGS[@]}"
}

assemble() {
    needs 1 "$S3_TOKENIZER"
    needs 2 "$SPEAKER_ENCODER"
    needs 3 "$CORPUS/train/spk2embedding.pt"
    needs 6 "$EXP/llm/llm.pt" "$EXP/flow/flow.pt" "$EXP/hifigan/hifigan.pt"
    needs 7 "$WORK_DIR/whisper/model.safetensors"
    needs "--config" "$CONFIG"
    [[ ! -e "$WORK_DIR/taste.pt" ]] || needs "train_taste.py, by hand" "$WORK_DIR/taste.pt"
    gives "$OUTPUT/README.md" "$OUTPUT/spk2info.pt"
    step stage8 "$PYTHON" "$HERE/assemble.py" --work-dir "$WORK_DIR" --config "$CONFIG" --output "$OUTPUT"
}

evaluate() {
    local report="$WORK_DIR/evaluation"
    local -a flags=(--overwrite) # what is there of an earlier model is measured again
    [[ -z "$EVALUATED" ]] || flags+=(--limit "$EVALUATED")
    needs 0 "$CORPUS/test/wav.scp"
    needs 3 "$CORPUS/test/spk2embedding.pt"
    needs 8 "$OUTPUT/llm.pt" "$OUTPUT/flow.pt" "$OUTPUT/hift.pt"
    gives "$report/test/report.md"
    clears "$report/test"
    step stage9-test "$PYTHON" "$HERE/evaluate.py" --model-dir "$OUTPUT" --data-dir "$CORPUS/test" \
        --output "$report/test" "${flags[@]}"
    if [[ -n "$REAL_MANIFEST" ]]; then
        needs "write it, or leave --real-manifest away" "$REAL_MANIFEST"
        needs 8 "$OUTPUT/llm.pt" "$OUTPUT/flow.pt" "$OUTPUT/hift.pt"
        gives "$report/real/report.md"
        clears "$report/real"
        step stage9-real "$PYTHON" "$HERE/evaluate.py" --model-dir "$OUTPUT" --manifest "$REAL_MANIFEST" \
            --output "$report/real" "${flags[@]}"
    fi
    needs 9 "$report/test/report.md"
    [[ ! -e "$report/real/report.md" ]] || needs 9 "$report/real/report.md"
    [[ ! -e "$WORK_DIR/provenance.md" ]] || needs "written by hand" "$WORK_DIR/provenance.md"
    gives "$OUTPUT/README.md"
    step stage9-readme "$PYTHON" "$HERE/assemble.py" --readme-only \
        --work-dir "$WORK_DIR" --config "$CONFIG" --output "$OUTPUT"
}

main() {
    local split
    begin_recipe "$@"
    NUM_THREADS="${NUM_THREADS:-$(nproc)}"
    expect_number NUM_THREADS JOBS AVERAGE_NUM BATCH_FACTOR CHECK_EVERY
    find_python "$REPOSITORY"
    [[ "$LIVELY_HOURS" =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse_usage "LIVELY_HOURS is '$LIVELY_HOURS', expected a number"
    if [[ ! "$LIVELY_HOURS" =~ [1-9] ]]; then
        SPLITS=(train phrases dev test) LLM_SPLITS=(train phrases) WHISPER_SPLITS=(train) PACKED=(train dev)
    fi
    OUTPUT="${OUTPUT:-$WORK_DIR/CosyVoice-tiny}"
    CORPUS="$WORK_DIR/corpus" EXP="$WORK_DIR/exp"
    S3_TOKENIZER="$WORK_DIR/s3_tokenizer/speech_tokenizer_v1.onnx"
    SPEAKER_ENCODER="$WORK_DIR/speaker_encoder/campplus.onnx"
    THREADS_A_JOB=$((NUM_THREADS > JOBS ? NUM_THREADS / JOBS : 1))

    if stage 0 "corpus"; then make_corpus; fi
    if stage 1 "S3 tokenizer"; then train_tokenizer; fi
    if stage 2 "speaker encoder"; then train_speaker_encoder; fi
    if stage 3 "speaker vectors"; then for split in "${SPLITS[@]}"; do embed_split "$split"; done; fi
    if stage 4 "speech tokens"; then for split in "${SPLITS[@]}"; do tokenize_split "$split"; done; fi
    if stage 5 "Parquet shards"; then for split in "${PACKED[@]}"; do pack_split "$split"; done; fi
    if stage 6 "llm, flow, hifigan"; then together "$JOBS" train_model llm hifigan flow; fi # the longest first
    if stage 7 "Whisper encoder"; then train_whisper; fi
    if stage 8 "assembly"; then assemble; fi
    if stage 9 "evaluation"; then evaluate; fi
    end_recipe
}

main "$@"
