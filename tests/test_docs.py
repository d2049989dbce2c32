"""The documentation: it builds without a warning, keeps up with the code, fetches nothing, and its links hold."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from flora_docs import cli, engines, errors, links, results, server

from flora.cli import main
from flora.registry.formats.compat import judge

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(ROOT)) for page in [*DOCS.glob("*.md"), *DOCS.glob("adr/*.md")])
VERBS = sorted(cli.verbs())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return folder


class _Words(HTMLParser):
    """A page's text, and what it loads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.loads = "", []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.loads.append(told.get("src") or "")
        elif tag == "link" and told.get("rel") != "canonical":
            self.loads.append(told.get("href") or "")


def text_of(page: Path) -> str:
    return " ".join(_Words(page).text.split())


def test_every_page_has_a_place_and_none_loads_anything_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    here = {str(page.relative_to(site)) for page in pages}

    sources = {str(page.relative_to(DOCS).with_suffix(".html")) for page in DOCS.rglob("*.md")}
    assert sources | {"architecture.html", "changelog.html", "contributing.html", "notes.html"} <= here
    assert {page.replace(".md", ".html") for page in cli.pages().values()} <= here
    for page in pages:
        loads = _Words(page).loads
        assert not [address for address in loads if address.startswith(("http:", "https:", "//"))], page
    assert not [page for page in pages if "<!-- flora:" in page.read_text() or "--8<--" in page.read_text()]


def test_the_tutorials_page_has_the_commands_of_the_script_that_is_tested(site):
    script = (ROOT / "examples" / "tutorial.sh").read_text()
    commands = [line.strip() for line in script.splitlines() if line.startswith("flora ")]
    page = text_of(site / "tutorial.html")

    assert len(commands) >= 10
    assert [command for command in commands if command not in page] == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_has_every_flag_of_a_verbs_help_and_its_examples(verb, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    panel = next(panel for panel in cli.pages() if f"## flora {verb}\n" in cli.panel_page(panel))
    section = cli.panel_page(panel).partition(f"## flora {verb}\n")[2].partition("\n## ")[0]

    assert main([*verb.split(), "--help"]) == 0
    shown = capfd.readouterr().out

    flags = set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z][a-z-]+", section))
    examples = [line.strip() for line in shown.partition("Example")[2].splitlines() if line.startswith("   flora ")]
    assert all(example in section for example in examples)
    assert f"\nflora {verb}" in section.partition("```bash")[2] or "| flora" in section


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_and_flag_says_what_it_is(verb):
    silent = [param.opts[0] for param in cli.verbs()[verb].params if not param.help]

    assert silent == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_shell_completes_whatever_names_an_adapter(verb):
    """Wherever a reference is asked for; of a server's, the registry's names are the best guess."""
    named = ("REF", "REF,…") if verb != "diff" else ("A", "B")
    naming = [param for param in cli.verbs()[verb].params if param.metavar in named]

    assert [param.opts[0] for param in naming if not param.type_descriptor.parameter_info.autocompletion] == []


def test_every_error_is_documented_with_its_codes_and_what_to_do():
    page = (DOCS / "errors.md").read_text()
    table = errors.error_table()
    classes = list(errors.classes())

    assert len(classes) == len({each.code for each in classes})
    assert set(errors.meanings()) == {each.code for each in classes}
    for each in classes:
        assert f"| `{each.code}` | {each.exit_code} | {errors.meanings()[each.code]} |" in table
        assert re.search(rf"^\*\*{each.code}\*\*", page, re.MULTILINE), f"docs/errors.md has no advice on {each.code}"
    advised = set(re.findall(r"^\*\*(FL-\w+)\*\*", page, re.MULTILINE))
    assert advised == {each.code for each in classes} | {errors.BUG}
    assert set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE)) >= {str(each.exit_code) for each in classes}


def test_the_table_at_the_top_of_the_errors_is_their_tree():
    tree = re.findall(r"^[ │├└─]*(\w+) +(\d) +(FL-\w+)", errors.errors.__doc__ or "", re.MULTILINE)

    assert tree == [(each.__name__, str(each.exit_code), each.code) for each in errors.classes()]


def test_every_route_and_metric_of_the_server_is_documented(site):
    page = (DOCS / "serving.md").read_text()

    assert len(server.routes()) >= 10
    assert [route for route in server.routes() if f"`{route}`" not in page] == []
    assert len(server.metrics()) >= 20
    assert [name for name in server.metrics() if name not in text_of(site / "serving.html")] == []


def test_every_flag_that_a_page_names_is_a_flag():
    flags = {
        name
        for command in cli.verbs().values()
        for param in command.params
        for name in (*param.opts, *param.secondary_opts)
    }
    foreign = {"--help", "--version", "--install-completion", "--silent", "--fail", "--max-lora-rank", "--enable-lora"}
    for page in PAGES:
        if not page.startswith("docs/adr"):
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text()))
            assert named <= flags | foreign, page


@pytest.mark.parametrize("page", PAGES)
def test_links_hold_for_readers_of_the_repository(page):
    found = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / page).read_text())

    assert [link for link in found if not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_that_a_page_names_exists(page):
    verbs = {verb.split()[0] for verb in VERBS}

    assert set(re.findall(r"(?:`|^ {4})flora ([a-z]+)", (ROOT / page).read_text(), re.MULTILINE)) <= verbs


def test_links_are_rewritten_for_the_site():
    text = "[map](../ARCHITECTURE.md#cli) [why](adr/) [rows](../benchmarks/results/x.jsonl) [there](https://a.b/c.md)"

    assert links.relink(text, "serving.md", ROOT) == (
        "[map](architecture.md#cli) [why](adr/0001-one-package-flora.md) rows [there](https://a.b/c.md)"
    )
    assert links.relink("[notes](benchmarks/NOTES.md)", "architecture.md", ROOT) == "[notes](notes.md)"
    assert links.relink("[page](../extraction.md)", "adr/0001-one-package-flora.md", ROOT) == "[page](../extraction.md)"


def test_engines_are_judged_as_the_command_judges():
    table = engines.engine_table()

    for verdict in judge(engines.kinds()["a rank for each module"]):
        assert f"| {verdict.engine} {verdict.version} |" in table
    assert re.search(r"\| PEFT [\d.]+ \|( yes \|){7}", table)


def test_every_committed_row_stands_on_the_benchmarks_page_with_its_commit():
    sections = results.result_sections(ROOT / "benchmarks" / "results")

    for file in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        if not file.stem.startswith("kernels"):
            section = sections.partition(f"`benchmarks/results/{file.name}`")[2].partition("\n## ")[0]
            rows = [line for line in file.read_text().splitlines() if line.strip()]
            assert len(re.findall(r"^\| ", section, re.MULTILINE)) == len(rows) + 2, file.name  # heading and rule


def test_the_gates_rows_of_adapters_in_fp8_are_told_from_the_others():
    """Their judges have the rounded factors, so their errors answer another question."""
    file = ROOT / "benchmarks" / "results" / "gate.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    narrow = [row for row in rows if row["label"] == "gate/fp8"]

    section = results.result_sections(file.parent).partition("`benchmarks/results/gate.jsonl`")[2].partition("\n## ")[0]

    assert narrow
    assert len(re.findall(r"^\|.*\| float8_e4m3fn \|", section, re.MULTILINE)) == len(narrow)
