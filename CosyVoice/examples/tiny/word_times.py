"""Say when each token of a transcript is spoken, from the phones that flite spoke and their end times."""

# T text tokens   P phones without pauses

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from corpus_reader import PAUSE, Spoken

from taste.text import tokenize

_SAME, _OTHER, _LEFT_OUT = 0, 10, 8  # costs of the alignment: a phone too many costs less than two wrong ones


class Span(NamedTuple):
    """A stretch of a recording, in seconds."""

    start: float
    end: float


class TimedTokens(NamedTuple):
    """An utterance's text tokens and when they are heard."""

    tokens: list[int]  # [T]
    words: list[int]  # the word of each, [T]
    spans: list[Span | None]  # [T]; None: never
    expected: list[Counter[str]]  # phones of each word, as flite says it alone
    said: list[Counter[str]]  # phones of each word, as they were said


def bare(word: str) -> str:
    """A word as it is pronounced: lower-case letters, digits and apostrophes; '' for mere punctuation."""
    return re.sub(r"[^a-z0-9']+", "", word.lower()).strip("'")


def pronounce(words: Iterable[str], flite: str) -> dict[str, tuple[str, ...]]:
    """Ask flite for the phones of single words.

    Args:
        words: as `bare` gives them.
        flite: path of the program.

    Returns:
        {word: phones without pauses}.

    Raises:
        ValueError: flite's answer has another number of lines.
    """
    ordered = sorted(set(words))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.txt"
        path.write_text(
            "\n\n".join(ordered) + "\n", encoding="utf-8"
        )  # a paragraph is an utterance, and a line of phones
        command = [flite, "-voice", "kal16", "-ps", "-f", str(path), "-o", "none"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    if len(lines) != len(ordered):
        raise ValueError(f"flite read {len(lines)} of {len(ordered)} words; expected a line of phones for each")
    phones = [tuple(phone for phone in line.split() if phone != PAUSE) for line in lines]
    return dict(zip(ordered, phones, strict=True))


def pronounce_texts(texts: Iterable[str], flite: str) -> dict[str, tuple[str, ...]]:
    """Ask flite for the phones of each word of some texts.

    Args:
        texts: the texts.
        flite: path of the program.

    Returns:
        {word, as `bare` gives it: phones without pauses}.
    """
    words = {bare(word) for text in texts for word in text.split()} - {""}
    return pronounce(words, flite) if words else {}


def time_tokens(spoken: Spoken, tokenizer: Any, lexicon: Mapping[str, Sequence[str]]) -> TimedTokens:
    """Say when each token of an utterance is heard.

    Args:
        spoken: the utterance.
        tokenizer: openai-whisper's.
        lexicon: phones of each word, as `pronounce_texts` gives them.

    Returns:
        its tokens with their spans, see `token_spans`.
    """
    text = tokenize(tokenizer, spoken.text)
    pieces = [tokenizer.encoding.decode_single_token_bytes(token).decode("utf-8", "ignore") for token in text.tokens]
    words = _join(pieces, text.word_ids)
    word_of_phone = share_out(words, spoken.phones, lexicon)
    said = [Counter[str]() for _ in words]
    for (phone, _), word in zip(spoken.phones, word_of_phone, strict=True):
        if word is not None:
            said[word][phone] += 1
    return TimedTokens(
        text.tokens,
        text.word_ids,
        token_spans(pieces, text.word_ids, spoken.phones, word_of_phone),
        [Counter(lexicon.get(bare(word), ())) for word in words],
        said,
    )


def share_out(
    words: Sequence[str], phones: Sequence[tuple[str, float]], lexicon: Mapping[str, Sequence[str]]
) -> list[int | None]:
    """Say which word each phone belongs to, by the cheapest alignment with what flite says for each word alone.

    Args:
        words: as written.
        phones: phone and end in seconds, pauses included.
        lexicon: phones of each word, by `bare` text.

    Returns:
        the number of each phone's word, never falling; None for a pause.
    """
    expected = [(phone, number) for number, word in enumerate(words) for phone in lexicon.get(bare(word), ())]
    owners = iter(align([phone for phone, _ in expected], [phone for phone, _ in phones if phone != PAUSE]))
    return [None if phone == PAUSE else expected[next(owners)][1] for phone, _ in phones]


def _join(pieces: Sequence[str], word_ids: Sequence[int]) -> list[str]:
    """The words that tokens' texts are pieces of."""
    words = [""] * (word_ids[-1] + 1)
    for piece, word in zip(pieces, word_ids, strict=True):
        words[word] += piece
    return words


def token_spans(
    pieces: Sequence[str],
    word_ids: Sequence[int],
    phones: Sequence[tuple[str, float]],
    word_of_phone: Sequence[int | None],
) -> list[Span | None]:
    """Say when each token is heard.

    The phones of a word are shared out to its tokens by their numbers of letters. A token without letters is heard in
    the pause after its word.

    Args:
        pieces: the tokens' texts, [T].
        word_ids: the word of each token, [T], as `taste.text.tokenize` gives it.
        phones: phone and end in seconds, pauses included.
        word_of_phone: what `share_out` gives.

    Returns:
        [T]; None for a token that is not heard.
    """
    starts = [0.0, *(end for _, end in phones[:-1])]
    spoken = [(phone, Span(start, end)) for (phone, end), start in zip(phones, starts, strict=True) if phone != PAUSE]
    owners = np.array([word for word in word_of_phone if word is not None], dtype=np.int64)

    spans: list[Span | None] = []
    for word in range(word_ids[-1] + 1):
        own = np.flatnonzero(owners == word).tolist()
        letters = [len(bare(piece)) for piece, w in zip(pieces, word_ids, strict=True) if w == word]
        bounds = np.round(np.cumsum([0, *letters]) / max(1, sum(letters)) * len(own)).astype(int).tolist()
        for count, first, end in zip(letters, bounds[:-1], bounds[1:], strict=True):
            if count and end > first:
                spans.append(Span(spoken[own[first]][1].start, spoken[own[end - 1]][1].end))
            elif count or not own:
                spans.append(None)
            else:
                spans.append(_pause_after(own[-1], spoken, phones[-1][1]))
    return spans


def align(expected: Sequence[str], spoken: Sequence[str]) -> list[int]:
    """Say which expected phone each spoken one is, by the least number of changes.

    Args:
        expected: phones, at least one.
        spoken: phones, [P].

    Returns:
        indices into `expected`, [P], never falling; one that nobody expected belongs to the phone before it.
    """
    too_many = np.arange(len(spoken) + 1) * _LEFT_OUT  # what it costs that nobody expected the first ones
    differs = np.where(np.array(expected)[:, None] == np.array(spoken), _SAME, _OTHER)
    cost = np.empty((len(expected) + 1, len(spoken) + 1), dtype=np.int64)
    cost[0] = too_many
    for i in range(1, len(expected) + 1):
        row = cost[i - 1] + _LEFT_OUT
        row[1:] = np.minimum(row[1:], cost[i - 1, :-1] + differs[i - 1])
        cost[i] = np.minimum.accumulate(row - too_many) + too_many
    i, j = len(expected), len(spoken)
    owners = [0] * len(spoken)
    while j:
        if i and cost[i, j] == cost[i - 1, j - 1] + differs[i - 1, j - 1]:
            i, j = i - 1, j - 1
            owners[j] = i
        elif i and cost[i, j] == cost[i - 1, j] + _LEFT_OUT:
            i -= 1
        else:
            j -= 1
            owners[j] = max(0, i - 1)
    return owners


def _pause_after(index: int, spoken: Sequence[tuple[str, Span]], end_seconds: float) -> Span | None:
    start = spoken[index][1].end
    end = spoken[index + 1][1].start if index + 1 < len(spoken) else end_seconds
    return Span(start, end) if end > start else None
