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

The same command goes on where it was stopped or killed. Exit codes: 0 done, 1 error, 2 unknown flag, 130 stopped by
Ctrl-C, 143 by SIGTERM (both with everything saved).
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import taste
from cosyvoice.utils.model_dir import ModelSizes, get_tokenizer, sizes
from taste.aggregator import SimpleTextSpeechAggregator
from taste.checkpoint import code_commit, load_checkpoint, write_json
from taste.data import FeaturePaths, UtteranceDataset, features_exist, hold_out, open_dataset, spread_evenly
from taste.fitted_start import fit_new_parts
from taste.generation import Sampling
from taste.interrupt import StopRequest
from taste.metrics import describe_attention
from taste.model import CosyVoiceS3Model, build_model
from taste.output_lock import OutputBusyError, OutputLock
from taste.plots import plot_losses
from taste.results import (
    attention_of,
    decode_units,
    draw_alignments,
    epoch_line,
    generate_units,
    report_units,
    summary,
)
from taste.scoring import evaluate
from taste.settings import Settings, parse_settings, pick_device
from taste.synthesis import UnitDecoder
from taste.training import NonFiniteLossError, RunStopped, Trainer, TrainingConfig
from taste.warm_start import find_start, start_from

if TYPE_CHECKING:
    from accelerate import Accelerator

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

# --- what to train ------------------------------------------------------------
VARIANT = "simple"  # text_only: CosyVoice's own LM; simple: told by the recording through an aggregator
INIT_FROM = None  # str: run whose weights start this one (exp/<run> or a checkpoint file); none: the model folder's
FIT_NEW_PARTS = True  # fit the new parts to the training set before the first step; False: they begin at random
FREEZE_LLM = False  # True: only the new parts learn; False: everything from the text encoder to the output layer
USE_SPEAKER = True  # give the LM the speaker's vector
NUM_EPOCHS = 20  # passes over the training set; 0: train nothing, evaluate and generate only
BATCH_SIZE = 8  # utterances a process looks at together; 16 for 300M on a GPU with 24 GB
ACCUMULATION_STEPS = 1  # batches that make one step of the optimizer; 4 for 300M
LR = 3e-4  # peak learning rate of the pretrained parts, where they learn; for 300M 2e-5
NEW_PARTS_LR = 3e-3  # peak learning rate of the new parts, which text_only has none of; for 300M 1e-4
WARMUP_STEPS = 10  # steps until the peak; 1000 for 300M
WEIGHT_DECAY = 0.01  # AdamW's, on matrices only
GRAD_CLIP = 1.0  # largest norm of a step's gradient
SEED = 0  # of the new parts' weights, the order of the data, dropout, and sampling
NUM_WORKERS = 0  # processes that load features; 4 where these are many and on a slow disk
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
RESUME = "auto"  # auto: go on from this run's last checkpoint; never: start anew, over it; or a checkpoint's path
CHECKPOINT_EVERY = 0  # steps between checkpoints within an epoch; 0: at its end only

# --- what to show ------------------------------------------------------------
GENERATE_UTTERANCES = 15  # test utterances to generate freely; 0: none
GENERATE_BATCH_SIZE = 8  # utterances generated together
SAMPLING = "ras"  # greedy, top_k, ras (repetition-aware, as the model folder configures it)
TOP_K = 10  # codes that top_k draws from; the paper: 10, and 25 for text_only
LEAST_UNITS_PER_TOKEN = 3.0  # the end is forbidden before so many units a text token
MOST_UNITS_PER_TOKEN = 30.0  # and forced at so many
DECODE_WAVS = 4  # generated utterances to decode to sound and to draw, beside the true units; 0: none
RUN_NAME = None  # str: folder under EXP_DIR; none: the variant's name
EXP_DIR = "exp"  # where runs lie
LOSS_CURVE_PATH = None  # str: picture of the losses; none: loss_curve.png beside this script

# settings that a run cannot change half-way
_DECIDES_TRAINING = (
    *("variant", "init_from", "fit_new_parts", "freeze_llm", "use_speaker", "batch_size", "accumulation_steps", "lr"),
    *("new_parts_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"),
)


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
            run(settings, lambda: stop.requested)
        except RunStopped as stopped:
            print(f"model_code.py: {stopped}. The same command goes on from there.", file=sys.stderr)
            return stop.exit_code if stop.requested else 128 + signal.SIGTERM  # another process was asked
        except (ValueError, OSError, OutputBusyError, NonFiniteLossError) as error:
            print(f"model_code.py: error: {error}", file=sys.stderr)
            return 1
    return 0


def run(settings: Settings, stop_requested: Callable[[], bool]) -> None:
    """The stage from settings to results.

    Args:
        settings: the script's constants, as the command line left them.
        stop_requested: asked between batches.

    Raises:
        RunStopped: it was asked to stop.
        ValueError: something in settings, features or checkpoints does not fit; the message says what.
        OSError: a file is missing, or the disk is full.
        OutputBusyError: another process works on this run.
    """
    from accelerate import Accelerator

    device = pick_device(settings.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    say = print if accelerator.is_main_process else _say_nothing
    run_folder = Path(settings.exp_dir) / (settings.run_name or settings.variant)
    sampling = Sampling(
        settings.sampling, settings.top_k, settings.least_units_per_token, settings.most_units_per_token
    )
    say(f"settings of {run_folder}:\n{settings.describe()}\n")

    model_sizes = sizes(settings.cosyvoice_model_dir)
    train_set, test_set = open_data(settings, model_sizes, say)
    use_speaker = settings.use_speaker and train_set.has_speakers and test_set.has_speakers
    if settings.use_speaker and not use_speaker:
        say("no utterance info: the speaker's position is left out (as with --no-use-speaker)")
    torch.manual_seed(settings.seed)
    model = build_model(
        settings.cosyvoice_model_dir,
        settings.variant,
        speech_width=train_set.speech_width,
        freeze_llm=settings.freeze_llm,
        use_speaker=use_speaker,
    )
    say(describe_model(model))

    with _sole_writer(run_folder, accelerator):
        checkpoint, start = find_checkpoint(settings, run_folder), None
        if settings.init_from and not checkpoint:
            start = start_from(model, find_start(settings.init_from, Path(settings.exp_dir)))
            say(describe_start(start))
        fitted = None
        if not checkpoint and settings.fit_new_parts and has_new_parts(model, start):
            fitted = fit_new_parts(model, train_set)
            say(describe_fit(fitted))
        if settings.num_epochs:
            origin = {"started_from": start, "fitted": fitted}
            results = train(
                settings, model, train_set, test_set, run_folder, accelerator, checkpoint, origin, stop_requested
            )
        else:
            say(f"evaluating {checkpoint or settings.init_from or 'the model folder as it is'}")
            results = evaluate_only(settings, model, test_set, accelerator, checkpoint)
        if accelerator.is_main_process:
            results |= show(settings, model, test_set, sampling, run_folder, accelerator.device, stop_requested)
            settings.save(run_folder / "settings.json")
            write_json(run_folder / "metrics.json", results)
            print(summary(results, run_folder))


def open_data(
    settings: Settings, model_sizes: ModelSizes, say: Callable[[str], None]
) -> tuple[UtteranceDataset, UtteranceDataset]:
    """Open the training set and the test set, or split one off.

    Args:
        settings: paths, variant, seed.
        model_sizes: what the features must fit.
        say: takes what a person should know.

    Returns:
        training set and test set.

    Raises:
        FileNotFoundError: a feature file is missing.
        ValueError: nothing usable, or features of another model.
    """
    train_paths, test_paths = _feature_paths(settings, "train"), _feature_paths(settings, "test")
    train_set = open_dataset(train_paths, model_sizes)
    say(train_set.selection.describe("training set"))
    if any(features_exist(path) for path in (test_paths.units, test_paths.text)):
        test_set = open_dataset(test_paths, model_sizes)
        say(test_set.selection.describe("test set"))
        return train_set, test_set
    train_set, test_set, what_was_done = hold_out(train_set, settings.seed)
    say(what_was_done)
    return train_set, test_set


def find_checkpoint(settings: Settings, run_folder: Path) -> Path | None:
    """The checkpoint that RESUME means: to go on from, or with NUM_EPOCHS = 0 to evaluate.

    Args:
        settings: RESUME and NUM_EPOCHS.
        run_folder: the run's folder.

    Returns:
        the path; None to start from the model folder.

    Raises:
        FileNotFoundError: RESUME names a file that is not there.
    """
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        path = run_folder / "checkpoints" / ("last.pt" if settings.num_epochs else "best.pt")
        return path if path.exists() else None
    path = Path(settings.resume)
    if not path.is_file():
        raise FileNotFoundError(
            f"RESUME is {str(path)!r}: there is no such file; expected auto, never, or a checkpoint"
        )
    return path


def train(
    settings: Settings,
    model: CosyVoiceS3Model,
    train_set: UtteranceDataset,
    test_set: UtteranceDataset,
    run_folder: Path,
    accelerator: "Accelerator",
    checkpoint_path: Path | None,
    origin: dict[str, Any],
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Train, or go on training, and leave the model with its best weights.

    Args:
        settings: how.
        model: what.
        train_set: utterances to learn from.
        test_set: utterances to choose the best epoch by.
        run_folder: where everything is written.
        accelerator: device and processes.
        checkpoint_path: to go on from; None starts anew.
        origin: what `start_from` and `fit_new_parts` noted about the weights that the model starts with, by the names
            `started_from` and `fitted`; None where they were not called.
        stop_requested: asked between batches.

    Returns:
        results for metrics.json: history, best epoch, its test scores, checkpoint.

    Raises:
        RunStopped: it was asked to stop; it has saved.
        NonFiniteLossError: a loss is no number.
        ValueError: the checkpoint does not fit the settings.
    """
    names = [field.name for field in fields(TrainingConfig)]
    config = TrainingConfig(**{name: getattr(settings, name) for name in names})
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else None
    notes = {
        "settings": settings.to_dict(),
        "commit": code_commit(taste.REPOSITORY),
        **({name: checkpoint.notes.get(name) for name in origin} if checkpoint else origin),
    }
    curve_path = Path(settings.loss_curve_path or Path(__file__).with_name("loss_curve.png"))

    def draw(history: list[dict[str, Any]]) -> None:
        plot_losses(curve_path, history, model.eos + 1, f"{run_folder.name} ({settings.variant})")

    def show_epoch(history: list[dict[str, Any]]) -> None:
        print(epoch_line(history[-1]), flush=True)
        draw(history)

    trainer = Trainer(model, train_set, test_set, config, run_folder, accelerator, notes, stop_requested, show_epoch)
    if checkpoint:
        check_same_settings(settings, checkpoint.notes["settings"], checkpoint_path)
        trainer.resume(checkpoint)
        if accelerator.is_main_process:
            print(f"going on from {checkpoint_path}, epoch {trainer.progress.epoch}, step {trainer.progress.step}")
            draw(trainer.progress.history)
    elif accelerator.is_main_process:
        for old_path in (trainer.last_path, trainer.best_path):
            for file in (old_path, old_path.with_suffix(".json")):
                file.unlink(missing_ok=True)
    if accelerator.is_main_process:
        settings.save(run_folder / "settings.json")
    progress = trainer.fit()
    model.load_learned_state(load_checkpoint(trainer.best_path).weights)
    return {
        "checkpoint": str(trainer.best_path),
        **{name: notes[name] for name in origin},
        "test": progress.history[progress.best_epoch]["test"],
        "best_epoch": progress.best_epoch,
        "history": progress.history,
    }


def evaluate_only(
    settings: Settings,
    model: CosyVoiceS3Model,
    test_set: UtteranceDataset,
    accelerator: "Accelerator",
    checkpoint_path: Path | None,
) -> dict[str, Any]:
    """Score a model without training it.

    Args:
        settings: the batch size.
        model: it gets the checkpoint's weights.
        test_set: utterances to score.
        accelerator: device and processes.
        checkpoint_path: weights; None scores the model as it is.

    Returns:
        results for metrics.json.

    Raises:
        ValueError: the checkpoint does not fit the model.
    """
    results: dict[str, Any] = {"checkpoint": str(checkpoint_path or settings.init_from or settings.cosyvoice_model_dir)}
    if checkpoint_path:
        checkpoint = load_checkpoint(checkpoint_path)
        model.load_learned_state(checkpoint.weights)
        results |= {name: checkpoint.notes["progress"][name] for name in ("best_epoch", "history")}
    scores = evaluate(model.to(accelerator.device), test_set, settings.batch_size, accelerator)
    return results | {"test": scores.averages()}


def check_same_settings(settings: Settings, earlier: dict[str, Any], checkpoint_path: Path) -> None:
    """Refuse to go on where that would mix two trainings.

    Args:
        settings: of this run.
        earlier: those the checkpoint was written with.
        checkpoint_path: it.

    Raises:
        ValueError: a setting that decides the training differs (all are named).
    """
    now = settings.to_dict()
    changed = [
        f"{name.upper()} was {earlier.get(name)!r}, is {now[name]!r}"
        for name in _DECIDES_TRAINING
        if earlier.get(name) != now[name]
    ]
    if changed:
        raise ValueError(
            f"{checkpoint_path} was trained with other settings: {'; '.join(changed)}. Choose another --run-name to "
            "keep it, start anew over it with --resume never, or put the settings back to go on"
        )


def show(
    settings: Settings,
    model: CosyVoiceS3Model,
    test_set: UtteranceDataset,
    sampling: Sampling,
    run_folder: Path,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Let the model speak some test utterances, measure what it says, and make it sound.

    Args:
        settings: how many utterances, and the seed.
        model: what was trained.
        test_set: utterances to choose from.
        sampling: how units are chosen.
        run_folder: where pictures and sounds are written.
        device: where the model is.
        stop_requested: asked between batches.

    Returns:
        results for metrics.json; nothing where GENERATE_UTTERANCES is 0.

    Raises:
        RunStopped: it was asked to stop.
    """
    if not settings.generate_utterances:
        return {}
    shown = test_set.subset(spread_evenly(len(test_set), settings.generate_utterances))
    torch.manual_seed(settings.seed)
    units = generate_units(model, shown, settings.generate_batch_size, sampling, device, stop_requested)
    results: dict[str, Any] = {"generation": report_units(shown, units, run_folder)}
    weights = attention_of(model, shown, device) if model.aggregator else []
    if weights:
        results["attention"] = describe_attention(weights)
    if settings.decode_wavs:
        decoder = UnitDecoder(settings.cosyvoice_model_dir, device)
        chosen = spread_evenly(len(shown), settings.decode_wavs)
        decoded, their_units = shown.subset(chosen), units.subset(chosen)
        results["wavs"] = decode_units(decoder, decoded, their_units, run_folder, settings.seed, stop_requested)
        if weights:
            tokenizer = get_tokenizer(settings.cosyvoice_model_dir)
            draw_alignments([weights[index] for index in chosen], decoder, decoded, tokenizer, run_folder)
    return results


def describe_model(model: CosyVoiceS3Model) -> str:
    """One line about what learns.

    Args:
        model: the model.

    Returns:
        the line.
    """
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    return f"model {model.variant}: {learning:,} of {everything:,} parameters learn"


def describe_start(start: dict[str, Any]) -> str:
    """One line about the weights that a run starts with.

    Args:
        start: what `start_from` noted.

    Returns:
        the line.
    """
    new = f"; new: {', '.join(start['new_parts'])}" if start["new_parts"] else ""
    return f"starting from {start['checkpoint']} ({start['variant']}, epoch {start['epoch']}){new}"


def has_new_parts(model: CosyVoiceS3Model, start: dict[str, Any] | None) -> bool:
    """Whether there are parts that neither the model folder nor another run gave weights to.

    Args:
        model: the model.
        start: what `start_from` noted; None where it was not called.

    Returns:
        True where `fit_new_parts` has work.
    """
    return model.aggregator is not None and (start is None or bool(start["new_parts"]))


def describe_fit(fitted: dict[str, Any]) -> str:
    """One line about how well the new parts fit before training.

    Args:
        fitted: what `fit_new_parts` noted.

    Returns:
        the line.
    """
    return (
        f"new parts fitted to {fitted['utterances']} utterances: the projection gives {fitted['text_explained']:.0%} "
        f"of what the text encoder says, {fitted['attention_on_token']:.0%} of a token's attention is where it was "
        f"found spoken (evenly spread: {fitted['attention_on_token_evenly']:.0%})"
    )


@contextmanager
def _sole_writer(run_folder: Path, accelerator: "Accelerator") -> Iterator[None]:
    """Keep a second run out of the folder while this one lasts."""
    lock = OutputLock(run_folder) if accelerator.is_main_process else None
    try:
        yield
    finally:
        if lock:
            lock.release()


def _feature_paths(settings: Settings, split: str) -> FeaturePaths:
    values = {name: Path(path) for name, path in settings.to_dict().items() if name.startswith(f"{split}_utt2")}
    info = values[f"{split}_utt2info_path"]
    return FeaturePaths(
        units=values[f"{split}_utt2_s3_path"],
        text=values[f"{split}_utt2_text_emb_path"],
        speech=None if settings.variant == "text_only" else values[f"{split}_utt2_whisper_path"],
        info=info if features_exist(info) else None,
    )


def _say_nothing(text: str) -> None:
    """What all but the main process print."""


if __name__ == "__main__":
    sys.exit(main())
