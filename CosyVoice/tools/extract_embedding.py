"""Turn recordings into speaker vectors of 192 numbers, with a model folder's campplus.onnx.

In:   a folder with wav.scp and utt2spk (`utterance-id path` and `utterance-id speaker` a line), or a .jsonl manifest.
Out:  <dir>/utt2embedding.pt, or the file of --output: {utt_id: [number, ...]}
      <dir>/spk2embedding.pt, or --output with `utt2` turned into `spk2`: {speaker: mean of the utterances' vectors}
      and beside the first its .failures.jsonl and .made_with.json

    python CosyVoice/tools/extract_embedding.py --dir data/train --onnx_path CosyVoice-300M/campplus.onnx
    python CosyVoice/tools/extract_embedding.py --manifest json/test.jsonl --output /tmp/test_utt2embedding.pt

The first is the published command line; the second, on the embedded model, takes seconds. Run the same command again
after any stop: it goes on where it was. Exit codes: 0 all good, 1 error, 2 wrong usage, 3 finished but some recordings
failed, 130/143 stopped by Ctrl-C or SIGTERM.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import Settings, pick_device, run_script
from taste.audio import read_audio
from taste.extraction import Work, extract
from taste.feature_reader import open_features
from taste.manifest import ManifestError
from taste.recordings import Recording, list_recordings
from taste.speaker import SpeakerEncoder

DIR = None  # str: folder with wav.scp and utt2spk; utt2embedding.pt and spk2embedding.pt are written into it
ONNX_PATH = "CosyVoice-tiny/campplus.onnx"  # speaker encoder
NUM_THREAD = 8  # recordings at work at the same time
MANIFEST = None  # str: .jsonl manifest, in place of --dir
OUTPUT = None  # str: file to write, with --manifest
DEVICE = "cpu"  # cpu, auto, cuda, cuda:1: where onnxruntime runs the model

_RECORDINGS_A_STEP = 64  # between two looks at the signals


def average_by_speaker(
    recordings: Sequence[Recording], embeddings: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Average the vectors of each speaker's utterances.

    Args:
        recordings: the list; those without a speaker or a vector are left out.
        embeddings: {utt_id: 192 numbers}.

    Returns:
        {speaker: 192 numbers}.
    """
    rows: dict[str, list[Sequence[float]]] = {}
    for recording in recordings:
        if recording.speaker is not None and recording.utt_id in embeddings:
            rows.setdefault(recording.speaker, []).append(embeddings[recording.utt_id])
    return {speaker: torch.tensor(vectors).mean(dim=0).tolist() for speaker, vectors in rows.items()}


def run(settings: Settings) -> int:
    """Do the whole extraction and return the exit code.

    Raises:
        OSError, ValueError, OutputBusyError: the message is for the person at the keyboard.
    """
    if settings.num_thread < 1:
        raise ValueError(f"NUM_THREAD is {settings.num_thread}; expected at least 1")
    recordings = list_recordings(settings.manifest, settings.dir)
    if settings.dir is None and settings.output is None:
        raise ValueError("--manifest needs --output FILE")
    nameless = [recording.utt_id for recording in recordings if recording.speaker is None]
    if settings.dir is not None and nameless:
        raise ManifestError(f"{settings.dir}/utt2spk: no speaker for {len(nameless)} utterances, {nameless[0]!r} first")
    output = Path(settings.output or Path(settings.dir) / "utt2embedding.pt")
    encoder = SpeakerEncoder(settings.onnx_path, pick_device(settings.device))

    def embed(path: Path) -> list[float]:
        return encoder.embed(read_audio(path, SPEECH_SAMPLE_RATE_HZ).waveform).tolist()

    outcome = extract(
        recordings,
        output,
        Work(prepare=embed, compute=list),
        {"speaker_model": file_digest(settings.onnx_path)},
        batch_size=_RECORDINGS_A_STEP,
        num_threads=settings.num_thread,
    )
    if outcome.exit_code in (0, SOME_FAILED_EXIT_CODE) and output.exists():  # not so where every recording failed
        is_named_so = "utt2" in output.name
        speakers_path = output.with_name(
            output.name.replace("utt2", "spk2") if is_named_so else f"{output.stem}_spk{output.suffix}"
        )
        speakers = average_by_speaker(recordings, open_features(output))
        with atomic_path(speakers_path) as temporary:
            torch.save(speakers, temporary)
        print(f"{speakers_path}: {len(speakers)} speakers")
    return outcome.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
