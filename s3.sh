#!/usr/bin/env bash
# Stage 2: turn recordings into S3 units, 50 a second, which stage 3 learns to predict.
#
# In:   <JSON_DIR>/{train,test}.jsonl, <MODEL_DIR>/speech_tokenizer_v1.onnx
# Out:  <OUTPUT_DIR>/{split}_utt2s3.pt     {utt_id: [unit, ...]}, and its .failures.jsonl where a recording failed
#
#     bash s3.sh --model-dir CosyVoice-300M      # the full-size model
#     bash s3.sh --splits test                   # the embedded model, under a minute
#
# Run the same command again after any stop: it goes on where it was. Exit codes: 0 all good, 1 error, 2 wrong usage,
# 3 finished but some recordings failed, 130/143 stopped by Ctrl-C or SIGTERM.
#
# Settings: edit them here, or give --lower-case-name VALUE (dashes or underscores), or set the variable of that name.
# What stands here is relative to this file; what is given is relative to the working directory.
set -euo pipefail
HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
source "$HERE/CosyVoice/cosyvoice/utils/settings.sh"

MODEL_DIR="${MODEL_DIR:-$HERE/CosyVoice-tiny}"  # model folder: CosyVoice-300M, or another with the same files
SPLITS="${SPLITS:-train test}"                  # manifests to do, without .jsonl
JSON_DIR="${JSON_DIR:-$HERE/json}"              # folder of the manifests
OUTPUT_DIR="${OUTPUT_DIR:-$HERE/s3_output}"     # folder of the results
BATCH_SIZE="${BATCH_SIZE:-16}"                  # recordings at once (s3tokenizer)
DEVICE="${DEVICE:-auto}"                        # auto, cpu, cuda, cuda:1
BACKEND="${BACKEND:-s3tokenizer}"               # s3tokenizer (batched, PyTorch) or onnxruntime (the reference)
NUM_THREAD="${NUM_THREAD:-8}"                   # threads that read recordings
PYTHON="${PYTHON:-}"                            # interpreter; empty takes this folder's .venv, else python3

main() {
    read_flags "$@"
    local tokenizer="$MODEL_DIR/speech_tokenizer_v1.onnx" split manifest status result=0
    local -a splits
    read -r -a splits <<<"$SPLITS"
    ((${#splits[@]})) || refuse_usage "SPLITS names no manifest"
    find_python "$HERE"
    [[ -f "$tokenizer" ]] || fail "there is no $tokenizer; run: python setup_cosyvoice.py --model-dir $MODEL_DIR"

    for split in "${splits[@]}"; do
        manifest="$JSON_DIR/$split.jsonl"
        if [[ ! -f "$manifest" ]]; then
            [[ "$split" == test ]] || fail "there is no $manifest; write it (README, 'Your own data'), or give --json-dir"
            echo "there is no $manifest: stage 3 will take its test set out of the training set"
            continue
        fi
        echo "== $split: $manifest -> $OUTPUT_DIR/${split}_utt2s3.pt"
        status=0
        run_stoppable "$PYTHON" "$HERE/CosyVoice/tools/extract_speech_token.py" \
            --manifest "$manifest" --output "$OUTPUT_DIR/${split}_utt2s3.pt" --onnx_path "$tokenizer" \
            --batch_size "$BATCH_SIZE" --device "$DEVICE" --backend "$BACKEND" --num_thread "$NUM_THREAD" || status=$?
        case "$status" in
            0) ;;
            3) result=3 ;; # the other recordings and splits go on
            *) exit "$status" ;;
        esac
    done
    exit "$result"
}

main "$@"
