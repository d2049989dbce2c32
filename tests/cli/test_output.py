"""What a command prints: data on stdout in four shapes, the rest on stderr; help that is quick and complete."""

import os
import pty
import subprocess
import sys
from importlib.metadata import version

import pytest

import flora as package
from flora.cli.app import make_app
from flora.cli.output import Column, Format, percent, print_table
from flora.cli.progress import _lines
from flora.cli.sizes import parse_bytes, parse_length, show_bytes
from flora.errors import UsageError
from flora.registry import Registry

VERBS = sorted(command.name or "" for command in make_app().registered_commands)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, flora):
    text = " ".join(flora(verb, "--help").out.split())

    assert "Example" in text
    assert f"flora {verb}" in text.partition("Example")[2]


def test_the_first_page_lists_every_verb(flora):
    page = flora("--help").out

    assert all(f" {verb} " in page for verb in VERBS)
    assert flora("-h").out == page


def test_the_version_is_the_packages(flora):
    assert flora("--version").out.strip() == f"flora {package.__version__}"
    assert version("flora-adapters") == package.__version__


def test_a_pipe_gets_tsv_and_a_terminal_a_table(stored, home):
    assert stored("ls").rows[0][0] == "name"

    on_terminal = run_on_terminal(["ls"])

    assert "\t" not in on_terminal
    assert "sql" in on_terminal
    assert "─" in on_terminal


def test_on_a_terminal_extract_tells_what_was_kept_and_what_to_do_next(home, base, tuned):
    said = run_on_terminal(["extract", str(base), str(tuned), "--rank", "8", "--name", "sql"])

    for words in (
        "sql@v1",
        "kept energy",
        "of the whole change",
        "left as in the base",
        "verdict:",
        "next: flora serve",
    ):
        assert words in said


def test_notes_go_to_stderr_and_quiet_has_none(stored):
    loud, quiet = stored("inspect", "sql"), stored("inspect", "sql", "-q")

    assert "keeps" in loud.err
    assert "keeps" not in loud.out
    assert quiet.err == ""
    assert "model.layers.0.mlp.up_proj" in quiet.out.splitlines()


def test_every_json_object_has_a_schema_version(stored):
    for words in (["ls"], ["show", "sql"], ["inspect", "sql"], ["gc", "--dry-run"], ["fsck"], ["doctor"]):
        assert stored(*words, "--json").json["schema_version"] == 1


def test_doctor_finds_nothing_broken_here(stored):
    checks = {row["check"]: row["status"] for row in stored("doctor", "--json").json["checks"]}

    assert checks["torch"] == checks["registry"] == checks["server libraries"] == "ok"


def test_help_is_quick_because_it_imports_little():
    """The imports, not the time: that depends on who else uses the machine."""
    script = (
        "import sys\nfrom flora.cli import main\nassert main(['--help']) == 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    slow = {
        "torch",
        "numpy",
        "transformers",
        "triton",
        "fastapi",
        "sqlalchemy",
        "alembic",
        "pydantic_settings",
        "httpx2",
    }
    assert slow & set(done.stdout.splitlines()[-1].split()) == set()


def imported(*words: str) -> set[str]:
    """The modules that a process of `flora` has imported once it is done."""
    script = "import sys\nfrom flora.cli import main\nassert main() == 0\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_listing_imports_what_it_reads_and_no_more(tmp_path):
    """Half of its time is imports: of other verbs, migrations, the ORM, formats and tables for people it needs none."""
    Registry.open(tmp_path / "r").close()

    modules = imported("ls", "--registry", str(tmp_path / "r"))

    assert {name for name in modules if name.startswith("flora.cli.commands.")} == {"flora.cli.commands.listing"}
    assert not {"sqlalchemy.orm", "sqlalchemy.dialects.postgresql", "flora.registry.formats.peft"} & modules
    assert not {name for name in modules if name.startswith(("flora.registry.remotes", "flora.registry.migrations"))}
    needed = {"flora", "msgspec", "pydantic", "pydantic_core", "rfc8785", "shellingham", "sqlalchemy", "typer"}
    needed |= {"annotated_doc", "annotated_types", "typing_extensions", "typing_inspection", "greenlet"}  # theirs
    strange = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - needed
    assert not {name for name in strange if not name.startswith("_") and name != "cython_runtime"}
    assert len({name for name in modules if name.startswith("flora")}) <= 60


def test_the_version_is_told_without_any_verb():
    assert not {name for name in imported("--version") if name.startswith(("flora.cli.commands.", "pydantic", "rich"))}


@pytest.mark.parametrize("words", [["ls"], ["-v", "show"], ["registry"], ["registry", "events"], ["bench"]])
def test_a_verb_that_is_made_alone_is_helped_as_among_all(flora, capfd, words):
    make_app()(args=[*words, "--help"], prog_name="flora", standalone_mode=False)
    among_all = capfd.readouterr().out

    assert flora(*words, "--help").out == among_all


def test_help_before_a_verb_is_of_them_all(flora):
    assert "extract" in flora("--help", "ls").out


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("100MB", 100_000_000), ("4GiB", 4 << 30), ("1.5k", 1500), ("64 MiB", 64 << 20), ("7b", 7)],
)
def test_sizes_are_read_as_people_write_them(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "MB", "-1", "1e9", "12 parsecs"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_bytes(text)


def test_lengths_count_tokens():
    assert [parse_length(text) for text in ("4096", "4k", "32K")] == [4096, 4096, 32768]
    with pytest.raises(UsageError):
        parse_length("0")


def test_sizes_are_shown_with_three_digits_at_most():
    assert [show_bytes(size) for size in (0, 999, 1000, 3_575_296, 742_000, 5 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "3.6 MB", "742 kB", "5.0 TB"
    ]  # fmt: skip


def test_nothing_that_was_lost_reads_as_all():
    assert [percent(share) for share in (1.0, 0.99999, 0.95, 1e-5, 0.0, None)] == [
        "100.0 %", "> 99.9 %", "95.0 %", "< 0.1 %", "0.0 %", "-"
    ]  # fmt: skip


def test_without_a_terminal_progress_is_a_line_every_few_seconds(capsys):
    clock = iter([0.0, 1.0, 4.9, 5.0, 9.0, 10.5])
    report = _lines("extracting", lambda: next(clock))

    for share in (0.1, 0.2, 0.5, 0.6, 0.9):
        report(share, "at work")

    assert capsys.readouterr().err.splitlines() == ["extracting: 50 %, at work, 5 s", "extracting: 90 %, at work, 10 s"]


def run_on_terminal(words: list[str]) -> str:
    """What a person sees: stdout and stderr of a terminal, 120 columns wide."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flora", *words],
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"COLUMNS": "120", "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's word for the end of a terminal
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.wait(60) == 0, seen
    return seen.decode()


@pytest.mark.parametrize(("length", "is_whole"), [(70, True), (100, False)])
def test_a_name_stays_on_one_line_unless_that_took_more_than_half_of_the_table(capsys, length, is_whole):
    columns = (Column("name", "name", keeps_whole=True), Column("note", "note"))

    print_table(Format.HUMAN, "rows", columns, [{"name": "n" * length, "note": "w " * 200}], id_key="name")

    assert ("n" * length in capsys.readouterr().out) is is_whole
