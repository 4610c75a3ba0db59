"""What a trained model says: its units beside the true ones, as numbers, pictures and sound."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.stops import leave_if_asked
from taste.audio import AudioError, read_audio
from taste.batch import collate
from taste.data import UtteranceDataset
from taste.epoch_plan import batches_by_length
from taste.evaluation import feature_loader
from taste.generation import Generated, Sampling, generate
from taste.metrics import compare_units, on_recording
from taste.model import CosyVoiceS3Model
from taste.plots import plot_alignment, plot_mels, plot_units
from taste.progress_bar import progress_bar
from taste.run_files import RESULTS_FILE
from taste.subsample import spread_evenly
from taste.synthesis import LEAST_UNITS, UnitDecoder

SHOWN_UNITS = 24
SHOWN_UTTERANCES = 3
STOPPED = "stopped before all results were shown; what was trained is saved"


def generate_units(
    model: CosyVoiceS3Model,
    dataset: UtteranceDataset,
    batch_size: int,
    sampling: Sampling,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> Generated:
    """Let the model speak every utterance of a data set.

    Args:
        model: on the device.
        dataset: the utterances.
        batch_size: utterances generated together.
        sampling: how units are chosen.
        device: where to compute.
        stop_requested: asked between batches.

    Returns:
        units in the order of the data set.

    Raises:
        RunStopped: it was asked to stop.
    """
    batches = batches_by_length(dataset.lengths, batch_size)
    units: list[list[int]] = [[] for _ in range(len(dataset))]
    ended = [False] * len(dataset)
    start = time.perf_counter()
    shown = progress_bar(batches, "generating", "batches")
    for indices, batch in zip(shown, feature_loader(dataset, batches), strict=True):
        leave_if_asked(stop_requested, STOPPED)
        made = generate(model, batch.to(device), sampling)
        for index, row_units, row_ended in zip(indices, made.units, made.ended, strict=True):
            units[index], ended[index] = row_units, row_ended
    seconds = time.perf_counter() - start
    count = sum(map(len, units))
    print(f"generated {count} units of {len(dataset)} utterances in {seconds:.1f} s ({count / seconds:.0f} units/s)")
    return Generated(units, ended)


def report_units(dataset: UtteranceDataset, made: Generated, run_folder: Path) -> dict[str, Any]:
    """Hold generated units against the true ones: numbers, a file with both, and a picture.

    Args:
        dataset: the utterances.
        made: what was generated for them.
        run_folder: where to write.

    Returns:
        the measures by name.
    """
    true = [dataset.features.units[utt_id] for utt_id in dataset.utt_ids]
    rows = list(zip(dataset.utt_ids, true, made.units, made.ended, strict=True))
    units = {
        utt_id: {"true": list(row), "generated": predicted, "ended": ended} for utt_id, row, predicted, ended in rows
    }
    write_json(run_folder / "generated_units.json", units)
    shown = [rows[index] for index in spread_evenly(len(rows), SHOWN_UTTERANCES)]
    plot_units(
        run_folder / "figures" / "units.png",
        [(utt_id, row, predicted) for utt_id, row, predicted, _ in shown],
    )
    for utt_id, row, predicted, _ in shown:
        print(f"\n{utt_id}: {dataset.info(utt_id).get('text', '')}")
        print(f"  true      ({len(row):4d})  {' '.join(map(str, row[:SHOWN_UNITS]))} ...")
        print(f"  generated ({len(predicted):4d})  {' '.join(map(str, predicted[:SHOWN_UNITS]))} ...")
    return compare_units(true, made.units, made.ended).to_dict()


def decode_units(
    decoder: UnitDecoder,
    dataset: UtteranceDataset,
    made: Generated,
    run_folder: Path,
    seed: int,
    stop_requested: Callable[[], bool],
) -> list[str]:
    """Turn true and generated units into sound, and draw how it looks below the recording.

    Each utterance gets `wavs/<utt>_{original,true_units,predicted}.wav`, all at the model's rate, and
    `figures/<utt>_mel.png`, where every panel is the mel spectrogram of one of these sounds.

    Args:
        decoder: flow and HiFT.
        dataset: the utterances.
        made: what was generated for them.
        run_folder: `wavs/` and `figures/` are written here.
        seed: of the decoder's noise.
        stop_requested: asked between utterances.

    Returns:
        paths of the wav files.

    Raises:
        RunStopped: it was asked to stop.
    """
    written, too_short = [], []
    for index, utt_id in enumerate(progress_bar(dataset.utt_ids, "decoding", "utterances")):
        leave_if_asked(stop_requested, STOPPED)
        sounds: dict[str, tuple[str, torch.Tensor]] = {}  # ending of the file's name -> title, waveform
        original = read_original(decoder, dataset.info(utt_id).get("audio_path"))
        if original is not None:
            sounds["original"] = "original recording", original
        true, predicted = dataset.features.units[utt_id], made.units[index]
        for name, title, units in (
            ("true_units", "true units → flow → HiFT", true),
            ("predicted", "predicted units → flow → HiFT", predicted),
        ):
            if len(units) < LEAST_UNITS:
                too_short.append(f"{utt_id}_{name}")
                continue
            speech = decoder.decode(units, dataset.speaker(utt_id), seed)
            sounds[name] = f"{title} ({len(units)} units)", speech.waveform
        for name in ("original", "true_units", "predicted"):  # none of an earlier model stays
            (run_folder / "wavs" / f"{utt_id}_{name}.wav").unlink(missing_ok=True)
        for name, (_, waveform) in sounds.items():
            path = run_folder / "wavs" / f"{utt_id}_{name}.wav"
            write_wav(path, waveform, decoder.sample_rate_hz)
            written.append(str(path))
        if sounds:
            mels = {title: decoder.mel(waveform) for title, waveform in sounds.values()}
            plot_mels(run_folder / "figures" / f"{utt_id}_mel.png", mels, _title(dataset, utt_id))
    if too_short:
        print(f"too short for a sound, no wav written: {', '.join(too_short)}")
    return written


def attention_of(model: CosyVoiceS3Model, dataset: UtteranceDataset, device: torch.device) -> list[torch.Tensor]:
    """Where the aggregator looks for each text token.

    Args:
        model: on the device; it has an aggregator.
        dataset: the utterances.
        device: where to compute.

    Returns:
        for each utterance weights [T, A], on the CPU.
    """
    return [
        on_recording(model.attention(collate([example]).to(device))[0].cpu(), dataset.recording_frames(example.utt_id))
        for example in map(dataset.__getitem__, range(len(dataset)))
    ]


def draw_alignments(
    weights: Sequence[torch.Tensor], decoder: UnitDecoder, dataset: UtteranceDataset, tokenizer: Any, run_folder: Path
) -> None:
    """Draw where the aggregator looks for each text token, `figures/<utt>_alignment.png`.

    Args:
        weights: of each utterance, [T, A].
        decoder: knows the model's mel.
        dataset: the utterances.
        tokenizer: of the model folder; it names the tokens.
        run_folder: `figures/` is written here.
    """
    for utt_id, rows in zip(dataset.utt_ids, weights, strict=True):
        info = dataset.info(utt_id)
        if "text_token" in info:
            labels = [tokenizer.decode([int(token)]) for token in info["text_token"]]
        else:  # features of another script
            labels = [str(number) for number in range(len(rows))]
        original = read_original(decoder, info.get("audio_path"))
        mel = None if original is None else decoder.mel(original)
        plot_alignment(run_folder / "figures" / f"{utt_id}_alignment.png", rows, labels, mel, _title(dataset, utt_id))


def read_original(decoder: UnitDecoder, audio_path: str | None) -> torch.Tensor | None:
    """The recording itself, for comparison.

    Args:
        decoder: knows the model's rate.
        audio_path: as stage 1 noted it; None where nobody did.

    Returns:
        waveform [N] at the model's rate; None where the recording is not to be had any more.
    """
    if audio_path is None:
        return None
    try:
        return read_audio(audio_path, decoder.sample_rate_hz).waveform
    except AudioError as error:
        print(f"no original to compare with: {error}")
        return None


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


def describe_fit(fitted: dict[str, Any]) -> str:
    """One line about how well the new modules fit before training.

    Args:
        fitted: what `fit_new_parts` noted.

    Returns:
        the line.
    """
    parts = []
    if "text_explained" in fitted:
        parts.append(f"the projection gives {fitted['text_explained']:.0%} of what the text encoder says")
    if "attention_on_token" in fitted:
        parts.append(
            f"{fitted['attention_on_token']:.0%} of a token's attention is where it was found spoken (evenly spread: "
            f"{fitted['attention_on_token_evenly']:.0%})"
        )
    if "code_usage" in fitted:
        parts.append(f"training words use {', '.join(f'{share:.0%}' for share in fitted['code_usage'])} of the codes")
    return f"new modules fitted to {fitted['utterances']} utterances{': ' if parts else ''}{', '.join(parts)}"


def epoch_line(entry: dict[str, Any]) -> str:
    """One epoch's scores.

    Args:
        entry: of the history.

    Returns:
        a line.
    """
    parts = [f"epoch {entry['epoch']:3d}"]
    for name in ("train", "test"):
        if scores := entry[name]:
            parts.append(f"{name} {scores['loss']:.4f} (top-1 {scores['top1']:.3f}, top-5 {scores['top5']:.3f})")
    return "   ".join(parts)


def summary(results: dict[str, Any], run_folder: Path) -> str:
    """The table at the end.

    Args:
        results: what metrics.json holds.
        run_folder: where it lies.

    Returns:
        a line a result.
    """
    rows = [("checkpoint", results["checkpoint"])]
    if results.get("history"):
        before = results["history"][0]["test"]
        rows += [("test loss before training", f"{before['loss']:.3f}"), ("best epoch", str(results["best_epoch"]))]
    names = {"loss": "test loss", "top1": "test top-1", "top5": "test top-5"}
    rows += [(names[name], f"{value:.3f}") for name, value in results["test"].items()]
    for name, value in results.get("generation", {}).items():
        rows.append((f"generated: {name.replace('_', ' ')}", str(value) if isinstance(value, int) else f"{value:.3f}"))
    rows += [
        (f"attention: {name.replace('_', ' ')}", f"{value:.3f}") for name, value in results.get("attention", {}).items()
    ]
    rows += [
        (f"{name}: top-5", f"{scores['top5']:.3f}" if isinstance(scores, dict) else scores)
        for name, scores in results.get("controls", {}).items()
    ]
    if codes := results.get("codes"):
        rows.append(("codes: bits a second", f"{codes['bits_per_second']:.0f}, {codes['words_per_second']:.2f} words"))
        rows.append(("codes: used of each level", ", ".join(map(str, codes["used"]))))
        rows.append(("codes: perplexity", ", ".join(f"{level:.0f}" for level in codes["perplexity"])))
    if "wavs" in results:
        rows.append(("wav files", f"{len(results['wavs'])} in {run_folder / 'wavs'}"))
    width = max(len(name) for name, _ in rows)
    table = "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
    return f"\n{table}\n\nresults: {run_folder / RESULTS_FILE}"


def _title(dataset: UtteranceDataset, utt_id: str) -> str:
    """What a picture of an utterance is headed with."""
    return f"{utt_id}: {dataset.info(utt_id).get('text', '')}"
