"""Teach the tiny recipe's language model to read: to know, at each unit, which of its text tokens is being spoken.

In: `<work-dir>/corpus/<split>/{wav.scp,text,utt2spk,phones,utt2speech_token.pt,utt2embedding.pt}`, and the weights
that start_llm.py wrote. Out, in `<work-dir>/exp/llm/`: llm.pt, word_sounds.pt, told_words.pt (what it was told of
each word), metrics.jsonl (as train.py writes it), loss_curve.png, settings.json, and state.pt, from which a run that
was stopped goes on.

    python CosyVoice/examples/tiny/teach_reading.py --work-dir CosyVoice/examples/tiny/work --minutes 40
    python CosyVoice/examples/tiny/teach_reading.py --work-dir /tmp/work --steps 20 --batch-positions 800      (a look)

What is trained is the published loss on the published model. The lessons beside it use what flite tells about its own
speech and end with the training: some attention heads are shown the token that is spoken next (guided attention,
arXiv 1710.08969), and linear layers must tell, from hidden states, the phone of the next unit and the phone that comes
after the one being spoken. Without them the model learns which unit follows which, and finds its place in the text
late or never. Some units are hidden from it, so that it has to go by the text where it speaks freely. In some rows it
is told how slowly each word is spoken, where pauses are, which phones a word has that its text does not say, and which
units it holds, where TASTE will tell it what a recording holds; `word_sounds.pt` says how, and train_taste.py teaches
an aggregator to hear it. Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped, saved.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import PAUSE, PHONES, Spoken, phone_classes, read_split
from flite_speech import find_flite
from packed_features import PackedRows, cut_batches
from reading_lessons import SOUNDS_FILE, WORDS_FILE, Lessons, ReadingLessons, describe_words
from resumable import LongTraining, pick_dtype, resume, run_to_the_end, save_checkpoint
from unit_codes import unit_codes
from word_times import Span, pronounce_texts, time_tokens

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import load_state, read_torch_file, read_weights
from cosyvoice.utils.muon import MuonWithAdamW, muon_groups
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from cosyvoice.utils.tensor_file import save_tensors
from cosyvoice.utils.train_log import CV_TAG, TRAIN_TAG, TrainLog
from cosyvoice.utils.train_utils import load_model
from taste.linear_fits import ridge

# B batch   T text tokens   S S3 units, 50 Hz

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # the recipe's folder
CONFIG = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # sizes of the language model
LLM = None  # str: weights to start from; none: <work-dir>/llm_start/llm.pt
SPLITS = ("train", "phrases", "lively")  # of the corpus, to learn from
DEV = "dev"  # the split that is measured
STEPS = 6_000  # of the optimizer; they set the schedule where MINUTES does not
MINUTES = None  # float: train by the clock instead, all runs together; the schedule follows it
BATCH_POSITIONS = 2_000  # of the language model in a batch, padding included; 20,000 on a GPU
LR = 4e-3  # peak learning rate of Muon and AdamW
LESSON_LR = 1.5e-3  # the same of the parts that end with the lessons
WEIGHT_DECAY = 0.01  # on matrices only
GRAD_CLIP = 1.0  # largest norm of the gradient
GUIDE_WEIGHT = 0.5  # of the lesson for the attention heads
GUIDE_EVERY = 4  # steps between two of it
PHONE_WEIGHT = 0.3  # of the lesson for the phone
COMING_WEIGHT = 0.5  # of the lesson for the phone that comes next
LASTING_WEIGHT = 0.5  # of the lesson for how long the word has lasted, and will last
SOUNDING_WEIGHT = 0.5  # of the lesson for what it was told of the word's units
TELL_ROWS = 0.5  # share of a batch's rows in which the language model is told how the words sound
HIDE_ROWS = 0.5  # share of a batch's rows in which some units are hidden
HIDE_UNITS = 0.15  # share of the units that are hidden in these
CHECK_EVERY = 500  # steps between two evaluations on DEV
SAVE_MINUTES = 5.0  # between two saves
DTYPE = "auto"  # of the matrix products: float32 (TF32 on a GPU), bfloat16; auto: bfloat16 on a CPU that is fast at it
SEED = 1986  # of the order of the data, of what is hidden, of dropout
THREADS = 1  # of the CPU
DEVICE = "auto"  # auto, cpu, cuda

_SAY_EVERY = 100  # steps
_FITTED = 2_000  # utterances, about, whose texts show how the text encoder writes phones
_MEASURED_POSITIONS = 20_000  # of a batch that is measured
_EXTRA_POSITIONS = 4  # beside text and units: sos, speaker, task, and the end
_ADAM_BETAS = (0.9, 0.98)
_DECIDES_TRAINING = (
    *("splits", "batch_positions", "lr", "lesson_lr", "weight_decay", "grad_clip", "guide_weight", "guide_every"),
    *("phone_weight", "coming_weight", "lasting_weight", "sounding_weight", "tell_rows", "hide_rows"),
    *("hide_units", "dtype", "seed"),
)
_OTHER_VALUES = ("loss_with_wrong_text", "loss_with_sounds", "lasting_acc_with_sounds", "sounding_with_sounds")


class Aligned(NamedTuple):
    """An utterance and what is spoken when."""

    utt_id: str
    text: Tensor  # tokens, [T] int64
    words: Tensor  # the word of each token, [T] int64
    units: Tensor  # [S] int64
    owners: Tensor  # number of the text token that each unit belongs to, [S] int64
    phones: Tensor  # class of each unit's phone, [S] int64
    speaker: Tensor  # [192] float32
    expected: Tensor  # [T, phones] int16, how often each phone is in a token's word, by its text
    said: Tensor  # the same, as it is spoken


class Pace(NamedTuple):
    """How many units a word usually has: so many for each of its phones, and some more."""

    of_phone: Tensor  # [phones] float32
    more: float

    def units(self, expected: Tensor) -> Tensor:
        """Of words whose phones are counted, [..., phones]: [...], 1 at least."""
        return (expected.float() @ self.of_phone + self.more).clamp(min=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Read the corpus, teach, write.

    Args:
        settings: the script's constants.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    folder = settings.work_dir / "exp" / "llm"
    start = Path(settings.llm or settings.work_dir / "llm_start" / "llm.pt")
    if not start.is_file():
        raise FileNotFoundError(f"{start}: there is no such file; run start_llm.py first, or give --llm")
    print(f"settings of {folder}:\n{settings.describe()}\n")
    torch.set_float32_matmul_precision("high")
    items = [item for name in settings.splits for item in read_aligned(settings, name)]
    unheard = read_aligned(settings, settings.dev)
    pace = usual_pace(items)
    learned, measured = AlignedSet(items, device, pace), AlignedSet(unheard, device, pace)

    torch.manual_seed(settings.seed)
    llm = load_model(settings.config, "llm")
    load_state(llm, read_weights(start), start)
    llm.text_embedding.requires_grad_(False)  # start_llm.py has taught them, and features that hold them stay valid
    lessons = ReadingLessons(llm.float())
    lessons.word_sounds.speak_of_phones(words_for_phones(llm, items[:: max(1, len(items) // _FITTED)]))
    lessons.to(device)
    teaching = Teaching(settings, folder, lessons, learned, measured, start=file_digest(start), dtype=dtype)
    print(
        f"{len(learned)} utterances, {learned.units.lengths.sum() / S3_UNITS_PER_SECOND / 3600:.2f} h, on {device} in "
        f"{dtype}"
    )
    teaching.go_on()
    settings.save(folder / "settings.json")
    save_tensors(folder / WORDS_FILE, learned.describe() | measured.describe())
    return teaching.until_the_end(stop_requested)


def read_aligned(settings: Settings, split: str) -> list[Aligned]:
    """Read a split with the token and the phone of each unit.

    Args:
        settings: WORK_DIR and CONFIG.
        split: its name.

    Returns:
        its utterances.

    Raises:
        FileNotFoundError: a table is missing.
        ValueError: an utterance lacks a line in a table, its units or its vector.
    """
    folder = settings.work_dir / "corpus" / split
    spoken = read_split(settings.work_dir / "corpus", split)
    units, speakers = (read_torch_file(folder / f"utt2{name}.pt") for name in ("speech_token", "embedding"))
    lacking = [item.utt_id for item in spoken if item.utt_id not in units or item.utt_id not in speakers]
    if lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} utterances have no speech tokens or no speaker vector, {lacking[0]} first; "
            "run stages 3 and 4 of run.sh"
        )
    tokenizer = load_config(settings.config, ["get_tokenizer"])["get_tokenizer"]()
    lexicon = pronounce_texts((item.text for item in spoken), find_flite())
    return [
        align_units(item, tokenizer, lexicon, units[item.utt_id], speakers[item.utt_id])
        for item in tqdm(spoken, desc=f"alignments, {split}", mininterval=2)
    ]


def align_units(
    spoken: Spoken, tokenizer: Any, lexicon: dict[str, tuple[str, ...]], units: Sequence[int], speaker: Sequence[float]
) -> Aligned:
    """Say which token and which phone each unit belongs to."""
    timed = time_tokens(spoken, tokenizer, lexicon)
    return Aligned(
        spoken.utt_id,
        torch.tensor(timed.tokens),
        torch.tensor(timed.words),
        torch.as_tensor(units, dtype=torch.int64),
        torch.from_numpy(unit_owners(timed.spans, len(units))),
        torch.from_numpy(phone_classes(spoken.phones, len(units))),
        torch.as_tensor(speaker, dtype=torch.float32),
        *(_counted([words[word] for word in timed.words]) for words in (timed.expected, timed.said)),
    )


def _counted(words: Sequence[Counter[str]]) -> Tensor:
    """How often each phone occurs, [T, phones], int16."""
    return torch.tensor([[word[phone] for phone in PHONES] for word in words], dtype=torch.int16)


def usual_pace(items: Sequence[Aligned]) -> Pace:
    """Find how many units a phone takes, by least squares over the words, pauses after them left out."""
    pause = PHONES.index(PAUSE)
    counts = [
        torch.bincount(item.words[item.owners[item.phones != pause]], minlength=len(item.words))[item.words]
        for item in items
    ]
    units = torch.cat(counts)
    heard = units > 0
    weight, bias = ridge(torch.cat([item.expected for item in items])[heard].double(), units[heard, None].double())
    return Pace(weight[0].float(), float(bias))


@torch.no_grad()
def words_for_phones(llm: TransformerLM, items: Sequence[Aligned]) -> Tensor:
    """What one more of each phone in a word adds to its encoded text, by least squares.

    Args:
        llm: with a text side that start_llm.py has taught.
        items: whose texts are read.

    Returns:
        [D, phones], float32.
    """
    encoded = [llm.encode(llm.text_embedding(item.text[None]), torch.tensor([len(item.text)]))[0][0] for item in items]
    weight, _ = ridge(torch.cat([item.expected for item in items]).double(), torch.cat(encoded).double())
    return weight.float()


def unit_owners(spans: Sequence[Span | None], num_units: int) -> np.ndarray:
    """The text token of each unit, [S], int64: the one that was begun last; before any was begun, the first.

    Args:
        spans: when each token is heard; None: never.
        num_units: S.
    """
    heard = [(span.start, number) for number, span in enumerate(spans) if span is not None]
    starts = np.array([start for start, _ in heard])
    middles = (np.arange(num_units) + 0.5) / S3_UNITS_PER_SECOND
    begun = np.searchsorted(starts, middles, side="right") - 1
    return np.array([number for _, number in heard], dtype=np.int64)[begun.clip(min=0)]


class AlignedSet:
    """Utterances on the device, from which batches are cut.

    Args:
        items: at least one.
        device: where to keep them.
        pace: what is usual.
    """

    def __init__(self, items: Sequence[Aligned], device: torch.device, pace: Pace) -> None:
        self.device = device
        self.text = PackedRows([item.text for item in items], 0, device)
        self.words = PackedRows([item.words for item in items], 0, device)
        self.units = PackedRows([item.units for item in items], 0, device)
        self.owners = PackedRows([item.owners for item in items], 0, device)
        self.phones = PackedRows([item.phones for item in items], 0, device)
        self.expected = PackedRows([item.expected for item in items], 0, device)
        self.said = PackedRows([item.said for item in items], 0, device)
        self.usual = PackedRows([pace.units(item.expected) for item in items], 0.0, device)
        self.speakers = torch.stack([item.speaker for item in items]).to(device)
        self.utt_ids = [item.utt_id for item in items]
        self.positions = self.text.lengths + self.units.lengths + _EXTRA_POSITIONS

    def __len__(self) -> int:
        return len(self.positions)

    def batch(self, chosen: Sequence[int], texts: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Some utterances, as `ReadingLessons.forward` reads them.

        Args:
            chosen: their numbers.
            texts: utterances whose texts they get; None: their own.
        """
        there = self._there(chosen)
        read, read_there = (chosen, there) if texts is None else (texts, self._there(texts))
        text, text_lengths = self.text.batch(read, read_there)
        units, unit_lengths = self.units.batch(chosen, there)
        return {
            "text_token": text,
            "text_token_len": text_lengths,
            "word": self.words.batch(read, read_there)[0],
            "speech_token": units,
            "speech_token_len": unit_lengths,
            "embedding": self.speakers[there],
            "owner": self.owners.batch(chosen, there)[0],
            "phone": self.phones.batch(chosen, there)[0],
            "expected": self.expected.batch(read, read_there)[0],
            "said": self.said.batch(read, read_there)[0],
            "usual": self.usual.batch(read, read_there)[0],
        }

    def describe(self) -> dict[str, Tensor]:
        """What is told of the words of each utterance, see `describe_words`, [T, FACTS], float16."""
        words, codes = {}, unit_codes().to(self.device)
        for chosen in cut_batches(self.positions, _MEASURED_POSITIONS):
            described = describe_words(self.batch(chosen), codes).half().cpu()
            for number, row in zip(chosen, described, strict=True):
                words[self.utt_ids[number]] = row[: self.text.lengths[number]].clone()
        return words

    def _there(self, numbers: Sequence[int]) -> Tensor:
        here = torch.tensor(numbers)
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here


class Teaching(LongTraining):
    """The training as far as it has come.

    Args:
        settings: the script's constants.
        folder: where everything is written.
        lessons: the language model inside its lessons, on the device.
        learned: utterances to learn from.
        measured: utterances to measure.
        start: names the weights that it begins with.
        dtype: of the matrix products.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        lessons: ReadingLessons,
        learned: AlignedSet,
        measured: AlignedSet,
        start: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            settings, lambda epoch: cut_batches(learned.positions, settings.batch_positions, settings.seed, epoch)
        )
        self.folder, self.lessons = folder, lessons
        self.learned, self.measured, self.start, self.dtype = learned, measured, start, dtype
        own, beside = muon_groups(lessons.llm, adamw=["llm_decoder"]), muon_groups(_without(lessons, "llm"))
        groups = [{**group, "peak_lr": settings.lr} for group in own]
        groups += [{**group, "peak_lr": settings.lesson_lr} for group in beside]
        for group in groups:
            group["weight_decay"] = settings.weight_decay if group["muon"] else 0.0
        self.optimizer = MuonWithAdamW(groups, betas=_ADAM_BETAS, fused=True)
        self.learning = [weight for group in groups for weight in group["params"]]
        self.unlogged: list[Tensor] = []  # of the steps since the last line

    def go_on(self) -> None:
        """Take up what an earlier run saved, if one did.

        Raises:
            ValueError: it is of other settings.
        """
        resume(self.folder / "state.pt", self._parts(), self._deciding())
        self.lines = TrainLog(self.folder, None, self.step, active=True)
        if self.step:
            self.lines.say(f"resuming from step {self.step}")

    def one_step(self, share: float) -> None:
        """Learn from one batch.

        Args:
            share: how much of the training is done, from 0 to 1.
        """
        settings = self.settings
        self.lessons.train()
        batch = self.learned.batch(self.begin_step(self.optimizer, share))
        with torch.autocast(self.learned.device.type, self.dtype, enabled=self.dtype != torch.float32):
            kept = self._kept_units(batch["speech_token"])
            told = torch.rand(len(kept), device=kept.device) < settings.tell_rows
            found = self.lessons(batch, kept, told, guide=self.step % settings.guide_every == 0)
        loss = found.loss + settings.guide_weight * found.guide
        loss = loss + settings.phone_weight * found.phone + settings.coming_weight * found.coming
        loss = loss + settings.lasting_weight * found.lasting + settings.sounding_weight * found.sounding
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learning, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.unlogged.append(torch.stack([*found, norm]).detach())

    def _kept_units(self, units: Tensor) -> Tensor:
        """Which units the language model may see, [B, S], bool."""
        settings = self.settings
        rows = torch.rand(len(units), 1, device=units.device) < settings.hide_rows
        return ~(rows & (torch.rand(units.shape, device=units.device) < settings.hide_units))

    def log(self, share: float) -> None:
        """Note the mean of the steps since the last line.

        Args:
            share: how much of the training is done, from 0 to 1.

        Raises:
            ValueError: a loss is no number.
        """
        if not self.unlogged:
            return
        steps = torch.stack(self.unlogged)
        guided = steps[:, Lessons._fields.index("guide")] != 0  # the others have had no such lesson
        means = steps.mean(dim=0)
        for name in ("guide", "found"):
            place = Lessons._fields.index(name)
            means[place] = steps[guided, place].mean() if guided.any() else 0.0
        means = means.tolist()
        values = dict(zip((*Lessons._fields, "grad_norm"), means, strict=True))
        if not np.isfinite(means).all():
            raise ValueError(f"no finite loss between steps {self.step - len(self.unlogged)} and {self.step}: {values}")
        self.unlogged = []
        values |= {"lr": self.optimizer.param_groups[0]["lr"]}
        self.lines.add(TRAIN_TAG, self.epoch, self.step, values)
        if self.step % _SAY_EVERY == 0:
            speed = self.step / max(self.seconds, 1e-9)
            self.lines.say(f"step {self.step}  {share:.0%}  {speed:.1f} steps/s  {_shown(values)}")

    @torch.inference_mode()
    def measure(self) -> None:
        """Score the measured utterances with their own texts, with others', and told how their words sound."""
        self.lessons.eval()
        items = self.measured
        sums, others, targets = np.zeros(len(Lessons._fields)), np.zeros(len(_OTHER_VALUES)), 0
        for chosen in cut_batches(items.positions, _MEASURED_POSITIONS):
            batch = items.batch(chosen)
            strangers = items.batch(chosen, texts=[(number + len(items) // 2) % len(items) for number in chosen])
            count = int(items.units.lengths[chosen].sum()) + len(chosen)
            everyone = torch.ones(len(chosen), dtype=torch.bool, device=items.device)
            sums += count * np.array(torch.stack([*self.lessons(batch)]).tolist())
            found = self.lessons(strangers, lessons=False), self.lessons(batch, told=everyone, guide=False)
            told = found[1]
            others += count * np.array(
                [*(float(one.loss) for one in found), float(told.lasting_acc), float(told.sounding)]
            )
            targets += count
        loss, *lessons = (sums / targets).tolist()
        values = {"loss": loss} | dict(zip(_OTHER_VALUES, (others / targets).tolist(), strict=True))
        values |= dict(zip(Lessons._fields[1:], lessons, strict=True)) | {"seconds": self.seconds}
        self.lines.add(CV_TAG, self.epoch, self.step, values)
        self.lines.say(f"-- {self.settings.dev} after {self.step} steps, {self.epoch} passes: {_shown(values)}")

    def save(self) -> None:
        """Write state, language model, and what it was told of the sound of words."""
        self.log(self.share())  # nothing is saved after a loss that is no number
        self.lines.draw("a language model learns to read")
        save_checkpoint(self.folder / "state.pt", self.epoch, self._parts(), self._deciding())
        weights = {name: value.detach().cpu() for name, value in self.lessons.llm.state_dict().items()}
        save_tensors(self.folder / "llm.pt", weights)
        sounds = {name: value.detach().cpu() for name, value in self.lessons.word_sounds.state_dict().items()}
        save_tensors(self.folder / SOUNDS_FILE, sounds)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.lessons, "optimizer": self.optimizer, "progress": self}

    def _deciding(self) -> dict[str, Any]:
        values = self.settings.to_dict()
        return {"start": self.start, **{name: values[name] for name in _DECIDES_TRAINING}}


def _without(module: nn.Module, name: str) -> nn.Module:
    return nn.ModuleList([part for child, part in module.named_children() if child != name])


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
