"""Train a language model together with the parts that hear a recording, on features of stages 1 and 2.

In: `<model-dir>/cosyvoice.yaml`, weights of the language model to start from, and sets of features, each named by how
its four files begin: `<set>_{text_emb,whisper_feats,utt2info}.pt` from utt2text_and_feature.py and `<set>_utt2s3.pt`
from s3.sh; where the units lie elsewhere, write `<set>:<units>`. Out, in `<out>/`: llm.pt (the language model) and
taste.pt (the parts of all variants, in float16, see taste/pretrained_parts.py), metrics.jsonl, metrics.json,
loss_curve.png, settings.json, and state.pt, from which a run that was stopped goes on.

    python CosyVoice/examples/tiny/train_taste.py --train work/feats/lively,work/feats/train --dev dev=work/feats/dev \
        --llm work/llm_start/llm.pt --model-dir CosyVoice/examples/tiny/conf --minutes 8 --device cuda
    python CosyVoice/examples/tiny/train_taste.py --steps 20 --batch-units 600 --out /tmp/joint               (a look)

All variants read the same batch, and one step follows the mean of their losses: so the language model learns to speak
from text alone as well as from text and recording. `taste` joins later, when there are words worth placing codes at.
Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped by Ctrl-C or SIGTERM, saved.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from joint_taste import JointModel, measure, start_codebooks
from listening_lesson import find_tokens, from_alignment, from_words, hear_sounds, teach
from packed_features import PackedFeatures
from reading_lessons import SOUNDS_FILE, WORDS_FILE, WordSounds
from resumable import LOG_EVERY, LongTraining, pick_dtype, resume, run_to_the_end, save_checkpoint

import model_code
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.model_dir import CONFIG_FILE, ModelSizes, load_state, read_torch_file, read_weights, sizes
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from cosyvoice.utils.tensor_file import save_tensors
from cosyvoice.utils.train_utils import load_model
from taste.batch import Batch
from taste.build import TasteSizes, build_together
from taste.data import UtteranceDataset, open_dataset
from taste.feature_set import FeaturePaths
from taste.fitted_start import fit_new_parts
from taste.fitted_taste import quiet_branch
from taste.plots import plot_comparison
from taste.pretrained_parts import PARTS_FILE, take_parts, write_parts
from taste.run_files import RESULTS_FILE, SETTINGS_FILE, STEPS_FILE
from taste.size_defaults import SMALL
from taste.subsample import spread_evenly
from taste.train_state import Progress, StepRecord
from taste.variants import VARIANTS as ALL_VARIANTS

# B batch   S S3 units, 50 Hz

MODEL_DIR = Path("CosyVoice-tiny")  # cosyvoice.yaml, the sizes of the language model
LLM = None  # str: llm.pt to start from; none: <model-dir>/llm.pt
TRAIN = ("utt2_output/train:s3_output/train",)  # sets of features to learn from
DEV = ("test=utt2_output/test:s3_output/test",)  # sets of features to measure, each behind its name
OUT = Path("exp/joint")  # where everything is written
VARIANTS = ("text_only", "simple", "taste_novq", "taste")  # what is trained
STEPS = 6_000  # of the optimizer; they set the schedule where MINUTES does not
MINUTES = None  # float: train by the clock instead, evaluations included; the schedule follows it
BATCH_UNITS = 10_000  # positions of the language model in a batch, padding included
LLM_LR = 5e-4  # peak learning rate of the language model
PARTS_LR = 2e-3  # the same of the parts beside it
WEIGHT_DECAY = 0.01  # AdamW's, on matrices only
GRAD_CLIP = 1.0  # largest norm of the gradient
HIDE_ROWS = 0.5  # share of a batch's rows in which some units are hidden from the language model
HIDE_UNITS = 0.2  # share of the units that are hidden in these: what comes next must then be heard from elsewhere
DROP_TEXT = 0.0  # share of a batch's rows in which the taste variants must do without the encoded text
QUANTIZER_FROM = 0.3  # share of the training after which codebooks are started and `taste` joins
AUDIO_GAIN = 0.5  # size of what is told of the recording at first, of the text's
LESSON_STEPS = 600  # of the aggregators' lesson before the training, see listening_lesson.py; 0: none
LESSON_UTTERANCES = 1_500  # that are aligned for it
SOUNDS = None  # str: folder with what teach_reading.py told the language model of words' sounds, to be heard now
SOUND_STEPS = 1_000  # of the lesson that teaches aggregator and audio branch to hear it
PARTS = None  # str: folder with a taste.pt whose parts to go on with, in place of all lessons and codebooks' starts
COMMITMENT_WEIGHT = 0.1  # of the quantizer's commitment to its codes, which moves the quantizer alone
DTYPE = "auto"  # of the matrix products: float32 (TF32 on a GPU), bfloat16; auto: bfloat16 on a CPU that is fast at it
CHECK_EVERY = 500  # steps between two evaluations
SAVE_MINUTES = 3.0  # between two saves
SEED = 1986  # of the parts' weights, the order of the data, dropout
THREADS = 1  # of the CPU
DEVICE = "auto"  # auto, cpu, cuda

_FEWEST_TOLD = 10  # utterances to learn from what the language model was told
_LEVELLED = 100  # utterances that the audio branch's size is measured with
_CODEBOOK_UTTERANCES = 800  # from whose words the codebooks start
_FEATURE_TOLERANCE = 1e-3  # between text embeddings stored as features and the language model's own
_ADAM_BETAS = (0.9, 0.98)
_TASTE_SIZES = TasteSizes.from_dict(
    {
        **SMALL,
        **{name.lower(): value for name, value in vars(model_code).items() if name.isupper() and value is not None},
    }
)
_DECIDES_TRAINING = (
    *("llm", "train", "variants", "batch_units", "llm_lr", "parts_lr", "weight_decay", "grad_clip", "hide_rows"),
    *("hide_units", "drop_text", "quantizer_from", "audio_gain", "lesson_steps", "lesson_utterances", "sounds"),
    *("sound_steps", "parts", "commitment_weight", "dtype", "seed"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Open, build, train, write.

    Args:
        settings: the script's constants.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    check(settings)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    print(f"settings of {settings.out}:\n{settings.describe()}\n")
    torch.set_float32_matmul_precision("high")
    model_sizes = sizes(settings.model_dir)
    train_sets = [open_set(name, model_sizes) for name in settings.train]
    dev_sets = dict(named_set(name, model_sizes) for name in settings.dev)

    torch.manual_seed(settings.seed)
    llm = read_llm(settings)
    check_texts(llm, [*train_sets, *dev_sets.values()])
    joint = JointModel(
        build_together(llm, settings.variants, speech_width=train_sets[0].speech_width, taste_sizes=_TASTE_SIZES)
    )
    everything = ConcatDataset(train_sets)
    state_path = settings.out / "state.pt"
    if settings.parts:
        go_on_with(joint, settings)
    elif not state_path.is_file():
        fit(joint, everything, find_some_tokens(everything, settings), settings, device)
    started = time.perf_counter()
    joint.to(device).eval()
    training = JointTraining(
        settings,
        joint,
        PackedFeatures(train_sets, device),
        {name: PackedFeatures([dev_set], device) for name, dev_set in dev_sets.items()},
        everything,
        dtype,
    )
    print(f"{len(training.features)} utterances on {device} in {time.perf_counter() - started:.0f} s", flush=True)
    training.go_on(state_path)
    settings.save(settings.out / SETTINGS_FILE)
    finished = training.until_the_end(stop_requested)
    if finished:
        metrics = {"steps": training.step, "seconds": training.seconds, "dev": training.history[-1]["dev"]}
        write_json(settings.out / RESULTS_FILE, metrics)
    return finished


def check(settings: Settings) -> None:
    """Refuse settings that no training can be made of."""
    problems = [f"VARIANTS has {name!r}" for name in settings.variants if name not in ALL_VARIANTS]
    problems += [f"{name.upper()} is empty" for name in ("variants", "train") if not getattr(settings, name)]
    if settings.minutes is not None and settings.minutes <= 0:
        problems.append(f"MINUTES is {settings.minutes}")
    if settings.parts and settings.sounds:
        problems.append("PARTS and SOUNDS are both given, which begin the parts in two ways")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; expected variants of {', '.join(ALL_VARIANTS)}, and sets of features to train with"
        )


def open_set(name: str, model_sizes: ModelSizes) -> UtteranceDataset:
    """Open a set of features.

    Args:
        name: how its files begin, and behind a colon how those of its units do, where these lie elsewhere.
        model_sizes: what the features must fit.

    Returns:
        the data set, which has words.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: nothing is usable, or the features are another model's, or without words.
    """
    features, _, units = name.partition(":")
    dataset = open_dataset(
        FeaturePaths(
            units=Path(f"{units or features}_utt2s3.pt"),
            text=Path(f"{features}_text_emb.pt"),
            speech=Path(f"{features}_whisper_feats.pt"),
            info=Path(f"{features}_utt2info.pt"),
        ),
        model_sizes,
    )
    print(dataset.selection.describe(features), flush=True)
    if not dataset.has_words:
        raise ValueError(f"{features}_utt2info.pt has no words; make it again with utt2text_and_feature.py")
    return dataset


def named_set(word: str, model_sizes: ModelSizes) -> tuple[str, UtteranceDataset]:
    """Open a set of features that is called by a name, `name=set`."""
    name, equals, rest = word.partition("=")
    if not equals:
        raise ValueError(f"DEV has {word!r}; expected name=set, such as dev=work/feats/dev")
    return name, open_set(rest, model_sizes)


def read_llm(settings: Settings) -> TransformerLM:
    """Build the language model with the weights to start from."""
    path = Path(settings.llm or settings.model_dir / "llm.pt")
    llm = load_model(settings.model_dir / CONFIG_FILE, "llm")
    load_state(llm, read_weights(path), path)
    return llm.float()


@torch.no_grad()
def check_texts(llm: TransformerLM, datasets: Sequence[UtteranceDataset]) -> None:
    """Refuse text embeddings of another language model: they never learn here, so they would never fit."""
    for dataset in datasets:
        example = dataset[0]
        distance = float((llm.text_embedding(example.text_tokens) - example.text).abs().max())
        if distance > _FEATURE_TOLERANCE:
            raise ValueError(
                f"the text embedding of {example.utt_id} is not this language model's (difference {distance:.3g}); "
                "make the features again with the llm.pt that the training starts from: python utt2text_and_feature.py"
            )


def find_some_tokens(dataset: Any, settings: Settings) -> dict[int, Tensor]:
    """Align some utterances of the training sets; gives the spans of their tokens by the utterance's number."""
    if not settings.lesson_steps or settings.sounds:
        return {}
    started = time.perf_counter()
    chosen = spread_evenly(len(dataset), settings.lesson_utterances)
    spans = find_tokens(dataset, chosen, workers=settings.threads if settings.threads > 1 else 0)
    print(f"aligned {len(chosen)} utterances in {time.perf_counter() - started:.0f} s", flush=True)
    return spans


def fit(joint: JointModel, dataset: Any, spans: Mapping[int, Tensor], settings: Settings, device: torch.device) -> None:
    """Let the new modules begin with something to tell: see taste/fitted_start.py and listening_lesson.py."""
    how: dict[str, Any] = {"device": device, "peak_lr": settings.parts_lr, "seed": settings.seed}
    if settings.sounds:
        sounds, words = read_sounds(Path(settings.sounds), joint.llm)
        everyone = [dataset[index] for index in range(len(dataset))]
        chosen = [example for example in everyone if example.utt_id in words]
        if len(chosen) < _FEWEST_TOLD:
            raise ValueError(
                f"{settings.sounds}/{WORDS_FILE} has {len(chosen)} of the utterances to train with, expected "
                f"{_FEWEST_TOLD} at least; teach_reading.py writes it for the splits that it reads"
            )
        sounds.to(device)
    else:
        chosen = [dataset[index] for index in spans or spread_evenly(len(dataset), _LEVELLED)]
    for variant in ("simple", "taste_novq"):
        if variant not in joint.models:
            continue
        started = time.perf_counter()
        torch.set_num_threads(1)  # so small are the products that several threads would only wait for each other
        model = joint.models[variant]
        notes: dict[str, Any] = fit_new_parts(model, dataset, {"aggregator"})
        torch.set_num_threads(settings.threads)
        model.to(device)
        if settings.lesson_steps and not (settings.sounds and variant == "simple"):  # its recording tells no changes
            by_word = variant != "simple"
            wanted = (
                from_words(chosen, words) if settings.sounds else from_alignment(chosen, list(spans.values()), by_word)
            )
            notes |= teach(model, chosen, wanted, steps=settings.lesson_steps, **how)
        if variant == "simple":
            model.speech_norm.weight.data.fill_(settings.audio_gain)
        if settings.sounds:
            notes["sounds"] = hear_sounds(model, sounds, words, chosen, steps=settings.sound_steps, **how)
        model.cpu()
        if variant != "simple" and not settings.sounds:
            quiet_branch(model, chosen[:_LEVELLED], settings.audio_gain)
        print(f"fitted {variant} in {time.perf_counter() - started:.0f} s: {json.dumps(notes)}", flush=True)


def go_on_with(joint: JointModel, settings: Settings) -> None:
    """Give the variants the parts that an earlier training has written.

    Args:
        joint: all of its variants, but for `text_only`, take all of their parts.
        settings: with PARTS.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a part, or has one of another size.
    """
    path = Path(settings.parts) / PARTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; train_taste.py writes it, leave PARTS empty before")
    for variant, model in joint.models.items():
        taken = take_parts(model, settings.parts)
        if taken is not None and taken.left:
            unfit = "; ".join(f"{part}: {reason}" for part, reason in taken.left.items())
            raise ValueError(
                f"{path} has not all that {variant} is made of: {unfit}; leave it out of VARIANTS, or PARTS empty"
            )
    print(f"going on with the parts of {path}", flush=True)


def read_sounds(folder: Path, llm: TransformerLM) -> tuple[WordSounds, dict[str, Tensor]]:
    """Read how the language model was told of the sound of words, and what.

    Args:
        folder: where teach_reading.py wrote.
        llm: the language model.

    Returns:
        the map to vectors, and what it has made them from, by utterance, see `describe_words`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is another language model's.
    """
    sounds = WordSounds(llm.llm_input_size)
    load_state(sounds, read_weights(folder / SOUNDS_FILE), folder / SOUNDS_FILE)
    return sounds, read_torch_file(folder / WORDS_FILE)


class JointTraining(LongTraining):
    """The training as far as it has come.

    Args:
        settings: the script's constants.
        joint: on the device.
        features: to learn from.
        dev_sets: to measure, by name.
        dataset: the same as `features`, for the codebooks' start on the CPU.
        dtype: of the matrix products.
    """

    KEPT = (*LongTraining.KEPT, "codebooks_started", "history")

    def __init__(
        self,
        settings: Settings,
        joint: JointModel,
        features: PackedFeatures,
        dev_sets: Mapping[str, PackedFeatures],
        dataset: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(settings, lambda epoch: features.batches(settings.batch_units, settings.seed, epoch))
        self.dtype = dtype
        self.joint, self.features, self.dev_sets = joint, features, dev_sets
        self.dataset = dataset
        self.optimizer = torch.optim.AdamW(
            parameter_groups(joint, settings), betas=_ADAM_BETAS, fused=features.device.type == "cuda"
        )
        self.optimizer.zero_grad(set_to_none=True)  # of the lessons
        self.codebooks_started = bool(settings.parts)
        self.history: list[dict[str, Any]] = []
        self.record = StepRecord(settings.out / STEPS_FILE)
        self.learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.unlogged: list[Tensor] = []  # losses of the variants, commitment and norm of each step since the last line
        self.trained: list[str] = []  # the variants that these losses are of

    def go_on(self, path: Path) -> None:
        """Take up what an earlier run saved, if one did.

        Args:
            path: its state.

        Raises:
            ValueError: it is of other settings.
        """
        self.state_path = path
        resume(path, self._parts(), self._deciding())
        self.record.keep_until(Progress(step=self.step))
        if self.step:
            print(f"resuming from step {self.step}", flush=True)

    def one_step(self, share: float) -> None:
        """Let all variants learn from one batch.

        Args:
            share: how much of the training is done, from 0 to 1.
        """
        settings, joint = self.settings, self.joint
        variants = self._variants(share)
        if variants != self.trained:
            self.trained, self.unlogged = variants, []
        if not joint.training:
            joint.train()
        chosen = self.begin_step(self.optimizer, share)
        batch = self.features.batch(chosen)
        with torch.autocast(self.features.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = joint(batch, variants, self._hidden_units(batch), self._textless(batch))
        joint.commit(settings.commitment_weight * found.commitment)
        found.losses.mean().backward()
        norm = nn.utils.clip_grad_norm_(self.learning, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.unlogged.append(torch.stack([*found.losses, found.commitment, norm]).detach())

    def _variants(self, share: float) -> list[str]:
        """Those that learn by now; starts the codebooks when their time has come."""
        variants = [name for name in self.settings.variants if name != "taste"]
        if "taste" not in self.settings.variants or (variants and share < self.settings.quantizer_from):
            return variants
        if not self.codebooks_started:
            started = time.perf_counter()
            chosen = spread_evenly(len(self.dataset), _CODEBOOK_UTTERANCES)
            torch.set_num_threads(1)  # as for the fit
            usage = start_codebooks(self.joint, [self.dataset[index] for index in chosen])
            torch.set_num_threads(self.settings.threads)
            self.codebooks_started = True
            shown = ", ".join(f"{part:.0%}" for part in usage)
            print(f"codebooks started in {time.perf_counter() - started:.0f} s; used: {shown}", flush=True)
        return [*variants, "taste"]

    def _hidden_units(self, batch: Batch) -> Tensor | None:
        """Which units the language model shall not see, [B, S], bool."""
        settings = self.settings
        if not settings.hide_rows or not settings.hide_units:
            return None
        rows = torch.rand(len(batch.units), 1, device=batch.units.device) < settings.hide_rows
        return rows & (torch.rand(batch.units.shape, device=batch.units.device) < settings.hide_units)

    def _textless(self, batch: Batch) -> Tensor | None:
        """In which rows the encoded text is left out, [B], bool."""
        share = self.settings.drop_text
        return torch.rand(len(batch.units), device=batch.units.device) < share if share else None

    def log(self, share: float) -> None:
        """Note the mean of the steps since the last line.

        Args:
            share: how much of the training is done, from 0 to 1.

        Raises:
            ValueError: a loss is no number.
        """
        values = torch.stack(self.unlogged).mean(dim=0).tolist()
        self.unlogged = []
        *losses, commitment, norm = values
        if not np.isfinite(values).all():
            raise ValueError(
                f"step {self.step}: losses {losses}, norm of the gradient {norm}; state.pt is from before; remove it "
                "and lower LLM_LR or PARTS_LR"
            )
        named = dict(zip(self.trained, losses, strict=True))
        lr = self.optimizer.param_groups[0]["lr"]
        results = {
            "losses": named,
            "commitment": commitment,
            "gradient_norm": norm,
            "lr": lr,
            "seconds": self.seconds,
        }
        self.record.add("step", self.step, self.epoch, results)
        if self.step % (5 * LOG_EVERY) == 0:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in named.items())
            speed = self.step / max(self.seconds, 1e-9)
            print(f"step {self.step:6d}  {share:4.0%}  {speed:5.1f} steps/s  {shown}", flush=True)

    def measure(self) -> None:
        """Score the dev sets."""
        ready = [name for name in self.settings.variants if name != "taste" or self.codebooks_started]
        dev = {name: measure(self.joint, features, ready) for name, features in self.dev_sets.items()}
        passes = self.passes()
        self.history.append({"step": self.step, "epoch": passes, "dev": dev})
        self.record.add("step", self.step, self.epoch, {"dev": dev})
        for name, scores in dev.items():
            print(f"-- {name} after {self.step} steps, {passes:.1f} passes", flush=True)
            for system, found in scores.items():
                print(f"   {system:22s} loss {found['loss']:.4f}  top-1 {found['top1']:.4f}  top-5 {found['top5']:.4f}")
        if dev and ready:
            self._draw(next(iter(dev)), ready)

    def _draw(self, dev_name: str, variants: Sequence[str]) -> None:
        """Losses over passes of one dev set, and what was reached."""
        histories = {
            variant: [
                {"epoch": entry["epoch"], "test": entry["dev"][dev_name][variant]}
                for entry in self.history
                if variant in entry["dev"].get(dev_name, {})
            ]
            for variant in variants
        }
        latest = self.history[-1]["dev"][dev_name]
        bars = [
            (variant, latest[variant]["top5"], latest.get(f"{variant} shuffled", {}).get("top5"))
            for variant in variants
        ]
        plot_comparison(self.settings.out / "loss_curve.png", histories, bars)

    def save(self) -> None:
        """Write state, language model and parts.

        Raises:
            ValueError: a loss is no number; nothing is written.
        """
        if self.unlogged and not bool(torch.stack(self.unlogged).isfinite().all()):
            self.log(self.share())
        out = self.settings.out
        save_checkpoint(self.state_path, self.epoch, self._parts(), self._deciding())
        weights = self.joint.llm.state_dict()
        save_tensors(out / "llm.pt", {name: value.detach().cpu() for name, value in weights.items()})
        ready = {name: model for name, model in self.joint.models.items() if name != "taste" or self.codebooks_started}
        write_parts(out / PARTS_FILE, ready)
        print(f"saved {out}/llm.pt and {PARTS_FILE} after {self.step} steps", flush=True)

    def _parts(self) -> dict[str, Any]:
        return {"model": self.joint, "optimizer": self.optimizer, "progress": self}

    def _deciding(self) -> dict[str, Any]:
        values = self.settings.to_dict()
        return {name: values[name] for name in _DECIDES_TRAINING}


def parameter_groups(joint: JointModel, settings: Settings) -> list[dict[str, Any]]:
    """What learns, by how it learns: the language model has its own rate; biases, norms and embeddings do not decay.

    Args:
        joint: the model.
        settings: with LLM_LR, PARTS_LR and WEIGHT_DECAY.

    Returns:
        groups as an optimizer takes them, each with its `peak_lr`.
    """
    of_llm = {id(parameter) for parameter in joint.llm.parameters()}
    embeddings = {id(part.weight) for part in joint.modules() if isinstance(part, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in joint.parameters():  # each once, however many variants share it
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and id(parameter) not in embeddings
            groups.setdefault((id(parameter) in of_llm, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "peak_lr": settings.llm_lr if pretrained else settings.parts_lr,
        }
        for (pretrained, decays), parameters in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
