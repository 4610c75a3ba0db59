"""Let a Whisper encoder and the parts that listen to it learn together what the language model wants to hear.

In: recordings of splits of `<corpus>`, their features of stages 1 and 2, and a model folder: its language model, which
stays as it is, its Whisper encoder, and taste.pt. Out, in `<out>/`: the encoder in transformers' format (float16),
taste.pt (aggregator, audio branch and, with `taste`, quantizer have learned, the rest is copied), metrics.json,
settings.json, and last.pt, from which a run that was stopped goes on.

    python CosyVoice/examples/tiny/hear_words.py --train lively=work/feats/lively,train=work/feats/train \
        --dev lively_dev=work/feats/lively_dev --minutes 60
    python CosyVoice/examples/tiny/hear_words.py --steps 20 --batch-units 600 --out /tmp/hearing              (a look)

The loss is that of the variants `taste_novq` and `taste`, the mean of both: of every unit, by what the language model
expects after the recording's words were told to it. The encoder's last states are held near those that it had, where
the aggregator looks for words.
The features of all recordings have to be made anew with the new encoder; `train_taste.py --parts <out>` then lets the
other variants get used to them.
Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import train_taste
from corpus_reader import read_split
from joint_taste import JointModel
from packed_features import PackedFeatures
from resumable import LoggedTraining, pick_dtype, resume, run_to_the_end, save_checkpoint
from sharpen_whisper import comparing
from tqdm import tqdm
from train_whisper import recording_mel, write_whisper
from whisper_batches import MEL_PER_FRAME, disturb, silence_of
from whisper_start import MID_LAYER, begin_as_earlier
from whisper_training import CLEAR_FRAMES, encode

from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.model_dir import sizes
from cosyvoice.utils.muon import MuonWithAdamW, muon_groups
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from taste.batch import Batch
from taste.build import build_together
from taste.pretrained_parts import PARTS_FILE, write_parts
from taste.scores import Totals

# B batch   A Whisper frames, 50 Hz   D channels of the encoder   W mel frames, 100 Hz

CORPUS = Path("CosyVoice/examples/tiny/work/corpus")  # holds the splits
MODEL_DIR = Path("CosyVoice-tiny")  # cosyvoice.yaml, llm.pt, and whisper/ to start from
LLM = None  # str: another llm.pt
PARTS = "CosyVoice-tiny"  # folder with the taste.pt to start from
TRAIN = ("train=utt2_output/train:s3_output/train",)  # splits to learn from, each with its set of features
DEV = "test=utt2_output/test:s3_output/test"  # the split that is measured, with its set of features
OUT = Path("exp/hearing")  # where everything is written
VARIANTS = ("taste_novq", "taste")  # whose losses are followed
STEPS = 3_000  # of the optimizer; they set the schedule where MINUTES does not
MINUTES = None  # float: train by the clock instead, evaluations included; the schedule follows it
BATCH_UNITS = 3_000  # positions of the language model in a batch, padding included
WHISPER_LR = 5e-4  # peak learning rate of the encoder: Muon's, and AdamW's of what is no matrix
AGGREGATOR_LR = 1e-3  # the same of the aggregator
BRANCH_LR = 5e-4  # the same of audio branch and quantizer
WEIGHT_DECAY = 0.02  # of all of them
GRAD_CLIP = 1.0  # largest norm of the gradient
COMMITMENT_WEIGHT = 0.1  # of the quantizer's commitment to its codes, which moves the quantizer alone
KEEP_WEIGHT = 0.1  # of the distance of the last states from those that the encoder had
SAMPLED_FRAMES = 16  # of the silence behind a recording, in place of all of it
CLEAN_SHARE = 0.92  # of the rows that are heard as they are
DTYPE = "auto"  # of the matrix products: float32 (TF32 on a GPU), bfloat16; auto: bfloat16 on a CPU that is fast at it
CHECK_EVERY = 250  # steps between two evaluations
SAVE_MINUTES = 5.0  # between two saves
SEED = 1  # of the order of the data, dropout and noise
THREADS = 2  # of the CPU
DEVICE = "auto"  # auto, cpu, cuda

_VARIANTS = VARIANTS  # that there are
_COMPARED = 200  # utterances by whose states distances are measured
_DECIDES_TRAINING = (
    *("llm", "parts", "train", "variants", "batch_units", "whisper_lr", "aggregator_lr", "branch_lr", "weight_decay"),
    *("grad_clip", "commitment_weight", "keep_weight", "sampled_frames", "clean_share", "dtype", "seed"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Open, build, train, write.

    Args:
        settings: the script's constants.
        stop_requested: asked before each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    if not settings.variants or not set(settings.variants) <= set(_VARIANTS):
        raise ValueError(f"VARIANTS is {settings.variants}; expected one or both of {', '.join(_VARIANTS)}")
    device, folder = pick_device(settings.device), settings.out
    dtype = pick_dtype(settings.dtype, device)
    print(f"settings of {folder}:\n{settings.describe()}\n")
    torch.set_float32_matmul_precision("high")
    model_sizes = sizes(settings.model_dir)
    learned = [train_taste.named_set(name, model_sizes) for name in settings.train]
    measured = train_taste.named_set(settings.dev, model_sizes)
    torch.manual_seed(settings.seed)
    llm = train_taste.read_llm(settings)
    train_taste.check_texts(llm, [dataset for _, dataset in (*learned, measured)])
    whisper, _ = begin_as_earlier(settings.model_dir / "whisper")
    models = build_together(
        llm,
        ("simple", *_VARIANTS),
        speech_width=whisper.config.d_model,
        taste_sizes=train_taste._TASTE_SIZES,
    )
    joint = JointModel(models)
    train_taste.go_on_with(joint, settings)
    joint.to(device).requires_grad_(False)
    whisper.to(device)
    sets = [Heard(settings.corpus, part, device) for part in (learned, [measured])]
    training = Hearing(settings, joint, whisper, *sets, dtype)
    training.go_on()
    settings.save(folder / "settings.json")
    if not training.step:
        training.measure()
    if not training.until_the_end(stop_requested):
        print(f"stopped after step {training.step}; the same command goes on from there", file=sys.stderr)
        return False
    metrics = {"steps": training.step, "seconds": training.seconds, **training.measured_as}
    write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))
    return True


class Heard:
    """Recordings beside their features.

    Args:
        corpus: the folder with the splits.
        sets: each split's name and features.
        device: where to keep the features; log-mels stay on the CPU.

    Raises:
        FileNotFoundError: a table or a recording is missing.
        ValueError: an utterance is in no split, or its features are of another recording.
    """

    def __init__(self, corpus: Path, sets: Sequence[tuple[str, Any]], device: torch.device) -> None:
        self.features = PackedFeatures([dataset for _, dataset in sets], device)
        spoken = {row.utt_id: row for split, _ in sets for row in read_split(corpus, split)}
        self.mels: list[Tensor] = []  # [128, W], float16
        lengths = self.features.final.lengths.tolist()
        rows = zip(self.features.utt_ids, lengths, strict=True)
        for utt_id, length in tqdm(rows, desc="recordings", total=len(lengths), mininterval=2):
            if utt_id not in spoken:
                raise ValueError(f"{utt_id} has features, but is in none of {', '.join(name for name, _ in sets)}")
            mel, frames = recording_mel(spoken[utt_id])
            if frames != length:
                raise ValueError(
                    f"{utt_id}: features of {length} frames, a recording of {frames}; make the features again"
                )
            self.mels.append(mel)

    def waves(self, chosen: Sequence[int]) -> Tensor:
        """Log-mels of some recordings, [B, 128, W], float32, with silence behind each."""
        frames = int(self.features.final.lengths[list(chosen)].max()) + CLEAR_FRAMES // 2 + CLEAR_FRAMES
        rows = []
        for number in chosen:
            mel = self.mels[number].float()
            rows.append(F.pad(mel, (0, MEL_PER_FRAME * frames - mel.shape[1]), value=float(silence_of(mel))))
        return torch.stack(rows)


class Hearing(LoggedTraining):
    """The training as far as it has come.

    Args:
        settings: the script's constants.
        joint: the variants, on the device; what listens is going to learn.
        whisper: its encoder learns.
        learned: to learn from.
        measured: to measure.
        dtype: of the matrix products.
    """

    def __init__(
        self,
        settings: Settings,
        joint: JointModel,
        whisper: nn.Module,
        learned: Heard,
        measured: Heard,
        dtype: torch.dtype,
    ) -> None:
        features = learned.features
        super().__init__(
            settings,
            lambda epoch: features.batches(settings.batch_units, settings.seed, epoch),
            (*settings.variants, "moved"),
        )
        self.joint, self.whisper, self.encoder, self.dtype = joint.eval(), whisper, whisper.model.encoder, dtype
        self.learned, self.measured, self.device = learned, measured, features.device
        model = joint.models["taste"]
        rates = [(self.encoder, settings.whisper_lr), (model.aggregator, settings.aggregator_lr)]
        rates += [(part, settings.branch_lr) for part in (model.audio_branch, model.quantizer)]
        rates = rates if "taste" in settings.variants else rates[:-1]
        self.listening = nn.ModuleList([part for part, _ in rates[1:]]).requires_grad_(True)
        groups = [group | {"peak_lr": peak} for part, peak in rates for group in muon_groups(part)]
        self.optimizer = MuonWithAdamW(groups, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
        self.learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        states = [features.batch([number]).speech_final[0] for number in range(min(_COMPARED, len(features)))]
        self.scale = comparing(torch.cat(states).cpu()).to(self.device)
        self.deciding = {name: settings.to_dict()[name] for name in _DECIDES_TRAINING}
        self.deciding |= {"whisper": file_digest(settings.model_dir / "whisper" / "model.safetensors")}
        self.measured_as: dict[str, float] = {}

    def go_on(self) -> None:
        """Take up what an earlier run saved, if one did.

        Raises:
            ValueError: it is of other settings, or of another encoder.
        """
        resume(self.settings.out / "last.pt", self._parts(), self.deciding)
        if self.step:
            print(f"resuming from step {self.step}", flush=True)

    def one_step(self, share: float) -> None:
        """Learn from one batch.

        Args:
            share: how much of the training is done, from 0 to 1.
        """
        settings = self.settings
        self.listening.train()
        chosen = self.begin_step(self.optimizer, share)
        own = self.learned.features.batch(chosen)
        mels = disturb(
            self.learned.waves(chosen), own.speech_lengths.cpu(), settings.clean_share, torch.default_generator
        )
        batch, moved = self._heard(own, mels, None)
        with self._autocast():
            found = self.joint(batch, settings.variants)
        self.joint.commit(settings.commitment_weight * found.commitment)
        (found.losses.mean() + settings.keep_weight * moved).backward()
        nn.utils.clip_grad_norm_(self.learning, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.unlogged.append(torch.stack([*found.losses, moved]).detach())

    def _heard(self, own: Batch, mels: Tensor, generator: torch.Generator | None) -> tuple[Batch, Tensor]:
        """The batch with the encoder's states of now, and how far the last ones have moved."""
        with self._autocast():
            states = encode(self.encoder, mels.to(self.device), MID_LAYER, self.settings.sampled_frames, generator)
        frames = own.speech_final.shape[1]
        mid, final = (part[:, :frames].float() for part in (states.mid, states.final))
        there = torch.arange(frames, device=self.device) < own.speech_lengths[:, None]
        moved = ((final - own.speech_final)[there] @ self.scale).square().mean()
        return replace(own, speech_mid=mid, speech_final=final), moved

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def measure(self) -> None:
        """Score the measured split."""
        self.listening.eval()
        started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
        features, totals, moved = self.measured.features, {name: Totals() for name in self.settings.variants}, []
        for chosen in features.batches_by_length(self.settings.batch_units):
            batch, distance = self._heard(features.batch(chosen), self.measured.waves(chosen), generator)
            for name in totals:
                totals[name] += Totals.of(self.joint.models[name](batch))
            moved.append(float(distance))
        found = {f"{name} {what}": value for name in totals for what, value in totals[name].averages().items()}
        found["moved"] = sum(moved) / len(moved)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(
            f"-- {self.settings.dev.partition('=')[0]} after {self.step} steps, {self.passes():.1f} passes: {shown}  "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        self.measured_as = {name: round(value, 4) for name, value in found.items()}

    def save(self) -> None:
        """Write what the training depends on, and what it has come to.

        Raises:
            ValueError: a loss is no number; nothing is written.
        """
        if self.unlogged:
            self.means()  # nothing is saved after a loss that is no number
        out = self.settings.out
        save_checkpoint(out / "last.pt", self.epoch, self._parts(), self.deciding)
        write_whisper(self.whisper, out)
        write_parts(out / PARTS_FILE, dict(self.joint.models))
        print(f"saved in {out} after {self.step} steps", flush=True)

    def _parts(self) -> Mapping[str, Any]:
        return {
            "encoder": self.encoder,
            "listening": self.listening,
            "optimizer": self.optimizer,
            "progress": self,
        }


if __name__ == "__main__":
    sys.exit(main())
