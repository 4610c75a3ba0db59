"""Put what the tiny recipe trained into one folder in the released layout, and check that every part of it works.

In:   <work-dir>/{corpus/train,s3_tokenizer,speaker_encoder,whisper}, <work-dir>/exp/<model>/<model>.pt, and
      <work-dir>/taste.pt where train_taste.py has trained the parts that hear a recording
Out:  <output>/{cosyvoice.yaml,llm.pt,flow.pt,hift.pt,campplus.onnx,speech_tokenizer_v1.onnx,spk2info.pt,README.md},
      <output>/whisper/ and, where there is one, <output>/taste.pt

    python CosyVoice/examples/tiny/assemble.py --work-dir CosyVoice/examples/tiny/work --output CosyVoice-tiny
    python CosyVoice/examples/tiny/assemble.py --readme-only --output CosyVoice-tiny      (after an evaluation)

Half a minute. The folder is made beside its place and checked (setup_cosyvoice.py --deep-verify) before it replaces
what stands there. Weights are written in float16 and compressed: of the 51,866 text embeddings the corpus uses two
thousand, and the others are mere signs (see start_llm.py). Exit codes: 0 done, 1 error, 2 unknown flag, 130 stopped by
Ctrl-C.
"""

import io
import os
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from recipe_results import describe_results

import taste
from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import load_weights, read_torch_file
from cosyvoice.utils.settings import Settings, parse_settings
from taste.pretrained_parts import PARTS_FILE
from taste.recordings import read_table

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # the recipe's folder
CONFIG = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # the configuration of the training
OUTPUT = None  # str: the model's folder; none takes <work-dir>/CosyVoice-tiny
README_ONLY = False  # write the README.md of a folder that is there anew
MAX_TOTAL_MB = 30.0  # size of the folder
MAX_FILE_MB = 12.0  # size of each file
VERIFY = True  # load every part of the new folder, say a sentence and listen to a recording

_PARTS = {"llm": "llm", "flow": "flow", "hifigan": "hift"}  # what is trained, and the released name of what is kept
_WHISPER_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors")
_README = Path(__file__).with_name("trained_readme.md.in")
_MEGABYTE = 1_000_000


def build_folder(folder: Path, work_dir: Path, config: Path) -> None:
    """Write every file of the model but its README.

    Args:
        folder: an empty folder.
        work_dir: the recipe's folder.
        config: the configuration that the parts were trained with.

    Raises:
        FileNotFoundError: something was not made yet; the message lists all of it, with the stages.
        ValueError: weights do not fit the configuration, or are too large for float16.
    """
    sources = {
        "speech_tokenizer_v1.onnx": (1, work_dir / "s3_tokenizer" / "speech_tokenizer_v1.onnx"),
        "campplus.onnx": (2, work_dir / "speaker_encoder" / "campplus.onnx"),
        "spk2info.pt": (3, work_dir / "corpus" / "train" / "utt2embedding.pt"),
        **{f"{kept}.pt": (6, work_dir / "exp" / name / f"{name}.pt") for name, kept in _PARTS.items()},
        **{f"whisper/{name}": (7, work_dir / "whisper" / name) for name in _WHISPER_FILES},
    }
    missing = [f"  {path} (stage {stage})" for stage, path in sources.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError("not made yet; run these stages of run.sh:\n" + "\n".join(missing))

    (folder / "whisper").mkdir()
    shutil.copyfile(config, folder / "cosyvoice.yaml")
    for name, (_, path) in sources.items():
        if not name.endswith(".pt"):
            shutil.copyfile(path, folder / name)
    if (work_dir / PARTS_FILE).is_file():
        compress(work_dir / PARTS_FILE, folder / PARTS_FILE)
    for kept in _PARTS.values():
        write_half(folder / f"{kept}.pt", config, kept, sources[f"{kept}.pt"][1])
    write_speakers(folder / "spk2info.pt", work_dir / "corpus" / "train")


def write_half(path: Path, config: Path, part: str, weights: Path) -> None:
    """Write a part's weights in float16, as the configuration wants them.

    Args:
        path: the file to write.
        config: builds the part.
        part: "llm", "flow" or "hift".
        weights: what was trained; of a GAN the generator is taken.

    Raises:
        ValueError: they do not fit the configuration, or a value is not finite in float16.
    """
    module = load_config(config, [part])[part]
    load_weights(module, weights)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in module.state_dict().items()}
    unfit = [key for key, value in halves.items() if value.is_floating_point() and not value.isfinite().all()]
    if unfit:
        raise ValueError(f"{weights}: {len(unfit)} tensors are not finite in float16, {unfit[0]} first; train it again")
    save_compressed(halves, path)


def save_compressed(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as `torch.save` does, its records compressed; `torch.load` reads both alike.

    Args:
        state: weights by name.
        path: the file to write.
    """
    plain = io.BytesIO()
    torch.save(dict(state), plain)
    compress(plain, path)


def compress(source: Path | BinaryIO, path: Path) -> None:
    """Copy what `torch.save` wrote, its records compressed; equal contents give equal files.

    Args:
        source: what it wrote.
        path: the file to write.
    """
    with zipfile.ZipFile(source) as records, zipfile.ZipFile(path, "w") as out:
        for record in records.infolist():
            fixed = zipfile.ZipInfo(record.filename)  # its date always is the same
            out.writestr(fixed, records.read(record), zipfile.ZIP_DEFLATED, compresslevel=9)


def write_speakers(path: Path, split: Path) -> None:
    """Write the named speakers: first flite's voices, each the mean of all who have it, then everyone by name.

    Args:
        path: spk2info.pt: {name: {"embedding": [1, 192] float32}}.
        split: folder with utt2spk and utt2embedding.pt; a speaker's name is `<voice>-<number>`.

    Raises:
        ValueError: a speaker has no utterance with a vector.
    """
    embeddings: Mapping[str, Sequence[float]] = read_torch_file(split / "utt2embedding.pt")
    voices: dict[str, list[Tensor]] = {}
    speakers: dict[str, list[Tensor]] = {}
    for utt_id, speaker in read_table(split / "utt2spk").items():
        if utt_id in embeddings:
            vector = torch.as_tensor(embeddings[utt_id], dtype=torch.float32)
            voices.setdefault(speaker.rpartition("-")[0] or speaker, []).append(vector)
            speakers.setdefault(speaker, []).append(vector)
    if not speakers:
        raise ValueError(f"{split}/utt2embedding.pt has no utterance of {split}/utt2spk; run stage 3 of run.sh again")
    named = {**dict(sorted(speakers.items())), **voices}
    order = [*voices, *(name for name in sorted(speakers) if name not in voices)]
    torch.save({name: {"embedding": torch.stack(named[name]).mean(dim=0, keepdim=True)} for name in order}, path)


def check_sizes(folder: Path, max_total_mb: float, max_file_mb: float) -> float:
    """Make sure that the folder is small enough to be committed.

    Args:
        folder: the model.
        max_total_mb: of all files, 10^6 bytes.
        max_file_mb: of each.

    Returns:
        the size of all files, 10^6 bytes.

    Raises:
        ValueError: it is too large; the message lists the files.
    """
    sizes = {file: file.stat().st_size / _MEGABYTE for file in sorted(folder.rglob("*")) if file.is_file()}
    total = sum(sizes.values())
    if total > max_total_mb or max(sizes.values()) > max_file_mb:
        lines = [f"  {size:6.2f} MB  {file.relative_to(folder)}" for file, size in sizes.items()]
        raise ValueError(
            f"the model has {total:.1f} MB, expected at most {max_total_mb} MB in all and {max_file_mb} MB a file; "
            "make it smaller in conf/cosyvoice.yaml:\n" + "\n".join(lines)
        )
    return total


def verify(folder: Path) -> None:
    """Run every part of the folder once, in a process of its own.

    Raises:
        ValueError: a part does not work; the process has said which.
    """
    words = ["--model-dir", str(folder), "--verify-only", "--deep-verify", "--device", "cpu"]
    if subprocess.run([sys.executable, str(taste.REPOSITORY / "setup_cosyvoice.py"), *words], check=False).returncode:
        raise ValueError("the new folder does not work (see above); what stood in its place is untouched")


def write_readme(folder: Path, work_dir: Path, output_name: str) -> None:
    """Fill the template of the model's README with what the stages measured.

    Args:
        folder: the model.
        work_dir: the recipe's folder.
        output_name: how the folder is called in the commands shown.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "README.md")
    template = string.Template(_README.read_text(encoding="utf-8"))
    values = describe_results(work_dir) | {"output": output_name, "size": f"{size / _MEGABYTE:.1f} MB"}
    write_text(folder / "README.md", template.substitute(values))


def run(settings: Settings) -> None:
    """Build, check and place the folder, or write its README anew.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    work_dir = settings.work_dir
    output = Path(settings.output or work_dir / "CosyVoice-tiny").resolve()
    if settings.readme_only:
        if not output.is_dir():
            raise FileNotFoundError(f"there is no {output}; run stage 8 of run.sh first")
        write_readme(output, work_dir, output.name)
        print(f"{output / 'README.md'}: written")
        return
    unfinished = output.with_name(f".{output.name}.writing-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    for leftover in output.parent.glob(f".{output.name}.writing-*"):  # of a run that was killed
        shutil.rmtree(leftover)
    try:
        unfinished.mkdir(parents=True)
        build_folder(unfinished, work_dir, settings.config)
        write_readme(unfinished, work_dir, output.name)
        total = check_sizes(unfinished, settings.max_total_mb, settings.max_file_mb)
        if settings.verify:
            verify(unfinished)
        if output.exists():
            output.rename(replaced)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
    print(f"{output}: {total:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    try:
        run(settings)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what stood in the model's place is untouched", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
