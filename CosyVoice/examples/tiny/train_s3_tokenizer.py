"""Train the supervised S3 tokenizer on the synthesised corpus and write it as `speech_tokenizer_v1.onnx`.

    python CosyVoice/examples/tiny/train_s3_tokenizer.py --work-dir CosyVoice/examples/tiny/work

In: `<work-dir>/corpus/{train,dev,test}`. Out, in `<work-dir>/s3_tokenizer/`: speech_tokenizer_v1.onnx, metrics.json
(character error after quantization, codes in use), loss_curve.png, and last.pt and reader_last.pt, where a stopped run
goes on after the last finished pass; reader.pt is the recogniser.
The first epochs train the encoder without the quantizer; then k-means places the codes and the rest learns with them.
The tokenizer is then finished and written. The recogniser behind it learns on alone, from the codes: the character
error is to say what the codes hold, not how little a recogniser learned in the same time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
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
from taste.audio import read_audio
from taste.s3_units import HEAD_WIDTH, count_units, load_s3_tokenizer, open_extractor

SAMPLE_RATE_HZ = 16_000
MEL_BINS = 128
POSITIONS = 1500  # 30 s
CODEBOOK_ROWS = 4096  # of the exported file
KMEANS_UNITS = 60_000  # units that k-means sees
COMMITMENT_WEIGHT = 1.0
GRADIENT_NORM = 1.0
MASKED_BINS = 24  # SpecAugment: at most so many mel bins ...
MASKED_FRAMES = 20  # ... and so many frames, 10 ms each, per mask
TIME_MASKS = 2
HIDDEN_UNITS = 10  # longest stretch of codes hidden from the recogniser that learns alone ...
HIDDEN_SHARE = 0.15  # ... and their share of an utterance
READER_LR = 2e-3
READER_SETTINGS_THAT_MUST_MATCH = ("recogniser_layers", "reader_epochs", "reader_frames_per_batch", "seed")
SETTINGS_THAT_MUST_MATCH = ("width", "layers", "recogniser_layers", "codes", "epochs", "open_epochs", "lr", "seed")


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
        waveform = read_audio(spoken.audio_path, SAMPLE_RATE_HZ).waveform
        units = count_units(len(waveform))
        return Example(
            spoken.utt_id,
            whisper_log_mel(waveform, MEL_BINS).half(),
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
        width = draw.randint(0, MASKED_BINS)
        first = draw.randint(0, MEL_BINS - width)
        row[first : first + width, :length] = fill
        for _ in range(TIME_MASKS):
            width = min(draw.randint(0, MASKED_FRAMES), length // 4)
            first = draw.randint(0, length - width)
            row[:, first : first + width] = fill
    return mels


def hide_units(rows: Tensor, draw: random.Random) -> Tensor:
    """Silence a few stretches of an utterance's codes [S, D]."""
    rows = rows.clone()
    for _ in range(round(HIDDEN_SHARE * len(rows) / (HIDDEN_UNITS / 2))):
        width = min(draw.randint(1, HIDDEN_UNITS), len(rows))
        first = draw.randint(0, len(rows) - width)
        rows[first : first + width] = 0.0
    return rows


class Run:
    """A training run: model, optimizer, and where it stands.

    Args:
        args: the parsed command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = args.work_dir / "s3_tokenizer"
        self.reader_path = self.folder / "reader.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        config = ModelConfig(
            n_mels=MEL_BINS,
            n_audio_ctx=POSITIONS,
            n_audio_state=args.width,
            n_audio_head=args.width // HEAD_WIDTH,
            n_audio_layer=args.layers,
            n_codebook_size=CODEBOOK_ROWS,
        )
        self.model = TokenizerTeacher(config, args.codes, args.recogniser_layers, decay=args.codebook_decay)
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been made with to be gone on with."""
        settings = {name: getattr(self.args, name) for name in SETTINGS_THAT_MUST_MATCH}
        return settings | {"corpus": plan_of(self.args.work_dir / "corpus")}

    def save(self) -> None:
        """Write all of it, so that a rerun goes on after the last finished epoch."""
        state = {
            "settings": self.settings,
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
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        differing = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        if differing:
            was = ", ".join(f"{name} {state['settings'].get(name)}, now {self.settings[name]}" for name in differing)
            raise ValueError(
                f"{path} was made with other settings ({was}); use those, or remove the file to start over"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.history, self.seconds = state["history"], state["seconds"]
        print(f"going on after epoch {self.epoch} of {self.args.epochs}")

    def take_finished(self, path: Path) -> None:
        """Take encoder and codebook from a finished tokenizer, so that only the recogniser is left to learn.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no S3 tokenizer v1, or one of another size.
        """
        finished = load_s3_tokenizer(path).state_dict()
        encoder = {name.removeprefix("encoder."): value for name, value in finished.items() if name.startswith("enc")}
        codes = finished["quantizer._codebook.embed"][: self.args.codes]
        try:
            self.model.encoder.load_state_dict(encoder)
            self.model.place_codes(codes.to(self.args.device))
        except RuntimeError as error:
            raise ValueError(
                f"--finished {path} has another size ({error}); give its --width, --layers, --codes"
            ) from error
        self.epoch = self.args.epochs
        print(f"encoder and codes are those of {path}")

    def set_learning_rate(self, total_steps: int) -> None:
        """Linear warm-up, then half a cosine down to 2 % of the peak."""
        warm_up = min(1.0, (self.step + 1) / self.args.warm_up_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / total_steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * warm_up * decay

    @torch.no_grad()
    def fit_codes(self, examples: list[Example]) -> None:
        """Place the codes by k-means on what the encoder gives for part of the training set."""
        self.model.eval()
        draw = random.Random(self.args.seed)
        rows: list[Tensor] = []
        for example in draw.sample(examples, len(examples)):
            mel = example.mel.float()[None].to(self.args.device)
            rows.append(self.model.directions(mel, torch.tensor([mel.shape[2]], device=mel.device))[0][0])
            if sum(len(row) for row in rows) > KMEANS_UNITS:
                break
        generator = torch.Generator().manual_seed(self.args.seed)
        codes = fit_codebook(torch.cat(rows).cpu(), self.args.codes, generator, fitted=self.args.codes)
        self.model.place_codes(codes.to(self.args.device))

    def train_epoch(self, examples: list[Example]) -> dict[str, float]:
        """Pass over the training set once; returns the mean of each part of the loss."""
        args = self.args
        quantize = self.epoch >= args.open_epochs
        self.model.train()
        batches = plan_batches(examples, args.frames_per_batch, args.seed, self.epoch)
        total_steps = len(batches) * args.epochs
        draw = random.Random(f"mask/{args.seed}/{self.epoch}")
        sums: dict[str, float] = {}
        bar = tqdm(batches, desc=f"epoch {self.epoch + 1}/{args.epochs}", unit="batch", mininterval=5)
        for batch in bar:
            mels, lengths, characters, character_lengths, phones = collate(batch)
            mels = mask_spectrum(mels, lengths, draw).to(args.device)
            self.set_learning_rate(total_steps)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                out = self.model(mels, lengths.to(args.device), quantize)
            loss, parts = recogniser_loss(
                out,
                characters.to(args.device),
                character_lengths.to(args.device),
                phones.to(args.device),
                COMMITMENT_WEIGHT,
            )
            if not loss.isfinite():
                raise ValueError(f"step {self.step}: the loss is {loss.item()}; utterances {[e.utt_id for e in batch]}")
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
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
        for batch in plan_batches(examples, self.args.frames_per_batch, self.args.seed, 0):
            mels, lengths, _, _, phones = collate(batch)
            out = self.model(mels.to(self.args.device), lengths.to(self.args.device), quantize)
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
            counts = torch.bincount(torch.cat(codes), minlength=self.args.codes).double()
            share = counts[counts > 0] / counts.sum()
            result["codes_in_use"] = int((counts > 0).sum())
            result["code_perplexity"] = float((-(share * share.log()).sum()).exp())
        return result

    @property
    def reader_settings(self) -> dict[str, Any]:
        """What a recogniser must have learned from, and how, to be this tokenizer's."""
        args = self.args
        return {
            "tokenizer": digest([*self.model.encoder.state_dict().values(), self.model.codebook]),
            "corpus": plan_of(args.work_dir / "corpus"),
            **{name: getattr(args, name) for name in READER_SETTINGS_THAT_MUST_MATCH},
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
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        return state if state.get("settings") == self.reader_settings else {}

    def train_reader(self, examples: list[Example], stop: StopRequest) -> bool:
        """Let the recogniser learn on from the finished tokenizer's codes; nothing of the tokenizer changes.

        Args:
            examples: to learn from.
            stop: asked after each pass.

        Returns:
            False where it was asked to stop; the next run goes on after that pass.
        """
        args = self.args
        codes = self.tokenize(examples)
        reader = self.model.reader()
        optimizer = MuonWithAdamW(muon_groups(reader), lr=READER_LR, betas=(0.9, 0.98), weight_decay=0.01)
        total = args.reader_epochs * len(plan_batches(examples, args.reader_frames_per_batch, args.seed, 0))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, READER_LR, max(2, round(1.05 * total)), pct_start=0.1, cycle_momentum=False
        )
        codebook = self.model.codebook.detach().cpu()
        last_path = self.reader_path.with_name("reader_last.pt")
        parts = {"reader": reader, "optimizer": optimizer, "schedule": schedule}
        last = self._reader_state(last_path)
        for name in parts if last else ():
            parts[name].load_state_dict(last[name])
        self.model.train()
        for epoch in range(last.get("epochs", 0), args.reader_epochs):
            batches = plan_batches(examples, args.reader_frames_per_batch, args.seed, args.epochs + epoch)
            bar = tqdm(batches, desc=f"recogniser {epoch + 1}/{args.reader_epochs}", unit="batch", mininterval=5)
            draw = random.Random(f"hide/{args.seed}/{epoch}")
            for batch in bar:
                rows = torch.cat([hide_units(codebook[codes[example.utt_id]], draw) for example in batch])
                rows = rows.to(args.device)
                lengths = torch.tensor([len(codes[example.utt_id]) for example in batch])
                valid = torch.arange(int(lengths.max()))[None] < lengths[:, None]
                characters = torch.cat([example.characters for example in batch]).to(args.device)
                character_lengths = torch.tensor([len(example.characters) for example in batch]).to(args.device)
                phones = torch.cat([example.phones for example in batch]).to(args.device)
                lengths, valid = lengths.to(args.device), valid.to(args.device)
                with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                    character_logits, phone_logits = self.model.read(rows, valid)
                out = Recognised(character_logits, phone_logits, lengths, rows.new_zeros(()), None)
                loss, losses = recogniser_loss(out, characters, character_lengths, phones, 0.0)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(reader.parameters(), GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                bar.set_postfix(ctc=f"{losses['ctc']:.2f}")
            with atomic_path(last_path) as unfinished:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"settings": self.reader_settings, "epochs": epoch + 1, **state}, unfinished)
            if stop.requested:
                return False
        with atomic_path(self.reader_path) as unfinished:
            torch.save({"settings": self.reader_settings, "reader": reader.state_dict()}, unfinished)
        last_path.unlink(missing_ok=True)
        return True

    @torch.no_grad()
    def tokenize(self, examples: list[Example]) -> dict[str, Tensor]:
        """Give each utterance its codes, [S]."""
        self.model.eval()
        codes = {}
        for batch in plan_batches(examples, self.args.frames_per_batch, self.args.seed, 0):
            mels, lengths, *_ = collate(batch)
            directions, unit_lengths = self.model.directions(mels.to(self.args.device), lengths.to(self.args.device))
            for example, row, length in zip(batch, directions, unit_lengths.tolist(), strict=True):
                codes[example.utt_id] = torch.cdist(row[:length], self.model.codebook).argmin(dim=1).cpu()
        return codes

    def export(self) -> Path:
        """Write the encoder and the codebook as the released file's graph.

        Rows of the codebook that nothing was learned for point away from every learned code: they are never nearest.
        """
        weights = {f"encoder.{key}": value.cpu() for key, value in self.model.encoder.state_dict().items()}
        learned = self.model.codebook.detach().cpu()
        unused = -learned.mean(dim=0, keepdim=True).expand(CODEBOOK_ROWS - len(learned), -1)
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
            axes.axvline(self.args.open_epochs + 0.5, color="grey", linestyle=":", label="quantizer starts")
            axes.set(xlabel="epoch", ylabel=label, ylim=(0, None))
            axes.legend()
        figure.tight_layout()
        with atomic_path(self.folder / "loss_curve.png") as path:
            figure.savefig(path, dpi=110)
        plt.close(figure)


def count_disagreements(onnx_path: Path, utterances: list[Spoken]) -> tuple[int, int]:
    """Compare onnxruntime and s3tokenizer on the exported file; returns differing tokens and all tokens."""
    waveforms = [read_audio(spoken.audio_path, SAMPLE_RATE_HZ).waveform for spoken in utterances]
    rows = [open_extractor(onnx_path, backend=backend).extract(waveforms) for backend in ("onnxruntime", "s3tokenizer")]
    pairs = [(a, b) for left, right in zip(*rows, strict=True) for a, b in zip(left, right, strict=True)]
    return sum(a != b for a, b in pairs), len(pairs)


def train(args: argparse.Namespace) -> int:
    """Train to the end or to Ctrl-C; return the exit code."""
    corpus = args.work_dir / "corpus"
    splits = {split: read_split(corpus, split) for split in ("train", "dev", "test")}
    run = Run(args)
    if args.finished:
        run.take_finished(args.finished)
    else:
        run.resume()
    train_set = []
    if run.epoch < args.epochs or (args.reader_epochs and not run.has_reader()):
        train_set = load_examples(splits["train"], "log-mels, train")
    dev_set = load_examples(splits["dev"], "log-mels, dev")
    with StopRequest() as stop:
        while run.epoch < args.epochs:
            if run.epoch == args.open_epochs:
                run.fit_codes(train_set)
            started = time.monotonic()
            sums = run.train_epoch(train_set)
            run.epoch += 1
            dev = run.evaluate(dev_set, quantize=run.epoch > args.open_epochs)
            run.seconds += time.monotonic() - started
            dev["dev_phone_accuracy"] = dev.pop("phone_accuracy")
            run.history.append({"epoch": run.epoch, **sums, **dev})
            print(json.dumps({key: round(value, 4) for key, value in run.history[-1].items()}), flush=True)
            run.save()
            run.plot()
            if stop.requested:
                print("stopped; the same command goes on from here")
                return stop.exit_code
        path = args.finished or run.export()
        print(f"{path} is finished; the recogniser learns on from its codes", flush=True)
        before = run.evaluate(dev_set, quantize=True)
        if args.reader_epochs and not run.take_reader():
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
        "settings": run.settings,
        "history": run.history,
    }
    write_text(run.folder / "metrics.json", json.dumps(metrics, indent=1))
    print(json.dumps(metrics["test"]))
    print(f"{path}: onnxruntime and s3tokenizer differ in {wrong} of {tokens} tokens")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and train; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_work_dir = Path(__file__).resolve().parent / "work"
    parser.add_argument("--work-dir", type=Path, default=default_work_dir, help="folder of the recipe's files")
    parser.add_argument("--width", type=int, default=128, help="channels of the encoder, a multiple of 64")
    parser.add_argument("--layers", type=int, default=3, help="transformer blocks before the quantizer")
    parser.add_argument("--recogniser-layers", type=int, default=4, help="transformer blocks after it, not exported")
    parser.add_argument("--codes", type=int, default=1024, help="codes that are learned, of the 4096 in the file")
    parser.add_argument("--codebook-decay", type=float, default=0.99, help="of the codebook's moving averages")
    parser.add_argument("--finished", type=Path, help="speech_tokenizer_v1.onnx; only the recogniser learns, from it")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the training set")
    parser.add_argument("--open-epochs", type=int, default=7, help="of them, at the start, without the quantizer")
    parser.add_argument("--reader-epochs", type=int, default=12, help="passes of the recogniser alone, from the codes")
    parser.add_argument("--reader-frames-per-batch", type=int, default=3_000, help="the same for those passes")
    parser.add_argument("--frames-per-batch", type=int, default=8_000, help="mel frames, 10 ms each, padding included")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--warm-up-steps", type=int, default=200, help="steps until it is reached")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and masks")
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    args = parser.parse_args(argv)
    if not args.finished and not args.open_epochs < args.epochs:
        parser.error(f"--open-epochs is {args.open_epochs}: of {args.epochs} epochs none would be left for the codes")
    torch.set_num_threads(args.num_threads)
    try:
        return train(args)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
