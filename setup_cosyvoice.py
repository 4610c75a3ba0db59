"""Stage 0: fetch CosyVoice-300M and Whisper-large-v3, verify every file and, if asked, run each part once.

What is there already is adopted: it is compared with the hub's hashes, and only what is missing or damaged is fetched.
An interrupted download goes on where it stopped. The hashes are kept in `MODEL_DIR/.verified.json`, so that later runs
need no network.

    python setup_cosyvoice.py                                                    # about 5.5 GB into CosyVoice-300M
    python setup_cosyvoice.py --verify-only --deep-verify --model-dir CosyVoice-tiny      # one minute, no network

Left out, because no stage reads them (--all-files takes them too): of CosyVoice the TorchScript archives `*.zip`, the
TensorRT copies of the flow and the pictures; of Whisper every weight but `model.safetensors`. Whisper's tokenizer comes
along where the hub has it: with it, and no network, that Whisper writes down what decoded sound says (word error).

Exit codes: 0 the folder is complete and every check passed; 1 it is not; 2 wrong usage; 130 stopped by Ctrl-C,
143 by SIGTERM.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import taste  # makes cosyvoice importable
from cosyvoice.utils.output_lock import OutputBusyError
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.folder_swap import SwapError
from taste.hub import HuggingFaceHub, ModelScopeHub
from taste.model_install import AnotherModelError, DiskSpaceError, Installer, InstallError
from taste.verify import Check, ModelPart, check_part, read_records

MODEL_DIR = "CosyVoice-300M"  # the model folder to complete or to check; Whisper goes into its folder `whisper`
SOURCE = "auto"  # hub asked first: modelscope, huggingface, or auto (each model's own); the other one steps in
WHISPER = True  # fetch and check the Whisper encoder too
ALL_FILES = False  # fetch everything the repositories hold
FORCE_DOWNLOAD = False  # fetch everything anew; the old folder stays until the new one is complete
VERIFY_ONLY = False  # check the folder as it is: nothing is fetched or written, no network is used
DEEP_VERIFY = False  # after that load every part, say a sentence, and listen to a recording
DEVICE = "auto"  # where DEEP_VERIFY runs: auto, cpu, cuda, cuda:1
CHECK_TEXT = "The model is ready."  # what DEEP_VERIFY says
CHECK_AUDIO = None  # what DEEP_VERIFY listens to; none is the first recording of json/demo_audio, else a tone
MID_LAYER = 6  # the Whisper layer that stage 1 reads beside the last one
COSYVOICE_ON_MODELSCOPE = "iic/CosyVoice-300M"  # repository
COSYVOICE_ON_HUGGINGFACE = "FunAudioLLM/CosyVoice-300M"  # repository
WHISPER_ON_MODELSCOPE = "AI-ModelScope/whisper-large-v3"  # repository
WHISPER_ON_HUGGINGFACE = "openai/whisper-large-v3"  # repository

_WRITING_FILES = (  # of Whisper, for the recogniser; the stages read none of them
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_SOURCES = {"auto": None, "modelscope": ModelScopeHub.name, "huggingface": HuggingFaceHub.name}


def main(argv: Sequence[str] | None = None) -> int:
    """Complete or check a model folder as the constants above and the command line say.

    Args:
        argv: command-line words; None takes those of the process.

    Returns:
        the exit code.
    """
    settings = parse_settings(__file__, globals(), argv)
    if settings.source not in _SOURCES:
        print(f"error: SOURCE is {settings.source!r}; expected one of {', '.join(_SOURCES)}", file=sys.stderr)
        return 2
    print(f"setup_cosyvoice.py\n{settings.describe()}\n", flush=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    folder = Path(settings.model_dir).expanduser()
    parts = model_parts(settings)
    try:
        if settings.verify_only:
            checks = check_files(folder, parts)
        else:
            complete(folder, parts, settings)
            checks = []
        if settings.deep_verify:
            checks += run_each_part(folder, settings, checks)
    except InstallError as error:
        print(f"\n{folder} is not complete:\n{error}\n\n{manual_steps(folder, parts)}", file=sys.stderr)
        return 1
    except (AnotherModelError, DiskSpaceError, SwapError, OutputBusyError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print("\nstopped; the same command goes on where this run was", file=sys.stderr)
        return 143 if isinstance(stopped, _TerminatedError) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = [check for check in checks if check.passed is False]
    print(f"\n{folder}: {len(failed)} of {len(checks)} checks failed" if failed else f"\n{folder} is complete")
    return 1 if failed else 0


class _TerminatedError(KeyboardInterrupt):
    """Somebody sent SIGTERM."""


def _terminate(number: int, frame: object) -> None:
    raise _TerminatedError


def model_parts(settings: Settings) -> list[ModelPart]:
    """What a model folder shall hold, and where it is published.

    Args:
        settings: this run's settings.

    Returns:
        CosyVoice, then the Whisper encoder if it is wanted.
    """
    cosyvoice = ModelPart(
        name="CosyVoice",
        subfolder="",
        repositories={
            ModelScopeHub.name: settings.cosyvoice_on_modelscope,
            HuggingFaceHub.name: settings.cosyvoice_on_huggingface,
        },
        home=ModelScopeHub.name,
        required=("cosyvoice.yaml", "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v1.onnx"),
        optional=("spk2info.pt", "taste.pt", "configuration.json", "README.md", "LICENSE"),
    )
    whisper = ModelPart(
        name="Whisper",
        subfolder="whisper",
        repositories={
            ModelScopeHub.name: settings.whisper_on_modelscope,
            HuggingFaceHub.name: settings.whisper_on_huggingface,
        },
        home=HuggingFaceHub.name,
        required=("config.json", "model.safetensors"),
        optional=("preprocessor_config.json", *_WRITING_FILES, "README.md", "LICENSE"),
    )
    return [cosyvoice, whisper] if settings.whisper else [cosyvoice]


def complete(folder: Path, parts: Sequence[ModelPart], settings: Settings) -> None:
    """Adopt what the folder holds and fetch the rest, or fetch everything anew.

    Args:
        folder: the model folder.
        parts: what it shall hold.
        settings: this run's settings.

    Raises:
        InstallError: some part cannot be completed.
        AnotherModelError: the folder holds another model.
        DiskSpaceError: the disk has no room.
        SwapError: what was fetched anew cannot take the old folder's place.
        OutputBusyError: another process is at it.
    """
    hubs = {hub.name: hub for hub in (ModelScopeHub(), HuggingFaceHub())}
    installer = Installer(folder, parts, hubs, _SOURCES[settings.source], settings.all_files)
    if settings.force_download:
        installer.replace()
    else:
        installer.install()


def check_files(folder: Path, parts: Sequence[ModelPart]) -> list[Check]:
    """Check the files as they are: against the hashes recorded when they were fetched, else by their format.

    Args:
        folder: the model folder.
        parts: what it shall hold.

    Returns:
        one outcome a file; each is printed.
    """
    records = read_records(folder)
    checks = []
    for part in parts:
        recorded = records[part.name].files if part.name in records else {}
        checks += check_part(folder, part, recorded, next_command=f"python setup_cosyvoice.py --model-dir {folder}")
    for check in checks:
        print(check.line(), flush=True)
    return checks


def run_each_part(folder: Path, settings: Settings, file_checks: Sequence[Check]) -> list[Check]:
    """Load every part of the folder, say a sentence, and listen to a recording.

    Args:
        folder: the model folder.
        settings: this run's settings.
        file_checks: what is known of the files; what needs a failed one is skipped.

    Returns:
        one outcome a part; each is printed.
    """
    from taste.deep_verify import deep_verify, describe_machine, load_recording

    recording = load_recording(
        Path(settings.check_audio) if settings.check_audio else None, taste.REPOSITORY / "json" / "demo_audio"
    )
    device = pick_device(settings.device)
    print(f"\nrunning each part on {describe_machine(device)}\nlistening to {recording.name}", flush=True)
    remedy = (
        f"python setup_cosyvoice.py --model-dir {folder}"
        if settings.verify_only
        else "make setup (the files are as published)"
    )
    return deep_verify(
        folder,
        folder / "whisper" if settings.whisper else None,
        device=device,
        recording=recording,
        text=settings.check_text,
        mid_layer=settings.mid_layer,
        failed=[check.name for check in file_checks if not check.passed],
        next_command=remedy,
    )


def manual_steps(folder: Path, parts: Sequence[ModelPart]) -> str:
    """How to complete the folder by hand, on this machine or by way of another.

    Args:
        folder: the model folder.
        parts: what it shall hold.

    Returns:
        the steps, several lines.
    """
    lines = [
        "The same command goes on where this run was, once the network is back. Without one, take a machine that has",
        "one, run either command of each pair there, and copy the folder here.",
        "",
    ]
    for part in parts:
        files = " ".join(part.required)
        place = folder / part.subfolder
        lines += [
            f"  modelscope download {part.repositories[ModelScopeHub.name]} {files} --local-dir {place}",
            f"  hf download {part.repositories[HuggingFaceHub.name]} {files} --local-dir {place}",
            "",
        ]
    lines += [
        "Or clone the repositories with git, after `git lfs install` (else each large file is a pointer of 130 bytes),",
        "or save the files from their pages on either hub. This is where they go:",
        "",
        *(f"  {folder / part.subfolder / name}" for part in parts for name in part.required),
        "",
        f"Then check them: python setup_cosyvoice.py --verify-only --deep-verify --model-dir {folder}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
