"""Measure a model folder on recordings with transcripts: word error, voices, codes, speed, and sounds to listen to.

In: a model folder, and a data folder of the recipe (`wav.scp`, `text`, `utt2spk`) or a .jsonl manifest. Out, in
`--output`: `report.md`, `report.json`, `wavs/<utterance>_{original,true_units,text}.wav`, `mels/<utterance>.png`,
`settings.json` (of the last command), and the notes from which an interrupted run goes on.

    python CosyVoice/examples/tiny/evaluate.py --data-dir work/corpus/test --output exp/tiny_test
    python CosyVoice/examples/tiny/evaluate.py --manifest json/test.jsonl --output /tmp/demo_test --limit 3   (1 minute)

true_units: the recording's own S3 units and speaker vector, through flow and HiFT, without a prompt. text: the
transcript alone through `inference_sft`, with the speaker's averaged vector. pocketsphinx listens to both, and to the
recording; Resemblyzer compares the voices. Needs what `requirements.txt` beside this file names. Exit codes: 0 done,
1 error, 2 wrong usage, 130/143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shlex
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from evaluation_table import CONDITIONS, SYNTHETIC, summarise, table_rows, to_markdown, to_text
from listeners import VoiceJudge, hear_in_worker, open_recogniser, similarity, start_worker

import taste
from cosyvoice.cli.cosyvoice import CosyVoice
from cosyvoice.utils.atomic import write_json, write_text
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE, SPEECH_TOKENIZER_FILE, read_torch_file
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.audio import AudioError, read_audio
from taste.listening import ListenerMissingError
from taste.manifest import read_manifest
from taste.plots import plot_mels
from taste.recordings import read_table
from taste.s3_units import open_extractor, read_recording
from taste.speaker import SpeakerEncoder

MODEL_DIR = taste.REPOSITORY / "CosyVoice-tiny"  # model folder
DATA_DIR = None  # Path: folder with wav.scp, text and utt2spk; this or MANIFEST is required
MANIFEST = None  # Path: .jsonl manifest
OUTPUT = None  # Path: folder of the report, sounds and pictures (required)
LIMIT = None  # int: measure so many utterances, from all parts of the list
MELS = 4  # pictures to draw
S3_METRICS = None  # Path: metrics.json of the S3 tokenizer's training; none: what lies beside DATA_DIR
SEED = 7  # of sampling and noise
JOBS = 2  # processes for the recogniser
NUM_THREADS = 2  # of the model, which is what the speed is told for
DEVICE = "cpu"  # of the model: auto, cpu, cuda
OVERWRITE = False  # drop the measurements of another model in OUTPUT

_SPEAKER_VECTORS_FILE = "spk2embedding.pt"  # of a data folder: {speaker: averaged vector}
_MODEL_FILES = ("llm.pt", "flow.pt", "hift.pt", SPEECH_TOKENIZER_FILE, SPEAKER_MODEL_FILE, "cosyvoice.yaml")


class Item(NamedTuple):
    """An utterance to measure."""

    utt_id: str
    audio_path: Path
    text: str
    speaker: str
    language: str  # pocketsphinx hears "en" only


class Interrupted(Exception):  # noqa: N818  (no error: a person's wish)
    """Ctrl-C came, and what was measured has been noted; the argument is the exit code."""


class Notes:
    """What was found out about each utterance, a JSON object a line; half a line at the end is dropped.

    Args:
        path: the file; made with the first note.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_id: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(path, whole)
        for line in whole.splitlines():
            note = json.loads(line)
            self.by_id[note["id"]] = note

    def add(self, note_id: str, **values: object) -> None:
        """Note something, at once on disk."""
        note = {"id": note_id, **values}
        self.by_id[note_id] = note
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note, ensure_ascii=False) + "\n")


def read_items(data_dir: Path | None, manifest: Path | None, limit: int | None) -> list[Item]:
    """Read the list of utterances.

    Args:
        data_dir: a folder with wav.scp, text and utt2spk, in English; or None.
        manifest: a .jsonl manifest with `speaker` and `language`; or None.
        limit: take so many, from all parts of the list; None takes all.

    Returns:
        the utterances in the list's order.

    Raises:
        ValueError: a list is missing or malformed, or an utterance lacks its text.
    """
    if manifest is not None:
        items = [
            Item(item.utt_id, item.audio_path, item.text, item.speaker or "unknown", item.language or "en")
            for item in read_manifest(manifest)
        ]
    else:
        assert data_dir is not None, "one of the two is given"
        paths, texts, speakers = (read_table(data_dir / name) for name in ("wav.scp", "text", "utt2spk"))
        lacking = [utt_id for utt_id in paths if utt_id not in texts or utt_id not in speakers]
        if lacking:
            raise ValueError(f"{data_dir}: no text or no speaker for {', '.join(lacking[:5])} ({len(lacking)} in all)")
        items = [Item(name, Path(path), texts[name], speakers[name], "en") for name, path in paths.items()]
    without_text = [item.utt_id for item in items if not item.text.strip()]
    if without_text:
        raise ValueError(f"there is nothing to say in {', '.join(without_text[:5])} ({len(without_text)} in all)")
    if limit is not None and limit < len(items):
        items = [items[index * len(items) // limit] for index in range(limit)]
    return items


class Synthesiser:
    """The model folder, with a stopwatch in each of its parts.

    Args:
        model_dir: in the released layout.
        data_vectors: {speaker: averaged vector [192]}, for speakers that the folder does not name itself.
        seed: of sampling and noise, together with the utterance's id.
        device: where to compute.
    """

    def __init__(self, model_dir: Path, data_vectors: dict[str, Tensor], seed: int, device: torch.device) -> None:
        self.cosyvoice = CosyVoice(model_dir, device=device)
        self.seed = seed
        self.device = device
        self.spent: dict[str, float] = {}
        for name, vector in data_vectors.items():
            self.cosyvoice.frontend.spk2info.setdefault(name, {"embedding": vector.to(device)[None]})
        model = self.cosyvoice.model
        model.flow.inference = self._timed("flow", model.flow.inference)
        model.hift.inference = self._timed("hift", model.hift.inference)

    def mel(self, waveform: Tensor) -> Tensor:
        """Compute the model's mel [80, F] of a waveform [N] at its rate."""
        return self.cosyvoice.frontend.feat_extractor(waveform[None])[0]

    def from_units(self, item: Item, units: Sequence[int], vector: Tensor) -> Tensor:
        """Speak units with a speaker vector [192]: waveform [N] at the model's rate."""
        self._start(item)
        model = self.cosyvoice.model
        empty = torch.zeros(1, 0, dtype=torch.int32)
        mels = torch.zeros(1, 0, model.flow.output_size)
        tokens = torch.tensor([list(units)], dtype=torch.int32)
        return model.token2wav(tokens, empty, mels, vector[None], item.utt_id, finalize=True)[0]

    def from_text(self, item: Item) -> Tensor:
        """Speak a transcript with the speaker's averaged vector: waveform [N] at the model's rate."""
        self._start(item)
        started = time.perf_counter()
        pieces = [speech["tts_speech"][0] for speech in self.cosyvoice.inference_sft(item.text, item.speaker)]
        self.spent["lm"] = time.perf_counter() - started - self.spent.get("flow", 0.0) - self.spent.get("hift", 0.0)
        return torch.cat(pieces)

    def _start(self, item: Item) -> None:
        self.spent = {}
        torch.manual_seed(zlib.crc32(item.utt_id.encode()) ^ self.seed)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return wrapped


def speak_all(
    items: Sequence[Item], settings: Settings, device: torch.device, notes: Notes, stop: StopRequest
) -> list[str]:
    """Make both synthetic versions of every utterance, `wavs/`, and some pictures, `mels/`.

    Args:
        items: the utterances.
        settings: the script's constants.
        device: of the model.
        notes: units, seconds of sound and seconds spent are added.
        stop: asked between utterances.

    Returns:
        what went wrong, a line an utterance.
    """
    pictures = min(settings.mels, len(items))
    pictured = {items[index * len(items) // pictures].utt_id for index in range(pictures)}
    if all(item.utt_id in notes.by_id for item in items):
        return []
    problems: list[str] = []
    tokenizer = settings.model_dir / SPEECH_TOKENIZER_FILE
    extractors = [open_extractor(tokenizer, backend=backend) for backend in ("onnxruntime", "s3tokenizer")]
    encoder = SpeakerEncoder(settings.model_dir / SPEAKER_MODEL_FILE)
    vectors: dict[str, Tensor] = {}
    for item in _bar(items, "speaker vectors", stop):
        try:
            vectors[item.utt_id] = encoder.embed(read_recording(item.audio_path))
        except (AudioError, ValueError) as error:
            problems.append(f"{item.utt_id}: {error}")
    synthesiser = Synthesiser(settings.model_dir, _averages(items, vectors, settings.data_dir), settings.seed, device)
    rate_hz = synthesiser.cosyvoice.sample_rate
    todo = [item for item in items if item.utt_id not in notes.by_id and item.utt_id in vectors]
    is_warm = False
    for item in _bar(todo, "speech", stop):
        waveform = read_recording(item.audio_path)
        units, others = (extractor.extract([waveform])[0] for extractor in extractors)
        sounds = {"original": read_audio(item.audio_path, rate_hz).waveform}
        spent: dict[str, dict[str, float]] = {}
        if not is_warm:  # the first call of a model is slow
            synthesiser.from_units(item, units, vectors[item.utt_id])
            is_warm = True
        for condition in SYNTHETIC:
            try:
                if condition == "text":
                    sounds[condition] = synthesiser.from_text(item)
                else:
                    sounds[condition] = synthesiser.from_units(item, units, vectors[item.utt_id])
            except (ValueError, RuntimeError) as error:  # nothing to hear: counts as all words missed
                problems.append(f"{item.utt_id}, {CONDITIONS[condition]}: {error}")
            spent[condition] = synthesiser.spent
        for condition, sound in sounds.items():
            write_wav(_wav(settings.output, item, condition), sound, rate_hz)
        if item.utt_id in pictured:
            mels = {CONDITIONS[condition]: synthesiser.mel(sound) for condition, sound in sounds.items()}
            plot_mels(settings.output / "mels" / f"{item.utt_id}.png", mels, f"{item.utt_id}: {item.text}")
        notes.add(
            item.utt_id,
            units=units,
            units_differing=sum(a != b for a, b in zip(units, others, strict=True)),
            seconds={name: len(sounds[name]) / rate_hz if name in sounds else 0.0 for name in CONDITIONS},
            spent=spent,
        )
    return problems


def _averages(items: Sequence[Item], vectors: dict[str, Tensor], data_dir: Path | None) -> dict[str, Tensor]:
    """Each speaker's averaged vector: of the data folder where it has them, else over the utterances at hand."""
    by_speaker: dict[str, list[Tensor]] = {}
    for item in items:
        if item.utt_id in vectors:
            by_speaker.setdefault(item.speaker, []).append(vectors[item.utt_id])
    averages = {name: torch.stack(own).mean(dim=0) for name, own in by_speaker.items()}
    stored = data_dir / _SPEAKER_VECTORS_FILE if data_dir else None
    if stored and stored.is_file():
        averages.update({name: torch.as_tensor(vector) for name, vector in read_torch_file(stored).items()})
    return averages


def recognise_all(items: Sequence[Item], settings: Settings, notes: Notes, stop: StopRequest) -> None:
    """Let pocketsphinx listen to the English utterances, in several processes.

    Args:
        items: the utterances.
        settings: the script's constants.
        notes: what was heard is added, under `<utterance>/<condition>`.
        stop: asked between recordings.
    """
    wanted = {
        f"{item.utt_id}/{condition}": str(item.audio_path if condition == "original" else path)
        for item in items
        for condition in CONDITIONS
        if item.language == "en" and (path := _wav(settings.output, item, condition)).is_file()
    }
    todo = {key: path for key, path in wanted.items() if key not in notes.by_id}
    if not todo:
        return
    open_recogniser()  # an error of its installation is an error here, not in a worker
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.jobs, mp_context=context, initializer=start_worker) as pool:
        heard = pool.map(hear_in_worker, todo.values())
        try:
            for key, text in zip(_bar(list(todo), "recognition", stop), heard, strict=False):
                notes.add(key, heard=text)
        except Interrupted:
            pool.shutdown(cancel_futures=True)
            raise


def compare_voices(items: Sequence[Item], settings: Settings, notes: Notes, stop: StopRequest) -> None:
    """Let Resemblyzer compare each synthetic utterance with its original.

    Args:
        items: the utterances.
        settings: the script's constants.
        notes: the cosines are added.
        stop: asked between utterances.
    """
    todo = [item for item in items if item.utt_id not in notes.by_id]
    if not todo:
        return
    judge = VoiceJudge()
    for item in _bar(todo, "voices", stop):
        original = judge.embed(str(item.audio_path))
        paths = {condition: _wav(settings.output, item, condition) for condition in SYNTHETIC}
        cosines = {
            condition: similarity(original, judge.embed(str(path))) if path.is_file() else 0.0
            for condition, path in paths.items()
        }
        notes.add(item.utt_id, similarity=cosines)


def collect(items: Sequence[Item], spoken: Notes, heard: Notes, voices: Notes) -> list[dict[str, Any]]:
    """Join the notes on each utterance that has all of them, as `evaluation_table.summarise` takes them."""
    joined = []
    for item in items:
        if item.utt_id in spoken.by_id and item.utt_id in voices.by_id:
            texts = {name: heard.by_id.get(f"{item.utt_id}/{name}", {"heard": ""})["heard"] for name in CONDITIONS}
            about = {"speaker": item.speaker, "text": item.text, "language": item.language, "heard": texts}
            joined.append({**spoken.by_id[item.utt_id], **voices.by_id[item.utt_id], **about})
    return joined


def lists_of(data_dir: Path) -> list[Path]:
    """The tables that say which recordings a folder has, and what is said in them."""
    return [data_dir / "wav.scp", data_dir / "text"]


def prepare_output(settings: Settings) -> None:
    """Make the output folder, or check that it belongs to this model and these settings.

    Raises:
        ValueError: it holds the measurements of another model, and `--overwrite` was not given.
    """
    made_with = {
        "model": {name: file_digest(settings.model_dir / name) for name in _MODEL_FILES},
        "data": str((settings.manifest or settings.data_dir).resolve()),
        "lines": [
            file_digest(path) for path in ([settings.manifest] if settings.manifest else lists_of(settings.data_dir))
        ],
        "seed": settings.seed,
    }
    mark = settings.output / "made_with.json"
    if mark.exists() and (before := json.loads(mark.read_text(encoding="utf-8"))) != made_with:
        if not settings.overwrite:
            raise ValueError(
                f"{settings.output} holds measurements of another model, data set or seed; "
                "give another --output, or --overwrite to measure again"
            )
        for name in ("spoken.jsonl", "voices.jsonl", "report.md", "report.json"):
            (settings.output / name).unlink(missing_ok=True)
        for name in ("wavs", "mels"):
            if (settings.output / name).is_dir():
                shutil.rmtree(settings.output / name)
        heard = settings.output / "heard.jsonl"  # what was heard in the recordings themselves stays true
        keep = all(before.get(name) == made_with[name] for name in ("data", "lines"))
        lines = [line for line in heard.read_text(encoding="utf-8").splitlines(True)] if heard.exists() else []
        kept = [line for line in lines if keep and line.endswith("\n") and json.loads(line)["id"].endswith("/original")]
        write_text(heard, "".join(kept))
    write_json(mark, made_with)


def find_tokenizer_metrics(settings: Settings) -> dict[str, Any] | None:
    """Read what the S3 tokenizer's training measured on its test set, where that is to be had.

    Beside the data lies what the recipe's own tokenizer reached, which the model need not have.
    """
    path = settings.s3_metrics
    if path is None and settings.data_dir is not None:
        path = settings.data_dir.resolve().parents[1] / "s3_tokenizer" / "metrics.json"
        theirs, ours = path.with_name(SPEECH_TOKENIZER_FILE), settings.model_dir / SPEECH_TOKENIZER_FILE
        if not theirs.is_file() or file_digest(theirs) != file_digest(ours):
            return None
    return json.loads(path.read_text(encoding="utf-8"))["test"] if path is not None and path.is_file() else None


def _wav(output: Path, item: Item, condition: str) -> Path:
    return output / "wavs" / f"{item.utt_id}_{condition}.wav"


def _bar(things: Iterable[Any], name: str, stop: StopRequest) -> Iterator[Any]:
    """Go through things with a progress bar until somebody asks to stop."""
    for thing in tqdm(things, desc=name, unit="utt"):
        if stop.requested:
            raise Interrupted(stop.exit_code)
        yield thing


@contextmanager
def _quiet_model() -> Iterator[None]:
    """Keep the model's line for each sentence out of the progress bars."""
    logger = logging.getLogger("cosyvoice")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def wrong_usage(settings: Settings) -> list[str]:
    """Name what the settings lack, or have too much of."""
    problems = []
    if (settings.data_dir is None) == (settings.manifest is None):
        problems.append("give either --data-dir or --manifest")
    if settings.output is None:
        problems.append("give --output, the folder of the report, sounds and pictures")
    least = {"limit": 1, "jobs": 1, "num_threads": 1, "mels": 0}
    for name, lowest in least.items():
        if (value := getattr(settings, name)) is not None and value < lowest:
            problems.append(f"--{name.replace('_', '-')} is {value}, expected at least {lowest}")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    if wrong := wrong_usage(settings):
        print(f"error: {'; '.join(wrong)}", file=sys.stderr)
        return 2
    print(f"settings of {settings.output}:\n{settings.describe()}\n", flush=True)
    torch.set_num_threads(settings.num_threads)
    try:
        device = pick_device(settings.device)
        items = read_items(settings.data_dir, settings.manifest, settings.limit)
        open_recogniser()
        VoiceJudge()  # both now: a missing package is told before the work begins
        prepare_output(settings)
        settings.save(settings.output / "settings.json")
        spoken, heard, voices = (Notes(settings.output / f"{name}.jsonl") for name in ("spoken", "heard", "voices"))
        with StopRequest() as stop, _quiet_model():
            problems = speak_all(items, settings, device, spoken, stop)
            made = [item for item in items if item.utt_id in spoken.by_id]
            recognise_all(made, settings, heard, stop)
            compare_voices(made, settings, voices, stop)
    except Interrupted as interrupted:
        print("stopped; the same command goes on from here")
        return interrupted.args[0]
    except (FileNotFoundError, ValueError, ListenerMissingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    utterances = collect(items, spoken, heard, voices)
    if not utterances:
        print("error: no utterance could be measured", file=sys.stderr)
        return 1
    command = shlex.join(["python", *sys.argv]) if argv is None else ""
    results = {
        **summarise(utterances),
        "s3_tokenizer": find_tokenizer_metrics(settings),
        "threads": settings.num_threads,
        "device": str(device),
        "problems": problems,
        "command": command,
    }
    rows = table_rows(results, with_targets=settings.manifest is None)
    write_json(settings.output / "report.json", results)
    title = f"{settings.model_dir} on {settings.manifest or settings.data_dir} ({len(utterances)} utterances)"
    write_text(settings.output / "report.md", to_markdown(rows, title) + f"\n    {command}\n")
    print(f"{title}\n{to_text(rows)}\nreport: {settings.output / 'report.md'}; listen to {settings.output / 'wavs'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
