"""What Flora needs of a machine, looked at piece by piece: a finding each, with what to do where it is not well."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import flora
from flora.cli.machine import available_memory_bytes, gpus, num_cores
from flora.cli.sizes import show_bytes
from flora.errors import FloraError, NotFound

DISTRIBUTION = "flora-adapters"
_SERVE_MODULES = ("fastapi", "uvicorn", "zmq", "tokenizers", "jinja2", "prometheus_client", "httpx2")
_EXTRAS = {"hf": "transformers", "s3": "obstore", "oci": "oras", "postgres": "psycopg", "gguf": "gguf"}
_VARIABLES = ("FLORA_HOME", "FLORA_REGISTRY_URL", "FLORA_DEBUG", "FLORA_SERVER_URL", "FLORA_API_KEY")
_OWN_VARIABLES = ("FLORA_COMMIT", "FLORA_FULL", "FLORA_FIXTURES")  # of Flora's own benchmarks and tests
_LOW_DISK_BYTES = 5 << 30
_LOW_MEMORY_BYTES = 1 << 30
_MIN_TORCH = (2, 11)
_PORT = 8000  # `flora serve`'s own

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Status
    detail: str
    fix: str | None = None


def examine(registry_url: str | None) -> Iterator[Finding]:
    """Everything, in the order in which one thing needs another. Raises nothing."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _package,
        _settings,
        _torch,
        _machine,
        _server_libraries,
        _extras,
        lambda: _home(registry_url),
        _port,
        _hub,
    )
    for check in checks:
        yield from check()


def _package() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    where = f"{flora.__version__} at {Path(flora.__file__).parent}"
    try:
        importlib.metadata.version(DISTRIBUTION)
        yield Finding("flora", "ok", where)
    except importlib.metadata.PackageNotFoundError:
        fix = "pip install -e . in that folder, if commands miss what they need"
        yield Finding("flora", "warning", f"{where}; pip knows no {DISTRIBUTION}", fix)
    if importlib.util.find_spec("flora") and _is_installed("flora"):
        yield Finding(
            "other flora",
            "warning",
            "a distribution called flora is installed too: it is someone else's, and may hide this one",
            f"pip uninstall flora; pip install --force-reinstall --no-deps {DISTRIBUTION}",
        )


def _is_installed(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def _settings() -> Iterator[Finding]:
    from flora.config import PROJECT_FILE, USER_FILE, settings, unknown_keys

    strange = [name for name in os.environ if name.startswith("FLORA_") and name not in _VARIABLES + _OWN_VARIABLES]
    for name in sorted(strange):
        near = get_close_matches(name, _VARIABLES, 1)
        fix = f"it may be meant as {near[0]}" if near else f"Flora reads {', '.join(_VARIABLES)}"
        yield Finding("settings", "warning", f"nothing reads the variable {name}", fix)
    try:
        settings()
    except FloraError as error:
        yield Finding("settings", "failed", f"{error.what}: {error.cause}", error.fix)
        return
    for file in (PROJECT_FILE, USER_FILE):
        for key in unknown_keys(file):
            yield Finding(
                "settings", "warning", f"nothing reads {key} in {file}", "home, registry_url and debug are read"
            )
    files = [str(file) for file in (PROJECT_FILE, USER_FILE) if file.is_file()]
    if not strange:
        yield Finding(
            "settings", "ok", f"from {', '.join(files)}" if files else "no flora.toml; variables and flags alone"
        )


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a damaged installation fails in many ways
        fix = "pip install --force-reinstall torch, in the environment of the Python above"
        yield Finding("torch", "failed", f"cannot be imported: {error}", fix)
        return
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, _MIN_TORCH))
    yield Finding(
        "torch",
        "ok" if number >= _MIN_TORCH else "failed",
        f"{torch.__version__} (needs {wanted} or newer)",
        None if number >= _MIN_TORCH else f"pip install --upgrade 'torch>={wanted}'",
    )
    cards = gpus()
    if not cards:
        yield Finding("gpu", "ok", "none; extraction and serving run on the CPU")
    elif torch.cuda.is_available():
        listed = ", ".join(f"{card.name} with {show_bytes(card.memory_bytes)}" for card in cards)
        yield Finding("gpu", "ok", listed)
        yield from _compiler()
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "gpu",
            "failed",
            f"the driver shows {cards[0].name}, but torch cannot use it: it is {built}",
            "install a torch for this driver, as pytorch.org tells; until then give --device cpu",
        )


def _compiler() -> Iterator[Finding]:
    """Triton compiles a launcher in C when a kernel first runs."""
    if importlib.util.find_spec("triton") is None:
        yield Finding(
            "triton", "failed", "not installed: serving on a GPU needs it", f"pip install '{DISTRIBUTION}[serve]'"
        )
        return
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler and header.exists():
        yield Finding("triton", "ok", f"installed, and compiles with {compiler}")
    else:
        lacking = "no C compiler" if not compiler else f"no {header}"
        yield Finding(
            "triton",
            "failed",
            f"installed, but there is {lacking}: kernels cannot be built",
            "install gcc and Python's headers: apt install gcc python3-dev",
        )


def _machine() -> Iterator[Finding]:
    yield Finding("cpu", "ok", f"{num_cores()} cores")
    free = available_memory_bytes()
    yield Finding(
        "memory",
        "ok" if free >= _LOW_MEMORY_BYTES else "warning",
        f"{show_bytes(free)} available",
        None if free >= _LOW_MEMORY_BYTES else "close other programs; `flora extract --dry-run` says what it will take",
    )


def _server_libraries() -> Iterator[Finding]:
    missing = [module for module in _SERVE_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        detail = f"`flora serve` lacks {', '.join(missing)}"
        yield Finding("server libraries", "warning", detail, f"pip install '{DISTRIBUTION}[serve]'")
    else:
        yield Finding("server libraries", "ok", "all installed")


def _extras() -> Iterator[Finding]:
    lacking = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    have = [extra for extra in _EXTRAS if extra not in lacking]
    more = f"; not {', '.join(lacking)}: a command that needs one says so" if lacking else ""
    yield Finding("extras", "ok", (", ".join(have) or "none") + more)


def _home(registry_url: str | None) -> Iterator[Finding]:
    from flora.config import settings

    try:
        home, url = settings().home, registry_url or settings().registry_url or settings().registry_dir
    except FloraError:  # told already
        return
    there = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    is_writable = there.is_dir() and os.access(there, os.W_OK)
    yield Finding(
        "home",
        "ok" if is_writable else "failed",
        str(home) if is_writable else f"{there} cannot be written to",
        None if is_writable else "set FLORA_HOME to a folder of yours",
    )
    if there.is_dir():
        free = shutil.disk_usage(there).free
        is_enough = free >= _LOW_DISK_BYTES
        fix = None if is_enough else f"`flora gc` frees what nothing refers to; {home / 'cache'} may be deleted"
        yield Finding("disk", "ok" if is_enough else "warning", f"{show_bytes(free)} free", fix)
    yield from _registry(str(url), is_default=registry_url is None)


def _registry(url: str, *, is_default: bool) -> Iterator[Finding]:
    from flora.registry import Registry

    try:
        with Registry.open(url, create=False) as store:
            versions = sum(entry.num_versions for entry in store.names())
            yield Finding("registry", "ok", f"{url}: {versions} versions")
            gone = [base for base in store.bases() if base.num_adapters and not (base.path and base.path.is_dir())]
    except NotFound as error:
        is_new = is_default and error.exit_code == 5
        fix = None if is_new else error.fix
        yield Finding("registry", "ok" if is_new else "failed", "none yet" if is_new else error.what, fix)
        return
    except FloraError as error:
        yield Finding("registry", "failed", error.what, error.fix)
        return
    for base in gone:
        where = f"is not at {base.path} any more" if base.path else "has no known place"
        detail = f"{base.name}, the base of {base.num_adapters} adapters, {where}"
        yield Finding("base", "warning", detail, "give its folder or Hub id: flora serve BASE")


def _port() -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.settimeout(1)
        is_taken = probe.connect_ex(("127.0.0.1", _PORT)) == 0
    detail = "something listens there: a `flora serve`, or another server" if is_taken else "free for `flora serve`"
    yield Finding(f"port {_PORT}", "ok", detail + (", which then wants --port" if is_taken else ""))


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    state = "HF_HUB_OFFLINE is set: only what is here is found" if constants.HF_HUB_OFFLINE else "asked when needed"
    token = "a token is set" if get_token() else "no token, which `flora push` to it needs: `hf auth login`"
    yield Finding("hub", "ok", f"{state}; {token}; downloads lie in {Path(constants.HF_HUB_CACHE)}")
