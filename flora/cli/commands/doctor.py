"""`flora doctor`: whether this machine has what Flora needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import flora
from flora.cli.machine import available_memory_bytes, gpus, num_cores
from flora.cli.options import AsJson, IdsOnly, RegistryUrl
from flora.cli.output import Column, Format, choose_format, note, print_table
from flora.cli.sizes import show_bytes
from flora.errors import CheckFailed, FloraError

DISTRIBUTION = "flora-adapters"
_SERVE_MODULES = ("fastapi", "uvicorn", "zmq", "tokenizers", "jinja2", "prometheus_client", "httpx2")
_LOW_DISK_BYTES = 5 << 30
_MIN_TORCH = (2, 11)

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Status
    detail: str


def doctor(registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False) -> None:
    """Check this machine: Python, torch, GPU, memory, disk, registry, server libraries. Exit 3 if something is broken.

    [bold]Example[/bold]

      flora doctor --json
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _check_package, _check_torch, _check_machine, _check_server_libraries, lambda: _check_home(registry), _check_hub
    )  # fmt: skip
    findings = [finding for check in checks for finding in check()]
    rows = [{"check": each.check, "status": each.status, "detail": each.detail} for each in findings]
    columns = (Column("check", "check", keeps_whole=True), Column("status", "status"), Column("detail", "detail"))
    print_table(form, "checks", columns, rows, id_key="check")
    failed = [each for each in findings if each.status == "failed"]
    if failed:
        raise CheckFailed(f"{len(failed)} checks failed, {failed[0].check} first", cause=failed[0].detail)
    if form is Format.HUMAN:
        note("nothing is broken")


def _check_package() -> Iterator[Finding]:
    import importlib.metadata

    yield Finding("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")
    try:
        version = importlib.metadata.version(DISTRIBUTION)
        yield Finding("flora", "ok", f"{flora.__version__}, distribution {DISTRIBUTION} {version}")
    except importlib.metadata.PackageNotFoundError:
        yield Finding("flora", "warning", f"{flora.__version__} runs from a folder; pip knows no {DISTRIBUTION}")


def _check_torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "failed", f"cannot be imported: {error}")
        return
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    wanted = ".".join(map(str, _MIN_TORCH))
    yield Finding("torch", "ok" if number >= _MIN_TORCH else "failed", f"{torch.__version__} (needs {wanted} or newer)")
    cards = gpus()
    if not cards:
        yield Finding("gpu", "ok", "none; extraction and serving run on the CPU")
    elif torch.cuda.is_available():
        listed = ", ".join(f"{card.name} with {show_bytes(card.memory_bytes)}" for card in cards)
        yield Finding("gpu", "ok", listed)
    else:
        yield Finding("gpu", "failed", f"the driver shows {cards[0].name}, but this torch is built without CUDA")
    triton = importlib.util.find_spec("triton") is not None
    yield Finding("triton", "ok" if triton or not cards else "failed", "installed" if triton else "not installed")


def _check_machine() -> Iterator[Finding]:
    yield Finding("cpu", "ok", f"{num_cores()} cores")
    yield Finding("memory", "ok", f"{show_bytes(available_memory_bytes())} available")


def _check_server_libraries() -> Iterator[Finding]:
    missing = [module for module in _SERVE_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        fix = f"`flora serve` needs: pip install '{DISTRIBUTION}[serve]'"
        yield Finding("server libraries", "warning", f"{', '.join(missing)} not installed; {fix}")
    else:
        yield Finding("server libraries", "ok", "all installed")


def _check_home(registry_url: str | None) -> Iterator[Finding]:
    from flora.config import settings
    from flora.registry import Registry

    home = settings().home
    there = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    yield Finding("home", "ok" if writable else "failed", str(home) if writable else f"{there} cannot be written to")
    yield Finding("disk", "ok" if free_bytes >= _LOW_DISK_BYTES else "warning", f"{show_bytes(free_bytes)} free")
    url = registry_url or settings().registry_url or settings().registry_dir
    try:
        with Registry.open(url, create=False) as store:
            versions = sum(entry.num_versions for entry in store.names())
            yield Finding("registry", "ok", f"{url}: {versions} versions")
    except FloraError as error:
        is_new = error.exit_code == 5 and registry_url is None
        yield Finding("registry", "ok" if is_new else "failed", "none yet" if is_new else error.what)


def _check_hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "reached when needed"
    token = "a token is set" if get_token() else "no token: `flora push` needs one (`hf auth login`)"
    yield Finding("hub", "ok", f"{Path(constants.HF_HUB_CACHE)}; {state}; {token}")
