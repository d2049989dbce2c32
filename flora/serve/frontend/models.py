"""A request's `model` to what answers it: the base, or one adapter version with its chat template and end tokens.

The registry is asked on every request, so an alias that moved or a new version counts at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flora.errors import AdapterNotFound, BaseMismatch, NameInvalid, UsageError
from flora.identity import BaseRecord
from flora.names import Reference, parse_reference
from flora.registry import Entry, Registry, Version
from flora.serve.frontend.carried import Carried, base_end_tokens
from flora.serve.frontend.template import base_template
from flora.serve.frontend.tokenizer import Tokenizer
from flora.serve.frontend.work_threads import WorkThreads
from flora.serve.request import AdapterTarget

_MAX_NICKNAMES = 4096


@dataclass(frozen=True, slots=True)
class Served:
    """What answers a request."""

    template: str | None
    end_tokens: tuple[int, ...]
    version: Version | None = None  # None: the base
    target: AdapterTarget | None = None


class Models:
    """The models of one server: its base, and every adapter of the registry that belongs to that base."""

    def __init__(
        self,
        registry: Registry,
        *,
        base_name: str,
        base_id: str,
        base_folder: Path,
        tokenizer: Tokenizer,
        merged: AdapterTarget | None = None,
        allow_base_mismatch: bool = False,
    ) -> None:
        """merged  the adapter that is in the engine's weights: then it is the only model
        allow_base_mismatch  leave it to the engine, which records what it serves on other weights
        Raises AdapterNotFound.
        """
        self.base_name = base_name
        self.base_id = base_id
        self.merged = merged
        self._allow_base_mismatch = allow_base_mismatch
        self._registry = registry
        self._base = Served(base_template(base_folder), base_end_tokens(base_folder, tokenizer))
        self._carried = Carried(registry)
        self._nicknames: dict[str, Reference] = {}
        self._merged = self._serve_merged(merged) if merged else None
        self._threads = WorkThreads(4, "registry")  # it reads files: never on the event loop

    @property
    def default_name(self) -> str:
        """What answers a request that names no model."""
        return self.merged.label if self.merged else self.base_name

    async def resolve(self, model: str | None) -> Served:
        """What `model` names: the base, `reference`, `base:reference`, or a name given by `nickname`.

        Raises AdapterNotFound (also for what is no reference at all), BaseMismatch, StoreError.
        """
        if self._merged is not None:
            return await self._resolve_merged(self._merged, model)
        if model is None or model == self.base_name:
            return self._base
        reference = self._reference(model)
        return await self._threads.run(lambda: self._serve(reference, label=model))

    async def nickname(self, name: str, reference: str) -> Served:
        """Let `name` stand for the adapter that `reference` means, on this server until it ends.

        Raises NameInvalid, and what `resolve` raises.
        """
        if self.merged is not None:
            raise NameInvalid(
                f"this server serves {self.merged.label} merged into its base, and loads no other adapter",
                fix="start it without --merge",
                param="lora_name",
            )
        if name == reference:
            return await self.resolve(name)
        if not (_is_reference(name) and _is_reference(reference)):
            raise NameInvalid(
                "lora_path must be a registry reference, and lora_name a name of that kind",
                fix="import a folder with `flora import` first, then give NAME, NAME:ALIAS or NAME@vN",
                param="lora_path",
            )
        wanted = parse_reference(reference)
        served = await self._threads.run(lambda: self._serve(wanted, label=name))
        known = await self._threads.run(lambda: self._find(name))
        if served.version == known:
            return served
        if known is not None or name == self.base_name:
            raise NameInvalid(
                f"{name} is {known.ref if known else 'the base'} already",
                fix="choose another lora_name, or move the registry's alias with `flora tag`",
                param="lora_name",
            )
        if len(self._nicknames) >= _MAX_NICKNAMES:
            raise NameInvalid(f"{_MAX_NICKNAMES} names are given already", fix="unload some", param="lora_name")
        self._nicknames[name] = wanted
        return served

    def forget_nickname(self, name: str) -> None:
        self._nicknames.pop(name, None)

    async def page(self, *, after: str | None, limit: int) -> tuple[list[Entry], bool]:
        """Up to `limit` of this base's adapters after the name `after`, in order; and whether there are more.

        None where an adapter is merged: no other is served.
        """
        if self.merged is not None:
            return [], False
        return await self._threads.run(lambda: self._page(after, limit))

    def close(self) -> None:
        self._threads.close()

    def _reference(self, model: str) -> Reference:
        if nickname := self._nicknames.get(model):
            return nickname
        text = model.removeprefix(f"{self.base_name}:")
        try:
            return parse_reference(text)
        except NameInvalid as error:
            raise AdapterNotFound(
                "this server has no model of that name", cause="it is not an adapter reference", fix=error.fix
            ) from error

    def _serve(self, reference: Reference, label: str) -> Served:
        version = self._registry.resolve(reference)
        self._check_base(version)
        target = AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=label[:200])
        return replace(self._served(version), target=target)

    def _served(self, version: Version) -> Served:
        """The version with its own template and end tokens where it has some, else with the base's."""
        carried = self._carried.by(version)
        return Served(
            template=carried.template or self._base.template,
            end_tokens=self._base.end_tokens if carried.end_tokens is None else carried.end_tokens,
            version=version,
        )

    def _serve_merged(self, merged: AdapterTarget) -> Served:
        """No target: to the engine its rows are the base's."""
        version = self._registry.by_digest(merged.version_digest)
        return replace(self._served(version), target=None)

    async def _resolve_merged(self, merged: Served, model: str | None) -> Served:
        """The one model of this server, by the name that it was given, or any other that means the same weights."""
        if model in (None, self.default_name):
            return merged
        assert merged.version is not None
        refused = AdapterNotFound(
            f"this server serves {self.default_name} only, merged into its base",
            fix=f"ask for {self.default_name}, or a server without --merge",
        )
        if model == self.base_name:
            raise refused
        reference = self._reference(model)
        version = await self._threads.run(lambda: self._registry.resolve(reference))
        if version.serving_digest != merged.version.serving_digest:
            raise refused
        return merged

    def _find(self, name: str) -> Version | None:
        try:
            return self._registry.resolve(name)
        except AdapterNotFound:
            return None

    def _check_base(self, version: Version) -> None:
        """Refuses what the engine would refuse, before anything is loaded. Another base will do if the tensors that the
        adapter touches are the same; where the registry does not know them, the engine decides.
        """
        if version.base_id in (None, self.base_id) or self._allow_base_mismatch:
            return
        served = self._registry.base_record(self.base_id)
        if served is None:
            return
        if not _has_its_tensors(served, self._registry, version):
            raise BaseMismatch(
                f"{version.ref} belongs to another base, {version.base_name}",
                cause=f"this server runs {self.base_name}",
                fix="serve that base, or extract the adapter from a checkpoint tuned from this one",
                base_id=version.base_id,
            )

    def _page(self, after: str | None, limit: int) -> tuple[list[Entry], bool]:
        found: list[Entry] = []
        last = after or ""
        while len(found) <= limit:
            entries = self._registry.names(limit=limit + 1, after=last)
            found += [entry for entry in entries if self._is_listed(entry)]
            if len(entries) <= limit:
                break
            last = entries[-1].name
        return found[:limit], len(found) > limit

    def _is_listed(self, entry: Entry) -> bool:
        """One that was added under the base's name since the start cannot be asked: the name means the base."""
        return entry.version.base_id in (None, self.base_id) and entry.name != self.base_name


def check_base_name(
    registry: Registry, base_name: str, preload: Sequence[str], record: Callable[[], BaseRecord] | None = None
) -> None:
    """Refuses a name of the base that hides an adapter, and adapters to load that are the base. Raises UsageError.

    record  of the base, asked for where an adapter has its name: one of another base could not be served, so nothing
            hides it, as in `flora serve TUNED` after `flora extract BASE TUNED`. None: any adapter may be served
    """
    if base_name in preload:
        raise UsageError(
            f"{base_name} is the base, which is no adapter to load",
            cause="the base is always loaded",
            fix="leave it out of --preload",
        )
    try:
        hidden = registry.resolve(base_name)
    except (AdapterNotFound, NameInvalid):
        return
    if record is not None and hidden.base_id is not None:
        served = record()
        if hidden.base_id != str(served.base_id) and not _has_its_tensors(served, registry, hidden):
            return
    raise UsageError(
        f"the base is to be served as {base_name}, and the registry has an adapter of that name, {hidden.ref}",
        cause="whoever asks for the adapter would get the base",
        fix="serve the base under another name: --base-name NAME",
    )


def _has_its_tensors(served: BaseRecord, registry: Registry, version: Version) -> bool:
    """Whether the base has, byte for byte, the tensors that the version says it changes."""
    hashes, touched = served.hashes(), registry.header(version).base.touched
    return bool(touched) and all(hashes.get(name) == sha256 for name, sha256 in touched.items())


def _is_reference(text: str) -> bool:
    try:
        parse_reference(text)
    except NameInvalid:
        return False
    return True
