"""Say texts with the voices of a recipe's utterances, through language model, flow and vocoder.

In:   --prompt_data          data.list of Parquet shards, and --prompt_utt2data, utt2data.list beside it (stage 3)
      --tts_text             JSON, {utterance: [text, ...]}: whose voice says what
      --config and three .pt files, or --model_dir, a folder that has all four
Out:  <result_dir>/<utterance>_<number of its text>.wav
      <result_dir>/wav.scp, written last, when every text has been tried
      <result_dir>/made_with.json and texts.json: what a resumed run must agree with

sft speaks with the mean vector of the utterance's speaker; zero_shot goes on from the utterance itself.

    python CosyVoice/cosyvoice/bin/inference.py --mode zero_shot --gpu 0 --config conf/cosyvoice.yaml \
        --prompt_data data/test-clean/parquet/data.list --prompt_utt2data data/test-clean/parquet/utt2data.list \
        --tts_text tts_text.json --llm_model llm.pt --flow_model flow.pt --hifigan_model hift.pt --result_dir exp/said
    python CosyVoice/cosyvoice/bin/inference.py --model_dir exp/CosyVoice-tiny --result_dir exp/said \
        --prompt_data test/parquet/data.list --prompt_utt2data test/parquet/utt2data.list --tts_text tts_text.json

Run the same command again after any stop: finished wavs are kept, and the rest sounds as it would have, as each text
has its own random numbers. Exit codes: 0 all good, 1 error, 2 wrong usage, 3 finished but some texts could not be said,
130/143 stopped by Ctrl-C or SIGTERM.

Source: FunAudioLLM/CosyVoice cosyvoice/bin/inference.py, as it was before average_model.py and CosyVoice2 (the command
line, the inputs of both modes, the names of the files).
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.dataset import processor
from cosyvoice.dataset.dataset import Dataset, read_data_list
from cosyvoice.dataset.sample import REMAKE_SHARDS, Sample
from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.atomic import atomic_path, write_json
from cosyvoice.utils.config import ConfigError, load_config
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.interrupt import SOME_FAILED_EXIT_CODE, StopRequest
from cosyvoice.utils.model_dir import CONFIG_FILE, WEIGHT_FILES
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.provenance import check_made_with, file_digest
from cosyvoice.utils.settings import Settings, pick_device, run_script

CONFIG = None  # str: cosyvoice.yaml with data_pipeline; none: the one in --model_dir
PROMPT_DATA = None  # str: data.list of the utterances that lend their voices (required)
PROMPT_UTT2DATA = None  # str: utt2data.list beside it (required)
TTS_TEXT = None  # str: JSON, {utterance: [text, ...]} (required)
LLM_MODEL = None  # str: weights of the language model; none: llm.pt in --model_dir
FLOW_MODEL = None  # str: weights of the flow; none: flow.pt in --model_dir
HIFIGAN_MODEL = None  # str: weights of HiFT, or a checkpoint of its training; none: hift.pt in --model_dir
MODEL_DIR = None  # str: folder that stands for what is not named of the four above
RESULT_DIR = None  # str: where to write (required)
MODE = "sft"  # sft, zero_shot
GPU = -1  # number of the GPU, -1 for the CPU
DEVICE = None  # str: cpu, auto, cuda, cuda:1; goes before --gpu
SEED = 1986  # of what is drawn: tokens, and the noise of the flow and of the vocoder

_MODES = ("sft", "zero_shot")
_REQUIRED = ("prompt_data", "prompt_utt2data", "tts_text", "result_dir")
_CONFIG_KEYS = ("sample_rate", "llm", "flow", "hift", "data_pipeline", "get_tokenizer", "allowed_special")
_TRAINING_STEPS = (processor.truncate, processor.compute_f0, processor.shuffle, processor.sort, processor.batch)
_SHOWN = 5  # names that a message lists

Step = Callable[..., Iterator[Any]]


class Text(NamedTuple):
    """One thing to say."""

    key: str  # utterance and number, the name of its wav
    utt: str  # whose voice
    text: str


class ModelFiles(NamedTuple):
    """What the model is made of."""

    config: Path
    llm: Path
    flow: Path
    hift: Path


def read_texts(path: str | Path) -> list[Text]:
    """Read what is to be said.

    Args:
        path: JSON, {utterance: [text, ...]}.

    Returns:
        The texts, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such JSON, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; write it: {{utterance: [text, ...]}} as JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; expected {{utterance: [text, ...]}}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{path} holds {type(content).__name__} of {len(content or ())}; expected {{utterance: [text, ...]}}"
        )
    texts = []
    for utt, said in content.items():
        if not isinstance(said, list) or not all(isinstance(text, str) and text.strip() for text in said):
            raise ValueError(f"{path}: {utt!r} has {said!r}; expected a list of texts, none of them empty")
        if Path(utt).name != utt:
            raise ValueError(f"{path}: the utterance {utt!r} cannot name a file")
        texts += [Text(f"{utt}_{number}", utt, text) for number, text in enumerate(said)]
    if not texts:
        raise ValueError(f"{path}: no utterance has a text; expected at least one")
    return texts


def find_shards(utts: Iterable[str], data_list: str | Path, utt2data_list: str | Path) -> dict[str, str]:
    """Find the shards that hold some utterances.

    Args:
        utts: the utterances.
        data_list: one shard a line.
        utt2data_list: one JSON file a line, each {utterance: shard}.

    Returns:
        {utterance: its shard}.

    Raises:
        FileNotFoundError: a list, or a file that it names, is not there.
        ValueError: an utterance is in no shard of the list (all such are counted), or a file is damaged.
    """
    shards = read_data_list(data_list)
    shard_of: dict[str, str] = {}
    for path in read_data_list(utt2data_list):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: {utt2data_list} names it, and there is no such file; {REMAKE_SHARDS}")
        try:
            shard_of.update(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is no JSON of {{utterance: shard}} ({error}); {REMAKE_SHARDS}") from error
    absent = [utt for utt in dict.fromkeys(utts) if shard_of.get(utt) not in shards]
    if absent:
        raise ValueError(
            f"{len(absent)} utterances of --tts_text are in no shard of {data_list}: {abridge(absent, _SHOWN)}; "
            f"choose others ({len(shard_of)} are there, such as {next(iter(shard_of), 'none')}), or {REMAKE_SHARDS}"
        )
    return {utt: shard_of[utt] for utt in utts}


def read_prompts(data_list: str | Path, shards: Sequence[str], utts: set[str], pipeline: Sequence[Step]) -> Dataset:
    """Read utterances as the models' inputs, each a batch of its own.

    Args:
        data_list: names the shards.
        shards: those to read.
        utts: utterances wanted.
        pipeline: the configuration's data_pipeline; what only training needs is left out.

    Returns:
        The batches; those of utterances that the pipeline drops are missing, and counted in `dropped`.
    """
    opener, *steps = [step for step in pipeline if getattr(step, "func", step) not in _TRAINING_STEPS]
    last = steps.pop()
    steps = [opener, partial(_keep, utts=utts), *steps, _one_by_one, last]
    dataset = Dataset(data_list, steps, mode="inference", shuffle=False, partition=False)
    dataset.shards = list(shards)
    return dataset


def _keep(data: Iterable[Sample], utts: set[str]) -> Iterator[Sample]:
    return (sample for sample in data if sample["utt"] in utts)


def _one_by_one(data: Iterable[Sample]) -> Iterator[list[Sample]]:
    return ([sample] for sample in data)


class ModelInput(TypedDict, total=False):
    """Arguments of `CosyVoiceModel.tts`."""

    text: Tensor
    prompt_text: Tensor
    llm_prompt_speech_token: Tensor
    flow_prompt_speech_token: Tensor
    prompt_speech_feat: Tensor
    llm_embedding: Tensor
    flow_embedding: Tensor


def model_input(mode: str, tokens: Sequence[int], prompt: Mapping[str, Any]) -> ModelInput:
    """Choose what the model gets.

    Args:
        mode: sft or zero_shot.
        tokens: of the text to say.
        prompt: the batch of the utterance that lends its voice.

    Returns:
        The arguments.
    """
    text = torch.tensor([tokens], dtype=torch.int64)
    if mode == "sft":
        return {"text": text, "llm_embedding": prompt["spk_embedding"], "flow_embedding": prompt["spk_embedding"]}
    return {
        "text": text,
        "prompt_text": prompt["text_token"],
        "llm_prompt_speech_token": prompt["speech_token"],
        "flow_prompt_speech_token": prompt["speech_token"],
        "prompt_speech_feat": prompt["speech_feat"],
        "llm_embedding": prompt["utt_embedding"],
        "flow_embedding": prompt["utt_embedding"],
    }


def keep_finished(texts: Sequence[Text], prompts: Mapping[str, str], result_dir: Path) -> list[Text]:
    """Find what is still to be said; a wav of another text or prompt under the same name is removed.

    Args:
        texts: all of them.
        prompts: what the shard of each utterance holds, in short.
        result_dir: where the wavs are; texts.json there is brought up to date.

    Returns:
        Those without a wav.
    """
    record = result_dir / "texts.json"
    said = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for text in texts:
        now = {"text": text.text, "prompt": prompts[text.utt]}
        if said.get(text.key) != now:
            (result_dir / f"{text.key}.wav").unlink(missing_ok=True)
            said[text.key] = now
    write_json(record, said)
    return [text for text in texts if not (result_dir / f"{text.key}.wav").is_file()]


def run(settings: Settings) -> int:
    """Say everything and return the exit code.

    Raises:
        OSError, ValueError, OutputBusyError: the message is for the person at the keyboard.
    """
    files = _model_files(settings)
    device = _device(settings)
    texts = read_texts(settings.tts_text)
    shards = find_shards([text.utt for text in texts], settings.prompt_data, settings.prompt_utt2data)
    result_dir = Path(settings.result_dir)
    with OutputLock(result_dir / "wav.scp"):
        made_with = {"mode": settings.mode, "seed": settings.seed}
        made_with |= {name: file_digest(path) for name, path in files._asdict().items()}
        wavs = [result_dir] if any(result_dir.glob("*.wav")) else []
        check_made_with(result_dir / "made_with.json", made_with, wavs)
        digests = {shard: file_digest(shard) for shard in dict.fromkeys(shards.values())}
        todo = keep_finished(texts, {utt: digests[shard] for utt, shard in shards.items()}, result_dir)
        if todo:
            (result_dir / "wav.scp").unlink(missing_ok=True)
            print(f"{result_dir}: {len(texts) - len(todo)} of {len(texts)} texts are said already; {settings.mode}")
            stop, failures = _say(todo, files, shards, device, settings)
            if stop.requested:
                print(f"stopped; the same command goes on in {result_dir}", file=sys.stderr)
                return stop.exit_code
        else:
            failures = {}
        said = [text for text in texts if text.key not in failures]
        with atomic_path(result_dir / "wav.scp") as temporary:
            lines = [f"{text.key} {result_dir / text.key}.wav\n" for text in said]
            temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{result_dir / 'wav.scp'}: {len(said)} wavs")
    for key, reason in failures.items():
        print(f"not said: {key}: {reason}", file=sys.stderr)
    return SOME_FAILED_EXIT_CODE if failures else 0


def _say(
    texts: Sequence[Text], files: ModelFiles, shards: Mapping[str, str], device: torch.device, settings: Settings
) -> tuple[StopRequest, dict[str, str]]:
    """Say texts, utterance by utterance; returns whether to stop, and why which texts could not be said."""
    try:
        config = load_config(files.config, _CONFIG_KEYS)
    except ConfigError as error:
        raise ConfigError(f"{error}. --config wants a recipe's file, which has the data_pipeline too") from error
    model = CosyVoiceModel(config["llm"], config["flow"], config["hift"], device=device)
    model.load(files.llm, files.flow, files.hift)
    tokenizer = config["get_tokenizer"]()

    of_utt: dict[str, list[Text]] = {}
    for text in texts:
        of_utt.setdefault(text.utt, []).append(text)
    holding = dict.fromkeys(shards[utt] for utt in of_utt)
    prompts = read_prompts(settings.prompt_data, list(holding), set(of_utt), config["data_pipeline"])
    failures: dict[str, str] = {}
    with StopRequest() as stop, tqdm(total=len(texts), unit="text", disable=None) as progress:
        for prompt in prompts:
            for text in of_utt.pop(prompt["utts"][0]):
                if stop.requested:
                    return stop, failures
                tokens = tokenizer.encode(text.text, allowed_special=config["allowed_special"])
                torch.manual_seed(int(hashlib.sha256(f"{settings.seed}/{text.key}".encode()).hexdigest()[:15], 16))
                try:
                    (speech,) = model.tts(**model_input(settings.mode, tokens, prompt))
                    path = Path(settings.result_dir) / f"{text.key}.wav"
                    write_wav(path, speech["tts_speech"], config["sample_rate"])
                except ValueError as error:
                    failures[text.key] = str(error)
                progress.update()
    for text in (text for unread in of_utt.values() for text in unread):
        reasons = ", ".join(prompts.dropped) or "its shard holds no such utterance"
        failures[text.key] = f"the data pipeline gave no {text.utt} ({reasons})"
    return stop, failures


def _model_files(settings: Settings) -> ModelFiles:
    """The four files, explicit ones first; every problem with the settings is said at once."""
    folder = Path(settings.model_dir) if settings.model_dir else None
    flags = {"config": CONFIG_FILE, "llm_model": WEIGHT_FILES["llm"], "flow_model": WEIGHT_FILES["flow"]}
    flags["hifigan_model"] = WEIGHT_FILES["hift"]
    paths = {flag: getattr(settings, flag) or (folder / name if folder else None) for flag, name in flags.items()}
    problems = [f"--{name} is missing" for name in _REQUIRED if getattr(settings, name) is None]
    problems += [f"--{flag} is missing (or give --model_dir)" for flag, path in paths.items() if path is None]
    problems += [f"there is no {path} (--{flag})" for flag, path in paths.items() if path and not Path(path).is_file()]
    if settings.mode not in _MODES:
        problems.append(f"MODE is {settings.mode!r}, expected {' or '.join(_MODES)}")
    if problems:
        raise ValueError("; ".join(problems))
    return ModelFiles(*(Path(path) for path in paths.values() if path is not None))


def _device(settings: Settings) -> torch.device:
    if settings.device is not None:
        return pick_device(settings.device)
    if settings.gpu >= 0 and not torch.cuda.is_available():
        print(f"PyTorch sees no GPU here: --gpu {settings.gpu} runs on the CPU", file=sys.stderr)
        return torch.device("cpu")
    return pick_device("cpu" if settings.gpu < 0 else f"cuda:{settings.gpu}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
