"""Turns the vector of each word into a few integers and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

# B batch   T text tokens   W words of the whole batch   D channels   Q levels

NO_CODE = -1  # of padded tokens, and of levels that were dropped; 0 is a code like any other
KMEANS_ROUNDS = 100  # as in the published configuration
DEAD_SIZE = 1e-3  # of a code: what one use leaves after 230 steps at a decay of .99


class Quantized(NamedTuple):
    """Vectors after rounding to the codebooks."""

    vectors: Tensor  # [B, T, D]; zero at padding
    codes: Tensor  # [B, T, Q] int64, NO_CODE at padding and, in training, at dropped levels
    commitment_loss: Tensor  # scalar, weighted sum over the levels; 0 in eval mode
    level_losses: Tensor  # [Q], what it is the sum of


class WordQuantizer(nn.Module):
    """Residual vector quantization: each level rounds what the levels before left over.

    All tokens of a word carry the same vector and get the same codes. Codebooks follow the data by moving averages
    (EMA) in training mode, whatever `requires_grad` says; in eval mode nothing changes, and a token's codes depend on
    its own vector alone.

    Differences from the published code, each with its reason:

    - Statistics are taken once a word (`once_a_word`). Once a token, as published, a word of six tokens pulls six times
      as hard at the codes as a word of one.
    - A code that no word has used for long moves to a vector of the batch (`revive_dead_codes`). With fewer words in
      the first batch than there are codes, k-means leaves the others where no vector ever comes near.
    - The first steps use all levels, whatever quantize dropout draws: every level must start from training data, and
      the library starts an empty one from whatever comes first, even in eval mode. That is refused here.
    - Padding gives zeros (`padding_as_bias`).

    Args:
        width: D.
        codebook_dim: channels in which distances are measured.
        levels: Q.
        codes: size of each codebook.
        ema_decay: share of a code that one step keeps.
        kmeans_init: place the codes by k-means on the first batch; otherwise at random.
        quantize_dropout: in training use only the first 1..Q levels, one draw a step.
        commitment_weight: weight of the commitment loss.
        once_a_word: see above; False is the published behaviour.
        revive_dead_codes: see above; False is the published behaviour.
        padding_as_bias: True gives padded tokens the output projection's bias, as the published code does; nothing
            reads them.

    Source: arXiv 2504.07053, section 3.1; taste_speech/modules_taste/vq @ 301bce2; the library is
    lucidrains/vector-quantize-pytorch 1.32.0.
    """

    def __init__(
        self,
        width: int,
        codebook_dim: int = 256,
        levels: int = 4,
        codes: int = 512,
        ema_decay: float = 0.99,
        kmeans_init: bool = True,
        quantize_dropout: bool = True,
        commitment_weight: float = 1.0,
        *,
        once_a_word: bool = True,
        revive_dead_codes: bool = True,
        padding_as_bias: bool = False,
    ) -> None:
        super().__init__()
        from loguru import logger
        from vector_quantize_pytorch import ResidualVQ  # two seconds that the other variants need not wait

        logger.disable("vector_quantize_pytorch")  # it warns of the small first batch that revival makes up for
        self.levels, self.codes, self.quantize_dropout = levels, codes, quantize_dropout
        self.once_a_word, self.padding_as_bias = once_a_word, padding_as_bias
        self.rvq = ResidualVQ(
            dim=width,
            codebook_dim=codebook_dim,
            num_quantizers=levels,
            codebook_size=codes,
            decay=ema_decay,
            kmeans_init=kmeans_init,
            kmeans_iters=KMEANS_ROUNDS,
            quantize_dropout=quantize_dropout,
            commitment_weight=commitment_weight,
            threshold_ema_dead_code=DEAD_SIZE if revive_dead_codes else 0,
            rotation_trick=False,  # the library's newer default; the published model passes gradients straight through
        )
        self._started = False  # True once `is_started` has found it so
        self.register_load_state_dict_post_hook(_look_again)

    def forward(self, vectors: Tensor, valid: Tensor, word_starts: Tensor | None = None) -> Quantized:
        """Round vectors to the codebooks.

        Args:
            vectors: [B, T, D], float; equal on all tokens of a word.
            valid: [B, T], bool, False at padding.
            word_starts: [B, T], bool, True at the first token of each word (`taste.words.word_starts`); None: every
                token is a word.

        Returns:
            the rounded vectors, through which gradients pass to `vectors` once for each level used, as published; the
            codes; the loss.

        Raises:
            RuntimeError: the codebooks are empty in eval mode.
        """
        starts = valid if word_starts is None or not self.once_a_word else word_starts & valid
        words = vectors[starts]  # [W, D]
        if len(words) == 0:
            return self._nothing(vectors)
        self._prepare()
        rounded, codes, losses = self.rvq(words[None])
        losses = losses if self.training else losses.detach()  # the library's zeros keep asking for gradients
        # Rows are read in order, so the word of a token is the last that started.
        word_of = (starts.flatten().long().cumsum(dim=0) - 1).clamp(min=0).view_as(valid)
        padding = self.rvq.project_out(words.new_zeros(self.rvq.codebook_dim)) if self.padding_as_bias else 0.0
        return Quantized(
            vectors=torch.where(valid[:, :, None], rounded[0][word_of].to(vectors.dtype), padding),
            codes=codes[0][word_of].masked_fill(~valid[:, :, None], NO_CODE),
            commitment_loss=losses.sum(),
            level_losses=losses,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """The vectors that codes stand for.

        Args:
            codes: [B, T, levels] int64, 0 .. codes - 1, or `NO_CODE` where a level or a token has none; fewer levels
                are taken where training dropped levels.

        Returns:
            [B, T, D]; a token without any code gets what `forward` gives padding.

        Raises:
            ValueError: codes out of range, more levels than there are, or fewer where none were ever dropped.
        """
        levels = codes.shape[-1]
        fewest = 1 if self.quantize_dropout else self.levels
        if not fewest <= levels <= self.levels:
            raise ValueError(f"codes of {levels} levels, this quantizer reads {fewest} to {self.levels} of them")
        if codes.numel() and not NO_CODE <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())}, this quantizer has 0 to {self.codes - 1}; "
                "were they written by another model?"
            )
        vectors = self.rvq.get_output_from_indices(codes)
        if self.padding_as_bias:
            return vectors
        return vectors.masked_fill((codes == NO_CODE).all(dim=-1, keepdim=True), 0.0)

    @property
    def is_started(self) -> bool:
        """Whether every level has codes: from k-means, a checkpoint, or at random."""
        if not self._started:  # remembered, because a GPU is waited for to read it
            self._started = all(bool(level._codebook.initted) for level in self.rvq.layers)
        return self._started

    @contextmanager
    def without_exchange(self) -> Iterator[None]:
        """Let the codebooks learn in this process alone, for vectors that every process has.

        In training the library adds up what the processes of a run see, by a backend that may know nothing of tensors
        on the CPU (NCCL).

        Yields:
            nothing.
        """
        from vector_quantize_pytorch.vector_quantize_pytorch import batched_sample_vectors, noop

        alone = {"sample_fn": batched_sample_vectors, "replace_sample_fn": batched_sample_vectors}
        alone |= {"kmeans_all_reduce_fn": noop, "all_reduce_fn": noop}
        codebooks = [level._codebook for level in self.rvq.layers]
        earlier = [{name: getattr(codebook, name) for name in alone} for codebook in codebooks]
        try:
            for codebook in codebooks:
                vars(codebook).update(alone)
            yield
        finally:
            for codebook, functions in zip(codebooks, earlier, strict=True):
                vars(codebook).update(functions)

    def _prepare(self) -> None:
        """Keep the library from starting codebooks in eval mode, and from dropping levels before all have started."""
        started = self.is_started
        if not started and not self.training:
            raise RuntimeError(
                "the codebooks are empty: they start from the first training batch; train first, or load a checkpoint"
            )
        self.rvq.quantize_dropout = self.quantize_dropout and self.levels > 1 and started

    def _nothing(self, vectors: Tensor) -> Quantized:
        """A batch without words."""
        losses = vectors.new_zeros(self.levels)
        codes = torch.full((*vectors.shape[:2], self.levels), NO_CODE, device=vectors.device)
        return Quantized(torch.zeros_like(vectors), codes, losses.sum(), losses)


def _look_again(quantizer: WordQuantizer, incompatible_keys: object) -> None:
    """Called after `load_state_dict`: the codebooks may be others."""
    quantizer._started = False
