"""Let an earlier Whisper encoder hear S3 units more as the tokenizer does; what its states say mostly stays.

In: splits of `<work-dir>/corpus` with utt2speech_token.pt, the S3 tokenizer that made these units, and the earlier
encoder's folder. Out, in `<out>/`: config.json, generation_config.json, preprocessor_config.json and model.safetensors
(float16) in transformers' format, metrics.json, settings.json, and last.pt, from which a run that was stopped goes on.

    python CosyVoice/examples/tiny/sharpen_whisper.py --out CosyVoice/examples/tiny/work/whisper_sharp
    python CosyVoice/examples/tiny/sharpen_whisper.py --steps 20 --naming-steps 20 --out /tmp/sharp           (a look)

Three steps. The S3 tokenizer's blocks learn to name its units although Whisper's silence follows: minutes, since they
are given the codebook to name them by. Then the earlier encoder's blocks are put on top of them: the last of the
tokenizer's blocks gets a feed-forward layer, by least squares, that turns its states into those that the next block
expects. At last all blocks learn to have the earlier one's states, but with the codes of the units (unit_codes.py)
that were really spoken in the middle ones. So what was trained to read these states (`taste.pt`) can go on with them.
Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import Spoken, read_split
from frame_training import FrameTraining
from resumable import pick_dtype, resume, run_to_the_end, save_checkpoint
from s3tokenizer.utils import onnx2torch
from tqdm import tqdm
from train_whisper import (
    fit_units,
    prepare_all,
    read_units,
    recording_mel,
    unit_classes,
    write_whisper,
)
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from unit_codes import unit_codes
from whisper_batches import (
    TIMES,
    Batch,
    Example,
    collate,
    disturb,
    open_batches,
    plan_batches,
)
from whisper_start import MID_LAYER, begin_as_earlier, begin_as_tokenizer, graft, tokenizer_sizes
from whisper_training import IGNORED, States, UnitNames, encode

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.model_dir import SPEECH_TOKENIZER_FILE
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.linear_fits import ridge, widest_directions

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/
EARLIER = Path("CosyVoice-tiny/whisper")  # folder of the encoder whose states to keep
S3_TOKENIZER = None  # str: none: <work-dir>/s3_tokenizer/speech_tokenizer_v1.onnx
OUT = Path("CosyVoice/examples/tiny/work/whisper_sharp")  # where everything is written
SPLITS = ("lively", "train")  # of the corpus, to learn from
DEV = "lively_dev"  # the split that is measured
NAMING_STEPS = 1_500  # of the tokenizer's blocks alone, not saved in between: 8 minutes on one core
NAMING_LR = 5e-4  # its peak learning rate
STEPS = 6_000  # of the whole; they set the schedule where MINUTES does not
MINUTES = None  # float: train by the clock instead, all runs together; the schedule follows it
FRAMES_PER_BATCH = 2_000  # 20 ms each; 20,000 on a GPU
JOINED_SHARE = 0.1  # of the rows that are several utterances one after another, so that late positions are met
LR = 7e-4  # peak learning rate of AdamW; it rises over the first tenth and falls along a cosine
FIRST_BLOCKS = 0.3  # of these rates for all before the last of the tokenizer's blocks: they lose units easily
WEIGHT_DECAY = 0.01  # AdamW's
GRAD_CLIP = 1.0  # largest norm of the gradient
UNIT_WEIGHT = 0.5  # of the cross-entropy of the S3 unit
CODE_WEIGHT = 2.0  # of the squared error of the unit's code
SAMPLED_FRAMES = 16  # of the silence behind a recording, in place of all of it
CLEAN_SHARE = 0.92  # of the rows that are heard as they are: those that are not cost units
DTYPE = "bfloat16"  # of the matrix products: float32, bfloat16; auto: bfloat16 on a CPU that is fast at it
CHECK_EVERY = 200  # steps between two evaluations on DEV
SAVE_MINUTES = 5.0  # between two saves
MEASURED_UTTERANCES = 100  # of DEV
SEED = 0  # of everything random
THREADS = 2  # of the CPU
NUM_WORKERS = 0  # processes that prepare the recordings and their batches; 12 beside a GPU
DEVICE = "auto"  # auto, cpu, cuda

_FITTED_BATCHES = 60  # of clean rows, for everything that is fitted
_NAMES_DOUBT = 1e-6  # of least squares, as a share of a channel's mean square
_DOUBT = 0.1  # of the mean variance of states, added to all directions' when they are compared
_DECIDES_TRAINING = (
    *("splits", "naming_steps", "naming_lr", "frames_per_batch", "joined_share", "lr", "first_blocks", "weight_decay"),
    *("grad_clip", "unit_weight", "code_weight", "sampled_frames", "clean_share", "dtype", "seed"),
)


class Wanted(NamedTuple):
    """What is asked of the states."""

    to_code: Tensor  # [D, C], from a middle state to the code of its unit
    code_bias: Tensor  # [C]
    mid_scale: Tensor  # [D, D], makes differences of middle states comparable; 1 is as wrong as to know nothing
    final_scale: Tensor  # [D, D], the same of last states


class Apart(NamedTuple):
    """How far the states are from what they should be; means over the frames that have a unit."""

    mid: Tensor  # share of the variance of the wanted states, whitened, that is missed
    final: Tensor  # the same of the last states
    code: Tensor  # share of the variance of the codes
    unit: Tensor  # cross-entropy, nats
    unit_accuracy: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Begin, train, write, measure.

    Args:
        settings: the script's constants.
        stop_requested: asked before each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    device, folder = pick_device(settings.device), settings.out
    dtype = pick_dtype(settings.dtype, device)
    print(f"settings of {folder}:\n{settings.describe()}\n")
    torch.set_float32_matmul_precision("high")
    tokenizer = Path(settings.s3_tokenizer or settings.work_dir / "s3_tokenizer" / SPEECH_TOKENIZER_FILE)
    torch.manual_seed(settings.seed)
    whisper = begin_as_tokenizer(tokenizer)
    earlier, _ = begin_as_earlier(settings.earlier)
    learned, measured, units = read_recordings(settings)
    print(f"{len(learned)} utterances, {len(units)} S3 units, on {device} in {dtype}", flush=True)
    names = UnitNames(onnx2torch(str(tokenizer))["quantizer._codebook.embed"].float()[units])
    sharpening = Sharpening(settings, whisper, earlier, names, learned, measured, unit_codes()[units], tokenizer, dtype)
    sharpening.to(device)
    went_on = sharpening.go_on()
    settings.save(folder / "settings.json")
    if not went_on:
        if not sharpening.name_units(stop_requested):
            print("stopped before anything could be saved; the same command begins anew", file=sys.stderr)
            return False
        sharpening.graft()
    sharpening.fit()
    sharpening.measure()
    if not sharpening.until_the_end(stop_requested):
        print(f"stopped after step {sharpening.step}; the same command goes on from there", file=sys.stderr)
        return False
    write_whisper(whisper.cpu(), folder)
    metrics = {"steps": sharpening.step, "seconds": sharpening.seconds, **sharpening.measured_as}
    write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))
    return True


class _Recordings(Dataset):
    """Examples that know nothing but their units."""

    def __init__(self, split: Sequence[Spoken], units: Sequence[Tensor]) -> None:
        self.split, self.units = split, units

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, number: int) -> list[Any]:
        mel, frames = recording_mel(self.split[number])
        labels = torch.zeros(frames, dtype=torch.int64)
        parts = mel, labels, labels, torch.zeros(frames, TIMES), fit_units(self.units[number], frames)
        return [*(part.numpy() for part in parts), []]


def read_recordings(settings: Settings) -> tuple[list[Example], list[Example], Tensor]:
    """Prepare the splits to learn from and the one to measure.

    Returns:
        both, and the S3 units that are classes, [K] int64.
    """
    corpus = settings.work_dir / "corpus"
    parts = {name: read_split(corpus, name) for name in settings.splits}
    measured = read_split(corpus, settings.dev)[: settings.measured_utterances]
    units = [row for name, split in parts.items() for row in read_units(corpus / name, split)]
    occurring = torch.cat(units).unique()
    classes = unit_classes(occurring)
    learned = [spoken for split in parts.values() for spoken in split]
    found = []
    for split, rows in ((learned, units), (measured, read_units(corpus / settings.dev, measured))):
        found.append(prepare_all(_Recordings(split, [classes[row] for row in rows]), settings.num_workers))
    return *found, occurring


class Sharpening(FrameTraining):
    """The training as far as it has come.

    Args:
        settings: the script's constants.
        whisper: its encoder began as the tokenizer, and learns.
        earlier: what its states should be.
        names: tells units by the tokenizer's codebook, and learns.
        learned: utterances to learn from.
        measured: utterances to measure.
        codes: what middle states should tell of each unit, [K, C].
        tokenizer: the S3 tokenizer's file.
        dtype: of the matrix products.
    """

    def __init__(
        self,
        settings: Settings,
        whisper: WhisperForConditionalGeneration,
        earlier: WhisperForConditionalGeneration,
        names: UnitNames,
        learned: Sequence[Example],
        measured: Sequence[Example],
        codes: Tensor,
        tokenizer: Path,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(settings, learned, measured, Apart._fields)
        self.whisper, self.earlier, self.names, self.codes, self.dtype = whisper, earlier, names, codes, dtype
        self.encoder: WhisperEncoder = whisper.model.encoder
        self.sizes = tokenizer_sizes(tokenizer)
        self.device = codes.device
        self.deciding = {name: settings.to_dict()[name] for name in _DECIDES_TRAINING}
        self.deciding |= {"s3_tokenizer": file_digest(tokenizer)}
        self.deciding |= {"earlier": file_digest(settings.earlier / "model.safetensors")}
        first = [self.encoder.conv1, self.encoder.conv2, *self.encoder.layers[: self.sizes.blocks - 1]]
        slow = [parameter for part in first for parameter in part.parameters()]
        known = {id(parameter) for parameter in slow}
        everything = (*self.encoder.parameters(), *names.parameters())
        self.learning = [parameter for parameter in everything if parameter.requires_grad]
        rest = [parameter for parameter in self.learning if id(parameter) not in known]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": slow, "peak_lr": settings.lr * settings.first_blocks},
                {"params": rest, "peak_lr": settings.lr},
            ],
            **self._how(),
        )
        self.wanted: Wanted | None = None
        self.measured_as: dict[str, float] = {}
        self.batches: Iterator[Batch] | None = None

    def to(self, device: torch.device) -> None:
        """Move everything that is computed with."""
        self.device, self.codes = device, self.codes.to(device)
        for part in (self.whisper, self.earlier, self.names):
            part.to(device)
        self.earlier.requires_grad_(False).eval()

    def _how(self) -> dict[str, Any]:
        return {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay, "betas": (0.9, 0.98), "fused": True}

    def go_on(self) -> bool:
        """Take up what an earlier run saved; False where none did.

        Raises:
            ValueError: it is of other settings, another tokenizer or another encoder.
        """
        path = self.settings.out / "last.pt"
        resume(path, self._parts(), self.deciding)
        if self.step:
            print(f"resuming from step {self.step}", flush=True)
        return path.is_file()

    def name_units(self, stop_requested: Callable[[], bool]) -> bool:
        """Let the tokenizer's blocks, the others left out, name units in spite of Whisper's silence.

        Args:
            stop_requested: asked before each step.

        Returns:
            False where it was asked to stop.
        """
        settings, blocks = self.settings, self.sizes.blocks
        shallow = deepcopy(self.encoder)
        shallow.layers = shallow.layers[:blocks]
        learning = [parameter for part in (shallow, self.names) for parameter in part.parameters()]
        learning = [parameter for parameter in learning if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, **self._how())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings.naming_lr, max(2, settings.naming_steps), pct_start=0.1
        )
        batches = self._open((0, 0))
        bar = tqdm(range(settings.naming_steps), desc="naming units", mininterval=2)
        for _ in bar:
            if stop_requested():
                return False
            batch = next(batches)
            mels, units = batch.mels.to(self.device).float(), batch.units.to(self.device)
            with self._autocast():
                states = encode(shallow, mels, blocks, settings.sampled_frames, None).mid
            logits = self.names(states.float())  # what tells two codes apart is lost in half precision
            loss = F.cross_entropy(logits.flatten(0, 1), units.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, settings.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        self.encoder.load_state_dict(self.encoder.state_dict() | shallow.state_dict())
        return True

    def graft(self) -> None:
        """Put the earlier encoder's blocks on top, and keep what came out."""
        mels = (batch.mels.float() for batch in self._fitted_batches())
        whisper, earlier = self.whisper.cpu(), self.earlier.cpu()
        told = graft(whisper, earlier, self.sizes, mels, self.settings.sampled_frames)
        print(f"grafted: {told:.1%} of the variance of block {self.sizes.blocks}'s states", flush=True)
        whisper.to(self.device)
        earlier.to(self.device)
        self._fit_names()
        self.save()

    @torch.no_grad()
    def _fit_names(self) -> None:
        """Let units be named from the states as they are now."""
        states, units = [], []
        for batch in self._fitted_batches():
            found = self._states(self.encoder, batch.mels, None)
            known = batch.units != IGNORED
            states.append(found.early.cpu()[known])
            units.append(batch.units[known])
        codes = self.names.codes.cpu()[torch.cat(units)]
        weight, bias = ridge(torch.cat(states).double(), F.normalize(codes, dim=1).double(), _NAMES_DOUBT)
        self.names.to_direction.weight.copy_(weight)
        self.names.to_direction.bias.copy_(bias)

    @torch.no_grad()
    def fit(self) -> None:
        """Find out what to ask of the states: it depends on the earlier encoder alone."""
        mids, finals, units = [], [], []
        for number, batch in enumerate(self._fitted_batches()):
            found = self._states(self.earlier.model.encoder, batch.mels, torch.Generator().manual_seed(number))
            known = batch.units != IGNORED
            mids.append(found.mid.cpu()[known])
            finals.append(found.final.cpu()[known])
            units.append(batch.units[known])
        mid, final, codes = torch.cat(mids), torch.cat(finals), self.codes.cpu()[torch.cat(units)]
        weight, bias = ridge(mid.double(), codes.double(), _NAMES_DOUBT)
        reading = weight.T.float(), bias.float()
        found = *reading, comparing(correct(mid, codes, *reading)), comparing(final)
        self.wanted = Wanted(*(part.to(self.device) for part in found))

    def _fitted_batches(self) -> Iterator[Batch]:
        """Clean rows from all of the utterances; always the same."""
        lengths = [len(example.phones) for example in self.learned]
        plan = plan_batches(lengths, self.settings.frames_per_batch, 0.0, random.Random(0))
        for rows in plan[:_FITTED_BATCHES]:
            yield collate([[self.learned[i] for i in row] for row in rows])

    def _open(self, first: tuple[int, int]) -> Iterator[Batch]:
        """Clean rows to learn from, from that epoch and batch on."""
        settings = self.settings
        pinned = self.device.type == "cuda"
        return open_batches(self.learned, self.plan, first, 1.0, settings.seed, settings.num_workers, pinned)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _states(self, encoder: WhisperEncoder, mels: Tensor, generator: torch.Generator | None) -> States:
        mels = mels.to(self.device, non_blocking=True).float()
        with self._autocast():
            found = encode(encoder, mels, MID_LAYER, self.settings.sampled_frames, generator, self.sizes.blocks)
        return States(*(part.float() for part in found))

    def one_step(self, share: float) -> None:
        """Learn from one batch.

        Args:
            share: how much of the training is done, from 0 to 1.
        """
        settings = self.settings
        if self.batches is None:
            self.batches = self._open((self.epoch, self.place))
        self.begin_step(self.optimizer, share)
        batch = next(self.batches)
        lengths = (batch.phones != IGNORED).sum(dim=1)
        heard = disturb(batch.mels.float(), lengths, settings.clean_share, torch.default_generator)
        apart = self._apart(batch, heard, None)
        loss = apart.mid + apart.final + settings.code_weight * apart.code + settings.unit_weight * apart.unit
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.unlogged.append(torch.stack(list(apart)).detach())

    def _apart(self, batch: Batch, heard: Tensor, generator: torch.Generator | None) -> Apart:
        """Hold what is heard against what the earlier encoder makes of the clean recording."""
        units = batch.units.to(self.device, non_blocking=True)
        with torch.no_grad():
            theirs = self._states(self.earlier.model.encoder, batch.mels, generator)
        ours = self._states(self.encoder, heard, generator)
        known, wanted = units != IGNORED, self.wanted
        codes, units = self.codes[units[known]], units[known]
        mid, final = ours.mid[known], ours.final[known]
        names = self.names(ours.early[known])
        return Apart(
            ((mid - correct(theirs.mid[known], codes, wanted.to_code, wanted.code_bias)) @ wanted.mid_scale)
            .square()
            .mean(),
            ((final - theirs.final[known]) @ wanted.final_scale).square().mean(),
            (mid @ wanted.to_code + wanted.code_bias - codes).square().mean(),
            F.cross_entropy(names, units),
            (names.argmax(dim=1) == units).float().mean(),
        )

    @torch.no_grad()
    def measure(self) -> None:
        """Score the measured utterances as they are."""
        found, frames = [], []
        generator = torch.Generator().manual_seed(0)
        for batch in self.measured_batches():
            found.append(torch.stack(list(self._apart(batch, batch.mels.float(), generator))).cpu())
            frames.append(float((batch.units != IGNORED).sum()))
        means = (torch.stack(found) * torch.tensor(frames)[:, None]).sum(dim=0) / sum(frames)
        print(f"-- {self.settings.dev} after {self.step} steps: {self.shown(means)}", flush=True)
        self.measured_as = {name: round(value, 4) for name, value in zip(Apart._fields, means.tolist(), strict=True)}

    def save(self) -> None:
        """Write everything that the training depends on."""
        if self.unlogged:
            self.means()  # nothing is saved after a loss that is no number
        save_checkpoint(self.settings.out / "last.pt", self.epoch, self._parts(), self.deciding)

    def _parts(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "names": self.names, "optimizer": self.optimizer, "progress": self}


def correct(mid: Tensor, codes: Tensor, to_code: Tensor, bias: Tensor) -> Tensor:
    """Change middle states [N, D] as little as makes them tell their units' codes [N, C] exactly.

    Args:
        mid: the states.
        codes: what they should tell.
        to_code: how it is read from them, [D, C].
        bias: the same, [C].
    """
    return mid + (codes - (mid @ to_code + bias)) @ torch.linalg.pinv(to_code)


def comparing(states: Tensor) -> Tensor:
    """The map [D, D] by which differences of states [N, D] become shares of how much these vary, in all directions."""
    _, axes, variances = widest_directions(states, states.shape[1])
    scale = axes @ torch.diag((variances + _DOUBT * variances.mean()).rsqrt()) @ axes.T
    return (scale / (states.double() @ scale).var(dim=0).mean().sqrt()).float()


if __name__ == "__main__":
    sys.exit(main())
