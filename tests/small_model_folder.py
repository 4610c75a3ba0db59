"""Makes a folder in the released layout out of the reference weights, with ONNX models of two operators each."""

import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

SPEECH_CODES = 64  # of the reference weights
TEXT_TOKENS = 51_866  # of the real tokenizer, whose ids must all have a row
TEXT_WIDTH = 24
NAMED_SPEAKER = "alto"

FRONTEND_PART = """
allowed_special: 'all'
get_tokenizer: !name:whisper.tokenizer.get_tokenizer
    multilingual: True
    num_languages: 100
    language: 'en'
    task: 'transcribe'
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1024
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 256
    win_size: 1024
    fmin: 0
    fmax: 8000
    center: False
"""
SEEDING_PART = """
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:numpy.random.seed [1986]
__set_seed3: !apply:torch.manual_seed [1986]
__set_seed4: !apply:torch.cuda.manual_seed_all [1986]
"""


def write_small_model_folder(folder: Path, golden_dir: Path) -> Path:
    """Write the whole folder; the weights are the reference's, except for the rows of text it has no tokens for."""
    folder.mkdir(parents=True, exist_ok=True)
    config = (golden_dir / "small_cosyvoice.yaml").read_text()
    config = config.replace("text_token_size: 120", f"text_token_size: {TEXT_TOKENS}")
    (folder / "cosyvoice.yaml").write_text(SEEDING_PART + config + FRONTEND_PART)

    generator = torch.Generator().manual_seed(1)
    llm = torch.load(golden_dir / "small_llm.pt", weights_only=True)
    table = torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=generator)
    table[: len(llm["text_embedding.weight"])] = llm["text_embedding.weight"]
    torch.save(llm | {"text_embedding.weight": table}, folder / "llm.pt")
    for part in ("flow", "hift"):
        torch.save(torch.load(golden_dir / f"small_{part}.pt", weights_only=True), folder / f"{part}.pt")
    speaker = {"embedding": torch.randn(1, 192, generator=generator)}
    torch.save({NAMED_SPEAKER: speaker}, folder / "spk2info.pt")
    write_speaker_model(folder / "campplus.onnx")
    write_speech_tokenizer(folder / "speech_tokenizer_v1.onnx")
    return folder


def deflate(source: Path, target: Path) -> None:
    """Write a file of torch.save again with every record compressed."""
    with zipfile.ZipFile(source) as stored, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as deflated:
        for record in stored.infolist():
            deflated.writestr(record.filename, stored.read(record))


def write_speaker_model(path: Path) -> None:
    """[1, K, 80] filter bank -> [1, 192]: the spread over time through a random matrix."""
    matrix = np.random.default_rng(1).standard_normal((80, 192)).astype(np.float32)
    nodes = [
        helper.make_node("Abs", ["feats"], ["magnitude"]),
        helper.make_node("ReduceMean", ["magnitude"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "matrix"], ["embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, "K", 80])]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 192])]
    _save(nodes, inputs, outputs, {"matrix": matrix}, path)


def write_speech_tokenizer(path: Path) -> None:
    """[1, 128, W] Whisper mel at 100 Hz -> [1, W / 2] codes: pairs of frames averaged, best row of a random matrix."""
    matrix = np.random.default_rng(2).standard_normal((128, SPEECH_CODES)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["feats"], ["halved"], kernel_shape=[2], strides=[2]),
        helper.make_node("Transpose", ["halved"], ["frames"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["frames", "matrix"], ["scores"]),
        helper.make_node("ArgMax", ["scores"], ["best"], axis=2, keepdims=0),
        helper.make_node("Cast", ["best"], ["indices"], to=TensorProto.INT32),
        helper.make_node("Identity", ["feats_length"], ["length_out"]),
    ]
    inputs = [
        helper.make_tensor_value_info("feats", TensorProto.FLOAT, [1, 128, "W"]),
        helper.make_tensor_value_info("feats_length", TensorProto.INT32, [1]),
    ]
    outputs = [
        helper.make_tensor_value_info("indices", TensorProto.INT32, [1, "S"]),
        helper.make_tensor_value_info("length_out", TensorProto.INT32, [1]),
    ]
    _save(nodes, inputs, outputs, {"matrix": matrix}, path)


def _save(nodes: list, inputs: list, outputs: list, weights: dict[str, np.ndarray], path: Path) -> None:
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
