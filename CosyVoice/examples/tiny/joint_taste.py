"""Several variants around one language model, as one model to train and to measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packed_features import PackedFeatures
from torch import Tensor, nn

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.common import IGNORE_ID
from taste.batch import Batch, Example
from taste.fitted_taste import start_quantizer
from taste.lengths import valid_mask
from taste.model import CosyVoiceS3Model
from taste.scores import Totals
from taste.unit_sequence import Prefix

# B batch   P positions before the units   S S3 units, 50 Hz   V variants   D channels of the language model

_MEASURED_POSITIONS = 20_000  # of a batch that is measured


class JointLosses(NamedTuple):
    """What one batch costs the variants."""

    losses: Tensor  # [V], cross-entropy in nats, mean over the targets
    commitment: Tensor  # scalar, the quantizer's, mean over the words; 0 without one


class JointModel(nn.Module):
    """Variants that share a language model, and what else the same module is in more than one of them.

    Args:
        models: by variant, at least one.
    """

    def __init__(self, models: Mapping[str, CosyVoiceS3Model]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    @property
    def llm(self) -> TransformerLM:
        """The language model."""
        return next(iter(self.models.values())).llm

    def train(self, mode: bool = True) -> JointModel:
        """Switch training mode on or off, everywhere.

        Args:
            mode: True for training.

        Returns:
            the model itself.
        """
        super().train(mode)
        self.llm.train(mode)  # a variant in which a part has no work has left it in eval mode
        return self

    def forward(
        self,
        batch: Batch,
        variants: Sequence[str],
        hidden_units: Tensor | None = None,
        textless: Tensor | None = None,
    ) -> JointLosses:
        """What the true units of a batch cost each variant; the language model reads all of them side by side.

        Args:
            batch: the utterances.
            variants: names of those that read it.
            hidden_units: [B, S], bool, see `CosyVoiceS3Model.states_after`; the same for all variants.
            textless: [B], bool, True where the encoded text is left out of what is fused, see `_without_text`. None:
                nowhere.

        Returns:
            the losses, in the order of `variants`.
        """
        models = [self.models[variant] for variant in variants]
        with self._without_text(textless):
            readings = [model.read(batch) for model in models]
        prefix, count = _side_by_side([reading.prefix for reading in readings]), len(models)
        hidden = None if hidden_units is None else hidden_units.repeat(count, 1)
        units, lengths = batch.units.repeat(count, 1), batch.unit_lengths.repeat(count)
        states = models[0].states_after(prefix, units, lengths, hidden)
        logits = self.llm.llm_decoder(states).flatten(0, 1).float()
        targets = models[0].targets(batch).repeat(count, 1).flatten()
        each = F.cross_entropy(logits, targets, ignore_index=IGNORE_ID, reduction="none").view(count, -1)
        commitment = sum(reading.commitment_sums.sum() / reading.word_counts.sum().clamp(min=1) for reading in readings)
        return JointLosses(each.sum(dim=1) / (batch.unit_lengths + 1).sum(), commitment)

    def commit(self, loss: Tensor) -> None:
        """Add the gradient of the quantizer's commitment, to the quantizer's weights alone; call it before `backward`.

        The words that it would pull together come from an aggregator that `taste_novq` shares. While the language
        model hardly listens yet, nothing holds against that pull, however weak it is, since Adam makes all gradients
        equally large: all words of all recordings would become one vector, which is rounded without any error.

        Args:
            loss: the commitment, weighted; the graph behind it stays.
        """
        if loss.requires_grad:
            loss.backward(inputs=list(self.models["taste"].quantizer.parameters()), retain_graph=True)

    @contextmanager
    def _without_text(self, rows: Tensor | None) -> Iterator[None]:
        """Fuse the mean of the batch's encoded text in place of the text of some rows, [B], bool.

        A text that has been read well leaves so little to learn from a recording that nobody looks at it. In a row
        without text, what is said and how must be heard. The mean, other than zeros, is what the language model's
        positions of text look like; it says nothing of the row.
        """

        def leave_out(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            text, lengths, *speech = inputs
            real = valid_mask(lengths, text.shape[1])[:, :, None]
            mean = (text.detach() * real).sum(dim=(0, 1)) / real.sum()
            return torch.where(rows[:, None, None], mean, text), lengths, *speech

        fusions = [] if rows is None else {model.fusion for model in self.models.values() if model.fusion is not None}
        hooks = [fusion.register_forward_pre_hook(leave_out) for fusion in fusions]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def start_codebooks(joint: JointModel, examples: Sequence[Example]) -> list[float]:
    """Start the quantizer of `taste` from the words of some utterances, as its aggregator hears them by now.

    Args:
        joint: with `taste`; only its quantizer changes.
        examples: of the training set.

    Returns:
        share of the codes that some word uses, of each level.
    """
    own = joint.models["taste"]
    model = deepcopy(own).cpu()
    usage = start_quantizer(model, examples)
    own.quantizer.load_state_dict(model.quantizer.state_dict())
    return usage


@torch.inference_mode()
def measure(joint: JointModel, features: PackedFeatures, variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Score the variants on a data set, some of them also with what is not the utterance's own.

    Args:
        joint: left in eval mode.
        features: the utterances.
        variants: names of those to score.

    Returns:
        loss, top1 and top5 of each variant; of `taste_novq` and `taste` also with another utterance's recording
        (`<variant> shuffled`), of `text_only` with another's text (`text_only wrong text`).
    """
    joint.eval()
    count = len(features)
    totals: dict[str, Totals] = {}

    def add(name: str, variant: str, batch: Batch) -> None:
        totals[name] = totals.get(name, Totals()) + Totals.of(joint.models[variant](batch))

    for chosen in features.batches_by_length(_MEASURED_POSITIONS):
        others = [(number + count // 2) % count for number in chosen]
        batch = features.batch(chosen)
        other_recordings = features.batch(chosen, recordings=others)
        for variant in variants:
            add(variant, variant, batch)
            if variant.startswith("taste"):
                add(f"{variant} shuffled", variant, other_recordings)
        if "text_only" in variants:
            add("text_only wrong text", "text_only", features.batch(chosen, texts=others))
    return {name: total.averages() for name, total in totals.items()}


def _side_by_side(prefixes: Sequence[Prefix]) -> Prefix:
    """The rows of all prefixes as one batch."""
    longest = max(prefix.vectors.shape[1] for prefix in prefixes)
    padded = [F.pad(prefix.vectors, (0, 0, 0, longest - prefix.vectors.shape[1])) for prefix in prefixes]
    return Prefix(torch.cat(padded), torch.cat([prefix.lengths for prefix in prefixes]))
