"""What a language model is told, beside its published loss, about its text tokens, its phones, and how words sound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from corpus_reader import PAUSE, PHONES
from torch import Tensor, nn
from unit_codes import CODE_WIDTH, unit_codes

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.attention import RelPositionMultiHeadedAttention, align_distances

# B batch   T text tokens   S S3 units   L = 3 + T + S positions   D channels   H heads   W head width   G guided heads

SOUNDS_FILE = "word_sounds.pt"  # weights of `WordSounds`
WORDS_FILE = "told_words.pt"  # {utterance: what `describe_words` says of its tokens, [T, FACTS], float16}
GUIDED_LAYERS = (2, 3)  # of the language model, from 0: behind them are some that use what these have found
GUIDED_HEADS = 2  # of each: the first looks at the token that is spoken next, the second at the one after it
COMING_LAYER = 4  # the layer, and all behind it, that must know which phone comes next
LASTING_BOUNDS = (0, 1, 2, 4, 7, 12, 20)  # units: how long a word has lasted or will last is told in classes up to each
LENGTH_NOISE = 0.2  # largest standard deviation of what is added to the logarithms of a word's pace and pause
CHANGE_NOISE = 0.2  # the same for how often a phone is in a word
CODE_NOISE = 0.5  # the same for the codes of its units
FACTS = 3 + len(PHONES) + CODE_WIDTH  # that are known of a word, see `WordFacts`
_BEFORE_TEXT = 2  # positions: sos, speaker
_NOBODY = -1
_LOUD = 1.0  # standard deviation of the weights for paces and pauses at first: what is too quiet is not listened to
_CODE_GAIN = 0.15  # the same for codes, of which there are more
_PACES = (-1.2, 1.2, 8)  # logarithms of how slow a word is that are told by curves around them: from, to, how many
_PAUSES = (0.0, 3.6, 6)  # the same of 1 + a pause's units
_PAUSE = PHONES.index(PAUSE)


class Lessons(NamedTuple):
    """What a batch costs, and how well it is read; 0-d each."""

    loss: Tensor  # the published one
    acc: Tensor  # share of units that are the best guess
    guide: Tensor  # cross-entropy of where the guided heads look, in nats
    found: Tensor  # share of units for which the first guided head of the last guided layer looks most at their token
    phone: Tensor  # cross-entropy of the next unit's phone, in nats
    phone_acc: Tensor  # share of these that are right
    coming: Tensor  # cross-entropy of the phone that follows the one being spoken, in nats
    coming_acc: Tensor  # share of these that are right, by the last layer
    lasting: Tensor  # cross-entropy of how long the word has lasted, and of how long it will last yet, in nats
    lasting_acc: Tensor  # share of the latter, in `LASTING_BOUNDS`, that is right
    sounding: Tensor  # share of the variance of the word's codes that is lost on the way, in rows that were told them


class WordFacts(NamedTuple):
    """What is known of how words sound, as `describe_words` puts it in a row."""

    numbers: Tensor  # [..., 3]: units, 0 where it is not heard; units that are usual for its text; those of the pause
    changes: Tensor  # [..., phones]: how many times more often than its text says each phone is in it
    codes: Tensor  # [..., CODE_WIDTH]: mean of the codes of its units, as long as a code; 0 where it is not heard

    @classmethod
    def of(cls, words: Tensor) -> WordFacts:
        """Take rows apart, [..., FACTS]."""
        return cls(*words.float().split([3, len(PHONES), CODE_WIDTH], dim=-1))


class ReadingLessons(nn.Module):
    """A language model with a phone reader, listened in to by hooks: its own forward pass is the published one.

    Args:
        llm: the language model; it becomes part of this module.

    Raises:
        ValueError: it has too few layers.
    """

    def __init__(self, llm: TransformerLM) -> None:
        super().__init__()
        last = max(*GUIDED_LAYERS, COMING_LAYER)
        if len(llm.llm.encoders) <= last:
            raise ValueError(
                f"the language model has {len(llm.llm.encoders)} layers, expected at least {last + 1}: those with the "
                f"numbers {(*GUIDED_LAYERS, COMING_LAYER)} have lessons; see GUIDED_LAYERS, COMING_LAYER in {__file__}"
            )
        self.llm = llm
        width = llm.llm_decoder.in_features
        self.phone_reader = nn.Linear(width, len(PHONES))
        self.coming_readers = nn.ModuleList(nn.Linear(width, len(PHONES) + 1) for _ in range(2))  # and one for the end
        self.lasting_readers = nn.ModuleList(nn.Linear(width, len(LASTING_BOUNDS) + 1) for _ in range(2))
        self.word_sounds = WordSounds(llm.llm_input_size)
        self.sounding_readers = nn.ModuleList(nn.Linear(width, CODE_WIDTH) for _ in range(2))
        self.register_buffer("unit_codes", unit_codes(), persistent=False)
        self._kept: Tensor | None = None  # which units may be seen, [B, S]
        self._scores: list[Tensor] = []  # log-weights of the guided heads, [B, G, L, L] a layer
        self._deep: Tensor | None = None
        self._hidden: Tensor | None = None
        self._told: Tensor | None = None  # how each token sounds, [B, T, D]
        self._listening = self._guiding = False
        llm.text_encoder_affine_layer.register_forward_hook(self._tell)
        llm.speech_embedding.register_forward_hook(self._hide)
        llm.llm.register_forward_hook(self._keep_hidden)
        llm.llm.encoders[COMING_LAYER].register_forward_hook(self._keep_deep)
        for layer in GUIDED_LAYERS:
            llm.llm.encoders[layer].self_attn.register_forward_pre_hook(self._keep_scores)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        kept: Tensor | None = None,
        told: Tensor | None = None,
        lessons: bool = True,
        guide: bool = True,
    ) -> Lessons:
        """Run the language model and its lessons.

        Args:
            batch: as for `TransformerLM.forward`, with `owner`, the text token of each unit, and `phone`, its class,
                both [B, S] int64; `word`, the number of each text token's word, [B, T] int64; and how often each phone
                is in that word, where its text is read, `expected`, and as it is spoken, `said`, [B, T, phones] int16;
                and how many units it usually has, by its text, `usual`, [B, T].
            kept: units that the language model may see, [B, S], bool; None: all.
            told: rows in which it is told how the words sound, [B], bool; None: none.
            lessons: False leaves the lessons out; their values are then 0.
            guide: False leaves out only the one for attention heads, which costs most.

        Returns:
            the losses, means over what they are of.
        """
        self._kept, self._scores, self._listening, self._guiding = kept, [], lessons, lessons and guide
        words = None if told is None else describe_words(batch, self.unit_codes)
        self._told = None if told is None else self.word_sounds(words) * told[:, None, None]
        out = self.llm(batch, batch["text_token"].device)
        scores, hidden, deep = self._scores, self._hidden, self._deep
        self._kept, self._told, self._scores, self._hidden, self._deep = None, None, [], None, None
        nothing = out["loss"].new_zeros(())
        if not lessons:
            return Lessons(out["loss"], out["acc"], *[nothing] * (len(Lessons._fields) - 2))
        owners, phones, coming, since, until = _by_position(batch, hidden.shape[1])
        guided = _guide(scores, owners, batch) if guide else (nothing, nothing)
        early, late = (
            _read(reader(vectors), coming) for reader, vectors in zip(self.coming_readers, (deep, hidden), strict=True)
        )
        phone = _read(self.phone_reader(hidden), phones)
        lasted, lasting = (
            _read(reader(vectors), classes)
            for reader, vectors, classes in zip(self.lasting_readers, (deep, hidden), (since, until), strict=True)
        )
        sounding = nothing
        if told is not None:
            codes = WordFacts.of(words).codes
            sounding = sum(
                _lost(reader(vectors), codes, owners.masked_fill(~told[:, None], _NOBODY))
                for reader, vectors in zip(self.sounding_readers, (deep, hidden), strict=True)
            )
        return Lessons(
            *(out["loss"], out["acc"], *guided, *phone, (early[0] + late[0]) / 2, late[1]),
            *((lasted[0] + lasting[0]) / 2, lasting[1], sounding / 2),
        )

    def _tell(self, _module: nn.Module, _inputs: Any, encoded: Tensor) -> Tensor | None:
        return None if self._told is None else encoded + self._told.to(encoded.dtype)

    def _hide(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor | None:
        return None if self._kept is None else embedded * self._kept[:, :, None]

    def _keep_hidden(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._hidden = output[0] if self._listening else None

    def _keep_deep(self, _module: nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> None:
        self._deep = output[0] if self._listening else None

    def _keep_scores(self, module: RelPositionMultiHeadedAttention, inputs: tuple[Any, ...]) -> None:
        if self._guiding:
            x, distances, visible, *_ = inputs
            self._scores.append(log_weights(module, x, distances, visible, GUIDED_HEADS))


def lasting_classes(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """How many units of the word being spoken stand before each unit, and how many from it on.

    The word is that of the unit just before: as long as nothing else is known, it may go on. Before the first unit it
    is the first word.

    Args:
        batch: as `ReadingLessons.forward` reads it.

    Returns:
        classes of both, [B, S], int64: the number of `LASTING_BOUNDS` below each.
    """
    spoken = batch["word"].gather(1, batch["owner"])
    place = torch.arange(spoken.shape[1], device=spoken.device)
    begins = torch.ones_like(spoken, dtype=torch.bool)
    begins[:, 1:] = spoken[:, 1:] != spoken[:, :-1]
    begins |= place == batch["speech_token_len"][:, None]  # padding is no word's
    started = torch.where(begins, place, 0).cummax(dim=1).values
    since = torch.zeros_like(spoken)
    since[:, 1:] = (place[1:] - started[:, :-1]).clamp(min=0)
    never = batch["speech_token_len"][:, None].expand(-1, 1)
    ends = torch.where(begins & (place > 0), place, never)
    next_begin = ends.flip(1).cummin(dim=1).values.flip(1)
    until = (next_begin - place).clamp(min=0)
    bounds = torch.tensor(LASTING_BOUNDS, device=spoken.device)
    return torch.bucketize(since, bounds), torch.bucketize(until, bounds)


def describe_words(batch: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """What can be told of how each token's word sounds.

    Args:
        batch: as `ReadingLessons.forward` reads it.
        codes: of the S3 units, see `unit_codes`; on the same device.

    Returns:
        [B, T, FACTS], float32, see `WordFacts`.
    """
    words, owner, units = batch["word"], batch["owner"], batch["speech_token"]
    there = torch.arange(owner.shape[1], device=words.device) < batch["speech_token_len"][:, None]
    silent = batch["phone"] == _PAUSE
    spoken = words.gather(1, owner)  # [B, S], the word of each unit
    counts = [
        torch.zeros_like(words).scatter_add_(1, spoken, which.to(words.dtype)).gather(1, words)
        for which in (there & ~silent, there & silent)
    ]
    each = codes[units.clamp(min=0)] * (there & ~silent)[:, :, None]
    sums = each.new_zeros(*words.shape, CODE_WIDTH)
    sums.scatter_add_(1, spoken[:, :, None].expand_as(each), each)
    held = F.normalize(sums.gather(1, words[:, :, None].expand_as(sums)), dim=2) * CODE_WIDTH**0.5
    numbers = torch.stack([counts[0], batch["usual"], counts[1]], dim=2)
    return torch.cat([numbers.float(), (batch["said"] - batch["expected"]).float(), held], dim=2)


def log_paces(words: Tensor) -> Tensor:
    """How slowly words are spoken, and the pauses after them.

    Args:
        words: as `describe_words` gives them, [..., FACTS].

    Returns:
        [..., 2]: the logarithms of a word's units, in those that are usual, and of 1 + those of the pause.
    """
    units, usual, pause = WordFacts.of(words).numbers.unbind(dim=-1)
    return torch.stack([units.clamp(min=1).log() - usual.clamp(min=1).log(), pause.log1p()], dim=-1)


class WordSounds(nn.Module):
    """How each word of a recording sounds, in one vector: what an aggregator can be asked to hear.

    That is where it differs from what its text leads to expect: how slowly it is spoken, for how long one pauses after
    it, and by which phones it differs from how its text is read. And it is which units it holds, by their codes:
    between units that are alike a language model hesitates that has read the text and knows the phones.

    Args:
        width: of the vectors that it makes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mapping = nn.Linear(_PACES[2] + _PAUSES[2] + CODE_WIDTH + len(PHONES), width)
        nn.init.normal_(self.mapping.weight, std=_LOUD)
        with torch.no_grad():
            self.mapping.weight[:, -CODE_WIDTH - len(PHONES) :] *= _CODE_GAIN / _LOUD
        self.speak_of_phones(torch.zeros(width, len(PHONES)))

    @torch.no_grad()
    def speak_of_phones(self, vectors: Tensor) -> None:
        """Begin with the language model's own words for phones.

        Args:
            vectors: what one more of each phone in a word adds to its encoded text, [width, phones].
        """
        self.mapping.weight[:, -len(PHONES) :] = vectors

    def forward(self, words: Tensor) -> Tensor:
        """Make the vectors; in training from something a little different.

        Args:
            words: as `describe_words` gives them, [B, T, FACTS].

        Returns:
            [B, T, width]; 0 for words that are not heard.
        """
        paces, (_, changes, codes) = log_paces(words), WordFacts.of(words)
        if self.training:
            size = torch.rand(len(words), 1, 1, device=words.device)
            paces = paces + LENGTH_NOISE * size * torch.randn_like(paces)
            changes = changes + CHANGE_NOISE * size * torch.randn_like(changes)
            codes = codes + CODE_NOISE * size * torch.randn_like(codes)
        slow, pause = paces.split(1, dim=2)
        told = torch.cat([_curves(slow, *_PACES), _curves(pause, *_PAUSES), codes, changes], dim=2)
        return self.mapping(told) * (words[..., :1] > 0)


def _curves(values: Tensor, lowest: float, highest: float, count: int) -> Tensor:
    """Bells around `count` places, as wide as these are apart, at values [..., 1]: [..., count]."""
    places = torch.linspace(lowest, highest, count, device=values.device)
    return torch.exp(-((values - places) / (highest - lowest) * (count - 1)).square() / 2)


def log_weights(
    attention: RelPositionMultiHeadedAttention, x: Tensor, distances: Tensor, visible: Tensor | None, heads: int
) -> Tensor:
    """The logarithms of the weights of an attention's first heads, which its forward pass never writes down.

    Args:
        attention: the attention.
        x: its input, [B, L, D].
        distances: as it gets them.
        visible: as it gets it.
        heads: G.

    Returns:
        [B, G, L, L], float32.
    """

    def first(values: Tensor) -> Tensor:
        return values.view(*values.shape[:-1], attention.heads, -1)[..., :heads, :]

    queries, keys = first(attention.linear_q(x)).float(), first(attention.linear_k(x)).float()
    positions = attention.project_distances(distances)[:heads].float()
    by_key = torch.einsum("blgw,bkgw->bglk", queries + attention.pos_bias_u[:heads], keys)
    by_distance = torch.einsum("blgw,gpw->bglp", queries + attention.pos_bias_v[:heads], positions)
    scores = (by_key + align_distances(by_distance, x.shape[1])) * attention.head_width**-0.5
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    return scores.log_softmax(dim=-1)


def _read(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of classes [B, L], `_NOBODY` where none is asked for, and the share that is right."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), classes.flatten(), ignore_index=_NOBODY)
    asked = classes != _NOBODY
    return loss, ((logits.argmax(dim=-1) == classes) & asked).sum() / asked.sum()


def _lost(found: Tensor, codes: Tensor, owners: Tensor) -> Tensor:
    """Share of the variance of the codes [B, T, CODE_WIDTH] of the words of `owners` [B, L] that is not in `found`."""
    asked = (owners != _NOBODY)[:, :, None]
    wanted = codes.gather(1, owners.clamp(min=0)[:, :, None].expand(-1, -1, CODE_WIDTH))
    count = asked.sum().clamp(min=1)
    mean = (wanted * asked).sum(dim=(0, 1)) / count
    variance = ((wanted - mean).square() * asked).sum()
    return ((found.float() - wanted).square() * asked).sum() / variance.clamp(min=1.0)


def _by_position(batch: Mapping[str, Tensor], length: int) -> tuple[Tensor, ...]:
    """What is asked about the unit that each position predicts, [B, L] each; `_NOBODY` where it predicts none.

    Its token, its phone, the phone to come, for how long the word has lasted, and for how long it will.
    """
    first = batch["text_token_len"][:, None] + _BEFORE_TEXT  # the position of [task], which predicts unit 0
    unit = torch.arange(length, device=first.device) - first
    real = (unit >= 0) & (unit < batch["speech_token_len"][:, None])
    place = unit.clamp(0, batch["owner"].shape[1] - 1)
    values = (
        *(batch["owner"], batch["phone"], coming_phones(batch["phone"], batch["speech_token_len"])),
        *lasting_classes(batch),
    )
    return tuple(value.gather(1, place).masked_fill(~real, _NOBODY) for value in values)


def coming_phones(phones: Tensor, lengths: Tensor) -> Tensor:
    """The phone that follows the one spoken just before each unit: its own, where it begins a phone.

    Args:
        phones: class of each unit's phone, [B, S], int64.
        lengths: units of each row, [B].

    Returns:
        classes, [B, S], int64; `len(PHONES)` where the row ends with that phone.
    """
    place = torch.arange(phones.shape[1], device=phones.device)
    begins = torch.ones_like(phones, dtype=torch.bool)
    begins[:, 1:] = phones[:, 1:] != phones[:, :-1]
    begins &= place < lengths[:, None]
    never = phones.shape[1]
    at = torch.where(begins, place, never).flip(1).cummin(dim=1).values.flip(1)  # where the next phone begins
    return torch.where(at == never, len(PHONES), phones.gather(1, at.clamp(max=never - 1)))


def _guide(scores: list[Tensor], owners: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of where the guided heads look, and the share of units whose token the last layer has found."""
    asked = owners != _NOBODY  # [B, L]
    last = batch["text_token_len"][:, None] - 1
    wanted = [torch.minimum(owners.clamp(min=0) + head, last) + _BEFORE_TEXT for head in range(GUIDED_HEADS)]
    columns = torch.stack(wanted, dim=1)[..., None]  # [B, G, L, 1]
    losses = [-layer.gather(3, columns).squeeze(3).transpose(0, 1)[:, asked].mean() for layer in scores]
    looked_at = scores[-1][:, 0].argmax(dim=-1)
    found = ((looked_at == wanted[0]) & asked).sum() / asked.sum()
    return torch.stack(losses).mean(), found
