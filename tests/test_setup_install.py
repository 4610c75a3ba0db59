"""Filling a model folder from two hubs on loopback: complete or unchanged, verified, and never a good file lost."""

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import modelscope_hub
import pytest
from hub_server import Fault, HubServer, sha256
from published_model import COSYVOICE_REPOSITORIES, WHISPER_REPOSITORIES, published, write_folder

import setup_cosyvoice
from cosyvoice.utils.output_lock import OutputBusyError, OutputLock
from cosyvoice.utils.settings import parse_settings
from taste.folder_swap import SwapError
from taste.hub import HuggingFaceHub, ModelScopeHub
from taste.model_install import AnotherModelError, DiskSpaceError, Installer, InstallError
from taste.verify import MANIFEST_NAME, read_records

NEEDED = {
    "cosyvoice.yaml",
    "llm.pt",
    "flow.pt",
    "hift.pt",
    "campplus.onnx",
    "speech_tokenizer_v1.onnx",
    "README.md",
    "whisper/config.json",
    "whisper/preprocessor_config.json",
    "whisper/model.safetensors",
}
WRITING = {  # with which Whisper can write
    "whisper/added_tokens.json",
    "whisper/generation_config.json",
    "whisper/merges.txt",
    "whisper/normalizer.json",
    "whisper/special_tokens_map.json",
    "whisper/tokenizer.json",
    "whisper/tokenizer_config.json",
    "whisper/vocab.json",
}
NEEDED |= WRITING
CLOSED_ADDRESS = "http://127.0.0.1:9"


class World:
    """Two hubs and a place for a model folder."""

    def __init__(self, modelscope: HubServer, hugging_face: HubServer, folder: Path) -> None:
        self.modelscope = modelscope
        self.hugging_face = hugging_face
        self.folder = folder
        self.addresses = {"ModelScope": modelscope.address, "Hugging Face": hugging_face.address}
        self.said: list[str] = []

    def installer(self, *flags: str) -> Installer:
        """As the script makes it, but for the hubs' addresses."""
        settings = parse_settings(setup_cosyvoice.__file__, vars(setup_cosyvoice), flags)
        hubs = {
            "ModelScope": ModelScopeHub(self.addresses["ModelScope"]),
            "Hugging Face": HuggingFaceHub(self.addresses["Hugging Face"]),
        }
        source = setup_cosyvoice._SOURCES[settings.source]
        parts = setup_cosyvoice.model_parts(settings)
        return Installer(self.folder, parts, hubs, source, settings.all_files, say=self.said.append)

    def cut_the_network(self) -> None:
        self.addresses = dict.fromkeys(self.addresses, CLOSED_ADDRESS)

    @property
    def fetched(self) -> list[str]:
        return self.modelscope.fetched + self.hugging_face.fetched


@pytest.fixture
def world(tmp_path, monkeypatch) -> Iterator[World]:
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "home"))
    modelscope_hub.set_default_config(None)
    with ExitStack() as stack:
        modelscope = stack.enter_context(HubServer(published("ModelScope")))
        hugging_face = stack.enter_context(HubServer(published("Hugging Face")))
        yield World(modelscope, hugging_face, tmp_path / "models" / "CosyVoice-300M")


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def content_of(world: World, name: str) -> bytes:
    """What the hubs publish under a name of the model folder."""
    repositories = published("ModelScope")
    part = WHISPER_REPOSITORIES if name.startswith("whisper/") else COSYVOICE_REPOSITORIES
    return repositories[part["ModelScope"]][name.removeprefix("whisper/")]


def place_all(world: World, seed: int = 0) -> None:
    repositories = published("ModelScope", seed)
    write_folder(world.folder, repositories[COSYVOICE_REPOSITORIES["ModelScope"]])
    write_folder(world.folder / "whisper", repositories[WHISPER_REPOSITORIES["ModelScope"]])


def test_a_new_folder_gets_every_needed_file_and_no_other(world):
    world.installer().install()

    assert files_under(world.folder) == NEEDED | {MANIFEST_NAME}
    assert [path.name for path in world.folder.iterdir() if path.is_dir()] == ["whisper"]
    assert [path.name for path in world.folder.parent.iterdir()] == ["CosyVoice-300M"]
    for name in NEEDED:
        assert (world.folder / name).read_bytes() == content_of(world, name), name


def test_each_model_comes_from_its_own_hub_unless_another_is_preferred(world):
    world.installer().install()
    records = read_records(world.folder)
    assert (records["CosyVoice"].hub, records["Whisper"].hub) == ("ModelScope", "Hugging Face")

    for source, hub in (("modelscope", "ModelScope"), ("huggingface", "Hugging Face")):
        shutil.rmtree(world.folder)
        world.installer("--source", source).install()
        assert {record.hub for record in read_records(world.folder).values()} == {hub}


def test_the_manifest_holds_the_true_sha256_of_every_file(world):
    world.installer().install()

    recorded = {path: file for record in read_records(world.folder).values() for path, file in record.files.items()}
    assert set(recorded) == NEEDED
    for name, file in recorded.items():
        assert (file.size_bytes, file.sha256) == (len(content_of(world, name)), sha256(content_of(world, name)))


def test_a_second_run_asks_no_hub(world):
    world.installer().install()
    asked = len(world.modelscope.requests) + len(world.hugging_face.requests)
    world.cut_the_network()

    world.installer().install()
    assert len(world.modelscope.requests) + len(world.hugging_face.requests) == asked
    assert any("no hub is asked" in line for line in world.said)


def test_all_files_takes_the_torchscript_archives_as_they_are(world):
    world.installer().install()
    world.installer("--all-files").install()

    assert (world.folder / "llm.llm.fp16.zip").read_bytes() == content_of(world, "llm.llm.fp16.zip")
    assert not (world.folder / "llm").exists()  # what the zip holds
    assert (world.folder / "asset/dingding.png").is_file()
    assert (world.folder / "whisper/pytorch_model.bin").is_file()
    assert world.fetched.count("llm.pt") == 1


def test_whisper_is_complete_where_neither_hub_has_a_tokenizer(world):
    for server in (world.modelscope, world.hugging_face):
        for repository in set(WHISPER_REPOSITORIES.values()) & set(server.repositories):
            for name in WRITING:
                del server.repositories[repository][name.removeprefix("whisper/")]

    world.installer().install()
    assert files_under(world.folder) == NEEDED - WRITING | {MANIFEST_NAME}
    world.cut_the_network()
    world.installer().install()  # and no hub is asked for it again


def test_a_folder_filled_before_the_tokenizer_was_wanted_gets_it_and_nothing_else(world):
    world.installer().install()
    manifest = json.loads((world.folder / MANIFEST_NAME).read_text())
    for name in WRITING:
        (world.folder / name).unlink()
        del manifest["parts"]["Whisper"]["files"][name]
    del manifest["parts"]["Whisper"]["optional"]
    (world.folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    before = list(world.fetched)

    world.installer().install()
    assert sorted(world.fetched[len(before) :]) == sorted(name.removeprefix("whisper/") for name in WRITING)
    assert WRITING < set(read_records(world.folder)["Whisper"].files)


def test_a_damaged_tokenizer_is_found_without_a_network(world):
    place_all(world)
    write_folder(world.folder, {"whisper/tokenizer.json": b'{"version": '})
    world.cut_the_network()

    with pytest.raises(InstallError, match=r"whisper/tokenizer\.json: not a whole JSON file"):
        world.installer().install()


def test_whisper_can_be_left_out(world):
    world.installer("--no-whisper").install()

    assert not (world.folder / "whisper").exists()


@pytest.mark.parametrize("away, other", [("ModelScope", "Hugging Face"), ("Hugging Face", "ModelScope")])
def test_the_other_hub_steps_in_for_one_that_does_not_answer(world, away, other):
    world.addresses[away] = CLOSED_ADDRESS

    world.installer().install()
    assert {record.hub for record in read_records(world.folder).values()} == {other}
    assert files_under(world.folder) == NEEDED | {MANIFEST_NAME}


@pytest.mark.parametrize(
    "fault",
    [Fault(status=404), Fault(status=401), Fault(truncate_to_bytes=19_000)],
    ids=["missing", "closed", "truncated"],
)
def test_the_other_hub_steps_in_for_one_file_and_the_good_ones_are_kept(world, fault):
    world.modelscope.faults["flow.pt"] = fault

    world.installer("--no-whisper").install()
    assert read_records(world.folder)["CosyVoice"].hub == "Hugging Face"
    assert (world.folder / "flow.pt").read_bytes() == content_of(world, "flow.pt")
    assert world.fetched.count("llm.pt") == 1


def test_a_hub_that_lists_no_llm_is_passed_over_before_anything_is_fetched(world):
    del world.modelscope.repositories[COSYVOICE_REPOSITORIES["ModelScope"]]["llm.pt"]

    world.installer("--no-whisper").install()
    assert world.modelscope.fetched == []
    assert any("iic/CosyVoice-300M on ModelScope has no llm.pt" in line for line in world.said)


@pytest.mark.parametrize("name", ["flow.pt", "cosyvoice.yaml"], ids=["sha256", "git sha1"])
def test_a_file_with_a_wrong_hash_never_gets_its_name(world, name):
    world.addresses["ModelScope"] = CLOSED_ADDRESS
    world.hugging_face.faults[name] = Fault(corrupt=True)

    with pytest.raises(InstallError, match=rf"missing .*{name}") as caught:
        world.installer("--no-whisper").install()
    assert "sent a wrong " + name in str(caught.value)
    assert not (world.folder / name).exists()
    assert not list(world.folder.rglob(f"{name}*"))
    assert world.hugging_face.fetched.count(name) == 2  # one more chance, not more


def test_modelscope_s_client_too_is_held_to_the_hash(world):
    world.addresses["Hugging Face"] = CLOSED_ADDRESS
    world.modelscope.faults["hift.pt"] = Fault(corrupt=True)

    with pytest.raises(InstallError, match=r"ModelScope sent a wrong hift\.pt"):
        world.installer("--no-whisper").install()
    assert not (world.folder / "hift.pt").exists()


def test_a_failed_run_keeps_what_arrived_and_the_next_one_fetches_the_rest(world):
    world.addresses["ModelScope"] = CLOSED_ADDRESS
    world.hugging_face.faults["hift.pt"] = Fault(status=404)
    with pytest.raises(InstallError):
        world.installer("--no-whisper").install()
    assert read_records(world.folder) == {}

    world.hugging_face.faults.clear()
    world.installer("--no-whisper").install()
    assert world.fetched.count("llm.pt") == 1
    assert (world.folder / "hift.pt").read_bytes() == content_of(world, "hift.pt")


def test_without_a_network_every_missing_file_and_every_hub_is_told_once(world):
    world.cut_the_network()

    with pytest.raises(InstallError) as caught:
        world.installer().install()
    message = str(caught.value)
    for name in ("cosyvoice.yaml", "llm.pt", "speech_tokenizer_v1.onnx", "whisper/model.safetensors"):
        assert message.count(name) == 1, message
    assert message.count("ModelScope cannot be reached") == 2  # for either repository
    assert message.count("Hugging Face cannot be reached") == 2
    assert not world.folder.exists()


def test_an_existing_folder_is_adopted_without_a_transfer(world):
    place_all(world)

    world.installer().install()
    assert world.fetched == []
    assert read_records(world.folder)["CosyVoice"].hub == "ModelScope"


def test_an_existing_folder_is_adopted_without_a_network_and_compared_with_a_hub_later(world):
    place_all(world)
    addresses = world.addresses
    world.cut_the_network()
    world.installer().install()
    assert {record.hub for record in read_records(world.folder).values()} == {None}
    world.installer().install()

    world.addresses = addresses
    world.installer().install()
    assert {record.hub for record in read_records(world.folder).values()} == {"ModelScope", "Hugging Face"}
    assert world.fetched == []


def test_another_model_that_was_adopted_without_a_network_is_left_alone_later(world):
    place_all(world, seed=1)
    addresses = world.addresses
    world.cut_the_network()
    world.installer().install()

    world.addresses = addresses
    with pytest.raises(AnotherModelError):
        world.installer().install()
    assert world.fetched == []


def test_a_change_is_found_without_a_network(world):
    place_all(world)
    world.cut_the_network()
    world.installer().install()
    damage(world.folder / "campplus.onnx")

    with pytest.raises(InstallError, match=r"campplus\.onnx: changed since it was recorded: got sha256 .*, expected "):
        world.installer().install()


def test_a_folder_with_another_model_is_left_alone(world):
    place_all(world, seed=1)
    before = {name: (world.folder / name).read_bytes() for name in files_under(world.folder)}

    with pytest.raises(AnotherModelError) as caught:
        world.installer().install()
    message = str(caught.value)
    for name in ("llm.pt", "flow.pt", "campplus.onnx"):
        assert message.count(f"{name}: whole, but not the file of") == 1
    assert "--verify-only" in message
    assert "--force-download" in message
    assert world.fetched == []
    assert before == {name: (world.folder / name).read_bytes() for name in files_under(world.folder)}


def test_a_folder_that_only_the_second_hub_knows_is_adopted(world):
    place_all(world)
    for repository, files in published("ModelScope", seed=1).items():
        world.modelscope.repositories[repository] = files

    world.installer().install()
    assert read_records(world.folder)["CosyVoice"].hub == "Hugging Face"
    assert world.fetched == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def point(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.example/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, empty, point, Path.unlink])
@pytest.mark.parametrize("name", ["llm.pt", "speech_tokenizer_v1.onnx", "whisper/model.safetensors"])
def test_a_damaged_file_of_an_adopted_folder_is_fetched_again_and_no_other(world, harm, name):
    place_all(world)
    harm(world.folder / name)

    world.installer().install()
    assert world.fetched == [name.removeprefix("whisper/")]
    assert (world.folder / name).read_bytes() == content_of(world, name)


@pytest.mark.parametrize("harm", [empty, point])
@pytest.mark.parametrize("name", ["cosyvoice.yaml", "whisper/config.json"])
def test_a_text_file_that_is_no_edit_is_fetched_again(world, harm, name):
    place_all(world)
    harm(world.folder / name)

    world.installer().install()
    assert (world.folder / name).read_bytes() == content_of(world, name)


def test_a_flipped_byte_in_a_verified_folder_is_found_and_mended(world):
    world.installer().install()
    damage(world.folder / "campplus.onnx")

    world.installer().install()
    assert world.fetched.count("campplus.onnx") == 2
    assert world.fetched.count("llm.pt") == 1
    assert (world.folder / "campplus.onnx").read_bytes() == content_of(world, "campplus.onnx")


def test_a_whole_file_that_takes_a_verified_one_s_place_is_kept_beside_the_hub_s(world):
    world.installer().install()
    mine = published("ModelScope", seed=1)[COSYVOICE_REPOSITORIES["ModelScope"]]["llm.pt"]
    (world.folder / "llm.pt").write_bytes(mine)

    world.installer().install()
    assert (world.folder / "llm.pt").read_bytes() == content_of(world, "llm.pt")
    (aside,) = world.folder.glob("llm.pt.replaced-*")
    assert aside.read_bytes() == mine
    assert any(f"is whole, and is kept as {aside.name}" in line for line in world.said)

    world.hugging_face.repositories = published("Hugging Face", seed=2)  # a new revision: nobody's work is replaced
    world.modelscope.repositories = published("ModelScope", seed=2)
    damage(world.folder / "campplus.onnx")
    world.installer().install()
    kept = sorted(path.name.partition(".replaced-")[0] for path in world.folder.glob("*.replaced-*"))
    assert kept == ["campplus.onnx", "llm.pt"]  # the damaged one might be anything; the others are as recorded


@pytest.mark.parametrize("verified_before", [True, False])
def test_a_configuration_that_its_owner_edited_is_kept(world, verified_before):
    if verified_before:
        world.installer().install()
    else:
        place_all(world)
    (world.folder / "cosyvoice.yaml").write_bytes(b"sample_rate: 22050  # mine\n")
    (world.folder / "hift.pt").unlink()

    world.installer().install()
    assert (world.folder / "cosyvoice.yaml").read_bytes() == b"sample_rate: 22050  # mine\n"
    assert (world.folder / "hift.pt").is_file()


def test_the_hubs_own_readmes_and_settings_may_differ(world):
    for server, words in ((world.modelscope, b"here"), (world.hugging_face, b"there")):
        for files in server.repositories.values():
            files["README.md"] = b"# published " + words
            if "config.json" in files:
                files["config.json"] = b'{"from": "%s"}' % words
    world.installer("--source", "modelscope").install()
    manifest = world.folder / MANIFEST_NAME
    manifest.unlink()

    world.installer("--source", "huggingface").install()
    assert (world.folder / "README.md").read_bytes() == b"# published here"
    assert (world.folder / "whisper/config.json").read_bytes() == b'{"from": "here"}'
    assert len(world.hugging_face.fetched) == 0


def test_a_part_that_two_hubs_began_ends_as_one_hub_s(world):
    for repository, files in published("Hugging Face", seed=1).items():
        world.hugging_face.repositories[repository] = files
    world.modelscope.faults["flow.pt"] = Fault(status=404)

    world.installer("--no-whisper").install()
    wanted = world.hugging_face.repositories[COSYVOICE_REPOSITORIES["Hugging Face"]]
    for name in ("llm.pt", "flow.pt", "hift.pt", "campplus.onnx"):
        assert (world.folder / name).read_bytes() == wanted[name]


def test_a_manifest_that_was_cut_off_is_made_again(world):
    world.installer().install()
    truncate(world.folder / MANIFEST_NAME)

    world.installer().install()
    assert json.loads((world.folder / MANIFEST_NAME).read_text())["version"] == 1
    assert world.fetched.count("llm.pt") == 1


def test_a_download_that_the_disk_cannot_hold_is_not_begun(world):
    world.modelscope.faults["llm.pt"] = Fault(listed_size_bytes=10**15)

    with pytest.raises(DiskSpaceError, match=r"1000000\.\d+ GB are needed; free some"):
        world.installer("--no-whisper").install()
    assert world.fetched == []


def test_two_runs_at_once_on_one_folder_are_refused(world):
    lock = OutputLock(world.folder)
    try:
        with pytest.raises(OutputBusyError, match="is being written by process"):
            world.installer().install()
    finally:
        lock.release()
    world.installer().install()


def test_a_replacement_takes_the_place_of_the_old_folder_only_once_it_is_complete(world):
    place_all(world, seed=1)
    old = (world.folder / "llm.pt").read_bytes()
    world.hugging_face.faults["model.safetensors"] = Fault(status=404)
    world.modelscope.faults["model.safetensors"] = Fault(status=404)
    before = files_under(world.folder)

    with pytest.raises(InstallError):
        world.installer().replace()
    assert (world.folder / "llm.pt").read_bytes() == old
    assert files_under(world.folder) == before

    world.hugging_face.faults.clear()
    world.installer().replace()
    assert (world.folder / "llm.pt").read_bytes() == content_of(world, "llm.pt") != old
    assert world.fetched.count("llm.pt") == 1  # the failed run's copy was gone on with
    assert [path.name for path in world.folder.parent.iterdir()] == [world.folder.name]


def test_a_replacement_keeps_what_only_the_old_folder_holds(world):
    world.installer().install()
    write_folder(world.folder, {"spk2info.pt": b"PK my speakers", "mine/notes.txt": b"notes"})
    write_folder(world.folder, {".download/Hugging-Face/CosyVoice/llm.pt.0123.partial": b"half"})
    whisper = (world.folder / "whisper/model.safetensors").stat().st_ino

    world.installer("--no-whisper").replace()
    assert (world.folder / "spk2info.pt").read_bytes() == b"PK my speakers"
    assert (world.folder / "mine/notes.txt").read_bytes() == b"notes"
    assert not (world.folder / ".download").exists()
    assert (world.folder / "whisper/model.safetensors").stat().st_ino == whisper  # moved, not copied
    assert set(read_records(world.folder)) == {"CosyVoice", "Whisper"}
    assert world.fetched.count("llm.pt") == 2


def test_a_replacement_of_nothing_is_an_installation(world):
    world.installer().replace()

    assert files_under(world.folder) == NEEDED | {MANIFEST_NAME}
    assert [path.name for path in world.folder.parent.iterdir()] == [world.folder.name]


def test_a_replacement_that_cannot_take_the_place_leaves_both_folders(world, monkeypatch):
    world.installer().install()
    write_folder(world.folder, {"mine.txt": b"mine"})
    rename = Path.rename

    def refuse_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".setup-new"):
            raise OSError("the disk has gone read-only")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(SwapError, match=r"complete in .*\.setup-new, but cannot .* read-only"):
        world.installer().replace()
    assert files_under(world.folder) == NEEDED | {MANIFEST_NAME, "mine.txt"}
    assert files_under(world.folder.with_name(".CosyVoice-300M.setup-new")) == NEEDED | {MANIFEST_NAME}


@pytest.mark.parametrize("died_after", ["the first rename", "the second rename"])
def test_a_replacement_that_died_between_its_renames_is_brought_to_its_end(world, died_after):
    world.installer().install()
    write_folder(world.folder, {"mine.txt": b"mine"})
    previous = world.folder.with_name(".CosyVoice-300M.setup-old")
    if died_after == "the second rename":
        shutil.copytree(world.folder, world.folder.with_name("copy"))
        (world.folder.with_name("copy") / "mine.txt").unlink()
        world.folder.rename(previous)
        world.folder.with_name("copy").rename(world.folder)
    else:
        world.folder.rename(previous)
    world.cut_the_network()

    world.installer().install()
    assert files_under(world.folder) == NEEDED | {MANIFEST_NAME, "mine.txt"}
    assert read_records(world.folder)["CosyVoice"].hub == "ModelScope"
    assert not previous.exists()


def test_an_archive_in_a_repository_is_unpacked_inside_the_folder(world):
    repository = world.modelscope.repositories[COSYVOICE_REPOSITORIES["ModelScope"]]
    repository["weights.tar.gz"] = tar({name: repository.pop(name) for name in ("llm.pt", "flow.pt")})

    world.installer("--no-whisper", "--source", "modelscope").install()
    assert (world.folder / "llm.pt").read_bytes() == content_of(world, "llm.pt")
    assert {"weights.tar.gz", "llm.pt", "flow.pt"} <= set(read_records(world.folder)["CosyVoice"].files)


def test_an_archive_that_reaches_out_of_the_folder_is_refused_and_the_other_hub_is_asked(world):
    repository = world.modelscope.repositories[COSYVOICE_REPOSITORIES["ModelScope"]]
    repository["weights.tar.gz"] = tar({"../escaped.txt": b"out"})

    world.installer("--no-whisper", "--source", "modelscope").install()
    assert read_records(world.folder)["CosyVoice"].hub == "Hugging Face"
    assert any("a path out of the folder ('../escaped.txt')" in line for line in world.said)
    assert not list(world.folder.parent.rglob("escaped.txt"))


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_a_folder_that_is_a_link_to_another_disk_stays_a_link(world, tmp_path):
    elsewhere = tmp_path / "big-disk" / "model"
    elsewhere.mkdir(parents=True)
    world.folder.parent.mkdir(parents=True)
    world.folder.symlink_to(elsewhere)
    world.installer().install()
    world.installer().replace()

    assert world.folder.is_symlink()
    assert files_under(elsewhere) == NEEDED | {MANIFEST_NAME}


def test_a_part_that_is_a_link_to_another_disk_is_filled_there_and_stays(world, tmp_path, monkeypatch):
    elsewhere = tmp_path / "big-disk" / "whisper"
    elsewhere.mkdir(parents=True)
    world.folder.mkdir(parents=True)
    (world.folder / "whisper").symlink_to(elsewhere)
    rename = os.replace

    def across_disks(source, target):
        if ".download" in str(source) and Path(target).parent.resolve() == elsewhere:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", across_disks)
    world.installer().install()
    assert (elsewhere / "model.safetensors").read_bytes() == content_of(world, "whisper/model.safetensors")
    world.installer("--no-whisper").replace()
    assert (world.folder / "whisper").is_symlink() and (world.folder / "whisper/model.safetensors").is_file()
