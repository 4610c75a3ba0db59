"""Train the supervised S3 tokenizer on the synthesised corpus and write it as `speech_tokenizer_v1.onnx`.

    python CosyVoice/examples/tiny/train_s3_tokenizer.py --work-dir CosyVoice/examples/tiny/work          (50 minutes)
    python CosyVoice/examples/tiny/train_s3_tokenizer.py --work-dir /tmp/work --epochs 2 --open-epochs 1  (1 minute)

In: `<work-dir>/corpus/{train,dev,test}`. Out, in `<work-dir>/s3_tokenizer/`: speech_tokenizer_v1.onnx, metrics.json
(character error after quantization, codes in use), settings.json, loss_curve.png, and last.pt and reader_last.pt, where
a stopped run goes on after the last finished pass; reader.pt is the recogniser.
The first epochs train the encoder without the quantizer; then k-means places the codes and the rest learns with them.
The tokenizer is then finished and written. The recogniser behind it learns on alone, from the codes: the character
error is to say what the codes hold, not how little a recogniser learned in the same time. Exit codes: 0 done, 1 error,
2 wrong usage, 130/143 stopped by Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import matplotlib
import onnx
import torch
from torch import Tensor
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import Spoken, character_classes, phone_classes, plan_of, read_split, spell
from s3_tokenizer_onnx import build_speech_tokenizer
from s3_tokenizer_training import Recognised, TokenizerTeacher, read_characters, recogniser_loss
from s3tokenizer.model import ModelConfig
from seeded_encoders import fit_codebook

from cosyvoice.utils.atomic import atomic_path, write_text
from cosyvoice.utils.audio import whisper_log_mel
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.muon import MuonWithAdamW, muon_groups
from cosyvoice.utils.provenance import digest
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.audio import read_audio
from taste.s3_units import HEAD_WIDTH, count_units, load_s3_tokenizer, open_extractor

WORK_DIR = Path(__file__).resolve().parent / "work"  # holds corpus/; s3_tokenizer/ is made in it
WIDTH = 128  # channels of the encoder, a multiple of 64
LAYERS = 3  # transformer blocks before the quantizer
RECOGNISER_LAYERS = 4  # transformer blocks after it, not exported
CODES = 1024  # codes that are learned, of the 4096 in the file
CODEBOOK_DECAY = 0.99  # of the codebook's moving averages
FINISHED = None  # Path: speech_tokenizer_v1.onnx; only the recogniser learns, from it
EPOCHS = 16  # passes over the training set
OPEN_EPOCHS = 7  # of them, at the start, without the quantizer
READER_EPOCHS = 12  # passes of the recogniser alone, from the codes
READER_FRAMES_PER_BATCH = 3_000  # the same as FRAMES_PER_BATCH, for those passes
FRAMES_PER_BATCH = 8_000  # mel frames, 10 ms each, padding included
LR = 3e-3  # highest learning rate
WARM_UP_STEPS = 200  # steps until it is reached
SEED = 0  # of weights, order and masks
NUM_THREADS = 1  # CPU threads
DEVICE = "cpu"  # auto, cpu, cuda
BF16 = True  # bfloat16 autocast

_MEL_BINS = 128
_POSITIONS = 1500  # 30 s
_CODEBOOK_ROWS = 4096  # of the exported file
_KMEANS_UNITS = 60_000  # units that k-means sees
_COMMITMENT_WEIGHT = 1.0
_GRADIENT_NORM = 1.0
_MASKED_BINS = 24  # SpecAugment: at most so many mel bins ...
_MASKED_FRAMES = 20  # ... and so many frames, 10 ms each, per mask
_TIME_MASKS = 2
_HIDDEN_UNITS = 10  # longest stretch of codes hidden from the recogniser that learns alone ...
_HIDDEN_SHARE = 0.15  # ... and their share of an utterance
_READER_LR = 2e-3
_DECIDES_READER = ("recogniser_layers", "reader_epochs", "reader_frames_per_batch", "seed")
_DECIDES_TRAINING = ("width", "layers", "recogniser_layers", "codes", "epochs", "open_epochs", "lr", "seed")


class Example(NamedTuple):
    """An utterance as the network sees it."""

    utt_id: str
    mel: Tensor  # log-mel [128, T], float16: three hours are 280 MB
    characters: Tensor  # CTC classes [C]
    phones: Tensor  # phone of each unit [S]
    text: str


def load_examples(utterances: list[Spoken], description: str) -> list[Example]:
    """Compute every log-mel once and keep it in memory."""

    def load(spoken: Spoken) -> Example:
        waveform = read_audio(spoken.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform
        units = count_units(len(waveform))
        return Example(
            spoken.utt_id,
            whisper_log_mel(waveform, _MEL_BINS).half(),
            torch.from_numpy(character_classes(spoken.text)),
            torch.from_numpy(phone_classes(spoken.phones, units)),
            spell(spoken.text),
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = pool.map(load, utterances)
        return list(tqdm(loaded, total=len(utterances), desc=description, unit="utt", mininterval=2))


def plan_batches(examples: list[Example], frames_per_batch: int, seed: int, epoch: int) -> list[list[Example]]:
    """Group utterances of like length, in an order that follows from seed and epoch only."""
    draw = random.Random(f"{seed}/{epoch}")
    by_length = sorted(examples, key=lambda example: example.mel.shape[1] * draw.uniform(0.9, 1.1))
    batches: list[list[Example]] = [[]]
    for example in by_length:
        if batches[-1] and (len(batches[-1]) + 1) * example.mel.shape[1] > frames_per_batch:
            batches.append([])
        batches[-1].append(example)
    draw.shuffle(batches)
    return batches


def collate(batch: list[Example]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pad the mels; join the labels. Returns mels, their lengths, characters, their lengths, phones."""
    mels = torch.nn.utils.rnn.pad_sequence([example.mel.float().T for example in batch], batch_first=True)
    lengths = torch.tensor([example.mel.shape[1] for example in batch])
    characters = torch.cat([example.characters for example in batch])
    character_lengths = torch.tensor([len(example.characters) for example in batch])
    return mels.transpose(1, 2), lengths, characters, character_lengths, torch.cat([e.phones for e in batch])


def mask_spectrum(mels: Tensor, lengths: Tensor, draw: random.Random) -> Tensor:
    """SpecAugment: silence one band and a few stretches of each row (Park et al. 2019), in place."""
    for row, length in zip(mels, lengths.tolist(), strict=True):
        fill = row[:, :length].mean()
        width = draw.randint(0, _MASKED_BINS)
        first = draw.randint(0, _MEL_BINS - width)
        row[first : first + width, :length] = fill
        for _ in range(_TIME_MASKS):
            width = min(draw.randint(0, _MASKED_FRAMES), length // 4)
            first = draw.randint(0, length - width)
            row[:, first : first + width] = fill
    return mels


def hide_units(rows: Tensor, draw: random.Random) -> Tensor:
    """Silence a few stretches of an utterance's codes [S, D]."""
    rows = rows.clone()
    for _ in range(round(_HIDDEN_SHARE * len(rows) / (_HIDDEN_UNITS / 2))):
        width = min(draw.randint(1, _HIDDEN_UNITS), len(rows))
        first = draw.randint(0, len(rows) - width)
        rows[first : first + width] = 0.0
    return rows


class Run:
    """A training run: model, optimizer, and where it stands.

    Args:
        settings: the script's constants.
        device: where to compute.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.folder = settings.work_dir / "s3_tokenizer"
        self.reader_path = self.folder / "reader.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        config = ModelConfig(
            n_mels=_MEL_BINS,
            n_audio_ctx=_POSITIONS,
            n_audio_state=settings.width,
            n_audio_head=settings.width // HEAD_WIDTH,
            n_audio_layer=settings.layers,
            n_codebook_size=_CODEBOOK_ROWS,
        )
        self.model = TokenizerTeacher(config, settings.codes, settings.recogniser_layers, decay=settings.codebook_decay)
        self.model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def deciding(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on with."""
        deciding = {name: getattr(self.settings, name) for name in _DECIDES_TRAINING}
        return deciding | {"corpus": plan_of(self.settings.work_dir / "corpus")}

    def save(self) -> None:
        """Write all of it, so that a rerun goes on after the last finished epoch."""
        state = {
            "settings": self.deciding,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
            "seconds": self.seconds,
        }
        with atomic_path(self.folder / "last.pt") as path:
            torch.save(state, path)

    def resume(self) -> None:
        """Go on from last.pt if it is there.

        Raises:
            ValueError: it was made with other settings.
        """
        path = self.folder / "last.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        differing = [name for name, value in self.deciding.items() if state["settings"].get(name) != value]
        if differing:
            was = ", ".join(f"{name} {state['settings'].get(name)}, now {self.deciding[name]}" for name in differing)
            raise ValueError(
                f"{path} was made with other settings ({was}); use those, or remove the file to start over"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.seconds = state["history"], state["seconds"]
        print(f"going on after epoch {self.epoch} of {self.settings.epochs}")

    def take_finished(self, path: Path) -> None:
        """Take encoder and codebook from a finished tokenizer, so that only the recogniser is left to learn.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no S3 tokenizer v1, or one of another size.
        """
        finished = load_s3_tokenizer(path).state_dict()
        encoder = {name.removeprefix("encoder."): value for name, value in finished.items() if name.startswith("enc")}
        codes = finished["quantizer._codebook.embed"][: self.settings.codes]
        try:
            self.model.encoder.load_state_dict(encoder)
            self.model.place_codes(codes.to(self.device))
        except RuntimeError as error:
            raise ValueError(
                f"--finished {path} has another size ({error}); give its --width, --layers, --codes"
            ) from error
        self.epoch = self.settings.epochs
        print(f"encoder and codes are those of {path}")

    def set_learning_rate(self, total_steps: int) -> None:
        """Linear warm-up, then half a cosine down to 2 % of the peak."""
        warm_up = min(1.0, (self.step + 1) / self.settings.warm_up_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / total_steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * warm_up * decay

    @torch.no_grad()
    def fit_codes(self, examples: list[Example]) -> None:
        """Place the codes by k-means on what the encoder gives for part of the training set."""
        self.model.eval()
        draw = random.Random(self.settings.seed)
        rows: list[Tensor] = []
        for example in draw.sample(examples, len(examples)):
            mel = example.mel.float()[None].to(self.device)
            rows.append(self.model.directions(mel, torch.tensor([mel.shape[2]], device=mel.device))[0][0])
            if sum(len(row) for row in rows) > _KMEANS_UNITS:
                break
        generator = torch.Generator().manual_seed(self.settings.seed)
        codes = fit_codebook(torch.cat(rows).cpu(), self.settings.codes, generator, fitted=self.settings.codes)
        self.model.place_codes(codes.to(self.device))

    def train_epoch(self, examples: list[Example]) -> dict[str, float]:
        """Pass over the training set once; returns the mean of each part of the loss."""
        settings = self.settings
        quantize = self.epoch >= settings.open_epochs
        self.model.train()
        batches = plan_batches(examples, settings.frames_per_batch, settings.seed, self.epoch)
        total_steps = len(batches) * settings.epochs
        draw = random.Random(f"mask/{settings.seed}/{self.epoch}")
        sums: dict[str, float] = {}
        bar = tqdm(batches, desc=f"epoch {self.epoch + 1}/{settings.epochs}", unit="batch", mininterval=5)
        for batch in bar:
            mels, lengths, characters, character_lengths, phones = collate(batch)
            mels = mask_spectrum(mels, lengths, draw).to(self.device)
            self.set_learning_rate(total_steps)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
                out = self.model(mels, lengths.to(self.device), quantize)
            loss, parts = recogniser_loss(
                out,
                characters.to(self.device),
                character_lengths.to(self.device),
                phones.to(self.device),
                _COMMITMENT_WEIGHT,
            )
            if not loss.isfinite():
                raise ValueError(f"step {self.step}: the loss is {loss.item()}; utterances {[e.utt_id for e in batch]}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), _GRADIENT_NORM)
            self.optimizer.step()
            self.step += 1
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
            bar.set_postfix(ctc=f"{parts['ctc']:.2f}", phone=f"{parts['phone_accuracy']:.2f}")
        return sums

    @torch.no_grad()
    def evaluate(self, examples: list[Example], quantize: bool) -> dict[str, float]:
        """Recognise a split greedily, in float32."""
        self.model.eval()
        written, correct, units, codes = [], 0, 0, []
        for batch in plan_batches(examples, self.settings.frames_per_batch, self.settings.seed, 0):
            mels, lengths, _, _, phones = collate(batch)
            out = self.model(mels.to(self.device), lengths.to(self.device), quantize)
            texts = read_characters(out.character_logits, out.unit_lengths)
            written += [(example.text, text) for example, text in zip(batch, texts, strict=True)]
            correct += int((out.phone_logits.argmax(dim=-1).cpu() == phones).sum())
            units += len(phones)
            if out.codes is not None:
                codes.append(out.codes.cpu())
        references, hypotheses = (list(side) for side in zip(*written, strict=True))
        result = {
            "character_error_rate": jiwer.cer(references, hypotheses),
            "word_error_rate": jiwer.wer(references, hypotheses),
            "phone_accuracy": correct / units,
        }
        if codes:
            counts = torch.bincount(torch.cat(codes), minlength=self.settings.codes).double()
            share = counts[counts > 0] / counts.sum()
            result["codes_in_use"] = int((counts > 0).sum())
            result["code_perplexity"] = float((-(share * share.log()).sum()).exp())
        return result

    @property
    def reader_deciding(self) -> dict[str, Any]:
        """What a recogniser must have learned from, and how, to be this tokenizer's."""
        settings = self.settings
        return {
            "tokenizer": digest([*self.model.encoder.state_dict().values(), self.model.codebook]),
            "corpus": plan_of(settings.work_dir / "corpus"),
            **{name: getattr(settings, name) for name in _DECIDES_READER},
        }

    def has_reader(self) -> bool:
        """Whether this tokenizer's recogniser has learned alone already."""
        return bool(self._reader_state(self.reader_path))

    def take_reader(self) -> bool:
        """Take the recogniser that learned from this tokenizer's codes; gives False where there is none."""
        state = self._reader_state(self.reader_path)
        if state:
            self.model.reader().load_state_dict(state["reader"])
        return bool(state)

    def _reader_state(self, path: Path) -> dict[str, Any]:
        """What a file holds of this tokenizer's recogniser; nothing where it is not there, or another's."""
        if not path.is_file():
            return {}
        state = torch.load(path, map_location=self.device, weights_only=True)
        return state if state.get("settings") == self.reader_deciding else {}

    def train_reader(self, examples: list[Example], stop: StopRequest) -> bool:
        """Let the recogniser learn on from the finished tokenizer's codes; nothing of the tokenizer changes.

        Args:
            examples: to learn from.
            stop: asked after each pass.

        Returns:
            False where it was asked to stop; the next run goes on after that pass.
        """
        settings = self.settings
        codes = self.tokenize(examples)
        reader = self.model.reader()
        optimizer = MuonWithAdamW(muon_groups(reader), lr=_READER_LR, betas=(0.9, 0.98), weight_decay=0.01)
        total = settings.reader_epochs * len(plan_batches(examples, settings.reader_frames_per_batch, settings.seed, 0))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, _READER_LR, max(2, round(1.05 * total)), pct_start=0.1, cycle_momentum=False
        )
        codebook = self.model.codebook.detach().cpu()
        last_path = self.reader_path.with_name("reader_last.pt")
        parts = {"reader": reader, "optimizer": optimizer, "schedule": schedule}
        last = self._reader_state(last_path)
        for name in parts if last else ():
            parts[name].load_state_dict(last[name])
        self.model.train()
        for epoch in range(last.get("epochs", 0), settings.reader_epochs):
            batches = plan_batches(examples, settings.reader_frames_per_batch, settings.seed, settings.epochs + epoch)
            bar = tqdm(batches, desc=f"recogniser {epoch + 1}/{settings.reader_epochs}", unit="batch", mininterval=5)
            draw = random.Random(f"hide/{settings.seed}/{epoch}")
            for batch in bar:
                rows = torch.cat([hide_units(codebook[codes[example.utt_id]], draw) for example in batch])
                rows = rows.to(self.device)
                lengths = torch.tensor([len(codes[example.utt_id]) for example in batch])
                valid = torch.arange(int(lengths.max()))[None] < lengths[:, None]
                characters = torch.cat([example.characters for example in batch]).to(self.device)
                character_lengths = torch.tensor([len(example.characters) for example in batch]).to(self.device)
                phones = torch.cat([example.phones for example in batch]).to(self.device)
                lengths, valid = lengths.to(self.device), valid.to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.bf16):
                    character_logits, phone_logits = self.model.read(rows, valid)
                out = Recognised(character_logits, phone_logits, lengths, rows.new_zeros(()), None)
                loss, losses = recogniser_loss(out, characters, character_lengths, phones, 0.0)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(reader.parameters(), _GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                bar.set_postfix(ctc=f"{losses['ctc']:.2f}")
            with atomic_path(last_path) as unfinished:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"settings": self.reader_deciding, "epochs": epoch + 1, **state}, unfinished)
            if stop.requested:
                return False
        with atomic_path(self.reader_path) as unfinished:
            torch.save({"settings": self.reader_deciding, "reader": reader.state_dict()}, unfinished)
        last_path.unlink(missing_ok=True)
        return True

    @torch.no_grad()
    def tokenize(self, examples: list[Example]) -> dict[str, Tensor]:
        """Give each utterance its codes, [S]."""
        self.model.eval()
        codes = {}
        for batch in plan_batches(examples, self.settings.frames_per_batch, self.settings.seed, 0):
            mels, lengths, *_ = collate(batch)
            directions, unit_lengths = self.model.directions(mels.to(self.device), lengths.to(self.device))
            for example, row, length in zip(batch, directions, unit_lengths.tolist(), strict=True):
                codes[example.utt_id] = torch.cdist(row[:length], self.model.codebook).argmin(dim=1).cpu()
        return codes

    def export(self) -> Path:
        """Write the encoder and the codebook as the released file's graph.

        Rows of the codebook that nothing was learned for point away from every learned code: they are never nearest.
        """
        weights = {f"encoder.{key}": value.cpu() for key, value in self.model.encoder.state_dict().items()}
        learned = self.model.codebook.detach().cpu()
        unused = -learned.mean(dim=0, keepdim=True).expand(_CODEBOOK_ROWS - len(learned), -1)
        far = 2.0 * torch.nn.functional.normalize(unused, dim=1)
        weights["quantizer._codebook.embed"] = torch.cat([learned, far])
        path = self.folder / "speech_tokenizer_v1.onnx"
        with atomic_path(path) as unfinished:
            onnx.save(build_speech_tokenizer(weights, self.model.config.n_audio_head), unfinished)
        return path

    def plot(self) -> None:
        """Draw loss and error over the epochs."""
        epochs = [entry["epoch"] for entry in self.history]
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
        for name in ("ctc", "phone", "commitment"):
            left.plot(epochs, [entry[name] for entry in self.history], label=name)
        right.plot(epochs, [entry["character_error_rate"] for entry in self.history], label="character error, dev")
        right.plot(epochs, [1 - entry["dev_phone_accuracy"] for entry in self.history], label="phone error, dev")
        for axes, label in ((left, "training loss"), (right, "error rate")):
            axes.axvline(self.settings.open_epochs + 0.5, color="grey", linestyle=":", label="quantizer starts")
            axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
            axes.legend()
        figure.tight_layout()
        with atomic_path(self.folder / "loss_curve.png") as path:
            figure.savefig(path, dpi=110)
        plt.close(figure)


def count_disagreements(onnx_path: Path, utterances: list[Spoken]) -> tuple[int, int]:
    """Compare onnxruntime and s3tokenizer on the exported file; returns differing tokens and all tokens."""
    waveforms = [read_audio(spoken.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform for spoken in utterances]
    rows = [open_extractor(onnx_path, backend=backend).extract(waveforms) for backend in ("onnxruntime", "s3tokenizer")]
    pairs = [(a, b) for left, right in zip(*rows, strict=True) for a, b in zip(left, right, strict=True)]
    return sum(a != b for a, b in pairs), len(pairs)


def train(settings: Settings, device: torch.device) -> int:
    """Train to the end or to Ctrl-C.

    Args:
        settings: the script's constants.
        device: where to compute.

    Returns:
        the exit code.

    Raises:
        FileNotFoundError, ValueError: the message is for the person at the keyboard.
    """
    corpus = settings.work_dir / "corpus"
    splits = {split: read_split(corpus, split) for split in ("train", "dev", "test")}
    run = Run(settings, device)
    print(f"settings of {run.folder}:\n{settings.describe()}\n", flush=True)
    if settings.finished:
        run.take_finished(settings.finished)
    else:
        run.resume()
    train_set = []
    if run.epoch < settings.epochs or (settings.reader_epochs and not run.has_reader()):
        settings.save(run.folder / "settings.json")
        train_set = load_examples(splits["train"], "log-mels, train")
    dev_set = load_examples(splits["dev"], "log-mels, dev")
    with StopRequest() as stop:
        while run.epoch < settings.epochs:
            if run.epoch == settings.open_epochs:
                run.fit_codes(train_set)
            started = time.monotonic()
            sums = run.train_epoch(train_set)
            run.epoch += 1
            dev = run.evaluate(dev_set, quantize=run.epoch > settings.open_epochs)
            run.seconds += time.monotonic() - started
            dev["dev_phone_accuracy"] = dev.pop("phone_accuracy")
            run.history.append({"epoch": run.epoch, **sums, **dev})
            print(json.dumps({key: round(value, 4) for key, value in run.history[-1].items()}), flush=True)
            run.save()
            run.plot()
            if stop.requested:
                print("stopped; the same command goes on from here")
                return stop.exit_code
        path = settings.finished or run.export()
        print(f"{path} is finished; the recogniser learns on from its codes", flush=True)
        before = run.evaluate(dev_set, quantize=True)
        if settings.reader_epochs and not run.take_reader():
            if (corpus / "lively").is_dir():
                train_set += load_examples(read_split(corpus, "lively"), "log-mels, lively")
            if not run.train_reader(train_set, stop):
                print("stopped; the same command goes on from here")
                return stop.exit_code
    wrong, tokens = count_disagreements(path, splits["test"])
    metrics = {
        "dev_before_the_recogniser_learned_alone": before,
        "test": run.evaluate(load_examples(splits["test"], "log-mels, test"), quantize=True),
        "tokens_compared": tokens,
        "tokens_differing": wrong,
        "training_seconds": round(run.seconds),
        "threads": torch.get_num_threads(),
        "parameters_exported": sum(value.numel() for value in run.model.encoder.parameters()),
        "settings": run.deciding,
        "history": run.history,
    }
    write_text(run.folder / "metrics.json", json.dumps(metrics, indent=1))
    print(json.dumps(metrics["test"]))
    print(f"{path}: onnxruntime and s3tokenizer differ in {wrong} of {tokens} tokens")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    if settings.finished is None and settings.open_epochs >= settings.epochs:
        print(
            f"error: --open-epochs is {settings.open_epochs}: of {settings.epochs} epochs none would be left for the "
            "codes",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(settings.num_threads)
    try:
        return train(settings, pick_device(settings.device))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
