"""Shards of training data: whole or not at all, kept while their input stays, and clear about what is missing."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.small_shards import make_folder, make_shards, parquet_tool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "train", utterances=5)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_shards_have_the_published_files_and_columns(folder: Path) -> None:
    data_list = make_shards(folder, 2)
    shards = lines(data_list)
    assert [Path(shard).name for shard in shards] == [f"parquet_{number:09d}.tar" for number in range(3)]
    table = pq.read_table(shards[0])
    assert table.column_names == [
        *("utt", "audio_data", "wav", "text", "spk", "utt_embedding", "spk_embedding", "speech_token")
    ]
    row = table.to_pylist()[1]
    assert (row["utt"], row["text"], row["spk"]) == ("utt01", "sound number 1", "voice1")
    assert row["audio_data"] == Path(row["wav"]).read_bytes()
    assert row["speech_token"] == torch.load(folder / "utt2speech_token.pt")["utt01"]
    assert row["spk_embedding"] == torch.load(folder / "spk2embedding.pt")["voice1"].tolist()
    for name, key in (("utt2data.list", "utt01"), ("spk2data.list", "voice1")):
        index = json.loads(Path(lines(data_list.with_name(name))[0]).read_text())
        assert index[key] == shards[0] and len(index) == 2


def test_tables_may_have_tabs_and_texts_any_separator_and_ids_any_form(folder: Path) -> None:
    for name in ("wav.scp", "utt2spk", "text"):
        path = folder / name
        path.write_text(path.read_text().replace("utt01 ", "utt01.wav\t").replace("number 1", "number\u20281"))
    shards = [pq.read_table(shard).to_pylist() for shard in lines(make_shards(folder, 5))]
    assert [(row["utt"], row["text"]) for row in shards[0]][1] == ("utt01.wav", "sound number\u20281")
    assert shards[0][1]["speech_token"] == torch.load(folder / "utt2speech_token.pt")["utt01"]


def test_a_rerun_writes_only_what_is_broken_missing_or_changed(folder: Path) -> None:
    shards = [Path(shard) for shard in lines(make_shards(folder, 1))]
    before = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(before[0][:-100])
    shards[1].unlink()
    flipped = bytearray(before[2])
    flipped[200] ^= 1
    shards[2].write_bytes(flipped)
    (folder / "text").write_text((folder / "text").read_text().replace("number 3", "number three"))
    times = [shard.stat().st_mtime_ns if shard.exists() else 0 for shard in shards]
    make_shards(folder, 1)
    written = [shard.stat().st_mtime_ns != time for shard, time in zip(shards, times, strict=True)]
    assert written == [True, True, True, True, False]
    assert [shard.read_bytes() for shard in shards[:3]] == before[:3]
    assert pq.read_table(shards[3])["text"].to_pylist() == ["sound number three"]


def test_several_at_once_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    one = make_shards(folder, 2)
    flags = ["--src_dir", str(folder), "--des_dir", str(tmp_path / "other"), "--num_utts_per_parquet", "2"]
    assert parquet_tool().main([*flags, "--num_processes", "2"]) == 0
    for mine, other in zip(lines(one), lines(tmp_path / "other" / "data.list"), strict=True):
        assert Path(mine).read_bytes() == Path(other).read_bytes()


@pytest.mark.parametrize(
    ("file", "key", "said"),
    [
        ("utt2speech_token.pt", "utt03", "no speech_token (utt03): run stage 2"),
        ("utt2embedding.pt", "utt03", "no utt_embedding (utt03): run stage 1"),
        ("spk2embedding.pt", "voice1", "no spk_embedding (utt01, utt03): run stage 1"),
    ],
)
def test_an_utterance_without_token_or_embedding_is_named_with_the_next_step(
    folder: Path, capsys: pytest.CaptureFixture[str], file: str, key: str, said: str
) -> None:
    values = torch.load(folder / file)
    del values[key]
    torch.save(values, folder / file)
    flags = ["--src_dir", str(folder), "--des_dir", str(folder / "parquet")]
    assert parquet_tool().main(flags) == 1
    assert said in capsys.readouterr().err
    assert not (folder / "parquet" / "data.list").exists()
    assert parquet_tool().main([*flags, "--skip_incomplete"]) == 0
    assert "left out: " in capsys.readouterr().out


def test_a_missing_stage_output_and_a_lost_recording_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--src_dir", str(folder), "--des_dir", str(folder / "parquet")]
    (folder / "utt00.wav").unlink()
    assert parquet_tool().main(flags) == 1
    assert "no wav (utt00)" in capsys.readouterr().err
    (folder / "utt2embedding.pt").unlink()
    assert parquet_tool().main(flags) == 1
    assert "utt2embedding.pt: there is no such file; stage 1" in capsys.readouterr().err
    assert parquet_tool().main([]) == 1
    assert "--src_dir is needed" in capsys.readouterr().err


def test_a_request_to_stop_ends_between_shards_and_a_rerun_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = parquet_tool()
    write = tool.write_shard

    def write_and_interrupt(shard: Any) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return write(shard)

    monkeypatch.setattr(tool, "write_shard", write_and_interrupt)
    flags = ["--src_dir", str(folder), "--des_dir", str(folder / "parquet"), "--num_utts_per_parquet", "1"]
    assert tool.main(flags) == 130
    assert not (folder / "parquet" / "data.list").exists()
    monkeypatch.setattr(tool, "write_shard", write)
    assert tool.main(flags) == 0
    assert "5 shards (1 of them kept)" in capsys.readouterr().out
