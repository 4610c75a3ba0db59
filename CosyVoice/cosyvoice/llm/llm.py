"""CosyVoice's language model: text and a speaker vector in, S3 tokens out.

The sequence is `[sos] [speaker] [text, T] [task] [S3 0 .. S3 S-1]`; the position of `[task]` predicts S3 0 and the
last S3 token predicts the end, whose id is `speech_token_size`.

# B batch  T text tokens  S S3 tokens, 50 Hz  L = 3 + T + S positions  D channels  V = speech_token_size + 1
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.transformer.encoder import ConformerEncoder, TransformerEncoder
from cosyvoice.transformer.label_smoothing_loss import LabelSmoothingLoss
from cosyvoice.utils.common import IGNORE_ID, ras_sampling, th_accuracy

log = logging.getLogger(__name__)

Sampler = Callable[[Tensor, Sequence[int], int], int]  # (log-probabilities [V], tokens so far, sampling) -> token


class TransformerLM(nn.Module):
    """Text encoder, language model over S3 tokens, and the embeddings that join them.

    Args:
        text_encoder_input_size: width of the text embeddings.
        llm_input_size: D of the sequence.
        llm_output_size: width of the language model's output.
        text_token_size: number of text tokens.
        speech_token_size: number of S3 tokens.
        text_encoder: encoder of the text; causal, so that a prompt's text is encoded alike whatever follows.
        llm: encoder of the sequence; causal.
        sampling: draws a token, e.g. `cosyvoice.utils.common.ras_sampling`. None, as in the published files before
            f4e70e2 (30 July 2024), which have no such key: that one, with the numbers that the files have had since.
        length_normalized_loss: divide the loss by the number of targets (True) or by B (False).
        lsm_weight: label smoothing.
        spk_embed_dim: width of the speaker vector.

    Source: FunAudioLLM/CosyVoice cosyvoice/llm/llm.py @ ace7c47.
    """

    sos = 0  # rows of llm_embedding
    task_id = 1

    def __init__(
        self,
        text_encoder_input_size: int,
        llm_input_size: int,
        llm_output_size: int,
        text_token_size: int,
        speech_token_size: int,
        text_encoder: ConformerEncoder,
        llm: TransformerEncoder,
        sampling: Sampler | None = None,
        length_normalized_loss: bool = True,
        lsm_weight: float = 0.0,
        spk_embed_dim: int = 192,
    ) -> None:
        super().__init__()
        self.llm_input_size = llm_input_size
        self.speech_token_size = speech_token_size
        self.eos_token = speech_token_size
        if sampling is None:
            log.warning("llm has no `sampling`, as in files before August 2024: repetition-aware, as in later ones")
        self.sampling = sampling or ras_sampling

        self.text_embedding = nn.Embedding(text_token_size, text_encoder_input_size)
        self.text_encoder = text_encoder
        self.text_encoder_affine_layer = nn.Linear(text_encoder.output_size(), llm_input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, llm_input_size)
        self.speech_embedding = nn.Embedding(speech_token_size, llm_input_size)
        self.llm_embedding = nn.Embedding(2, llm_input_size)
        self.llm = llm
        self.llm_decoder = nn.Linear(llm_output_size, speech_token_size + 1)
        self.criterion_ce = LabelSmoothingLoss(speech_token_size + 1, IGNORE_ID, lsm_weight, length_normalized_loss)

    def encode(self, text: Tensor, text_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode embedded text to the width of the sequence.

        Args:
            text: text embeddings, [B, T, text_encoder_input_size].
            text_lengths: valid tokens of each row, [B], integer.

        Returns:
            [B, T, D], unspecified at padding, and the lengths [B], int64.
        """
        hidden, valid = self.text_encoder(text, text_lengths, decoding_chunk_size=1, num_decoding_left_chunks=-1)
        return self.text_encoder_affine_layer(hidden), valid.squeeze(1).sum(dim=1)

    def forward(self, batch: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """Loss of predicting every S3 token, and the end, from what stands before it.

        Args:
            batch: `text_token` [B, T] and `speech_token` [B, S], int64, right-padded with any valid id;
                `text_token_len` and `speech_token_len` [B], integer; `embedding` [B, spk_embed_dim], float.
            device: where to compute.

        Returns:
            `loss` and `acc` (share of positions whose best token is right), 0-d.
        """
        # from the lengths as they lie on the CPU: what is asked of a GPU waits for it
        longest = int((3 + batch["text_token_len"] + batch["speech_token_len"]).max())
        targets = int((1 + batch["speech_token_len"]).sum())
        text, text_lengths = self.encode(
            self.text_embedding(batch["text_token"].to(device)), batch["text_token_len"].to(device)
        )
        speaker = self._embed_speaker(batch["embedding"].to(device))
        tokens, token_lengths = batch["speech_token"].to(device), batch["speech_token_len"].to(device)
        speech = self.speech_embedding(tokens)
        sequence, target, lengths = self._join(speaker, text, text_lengths, speech, tokens, token_lengths, longest)
        hidden, _ = self.llm(sequence, lengths)
        # text and padding have no logits: V is wide
        asked = torch.nonzero_static((target != IGNORE_ID).flatten(), size=targets).squeeze(1)
        target = target.flatten()[asked]
        logits = self.llm_decoder(hidden.flatten(0, 1)[asked])
        logits = logits.float()  # autocast on the CPU would leave the loss in 16 bits
        return {
            "loss": self.criterion_ce(logits, target, batch=len(sequence)),
            "acc": th_accuracy(logits, target, ignore_label=IGNORE_ID),
        }

    def _join(
        self,
        speaker: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        speech: Tensor,
        tokens: Tensor,
        token_lengths: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the parts of each row behind each other without gaps: sequence [B, L, D], target [B, L], lengths [B].

        L is `longest`, the most of the lengths. Padding inside a row would move the targets of every shorter row. All
        rows are joined by one gather: row by row takes longer than the model itself.
        """
        (batch, longest_text, width), (sos, task) = text.shape, self._marks()
        marks = [mark.expand(batch, 1, width).to(text.dtype) for mark in (sos, task)]
        parts = torch.cat([marks[0], speaker.to(text.dtype), text, marks[1], speech.to(text.dtype)], dim=1)
        lengths = 3 + text_lengths + token_lengths
        place = torch.arange(parts.size(1), device=parts.device)[None]
        before = 2 + text_lengths[:, None]  # frames before the row's own [task]
        source = torch.where(place < before, place, place - before + 2 + longest_text).clamp(max=parts.size(1) - 1)
        joined = parts.gather(1, source[:, :, None].expand(-1, -1, width))
        # Padding frames hold the ignore id too, as published; being hidden from all others, they change nothing.
        real = place < lengths[:, None]
        sequence = joined.masked_fill(~real[:, :, None], float(IGNORE_ID))
        spoken = tokens.gather(1, (place - before).clamp(0, tokens.size(1) - 1))
        spoken = torch.where(place - before == token_lengths[:, None], self.eos_token, spoken)
        target = spoken.masked_fill((place < before) | ~real, IGNORE_ID)
        return sequence[:, :longest], target[:, :longest], lengths

    @torch.inference_mode()
    def inference(
        self,
        text: Tensor,
        text_len: Tensor,
        prompt_text: Tensor,
        prompt_text_len: Tensor,
        prompt_speech_token: Tensor,
        prompt_speech_token_len: Tensor,
        embedding: Tensor,
        sampling: int = 25,
        max_token_text_ratio: float = 20,
        min_token_text_ratio: float = 2,
        uuid: str = "",
    ) -> Generator[int, None, None]:
        """Write S3 tokens for one text, one by one.

        Args:
            text: tokens, [1, T], int64.
            text_len: T, [1], integer.
            prompt_text: tokens of what the prompt says, [1, T prompt], int64; may be empty.
            prompt_text_len: [1], integer.
            prompt_speech_token: the prompt's S3 tokens, [1, S prompt], int64; may be empty.
            prompt_speech_token_len: [1], integer.
            embedding: speaker vector, [1, spk_embed_dim]; [0, spk_embed_dim] leaves the speaker's position out.
            sampling: handed to the sampler.
            max_token_text_ratio: most S3 tokens for each text token.
            min_token_text_ratio: fewest; the end is forbidden before.
            uuid: without effect, for callers of the published interface.

        Yields:
            S3 tokens, the prompt's not included.
        """
        text, _ = self.encode(self.text_embedding(torch.cat([prompt_text, text], dim=1)), text_len + prompt_text_len)
        sos, task = self._marks()
        prompt = self.speech_embedding(prompt_speech_token[0, : int(prompt_speech_token_len)])
        frames = torch.cat([sos, *self._embed_speaker(embedding), text[0], task, prompt]).unsqueeze(0)

        fewest, most = int(text_len * min_token_text_ratio), int(text_len * max_token_text_ratio)
        cache = self.llm.new_cache(1, frames.size(1) + max(most, 1), device=frames.device)
        decoded: list[int] = []
        while len(decoded) < most:
            hidden = self.llm.step(frames, cache)[0, -1]
            log_prob = self.llm_decoder(hidden).log_softmax(dim=-1)
            token = self._draw(log_prob, decoded, sampling, end_allowed=len(decoded) >= fewest)
            if token == self.eos_token:
                return
            yield token
            decoded.append(token)
            frames = self.speech_embedding.weight[token].expand(1, 1, -1)

    def _draw(self, log_prob: Tensor, decoded: Sequence[int], sampling: int, end_allowed: bool) -> int:
        if not end_allowed:
            log_prob[self.eos_token] = -torch.inf
        return self.sampling(log_prob, decoded, sampling)

    def _embed_speaker(self, embedding: Tensor) -> Tensor:
        """Speaker vectors [B, spk_embed_dim] as frames of the sequence, [B, 1, D]."""
        return self.spk_embed_affine_layer(F.normalize(embedding, dim=1)).unsqueeze(1)

    def _marks(self) -> tuple[Tensor, Tensor]:
        """The frames that stand for [sos] and [task], [1, D] each."""
        weight = self.llm_embedding.weight
        return weight[self.sos].unsqueeze(0), weight[self.task_id].unsqueeze(0)
