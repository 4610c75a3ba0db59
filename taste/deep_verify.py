"""Runs every part of a model folder once, to show that it works here: its weights, its ONNX files, its Whisper encoder.

Each check is independent and tells its outcome in one line; one that needs a file which has failed already is skipped,
so that a fault is told once.
"""

# N samples  L S3 codes, 50 Hz  A Whisper frames, 50 Hz  D channels

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import describe_device
from taste.audio import read_audio
from taste.verify import Check

if TYPE_CHECKING:
    from cosyvoice.cli.cosyvoice import CosyVoice

LONGEST_SECONDS = 30  # that these three take at once
TONE_SECONDS = 4.0
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg")
DETAIL_CHARACTERS = 300  # of an error's message
LEAST_ALIKE = 0.9  # share of codes that both backends must give alike; a GPU rounds a few to a neighbour
OWN_VOICE = "the check recording's voice"


class Step(NamedTuple):
    """One check to make."""

    name: str
    needs: tuple[str, ...]  # names of checks, or of files in the folder, without which it makes no sense
    run: Callable[[], str]  # returns what was seen; raises whatever is wrong


class Recording(NamedTuple):
    """What the checks listen to."""

    name: str
    waveform: Tensor  # [N] float32, 16 kHz


def load_recording(path: Path | None, demo_folder: Path) -> Recording:
    """Find something to listen to.

    Args:
        path: a recording to take; None looks into the demo folder.
        demo_folder: the first recording in it is taken; without one a tone is synthesised.

    Returns:
        at most 30 seconds of sound.

    Raises:
        AudioError: the recording cannot be read.
    """
    if path is None:
        found = sorted(file for file in demo_folder.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES)
        if not found:
            return Recording(f"a synthesised tone of {TONE_SECONDS} s", _tone())
        path = found[0]
    waveform = read_audio(path, SPEECH_SAMPLE_RATE_HZ).waveform[: LONGEST_SECONDS * SPEECH_SAMPLE_RATE_HZ]
    return Recording(str(path), waveform)


def describe_machine(device: torch.device) -> str:
    """What the checks run on.

    Args:
        device: where the models run.

    Returns:
        one line: the device, the versions, and what onnxruntime could use here.
    """
    import onnxruntime

    providers = ", ".join(onnxruntime.get_available_providers())
    return (
        f"{describe_device(device)}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__} with {providers}"
    )


def deep_verify(
    folder: Path,
    whisper_folder: Path | None,
    *,
    device: torch.device,
    recording: Recording,
    text: str,
    mid_layer: int,
    failed: Sequence[str],
    next_command: str,
    say: Callable[[str], None] = print,
) -> list[Check]:
    """Load each part strictly, say one sentence, and listen to one recording.

    Args:
        folder: the model folder.
        whisper_folder: the Whisper encoder's; None leaves it out.
        device: where the models run.
        recording: what the encoders listen to.
        text: what the synthesis says.
        mid_layer: the Whisper layer that the stages read beside the last one.
        failed: names of files that are known to be unfit; what needs them is skipped.
        next_command: what to run where a part fails.
        say: told each outcome at once.

    Returns:
        the outcomes, in order.
    """
    steps = [
        Step(file, (file, "cosyvoice.yaml"), partial(_load, folder, part, device))
        for part, file in (("llm", "llm.pt"), ("flow", "flow.pt"), ("hift", "hift.pt"))
    ]
    steps += [
        Step(
            "speech_tokenizer_v1.onnx",
            ("speech_tokenizer_v1.onnx",),
            lambda: _tokenize(folder / "speech_tokenizer_v1.onnx", recording, device),
        ),
        Step("campplus.onnx", ("campplus.onnx",), lambda: _hear_speaker(folder / "campplus.onnx", recording, device)),
        Step(
            "a sentence through LM, flow and HiFT",
            ("cosyvoice.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx"),
            lambda: _speak(folder, recording, text, device),
        ),
    ]
    if whisper_folder is not None:
        needs = tuple(name for name in failed if name.startswith(f"{whisper_folder.name}/"))
        steps.append(Step("whisper", needs, lambda: _listen(whisper_folder, recording, mid_layer, device)))
    unfit = set(failed)
    checks = []
    for step in steps:
        check = _make(step, unfit, next_command)
        if not check.passed:
            unfit.add(step.name)
        checks.append(check)
        say(check.line())
    return checks


def _make(step: Step, unfit: set[str], next_command: str) -> Check:
    missing = [name for name in step.needs if name in unfit]
    if missing:
        return Check(step.name, None, f"needs {', '.join(missing)}")
    try:
        return Check(step.name, True, step.run())
    except Exception as error:  # noqa: BLE001 - a check reports whatever goes wrong in the model it runs
        text = " ".join(str(error).split()) or "no message"
        text = text if len(text) <= DETAIL_CHARACTERS else text[:DETAIL_CHARACTERS] + " ..."
        return Check(step.name, False, f"{type(error).__name__}: {text}; next: {next_command}")


def _load(folder: Path, part: str, device: torch.device) -> str:
    from cosyvoice.utils.model_dir import load_part

    started = time.perf_counter()
    module = load_part(folder, part, device=device)
    seconds = time.perf_counter() - started
    unfit = [name for name, tensor in module.state_dict().items() if not _is_finite(tensor)]
    if unfit:
        raise ValueError(f"got values that are no finite numbers in {len(unfit)} tensors ({unfit[0]}), expected none")
    return f"{_count(module):,} parameters, every key and shape as configured, on {device}, {seconds:.1f} s"


def _tokenize(onnx_path: Path, recording: Recording, device: torch.device) -> str:
    """The recording through both backends of stage 2: they must agree, since either may make a user's units."""
    from taste.s3_units import OnnxUnitExtractor, TorchUnitExtractor, count_units

    reference = OnnxUnitExtractor(onnx_path, device, num_threads=1)
    started = time.perf_counter()
    codes = reference.extract([recording.waveform])[0]
    seconds = time.perf_counter() - started
    batched = TorchUnitExtractor(onnx_path, device, batch_size=1).extract([recording.waveform])[0]
    expected = count_units(len(recording.waveform))
    if len(codes) != expected or len(batched) != expected:
        raise ValueError(f"got {len(codes)} codes (s3tokenizer: {len(batched)}), expected {expected}")
    agreeing = sum(one == other for one, other in zip(codes, batched, strict=True))
    if agreeing < LEAST_ALIKE * len(codes):
        raise ValueError(
            f"onnxruntime and s3tokenizer give {agreeing} of {len(codes)} codes alike, expected {LEAST_ALIKE:.0%} at "
            "least"
        )
    return (
        f"{len(codes)} codes ({len(set(codes))} different, {min(codes)}..{max(codes)}), {reference.session.provider}, "
        f"{_pace(seconds, recording)}; s3tokenizer gives {agreeing} of {len(codes)} alike"
    )


def _hear_speaker(onnx_path: Path, recording: Recording, device: torch.device) -> str:
    from taste.speaker import SpeakerEncoder

    encoder = SpeakerEncoder(onnx_path, device)
    started = time.perf_counter()
    vector = encoder.embed(recording.waveform)
    seconds = time.perf_counter() - started
    _expect_finite("the speaker vector", vector)
    return f"vector {list(vector.shape)} of length {vector.norm():.2f}, {encoder.provider}, {_pace(seconds, recording)}"


def _listen(folder: Path, recording: Recording, mid_layer: int, device: torch.device) -> str:
    from taste.whisper_encoder import SAMPLES_PER_FRAME, WhisperEncoder

    started = time.perf_counter()
    encoder = WhisperEncoder(folder, mid_layer, device, torch.float32)
    loaded = time.perf_counter()
    ((mid, final),) = encoder.encode([recording.waveform])
    seconds = time.perf_counter() - loaded
    expected = -(-len(recording.waveform) // SAMPLES_PER_FRAME)
    for name, features in ((f"layer {mid_layer}", mid), ("the last layer", final)):
        if features.shape[0] != expected:
            raise ValueError(f"{name}: got {features.shape[0]} frames, expected {expected} at 50 Hz")
        _expect_finite(name, features)
    return (
        f"layer {mid_layer} and last layer {list(final.shape)}, on {device}, "
        f"opened in {loaded - started:.1f} s, {_pace(seconds, recording)}"
    )


def _speak(folder: Path, recording: Recording, text: str, device: torch.device) -> str:
    from cosyvoice.cli.cosyvoice import CosyVoice

    started = time.perf_counter()
    cosyvoice = CosyVoice(folder, device=device)
    loaded = time.perf_counter()
    speaker = _any_speaker(cosyvoice, recording)
    pieces = [piece["tts_speech"] for piece in cosyvoice.inference_sft(text, speaker, stream=False)]
    seconds = time.perf_counter() - loaded
    if not pieces:
        raise ValueError(f"got no sound for {text!r}")
    speech = torch.cat(pieces, dim=1)  # [1, N]
    _expect_finite("the sound", speech)
    if speech.abs().max() == 0:
        raise ValueError("got silence, expected sound")
    sound_seconds = speech.shape[1] / cosyvoice.sample_rate
    return (
        f"{sound_seconds:.2f} s of sound {list(speech.shape)} at {cosyvoice.sample_rate} Hz by speaker {speaker!r} on "
        f"{device}, opened in {loaded - started:.1f} s, said in {seconds:.1f} s, "
        f"real-time factor {seconds / sound_seconds:.2f}"
    )


def _any_speaker(cosyvoice: "CosyVoice", recording: Recording) -> str:
    """The folder's first named speaker; CosyVoice-300M has none, and then the recording's voice is one."""
    named = cosyvoice.list_available_spks()
    if named:
        return named[0]
    embedding = cosyvoice.frontend._extract_spk_embedding(recording.waveform[None])
    cosyvoice.frontend.spk2info[OWN_VOICE] = {"embedding": embedding}
    return OWN_VOICE


def _tone() -> Tensor:
    """A voice-like sound: a gliding pitch with six harmonics, swelling three times a second."""
    seconds = torch.arange(int(TONE_SECONDS * SPEECH_SAMPLE_RATE_HZ)) / SPEECH_SAMPLE_RATE_HZ
    phase = 2 * torch.pi * (120 * seconds + 10 * seconds.square())
    voice = torch.stack([torch.sin(harmonic * phase) / harmonic for harmonic in range(1, 7)]).sum(dim=0)
    return 0.2 * voice * (0.55 - 0.45 * torch.cos(2 * torch.pi * 3 * seconds))


def _pace(seconds: float, recording: Recording) -> str:
    sound_seconds = len(recording.waveform) / SPEECH_SAMPLE_RATE_HZ
    return f"{seconds:.2f} s for {sound_seconds:.1f} s of sound (real-time factor {seconds / sound_seconds:.3f})"


def _expect_finite(name: str, values: Tensor) -> None:
    if not _is_finite(values):
        raise ValueError(f"{name}: got {int((~values.isfinite()).sum())} values that are no finite numbers, expected 0")


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(values.isfinite().all())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
