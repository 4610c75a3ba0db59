"""CosyVoice-300M as one object: a folder in, sound out."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.cli.frontend import CosyVoiceFrontEnd, ModelInput
from cosyvoice.cli.model import CosyVoiceModel, Speech
from cosyvoice.utils.config import ConfigError, load_config
from cosyvoice.utils.model_dir import (
    CONFIG_FILE,
    SPEAKER_MODEL_FILE,
    SPEAKERS_FILE,
    SPEECH_TOKENIZER_FILE,
    ModelDir,
    load_part,
)
from cosyvoice.utils.tensor_file import save_tensors

logger = logging.getLogger(__name__)

FRONTEND_KEYS = ("sample_rate", "get_tokenizer", "feat_extractor", "allowed_special")


class CosyVoice:
    """Text to speech, voice cloning and voice conversion with a model folder in the released layout.

    Every `inference_*` method is a generator of {"tts_speech": [1, N] float32 on the CPU} at `sample_rate`: one for
    each sentence, or with `stream=True` several for each, to be played one after the other. A text without words gives
    none, and a warning in the log.

    Args:
        model_dir: the folder. Nothing is downloaded: `setup_cosyvoice.py` does that.
        load_jit: use the folder's TorchScript archives for the encoders.
        load_trt: not supported; raises an error that says what it would need.
        fp16: run the language model in half precision (CUDA only; elsewhere it warns and stays in float32).
        trt_concurrent: of the published signature: TensorRT contexts, of which there are none without `load_trt`.
        device: where to run; None takes CUDA if there is one.

    Raises:
        FileNotFoundError: the folder or some of its files are missing (all are listed).
        ValueError: a file is damaged, refused, or does not fit the others.
        NotImplementedError: `load_trt` is set.

    Source: FunAudioLLM/CosyVoice cosyvoice/cli/cosyvoice.py @ ace7c47.
    """

    def __init__(
        self,
        model_dir: str | Path,
        load_jit: bool = False,
        load_trt: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        *,
        device: str | torch.device | None = None,
    ) -> None:
        folder = ModelDir(model_dir).check()
        self.model_dir = str(folder.path)
        config = load_config(folder.file(CONFIG_FILE), FRONTEND_KEYS)
        self.sample_rate: int = config["sample_rate"]
        self.frontend = CosyVoiceFrontEnd(
            config["get_tokenizer"],
            config["feat_extractor"],
            folder.file(SPEAKER_MODEL_FILE),
            folder.file(SPEECH_TOKENIZER_FILE),
            folder.file(SPEAKERS_FILE),
            config["allowed_special"],
            device=device,
        )
        if self.frontend.sample_rate != self.sample_rate:
            raise ConfigError(
                f"{folder.file(CONFIG_FILE)}: sample_rate is {self.sample_rate} Hz "
                f"but feat_extractor works at {self.frontend.sample_rate} Hz"
            )
        self.model = CosyVoiceModel(
            load_part(folder, "llm"), load_part(folder, "flow"), load_part(folder, "hift"), fp16, device=device
        )
        self.fp16 = self.model.fp16
        precision = "fp16" if self.fp16 else "fp32"
        if load_jit:
            self.model.load_jit(
                folder.file(f"llm.text_encoder.{precision}.zip"),
                folder.file(f"llm.llm.{precision}.zip"),
                folder.file("flow.encoder.fp32.zip"),
            )
        if load_trt:
            self.model.load_trt(folder.file("flow.decoder.estimator.fp32.onnx"))

    def list_available_spks(self) -> list[str]:
        """Names of the speakers that `inference_sft` and `inference_instruct` take, and of those added since."""
        return list(self.frontend.spk2info)

    def add_zero_shot_spk(self, prompt_text: str, prompt_wav: str | Path | Tensor, zero_shot_spk_id: str) -> bool:
        """Keep a prompt under a name, to be used as `zero_shot_spk_id` without the recording.

        Args:
            prompt_text: what the prompt says.
            prompt_wav: the prompt: a path, or a waveform [1, N] at 16 kHz.
            zero_shot_spk_id: the name; an old speaker of that name is replaced.

        Returns:
            True.

        Raises:
            ValueError: the name is empty, or the prompt cannot be used.
        """
        if not zero_shot_spk_id:
            raise ValueError("a speaker needs a name; got an empty zero_shot_spk_id")
        speaker = self.frontend.frontend_zero_shot("", prompt_text, prompt_wav, self.sample_rate)
        del speaker["text"], speaker["text_len"]
        self.frontend.spk2info[zero_shot_spk_id] = speaker
        return True

    def save_spkinfo(self) -> None:
        """Write all speakers to the folder's spk2info.pt, replacing it in one step."""
        speakers = {
            name: {key: value.cpu() for key, value in speaker.items()}
            for name, speaker in self.frontend.spk2info.items()
        }
        save_tensors(Path(self.model_dir) / SPEAKERS_FILE, speakers)

    def inference_sft(
        self, tts_text: str, spk_id: str, stream: bool = False, speed: float = 1.0, text_frontend: bool = True
    ) -> Iterator[Speech]:
        """Speak as one of the named speakers.

        Args:
            tts_text: what to say.
            spk_id: one of `list_available_spks()`.
            stream: yield chunks while the rest is being made.
            speed: 2.0 speaks twice as fast.
            text_frontend: normalise the text.

        Yields:
            Speech.

        Raises:
            ValueError: there is no such speaker.
        """
        make_input = partial(self.frontend.frontend_sft, "", spk_id)
        yield from self._speak(tts_text, make_input, stream, speed, text_frontend)

    def inference_zero_shot(
        self,
        tts_text: str,
        prompt_text: str,
        prompt_wav: str | Path | Tensor,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Speech]:
        """Speak with the voice of a short recording.

        Args:
            tts_text: what to say.
            prompt_text: what the prompt says.
            prompt_wav: the prompt, at most 30 s: a path, or a waveform [1, N] at 16 kHz.
            zero_shot_spk_id: a speaker added before; the two prompt arguments are then not looked at.
            stream: yield chunks while the rest is being made.
            speed: 2.0 speaks twice as fast.
            text_frontend: normalise both texts.

        Yields:
            Speech.

        Raises:
            ValueError: there is no such speaker, or the prompt cannot be used.
        """
        prompt_text = self.frontend.text_normalize(prompt_text, split=False, text_frontend=text_frontend)
        make_input = partial(
            self.frontend.frontend_zero_shot, "", prompt_text, prompt_wav, self.sample_rate, zero_shot_spk_id
        )
        yield from self._speak(tts_text, make_input, stream, speed, text_frontend, shortest=len(prompt_text) / 2)

    def inference_cross_lingual(
        self,
        tts_text: str,
        prompt_wav: str | Path | Tensor,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Speech]:
        """Speak another language than the prompt's with its voice.

        Args:
            tts_text: what to say.
            prompt_wav: the prompt, at most 30 s: a path, or a waveform [1, N] at 16 kHz.
            zero_shot_spk_id: a speaker added before; the prompt is then not looked at.
            stream: yield chunks while the rest is being made.
            speed: 2.0 speaks twice as fast.
            text_frontend: normalise the text.

        Yields:
            Speech.

        Raises:
            ValueError: there is no such speaker, or the prompt cannot be used.
        """
        make_input = partial(self.frontend.frontend_cross_lingual, "", prompt_wav, self.sample_rate, zero_shot_spk_id)
        yield from self._speak(tts_text, make_input, stream, speed, text_frontend)

    def inference_instruct(
        self,
        tts_text: str,
        spk_id: str,
        instruct_text: str,
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: bool = True,
    ) -> Iterator[Speech]:
        """Speak as one of the named speakers, in a described manner (CosyVoice-300M-Instruct).

        Args:
            tts_text: what to say.
            spk_id: one of `list_available_spks()`.
            instruct_text: the description, ending with `<|endofprompt|>` for the released model.
            stream: yield chunks while the rest is being made.
            speed: 2.0 speaks twice as fast.
            text_frontend: normalise both texts.

        Yields:
            Speech.

        Raises:
            ValueError: there is no such speaker.
        """
        instruct_text = self.frontend.text_normalize(instruct_text, split=False, text_frontend=text_frontend)
        make_input = partial(self.frontend.frontend_instruct, "", spk_id, instruct_text)
        yield from self._speak(tts_text, make_input, stream, speed, text_frontend)

    def inference_vc(
        self,
        source_wav: str | Path | Tensor,
        prompt_wav: str | Path | Tensor,
        stream: bool = False,
        speed: float = 1.0,
    ) -> Iterator[Speech]:
        """Say a recording again with the voice of another.

        Args:
            source_wav: what to say, at most 30 s: a path, or a waveform [1, N] at 16 kHz.
            prompt_wav: the voice to say it with, likewise.
            stream: yield chunks while the rest is being made.
            speed: 2.0 speaks twice as fast.

        Yields:
            Speech.

        Raises:
            ValueError: one of the recordings cannot be used.
        """
        yield from self._timed(self.frontend.frontend_vc(source_wav, prompt_wav, self.sample_rate), stream, speed)

    def _speak(
        self,
        tts_text: str,
        make_input: Callable[[], ModelInput],
        stream: bool,
        speed: float,
        text_frontend: bool,
        shortest: float = 0,
    ) -> Iterator[Speech]:
        """Speak a text sentence by sentence; the speaker's side of the input is made once for all of them."""
        sentences = [text for text in self.frontend.text_normalize(tts_text, True, text_frontend) if text.strip()]
        if not sentences:
            logger.warning("there is nothing to say in %r", tts_text)
            return
        model_input = make_input()
        for sentence in sentences:
            if len(sentence) < shortest:
                logger.warning("%r is under half as long as the prompt's text; it may come out badly", sentence)
            logger.info("speaking: %s", sentence)
            yield from self._timed({**model_input, **self.frontend.text_input(sentence)}, stream, speed)

    def _timed(self, model_input: ModelInput, stream: bool, speed: float) -> Iterator[Speech]:
        started = time.perf_counter()
        for speech in self.model.tts(**model_input, stream=stream, speed=speed):
            seconds = speech["tts_speech"].shape[1] / self.sample_rate
            logger.info("%.2f s of speech, real-time factor %.2f", seconds, (time.perf_counter() - started) / seconds)
            yield speech
            started = time.perf_counter()


def AutoModel(**kwargs: Any) -> CosyVoice:  # noqa: N802 - the published name
    """Open a model folder by the published code's general name; this project has CosyVoice-300M alone.

    Args:
        kwargs: the arguments of `CosyVoice`, by name.

    Returns:
        The model.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: as `CosyVoice` does; a folder of CosyVoice2 or 3 is named.
    """
    return CosyVoice(**kwargs)
