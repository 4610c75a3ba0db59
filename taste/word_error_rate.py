"""How many words a recogniser heard wrongly, of those that were said."""

from collections.abc import Callable, Sequence
from functools import cache

from taste.text_normalisation import normalise


def word_error_rate(
    references: Sequence[str], heard: Sequence[str], languages: Sequence[str | None] | None = None
) -> float | None:
    """Count wrong words over a set of utterances.

    English is brought into one spelling as published word errors are: `twenty five` is `25`, `colour` is `color`,
    `it's` is `it is`, and `um` is nothing.

    Args:
        references: what was said.
        heard: what a recogniser wrote.
        languages: of each utterance, as `en`; None: not noted, so nothing is done that English alone allows.

    Returns:
        substitutions, deletions and insertions for each word said; None where no word was said.
    """
    import jiwer

    languages = [None] * len(references) if languages is None else languages
    pairs = [
        (_in_one_spelling(said, language), _in_one_spelling(wrote, language))
        for said, wrote, language in zip(references, heard, languages, strict=True)
    ]
    pairs = [(said, wrote) for said, wrote in pairs if said]
    return jiwer.wer([said for said, _ in pairs], [wrote for _, wrote in pairs]) if pairs else None


def _in_one_spelling(text: str, language: str | None) -> str:
    """A text reduced to what can be heard, whichever way its words and numbers are spelled."""
    if language != "en":
        return normalise(text)
    # what was heard has been normalised before, with no sign of a currency: those that numbers bring along go again
    return normalise(_english_normaliser()(normalise(text)))


@cache
def _english_normaliser() -> Callable[[str], str]:
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()
