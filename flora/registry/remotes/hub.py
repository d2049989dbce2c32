"""The Hugging Face Hub: an adapter as a model repository there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flora.adapter import Adapter
from flora.checkpoint import is_connection_error
from flora.errors import AuthError, FloraError, RemoteError, UsageError
from flora.registry.formats.card import model_card
from flora.registry.formats.peft import CARD_FILE, OUR_FILES, Profile, save_peft
from flora.registry.records import Version

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to it"


@dataclass(frozen=True, slots=True)
class PlannedFile:
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would write: the files lie in a temporary folder that lives as long as the plan."""

    repo: str
    files: tuple[PlannedFile, ...]
    card: str
    message: str  # of the commit
    is_private: bool
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    @property
    def folder(self) -> Path:
        return Path(self._folder.name) / "files"


def plan_push(
    adapter: Adapter, version: Version, repo: str, *, profile: Profile = "portable", is_private: bool = False
) -> PushPlan:
    """Everything that `push` will send, without asking the Hub. Raises UsageError if `repo` is no Hub id."""
    _check_repo(repo)
    folder = tempfile.TemporaryDirectory(prefix="flora-push-")
    path = Path(folder.name) / "files"
    save_peft(adapter, path, profile)
    card = model_card(adapter, version, repo)
    (path / CARD_FILE).write_text(card)
    files = tuple(PlannedFile(file.name, file.stat().st_size) for file in sorted(path.iterdir()))
    return PushPlan(repo, files, card, f"{version.ref}, {version.digest}", is_private, folder)


def push(plan: PushPlan) -> str:
    """Sends the plan's files in one commit, and makes the repository if there is none; returns its address.

    What Flora wrote there before and the plan no longer has is deleted; other files stay. Raises AuthError, RemoteError
    (unreachable, refused, or someone else committed meanwhile).
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="flora")
    with _translated(plan.repo):
        address = api.create_repo(plan.repo, private=plan.is_private or None, exist_ok=True)
        before = api.model_info(plan.repo)
        present = {sibling.rfilename for sibling in before.siblings or []}
        names = {file.name for file in plan.files}
        api.create_commit(
            plan.repo,
            [
                *(CommitOperationAdd(name, plan.folder / name) for name in sorted(names)),
                *(CommitOperationDelete(name) for name in sorted((present & OUR_FILES) - names)),
            ],
            commit_message=plan.message,
            parent_commit=before.sha,  # refused if someone else committed since
        )
    return str(address)


def _check_repo(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo[:120]!r} is no Hub id", cause=str(error), fix="write it as user/name") from error
    if "/" not in repo:
        raise UsageError(f"{repo!r} does not say whose it is", fix=f"write it as user/name, such as your-name/{repo}")


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """The Hub client's errors in our words."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise AuthError(f"{repo} cannot be written without a token", fix=_LOGIN) from error
    except HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code, str(error)) from error
    except Exception as error:
        if isinstance(error, OfflineModeIsEnabled) or is_connection_error(error):
            raise RemoteError(
                f"the Hugging Face Hub cannot be reached to write {repo}",
                cause=f"there is no network, HF_HUB_OFFLINE is set, or HF_ENDPOINT does not answer ({error})",
                fix="try again where there is a network; `flora export` writes the same files to a folder",
            ) from error
        if isinstance(error, (ValueError, RuntimeError)):  # an answer that the client cannot use, a broken upload
            cause = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
            raise RemoteError(f"the push to {repo} failed", cause=cause, fix="repeat it: that is safe") from error
        raise


def _refused(repo: str, status: int, text: str) -> FloraError:
    if status in (401, 403):
        return AuthError(f"the Hub refuses to let you write to {repo} ({status})", cause=text, fix=_LOGIN)
    if status == 412:
        return RemoteError(
            f"{repo} changed while it was being pushed to",
            cause="someone else committed to it meanwhile",
            fix="look at what is there, then push again",
        )
    return RemoteError(f"the Hub refused the push to {repo} ({status})", cause=text, fix="try again later")
