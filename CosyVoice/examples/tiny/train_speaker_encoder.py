"""Train the speaker encoder on the synthesised corpus and write it as `campplus.onnx`.

In: `<work-dir>/corpus/{train,dev,test}`. Out, in `<work-dir>/speaker_encoder/`: campplus.onnx, metrics.json (how well
speakers are told apart), settings.json and last.pt, from which a run that was stopped goes on; .done when all is there.

    python CosyVoice/examples/tiny/train_speaker_encoder.py --work-dir CosyVoice/examples/tiny/work    (3 minutes)
    python CosyVoice/examples/tiny/train_speaker_encoder.py --work-dir /tmp/work --epochs 1            (a look)

The network learns to name the corpus' voices from one to three seconds of speech, with noise added. The corpus has four
human voices, the rest are these at other pitches and rates: strangers are told apart far worse than by the released
encoder. Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import plan_of, read_split
from resumable import learning_rate, resume, run_to_the_end, save_checkpoint
from speaker_net import MarginClassifier, SpeakerNet
from speaker_onnx import export_speaker_encoder

from cosyvoice.utils.atomic import atomic_path, write_json
from cosyvoice.utils.audio import speaker_fbank
from cosyvoice.utils.onnx_session import OnnxSession
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import Settings, parse_settings
from taste.audio import read_audio
from taste.manifest import read_manifest

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/; speaker_encoder/ is made in it
EPOCHS = 8  # passes over the training split
BATCH_SIZE = 32  # recordings a step
LR = 3e-3  # peak learning rate of AdamW; it rises over the first tenth and falls along a cosine
WEIGHT_DECAY = 0.02  # AdamW's
MARGIN = 0.2  # radians
SCALE = 24.0  # of the cosines
SHORTEST_SECONDS = 1.0  # of the stretch of a recording that a step looks at
LONGEST_SECONDS = 3.0  # of the same
NOISE_DB = (10.0, 45.0)  # signal over noise
REAL_MANIFEST = None  # str: .jsonl of recordings of people, to be measured as well
SEED = 0  # of everything random
THREADS = 1  # of the CPU

_FULL_SCALE = 32_767
_MEASURED_UTTERANCES = 800  # of a split at most: all pairs of them are compared
_EXPORT_TOLERANCE = 1e-4
_DECIDES_TRAINING = (
    *("epochs", "batch_size", "lr", "weight_decay", "margin", "scale", "shortest_seconds", "longest_seconds"),
    *("noise_db", "seed"),
)


class Recording(NamedTuple):
    """A recording in memory."""

    samples: Tensor  # [N] int16, 16 kHz
    speaker: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Train, export, measure.

    Args:
        settings: the script's constants.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    folder = settings.work_dir / "speaker_encoder"
    done = folder / ".done"
    print(f"settings of {folder}:\n{settings.describe()}\n")
    recordings = load_recordings(settings.work_dir / "corpus", "train")
    speakers = sorted({recording.speaker for recording in recordings})
    torch.manual_seed(settings.seed)
    net, classifier = SpeakerNet(), MarginClassifier(len(speakers), settings.margin, settings.scale)
    if not train(settings, net, classifier, recordings, speakers, folder / "last.pt", stop_requested):
        return False
    net.eval()
    write_onnx(net, folder / "campplus.onnx", recordings[0].samples)
    metrics: dict[str, Any] = {"speakers": len(speakers), "train_utterances": len(recordings)}
    for split in ("dev", "test"):
        held_out = load_recordings(settings.work_dir / "corpus", split)[:_MEASURED_UTTERANCES]
        metrics[split] = measure(net, classifier, held_out, speakers)
    if settings.real_manifest:
        metrics["real"] = measure(net, classifier, read_real(Path(settings.real_manifest)), speakers)
    write_json(folder / "metrics.json", metrics)
    done.touch()
    print(json.dumps(metrics, indent=2))
    return True


def load_recordings(corpus: Path, split: str) -> list[Recording]:
    """Read a split of the corpus into memory, 32 kB a second."""
    recordings = []
    for spoken in read_split(corpus, split):
        waveform = read_audio(spoken.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform
        recordings.append(Recording((waveform.clamp(-1, 1) * _FULL_SCALE).round().short(), spoken.speaker))
    return recordings


def read_real(manifest: Path) -> list[Recording]:
    """Read recordings of people that are at least as long as the shortest stretch of training."""
    recordings = []
    for utterance in read_manifest(manifest):
        waveform = read_audio(utterance.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform
        if len(waveform) >= SHORTEST_SECONDS * SPEECH_SAMPLE_RATE_HZ:
            samples = (waveform.clamp(-1, 1) * _FULL_SCALE).round().short()
            recordings.append(Recording(samples, utterance.speaker or utterance.utt_id))
    return recordings


def train(
    settings: Settings,
    net: SpeakerNet,
    classifier: MarginClassifier,
    recordings: Sequence[Recording],
    speakers: Sequence[str],
    checkpoint_path: Path,
    stop_requested: Callable[[], bool],
) -> bool:
    """Train from the checkpoint on, or from the start; one checkpoint an epoch.

    Args:
        settings: how.
        net: learns.
        classifier: learns, and is not exported.
        recordings: to learn from.
        speakers: the classes.
        checkpoint_path: written after each epoch, read where it exists.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop: what the unfinished epoch learned is given up.

    Raises:
        ValueError: the checkpoint is of a training with other settings.
    """
    parameters = [*net.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    steps_an_epoch = math.ceil(len(recordings) / settings.batch_size)
    deciding = {name: settings.to_dict()[name] for name in _DECIDES_TRAINING} | {"speakers": list(speakers)}
    deciding["corpus"] = plan_of(settings.work_dir / "corpus")
    parts = {"net": net, "classifier": classifier, "optimizer": optimizer}
    first_epoch = resume(checkpoint_path, parts, deciding)
    settings.save(checkpoint_path.with_name("settings.json"))
    class_of = {speaker: index for index, speaker in enumerate(speakers)}
    for epoch in range(first_epoch, settings.epochs):
        started = time.monotonic()
        draw = torch.Generator().manual_seed(settings.seed * 1_000 + epoch)  # an epoch does not depend on earlier ones
        net.train()
        loss_sum, right = 0.0, 0
        order = torch.randperm(len(recordings), generator=draw).split(settings.batch_size)
        for number, indices in enumerate(order):
            step = epoch * steps_an_epoch + number
            optimizer.param_groups[0]["lr"] = learning_rate(step, settings.epochs * steps_an_epoch, settings.lr)
            chosen = [recordings[index] for index in indices.tolist()]
            labels = torch.tensor([class_of[recording.speaker] for recording in chosen])
            seconds = settings.shortest_seconds + torch.rand((), generator=draw).item() * (
                settings.longest_seconds - settings.shortest_seconds
            )
            fbanks = [disturbed_fbank(item.samples, seconds, settings.noise_db, draw) for item in chosen]
            vectors = net(torch.stack(fbanks))
            loss = classifier(vectors, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(chosen)
            right += int((classifier.cosines(vectors).argmax(dim=1) == labels).sum())
            if stop_requested():
                print(f"stopped in epoch {epoch + 1}; the same command goes on from its start", file=sys.stderr)
                return False
        save_checkpoint(checkpoint_path, epoch + 1, parts, deciding)
        print(
            f"epoch {epoch + 1}/{settings.epochs}  loss {loss_sum / len(recordings):.3f}  "
            f"accuracy {right / len(recordings):.3f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return True


def disturbed_fbank(
    samples: Tensor, seconds: float, noise_db: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Filter bank [K, 80] of a stretch of a recording, at another level, with coloured noise.

    Args:
        samples: [N] int16; repeated where it is shorter than the stretch.
        seconds: length of the stretch.
        noise_db: least and greatest ratio of signal to noise.
        generator: draws the stretch, the level and the noise.

    Returns:
        mean-subtracted log energies, float32.
    """
    length = round(seconds * SPEECH_SAMPLE_RATE_HZ)
    samples = samples.repeat(-(-length // len(samples)))
    first = int(torch.randint(0, len(samples) - length + 1, (), generator=generator))
    stretch = samples[first : first + length].float() / _FULL_SCALE
    gain, ratio, colour = torch.rand(3, generator=generator).tolist()
    noise = torch.randn(length, generator=generator)
    noise[1:] += (2 * colour - 1) * noise[:-1].clone()  # from bright to dull
    decibels = noise_db[0] + ratio * (noise_db[1] - noise_db[0])
    level = stretch.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-decibels / 20)
    return speaker_fbank((stretch + level * noise) * (0.2 + gain))


def write_onnx(net: SpeakerNet, path: Path, samples: Tensor) -> None:
    """Export the network, and compare the file's vectors with its own.

    Raises:
        ValueError: they differ by more than 1e-4.
    """
    with atomic_path(path) as temporary:
        onnx.save(export_speaker_encoder(net), temporary)
    fbank = speaker_fbank(samples.float() / _FULL_SCALE)
    session = OnnxSession(path)
    for frames in (fbank, fbank[:98], fbank[:1]):
        with torch.inference_mode():
            expected = net(frames[None])
        difference = (torch.from_numpy(session.run(frames[None].numpy())) - expected).abs().max().item()
        if difference > _EXPORT_TOLERANCE:
            raise ValueError(f"{path} differs by {difference:.1e} from the network it was made from")


@torch.inference_mode()
def measure(
    net: SpeakerNet, classifier: MarginClassifier, recordings: Sequence[Recording], speakers: Sequence[str]
) -> dict[str, float]:
    """Compare all pairs of recordings.

    Args:
        net: in eval mode.
        classifier: for the accuracy over speakers that it knows.
        recordings: whole.
        speakers: the classifier's classes.

    Returns:
        mean cosine within and between speakers, equal error rate, and accuracy where speakers are known.
    """
    vectors = torch.cat([net(speaker_fbank(item.samples.float() / _FULL_SCALE)[None]) for item in recordings])
    names = sorted({item.speaker for item in recordings})
    labels = torch.tensor([names.index(item.speaker) for item in recordings])
    unit = F.normalize(vectors, dim=1)
    above = torch.ones(len(unit), len(unit), dtype=torch.bool).triu(1)
    cosines = (unit @ unit.T)[above]
    same = (labels[:, None] == labels)[above]
    results = {
        "utterances": len(recordings),
        "cosine_within": cosines[same].mean().item(),
        "cosine_between": cosines[~same].mean().item(),
        "equal_error_rate": equal_error_rate(cosines[same], cosines[~same]),
    }
    known = [index for index, item in enumerate(recordings) if item.speaker in speakers]
    if known:
        guesses = classifier.cosines(vectors[known]).argmax(dim=1).tolist()
        right = sum(speakers[guess] == recordings[index].speaker for guess, index in zip(guesses, known, strict=True))
        results["accuracy"] = right / len(known)
    return {name: round(value, 4) for name, value in results.items()}


def equal_error_rate(same: Tensor, different: Tensor) -> float:
    """The share of wrong answers at the threshold where both kinds of error are equally frequent.

    Args:
        same: similarities of pairs of one speaker, [M].
        different: of pairs of two speakers, [N].

    Returns:
        0 to 1; not a number where a kind of pair is missing.
    """
    if not len(same) or not len(different):
        return float("nan")
    thresholds = same.sort().values
    missed = torch.arange(len(same)) / len(same)  # pairs below their own threshold
    accepted = 1.0 - torch.searchsorted(different.sort().values, thresholds) / len(different)
    place = int((missed - accepted).abs().argmin())
    return ((missed[place] + accepted[place]) / 2).item()


if __name__ == "__main__":
    sys.exit(main())
