"""Train a small Whisper encoder on the synthesised corpus, to say frame by frame what is spoken.

In: splits of `<work-dir>/corpus`, and the text embeddings of the language model that the encoder will serve. Out, in
`<work-dir>/whisper/`: config.json, generation_config.json, preprocessor_config.json and model.safetensors (float16) in
transformers' format, metrics.json, settings.json, and last.pt, from which a run that was stopped goes on; .done when
all is there. Needs flite, for the phones of single words.

    python CosyVoice/examples/tiny/train_whisper.py --text-embedding CosyVoice/examples/tiny/work/exp/llm/init.pt
    python CosyVoice/examples/tiny/train_whisper.py --work-dir /tmp/work --epochs 1                        (a look)

The last states learn to name the token that is being spoken, those of block 6 the phone, its timing and its spectrum.
The decoder is never trained, nor used by this project. Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by
Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_REPOSITORY = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(_REPOSITORY), str(_REPOSITORY / "CosyVoice"), str(Path(__file__).resolve().parent)]

from corpus_reader import PHONES, Spoken, phone_classes, read_split  # noqa: E402
from flite_speech import find_flite  # noqa: E402
from resumable import learning_rate, pick_dtype, resume, run_to_the_end, save_checkpoint  # noqa: E402
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration  # noqa: E402
from whisper_training import CLEAR_FRAMES, IGNORED, FrameTeacher, Losses, States, encode  # noqa: E402
from word_times import Span, pronounce_texts, time_tokens  # noqa: E402

from cosyvoice.utils.audio import whisper_log_mel  # noqa: E402
from cosyvoice.utils.config import load_config  # noqa: E402
from taste.audio import read_audio  # noqa: E402
from taste.checkpoint import write_json  # noqa: E402
from taste.provenance import digest, file_digest  # noqa: E402
from taste.settings import Settings, parse_settings  # noqa: E402
from taste.text import tokenize  # noqa: E402
from taste.whisper_encoder import FRAMES_PER_SECOND, SAMPLES_PER_FRAME, WhisperEncoder  # noqa: E402

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/; whisper/ is made in it
TEXT_EMBEDDING = None  # str: llm.pt, or a checkpoint of its training; none draws vectors that no language model knows
START_FROM = None  # str: where to start: last.pt of an earlier training, or a folder with a Whisper of this size
SPLITS = ("train", "lively")  # of the corpus, to learn from
DEV = "dev"  # the split that is measured
EPOCHS = 15  # passes over the training splits
FRAMES_PER_BATCH = 2_500  # 20 ms each
JOINED_SHARE = 0.15  # of the rows that are several utterances one after another, so that late positions are met
LR = 1.5e-3  # peak learning rate of AdamW; it rises over the first tenth and falls along a cosine
WEIGHT_DECAY = 0.02  # AdamW's
GRAD_CLIP = 1.0  # largest norm of the gradient
PROSODY_WEIGHT = 4.0  # of the squared error of timing and spectrum
SAMPLED_FRAMES = 16  # of the silence behind a recording, in place of all of it
CLEAN_SHARE = 0.5  # of the rows that get no noise
DTYPE = "bfloat16"  # of the matrix products: float32, bfloat16; auto: bfloat16 on a CPU with AMX
MEASURED_UTTERANCES = 100  # of DEV, measured at the end with the whole window
SEED = 0  # of everything random
THREADS = 1  # of the CPU

_WIDTH, _HEADS, _LAYERS, _MID_LAYER = 128, 4, 8, 6
_POSITIONS = 1_500  # 30 s
_INITIAL_STD = 0.05
_MEL_BINS = 128
_SAMPLE_RATE_HZ = 16_000
_MEL_PER_FRAME = 2
_TEXT_WIDTH = 64  # of vectors drawn where no language model is given
_DYNAMIC_RANGE = 2.0  # of a log-mel: 8 decades, divided by 4
_QUIETEST = -1.5  # log-mel of 1e-10
_TIMES = 6  # see `time_frames`
_BANDS = 16  # the log-mel's 128 bins, eight at a time
_MOST_JOINED_FRAMES = 1_200
_CONFIGURATION = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # names the text tokenizer
_DECIDES_TRAINING = (
    *("splits", "epochs", "frames_per_batch", "joined_share", "lr", "weight_decay", "grad_clip", "prosody_weight"),
    *("sampled_frames", "clean_share", "dtype", "seed"),
)


class Example(NamedTuple):
    """An utterance as the network sees it."""

    mel: Tensor  # log-mel [128, 2 A + 4], float16, with what the recording's end leaves in the silence behind it
    tokens: Tensor  # class of each frame, [A] int64; 0 is silence, IGNORED where nobody knows
    phones: Tensor  # [A] int64
    timing: Tensor  # [A, 6] float32, see `time_frames`
    token_spans: list[tuple[int, Span]]  # the text's tokens that are classes, and when they are heard


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
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    dtype = pick_dtype(settings.dtype, torch.device("cpu"))
    folder = settings.work_dir / "whisper"
    print(f"settings of {folder}:\n{settings.describe()}\n")
    settings.save(folder / "settings.json")
    corpus = settings.work_dir / "corpus"
    learned = [spoken for name in settings.splits for spoken in read_split(corpus, name)]
    splits = {"learned": learned, "measured": read_split(corpus, settings.dev)[: settings.measured_utterances]}
    tokenizer = load_config(_CONFIGURATION, ["get_tokenizer"])["get_tokenizer"]()
    lexicon = pronounce_texts((spoken.text for split in splits.values() for spoken in split), find_flite())
    vocabulary = sorted({token for spoken in learned for token in tokenize(tokenizer, spoken.text).tokens})
    corpora = {
        name: Corpus([prepare(spoken, tokenizer, vocabulary, lexicon) for spoken in split], split)
        for name, split in splits.items()
    }
    print(f"{len(learned)} utterances, {len(vocabulary)} text tokens", flush=True)

    torch.manual_seed(settings.seed)
    whisper = build_whisper()
    embeddings = text_embeddings(settings.text_embedding, vocabulary, settings.seed)
    teacher = FrameTeacher(_WIDTH, embeddings, len(PHONES), _TIMES + _BANDS)
    if settings.start_from:
        start_from(Path(settings.start_from), whisper, teacher)
    if not train(settings, whisper, teacher, corpora["learned"].examples, dtype, folder / "last.pt", stop_requested):
        return False
    write_whisper(whisper, folder)
    metrics = {"text_tokens": len(vocabulary), "text_embedding": settings.text_embedding}
    metrics |= measure(folder, teacher.eval(), corpora["measured"])
    write_json(folder / "metrics.json", metrics)
    (folder / ".done").touch()
    print(json.dumps(metrics, indent=2))
    return True


def prepare(spoken: Spoken, tokenizer: Any, vocabulary: Sequence[int], lexicon: dict[str, tuple[str, ...]]) -> Example:
    """Compute an utterance's log-mel and its frames' labels."""
    waveform = read_audio(spoken.audio_path, _SAMPLE_RATE_HZ).waveform
    frames = -(-len(waveform) // SAMPLES_PER_FRAME)
    tail = CLEAR_FRAMES // 2 * SAMPLES_PER_FRAME
    padded = F.pad(waveform, (0, frames * SAMPLES_PER_FRAME + tail - len(waveform)))
    timed = time_tokens(spoken, tokenizer, lexicon)
    class_of = {token: index + 1 for index, token in enumerate(vocabulary)}
    heard = [
        (class_of.get(token, IGNORED), span)
        for token, span in zip(timed.tokens, timed.spans, strict=True)
        if span is not None
    ]
    tokens = torch.zeros(frames, dtype=torch.long)
    middles = (torch.arange(frames) + 0.5) / FRAMES_PER_SECOND
    for index, span in heard:
        tokens[(middles >= span.start) & (middles < span.end)] = index
    return Example(
        whisper_log_mel(padded, _MEL_BINS).half(),
        tokens,
        torch.from_numpy(phone_classes(spoken.phones, frames)),
        time_frames(spoken.phones, [span for _, span in heard], frames),
        [(index, span) for index, span in heard if index != IGNORED],
    )


def time_frames(phones: Sequence[tuple[str, float]], tokens: Sequence[Span], num_frames: int) -> Tensor:
    """Say how long each frame's phone and token have lasted, will last, and last in all.

    Args:
        phones: phone and end in seconds, pauses included.
        tokens: when the tokens are heard.
        num_frames: A.

    Returns:
        [A, 6] float32: ln(1 + frames) since the phone's start, to its end, and between the two; the same of the token.
    """
    middles = (np.arange(num_frames) + 0.5) / FRAMES_PER_SECOND
    columns = []
    for ends in ([end for _, end in phones], sorted({bound for span in tokens for bound in span})):
        bounds = np.array([0.0, *ends, max(num_frames / FRAMES_PER_SECOND, ends[-1] if ends else 0.0) + 1e-3])
        place = np.searchsorted(bounds, middles, side="right").clip(1, len(bounds) - 1)
        starts, stops = bounds[place - 1], bounds[place]
        for distance in (middles - starts, stops - middles, stops - starts):
            columns.append(np.log1p(distance.clip(min=0.0) * FRAMES_PER_SECOND))
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


def build_whisper() -> WhisperForConditionalGeneration:
    """A Whisper with weights drawn from torch's global generator; its decoder is as small as transformers allows."""
    config = WhisperConfig(
        vocab_size=8,
        num_mel_bins=_MEL_BINS,
        d_model=_WIDTH,
        encoder_layers=_LAYERS,
        encoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * _WIDTH,
        decoder_layers=1,
        decoder_attention_heads=_HEADS,
        decoder_ffn_dim=_WIDTH,
        max_source_positions=_POSITIONS,
        max_target_positions=16,
        init_std=_INITIAL_STD,
        begin_suppress_tokens=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    return WhisperForConditionalGeneration(config)


def start_from(path: Path, whisper: WhisperForConditionalGeneration, teacher: FrameTeacher) -> None:
    """Put in the weights of an earlier training but for its text embeddings; a folder has those of the encoder only.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if path.is_dir():
        earlier = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        whisper.model.encoder.load_state_dict(earlier.model.encoder.state_dict())
        return
    parts = torch.load(path, weights_only=True)["parts"]
    whisper.model.encoder.load_state_dict(parts["encoder"])
    teacher.load_state_dict(parts["teacher"] | {"embeddings": teacher.embeddings})


def train(
    settings: Settings,
    whisper: WhisperForConditionalGeneration,
    teacher: FrameTeacher,
    examples: Sequence[Example],
    dtype: torch.dtype,
    checkpoint_path: Path,
    stop_requested: Callable[[], bool],
) -> bool:
    """Train from the checkpoint on, or from the start; one checkpoint an epoch.

    Args:
        settings: how.
        whisper: its encoder learns.
        teacher: its heads learn.
        examples: to learn from.
        dtype: of the matrix products.
        checkpoint_path: written after each epoch, read where it exists.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop: what the unfinished epoch learned is given up.

    Raises:
        ValueError: the checkpoint is of a training with other settings or other text embeddings.
    """
    encoder = whisper.model.encoder
    parameters = [p for p in (*encoder.parameters(), *teacher.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    deciding = {name: settings.to_dict()[name] for name in _DECIDES_TRAINING}
    deciding["text_embedding"] = digest([teacher.embeddings])
    if settings.start_from:
        path = Path(settings.start_from)
        deciding["start_from"] = file_digest(path / "model.safetensors" if path.is_dir() else path)
    parts = {"encoder": encoder, "teacher": teacher, "optimizer": optimizer}
    lengths = [len(example.phones) for example in examples]
    for epoch in range(resume(checkpoint_path, parts, deciding), settings.epochs):
        started = time.monotonic()
        draw = random.Random(f"{settings.seed}/{epoch}")  # an epoch does not depend on earlier ones
        generator = torch.Generator().manual_seed(draw.getrandbits(32))
        batches = plan_batches(lengths, settings.frames_per_batch, settings.joined_share, draw)
        sums = torch.zeros(len(Losses._fields))
        for number, batch in enumerate(batches):
            course = (epoch + number / len(batches)) / settings.epochs
            optimizer.param_groups[0]["lr"] = learning_rate(round(10_000 * course), 10_000, settings.lr)
            mels, tokens, phones, prosody = collate([[examples[i] for i in row] for row in batch])
            mels = disturb(mels, (phones != IGNORED).sum(dim=1), settings.clean_share, generator)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                states = encode(encoder, mels, _MID_LAYER, settings.sampled_frames, generator)
                losses = teacher(states, tokens, phones, prosody)
            loss = losses.text + losses.phone + settings.prosody_weight * losses.prosody
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
            optimizer.step()
            sums += torch.stack(list(losses)).detach()
            if stop_requested():
                print(f"stopped in epoch {epoch + 1}; the same command goes on from its start", file=sys.stderr)
                return False
        save_checkpoint(checkpoint_path, epoch + 1, parts, deciding)
        means = zip(Losses._fields, (sums / len(batches)).tolist(), strict=True)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in means)
        print(f"epoch {epoch + 1}/{settings.epochs}  {shown}  {time.monotonic() - started:.0f} s", flush=True)
    return True


def plan_batches(
    lengths: Sequence[int], frames_per_batch: int, joined_share: float, draw: random.Random
) -> list[list[list[int]]]:
    """Group utterances of like length; some rows hold several, one after another.

    Args:
        lengths: frames of each utterance.
        frames_per_batch: padding included.
        joined_share: of the utterances, about, that share a row with others.
        draw: decides the rows and their order.

    Returns:
        batches of rows of utterances' numbers; each utterance stands in one row.
    """
    order = list(range(len(lengths)))
    draw.shuffle(order)
    rows: list[list[int]] = []
    while order:
        row = [order.pop()]
        wanted = draw.randint(2, 5) if draw.random() < joined_share / 2.5 else 1
        while order and len(row) < wanted and sum(lengths[i] for i in (*row, order[-1])) <= _MOST_JOINED_FRAMES:
            row.append(order.pop())
        rows.append(row)
    size_of = {id(row): sum(lengths[i] for i in row) for row in rows}
    rows.sort(key=lambda row: size_of[id(row)] * draw.uniform(0.9, 1.1))
    batches: list[list[list[int]]] = [[]]
    longest = 0
    for row in rows:
        longest = max(longest, size_of[id(row)])
        if batches[-1] and longest * (len(batches[-1]) + 1) > frames_per_batch:
            batches.append([])
            longest = size_of[id(row)]
        batches[-1].append(row)
    draw.shuffle(batches)
    return batches


def collate(rows: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join the examples of each row, and pad the rows.

    Args:
        rows: B lists of examples.

    Returns:
        mels [B, 128, 2 (L + 4)] with silence behind each row, tokens [B, L], phones [B, L], prosody [B, L, 4 + 16],
        where L is the longest row plus the two frames that its end still changes.
    """
    frames = [sum(len(example.phones) for example in row) for row in rows]
    length = max(frames) + CLEAR_FRAMES // 2
    mels = torch.empty(len(rows), _MEL_BINS, _MEL_PER_FRAME * (length + CLEAR_FRAMES))
    tokens = torch.full((len(rows), length), IGNORED)
    phones = torch.full((len(rows), length), IGNORED)
    prosody = torch.zeros(len(rows), length, _TIMES + _BANDS)
    for number, row in enumerate(rows):
        inner = [example.mel[:, : _MEL_PER_FRAME * len(example.phones)] for example in row[:-1]]
        mel = torch.cat([*inner, row[-1].mel], dim=1).float()
        mels[number] = silence_of(mel)
        mels[number, :, : mel.shape[1]] = mel
        size = frames[number]
        tokens[number, :size] = torch.cat([example.tokens for example in row])
        phones[number, :size] = torch.cat([example.phones for example in row])
        prosody[number, :size, :_TIMES] = torch.cat([example.timing for example in row])
        bands = mel[:, : _MEL_PER_FRAME * size].unflatten(1, (size, -1)).unflatten(0, (_BANDS, -1)).mean(dim=(1, 3))
        prosody[number, :size, _TIMES:] = bands.T
    return mels, tokens, phones, prosody


def silence_of(mel: Tensor) -> float:
    """The value of digital silence in a log-mel that is cut 8 decades below its loudest point."""
    return max(mel.max().item() - _DYNAMIC_RANGE, _QUIETEST)


def disturb(mels: Tensor, lengths: Tensor, clean_share: float, generator: torch.Generator) -> Tensor:
    """Change level and colour of each row, add noise, and hide a band and two moments.

    Args:
        mels: [B, 128, W], silent behind each row's end.
        lengths: frames of 20 ms, [B].
        clean_share: of the rows that get no noise.
        generator: draws it all.

    Returns:
        log-mels as the disturbed recordings would have them, silence included.
    """
    disturbed = torch.empty_like(mels)
    bins = torch.linspace(0.0, 1.0, _MEL_BINS)[:, None]
    for number, length in enumerate((_MEL_PER_FRAME * lengths).tolist()):
        gain, tilt, wave, phase, noisy, ratio, colour, *places = torch.rand(16, generator=generator).tolist()
        colouring = 0.3 * (tilt - 0.5) * bins + 0.1 * wave * torch.sin(2 * math.pi * (phase + 1.5 * bins))
        mel = mels[number, :, : length + CLEAR_FRAMES] + (0.65 * gain - 0.5) + colouring  # -20 to +6 dB
        if noisy > clean_share:
            level = mel[:, :length].mean() + 0.3 - 0.9 * ratio  # a unit is 40 dB
            noise = level + 0.6 * (colour - 0.5) * bins + 0.06 * torch.randn(mel.shape, generator=generator)
            mel[:, :length] = torch.logaddexp(mel / 0.25 * math.log(10), noise / 0.25 * math.log(10))[:, :length] * (
                0.25 / math.log(10)
            )
        silence = silence_of(mel)
        mel = mel.clamp(min=silence)
        fill = mel[:, :length].mean()
        band, first = round(16 * places[0]), places[1]
        mel[round(first * (_MEL_BINS - band)) :][:band, :length] = fill
        for width, place in ((places[2], places[3]), (places[4], places[5])):
            frames = min(round(16 * width), length // 8)
            start = round(place * (length - frames))
            mel[:, start : start + frames] = fill
        disturbed[number] = silence
        disturbed[number, :, : mel.shape[1]] = mel
    return disturbed


def write_whisper(whisper: WhisperForConditionalGeneration, folder: Path) -> None:
    """Write the model in transformers' format, float16 as released."""
    whisper.config.dtype = torch.float16
    half = WhisperForConditionalGeneration._from_config(whisper.config, dtype=torch.float16)
    half.load_state_dict({name: value.half() for name, value in whisper.state_dict().items()})
    half.save_pretrained(folder, max_shard_size="10GB")  # one file, as released
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    WhisperFeatureExtractor(feature_size=_MEL_BINS).save_pretrained(folder)


@torch.inference_mode()
def measure(folder: Path, teacher: FrameTeacher, corpus: Corpus) -> dict[str, float]:
    """Hear utterances as stage 1 does, with the written weights and the whole window.

    Args:
        folder: the Whisper model's.
        teacher: its heads read the states.
        corpus: what to hear.

    Returns:
        shares of frames whose phone and token are right; `looks_right`: shares of tokens whose best frame among all of
        the recording lies where the token, or its word, is spoken, within a frame; `consistency`: least mean cosine of
        a recording's states with those that the training's shortened window gives.
    """
    encoder = WhisperEncoder(folder, _MID_LAYER)
    right = {"phone_accuracy": [], "text_accuracy": [], "looks_right": []}
    consistency = 1.0
    generator = torch.Generator().manual_seed(0)
    for example, spoken in zip(corpus.examples, corpus.spoken, strict=True):
        (features,) = encoder.encode([read_audio(spoken.audio_path, _SAMPLE_RATE_HZ).waveform])
        logits = teacher.text_logits(features.final)
        known = example.tokens != IGNORED
        right["text_accuracy"] += (logits.argmax(dim=1) == example.tokens)[known].tolist()
        right["phone_accuracy"] += (teacher.phone_head(features.mid).argmax(dim=1) == example.phones).tolist()
        for index, span in example.token_spans:
            places = [s for i, s in example.token_spans if i == index]  # a token may be spoken more than once
            best = logits[:, index].argmax().item() + 0.5
            slack = 1.0 / FRAMES_PER_SECOND
            seconds = best / FRAMES_PER_SECOND
            right["looks_right"].append(any(s.start - slack <= seconds < s.end + slack for s in places))
            assert span in places, "a token has no span of its own"
        short: States = encode(encoder.module, collate([[example]])[0], _MID_LAYER, SAMPLED_FRAMES, generator)
        frames = len(features.final)
        agreement = F.cosine_similarity(short.final[0, :frames], features.final, dim=1).mean().item()
        consistency = min(consistency, agreement)
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()} | {
        "consistency": round(consistency, 4)
    }


if __name__ == "__main__":
    sys.exit(main())
