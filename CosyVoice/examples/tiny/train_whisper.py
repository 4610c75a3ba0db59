"""Train a small Whisper encoder on the synthesised corpus, to say frame by frame what is spoken.

In: splits of `<work-dir>/corpus` with utt2speech_token.pt, the S3 tokenizer that made these units, and the text
embeddings of the language model that the encoder will serve. Out, in `<work-dir>/whisper/`: config.json,
generation_config.json, preprocessor_config.json and model.safetensors (float16) in transformers' format, metrics.json,
settings.json, and last.pt, from which a run that was stopped goes on; .done when all is there. Needs flite, for the
phones of single words.

    python CosyVoice/examples/tiny/train_whisper.py --text-embedding CosyVoice/examples/tiny/work/exp/llm/llm.pt
    python CosyVoice/examples/tiny/train_whisper.py --minutes 8 --frames-per-batch 20000 --num-workers 12       (a GPU)
    python CosyVoice/examples/tiny/train_whisper.py --work-dir /tmp/work --steps 100                            (a look)

The encoder begins with the S3 tokenizer's, which is a Whisper encoder of fewer blocks. Its last states learn to name
the token that is being spoken, those of block 6 the phone, its timing and spectrum, and the S3 unit. The decoder is
never trained, nor used by this project. Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by Ctrl-C or
SIGTERM, saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import PHONES, Spoken, phone_classes, read_split
from flite_speech import find_flite
from frame_training import FrameTraining
from resumable import pick_dtype, resume, run_to_the_end, save_checkpoint
from tqdm import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration
from unit_codes import unit_codes
from whisper_batches import BANDS, TIMES, Batch, Example, collate, open_batches
from whisper_start import (
    MEL_BINS,
    MID_LAYER,
    WIDTH,
    begin_as_earlier,
    begin_as_tokenizer,
    take_teacher,
)
from whisper_training import CLEAR_FRAMES, IGNORED, FrameTeacher, Losses, States, encode
from word_times import Span, pronounce_texts, time_tokens

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.audio import whisper_log_mel
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import SPEECH_TOKENIZER_FILE, read_torch_file
from cosyvoice.utils.provenance import digest, file_digest
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ, WHISPER_FRAMES_PER_SECOND
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.audio import read_audio
from taste.text import tokenize
from taste.threads import torch_threads_kept
from taste.whisper_encoder import SAMPLES_PER_FRAME, WhisperEncoder

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/; whisper/ is made in it
TEXT_EMBEDDING = None  # str: llm.pt, or a checkpoint of its training; none draws vectors that no language model knows
S3_TOKENIZER = None  # str: where to start; none: <work-dir>/s3_tokenizer/speech_tokenizer_v1.onnx
START_FROM = None  # str: start there instead: last.pt of an earlier training, or a folder with a Whisper of this width
SPLITS = ("train", "lively")  # of the corpus, to learn from
DEV = "dev"  # the split that is measured
STEPS = 4_500  # of the optimizer; they set the schedule where MINUTES does not
MINUTES = None  # float: train by the clock instead, all runs together; the schedule follows it
FRAMES_PER_BATCH = 2_500  # 20 ms each; 20,000 on a GPU
JOINED_SHARE = 0.15  # of the rows that are several utterances one after another, so that late positions are met
LR = 1.5e-3  # peak learning rate of AdamW; it rises over the first tenth and falls along a cosine
WEIGHT_DECAY = 0.02  # AdamW's
GRAD_CLIP = 1.0  # largest norm of the gradient
PROSODY_WEIGHT = 4.0  # of the squared error of timing and spectrum
UNIT_WEIGHT = 0.5  # of the cross-entropy of the S3 unit
CODE_WEIGHT = 2.0  # of the squared error of the unit's code
SAMPLED_FRAMES = 16  # of the silence behind a recording, in place of all of it
CLEAN_SHARE = 0.5  # of the rows that are heard as they are
DTYPE = "bfloat16"  # of the matrix products: float32, bfloat16; auto: bfloat16 on a CPU that is fast at it
CHECK_EVERY = 1_000  # steps between two evaluations on DEV
SAVE_MINUTES = 5.0  # between two saves
MEASURED_UTTERANCES = 100  # of DEV
SEED = 0  # of everything random
THREADS = 1  # of the CPU
NUM_WORKERS = 0  # processes that prepare the recordings and their batches; 12 beside a GPU
DEVICE = "auto"  # auto, cpu, cuda

_TEXT_WIDTH = 64  # of vectors drawn where no language model is given
_CONFIGURATION = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # names the text tokenizer
_DECIDES_TRAINING = (
    *("splits", "frames_per_batch", "joined_share", "lr", "weight_decay", "grad_clip", "prosody_weight"),
    *("unit_weight", "code_weight", "sampled_frames", "clean_share", "dtype", "seed"),
)


class Corpus(NamedTuple):
    """A split of the corpus with what its labels mean."""

    examples: list[Example]
    spoken: list[Spoken]


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Train, write, measure.

    Args:
        settings: the script's constants.
        stop_requested: asked before each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    folder = settings.work_dir / "whisper"
    print(f"settings of {folder}:\n{settings.describe()}\n")
    torch.set_float32_matmul_precision("high")
    learned, measured, vocabulary, units = read_corpora(settings)
    hours = sum(len(example.phones) for example in learned.examples) / WHISPER_FRAMES_PER_SECOND / 3600
    known = f"{len(vocabulary)} text tokens, {len(units)} S3 units"
    print(f"{len(learned.examples)} utterances, {hours:.2f} h, {known}, on {device} in {dtype}", flush=True)

    torch.manual_seed(settings.seed)
    start = Path(
        settings.start_from or settings.s3_tokenizer or settings.work_dir / "s3_tokenizer" / SPEECH_TOKENIZER_FILE
    )
    whisper, earlier = begin_as_earlier(start) if settings.start_from else (begin_as_tokenizer(start), None)
    embeddings = text_embeddings(settings.text_embedding, vocabulary, settings.seed)
    teacher = FrameTeacher(WIDTH, embeddings, len(PHONES), TIMES + BANDS, units)
    if earlier is not None:
        take_teacher(teacher, earlier)
    whisper.to(device)
    teacher.to(device)
    start_digest = file_digest(start / "model.safetensors" if start.is_dir() else start)
    listening = Listening(settings, folder, whisper, teacher, learned.examples, measured.examples, start_digest, dtype)
    listening.go_on()
    settings.save(folder / "settings.json")
    if not listening.until_the_end(stop_requested):
        print(f"stopped after step {listening.step}; the same command goes on from there", file=sys.stderr)
        return False
    write_whisper(whisper.cpu(), folder)
    metrics = {"text_tokens": len(vocabulary), "text_embedding": settings.text_embedding, "steps": listening.step}
    metrics |= measure(folder, teacher.cpu(), measured)
    write_json(folder / "metrics.json", metrics)
    (folder / ".done").touch()
    print(json.dumps(metrics, indent=2))
    return True


def read_corpora(settings: Settings) -> tuple[Corpus, Corpus, list[int], Tensor]:
    """Prepare the splits to learn from and the one to measure.

    Returns:
        both; the text tokens that are classes, in order; and the S3 units that are classes, [K] int64.
    """
    corpus = settings.work_dir / "corpus"
    parts = {name: read_split(corpus, name) for name in settings.splits}
    measured = read_split(corpus, settings.dev)[: settings.measured_utterances]
    learned = [spoken for split in parts.values() for spoken in split]
    units = [row for name, split in parts.items() for row in read_units(corpus / name, split)]
    tokenizer = load_config(_CONFIGURATION, ["get_tokenizer"])["get_tokenizer"]()
    lexicon = pronounce_texts((spoken.text for spoken in (*learned, *measured)), find_flite())
    vocabulary = sorted({token for spoken in learned for token in tokenize(tokenizer, spoken.text).tokens})
    occurring = torch.cat(units).unique()
    classes = unit_classes(occurring)
    corpora = []
    for split, rows in ((learned, units), (measured, read_units(corpus / settings.dev, measured))):
        utterances = _Prepared(split, [classes[row] for row in rows], tokenizer, vocabulary, lexicon)
        corpora.append(Corpus(prepare_all(utterances, settings.num_workers), split))
    return *corpora, vocabulary, occurring


def read_units(folder: Path, split: Sequence[Spoken]) -> list[Tensor]:
    """Read the S3 units of a split's utterances, [S] int64 each.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: an utterance has none.
    """
    path = folder / "utt2speech_token.pt"
    table = read_torch_file(path)
    lacking = [spoken.utt_id for spoken in split if spoken.utt_id not in table]
    if lacking:
        raise ValueError(f"{path}: {len(lacking)} utterances have no units, {lacking[0]} first; run stage 4 of run.sh")
    return [torch.as_tensor(table[spoken.utt_id], dtype=torch.int64) for spoken in split]


def unit_classes(occurring: Tensor) -> Tensor:
    """The class of each S3 unit, [4096] int64: its place among those that occur in training; IGNORED for the others."""
    classes = torch.full((len(unit_codes()),), IGNORED)
    classes[occurring] = torch.arange(len(occurring))
    return classes


class _Prepared(Dataset):
    def __init__(self, split: Sequence[Spoken], units: Sequence[Tensor], *text: Any) -> None:
        self.split, self.units, self.text = split, units, text

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> list[Any]:
        example = prepare(self.split[number], self.units[number], *self.text)
        # a tensor would need a file handle to come from another process
        return [part.numpy() if isinstance(part, Tensor) else part for part in example]


def prepare_all(utterances: _Prepared, workers: int) -> list[Example]:
    """Prepare a split's utterances, see `prepare`, in so many processes; 0: in this one."""
    loader = DataLoader(utterances, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    return [
        Example(*(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts))
        for parts in tqdm(loader, desc="log-mels and labels", mininterval=2)
    ]


def _as_it_is(value: list[Any]) -> list[Any]:
    return value


def prepare(
    spoken: Spoken, units: Tensor, tokenizer: Any, vocabulary: Sequence[int], lexicon: dict[str, tuple[str, ...]]
) -> Example:
    """Compute an utterance's log-mel and its frames' labels; `units` are classes, [S], about one a frame."""
    mel, frames = recording_mel(spoken)
    timed = time_tokens(spoken, tokenizer, lexicon)
    class_of = {token: index + 1 for index, token in enumerate(vocabulary)}
    heard = [
        (class_of.get(token, IGNORED), span)
        for token, span in zip(timed.tokens, timed.spans, strict=True)
        if span is not None
    ]
    tokens = torch.zeros(frames, dtype=torch.long)
    middles = (torch.arange(frames) + 0.5) / WHISPER_FRAMES_PER_SECOND
    for index, span in heard:
        tokens[(middles >= span.start) & (middles < span.end)] = index
    return Example(
        mel,
        tokens,
        torch.from_numpy(phone_classes(spoken.phones, frames)),
        time_frames(spoken.phones, [span for _, span in heard], frames),
        fit_units(units, frames),
        [(index, span) for index, span in heard if index != IGNORED],
    )


def recording_mel(spoken: Spoken) -> tuple[Tensor, int]:
    """An utterance's log-mel [128, 2 A + 4], float16, as an `Example` has it; and A."""
    waveform = read_audio(spoken.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform
    frames = -(-len(waveform) // SAMPLES_PER_FRAME)
    tail = CLEAR_FRAMES // 2 * SAMPLES_PER_FRAME
    padded = F.pad(waveform, (0, frames * SAMPLES_PER_FRAME + tail - len(waveform)))
    with torch_threads_kept():
        torch.set_num_threads(1)  # one recording is too small for several, which would wait for each other
        return whisper_log_mel(padded, MEL_BINS).half(), frames


def fit_units(units: Tensor, frames: int) -> Tensor:
    """Units [S] for so many frames, [A]: there may be one more or less."""
    return F.pad(units[:frames], (0, max(0, frames - len(units))), value=IGNORED)


def time_frames(phones: Sequence[tuple[str, float]], tokens: Sequence[Span], num_frames: int) -> Tensor:
    """Say how long each frame's phone and token have lasted, will last, and last in all.

    Args:
        phones: phone and end in seconds, pauses included.
        tokens: when the tokens are heard.
        num_frames: A.

    Returns:
        [A, 6] float32: ln(1 + frames) since the phone's start, to its end, and between the two; the same of the token.
    """
    middles = (np.arange(num_frames) + 0.5) / WHISPER_FRAMES_PER_SECOND
    columns = []
    for ends in ([end for _, end in phones], sorted({bound for span in tokens for bound in span})):
        bounds = np.array([0.0, *ends, max(num_frames / WHISPER_FRAMES_PER_SECOND, ends[-1] if ends else 0.0) + 1e-3])
        place = np.searchsorted(bounds, middles, side="right").clip(1, len(bounds) - 1)
        starts, stops = bounds[place - 1], bounds[place]
        for distance in (middles - starts, stops - middles, stops - starts):
            columns.append(np.log1p(distance.clip(min=0.0) * WHISPER_FRAMES_PER_SECOND))
    return torch.from_numpy(np.stack(columns, axis=1)).float()


def text_embeddings(path: str | None, vocabulary: Sequence[int], seed: int) -> Tensor:
    """The vectors [V - 1, E] of the corpus' tokens, from a language model or drawn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no language model of CosyVoice.
    """
    if path is None:
        return torch.randn(len(vocabulary), _TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "text_embedding.weight" not in state:
        raise ValueError(f"{path} holds no text_embedding.weight; expected llm.pt, or a checkpoint of its training")
    return state["text_embedding.weight"].float()[list(vocabulary)].clone()


class Listening(FrameTraining):
    """The training as far as it has come.

    Args:
        settings: the script's constants.
        folder: where last.pt is.
        whisper: its encoder learns, on the device.
        teacher: its heads learn, on the device.
        learned: utterances to learn from.
        measured: utterances to measure.
        start: names the weights that it begins with.
        dtype: of the matrix products.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        whisper: WhisperForConditionalGeneration,
        teacher: FrameTeacher,
        learned: Sequence[Example],
        measured: Sequence[Example],
        start: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(settings, learned, measured, Losses._fields)
        self.path, self.encoder, self.teacher = folder / "last.pt", whisper.model.encoder, teacher
        self.dtype = dtype
        self.device = teacher.embeddings.device
        self.deciding = {name: settings.to_dict()[name] for name in _DECIDES_TRAINING}
        self.deciding |= {"text_embedding": digest([teacher.embeddings.cpu()]), "start": start}
        self.deciding["heads"] = whisper.config.encoder_attention_heads
        self.learning = [p for p in (*self.encoder.parameters(), *teacher.parameters()) if p.requires_grad]
        groups = [{"params": self.learning, "peak_lr": settings.lr}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
        )
        self.batches: Iterator[Batch] = iter(())

    def go_on(self) -> None:
        """Take up what an earlier run saved, if one did, and let the batches be made from there on.

        Raises:
            ValueError: it is of other settings, other text embeddings or another start.
        """
        settings = self.settings
        resume(self.path, self._parts(), self.deciding)
        if self.step:
            print(f"resuming from step {self.step}", flush=True)
        first = self.epoch, self.place
        pinned = self.device.type == "cuda"
        self.batches = open_batches(
            self.learned, self.plan, first, settings.clean_share, settings.seed, settings.num_workers, pinned
        )

    def one_step(self, share: float) -> None:
        """Learn from one batch.

        Args:
            share: how much of the training is done, from 0 to 1.
        """
        settings = self.settings
        self.begin_step(self.optimizer, share)
        losses = self._losses(next(self.batches), None)
        loss = losses.text + losses.phone + settings.prosody_weight * losses.prosody
        loss = loss + settings.unit_weight * losses.unit + settings.code_weight * losses.code
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.unlogged.append(torch.stack(list(losses)).detach())

    def _losses(self, batch: Batch, generator: torch.Generator | None) -> Losses:
        mels, *labels = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = encode(self.encoder, mels.float(), MID_LAYER, self.settings.sampled_frames, generator)
            return self.teacher(states, *labels)

    @torch.no_grad()
    def measure(self) -> None:
        """Score the measured utterances as they are."""
        generator = torch.Generator().manual_seed(0)
        batches = list(self.measured_batches())
        losses = torch.stack([torch.stack(list(self._losses(batch, generator))) for batch in batches]).cpu()
        frames = torch.tensor([float((batch.phones != IGNORED).sum()) for batch in batches])
        means = (losses * frames[:, None]).sum(dim=0) / frames.sum()
        print(f"-- {self.settings.dev} after {self.step} steps: {self.shown(means)}", flush=True)

    def save(self) -> None:
        """Write everything that the training depends on."""
        if self.unlogged:
            self.means()  # nothing is saved after a loss that is no number
        save_checkpoint(self.path, self.epoch, self._parts(), self.deciding)

    def _parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "teacher": self.teacher, "optimizer": self.optimizer, "progress": self}


def write_whisper(whisper: WhisperForConditionalGeneration, folder: Path) -> None:
    """Write the model in transformers' format, float16 as released."""
    whisper.config.dtype = torch.float16
    half = WhisperForConditionalGeneration._from_config(whisper.config, dtype=torch.float16)
    half.load_state_dict({name: value.half() for name, value in whisper.state_dict().items()})
    half.save_pretrained(folder, max_shard_size="10GB")  # one file, as released
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    WhisperFeatureExtractor(feature_size=MEL_BINS).save_pretrained(folder)


@torch.inference_mode()
def measure(folder: Path, teacher: FrameTeacher, corpus: Corpus) -> dict[str, float]:
    """Hear utterances as stage 1 does, with the written weights and the whole window.

    Args:
        folder: the Whisper model's.
        teacher: its heads read the states.
        corpus: what to hear.

    Returns:
        shares of frames whose phone, token and unit are right; `code_r2`: the share of the variance of the units' codes
        that is told; `looks_right`: shares of tokens whose best frame among all of the recording lies where the token,
        or its word, is spoken, within a frame; `consistency`: least mean cosine of a recording's states with those that
        the training's shortened window gives.
    """
    encoder = WhisperEncoder(folder, MID_LAYER)
    right = {"phone_accuracy": [], "text_accuracy": [], "unit_accuracy": [], "looks_right": []}
    codes, read = [], []
    consistency = 1.0
    generator = torch.Generator().manual_seed(0)
    for example, spoken in zip(corpus.examples, corpus.spoken, strict=True):
        (features,) = encoder.encode([read_audio(spoken.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform])
        logits = teacher.text_logits(features.final)
        known = example.tokens != IGNORED
        right["text_accuracy"] += (logits.argmax(dim=1) == example.tokens)[known].tolist()
        right["phone_accuracy"] += (teacher.phone_head(features.mid).argmax(dim=1) == example.phones).tolist()
        known = example.units != IGNORED
        mid, units = features.mid[known], example.units[known]
        right["unit_accuracy"] += (teacher.unit_head(mid).argmax(dim=1) == units).tolist()
        codes.append(teacher.codes[units])
        read.append(teacher.code_head(mid))
        for index, span in example.token_spans:
            places = [s for i, s in example.token_spans if i == index]  # a token may be spoken more than once
            best = logits[:, index].argmax().item() + 0.5
            slack = 1.0 / WHISPER_FRAMES_PER_SECOND
            seconds = best / WHISPER_FRAMES_PER_SECOND
            right["looks_right"].append(any(s.start - slack <= seconds < s.end + slack for s in places))
            assert span in places, "a token has no span of its own"
        short: States = encode(encoder.module, collate([[example]]).mels.float(), MID_LAYER, SAMPLED_FRAMES, generator)
        frames = len(features.final)
        agreement = F.cosine_similarity(short.final[0, :frames], features.final, dim=1).mean().item()
        consistency = min(consistency, agreement)
    wanted = torch.cat(codes)
    lost = F.mse_loss(torch.cat(read), wanted) / wanted.var(dim=0, correction=0).mean()
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()} | {
        "code_r2": round(1.0 - lost.item(), 4),
        "consistency": round(consistency, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
