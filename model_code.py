"""Stage 3: train a model that predicts S3 units from text and speech, evaluate it, and let it speak.

Reads what stages 1 and 2 wrote (utt2_output/, s3_output/) and a model folder. Writes loss_curve.png beside this script,
and everything else under exp/<run>/: settings.json, metrics.jsonl (every step), metrics.json (the results),
checkpoints/, generated_units.json, wavs/ (each utterance: original, true units, predicted) and figures/ (their mels,
the alignment of text and recording, the units).

    python model_code.py                                       # train, evaluate, generate, decode to sound
    python model_code.py --variant text_only                   # the baseline that hears nothing
    python model_code.py --init-from text_only                 # and one that starts from its weights
    python model_code.py --num-epochs 1 --decode-wavs 1        # a look in half a minute
    python model_code.py --num-epochs 0 --resume exp/simple/checkpoints/best.pt    # evaluate and generate only
    accelerate launch --num_processes 4 model_code.py          # four GPUs

The same command goes on where it was stopped or killed (with --resume auto, the default). Exit codes: 0 done,
1 error, 2 unknown flag, 3 done but some recordings could not be encoded, 130 stopped by Ctrl-C, 143 by SIGTERM (both
with everything saved).
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

# read when torch is imported: batches of many lengths leave gaps in a GPU's memory that nothing else fits into
os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

import torch

import taste  # noqa: F401 -- makes cosyvoice importable
from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE, StopRequest
from cosyvoice.utils.model_dir import sizes
from cosyvoice.utils.output_lock import OutputBusyError
from cosyvoice.utils.settings import Settings, describe_device, parse_settings, pick_device
from cosyvoice.utils.stops import NonFiniteLossError, RunStopped
from taste.aggregator import SimpleTextSpeechAggregator
from taste.comparison import compare_variants
from taste.model import CosyVoiceS3Model
from taste.released_run import evaluate_released
from taste.run_files import run_folder_of
from taste.samples import sampling_of
from taste.size_defaults import with_defaults
from taste.tokenizer_run import decode_folder, encode_manifest
from taste.variant_run import run_variant

__all__ = ["CosyVoiceS3Model", "SimpleTextSpeechAggregator", "main"]

# --- what to read ------------------------------------------------------------
TRAIN_UTT2_S3_PATH = "s3_output/train_utt2s3.pt"  # S3 units to learn, by utterance (stage 2)
TRAIN_UTT2_TEXT_EMB_PATH = "utt2_output/train_text_emb.pt"  # text embeddings (stage 1)
TRAIN_UTT2_WHISPER_PATH = "utt2_output/train_whisper_feats.pt"  # Whisper features (stage 1); text_only needs none
TRAIN_UTT2INFO_PATH = "utt2_output/train_utt2info.pt"  # speaker vectors, durations (stage 1); without it no speakers
TEST_UTT2_S3_PATH = "s3_output/test_utt2s3.pt"  # the same for testing; where none of them exists, a tenth is split off
TEST_UTT2_TEXT_EMB_PATH = "utt2_output/test_text_emb.pt"  # text embeddings for testing
TEST_UTT2_WHISPER_PATH = "utt2_output/test_whisper_feats.pt"  # Whisper features for testing
TEST_UTT2INFO_PATH = "utt2_output/test_utt2info.pt"  # speaker vectors for testing
COSYVOICE_MODEL_DIR = "CosyVoice-tiny"  # model folder; CosyVoice-300M for the real one
WHISPER_DIR = None  # str: Whisper in transformers' format, for codes and controls; none: <COSYVOICE_MODEL_DIR>/whisper
MID_LAYER = 6  # Whisper block that stage 1 tapped

# --- what to train ------------------------------------------------------------
MODE = "train"  # train: train and evaluate; encode: recordings to codes; decode: codes to sound (of variant taste)
VARIANT = (
    "simple"  # text_only: hears nothing; simple; taste_novq; taste: the paper's, quantized; all: one after another
)
INIT_FROM = None  # str: run whose weights start this one (exp/<run> or a checkpoint file); none: the model folder's
STAGED_TRAINING = True  # with VARIANT all: each starts from the one before (text_only, taste_novq, taste)
LOAD_PRETRAINED_MODULES = True  # start new modules from <COSYVOICE_MODEL_DIR>/taste.pt, where it fits
DATA_DEPENDENT_INIT = True  # fit all other new modules to the training set before the first step; False: random
FREEZE_LLM = False  # True: only the new modules learn; False: everything from the text encoder to the output layer
LORA_RANK = 0  # above 0: adapters of this rank learn in the frozen language model (FREEZE_LLM; needs peft)
USE_SPEAKER = True  # give the LM the speaker's vector
NUM_EPOCHS = 20  # passes over the training set; 0: train nothing, evaluate and generate only
# None takes what suits the model's size: the first value for CosyVoice-tiny, the second for 300M
BATCH_SIZE = None  # int: utterances a process looks at together; 8, 4 (on a GPU with 24 GB)
ACCUMULATION_STEPS = None  # int: batches that make one step of the optimizer; 1, 16
LR = None  # float: peak learning rate of what the model folder holds, where it learns; 3e-5, 2e-5
NEW_MODULES_LR = None  # float: peak learning rate of all other modules, which text_only has none of; 3e-3, 1e-4
WARMUP_STEPS = None  # int: steps until the peak; 10, 200
WEIGHT_DECAY = 0.01  # AdamW's, on matrices only
GRAD_CLIP = 1.0  # largest norm of a step's gradient
SEED = 0  # of the new modules' weights, the order of the data, dropout, and sampling
NUM_WORKERS = 0  # processes that load features; 4 where these are many and on a slow disk
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
RESUME = "auto"  # auto: go on from this run's last checkpoint; never: start anew, over it; or a checkpoint's path
CHECKPOINT_EVERY = 0  # steps between checkpoints within an epoch; 0: none by their number
CHECKPOINT_MINUTES = 10.0  # minutes between checkpoints within an epoch, the most that a kill costs; 0: at its end only

# --- sizes of what taste_novq and taste have beside the language model -----------
AGGREGATOR_LAYERS = 2  # cross-attention layers that gather the speech of each text token
AGGREGATOR_HEADS = None  # int: their heads, which divide the width of the Whisper features; none: 4, for 300M 20
AGGREGATOR_FROM_WHISPER = False  # start them from Whisper's own decoder (WHISPER_DIR), where it has one of that size
FREEZE_AGGREGATOR_BOTTOM = False  # with that: its embeddings and first layer stay Whisper's, as in the published code
AUDIO_LAYERS = 2  # conformer blocks that encode the speech of the words
AUDIO_HEADS = None  # int: their heads; none: 4, for 300M 8
AUDIO_FFN_DIM = None  # int: width of their feed-forward networks; none: 512, for 300M 2048
AUDIO_DROPOUT = 0.1  # in them
FUSION = "weighted_sum"  # of text and speech: weighted_sum, sum, concat, concat_with_sep
FUSION_INIT = "balance"  # of the weighted sum: balance, or zero_audio: nearly deaf at first
NUM_QUANTIZERS = 4  # codes of a word
CODEBOOK_SIZE = 512  # different codes of each
CODEBOOK_DIM = None  # int: channels in which they are compared; none: 64, for 300M 256
QUANTIZE_DROPOUT = True  # in training use only the first of the codebooks now and then

# --- MODE encode and decode ---------------------------------------------------
ENCODE_JSONL = "json/test.jsonl"  # manifest of the recordings to encode
TASTE_CHECKPOINT = None  # str: folder of a released TASTE-V0, to encode, decode, evaluate; none: what the run trained
CODES_DIR = None  # str: where codes are written to and read from; none: exp/<run>/codes

# --- what to show ------------------------------------------------------------
NEGATIVE_CONTROLS = True  # also score the test set with another utterance's recording, and with silence
GENERATE_UTTERANCES = 15  # test utterances to generate freely; 0: none
GENERATE_BATCH_SIZE = 8  # utterances generated together
SAMPLING = "ras"  # greedy, top_k, ras (repetition-aware, as the model folder configures it)
TOP_K = 10  # codes that top_k draws from; the paper: 10, and 25 for text_only
TAU_R = None  # float: share of the last ten units at which ras strikes one out; none: the folder's, 0.4 for what hears
MIN_UNITS_PER_TOKEN = 3.0  # the end is forbidden before so many units a text token
MAX_UNITS_PER_TOKEN = 30.0  # and forced at so many
DECODE_WAVS = 4  # generated utterances to decode to sound and to draw, beside the true units; 0: none
EVALUATE_AUDIO = True  # hold these sounds against the recordings: words, voice, melody, durations; seconds each
TENSORBOARD = True  # write exp/<run>/tensorboard beside the report
RUN_NAME = None  # str: folder under EXP_DIR; none: the variant's name
EXP_DIR = "exp"  # where runs lie
LOSS_CURVE_PATH = None  # str: picture of the losses; none: loss_curve.png beside this script

_PATIENCE = timedelta(days=1)  # of a process that waits for another one


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage.

    Args:
        argv: command-line words without the program's name; None takes those of the process.

    Returns:
        the exit code.
    """
    settings = parse_settings(__file__, globals(), argv)
    with StopRequest() as stop:
        try:
            return run(settings, lambda: stop.requested)
        except RunStopped as stopped:
            anew = settings.mode == "train" and settings.num_epochs and settings.resume != "auto"
            again = "The same command with --resume auto" if anew else "The same command"
            print(f"model_code.py: {stopped}. {again} goes on from there.", file=sys.stderr)
            return stop.exit_code
        except (ValueError, OSError, OutputBusyError, NonFiniteLossError) as error:
            print(f"model_code.py: error: {error}", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError as error:
            print(
                f"model_code.py: error: the device is out of memory ({error}). What was trained is saved; go on with "
                "--evaluate-audio false, a smaller --generate-batch-size, or --device cpu",
                file=sys.stderr,
            )
            return 1


def run(settings: Settings, stop_requested: Callable[[], bool]) -> int:
    """What MODE and VARIANT ask for.

    Args:
        settings: the script's constants, as the command line left them.
        stop_requested: asked between batches.

    Returns:
        the exit code: 0, or 3 where recordings could not be encoded.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: something in settings, features or checkpoints does not fit; the message says what.
        OSError: a file is missing, or the disk is full.
        OutputBusyError: another process works on this run.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

    device = pick_device(settings.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    sampling_of(settings)  # a wrong value is told now, not after training
    if settings.mode == "encode":
        return 0 if encode_manifest(settings, device, stop_requested) else SOME_FAILED_EXIT_CODE
    if settings.mode == "decode":
        decode_folder(settings, device, stop_requested)
        return 0
    if settings.mode != "train":
        raise ValueError(f"MODE is {settings.mode!r}; expected train, encode or decode")
    settings = with_defaults(settings, sizes(settings.cosyvoice_model_dir))
    # precision and accumulation are the training loop's, whatever a launcher's configuration says
    once = GradientAccumulationPlugin(num_steps=1)
    # the others wait while the main process lets the model speak and measures what it says, which may take an hour
    patience = InitProcessGroupKwargs(timeout=_PATIENCE)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no", gradient_accumulation_plugin=once, kwargs_handlers=[patience]
    )
    if accelerator.is_main_process:
        print(f"settings of {run_folder_of(settings)}:\n{settings.describe()}\n")
        print(f"on {describe_device(accelerator.device)}")
    loss_curve = Path(settings.loss_curve_path or Path(__file__).with_name("loss_curve.png"))
    if settings.taste_checkpoint:
        evaluate_released(settings, accelerator, stop_requested)
    elif settings.variant == "all":
        compare_variants(settings, accelerator, loss_curve, stop_requested)
    else:
        run_variant(settings, accelerator, loss_curve, stop_requested)
    return 0


if __name__ == "__main__":
    sys.exit(main())
