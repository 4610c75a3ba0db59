"""Free-running generation: the model reads its own units, a whole batch at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from cosyvoice.utils.common import ras_sampling
from taste.batch import Batch
from taste.model import CosyVoiceS3Model
from taste.unit_sequence import MAX_LM_POSITIONS

# B batch   P positions before the units   D channels of the LM   V S3 codes

METHODS = ("greedy", "top_k", "ras")
# Of true units (CosyVoice-tiny's, of its lively speech) one in ten stands twice or more among the ten before it, one in
# fifty four times. Striking out the former (`tau_r` 0.2) changes word durations, which a variant that hears is told.
HEARING_TAU_R = 0.4


@dataclass(frozen=True)
class Sampling:
    """How units are chosen, and how many there may be.

    The length window is the paper's: speech has 3 to 30 units for each text token.
    """

    method: str = "ras"  # greedy; top_k; ras: the sampler that the model folder's configuration names
    top_k: int = 10  # codes that top_k draws from
    min_units_per_token: float = 3.0  # EOS is forbidden before
    max_units_per_token: float = 30.0
    # of ras: a unit that fills this share of the last ones is struck out; None: as the folder's configuration says for
    # text_only, HEARING_TAU_R for variants that hear
    tau_r: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"SAMPLING is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.top_k < 1:
            raise ValueError(f"TOP_K is {self.top_k}; expected 1 or more")
        if self.tau_r is not None and not self.tau_r > 0:
            raise ValueError(f"TAU_R is {self.tau_r}; expected a share above 0")
        least, most = self.min_units_per_token, self.max_units_per_token
        if not (0 <= least <= most and most >= 1):
            raise ValueError(
                f"the window of units a text token is {least} to {most}; expected 0 <= least <= most, most >= 1"
            )


class Generated(NamedTuple):
    """Units of each utterance, in the order of the batch."""

    units: list[list[int]]
    ended: list[bool]  # True where the model said EOS, False where the length limit cut it off

    def subset(self, indices: Sequence[int]) -> "Generated":
        """Some of the utterances.

        Args:
            indices: their places in the batch.

        Returns:
            what was generated for them, in the order of `indices`.
        """
        return Generated([self.units[index] for index in indices], [self.ended[index] for index in indices])


@torch.inference_mode()
def generate(model: CosyVoiceS3Model, batch: Batch, sampling: Sampling) -> Generated:
    """Let the model speak each text of a batch.

    Greedy results do not depend on which utterances share a batch. The other methods draw from torch's global random
    generator, so they repeat when it is seeded and the batch is the same.

    Args:
        model: the model; it is left in eval mode.
        batch: text, and what else the variant reads, on the model's device; the units are not looked at.
        sampling: how to choose.

    Returns:
        the units and whether they were ended by the model.
    """
    model.eval()
    prefix = model.prefix(batch)
    fewest, most = _length_limits(batch.text_lengths.tolist(), prefix.lengths.tolist(), sampling)
    units: list[list[int]] = [[] for _ in most]
    ended = [False] * len(most)
    cache = model.llm.llm.new_cache(len(most), prefix.vectors.shape[1] + max(most), device=prefix.vectors.device)
    hidden = model.llm.llm.step(prefix.vectors, cache, lengths=prefix.lengths)
    last_hidden = hidden[torch.arange(len(most)), prefix.lengths - 1]  # [B, D], at [task]
    going = list(range(len(most)))  # rows of the batch that are still in the cache
    while going:
        log_probs = model.llm.llm_decoder(last_hidden).float().log_softmax(dim=-1)  # [rows going on, V+1]
        too_short = [place for place, row in enumerate(going) if len(units[row]) < fewest[row]]
        log_probs[too_short, model.eos] = -torch.inf
        for row, unit in zip(going, _choose(model, log_probs, [units[row] for row in going], sampling), strict=True):
            if unit == model.eos:
                ended[row] = True
            else:
                units[row].append(unit)
        staying = [place for place, row in enumerate(going) if not ended[row] and len(units[row]) < most[row]]
        if len(staying) < len(going):
            cache.keep_rows(torch.tensor(staying, dtype=torch.int64))
            going = [going[place] for place in staying]
        if going:
            newest = torch.tensor([[units[row][-1]] for row in going], device=prefix.vectors.device)
            last_hidden = model.llm.llm.step(model.llm.speech_embedding(newest), cache)[:, 0]
    return Generated(units, ended)


def _length_limits(
    text_lengths: Sequence[int], prefix_lengths: Sequence[int], sampling: Sampling
) -> tuple[list[int], list[int]]:
    """Fewest and most units of each row; the LM's positions are a limit too."""
    room = [MAX_LM_POSITIONS - length for length in prefix_lengths]
    most = [
        min(math.floor(tokens * sampling.max_units_per_token), free)
        for tokens, free in zip(text_lengths, room, strict=True)
    ]
    return [math.ceil(tokens * sampling.min_units_per_token) for tokens in text_lengths], most


def _choose(model: CosyVoiceS3Model, log_probs: Tensor, so_far: Sequence[list[int]], sampling: Sampling) -> list[int]:
    """The next class of each row."""
    if sampling.method == "greedy":
        return log_probs.argmax(dim=-1).tolist()
    if sampling.method == "top_k":
        best = log_probs.topk(min(sampling.top_k, log_probs.shape[-1]), dim=-1)
        drawn = best.values.softmax(dim=-1).multinomial(1)
        return best.indices.gather(1, drawn)[:, 0].tolist()
    sampler = _repetition_aware(model, sampling)
    return [sampler(row, units, sampling.top_k) for row, units in zip(log_probs, so_far, strict=True)]


def _repetition_aware(model: CosyVoiceS3Model, sampling: Sampling) -> Callable[[Tensor, list[int], int], int]:
    """The folder's sampler; where it strikes out repetitions, those that `sampling` does not want."""
    sampler = model.llm.sampling
    tau_r = sampling.tau_r
    if tau_r is None and model.variant != "text_only":
        tau_r = HEARING_TAU_R
    if tau_r is None or getattr(sampler, "func", sampler) is not ras_sampling:
        return sampler
    return partial(cast(Callable[..., int], sampler), tau_r=tau_r)
