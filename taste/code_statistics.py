"""How a quantizer uses its codes, and how many bits a second of speech takes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# W words   L levels

COLLAPSED_SHARE = 0.1  # of the codes that so many words could use: a level that uses fewer has collapsed


def describe_codes(codes: Sequence[Tensor], seconds: float, codebook_size: int) -> dict[str, Any]:
    """Measure the codes of some utterances.

    Args:
        codes: of each utterance, [W, L], int64; at least one word in all.
        seconds: length of the recordings together.
        codebook_size: codes of a level.

    Returns:
        words; words_per_second; bits_per_word (as stored: every code takes log2 of the codebook's size);
        bits_per_second; entropy_bits_per_second (what an ideal compressor of single codes would need); and for each
        level, first to last: used (different codes), usage (their share of the codes that so many words could use, of
        the whole codebook where the words are as many), perplexity (codes used equally often that would be as hard to
        guess). Entropy and perplexity are plug-in estimates, computed as if the shares that were counted were the true
        ones: they come out too low where words are few for the codebook, and compare only between sets of equally many.
    """
    words = torch.cat(list(codes))
    counts = [level.bincount(minlength=codebook_size).double() for level in words.T]
    entropies = [_entropy_bits(level) for level in counts]
    used = [int((level > 0).sum()) for level in counts]
    could = min(codebook_size, len(words))
    words_per_second = len(words) / seconds
    bits_per_word = words.shape[1] * math.log2(codebook_size)
    return {
        "words": len(words),
        "words_per_second": words_per_second,
        "bits_per_word": bits_per_word,
        "bits_per_second": bits_per_word * words_per_second,
        "entropy_bits_per_second": sum(entropies) * words_per_second,
        "used": used,
        "usage": [count / could for count in used],
        "perplexity": [2**entropy for entropy in entropies],
    }


def collapse_warning(described: dict[str, Any], codebook_size: int) -> str | None:
    """Say so where a codebook has collapsed.

    Args:
        described: what `describe_codes` gave.
        codebook_size: codes of a level.

    Returns:
        a sentence; None where every level is in use.
    """
    could = min(codebook_size, described["words"])
    collapsed = [
        f"level {level + 1} uses {used} of {codebook_size} codes (perplexity {perplexity:.1f})"
        for level, (used, perplexity) in enumerate(zip(described["used"], described["perplexity"], strict=True))
        if used <= max(1, COLLAPSED_SHARE * could)
    ]
    if not collapsed:
        return None
    return (
        f"warning: the codebook has collapsed for {described['words']} words: {'; '.join(collapsed)}. The codes say "
        "little about the speech: start from a taste_novq run (INIT_FROM), lower NEW_MODULES_LR, or use a smaller "
        "CODEBOOK_SIZE"
    )


def _entropy_bits(counts: Tensor) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())
