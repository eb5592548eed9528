"""House rules that a reader would otherwise have to police: sizes, banned calls, names, marks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "blockjobs"
MODULES = sorted(SOURCE.rglob("*.py"))
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
BANNED_NAMES = ("util", "utils", "helper", "helpers", "manager", "misc", "common")
PORTS = {"base/clock.py", "base/offload.py", "base/entropy.py"}
BANNED_EVERYWHERE = {"asyncio.create_task", "asyncio.ensure_future", "asyncio.gather", "asyncio.get_event_loop"}
BANNED_OUTSIDE_PORTS = {"time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.sleep", "os.urandom"}
BANNED_MODULES_OUTSIDE_PORTS = {"random", "threading", "concurrent.futures", "secrets"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_is_small_and_well_named(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MODULE_LINES_MAX, "split it: a module tells one story"
    assert path.stem not in BANNED_NAMES
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"
    if text.strip() and path.stem != "__init__":
        assert ast.get_docstring(tree), "a module says in its first line what its story is"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_banned_calls(path: Path) -> None:
    name = name_of(path)
    tree = ast.parse(path.read_text())
    for called, line in calls(tree):
        assert called not in BANNED_EVERYWHERE, f"{name}:{line} {called}"
        if called == "print":
            assert name.startswith(("cli/", "daemon/")), f"{name}:{line} print"
        if name not in PORTS and not name.startswith(("cli/", "testing/")):
            assert called not in BANNED_OUTSIDE_PORTS, f"{name}:{line} {called}: use a port of base/"
        assert called not in ("eval", "exec", "pickle.loads", "os.system"), f"{name}:{line} {called}"
    if name in PORTS or name.startswith(("cli/", "testing/")):
        return
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            imported = [node.module]
        assert not BANNED_MODULES_OUTSIDE_PORTS.intersection(imported), f"{name}:{node.lineno}"


def test_broad_excepts_are_counted() -> None:
    """Nothing is swallowed: each `except Exception` is listed here with its reason."""
    reasons = {
        "base/offload.py": "what work raises in a worker is carried to the waiter, which raises it",
        "lifecycle/verdict.py": "a job's own failure ends the job, not the engine",
        "lifecycle/context.py": "what an interruptible wait raises is carried to the body, which raises it",
        "lifecycle/window.py": "what I/O in flight raises is carried to the body, which raises it",
        "monitor/session.py": "a command's bug is one client's error, not the daemon's end",
    }
    found: dict[str, int] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else "bare"
                if caught in ("Exception", "BaseException", "bare") and not _reraises(node):
                    found[name_of(path)] = found.get(name_of(path), 0) + 1
    assert found.keys() <= reasons.keys(), found.keys() - reasons.keys()


def _reraises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def test_test_modules_have_names_of_their_own() -> None:
    """Two of one name in different folders cannot be collected together."""
    seen: dict[str, Path] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if path.name not in ("conftest.py", "__init__.py"):
            assert path.name not in seen, f"{path} and {seen[path.name]}"
            seen[path.name] = path


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    for path in MODULES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not marks.search(line), f"{name_of(path)}:{number}: {line.strip()}"


def test_no_dead_modules() -> None:
    """Every module is imported by another one, or is an entry point."""
    entries = {"daemon.main", "daemon.__main__", "cli.main", "__main__", "cli.demo", "cli.__main__"}
    everything = "\n".join(
        path.read_text() for folder in (SOURCE, ROOT / "tests", ROOT / "bench") for path in folder.rglob("*.py")
    )
    for path in MODULES:
        dotted = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if path.stem == "__init__" or dotted in entries:
            continue
        parent, _, stem = dotted.rpartition(".")
        package = "blockjobs" + (f".{parent}" if parent else "")
        used = re.search(rf"blockjobs\.{re.escape(dotted)}\b", everything) or re.search(
            rf"from {re.escape(package)} import (\([^)]*|[^\n]*)\b{stem}\b", everything
        )
        assert used, f"{dotted} is imported by nobody"
