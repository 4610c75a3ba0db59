"""Lists and fetches the files of a model repository, from Hugging Face or from ModelScope, through their own clients.

Both clients find their hub by themselves (HF_ENDPOINT and MODELSCOPE_ENDPOINT point them to a mirror, their own login
commands and variables give them a token); no address is spelled here. A download that was interrupted, even by the
death of the process, goes on where it stopped.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, cast

from taste.verify import ExpectedFile

REACH_SECONDS = 8  # for a hub's first answer; later ones have the clients' own, longer limits
MODELSCOPE_REVISION = "master"
PARTIAL_SUFFIX = ".partial"


class HubError(RuntimeError):
    """A hub does not give what was asked of it; the message says which hub, what, and why."""


class HubUnreachableError(HubError):
    """A hub does not answer, or this machine has no network."""


class Listing(NamedTuple):
    """The files of a repository at one moment."""

    hub: str
    repository: str
    revision: str  # a commit where the hub names one, else its default branch
    files: dict[str, ExpectedFile]  # path inside the repository -> what the hub says of it


class Hub(Protocol):
    """What a place that models are downloaded from can do."""

    name: str

    def list_files(self, repository: str) -> Listing:
        """List a repository, or raise HubError."""

    def fetch(self, listing: Listing, file: ExpectedFile, folder: Path) -> None:
        """Fetch one listed file to `folder/file.path`, or raise HubError; what was begun there is gone on with."""


class HuggingFaceHub:
    """Hugging Face, through huggingface_hub.

    Args:
        endpoint: another address of the hub; None leaves it to the client.
    """

    name = "Hugging Face"

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def list_files(self, repository: str) -> Listing:
        """List a repository at its newest commit, with the SHA-256 of large files and the git SHA-1 of small ones.

        Args:
            repository: `owner/name`.

        Returns:
            the files and the commit, by which they are fetched later.

        Raises:
            HubUnreachableError: no answer.
            HubError: there is no such repository, or it is not open to this user.
        """
        from huggingface_hub.hf_api import HfApi, RepoFile

        api = HfApi(endpoint=self._endpoint)
        with _hugging_face_errors(repository):
            commit = api.model_info(repository, timeout=REACH_SECONDS).sha
            if not commit:
                raise HubError(f"{self.name} names no commit for {repository}")
            files = [
                ExpectedFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in api.list_repo_tree(repository, recursive=True, revision=commit)
                if isinstance(entry, RepoFile)
            ]
        return _listing(self.name, repository, commit, files)

    def fetch(self, listing: Listing, file: ExpectedFile, folder: Path) -> None:
        """Fetch one file, going on with what an earlier attempt left.

        `hf_hub_download` throws a partial file away when its process ends, so the client's own transfer function is
        given a file of ours, whose name holds the content's hash: what is gone on with belongs to the same content.

        Args:
            listing: the repository's files.
            file: one of them.
            folder: where it goes, at its path inside the repository; its size is right, its hash is not looked at.

        Raises:
            HubUnreachableError: no answer, or the connection broke off and could not be made again.
            HubError: the hub has no such file, or sends one of another size.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        mark = (file.sha256 or file.git_sha1 or listing.revision)[:16]
        partial = target.with_name(f"{target.name}.{mark}{PARTIAL_SUFFIX}")
        url = hf_hub_url(listing.repository, file.path, revision=listing.revision, endpoint=self._endpoint)
        with _hugging_face_errors(f"{file.path} of {listing.repository}"), partial.open("ab") as stream:
            if stream.tell() > file.size_bytes:
                stream.truncate(0)
                stream.seek(0)
            http_get(
                url,
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=file.size_bytes,
                displayed_filename=file.path,
            )
        partial.replace(target)


class ModelScopeHub:
    """ModelScope, through modelscope_hub (the download library inside modelscope).

    Args:
        endpoint: another address of the hub; None leaves it to the client.
    """

    name = "ModelScope"

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def list_files(self, repository: str) -> Listing:
        """List a repository's default branch, with the SHA-256 of every file.

        Args:
            repository: `owner/name`.

        Returns:
            the files and the branch.

        Raises:
            HubUnreachableError: no answer.
            HubError: there is no such repository, or it is not open to this user.
        """
        from modelscope_hub import HubApi

        with _modelscope_errors(repository):
            self._reach()
            entries = HubApi(endpoint=self._endpoint).list_repo_files(repository, "model", revision=MODELSCOPE_REVISION)
        files = [ExpectedFile(entry.path, entry.size, entry.sha256 or None) for entry in entries if not entry.is_dir]
        return _listing(self.name, repository, MODELSCOPE_REVISION, files)

    def fetch(self, listing: Listing, file: ExpectedFile, folder: Path) -> None:
        """Fetch one file, going on with what an earlier attempt left; the client compares the hash itself.

        Args:
            listing: the repository's files.
            file: one of them.
            folder: where it goes, at its path inside the repository.

        Raises:
            HubUnreachableError: no answer, or the connection broke off and could not be made again.
            HubError: the hub has no such file, or what it sent is not what it lists.
        """
        from modelscope_hub import HubApi

        with _modelscope_errors(f"{file.path} of {listing.repository}"):
            HubApi(endpoint=self._endpoint).download_file(
                listing.repository,
                "model",
                file.path,
                revision=listing.revision,
                local_dir=folder,
                expected_sha256=file.sha256,
                file_size=file.size_bytes,
            )

    def _reach(self) -> None:
        """One request without the client's retries, so that a machine without a network learns so at once."""
        import requests
        from modelscope_hub import get_default_config

        address = self._endpoint or cast(str, get_default_config().endpoint)  # None only while it is being made
        requests.head(address, timeout=REACH_SECONDS)


def _listing(hub: str, repository: str, revision: str, files: list[ExpectedFile]) -> Listing:
    """Put a hub's answer together, refusing names that would lead out of the folder they are fetched into."""
    for file in files:
        path = PurePosixPath(file.path)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in file.path or "\0" in file.path:
            raise HubError(f"{hub} lists a file of {repository} under an unsafe name: {file.path!r}")
    return Listing(hub, repository, revision, {file.path: file for file in files})


@contextmanager
def _hugging_face_errors(wanted: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into HubError; an error of this machine's disk stays what it is."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    hub = HuggingFaceHub.name
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnreachableError(f"{hub} is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE") from error
    except HfHubHTTPError as error:
        raise HubError(f"{hub} refuses {wanted}: {_http_reason(error.response.status_code)}") from error
    except httpx.HTTPError as error:
        raise HubUnreachableError(f"{hub} cannot be reached for {wanted}: {_short(_root(error))}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise HubError(f"{hub} sent an incomplete {wanted}: {_short(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{hub} gave no usable answer for {wanted}: {_short(error)}") from error


@contextmanager
def _modelscope_errors(wanted: str) -> Iterator[None]:
    """Turn what modelscope_hub raises into HubError; an error of this machine's disk stays what it is."""
    import modelscope_hub
    import requests

    hub = ModelScopeHub.name
    try:
        yield
    except (modelscope_hub.NetworkError, requests.ConnectionError, requests.Timeout) as error:
        raise HubUnreachableError(f"{hub} cannot be reached for {wanted}: {_short(_root(error))}") from error
    except modelscope_hub.FileIntegrityError as error:
        raise HubError(f"{hub} sent a wrong {wanted}: {_short(error)}") from error
    except modelscope_hub.APIError as error:
        raise HubError(f"{hub} refuses {wanted}: {_http_reason(error.status_code)}") from error
    except (modelscope_hub.HubError, requests.RequestException) as error:
        raise HubError(f"{hub} fails at {wanted}: {_short(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(f"{hub} gave no usable answer for {wanted}: {_short(error)}") from error


def _http_reason(status: int | None) -> str:
    if status in (401, 403):
        return f"status {status}, no access (a repository that needs a login, or does not exist)"
    if status == 404:
        return "status 404, there is no such repository or file"
    return f"status {status}"


def _root(error: BaseException) -> BaseException:
    """What the network said, beneath what each layer above wrapped around it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _short(error: BaseException) -> str:
    """The first line of a message, without what follows in brackets by the kilobyte."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
