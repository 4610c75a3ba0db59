"""Lets a trained model speak some test utterances, measures what it says, and makes it sound."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.utils.model_dir import get_tokenizer
from cosyvoice.utils.settings import Settings
from taste.audio_use import codes_of
from taste.data import UtteranceDataset
from taste.generation import Sampling
from taste.metrics import describe_attention
from taste.model import CosyVoiceS3Model
from taste.results import attention_of, decode_units, draw_alignments, generate_units, report_units
from taste.run_report import SHOWN_FILE, measure_run, note_shown
from taste.subsample import finite_examples, spread_evenly
from taste.synthesis import UnitDecoder
from taste.transcript_check import misfits


def show(
    settings: Settings,
    model: CosyVoiceS3Model,
    test_set: UtteranceDataset,
    run_folder: Path,
    device: torch.device,
    stop_requested: Callable[[], bool],
) -> dict[str, Any]:
    """Let the model speak some test utterances, measure what it says, and make it sound.

    Args:
        settings: how many utterances, how units are chosen, and the seed.
        model: what was trained.
        test_set: utterances to choose from.
        run_folder: where pictures and sounds are written.
        device: where the model is.
        stop_requested: asked between batches.

    Returns:
        results for metrics.json; nothing where GENERATE_UTTERANCES is 0.

    Raises:
        RunStopped: it was asked to stop.
    """
    (run_folder / SHOWN_FILE).unlink(missing_ok=True)  # the report must not show an earlier model's
    if not settings.generate_utterances:
        return {}
    finite = finite_examples(test_set, settings.generate_utterances, print, "nothing is generated of it")
    shown = test_set.subset([index for index, _ in finite])
    if not len(shown):
        return {}
    torch.manual_seed(settings.seed)
    sampling = sampling_of(settings)
    units = generate_units(model, shown, settings.generate_batch_size, sampling, device, stop_requested)
    results: dict[str, Any] = {"generation": report_units(shown, units, run_folder)}
    weights = attention_of(model, shown, device) if model.aggregator else []
    if weights:
        results["attention"] = describe_attention(weights)
        _warn_of_misfits(shown, weights)
    if not settings.decode_wavs:
        return results
    decoder = UnitDecoder(settings.cosyvoice_model_dir, device)
    chosen = spread_evenly(len(shown), settings.decode_wavs)
    decoded, their_units = shown.subset(chosen), units.subset(chosen)
    results["wavs"] = decode_units(decoder, decoded, their_units, run_folder, settings.seed, stop_requested)
    tokenizer = get_tokenizer(settings.cosyvoice_model_dir)
    weights = [weights[index] for index in chosen] if weights else []
    if weights:
        draw_alignments(weights, decoder, decoded, tokenizer, run_folder)
    codes = codes_of(model, decoded, device) if model.quantizer is not None else []
    note_shown(run_folder, decoded, tokenizer, weights, codes)
    if settings.evaluate_audio:
        results["sounds"] = measure_run(
            run_folder,
            settings.variant,
            settings.cosyvoice_model_dir,
            device=str(device),
            stop_requested=stop_requested,
        )
    return results


def sampling_of(settings: Settings) -> Sampling:
    """How units are chosen.

    Args:
        settings: SAMPLING, TOP_K, TAU_R and the window of lengths.

    Returns:
        the sampling.

    Raises:
        ValueError: a value is out of its range.
    """
    return Sampling(
        settings.sampling,
        settings.top_k,
        settings.min_units_per_token,
        settings.max_units_per_token,
        settings.tau_r,
    )


def _warn_of_misfits(dataset: UtteranceDataset, weights: Sequence[Tensor]) -> None:
    """Name the utterances whose text the model does not find in the recording."""
    for index, (utt_id, rows) in enumerate(zip(dataset.utt_ids, weights, strict=True)):
        example = dataset[index]
        if example.word_ids is not None and (signs := misfits(example.word_ids, len(rows[0]), rows)):
            print(f"warning: {utt_id}: the transcript may not fit the recording: {'; '.join(signs)}")
