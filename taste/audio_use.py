"""Measures what a trained model makes of what it hears: its codes, and what it loses when the recording is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cosyvoice.utils.provenance import noted_models
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND
from cosyvoice.utils.settings import Settings
from cosyvoice.utils.stops import RunStopped
from taste.batch import collate
from taste.code_statistics import collapse_warning, describe_codes
from taste.controls import controls_of
from taste.data import UtteranceDataset
from taste.evaluation import evaluate, sum_over_processes
from taste.model import CosyVoiceS3Model
from taste.progress_bar import progress_bar
from taste.words import word_spans

if TYPE_CHECKING:
    from accelerate import Accelerator


def listen(
    settings: Settings,
    model: CosyVoiceS3Model,
    test_set: UtteranceDataset,
    accelerator: "Accelerator",
    say: Callable[[str], None],
    stop_requested: Callable[[], bool] = lambda: False,
    silence: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Measure a model that hears recordings.

    Args:
        settings: NEGATIVE_CONTROLS, the batch size, CODEBOOK_SIZE, and where Whisper is.
        model: on the accelerator's device.
        test_set: utterances to measure on.
        accelerator: device and processes; each calls this.
        say: takes what a person should know.
        stop_requested: asked before each batch of the controls.
        silence: Whisper's features of it, where they are not to come from the settings' Whisper.

    Returns:
        results for metrics.json: `controls` (scores with another utterance's recording, with silence), and of a
        quantizer, in the main process, `codes`; nothing for a model that hears nothing.

    Raises:
        RunStopped: any process was asked to stop.
    """

    def leave_if_asked() -> None:
        (asked,) = sum_over_processes(accelerator, [float(stop_requested())])
        if asked:
            raise RunStopped("stopped before the controls were scored; what was trained is saved")

    model.eval()
    results: dict[str, Any] = {}
    if model.aggregator is not None and settings.negative_controls:
        results["controls"] = controls_of(
            test_set,
            lambda dataset: evaluate(
                model,
                dataset,
                settings.batch_size,
                accelerator,
                num_workers=settings.num_workers,
                before_batch=leave_if_asked,
            ).averages(),
            settings.whisper_dir or str(Path(settings.cosyvoice_model_dir) / "whisper"),
            settings.mid_layer,
            noted_models(settings.test_utt2info_path) or noted_models(settings.train_utt2info_path),
            silence,
        )
    if model.quantizer is not None and accelerator.is_main_process:
        codes = codes_of(model, test_set, accelerator.device)
        seconds = sum(
            test_set.duration_seconds(utt_id) or len(test_set.features.units[utt_id]) / S3_UNITS_PER_SECOND
            for utt_id in test_set.utt_ids
        )
        results["codes"] = describe_codes(codes, seconds, model.quantizer.codes)
        if warning := collapse_warning(results["codes"], model.quantizer.codes):
            results["codes"]["warning"] = warning
            say(warning)
    return results


def codes_of(model: CosyVoiceS3Model, dataset: UtteranceDataset, device: torch.device) -> list[torch.Tensor]:
    """The codes of each utterance of a data set.

    Args:
        model: with a quantizer, in eval mode, on the device.
        dataset: the utterances.
        device: where to compute.

    Returns:
        of each utterance [W, L], on the CPU.
    """
    codes = []
    # one by one: rounding in a larger batch could tip a word over to the next code
    for index in progress_bar(range(len(dataset)), "codes", "utterances"):
        example = dataset[index]
        assert example.word_ids is not None, f"{example.utt_id} has codes, and no words"
        firsts = [start for start, _ in word_spans(example.word_ids)]
        codes.append(model.encode(collate([example]).to(device))[0, firsts].cpu())
    return codes
