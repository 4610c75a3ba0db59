"""Turns text and prompt recordings into what CosyVoice's models take.

B is 1 everywhere.  T text tokens   S S3 tokens, 50 Hz   F mel frames, 86.13 Hz   N samples
"""

import importlib.util
import logging
import re
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor

from cosyvoice.utils.audio import speaker_fbank, whisper_log_mel
from cosyvoice.utils.file_utils import load_wav
from cosyvoice.utils.frontend_utils import (
    NumberSpeller,
    contains_chinese,
    is_only_punctuation,
    remove_bracket,
    replace_blank,
    replace_corner_mark,
    replace_full_stop,
    spell_out_number,
    split_paragraph,
)
from cosyvoice.utils.model_dir import read_torch_file
from cosyvoice.utils.onnx_session import OnnxSession
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ

logger = logging.getLogger(__name__)

WHISPER_MEL_BINS = 128
MAX_PROMPT_SECONDS = 30  # the S3 tokenizer was trained on windows of this length
MIN_PROMPT_SECONDS = 0.05  # two frames of the speaker encoder's 25 ms window
GET_NAMED_SPEAKERS = (
    "python setup_cosyvoice.py --cosyvoice-on-modelscope iic/CosyVoice-300M-SFT "
    "--cosyvoice-on-huggingface FunAudioLLM/CosyVoice-300M-SFT --model-dir CosyVoice-300M-SFT"
)

ModelInput = dict[str, Tensor]


class CosyVoiceFrontEnd:
    """Everything before the language model: text rules, tokens, S3 units, speaker vectors, prompt mels.

    A prompt is a recording's path, or a waveform [1, N] at 16 kHz as scripts gave it before paths were accepted.

    Args:
        get_tokenizer: makes the text tokenizer (`encode(text, allowed_special=...)`).
        feat_extractor: waveform [1, N] -> mel [1, 80, F], with its `sampling_rate` bound as a keyword.
        campplus_model: campplus.onnx; opened at its first use.
        speech_tokenizer_model: speech_tokenizer_v1.onnx; opened at its first use.
        spk2info: file of named speakers; "" or a missing file means none.
        allowed_special: special tokens that text may hold, "all" or a set.
        device: where results live; None takes CUDA if there is one.

    Raises:
        ValueError: `feat_extractor` does not say its rate, or `spk2info` is damaged.

    Source: FunAudioLLM/CosyVoice cosyvoice/cli/frontend.py @ ace7c47, except that the prompt's mel is computed at the
    model's own rate, where that commit takes 24 kHz for every model.
    """

    def __init__(
        self,
        get_tokenizer: Callable[[], Any],
        feat_extractor: Callable[[Tensor], Tensor],
        campplus_model: str | Path,
        speech_tokenizer_model: str | Path,
        spk2info: str | Path = "",
        allowed_special: str | set[str] = "all",
        *,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = get_tokenizer()
        self.feat_extractor = feat_extractor
        bound = getattr(feat_extractor, "keywords", {})
        if "sampling_rate" not in bound:
            raise ValueError(f"feat_extractor must bind its sampling_rate, as functools.partial does; got {bound}")
        self.sample_rate: int = bound["sampling_rate"]
        self.campplus_session = OnnxSession(campplus_model, self.device)
        self.speech_tokenizer_session = OnnxSession(speech_tokenizer_model, self.device)
        self.spk2info: dict[str, ModelInput] = {}
        if spk2info and Path(spk2info).is_file():
            self.spk2info = read_speakers(spk2info, self.device)
        self.allowed_special = allowed_special
        self.text_frontend = "wetext" if _is_installed("wetext") else ""

    # ---- text

    @overload
    def text_normalize(self, text: str, split: Literal[True] = True, text_frontend: bool = True) -> list[str]: ...

    @overload
    def text_normalize(self, text: str, split: Literal[False], text_frontend: bool = True) -> str: ...

    def text_normalize(self, text: str, split: bool = True, text_frontend: bool = True) -> list[str] | str:
        """Write a text as it is spoken, and cut it into pieces the language model can say in one breath.

        Args:
            text: what to say; one that holds `<|...|>` marks is taken as it is.
            split: cut it into pieces.
            text_frontend: False takes the text as it is.

        Returns:
            The pieces that hold anything to say, or the whole text where `split` is False.
        """
        if text == "" or not text_frontend or ("<|" in text and "|>" in text):
            return [text] if split else text
        text = text.strip()
        if contains_chinese(text):
            text, language = self._normalize_chinese(text), "zh"
        else:
            text, language = self._normalize_other(text), "en"
        if not split:
            return text
        encode = partial(self.tokenizer.encode, allowed_special=self.allowed_special)
        return [piece for piece in split_paragraph(text, encode, language) if not is_only_punctuation(piece)]

    def _normalize_chinese(self, text: str) -> str:
        has_numbers = any(map(str.isdigit, text))
        if (self.text_frontend or has_numbers) and self._chinese_normalizer:
            text = self._chinese_normalizer.normalize(text)
        text = replace_corner_mark(replace_blank(text.replace("\n", "")))
        text = remove_bracket(replace_full_stop(text).replace(" - ", "，"))
        return re.sub("[，,、]+$", "。", text)

    def _normalize_other(self, text: str) -> str:
        if self.text_frontend:
            text = self._english_normalizer.normalize(text)
        has_numbers = any(map(str.isdigit, text))
        return spell_out_number(text, self._number_speller) if has_numbers and self._number_speller else text

    @cached_property
    def _chinese_normalizer(self) -> Any:
        if not self.text_frontend:
            logger.warning(
                "numbers and dates in Chinese text stay digits: `pip install wetext` reads them as published"
            )
            return None
        from wetext import Normalizer

        return Normalizer(remove_erhua=False)

    @cached_property
    def _english_normalizer(self) -> Any:
        from wetext import Normalizer

        return Normalizer()

    @cached_property
    def _number_speller(self) -> NumberSpeller | None:
        if not _is_installed("inflect"):
            logger.warning("numbers in English text stay digits: `pip install inflect` spells them as published")
            return None
        import inflect

        return cast(NumberSpeller, inflect.engine())

    def _extract_text_token(self, text: str) -> tuple[Tensor, Tensor]:
        """Tokenize a text: tokens [1, T] and their number [1], both int32."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str; got {type(text).__name__} (CosyVoice-300M takes no text stream)")
        return self._with_length(self.tokenizer.encode(text, allowed_special=self.allowed_special))

    # ---- recordings

    def _extract_speech_token(self, prompt_wav: str | Path | Tensor) -> tuple[Tensor, Tensor]:
        """Compute a recording's S3 tokens: [1, S] and their number [1], both int32."""
        waveform = self._waveform(prompt_wav, SPEECH_SAMPLE_RATE_HZ)
        seconds = waveform.shape[1] / SPEECH_SAMPLE_RATE_HZ
        if seconds > MAX_PROMPT_SECONDS:
            raise ValueError(
                f"{_name(prompt_wav)} has {seconds:.1f} s; S3 tokens are for {MAX_PROMPT_SECONDS} s at most"
            )
        mel = whisper_log_mel(waveform, n_mels=WHISPER_MEL_BINS).cpu().numpy()
        codes = self.speech_tokenizer_session.run(mel, np.array([mel.shape[2]], dtype=np.int32))
        return self._with_length(codes.flatten().tolist())

    def _extract_spk_embedding(self, prompt_wav: str | Path | Tensor) -> Tensor:
        """Compute a recording's speaker vector, [1, 192], float32."""
        fbank = speaker_fbank(self._waveform(prompt_wav, SPEECH_SAMPLE_RATE_HZ)[0])
        vector = self.campplus_session.run(fbank.unsqueeze(0).cpu().numpy())
        return torch.from_numpy(vector).reshape(1, -1).to(self.device)

    def _extract_speech_feat(self, prompt_wav: str | Path | Tensor) -> tuple[Tensor, Tensor]:
        """Compute a recording's mel at the model's own rate: [1, F, 80] float32, and its length [1] int32.

        A waveform given here is at the model's rate already, as it was in the scripts that call this with one.
        """
        waveform = prompt_wav if isinstance(prompt_wav, Tensor) else self._waveform(prompt_wav, self.sample_rate)
        mel = self.feat_extractor(waveform).transpose(1, 2).to(self.device)
        return mel, torch.tensor([mel.shape[1]], dtype=torch.int32, device=self.device)

    def _waveform(self, prompt_wav: str | Path | Tensor, sample_rate_hz: int) -> Tensor:
        """A prompt as [1, N] at the rate wanted, on the CPU."""
        if isinstance(prompt_wav, Tensor):
            import torchaudio

            waveform = prompt_wav.detach().to("cpu", torch.float32)
            if waveform.dim() != 2 or waveform.shape[0] != 1:
                raise ValueError(f"a prompt's waveform must be [1, N] at 16 kHz; got {list(prompt_wav.shape)}")
            waveform = torchaudio.functional.resample(waveform, SPEECH_SAMPLE_RATE_HZ, sample_rate_hz)
        else:
            waveform = load_wav(prompt_wav, sample_rate_hz)
        if waveform.shape[1] < MIN_PROMPT_SECONDS * sample_rate_hz:
            seconds = waveform.shape[1] / sample_rate_hz
            raise ValueError(f"{_name(prompt_wav)} has {seconds:.3f} s; a prompt needs {MIN_PROMPT_SECONDS} s at least")
        return waveform

    # ---- inputs of CosyVoiceModel.tts, one method a way of speaking

    def frontend_sft(self, tts_text: str, spk_id: str) -> ModelInput:
        """Input for a named speaker.

        Args:
            tts_text: what to say.
            spk_id: one of the named speakers.

        Returns:
            Keyword arguments for `CosyVoiceModel.tts`.

        Raises:
            ValueError: there is no such speaker, or it was made from a zero-shot prompt.
        """
        speaker = self._speaker(spk_id)
        if "embedding" not in speaker:
            raise ValueError(
                f"speaker {spk_id!r} was made from a prompt: use zero_shot_spk_id={spk_id!r} with zero-shot"
            )
        return {
            **self.text_input(tts_text),
            "llm_embedding": speaker["embedding"],
            "flow_embedding": speaker["embedding"],
        }

    def frontend_zero_shot(
        self,
        tts_text: str,
        prompt_text: str,
        prompt_wav: str | Path | Tensor,
        resample_rate: int,
        zero_shot_spk_id: str = "",
    ) -> ModelInput:
        """Input for the voice of a prompt, or of a speaker made from one.

        Args:
            tts_text: what to say.
            prompt_text: what the prompt says.
            prompt_wav: the prompt.
            resample_rate: the model's rate, Hz; must be the mel function's.
            zero_shot_spk_id: a speaker added before; the prompt is then not looked at.

        Returns:
            Keyword arguments for `CosyVoiceModel.tts`.

        Raises:
            ValueError: there is no such speaker, the rates differ, or the prompt is too short, too long or unreadable.
        """
        if zero_shot_spk_id:
            speaker = self._speaker(zero_shot_spk_id)
            if "flow_prompt_speech_token" not in speaker:
                raise ValueError(f"speaker {zero_shot_spk_id!r} has no prompt: use inference_sft with it")
            return {**speaker, **self.text_input(tts_text)}
        prompt_tokens, prompt_tokens_length = self._extract_text_token(prompt_text)
        flow_input = self._prompt_for_flow(prompt_wav, resample_rate)
        return {
            **flow_input,
            **self.text_input(tts_text),
            "prompt_text": prompt_tokens,
            "prompt_text_len": prompt_tokens_length,
            "llm_prompt_speech_token": flow_input["flow_prompt_speech_token"],
            "llm_prompt_speech_token_len": flow_input["flow_prompt_speech_token_len"],
            "llm_embedding": flow_input["flow_embedding"],
        }

    def frontend_cross_lingual(
        self, tts_text: str, prompt_wav: str | Path | Tensor, resample_rate: int, zero_shot_spk_id: str = ""
    ) -> ModelInput:
        """Input for a prompt's voice in another language: the language model does not see the prompt's content.

        Args:
            tts_text: what to say.
            prompt_wav: the prompt.
            resample_rate: the model's rate, Hz; must be the mel function's.
            zero_shot_spk_id: a speaker added before; the prompt is then not looked at.

        Returns:
            Keyword arguments for `CosyVoiceModel.tts`.
        """
        model_input = self.frontend_zero_shot(tts_text, "", prompt_wav, resample_rate, zero_shot_spk_id)
        hidden = ("prompt_text", "llm_prompt_speech_token")
        return {name: value for name, value in model_input.items() if not name.startswith(hidden)}

    def frontend_instruct(self, tts_text: str, spk_id: str, instruct_text: str) -> ModelInput:
        """Input for a named speaker who follows an instruction.

        The language model does not see the speaker's vector, which would leak a way of speaking past the instruction.

        Args:
            tts_text: what to say.
            spk_id: one of the named speakers.
            instruct_text: how to say it.

        Returns:
            Keyword arguments for `CosyVoiceModel.tts`.
        """
        model_input = self.frontend_sft(tts_text, spk_id)
        del model_input["llm_embedding"]
        model_input["prompt_text"], model_input["prompt_text_len"] = self._extract_text_token(instruct_text)
        return model_input

    def frontend_vc(
        self, source_speech_16k: str | Path | Tensor, prompt_wav: str | Path | Tensor, resample_rate: int
    ) -> ModelInput:
        """Input for saying a recording again in a prompt's voice; there is no language model.

        Args:
            source_speech_16k: what to say, as a recording.
            prompt_wav: the voice to say it with.
            resample_rate: the model's rate, Hz; must be the mel function's.

        Returns:
            Keyword arguments for `CosyVoiceModel.tts`.
        """
        tokens, tokens_length = self._extract_speech_token(source_speech_16k)
        return {
            **self._prompt_for_flow(prompt_wav, resample_rate),
            "source_speech_token": tokens,
            "source_speech_token_len": tokens_length,
        }

    def text_input(self, tts_text: str) -> ModelInput:
        """The part of a model's input that changes from sentence to sentence.

        Args:
            tts_text: one sentence.

        Returns:
            Its tokens [1, T] as `text`, and their number [1] as `text_len`.
        """
        tokens, length = self._extract_text_token(tts_text)
        return {"text": tokens, "text_len": length}

    def _prompt_for_flow(self, prompt_wav: str | Path | Tensor, resample_rate: int) -> ModelInput:
        if resample_rate != self.sample_rate:
            raise ValueError(f"the mel function works at {self.sample_rate} Hz; got resample_rate={resample_rate}")
        mel, mel_length = self._extract_speech_feat(self._waveform(prompt_wav, self.sample_rate))
        tokens, tokens_length = self._extract_speech_token(prompt_wav)
        return {
            "flow_prompt_speech_token": tokens,
            "flow_prompt_speech_token_len": tokens_length,
            "prompt_speech_feat": mel,
            "prompt_speech_feat_len": mel_length,
            "flow_embedding": self._extract_spk_embedding(prompt_wav),
        }

    def _speaker(self, spk_id: str) -> ModelInput:
        if spk_id not in self.spk2info:
            known = ", ".join(map(repr, self.spk2info)) or (
                f"none: this folder has no named speakers. Get a folder that has some with: {GET_NAMED_SPEAKERS}"
            )
            raise ValueError(f"there is no speaker {spk_id!r}; speakers: {known}")
        return self.spk2info[spk_id]

    def _with_length(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        length = torch.tensor([len(tokens)], dtype=torch.int32, device=self.device)
        return torch.tensor([tokens], dtype=torch.int32, device=self.device), length


def read_speakers(path: str | Path, device: torch.device) -> dict[str, ModelInput]:
    """Read a file of named speakers.

    Args:
        path: spk2info.pt.
        device: where the tensors shall live.

    Returns:
        {speaker: {name: tensor}}; a released speaker has `embedding` [1, 192].

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    speakers = read_torch_file(path)
    if not isinstance(speakers, dict) or not all(isinstance(speaker, dict) for speaker in speakers.values()):
        raise ValueError(f"{path} holds no speakers; wanted {{speaker: {{'embedding': tensor}}}}")
    return {
        speaker: {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        for speaker, values in speakers.items()
    }


def _is_installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name, which Python would take too, has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _name(prompt_wav: str | Path | Tensor) -> str:
    return "the prompt's waveform" if isinstance(prompt_wav, Tensor) else str(prompt_wav)
