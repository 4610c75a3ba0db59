"""Give the tiny recipe's flow a start from which it learns in minutes: the mean mel, and how its units sound.

In: `<work-dir>/corpus/train`, the S3 tokenizer, the configuration. Out: `<work-dir>/flow_start/flow.pt`, from which
train.py goes on.

    python CosyVoice/examples/tiny/start_flow.py --work-dir CosyVoice/examples/tiny/work     (10 seconds)

A flow that starts at random first learns how loud speech is, which takes a CPU minutes: log mels are about -5, noise is
about 0. So its last layer begins with each band's mean. And its units begin with the tokenizer's codes, which lie close
where units sound alike, as the language model's do (start_llm.py). The rest stays as drawn. Exit codes: 0 done,
1 error, 2 unknown flag, 130/143 stopped; begin again then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import Spoken, read_split
from resumable import run_to_the_end
from start_llm import spread_codes

from cosyvoice.flow.flow import MaskedDiffWithXvec
from cosyvoice.utils.config import load_config
from cosyvoice.utils.settings import Settings, parse_settings
from cosyvoice.utils.tensor_file import save_tensors
from cosyvoice.utils.train_utils import load_model
from taste.audio import read_audio
from taste.s3_units import load_s3_tokenizer

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/; flow_start/ is made in it
CONFIG = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # sizes of the flow, and its mel
S3_TOKENIZER = None  # str: speech_tokenizer_v1.onnx; none: <work-dir>/s3_tokenizer/speech_tokenizer_v1.onnx
MEASURED = 100  # utterances, about, whose mels are averaged
SEED = 1986  # of what stays as drawn
THREADS = 1  # of the CPU


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Write the flow that its training begins with.

    Args:
        settings: WORK_DIR, CONFIG, S3_TOKENIZER, MEASURED and SEED.
        stop_requested: asked before anything is written.

    Returns:
        False where nothing was written, as it was asked to stop.

    Raises:
        FileNotFoundError: the tokenizer or the corpus is not there.
        ValueError: the corpus's tables do not fit together, or the tokenizer is none.
    """
    folder = settings.work_dir / "flow_start"
    print(f"settings of {folder}:\n{settings.describe()}\n")
    onnx_path = settings.s3_tokenizer or settings.work_dir / "s3_tokenizer" / "speech_tokenizer_v1.onnx"
    codes = load_s3_tokenizer(onnx_path).state_dict()["quantizer._codebook.embed"]
    items = read_split(settings.work_dir / "corpus", "train")
    mean = mean_mel(settings.config, items[:: max(1, len(items) // settings.measured)])
    torch.manual_seed(settings.seed)
    flow: MaskedDiffWithXvec = load_model(settings.config, "flow")
    begin(flow, codes, mean)
    if stop_requested():
        return False
    save_tensors(folder / "flow.pt", flow.state_dict())
    print(f"wrote {folder / 'flow.pt'}: mel bands begin at {mean.min():.2f} to {mean.max():.2f}")
    return True


def mean_mel(config: Path, items: Sequence[Spoken]) -> Tensor:
    """Average the mel frames of some utterances.

    Args:
        config: whose `feat_extractor` and `sample_rate` make the mel.
        items: at least one.

    Returns:
        [M], float32.
    """
    keys = load_config(config, ["feat_extractor", "sample_rate"])
    sums, frames = 0.0, 0
    for item in tqdm(items, desc="mels", unit="utt", mininterval=2):
        waveform = read_audio(item.audio_path, keys["sample_rate"]).waveform
        mel = keys["feat_extractor"](waveform[None])[0]  # [M, F]
        sums, frames = sums + mel.sum(dim=1), frames + mel.shape[1]
    return sums / frames


@torch.no_grad()
def begin(flow: MaskedDiffWithXvec, codes: Tensor, mean: Tensor) -> None:
    """Place the flow's units, and what it says before it has learned anything.

    Args:
        flow: `input_embedding` and the estimator's last bias are changed.
        codes: the tokenizer's codebook, [units, C].
        mean: of each mel band, [M].
    """
    flow.input_embedding.weight.copy_(spread_codes(codes, flow.input_size))
    flow.decoder.estimator.final_proj.bias.copy_(mean)


if __name__ == "__main__":
    sys.exit(main())
