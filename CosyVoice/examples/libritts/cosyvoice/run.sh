#!/usr/bin/env bash
# Train CosyVoice on LibriTTS, in the stages of the published recipe.
#
#    -1 fetch and unpack   ->  <CORPUS_DIR>/LibriTTS/<part>
#     0 lists              ->  <WORK_DIR>/data/<part>/{wav.scp,text,utt2spk,spk2utt}
#     1 speaker vectors    ->  utt2embedding.pt, spk2embedding.pt beside them
#     2 speech tokens      ->  utt2speech_token.pt beside them
#     3 Parquet shards     ->  parquet/ beside them
#     4 inference          ->  <WORK_DIR>/exp/inference/{sft,zero_shot}/*.wav, said by the model of MODEL_DIR
#     5 training           ->  <WORK_DIR>/exp/{llm,flow,hifigan}, <WORK_DIR>/tensorboard
#     6 averaging          ->  <WORK_DIR>/exp/<model>/<model>.pt
#     7 export             ->  <WORK_DIR>/exp/model, a folder like CosyVoice-300M's, with TorchScript and ONNX files
#
#     bash run.sh                                            # everything: 80 GB of archives, days on several GPUs
#     bash run.sh --parts "train-clean-100 dev-clean test-clean" --models llm
#     bash run.sh --stage 5 --models flow --num-processes 4 --dtype bf16
#     bash run.sh --stage 4 --stop-stage 4 --model-dir exp/model     # hear what was trained
#
# Run the same command again after any stop: what is done is skipped, what was begun goes on. Exit codes: 0 all good,
# 1 error, 2 wrong usage, 3 finished but some recordings could not be used, 130/143 stopped by Ctrl-C or SIGTERM.
#
# Settings: edit them here, or give --lower-case-name VALUE (dashes or underscores), or set the variable of that name.
# What stands here is relative to this file; what is given is relative to the working directory.
set -euo pipefail
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/path.sh"
# shellcheck source=../../../cosyvoice/utils/settings.sh
source "$REPOSITORY/CosyVoice/cosyvoice/utils/settings.sh"
source "$HERE/../../recipe_lib.sh"

STAGE="${STAGE:--1}"                                    # first stage to do
STOP_STAGE="${STOP_STAGE:-7}"                           # last stage to do
FORCE="${FORCE:-false}"                                 # remove these stages' results and do them again
CORPUS_DIR="${CORPUS_DIR:-$HERE/corpus}"                # folder that holds LibriTTS/, or will
WORK_DIR="${WORK_DIR:-$HERE}"                           # folder of data/, exp/, tensorboard/, log/
MODEL_DIR="${MODEL_DIR:-$REPOSITORY/CosyVoice-300M}"    # released model: speaker encoder, speech tokenizer, weights
CONFIG="${CONFIG:-$HERE/conf/cosyvoice.yaml}"           # sizes, data pipeline and training
PARTS="${PARTS:-train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other}" # what to do
DATA_URL="${DATA_URL:-https://www.openslr.org/resources/60}" # where <part>.tar.gz are
REMOVE_ARCHIVES="${REMOVE_ARCHIVES:-false}"             # remove <part>.tar.gz once it is unpacked
NUM_THREAD="${NUM_THREAD:-8}"                           # threads that read recordings, in stages 1 and 2
DEVICE="${DEVICE:-auto}"                                # of stages 2 and 4: auto, cpu, cuda, cuda:1
BATCH_SIZE="${BATCH_SIZE:-}"                            # recordings at once in stage 2; empty takes the tool's
NUM_UTTS_PER_PARQUET="${NUM_UTTS_PER_PARQUET:-1000}"    # utterances in a shard
SKIP_INCOMPLETE="${SKIP_INCOMPLETE:-false}"             # leave what stages 1 and 2 failed on out of the shards
NUM_JOBS="${NUM_JOBS:-10}"                              # processes that write shards
TTS_TEXT="${TTS_TEXT:-$HERE/tts_text.json}"             # what stage 4 says, in which utterance's voice
PROMPT_PART="${PROMPT_PART:-test-clean}"                # part that these utterances are in
MODES="${MODES:-sft zero_shot}"                         # of inference
MODELS="${MODELS:-llm flow hifigan}"                    # what stages 5 and 6 train and average
FROM_SCRATCH="${FROM_SCRATCH:-false}"                   # begin with random weights, not with those of MODEL_DIR
NUM_PROCESSES="${NUM_PROCESSES:-1}"                     # of training: one for each GPU
NUM_WORKERS="${NUM_WORKERS:-2}"                         # processes that prepare batches, for each of training; 0: a thread
DTYPE="${DTYPE:-fp32}"                                  # of training: fp32, bf16, fp16
MAX_EPOCH="${MAX_EPOCH:-}"                              # passes over the data; empty takes the configuration's
MAX_STEPS="${MAX_STEPS:-}"                              # at most so many training steps; empty sets no limit
AVERAGE_NUM="${AVERAGE_NUM:-5}"                         # epochs averaged, of lowest loss; at most a quarter of all
PYTHON="${PYTHON:-}"                                    # interpreter; empty takes the repository's .venv

declare -A PART_FILE=([llm]=llm.pt [flow]=flow.pt [hifigan]=hift.pt) # a released folder's name for what is trained
COSYVOICE="$REPOSITORY/CosyVoice"
GET_MODEL="python setup_cosyvoice.py fetches a released model; or give --model-dir"

# expect_words NAME KNOWN...: make sure that a setting lists one or more of these.
expect_words() {
    local name="$1" word
    local -a words
    shift
    read -r -a words <<<"${!name}"
    ((${#words[@]})) || refuse_usage "$name is empty, expected some of: $*"
    for word in "${words[@]}"; do
        [[ " $* " == *" $word "* ]] || refuse_usage "$name has '$word', expected some of: $*"
    done
}

# Print those of PARTS whose names begin so.
parts_like() {
    local part
    for part in $PARTS; do
        [[ "$part" != "$1"* ]] || echo "$part"
    done
}

fetch_part() {
    local -a flags=()
    [[ "$REMOVE_ARCHIVES" == false ]] || flags=(--remove-archive)
    gives "$CORPUS_DIR/LibriTTS/$1/.complete"
    step "stage-1-$1" bash "$HERE/local/download_and_untar.sh" "${flags[@]}" "$CORPUS_DIR" "$DATA_URL" "$1"
}

list_part() {
    needs -1 "$CORPUS_DIR/LibriTTS/$1"
    gives "$DATA/$1/wav.scp" "$DATA/$1/text" "$DATA/$1/utt2spk" "$DATA/$1/spk2utt"
    step "stage0-$1" "$PYTHON" "$HERE/local/prepare_data.py" --src_dir "$CORPUS_DIR/LibriTTS/$1" --des_dir "$DATA/$1"
}

embed_part() {
    needs 0 "$DATA/$1/wav.scp" "$DATA/$1/utt2spk"
    needs "$GET_MODEL" "$MODEL_DIR/campplus.onnx"
    gives "$DATA/$1/utt2embedding.pt" "$DATA/$1/spk2embedding.pt"
    clears "$DATA/$1/utt2embedding.pt" "$DATA/$1/utt2embedding.chunks"
    how --num_thread "$NUM_THREAD"
    step "stage1-$1" "$PYTHON" "$COSYVOICE/tools/extract_embedding.py" --dir "$DATA/$1" \
        --onnx_path "$MODEL_DIR/campplus.onnx"
}

tokenize_part() {
    needs 0 "$DATA/$1/wav.scp"
    needs "$GET_MODEL" "$MODEL_DIR/speech_tokenizer_v1.onnx"
    gives "$DATA/$1/utt2speech_token.pt"
    clears "$DATA/$1/utt2speech_token.pt" "$DATA/$1/utt2speech_token.chunks"
    how --num_thread "$NUM_THREAD" --device "$DEVICE"
    [[ -z "$BATCH_SIZE" ]] || how --batch_size "$BATCH_SIZE"
    step "stage2-$1" "$PYTHON" "$COSYVOICE/tools/extract_speech_token.py" --dir "$DATA/$1" \
        --onnx_path "$MODEL_DIR/speech_tokenizer_v1.onnx"
}

pack_part() {
    local -a flags=()
    [[ "$SKIP_INCOMPLETE" == false ]] || flags=(--skip_incomplete)
    needs 0 "$DATA/$1/wav.scp" "$DATA/$1/text" "$DATA/$1/utt2spk"
    needs 1 "$DATA/$1/utt2embedding.pt" "$DATA/$1/spk2embedding.pt"
    needs 2 "$DATA/$1/utt2speech_token.pt"
    gives "$DATA/$1/parquet/data.list" "$DATA/$1/parquet/utt2data.list"
    clears "$DATA/$1/parquet"
    how --num_processes "$NUM_JOBS"
    step "stage3-$1" "$PYTHON" "$COSYVOICE/tools/make_parquet_list.py" \
        --num_utts_per_parquet "$NUM_UTTS_PER_PARQUET" --src_dir "$DATA/$1" --des_dir "$DATA/$1/parquet" "${flags[@]}"
}

speak() {
    local prompts="$DATA/$PROMPT_PART/parquet"
    needs 3 "$prompts/data.list" "$prompts/utt2data.list"
    needs "$GET_MODEL" "$MODEL_DIR/llm.pt" "$MODEL_DIR/flow.pt" "$MODEL_DIR/hift.pt"
    needs "write it: {utterance: [text, ...]}" "$TTS_TEXT"
    gives "$EXP/inference/$1/wav.scp"
    clears "$EXP/inference/$1"
    how --device "$DEVICE"
    step "stage4-$1" "$PYTHON" "$COSYVOICE/cosyvoice/bin/inference.py" --mode "$1" --config "$CONFIG" \
        --prompt_data "$prompts/data.list" --prompt_utt2data "$prompts/utt2data.list" --tts_text "$TTS_TEXT" \
        --llm_model "$MODEL_DIR/llm.pt" --flow_model "$MODEL_DIR/flow.pt" --hifigan_model "$MODEL_DIR/hift.pt" \
        --result_dir "$EXP/inference/$1"
}

# join_lists NAME PART...: one list of all shards of these parts; left as it is where nothing changes.
join_lists() {
    local list="$DATA/$1.data.list" part
    shift
    (($#)) || fail "PARTS names no part for $(basename -- "$list"); add one whose name begins with ${list##*/}"
    for part in "$@"; do needs 3 "$DATA/$part/parquet/data.list"; done
    expect_needs "stage 5"
    for part in "$@"; do cat -- "$DATA/$part/parquet/data.list"; done >"$list.tmp"
    if cmp --silent -- "$list.tmp" "$list"; then rm -- "$list.tmp"; else mv -- "$list.tmp" "$list"; fi
}

train_model() {
    local part
    local -a python=("$PYTHON") flags=()
    ((NUM_PROCESSES == 1)) ||
        python+=(-m torch.distributed.run --standalone --nnodes 1 --nproc_per_node "$NUM_PROCESSES")
    [[ -z "$MAX_EPOCH" ]] || flags+=(--max_epoch "$MAX_EPOCH")
    [[ -z "$MAX_STEPS" ]] || flags+=(--max_steps "$MAX_STEPS")
    if [[ "$FROM_SCRATCH" == false ]]; then
        needs "$GET_MODEL" "$MODEL_DIR/${PART_FILE[$1]}"
        flags+=(--checkpoint "$MODEL_DIR/${PART_FILE[$1]}")
    fi
    for part in "${TRAIN_PARTS[@]}" "${DEV_PARTS[@]}"; do needs 3 "$DATA/$part/parquet/data.list"; done
    gives "$EXP/$1/metrics.jsonl"
    clears "$EXP/$1" "$WORK_DIR/tensorboard/$1"
    step "stage5-$1" "${python[@]}" "$COSYVOICE/cosyvoice/bin/train.py" --model "$1" --config "$CONFIG" \
        --train_data "$DATA/train.data.list" --cv_data "$DATA/dev.data.list" --model_dir "$EXP/$1" \
        --tensorboard_dir "$WORK_DIR/tensorboard/$1" --num_workers "$NUM_WORKERS" --dtype "$DTYPE" \
        "${flags[@]}"
}

average_model() {
    needs 5 "$EXP/$1/metrics.jsonl"
    gives "$EXP/$1/$1.pt"
    step "stage6-$1" "$PYTHON" "$COSYVOICE/cosyvoice/bin/average_model.py" --dst_model "$EXP/$1/$1.pt" \
        --src_path "$EXP/$1" --num "$(at_most_epochs "$EXP/$1" "$AVERAGE_NUM")" --val_best
}

# collect_model MODEL...: put what was trained, and of MODEL_DIR what was not, into one folder.
# shellcheck disable=SC2317 # a step runs it
collect_model() {
    local model file fresh="$EXP/.model.writing"
    rm -rf -- "$fresh"
    mkdir -p -- "$fresh"
    cp -- "$CONFIG" "$fresh/cosyvoice.yaml"
    for file in campplus.onnx speech_tokenizer_v1.onnx llm.pt flow.pt hift.pt spk2info.pt; do
        [[ ! -f "$MODEL_DIR/$file" ]] || cp -- "$MODEL_DIR/$file" "$fresh/$file"
    done
    for model in "$@"; do cp -- "$EXP/$model/$model.pt" "$fresh/${PART_FILE[$model]}"; done
    rm -rf -- "$EXP/model"
    mv -- "$fresh" "$EXP/model"
}

export_model() {
    local model
    local -a models
    read -r -a models <<<"$MODELS"
    for model in "${models[@]}"; do needs 6 "$EXP/$model/$model.pt"; done
    needs "$GET_MODEL" "$MODEL_DIR/campplus.onnx" "$MODEL_DIR/speech_tokenizer_v1.onnx"
    gives "$EXP/model/cosyvoice.yaml"
    step stage7-collect collect_model "${models[@]}"
    for model in jit onnx; do
        needs 7 "$EXP/model/cosyvoice.yaml" "$EXP/model/llm.pt" "$EXP/model/flow.pt"
        step "stage7-$model" "$PYTHON" "$COSYVOICE/cosyvoice/bin/export_$model.py" --model_dir "$EXP/model"
    done
}

main() {
    local name
    begin_recipe "$@"
    expect_words PARTS train-clean-100 train-clean-360 train-other-500 dev-clean dev-other test-clean test-other
    expect_words MODELS llm flow hifigan
    expect_words MODES sft zero_shot
    expect_number NUM_THREAD NUM_UTTS_PER_PARQUET NUM_JOBS NUM_PROCESSES AVERAGE_NUM
    [[ -z "$BATCH_SIZE" ]] || expect_number BATCH_SIZE
    [[ "$NUM_WORKERS" == 0 ]] || expect_number NUM_WORKERS
    find_python "$REPOSITORY"
    DATA="$WORK_DIR/data" EXP="$WORK_DIR/exp"
    mapfile -t TRAIN_PARTS < <(parts_like train)
    mapfile -t DEV_PARTS < <(parts_like dev)
    mkdir -p -- "$DATA" "$EXP"

    if stage -1 "fetch and unpack"; then for name in $PARTS; do fetch_part "$name"; done; fi
    if stage 0 "wav.scp, text, utt2spk, spk2utt"; then for name in $PARTS; do list_part "$name"; done; fi
    if stage 1 "speaker vectors"; then for name in $PARTS; do embed_part "$name"; done; fi
    if stage 2 "speech tokens"; then for name in $PARTS; do tokenize_part "$name"; done; fi
    if stage 3 "Parquet shards"; then for name in $PARTS; do pack_part "$name"; done; fi
    if stage 4 "inference"; then for name in $MODES; do speak "$name"; done; fi
    if stage 5 "training of $MODELS"; then
        join_lists train "${TRAIN_PARTS[@]}"
        join_lists dev "${DEV_PARTS[@]}"
        for name in $MODELS; do train_model "$name"; done
    fi
    if stage 6 "averaging"; then for name in $MODELS; do average_model "$name"; done; fi
    if stage 7 "export"; then export_model; fi
    end_recipe
}

main "$@"
