"""Gather recordings, texts, embeddings and speech tokens into Parquet shards, which training reads.

In:   --src_dir with wav.scp, text, utt2spk, utt2embedding.pt, spk2embedding.pt, utt2speech_token.pt
Out:  --des_dir with parquet_*.tar (Parquet, whatever the name says), utt2parquet_*.json, spk2parquet_*.json,
      and, written last, data.list, utt2data.list, spk2data.list: the paths of those, one a line

    python CosyVoice/tools/make_parquet_list.py --src_dir data/train --des_dir data/train/parquet --num_processes 2

The published command line and columns. A shard is written whole or not at all; run the same command again after any
stop, and shards that are whole and made from the same input are kept. Exit codes: 0 good, 1 error, 2 wrong usage,
130/143 stopped by Ctrl-C or SIGTERM.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cosyvoice.utils.abridge import abridge
from cosyvoice.utils.atomic import atomic_path, remove_leftovers, write_text
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.output_lock import OutputLock
from cosyvoice.utils.settings import Settings, run_script
from taste.utterance_ids import normalise_key

NUM_UTTS_PER_PARQUET = 1000  # utterances a shard
NUM_PROCESSES = 1  # shards written at once (threads: copying and packing bytes needs no Python)
SRC_DIR = None  # str: folder with wav.scp and what stages 1 and 2 added
DES_DIR = None  # str: folder for the shards
SKIP_INCOMPLETE = False  # leave utterances without text, speaker, embedding, tokens or recording out; else they stop us

_FORMAT = "1"  # part of the fingerprint: shards of another layout are written anew
_ROWS_A_GROUP = 64  # what a reader holds at a time
_NAMED_IN_MESSAGES = 5
_SCHEMA = pa.schema(
    [
        ("utt", pa.string()),
        ("audio_data", pa.binary()),
        ("wav", pa.string()),
        ("text", pa.string()),
        ("spk", pa.string()),
        ("utt_embedding", pa.list_(pa.float32())),
        ("spk_embedding", pa.list_(pa.float32())),
        ("speech_token", pa.list_(pa.int32())),
    ]
)
_NEXT_STEP = {  # what an utterance may lack -> what to do about it
    "text": "add it to text",
    "spk": "add it to utt2spk",
    "wav": "restore the recording, or take it out of wav.scp",
    "utt_embedding": "run stage 1, tools/extract_embedding.py; its .failures.jsonl says why one failed",
    "spk_embedding": "run stage 1, tools/extract_embedding.py; its .failures.jsonl says why one failed",
    "speech_token": "run stage 2, tools/extract_speech_token.py; its .failures.jsonl says why one failed",
    "instruct": "add it to instruct",
}


class Shard(NamedTuple):
    """The files of one shard, and what goes into it."""

    parquet: Path
    utterances: Path  # {utterance: parquet}
    speakers: Path  # {speaker: parquet}
    rows: list[dict[str, Any]]  # the columns without audio_data


def read_table(path: Path) -> dict[str, str]:
    """Read a file of `key value` lines.

    Args:
        path: one of wav.scp, text, utt2spk.

    Returns:
        {key: value}; a value may hold blanks, and is empty where there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key stands there twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; stage 0 writes it")
    table: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        key, value = [*line.split(maxsplit=1), "", ""][:2]
        if key in table:
            raise ValueError(f"{path}:{number}: {key} stands there twice")
        if key:
            table[key] = value.strip()
    return table


def read_vectors(path: Path, stage: str) -> dict[str, Any]:
    """Read a dictionary that an extraction stage has written.

    Args:
        path: a .pt file.
        stage: that writes it, for the message.

    Returns:
        {id: numbers}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no dictionary written by torch.save.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; {stage} writes it")
    try:
        vectors = torch.load(path, map_location="cpu", weights_only=True)  # it may be of a machine with a GPU
    except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}); delete it and run {stage} again") from error
    if not isinstance(vectors, dict):
        raise ValueError(f"{path}: holds a {type(vectors).__name__}, expected a dictionary; run {stage} again")
    return vectors


def read_rows(source: Path, skip_incomplete: bool) -> list[dict[str, Any]]:
    """Put together what is known of each utterance of wav.scp.

    Args:
        source: the folder.
        skip_incomplete: leave out what lacks something, and say how many.

    Returns:
        one dict an utterance, in the order of wav.scp: the columns of a shard but audio_data.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: an utterance lacks something (unless skipped), or none is left.
    """
    recordings = read_table(source / "wav.scp")
    speakers = read_table(source / "utt2spk")
    columns: dict[str, Mapping[str, Any]] = {
        "wav": {utt: path for utt, path in recordings.items() if path and Path(path).is_file()},
        "text": {utt: text for utt, text in read_table(source / "text").items() if text},
        "spk": speakers,
        "utt_embedding": read_vectors(source / "utt2embedding.pt", "stage 1 (tools/extract_embedding.py)"),
        "speech_token": read_vectors(source / "utt2speech_token.pt", "stage 2 (tools/extract_speech_token.py)"),
    }
    for name in ("utt_embedding", "speech_token"):  # whose keys the extraction tools normalise
        vectors = columns[name]
        columns[name] = {utt: vectors.get(utt, vectors.get(normalise_key(utt))) for utt in recordings}
    by_speaker = read_vectors(source / "spk2embedding.pt", "stage 1 (tools/extract_embedding.py)")
    columns["spk_embedding"] = {utt: by_speaker[spk] for utt, spk in speakers.items() if spk in by_speaker}
    if (source / "instruct").is_file():
        columns["instruct"] = read_table(source / "instruct")

    rows, lacking = [], {name: [] for name in columns}
    for utt in recordings:
        values = {name: values.get(utt) for name, values in columns.items()}
        absent = [name for name, value in values.items() if value is None or len(value) == 0]
        for name in absent:
            lacking[name].append(utt)
        if not absent:
            rows.append({"utt": utt, **{name: _plain(value) for name, value in values.items()}})
    problems = [
        f"{len(utts)} of {len(recordings)} utterances have no {name} ({abridge(utts, _NAMED_IN_MESSAGES)}): "
        f"{_NEXT_STEP[name]}"
        for name, utts in lacking.items()
        if utts
    ]
    if problems and not skip_incomplete:
        hint = "or add --skip_incomplete to leave them out"
        raise ValueError("\n  ".join([f"{source}: utterances are incomplete:", *problems, hint]))
    for problem in problems:
        print(f"left out: {problem}")
    if not rows:
        raise ValueError(f"{source}: no utterance is left; wav.scp names {len(recordings)}")
    return rows


def plan_shards(rows: Sequence[dict[str, Any]], folder: Path, utterances_a_shard: int) -> list[Shard]:
    """Deal the rows out to shards, in order.

    Args:
        rows: as `read_rows` gives them.
        folder: of the shards.
        utterances_a_shard: at most so many.

    Returns:
        the shards, named as published.
    """
    shards = []
    for number, start in enumerate(range(0, len(rows), utterances_a_shard)):
        names = (f"parquet_{number:09d}.tar", f"utt2parquet_{number:09d}.json", f"spk2parquet_{number:09d}.json")
        shards.append(Shard(*(folder / name for name in names), list(rows[start : start + utterances_a_shard])))
    return shards


def write_shard(shard: Shard) -> bool:
    """Write a shard and its two indexes, unless a good one is there.

    Args:
        shard: what to write.

    Returns:
        whether it was written.

    Raises:
        OSError: a recording cannot be read, or the disk is full.
    """
    fingerprint = _fingerprint(shard.rows)
    keep = is_good_shard(shard.parquet, fingerprint)
    if not keep:
        columns = {name: [row[name] for row in shard.rows] for name in shard.rows[0]}
        columns["audio_data"] = [Path(row["wav"]).read_bytes() for row in shard.rows]
        schema = _SCHEMA.append(pa.field("instruct", pa.string())) if "instruct" in columns else _SCHEMA
        schema = schema.with_metadata({"made_from": fingerprint})
        with atomic_path(shard.parquet) as temporary:
            pq.write_table(
                pa.table(columns, schema=schema), temporary, row_group_size=_ROWS_A_GROUP, write_page_checksum=True
            )
    for path, keys in ((shard.utterances, "utt"), (shard.speakers, "spk")):
        with atomic_path(path) as temporary:
            index = {row[keys]: str(shard.parquet) for row in shard.rows}
            temporary.write_text(json.dumps(index, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return not keep


def is_good_shard(path: Path, fingerprint: str) -> bool:
    """Tell whether a shard is there, made from this input, and every byte of it as it was written.

    Args:
        path: the shard.
        fingerprint: of what it should be made from.

    Returns:
        False where it has to be written.
    """
    if not path.is_file():
        return False
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if (file.schema_arrow.metadata or {}).get(b"made_from") != fingerprint.encode():
                return False
            for _ in file.iter_batches(batch_size=_ROWS_A_GROUP):
                pass
    except (pa.ArrowException, OSError):
        return False
    return True


def write_all(shards: Sequence[Shard], at_once: int, stop: StopRequest) -> int:
    """Write shards, several at once, until done or asked to stop.

    Args:
        shards: what to write.
        at_once: how many.
        stop: asked before each shard.

    Returns:
        how many were written; the others were good.

    Raises:
        OSError: see `write_shard`; the shards in work are finished first.
    """
    written = 0
    left = iter(shards)
    waiting: set[Future[bool]] = set()
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(shards), desc="shards", unit="shard", disable=None) as bar:
        while True:
            while len(waiting) < at_once and not stop.requested and (shard := next(left, None)):
                waiting.add(pool.submit(write_shard, shard))
            if not waiting:
                return written
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            written += sum(future.result() for future in done)
            bar.update(len(done))


def run(settings: Settings) -> int:
    """Do all of it and return the exit code.

    Raises:
        OSError, ValueError, OutputBusyError: the message is for the person at the keyboard.
    """
    for name in ("src_dir", "des_dir"):
        if getattr(settings, name) is None:
            raise ValueError(f"--{name} is needed: --src_dir data/train --des_dir data/train/parquet")
    for name in ("num_utts_per_parquet", "num_processes"):
        if getattr(settings, name) < 1:
            raise ValueError(f"--{name} is {getattr(settings, name)}; expected at least 1")
    folder = Path(settings.des_dir)
    with OutputLock(folder / "data.list"):
        shards = plan_shards(
            read_rows(Path(settings.src_dir), settings.skip_incomplete), folder, settings.num_utts_per_parquet
        )
        for path in (path for shard in shards for path in shard[:3]):
            remove_leftovers(path)
        with StopRequest() as stop:
            written = write_all(shards, settings.num_processes, stop)
            if stop.requested:
                print("stopped; run the same command again to go on")
                return stop.exit_code
        for name, place in (("utt2data.list", 1), ("spk2data.list", 2), ("data.list", 0)):
            write_text(folder / name, "".join(f"{shard[place]}\n" for shard in shards))
    utterances = sum(len(shard.rows) for shard in shards)
    kept = f" ({len(shards) - written} of them kept)" if written < len(shards) else ""
    print(f"{folder / 'data.list'}: {utterances} utterances in {len(shards)} shards{kept}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


def _plain(value: Any) -> Any:
    """Text as it is; tensors and lists of numbers as flat lists."""
    return value if isinstance(value, str) else torch.as_tensor(value).flatten().tolist()


def _fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """A digest of what a shard is made from; recordings count by path, size and time."""
    digest = hashlib.sha256(_FORMAT.encode())
    for row in rows:
        file = Path(row["wav"]).stat()
        digest.update(json.dumps([row, file.st_size, file.st_mtime_ns], sort_keys=True).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
