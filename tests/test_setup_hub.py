"""Both hubs' real clients against a hub on loopback: every file arrives whole, or the reason is told."""

import time
from pathlib import Path

import modelscope_hub
import pytest
from hub_server import Fault, HubServer, sha256

from taste.hub import Hub, HubError, HubUnreachableError, HuggingFaceHub, ModelScopeHub

REPOSITORY = "owner/model"
LARGE = bytes(range(256)) * 12_000  # 3 MB
HUGE = bytes(range(256)) * 80_000  # 20 MB: more than one block of either client, which keep whole blocks only
SMALL = b"sample_rate: 22050\n"
CLOSED_ADDRESS = "http://127.0.0.1:9"

both_hubs = pytest.mark.parametrize("hub_class", [HuggingFaceHub, ModelScopeHub], ids=lambda hub: hub.__name__)


@pytest.fixture(autouse=True)
def modelscope_s_own_files_go_to_a_temporary_folder(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("modelscope")
    monkeypatch.setenv("MODELSCOPE_HOME", str(folder))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(folder))
    modelscope_hub.set_default_config(None)


@pytest.fixture
def server():
    with HubServer({REPOSITORY: {"llm.pt": LARGE, "sub/cosyvoice.yaml": SMALL, "empty.txt": b""}}) as server:
        yield server


def fetch(hub: Hub, name: str, folder: Path) -> bytes:
    listing = hub.list_files(REPOSITORY)
    hub.fetch(listing, listing.files[name], folder)
    return (folder / name).read_bytes()


def partial_file(hub: Hub, folder: Path) -> Path:
    """Where a client keeps what has arrived of llm.pt."""
    suffix = f"{sha256(LARGE)[:16]}.partial" if hub.name == "Hugging Face" else "incomplete"
    return folder / f"llm.pt.{suffix}"


@both_hubs
def test_a_listing_holds_every_file_with_its_size_and_hash(server, hub_class):
    listing = hub_class(server.address).list_files(REPOSITORY)

    assert {path: file.size_bytes for path, file in listing.files.items()} == {
        "llm.pt": len(LARGE),
        "sub/cosyvoice.yaml": len(SMALL),
        "empty.txt": 0,
    }
    assert listing.files["llm.pt"].sha256 == sha256(LARGE)
    assert listing.files["sub/cosyvoice.yaml"].sha256 or listing.files["sub/cosyvoice.yaml"].git_sha1


@both_hubs
@pytest.mark.parametrize("name", ["llm.pt", "sub/cosyvoice.yaml", "empty.txt"])
def test_a_fetched_file_is_the_hub_s_byte_for_byte(server, hub_class, name, tmp_path):
    assert fetch(hub_class(server.address), name, tmp_path) == server.repositories[REPOSITORY][name]


@both_hubs
def test_a_connection_that_breaks_off_is_gone_on_with(server, hub_class, tmp_path):
    server.repositories[REPOSITORY]["llm.pt"] = HUGE
    server.faults["llm.pt"] = Fault(drop_after_bytes=15_000_000)

    assert fetch(hub_class(server.address), "llm.pt", tmp_path) == HUGE
    first, second = server.fetches_of("llm.pt")
    assert first.range is None
    assert second.range is not None
    assert 10_000_000 < int(second.range.removeprefix("bytes=").rstrip("-")) <= 15_000_000


def test_a_token_is_shown_to_the_hub_and_not_to_the_store_of_large_files(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    assert fetch(HuggingFaceHub(server.address), "llm.pt", tmp_path) == LARGE
    *hub_requests, store_request = server.requests
    assert {request.authorization for request in hub_requests} == {"Bearer hf_secret"}
    assert store_request.path.startswith("/store/")
    assert store_request.authorization is None


@both_hubs
def test_a_transfer_goes_on_where_a_dead_process_left_it(server, hub_class, tmp_path):
    hub = hub_class(server.address)
    partial_file(hub, tmp_path).write_bytes(LARGE[:1_000_000])

    assert fetch(hub, "llm.pt", tmp_path) == LARGE
    assert [request.range for request in server.fetches_of("llm.pt")] == ["bytes=1000000-"]


@both_hubs
def test_a_file_that_had_arrived_whole_is_not_transferred_again(server, hub_class, tmp_path):
    hub = hub_class(server.address)
    partial_file(hub, tmp_path).write_bytes(LARGE)

    assert fetch(hub, "llm.pt", tmp_path) == LARGE
    assert server.fetches_of("llm.pt") == []


@both_hubs
def test_more_bytes_than_the_file_has_are_thrown_away(server, hub_class, tmp_path):
    hub = hub_class(server.address)
    partial_file(hub, tmp_path).write_bytes(b"x" * (len(LARGE) + 1))

    assert fetch(hub, "llm.pt", tmp_path) == LARGE


@both_hubs
def test_a_file_shorter_than_listed_is_an_error_and_takes_no_name(server, hub_class, tmp_path):
    server.faults["llm.pt"] = Fault(truncate_to_bytes=len(LARGE) - 100)

    with pytest.raises(HubError, match=r"llm\.pt of owner/model"):
        fetch(hub_class(server.address), "llm.pt", tmp_path)
    assert not (tmp_path / "llm.pt").exists()


def test_modelscope_s_client_refuses_a_wrong_hash_by_itself(server, tmp_path):
    server.faults["sub/cosyvoice.yaml"] = Fault(corrupt=True)

    with pytest.raises(HubError, match=r"ModelScope sent a wrong sub/cosyvoice\.yaml of owner/model: .*Hash mismatch"):
        fetch(ModelScopeHub(server.address), "sub/cosyvoice.yaml", tmp_path)
    assert not (tmp_path / "sub/cosyvoice.yaml").exists()


@both_hubs
def test_a_listed_file_that_is_not_there_is_an_error_that_names_it(server, hub_class, tmp_path):
    server.faults["llm.pt"] = Fault(status=404)

    with pytest.raises(HubError, match=r"refuses llm\.pt of owner/model: status 404"):
        fetch(hub_class(server.address), "llm.pt", tmp_path)


@both_hubs
def test_an_unknown_repository_is_an_error_that_names_it(server, hub_class):
    with pytest.raises(HubError, match="refuses owner/nothing: status 404"):
        hub_class(server.address).list_files("owner/nothing")


@both_hubs
@pytest.mark.parametrize("status", [401, 403])
def test_a_closed_repository_is_an_error_that_says_so(server, hub_class, status):
    server.status = status

    with pytest.raises(HubError, match=f"status {status}, no access") as caught:
        hub_class(server.address).list_files(REPOSITORY)
    assert not isinstance(caught.value, HubUnreachableError)


@both_hubs
def test_a_hub_that_does_not_answer_is_told_apart_and_told_soon(hub_class):
    started = time.monotonic()
    with pytest.raises(HubUnreachableError, match=r"cannot be reached for owner/model: .*refused"):
        hub_class(CLOSED_ADDRESS).list_files(REPOSITORY)
    assert time.monotonic() - started < 5  # ModelScope's client alone would try for 7 s


@both_hubs
@pytest.mark.parametrize("name", ["../escaped.txt", "/etc/escaped.txt", "a/../../escaped.txt", "a\\..\\escaped.txt"])
def test_a_name_that_leads_out_of_the_folder_is_refused(hub_class, name):
    with HubServer({REPOSITORY: {name: SMALL}}) as server, pytest.raises(HubError, match="unsafe name"):
        hub_class(server.address).list_files(REPOSITORY)


def test_an_answer_that_is_no_hub_s_is_an_error(server):
    server.repositories[REPOSITORY] = {}
    for hub in (HuggingFaceHub(server.address + "/portal"), ModelScopeHub(server.address + "/portal")):
        with pytest.raises(HubError):
            hub.list_files(REPOSITORY)
