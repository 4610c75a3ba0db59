"""CosyVoice's language model, told by a recording how to speak its text."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.common import IGNORE_ID
from taste.aggregator import SimpleTextSpeechAggregator
from taste.audio_branch import AudioBranch
from taste.batch import Batch
from taste.lengths import valid_mask
from taste.lora import add_adapters
from taste.quantizer import WordQuantizer
from taste.scores import Scores
from taste.taste_aggregator import TasteAggregator
from taste.unit_sequence import Prefix, at_targets, join_prefix, join_units, targets_of
from taste.variants import PRETRAINED_PART, check_parts, idle_parts
from taste.words import word_mean, word_starts

# B batch   T text tokens   S S3 units, 50 Hz   P positions before the units   D channels of the LM   V S3 codes
# L codes a word

TOP = 5  # a unit counts as found when it is among so many best ones


class Reading(NamedTuple):
    """What a batch is read as, before its units."""

    prefix: Prefix
    commitment_sums: Tensor  # as in `Scores`
    word_counts: Tensor


class _Heard(NamedTuple):
    """What is known of the speech of each text token."""

    vectors: Tensor  # [B, T, D_speech]; equal on all tokens of a word
    codes: Tensor | None = None  # [B, T, L] int64; None without quantizer
    commitment_loss: Tensor | None = None  # scalar, mean over the words; None likewise


class CosyVoiceS3Model(nn.Module):
    """Predicts S3 units from text and, with an aggregator, from a recording of that text.

    The language model reads `[sos] [speaker] [text, T] [task] [unit 0 .. unit n-1]`. The position of `[task]` predicts
    unit 0 and the last unit predicts EOS (= `speech_token_size`); see `taste.unit_sequence`.

    What stands for the text, and which of the pretrained parts that leaves without work:

    - `text_only`: the text embeddings through CosyVoice's own text encoder. Nothing is new.
    - `simple`: LayerNorm(text embeddings) + LayerNorm(aggregated speech), through a new projection to the LM's width.
      CosyVoice's text encoder is not run.
    - `taste_novq`: CosyVoice's text encoder, fused with the speech of each word: aggregated for each token, averaged
      over the tokens of a word, encoded by the audio branch.
    - `taste`: the same, but the speech of each word passes through a quantizer: L small integers are all that the
      language model learns about it.

    Parts that are frozen or without work ask for no gradient and stay in eval mode whatever `train()` is told, so that
    their dropout never acts. The text embeddings arrive as features, therefore `text_embedding` never learns.

    Args:
        llm: the pretrained language model; it becomes part of this module, and its `requires_grad` flags are set here.
        aggregator: for every variant but `text_only`.
        audio_branch: for `taste_novq` and `taste`.
        fusion: for `taste_novq` and `taste`; see `taste.fusion`.
        quantizer: for `taste`.
        variant: one of `VARIANTS`.
        freeze_llm: True leaves every pretrained part as it is, so only the parts beside it learn; False lets everything
            that works learn. A frozen `text_only` model has nothing to learn: it can be evaluated, not trained.
        use_speaker: False leaves the speaker's position out of the sequence.
        lora_rank: above 0, adapters of this rank learn in the frozen language model's layers.

    Raises:
        ValueError: the variant is unknown, its parts are not those given, or adapters cannot be had.

    Source: the sequence is that of FunAudioLLM/CosyVoice cosyvoice/llm/llm.py @ ace7c47.
    """

    aggregator: SimpleTextSpeechAggregator | TasteAggregator | None
    audio_branch: AudioBranch | None
    fusion: nn.Module | None
    quantizer: WordQuantizer | None

    def __init__(
        self,
        llm: TransformerLM,
        aggregator: SimpleTextSpeechAggregator | TasteAggregator | None = None,
        *,
        audio_branch: AudioBranch | None = None,
        fusion: nn.Module | None = None,
        quantizer: WordQuantizer | None = None,
        variant: str = "simple",
        freeze_llm: bool = False,
        use_speaker: bool = True,
        lora_rank: int = 0,
    ) -> None:
        super().__init__()
        parts = {"aggregator": aggregator, "audio_branch": audio_branch, "fusion": fusion, "quantizer": quantizer}
        check_parts(variant, [name for name, part in parts.items() if part is not None])
        if lora_rank and not freeze_llm:
            raise ValueError(
                f"LORA_RANK is {lora_rank} and FREEZE_LLM False: adapters learn in a frozen language model's stead; "
                "set FREEZE_LLM = True, or LORA_RANK = 0"
            )
        self.variant = variant
        self.use_speaker = use_speaker
        self.llm = llm
        for name, part in parts.items():
            self.add_module(name, part)
        if variant == "simple":
            assert aggregator is not None
            self.text_norm = nn.LayerNorm(aggregator.text_width)
            self.speech_norm = nn.LayerNorm(aggregator.text_width)
            self.input_proj = nn.Linear(aggregator.text_width, llm.llm_input_size)
        self.idle_parts = idle_parts(variant, use_speaker)  # names of submodules that have no work
        self.frozen_parts = (PRETRAINED_PART,) if freeze_llm else self.idle_parts  # those that do not learn
        self.carried_names: frozenset[str] = frozenset()  # frozen weights that are not those of the model folder
        self.trained_parts: tuple[str, ...] = ()  # submodules beside the language model that the folder's training made
        for name in self.frozen_parts:
            self.get_submodule(name).requires_grad_(False)
        if lora_rank:
            add_adapters(self.llm.llm, lora_rank)
        self.train(self.training)

    def forward(self, batch: Batch) -> Scores:
        """Score the true units of a batch, each predicted from the ones before it.

        Args:
            batch: the utterances; their units are read and predicted.

        Returns:
            sums and counts of each row.
        """
        reading = self.read(batch)
        logits = self.predict_after(reading.prefix, batch.units, batch.unit_lengths).float()
        targets = self.targets(batch)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE_ID, reduction="none")
        found = logits.topk(TOP, dim=-1).indices == targets[:, :, None]  # [B, S+1, TOP]; no class is IGNORE_ID
        return Scores(
            loss_sums=losses.sum(dim=1),
            top1_counts=found[:, :, 0].sum(dim=1),
            top5_counts=found.sum(dim=(1, 2)),
            target_counts=batch.unit_lengths + 1,
            commitment_sums=reading.commitment_sums,
            word_counts=reading.word_counts,
        )

    def predict(self, batch: Batch) -> Tensor:
        """The scores of every code at every target, teacher-forced.

        Args:
            batch: the utterances.

        Returns:
            logits [B, S+1, V+1]: place k predicts unit k from the units before k, place n of a row of n units predicts
            EOS; places behind that mean nothing.
        """
        return self.predict_after(self.read(batch).prefix, batch.units, batch.unit_lengths)

    def predict_after(
        self, prefix: Prefix, units: Tensor, unit_lengths: Tensor, hidden_units: Tensor | None = None
    ) -> Tensor:
        """The scores of every code at every target, behind what `read` gave.

        Args:
            prefix: as for `states_after`.
            units: likewise.
            unit_lengths: likewise.
            hidden_units: likewise.

        Returns:
            logits [B, S+1, V+1], as `predict` gives them.
        """
        return self.llm.llm_decoder(self.states_after(prefix, units, unit_lengths, hidden_units))

    def states_after(
        self, prefix: Prefix, units: Tensor, unit_lengths: Tensor, hidden_units: Tensor | None = None
    ) -> Tensor:
        """What the language model makes of a prefix and units, before it names the next unit.

        Args:
            prefix: what stands before the units, as `read` gives it.
            units: [B, S], int64; anything behind a row's end.
            unit_lengths: [B], int64.
            hidden_units: [B, S], bool, True where the language model reads zeros in a unit's place; None: nowhere.

        Returns:
            the last states [B, S+1, D_out]: place k predicts unit k, place n of a row of n units EOS; places behind
            that mean nothing.
        """
        spoken = self.llm.speech_embedding(units.clamp(min=0))
        if hidden_units is not None:
            spoken = spoken.masked_fill(hidden_units[:, :, None], 0.0)
        states, _ = self.llm.llm(*join_units(prefix, spoken, unit_lengths))
        return at_targets(states, prefix.lengths, units.shape[1] + 1)

    def targets(self, batch: Batch) -> Tensor:
        """What `predict` should have said.

        Args:
            batch: the utterances.

        Returns:
            [B, S+1], int64: a row's units, then EOS, then IGNORE_ID.
        """
        return targets_of(batch.units, batch.unit_lengths, self.eos)

    def read(self, batch: Batch) -> Reading:
        """Read all but the units: `[sos] [speaker] [text] [task]` of each row, and what the quantizer asks for.

        Args:
            batch: the utterances; their units are not looked at.

        Returns:
            the prefix, and the quantizer's loss; zeros without a quantizer, and where that is in eval mode.

        Raises:
            ValueError: the batch lacks what the variant reads.
        """
        text, lengths, heard = self._text_vectors(batch)
        prefix = join_prefix(self.llm.llm_embedding.weight, self._speaker_vectors(batch), text, lengths)
        if heard is None or heard.commitment_loss is None or not (self.quantizer and self.quantizer.training):
            return Reading(prefix, text.new_zeros(len(text)), torch.zeros_like(batch.text_lengths))
        assert batch.word_ids is not None, "who hears with a quantizer has read the words"
        words = word_starts(batch.word_ids, batch.text_lengths).sum(dim=1)
        return Reading(prefix, heard.commitment_loss * words, words)

    def prefix(self, batch: Batch) -> Prefix:
        """What the language model reads before the first unit, for generation.

        Args:
            batch: the utterances; their units are not looked at.

        Returns:
            vectors [B, P, D] and lengths [B].
        """
        return self.read(batch).prefix

    @torch.inference_mode()
    def attention(self, batch: Batch) -> Tensor:
        """Where each text token looks in the recording.

        Args:
            batch: the utterances; their units are not looked at.

        Returns:
            weights [B, T, A], zero behind a recording's end; rows of padded tokens mean nothing.

        Raises:
            ValueError: the variant has no aggregator, or the batch no Whisper features.
        """
        if self.aggregator is None:
            raise ValueError(f"variant {self.variant!r} looks at no recording")
        final, mid, speech_lengths = self._speech_of(batch)
        if isinstance(self.aggregator, SimpleTextSpeechAggregator):
            return self.aggregator.attention(batch.text, final, speech_lengths)
        inputs = (batch.text, final, mid, batch.text_lengths, speech_lengths, batch.text_tokens)
        return self.aggregator.attention(*inputs)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Tensor:
        """Write down how the words of each recording are spoken.

        Args:
            batch: the utterances; their units are not looked at. The model should be in eval mode.

        Returns:
            codes [B, T, L], int64, equal on all tokens of a word; -1 at padding.

        Raises:
            ValueError: the variant has no quantizer, or the batch lacks what it reads.
        """
        if self.quantizer is None:
            raise ValueError(f"variant {self.variant!r} has no codes; only 'taste' has a quantizer")
        codes = self._hear(batch).codes
        assert codes is not None, "a quantizer gives codes"
        return codes

    def aggregate(self, batch: Batch) -> Tensor:
        """The speech of each text token, before any quantizer; of the taste variants, averaged over words.

        Args:
            batch: the utterances; their units are not looked at.

        Returns:
            [B, T, D_speech]; a padded token's vector means nothing.

        Raises:
            ValueError: the batch lacks what the variant reads.
        """
        final, mid, speech_lengths = self._speech_of(batch)
        assert self.aggregator is not None, "who has no aggregator hears nothing"
        if self.variant == "simple":
            return self.aggregator(batch.text, final, mid, speech_lengths)
        if batch.word_ids is None or batch.text_tokens is None:
            raise ValueError(f"variant {self.variant!r} needs the words of the text, and the batch has none")
        inputs = (batch.text, final, mid, batch.text_lengths, speech_lengths, batch.text_tokens)
        return word_mean(self.aggregator(*inputs), batch.word_ids, batch.text_lengths)

    @property
    def eos(self) -> int:
        """The class that ends an utterance, one more than the last unit."""
        return self.llm.speech_token_size

    def train(self, mode: bool = True) -> "CosyVoiceS3Model":
        """Switch training mode on or off for the parts that learn; frozen parts stay in eval mode.

        Args:
            mode: True for training.

        Returns:
            the model itself.
        """
        super().train(mode)
        for name in self.frozen_parts:
            self.get_submodule(name).eval()
        return self

    def _text_vectors(self, batch: Batch) -> tuple[Tensor, Tensor, _Heard | None]:
        """The text at the LM's width [B, T', D], its lengths [B], and the speech that is in it."""
        if self.aggregator is None:
            encoded, _ = self.llm.encode(batch.text, batch.text_lengths)
            return encoded, batch.text_lengths, None
        heard = self._hear(batch)
        if self.variant == "simple":
            fused = self.input_proj(self.text_norm(batch.text) + self.speech_norm(heard.vectors))
            return fused, batch.text_lengths, heard
        assert self.audio_branch is not None and self.fusion is not None
        encoded, _ = self.llm.encode(batch.text, batch.text_lengths)
        speech = self.audio_branch(heard.vectors, batch.text_lengths)
        return *self.fusion(encoded, batch.text_lengths, speech, batch.text_lengths), heard

    def _hear(self, batch: Batch) -> _Heard:
        """The speech of each text token: aggregated, averaged over words, quantized, as far as the variant does it."""
        if batch.codes is not None:
            if self.quantizer is None:
                raise ValueError(f"variant {self.variant!r} reads no codes; only 'taste' has a quantizer")
            return _Heard(self.quantizer.decode(batch.codes), batch.codes)
        vectors = self.aggregate(batch)
        if self.quantizer is None:
            return _Heard(vectors)
        valid = valid_mask(batch.text_lengths, vectors.shape[1])
        assert batch.word_ids is not None, "`aggregate` has read the words"
        quantized = self.quantizer(vectors, valid, word_starts(batch.word_ids, batch.text_lengths))
        return _Heard(quantized.vectors, quantized.codes, quantized.commitment_loss)

    def _speech_of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the aggregator hears, known to be there: final, mid, speech lengths."""
        if batch.speech_final is None or batch.speech_mid is None or batch.speech_lengths is None:
            raise ValueError(f"variant {self.variant!r} needs Whisper features, and the batch has none")
        return batch.speech_final, batch.speech_mid, batch.speech_lengths

    def _speaker_vectors(self, batch: Batch) -> Tensor:
        """The speaker's position, [B, 1, D]; [B, 0, D] when it is switched off."""
        if not self.use_speaker:
            return self.llm.llm_embedding.weight.new_empty(len(batch.utt_ids), 0, self.llm.llm_input_size)
        if batch.speaker is None:
            raise ValueError(
                "the model reads a speaker vector, and the batch has none (USE_SPEAKER = False goes without)"
            )
        return self.llm.spk_embed_affine_layer(F.normalize(batch.speaker, dim=1))[:, None]
