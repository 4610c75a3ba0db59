"""Turn recordings into S3 units, 50 a second, with a model folder's speech_tokenizer_v1.onnx.

In:   a folder with wav.scp (`utterance-id path` a line), or a .jsonl manifest.
Out:  <dir>/utt2speech_token.pt, or the file of --output: {utt_id: [unit, ...]}, units 0..4095
      and beside it its .failures.jsonl and .made_with.json

    python CosyVoice/tools/extract_speech_token.py --dir data/train --onnx_path CosyVoice-300M/speech_tokenizer_v1.onnx
    python CosyVoice/tools/extract_speech_token.py --manifest json/test.jsonl --output s3_output/test_utt2s3.pt

The first is the published command line; the second, on the embedded model, takes seconds. Run the same command again
after any stop: it goes on where it was. Recordings over 30 s go through the model in overlapping windows. Exit codes:
0 all good, 1 error, 2 wrong usage, 3 finished but some recordings failed, 130/143 stopped by Ctrl-C or SIGTERM.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.settings import Settings, describe_device, pick_device, run_script
from taste.extraction import Work, extract
from taste.recordings import list_recordings
from taste.s3_units import open_extractor, read_recording

DIR = None  # str: folder with wav.scp; utt2speech_token.pt is written into it
ONNX_PATH = "CosyVoice-tiny/speech_tokenizer_v1.onnx"  # speech tokenizer, of any size
NUM_THREAD = 8  # threads that read recordings and, with onnxruntime, run the model
MANIFEST = None  # str: .jsonl manifest, in place of --dir
OUTPUT = None  # str: file to write, with --manifest
BATCH_SIZE = 16  # recordings at once (s3tokenizer)
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
BACKEND = "s3tokenizer"  # s3tokenizer (batched, PyTorch) or onnxruntime (the reference, one at a time)


def run(settings: Settings) -> int:
    """Do the whole extraction and return the exit code.

    Raises:
        OSError, ValueError, OutputBusyError: the message is for the person at the keyboard.
    """
    for name in ("num_thread", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name.upper()} is {getattr(settings, name)}; expected at least 1")
    recordings = list_recordings(settings.manifest, settings.dir)
    if settings.dir is None and settings.output is None:
        raise ValueError("--manifest needs --output FILE")
    output = Path(settings.output or Path(settings.dir) / "utt2speech_token.pt")
    device = pick_device(settings.device)
    print(f"on {describe_device(device)}")
    extractor = open_extractor(
        settings.onnx_path,
        backend=settings.backend,
        device=device,
        batch_size=settings.batch_size,
        num_threads=settings.num_thread,
    )
    outcome = extract(
        recordings,
        output,
        Work(prepare=read_recording, compute=extractor.extract),
        {"speech_tokenizer": file_digest(settings.onnx_path)},
        batch_size=settings.batch_size,
        num_threads=settings.num_thread,
    )
    return outcome.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
