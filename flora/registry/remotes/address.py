"""From what a person types to a remote.

user/name  or  hf://user/name        a model repository on the Hugging Face Hub
./folder, /folder, ~/folder, file:// a PEFT folder of this machine
s3://bucket/path/name[:alias|@vN]    a bucket; likewise gs:// and az://
oci://host/path/name[:tag|@sha256:…] an OCI registry
"""

from pathlib import Path
from urllib.parse import unquote

from flora.errors import UsageError
from flora.registry.remotes.remote import Remote

_BUCKETS = ("s3", "gs", "az")


def open_remote(address: str) -> Remote:
    """The remote at `address`; asks nobody yet. Raises UsageError if it is none that Flora knows."""
    scheme, separator, rest = address.partition("://")
    if not separator:
        if is_path(address):
            from flora.registry.remotes.folder import Folder

            return Folder(Path(address).expanduser())
        from flora.registry.remotes.hub import Hub

        return Hub(address)
    if scheme == "hf":
        from flora.registry.remotes.hub import Hub

        return Hub(rest)
    if scheme == "file":
        from flora.registry.remotes.folder import Folder

        return Folder(Path(unquote(rest.removeprefix("localhost"))))
    if scheme in _BUCKETS:
        from flora.registry.remotes.bucket import Bucket

        return Bucket(address)
    if scheme == "oci":
        from flora.registry.remotes.oci import OciRepository

        return OciRepository(address)
    raise UsageError(
        f"{address[:120]} is no remote that Flora knows",
        fix="give user/name on the Hub, a folder starting with ./ or /, or an s3://, gs://, az:// or oci:// address",
    )


def is_path(address: str) -> bool:
    """Whether this names a folder of this machine: it starts as no Hub id does."""
    return address.startswith((".", "/", "~"))


def default_name(address: str) -> str:
    """What an adapter from there is called if nobody says otherwise: the last part of its address."""
    last = address.rstrip("/").partition("://")[2] or address.rstrip("/")
    last = last.rpartition("/")[2] if "/" in last else last
    return last.partition("@")[0].partition(":")[0]
