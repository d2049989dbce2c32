"""The Hugging Face Hub: an adapter as a model repository there."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from flora.checkpoint import is_connection_error
from flora.errors import AuthError, FloraError, NotFound, RemoteError, UsageError
from flora.registry.remotes.http import LOGIN, refused, stream
from flora.registry.remotes.remote import Interrupted, Listing, Outgoing, RemoteFile

_WRITE_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to it"
_ATTEMPTS = 4  # for the one request that lists a repository; the client repeats no 429 of it by itself
_MAX_WAIT_S = 30.0


class Hub:
    """One model repository: `user/name`."""

    def __init__(self, repo: str) -> None:
        """Raises UsageError if `repo` is no id of a repository."""
        check_repo(repo)
        self.repo = repo
        self.address = repo

    def look(self, revision: str | None = None) -> Listing:
        """The files of a branch, tag or commit (None: main) as of the commit that it is now."""
        from huggingface_hub import HfApi

        for attempt in range(_ATTEMPTS):
            try:
                with _reading(self.repo, revision):
                    info = HfApi(library_name="flora").model_info(self.repo, revision=revision, files_metadata=True)
                break
            except Interrupted as error:
                if attempt == _ATTEMPTS - 1:
                    raise RemoteError(
                        f"the Hugging Face Hub does not list {self.repo}", cause=str(error), fix="try again later"
                    ) from error
                time.sleep(min(error.retry_after_s or 2**attempt / 2, _MAX_WAIT_S))
        files = []
        for sibling in info.siblings or []:
            if sibling.size is None:
                raise RemoteError(f"the Hub tells no size of {sibling.rfilename} in {self.repo}")
            files.append(
                RemoteFile(
                    sibling.rfilename,
                    sibling.size,
                    sha256=sibling.lfs.sha256 if sibling.lfs else None,
                    git_sha1=None if sibling.lfs else sibling.blob_id,
                )
            )
        return Listing(str(info.sha), tuple(files))

    def read(self, listing: Listing, file: RemoteFile, offset: int, timeout_s: float) -> Iterator[bytes]:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers, get_session

        # by commit: a branch that moves meanwhile changes nothing
        url = f"{HfApi().endpoint}/{self.repo}/resolve/{quote(listing.revision)}/{quote(file.name)}"
        headers = build_hf_headers(library_name="flora")
        return stream(get_session(), url, headers, offset, timeout_s, address=f"{self.repo}/{file.name}")

    def publish(self, outgoing: Outgoing) -> str:
        """One commit with all files; makes the repository if there is none.

        What Flora wrote there before and `outgoing` no longer has is deleted; other files stay. The Hub's own sha256 of
        what arrived is then compared with what was sent. Raises AuthError, RemoteError (unreachable, refused, or
        someone else committed meanwhile).
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        api = HfApi(library_name="flora")
        with _writing(self.repo):
            address = api.create_repo(self.repo, private=outgoing.is_private or None, exist_ok=True)
            before = api.model_info(self.repo)
            present = {sibling.rfilename for sibling in before.siblings or []}
            names = set(outgoing.names)
            commit = api.create_commit(
                self.repo,
                [
                    *(CommitOperationAdd(name, outgoing.folder / name) for name in sorted(names)),
                    *(CommitOperationDelete(name) for name in sorted((present & outgoing.owned) - names)),
                ],
                commit_message=outgoing.message,
                parent_commit=before.sha,  # refused if someone else committed since
            )
        self._check_arrival(outgoing, commit.oid)
        return str(address)

    def _check_arrival(self, outgoing: Outgoing, commit: str) -> None:
        from flora.digests import digest_file

        listing = self.look(commit)
        for name in outgoing.names:
            file, path = listing.file(name), outgoing.folder / name
            sent = digest_file(path).hex
            if file is None or file.num_bytes != path.stat().st_size or (file.sha256 and file.sha256 != sent):
                raise RemoteError(
                    f"{name} did not arrive whole at {self.repo}",
                    cause=f"sent {path.stat().st_size} bytes of sha256 {sent}; the Hub has {file}",
                    fix="push again: that is safe",
                )


def check_repo(repo: str) -> None:
    """Raises UsageError unless `repo` can be a repository's id, owner and name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo[:120]!r} is no Hub id", cause=str(error), fix="write it as user/name") from error
    if "/" not in repo:
        raise UsageError(f"{repo!r} does not say whose it is", fix=f"write it as user/name, such as your-name/{repo}")


@contextmanager
def _reading(repo: str, revision: str | None) -> Iterator[None]:
    """The Hub client's errors in our words, for a request that may be repeated."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision}", fix="give a branch, a tag or a commit of it") from error
    except GatedRepoError as error:
        raise AuthError(f"{repo} is gated", fix=LOGIN) from error
    except RepositoryNotFoundError as error:  # what the Hub says to strangers of a private one, too
        if error.response is not None and error.response.status_code in (401, 403):
            raise AuthError(f"the Hub shows no {repo} to the token at hand", fix=LOGIN) from error
        raise NotFound(
            f"there is no {repo} on the Hub", fix="check the spelling; a private one needs a token"
        ) from error
    except LocalTokenNotFoundError as error:
        raise AuthError(f"{repo} cannot be read without a token", fix=LOGIN) from error
    except HfHubHTTPError as error:
        raise refused(repo, error.response.status_code, error.response.headers, str(error)) from error
    except OfflineModeIsEnabled as error:
        raise _unreachable(repo, error) from error
    except Exception as error:
        if is_connection_error(error):
            name = type(error).__name__
            if "Connect" in name:  # nobody there at all: no use in asking again
                raise _unreachable(repo, error) from error
            raise Interrupted(f"{name}: {error}") from error
        raise


def _unreachable(repo: str, error: Exception) -> RemoteError:
    return RemoteError(
        f"the Hugging Face Hub cannot be reached to read {repo}",
        cause=f"there is no network, HF_HUB_OFFLINE is set, or HF_ENDPOINT does not answer ({error})",
        fix="try again where there is a network",
    )


@contextmanager
def _writing(repo: str) -> Iterator[None]:
    """The Hub client's errors in our words."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise AuthError(f"{repo} cannot be written without a token", fix=_WRITE_LOGIN) from error
    except HfHubHTTPError as error:
        raise _not_written(repo, error.response.status_code, str(error)) from error
    except Exception as error:
        if isinstance(error, OfflineModeIsEnabled) or is_connection_error(error):
            raise RemoteError(
                f"the Hugging Face Hub cannot be reached to write {repo}",
                cause=f"there is no network, HF_HUB_OFFLINE is set, or HF_ENDPOINT does not answer ({error})",
                fix="try again where there is a network; `flora export` writes the same files to a folder",
            ) from error
        if isinstance(error, ConnectionError):  # Xet's client has no other word, whatever it was told
            raise _not_in_xet(repo, str(error)) from error
        if isinstance(error, (ValueError, RuntimeError)):  # an answer that the client cannot use, a broken upload
            cause = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            raise RemoteError(f"the push to {repo} failed", cause=cause, fix="repeat it: that is safe") from error
        raise


def _not_in_xet(repo: str, text: str) -> FloraError:
    """The large files go to the Hub's Xet storage first, where hf_xet is installed and not switched off."""
    if re.search(r"\b40[13]\b", text):
        return AuthError(f"the Hub's storage takes no files for {repo} from you", cause=text, fix=_WRITE_LOGIN)
    return RemoteError(
        f"the weights for {repo} did not reach the Hub's Xet storage",
        cause=text,
        fix="repeat it: that is safe; with HF_HUB_DISABLE_XET=1 they go over plain HTTP instead",
    )


def _not_written(repo: str, status: int, text: str) -> FloraError:
    if status in (401, 403):
        return AuthError(f"the Hub refuses to let you write to {repo} ({status})", cause=text, fix=_WRITE_LOGIN)
    if status == 412:
        return RemoteError(
            f"{repo} changed while it was being pushed to",
            cause="someone else committed to it meanwhile",
            fix="look at what is there, then push again",
        )
    return RemoteError(f"the Hub refused the push to {repo} ({status})", cause=text, fix="try again later")
