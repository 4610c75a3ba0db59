"""Laws of bin/export_jit.py and bin/export_onnx.py: what is exported computes what the model computes."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cosyvoice.bin import export_jit, export_onnx
from cosyvoice.cli.cosyvoice import CosyVoice
from cosyvoice.transformer.encoder import BaseEncoder
from cosyvoice.utils.export import ExportError, Pair, check_agreement
from cosyvoice.utils.model_dir import load_part

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "CosyVoice-tiny"
ARCHIVES = ("llm.text_encoder", "llm.llm", "flow.encoder")


def run_script(name, *flags):
    command = [sys.executable, REPOSITORY / f"CosyVoice/cosyvoice/bin/{name}.py", "--model_dir", TINY, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The six archives beside links to the files of CosyVoice-tiny."""
    folder = tmp_path_factory.mktemp("jit")
    output = run_script("export_jit", "--output_dir", folder)
    assert output.count("largest difference") == 6
    for path in TINY.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def encoders_of(model):
    return {"llm.text_encoder": model.llm.text_encoder, "llm.llm": model.llm.llm, "flow.encoder": model.flow.encoder}


def test_archives_have_the_published_names(archives):
    found = {path.name for path in archives.glob("*.zip")}
    assert found == {f"{name}.{precision}.zip" for name in ARCHIVES for precision in ("fp32", "fp16")}


def test_model_with_archives_says_what_the_model_without_says(archives):
    speeches = []
    for load_jit in (False, True):
        model = CosyVoice(archives, load_jit=load_jit, device="cpu")
        assert all(isinstance(part, BaseEncoder) != load_jit for part in encoders_of(model.model).values())
        torch.manual_seed(0)
        (result,) = model.inference_sft("Oh.", model.list_available_spks()[0])
        speeches.append(result["tts_speech"])
    torch.testing.assert_close(*speeches, rtol=0, atol=1e-4)


def test_archives_run_wherever_their_input_is(archives):
    for path in archives.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            code = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")]
        assert code and not any('device("' in text for text in code), f"{path.name} names a device"


def test_half_precision_archive_takes_and_keeps_half_precision(archives):
    script = torch.jit.load(str(archives / "llm.llm.fp16.zip"))
    empty = torch.zeros(0, 0, 0, 0)
    xs = torch.randn(1, 3, load_part(TINY, "llm").llm.embed.out[0].in_features)
    hidden, cache, _ = script.forward_chunk(xs, 0, -1, empty, empty, torch.zeros(0, 0, 0, dtype=torch.bool))
    assert hidden.dtype == cache.dtype == torch.float16 and cache.shape[2] == 3
    step, cache, _ = script.forward_chunk(xs[:, :1], 3, 2, cache, empty, torch.ones(1, 1, 1, dtype=torch.bool))
    assert step.isfinite().all() and cache.shape[2] == 2  # the last two frames were asked for
    with pytest.raises(torch.jit.Error, match="offset does not match"):
        script.forward_chunk(xs, 7, -1, cache, empty, torch.zeros(0, 0, 0, dtype=torch.bool))


def test_onnx_files_agree_and_have_the_published_names_and_axes(tmp_path):
    import onnx

    output = run_script("export_onnx", "--output_dir", tmp_path)
    assert all(float(value) < 1e-4 for value in re.findall(r"largest difference (\S+)", output))
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.fp32.onnx" for name in export_onnx.PARTS}
    graph = onnx.load(tmp_path / "flow.decoder.estimator.fp32.onnx").graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output]
    }
    bands = [2, 80, "seq_len"]
    assert axes.pop("estimator_out")[2] == "seq_len"
    assert axes == {"x": bands, "mask": [2, 1, "seq_len"], "mu": bands, "t": [2], "spks": [2, 80], "cond": bands}


def test_export_that_differs_is_an_error_and_is_not_written(tmp_path, monkeypatch, capsys):
    compile_encoder = export_jit.compile_encoder

    def compile_another(encoder, dtype):
        script = compile_encoder(encoder, dtype)
        with torch.no_grad():
            encoder.after_norm.bias += 0.1
        return script

    monkeypatch.setattr(export_jit, "compile_encoder", compile_another)
    flags = ["--model_dir", str(TINY), "--output_dir", str(tmp_path)]
    assert export_jit.main([*flags, "--parts", "flow.encoder", "--precisions", "fp32"]) == 1
    assert "flow.encoder.fp32.zip differs from the model" in capsys.readouterr().err

    write_onnx = export_onnx.write_onnx

    def write_another(graph, path):
        write_onnx(graph, path)
        with torch.no_grad():
            graph.module.final_proj.bias += 0.1

    monkeypatch.setattr(export_onnx, "write_onnx", write_another)
    assert export_onnx.main([*flags, "--parts", "flow.decoder.estimator"]) == 1
    assert "flow.decoder.estimator.fp32.onnx differs from the model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("got", [torch.ones(2) + 3e-4, torch.tensor([1.0, torch.nan]), torch.ones(3)])
def test_differences_above_the_tolerance_nan_and_other_shapes_are_refused(got):
    with pytest.raises(ExportError, match=r"x\.zip"):
        check_agreement("x.zip", [Pair(torch.ones(2), got)], torch.float32)
    assert check_agreement("x.zip", [Pair(torch.ones(2), torch.ones(2) + 1e-5)], torch.float32) < 2e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model_dir is missing"),
        (["--model_dir", str(TINY), "--parts", "llm.lm"], "no part llm.lm; expected some of llm.text_encoder, llm.llm"),
        (["--model_dir", "/nowhere"], "model folder /nowhere does not exist"),
    ],
)
def test_wrong_settings_are_named(capsys, flags, message):
    for script in (export_jit, export_onnx):
        assert script.main(flags) == 1
        assert message in capsys.readouterr().err
    assert not list(TINY.glob("*.zip")) and not list(TINY.glob("llm*.onnx"))


def test_unknown_precision_is_named(capsys):
    assert export_jit.main(["--model_dir", str(TINY), "--precisions", "int8"]) == 1
    assert "int8; expected some of fp32, fp16" in capsys.readouterr().err
