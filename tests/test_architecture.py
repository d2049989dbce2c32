"""The house, drawn from the real imports: arrows go one way, and some things are absent on purpose."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flora"
ROOMS = ("cli", "demo", "bench", "algebra", "extract", "serve", "kernels", "registry")
ALLOWED = {  # room -> the rooms it may import; "core" is every file directly under flora/
    "core": set(),
    "kernels": set(),
    "registry": {"core"},
    "extract": {"core", "registry"},
    "algebra": {"core", "extract"},
    "serve": {"core", "registry", "kernels"},
    "bench": {"core", "registry", "serve"},
    "demo": {"core", "registry", "serve", "extract"},
    "cli": {"core", "registry", "serve", "extract", "algebra", "demo", "bench"},
}
FRONT_END = ("serve/api", "serve/frontend", "serve/launch.py", "serve/request.py", "serve/messages.py")
ASKS_TRANSFORMERS = (
    "algebra/likeness.py",  # `flora verify --prompts`, with the extra `hf`
    "tree.py",  # of models whose tree transformers renames, and of convolutions: asked where it is there
)
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a file, or "core" for one directly under flora/."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 and parts[0] in ROOMS else "core"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `top_level`, only those that importing it runs."""
    nodes = importing_nodes(tree_of(path)) if top_level else ast.walk(tree_of(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importing_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside functions and `if TYPE_CHECKING` blocks."""
    for child in ast.iter_child_nodes(tree):
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_function or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            continue
        yield child
        yield from importing_nodes(child)


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "flora" and len(parts) > 1:
            rooms.add(parts[1] if parts[1] in ROOMS else "core")
    return rooms - {room_of(path)}


def test_the_schedule_is_integers_only():
    """No torch, no numpy, no clock, and nothing of the engine around it."""
    allowed = ("flora.serve.engine.schedule", "flora.serve.request", "flora.errors")
    foreign = {
        f"{path.name} -> {name}"
        for path in (PACKAGE / "serve/engine/schedule").glob("*.py")
        for name in imports(path)
        if name.split(".")[0] in ("torch", "numpy", "time", "asyncio", "threading")
        or (name.startswith("flora.") and not name.startswith(allowed))
    }

    assert not foreign


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_arrows(room):
    crossings = {
        f"{path.relative_to(ROOT)} -> {target}"
        for path in FILES
        if room_of(path) == room and path.name != "__main__.py"
        for target in imported_rooms(path) - ALLOWED[room] - {"core" if room != "kernels" else ""}
    }

    assert not crossings


def test_every_room_is_in_the_picture():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}

    assert folders == set(ROOMS)


def test_kernels_import_nothing_of_ours():
    assert not {name for path in FILES if room_of(path) == "kernels" for name in imported_rooms(path)}


def test_front_ends_import_no_torch():
    front_end = [path for path in FILES if str(path.relative_to(PACKAGE)).startswith(FRONT_END)]
    assert front_end

    offenders = [str(path) for path in front_end for name in imports(path) if name.split(".")[0] in ("torch", "triton")]

    assert not offenders


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["ls"]])
def test_short_commands_import_no_torch(command, tmp_path):
    script = (
        "import sys\n"
        "from flora.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "loaded = sorted({'torch', 'transformers', 'triton', 'fastapi'} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"FLORA_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )

    assert done.returncode == 0, done.stderr


def test_serving_and_plain_extraction_never_import_transformers():
    judges = ("transformers", "peft", "diffusers")
    ours = [path for path in FILES if str(path.relative_to(PACKAGE)) not in ASKS_TRANSFORMERS]

    assert not [str(path) for path in ours for name in imports(path) if name.split(".")[0] in judges]


def test_nothing_unpickles_evaluates_or_asks_a_shell():
    forbidden = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "os.system", "yaml.load"}
    found = []
    for path in FILES:
        if path.name == "unpickle.py":  # `flora extract --allow-pickle`: the next test
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                has_shell = any(word.arg == "shell" for word in node.keywords)
                if ast.unparse(node.func) in forbidden or has_shell:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
        found += [f"{path}: {name}" for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "shelve")]

    assert not found


def test_pickles_are_read_in_one_place_by_weights_only_which_the_command_line_alone_starts():
    path = PACKAGE / "unpickle.py"
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == "torch.load"]
    users = {str(path.relative_to(PACKAGE)) for path in FILES if "flora.unpickle" in set(imports(path))}

    assert len(loads) == 1
    assert "weights_only=True" in [ast.unparse(word) for word in loads[0].keywords]
    assert not [node for node in calls if ast.unparse(node.func) in ("pickle.load", "pickle.loads", "eval", "exec")]
    assert users == {"cli/extraction.py"}


def test_only_the_command_line_prints():
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if room_of(path) != "cli"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert not printing


def test_one_file_makes_paths_from_digests():
    """`registry/store.py`; elsewhere a digest is never joined to a path, but for the hash cache's own file names."""
    joins = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and "digest" in ast.unparse(node.right)
    }

    assert joins <= {"registry/store.py", "identity.py"}


def test_the_project_names_no_path_of_the_machines_that_built_it():
    tops = [path for path in ROOT.iterdir() if path.name not in {".venv", ".git", ".device"}]
    files = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file()]
    ours = [path for path in files if path.suffix in {".py", ".md", ".toml", ".txt"}]
    shared, work = "../" + "shared", "/" + "work/"

    assert not [str(path) for path in ours if shared in path.read_text() or work in path.read_text()]


def test_the_map_has_a_line_for_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text()

    missing = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if path.name not in ("__init__.py", "env.py") and f"`{path.relative_to(PACKAGE)}`" not in text
    ]

    assert not missing
