"""The README's words are run as they stand, and so are the examples."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.models import make_base, make_tuned
from tests.serving import free_port, running_server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def shell_lines() -> list[str]:
    """The commands of the README's shell block, continued lines joined, comments dropped."""
    block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)
    assert block
    joined = block[1].replace("\\\n", " ").splitlines()
    return [re.split(r"\s{2,}# ", line)[0].strip() for line in joined if line.strip()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("readme")
    base = make_base(folder / "BASE")
    return base, make_tuned(base, folder / "TUNED")


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The README's first two lines: the URL of the server that they start, and the environment of more commands."""
    base, tuned = pair
    env = {"FLORA_HOME": str(tmp_path_factory.mktemp("home"))}
    extract, serve, *_ = shell_lines()
    flora(extract, env, BASE=base, TUNED=tuned)
    assert serve == "flora serve"
    with running_server(None, env=env) as url:
        yield url, env


def run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env, timeout=240, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def flora(line: str, env: dict[str, str], **names: str | Path) -> str:
    """Runs a README line that starts with `flora`, its capital words replaced."""
    words = [str(names.get(word, word)) for word in shlex.split(line)]
    assert words[0] == "flora"
    return run([sys.executable, "-m", *words], env).stdout


def test_the_first_screen_names_the_two_commands_that_the_makefile_has():
    first_screen = README[:1500]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert {"demo", "test", "test-long", "lint"} <= set(targets)


def test_the_readmes_commands_work_as_they_stand(served):
    """Extract, serve with no argument, the curl's own body, and a push that only says what it would do."""
    url, env = served
    _, _, curl, push = shell_lines()

    answer = json.loads(run(shlex.split(curl.replace("http://127.0.0.1:8000", url)), env).stdout)
    card = flora(push, env)

    assert answer["model"] == "sql"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")  # it draws: the first token may be the end
    assert answer["usage"]["prompt_tokens"] > 0
    assert "base_model_relation: adapter" in card
    assert "adapter_model.safetensors" in card


def test_every_command_of_the_table_exists(tmp_path):
    listed = set(re.findall(r"`(?:flora )?([a-z]+)(?: [A-Z…]+)*`", README[README.index("## The commands") :]))
    shown = run([sys.executable, "-m", "flora", "--help"], {"FLORA_HOME": str(tmp_path), "COLUMNS": "200"}).stdout

    commands = {word for word in listed if word not in {"model"}}
    assert len(commands) > 15
    assert not {word for word in commands if not re.search(rf"│ {word} ", shown)}


def test_the_example_goes_from_a_base_to_a_served_adapter(pair, tmp_path):
    base, tuned = pair
    script = (ROOT / "examples" / "base_to_served.py").read_text().replace("PORT = 8321", f"PORT = {free_port()}")
    copy = tmp_path / "base_to_served.py"
    copy.write_text(script)

    said = run([sys.executable, str(copy), str(base), str(tuned), "ab"], {"FLORA_HOME": str(tmp_path / "home")}).stdout

    assert "registered as example@v1" in said
    assert re.search(r"^served: .*example", said, re.MULTILINE)
    assert re.search(r"^example: '", said, re.MULTILINE)


def test_the_chat_example_switches_adapters(served):
    url, env = served
    talk = "hi\n/models\n/use sql\nhi\n/use nobody\nhi\n/new\n/quit\n"

    said = run([sys.executable, str(ROOT / "examples" / "chat_switch.py"), url], env, input=talk).stdout

    assert "talking to BASE" in said
    assert "talking to sql" in said
    assert re.search(r"^sql$", said, re.MULTILINE)
    assert re.search(r"^404: ", said, re.MULTILINE)
