"""Turns a text with its recording, or with its codes, into what a model that we trained reads."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cosyvoice.utils.model_dir import ModelDir, text_embedding_table
from taste.batch import Batch, Example, collate
from taste.build import TasteSizes, build_model
from taste.checkpoint import check_same_folder, load_checkpoint
from taste.learned_state import load_learned_state
from taste.text import TextTokens
from taste.whisper_encoder import WhisperEncoder, check_same_whisper
from taste.words import word_spans

# T text tokens   W words   L codes a word   N samples


class TrainedReader:
    """What a run of variant `taste` has trained, with the Whisper and the text embeddings that it was trained with.

    Args:
        checkpoint_path: its best.pt.
        model_dir: the model folder it was trained on.
        whisper_dir: Whisper in transformers' format; None: `<model_dir>/whisper`.
        mid_layer: the Whisper block that was tapped for its features.
        device: where to compute.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is of another variant, does not fit the folders, or was trained on features of
            another Whisper.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        model_dir: str | Path,
        whisper_dir: str | Path | None,
        mid_layer: int,
        device: torch.device | str,
    ) -> None:
        checkpoint = load_checkpoint(Path(checkpoint_path))
        settings = checkpoint.notes["settings"]
        if settings["variant"] != "taste":
            raise ValueError(
                f"{checkpoint_path} is of variant {settings['variant']!r}, which has no codes; expected a run with "
                "--variant taste"
            )
        folder = ModelDir(model_dir)
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32  # as stage 1 by default
        self._whisper = WhisperEncoder(whisper_dir or folder.file("whisper"), mid_layer, device, dtype)
        check_same_whisper(checkpoint.notes["features_made_with"], self._whisper)
        model = build_model(
            model_dir,
            "taste",
            speech_width=checkpoint.weights["aggregator.layer_norm.weight"].shape[0],
            freeze_llm=settings["freeze_llm"],
            use_speaker=checkpoint.notes["use_speaker"],
            lora_rank=settings["lora_rank"],
            taste_sizes=TasteSizes.from_dict(settings),
            whisper_dir=whisper_dir,
        )
        load_learned_state(model, checkpoint.weights)
        check_same_folder(model, checkpoint, checkpoint_path)
        self.model = model.to(device)
        self._text_embedding = text_embedding_table(folder)
        self._device = device

    def batch(
        self,
        text: TextTokens,
        *,
        waveform: Tensor | None = None,
        codes: Tensor | None = None,
        speaker: Tensor | None = None,
    ) -> Batch:
        """One utterance as the model reads it.

        Args:
            text: tokens and words of the transcript.
            waveform: the recording, [N] float32 at 16 kHz; or
            codes: what it was encoded to, [W, L] int64.
            speaker: speaker vector [192]; needed where the model reads one.

        Returns:
            a batch of one, on the model's device, with no units yet.

        Raises:
            ValueError: the recording is empty or longer than Whisper's window.
        """
        final = mid = token_codes = None
        if waveform is not None:
            (features,) = self._whisper.encode([waveform])
            final, mid = features.final.float().cpu(), features.mid.float().cpu()
        if codes is not None:
            tokens_of_word = torch.tensor([end - start for start, end in word_spans(text.word_ids)])
            token_codes = codes.repeat_interleave(tokens_of_word, dim=0)[None]  # [1, T, L]
        tokens = torch.tensor(text.tokens)
        example = Example(
            utt_id="",
            text=self._text_embedding[tokens].float(),
            speech_final=final,
            speech_mid=mid,
            speaker=speaker,
            units=torch.zeros(0, dtype=torch.int64),
            text_tokens=tokens,
            word_ids=torch.tensor(text.word_ids),
        )
        return replace(collate([example]), codes=token_codes).to(self._device)
