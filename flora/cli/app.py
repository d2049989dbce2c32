"""The verbs, and `main`: whatever happens in a command becomes a message and an exit code here.

0 done   1 failed   2 usage   3 a check did not hold   4 auth   5 not found   130 interrupted
"""

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

import flora
from flora.cli.commands import (
    aliases,
    bench,
    care,
    client,
    demo,
    diff,
    doctor,
    exchange,
    extract,
    finding,
    inspection,
    listing,
    merge,
    prune,
    registry,
    remotes,
    serve,
    verify,
)
from flora.cli.output import SCHEMA_VERSION, note
from flora.errors import FloraError

INTERRUPTED = 130
_CliUsageError: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps its click
_EXTRA_OF_MODULE = dict.fromkeys(
    ("fastapi", "starlette", "uvicorn", "h11", "zmq", "tokenizers", "jinja2", "prometheus_client", "httpx2", "triton"),
    "serve",
) | {"transformers": "hf", "obstore": "s3", "oras": "oci", "psycopg": "postgres", "gguf": "gguf"}

app = typer.Typer(
    name="flora",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Start with [bold]flora demo[/bold]: the whole life of three adapters in under three minutes, offline. "
        "[bold]flora doctor[/bold] says what this machine lacks.\n\n"
        "FLORA_HOME is the folder of everything that Flora keeps, FLORA_REGISTRY_URL another registry, "
        "FLORA_SERVER_URL and FLORA_API_KEY the server to ask; FLORA_DEBUG=1 shows where an error happened.\n\n"
        "Exit codes: 0 done, 1 failed, 2 usage, 3 a check did not hold, 4 authorization, 5 not found, 130 interrupted."
    ),
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"flora {flora.__version__}")
        raise typer.Exit


@app.callback()
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


_PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Make adapters": {
        "extract": extract.extract,
        "prune": prune.prune,
        "inspect": inspection.inspect,
        "verify": verify.verify,
        "merge": merge.merge,
        "diff": diff.diff,
    },
    "Keep them": {
        "ls": listing.ls,
        "show": listing.show,
        "search": finding.search,
        "label": finding.label,
        "tag": aliases.tag,
        "promote": aliases.promote,
        "rollback": aliases.rollback,
        "rm": care.rm,
        "gc": care.gc,
        "fsck": care.fsck,
    },
    "Exchange them": {
        "import": exchange.import_,
        "export": exchange.export,
        "compat": exchange.compat,
        "push": remotes.push,
        "pull": remotes.pull,
    },
    "Serve them": {
        "serve": serve.serve,
        "run": client.run,
        "ps": client.ps,
        "load": client.load,
        "unload": client.unload,
    },
    "Try it out": {"demo": demo.demo, "doctor": doctor.doctor},
}


def _add(group: typer.Typer, name: str, verb: Callable[..., None], panel: str | None = None) -> None:
    text = _help_text(verb)
    group.command(name, help=text, short_help=_first_sentence(text), rich_help_panel=panel)(verb)


for _panel, _verbs in _PANELS.items():
    for _name, _verb in _verbs.items():
        _add(app, _name, _verb, _panel)
_GROUPS: tuple[tuple[typer.Typer, Mapping[str, Callable[..., None]]], ...] = (
    (bench.app, bench.VERBS),
    (registry.app, registry.VERBS),
)
for _group, _members in _GROUPS:
    for _name, _verb in _members.items():
        _add(_group, _name, _verb)
app.add_typer(
    registry.app, name="registry", help="The registry itself: protection, events, index.", rich_help_panel="Keep them"
)
app.add_typer(bench.app, name="bench", help="Measure serving, and draw it.", rich_help_panel="Try it out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Nothing is raised."""
    # torch's threads sleep while they wait for each other: spinning, they starve a busy machine tenfold
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    try:
        code = app(args=words, prog_name="flora", standalone_mode=False)
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
