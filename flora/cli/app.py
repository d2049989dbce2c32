"""The verbs, and `main`: whatever happens in a command becomes a message and an exit code here.

0 done   1 failed   2 usage   3 a check did not hold   4 auth   5 not found   130 interrupted
"""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer

import flora
from flora.cli.output import SCHEMA_VERSION, note
from flora.errors import FloraError

INTERRUPTED = 130
_CliUsageError: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps its click
_EXTRA_OF_MODULE = dict.fromkeys(
    ("fastapi", "starlette", "uvicorn", "h11", "zmq", "tokenizers", "jinja2", "prometheus_client", "httpx2", "triton"),
    "serve",
) | {"transformers": "hf", "obstore": "s3", "oras": "oci", "psycopg": "postgres", "gguf": "gguf"}


_EPILOG = (
    "Start with [bold]flora demo[/bold]: the whole life of three adapters in under three minutes, offline. "
    "[bold]flora doctor[/bold] says what this machine lacks.\n\n"
    "FLORA_HOME is the folder of everything that Flora keeps, FLORA_REGISTRY_URL another registry, "
    "FLORA_SERVER_URL and FLORA_API_KEY the server to ask; FLORA_DEBUG=1 shows where an error happened.\n\n"
    "Exit codes: 0 done, 1 failed, 2 usage, 3 a check did not hold, 4 authorization, 5 not found, 130 interrupted."
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"flora {flora.__version__}")
        raise typer.Exit


def _flora(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of what is done, on stderr.")] = False,
) -> None:
    """Full fine-tunes to small adapters: extract them, keep them in a registry, serve them all from one base model."""
    if verbose:
        import logging

        from flora.cli.logs import configure_logs

        configure_logs(logging.DEBUG)


def _help_text(verb: Callable[..., None]) -> str:
    """The docstring with each paragraph on one line, for the terminal to wrap."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else " ".join(paragraph.split()) for paragraph in paragraphs
    )


def _first_sentence(text: str) -> str:
    return text.partition("\n")[0].partition(". ")[0].rstrip(".:") + "."


_PANELS: dict[str, dict[str, str]] = {  # verb -> where its function is, in `commands`
    "Make adapters": {
        "extract": "extract.extract",
        "prune": "prune.prune",
        "inspect": "inspection.inspect",
        "verify": "verify.verify",
        "merge": "merge.merge",
        "diff": "diff.diff",
    },
    "Keep them": {
        "ls": "listing.ls",
        "show": "listing.show",
        "search": "finding.search",
        "label": "finding.label",
        "tag": "aliases.tag",
        "promote": "aliases.promote",
        "rollback": "aliases.rollback",
        "rm": "care.rm",
        "gc": "care.gc",
        "fsck": "care.fsck",
    },
    "Exchange them": {
        "import": "exchange.import_",
        "export": "exchange.export",
        "compat": "exchange.compat",
        "push": "remotes.push",
        "pull": "remotes.pull",
    },
    "Serve them": {
        "serve": "serve.serve",
        "run": "client.run",
        "ps": "client.ps",
        "load": "client.load",
        "unload": "client.unload",
    },
    "Try it out": {"demo": "demo.demo", "doctor": "doctor.doctor"},
}
_GROUPS = {  # of verbs, each a file of `commands` -> its panel and its line there
    "registry": ("Keep them", "The registry itself: protection, events, index."),
    "bench": ("Try it out", "Measure serving, and draw it."),
}
_VERBS = {verb for verbs in _PANELS.values() for verb in verbs} | _GROUPS.keys()


def make_app(only: str | None = None) -> typer.Typer:
    """The command line with all its verbs, or with one: a verb's flags cost milliseconds, and there are forty.

    only  a verb; "" for none
    """
    app = typer.Typer(
        name="flora",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EPILOG,
    )
    app.callback()(_flora)
    for panel, verbs in _PANELS.items():
        for name, place in verbs.items():
            if only in (None, name):
                module, _, function = place.partition(".")
                _add(app, name, getattr(_commands(module), function), panel)
    for name, (panel, line) in _GROUPS.items():
        if only in (None, name):
            app.add_typer(_group(name), name=name, help=line, rich_help_panel=panel)
    return app


@cache
def _group(name: str) -> typer.Typer:
    module = _commands(name)
    group: typer.Typer = module.app
    for verb, function in module.VERBS.items():
        _add(group, verb, function)
    return group


def _commands(name: str) -> Any:
    """A file of `commands`."""
    return import_module(f"flora.cli.commands.{name}")


def _add(group: typer.Typer, name: str, verb: Callable[..., None], panel: str | None = None) -> None:
    text = _help_text(verb)
    group.command(name, help=text, short_help=_first_sentence(text), rich_help_panel=panel)(verb)


def _asked(words: Sequence[str]) -> str | None:
    """The verb that a command line runs; "" if it asks for no more than the version, None if that takes all verbs."""
    behind = [word for word in words if word not in ("-v", "--verbose")]
    if behind[:1] == ["--version"]:
        return ""
    return behind[0] if behind and behind[0] in _VERBS else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Nothing is raised."""
    # torch's threads sleep while they wait for each other: spinning, they starve a busy machine tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        code = make_app(_asked(words))(args=words, prog_name="flora", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            note("interrupted")
        return code if isinstance(code, int) else 0
    except FloraError as error:
        return _fail(error, as_json)
    except _CliUsageError as error:
        return _refuse_usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):  # outside of a command, and in an older typer
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
        return 0
    except SystemExit as error:  # typer's own end after a broken pipe
        return error.code if isinstance(error.code, int) else 1
    except ModuleNotFoundError as error:
        return _fail(_missing_module(error), as_json)
    except Exception as error:
        return _fail(_unexpected(error), as_json)


def _fail(error: FloraError, as_json: bool) -> int:
    if _is_debugging():
        traceback.print_exc()
    if as_json:
        told = {"code": error.code, "what": error.what, "cause": error.cause, "fix": error.fix}
        note(json.dumps({"schema_version": SCHEMA_VERSION, "error": told}, ensure_ascii=False))
    else:
        note(str(error))
    return error.exit_code


def _refuse_usage(error: Any, as_json: bool) -> int:
    """A command line that the parser refused, in the same shape as our own errors."""
    from flora.errors import UsageError

    path = error.ctx.command_path if getattr(error, "ctx", None) else "flora"
    message = " ".join(error.format_message().split())
    if not message:  # a group without a verb: typer has printed its help
        return UsageError.exit_code
    return _fail(UsageError(message.rstrip("."), fix=f"`{path} --help` shows what it takes"), as_json)


def _missing_module(error: ModuleNotFoundError) -> FloraError:
    from flora.errors import UsageError

    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF_MODULE.get(module)
    if extra is None:
        return _unexpected(error)
    return UsageError(
        f"this command needs {module}, which is not installed",
        cause=f"it belongs to the extra {extra!r}",
        fix=f"pip install 'flora-adapters[{extra}]'",
    )


def _unexpected(error: Exception) -> FloraError:
    if isinstance(error, OSError) and error.filename is not None:
        return FloraError(f"{error.filename}: {error.strerror}", fix="check that path, its permissions and its disk")
    found = FloraError(
        f"{type(error).__name__}: {error}",
        cause="Flora did not expect this: it is a bug of Flora's, or something of this machine",
        fix="set FLORA_DEBUG=1 to see where it happened, and report it with that",
    )
    found.code = "FL-BUG"
    return found


def _is_debugging() -> bool:
    return os.environ.get("FLORA_DEBUG", "").lower() in ("1", "true", "yes", "on")
