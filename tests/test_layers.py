"""Imports point downwards only (design: five rules in ARCHITECTURE.md)."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "blockjobs"
LAYERS = ("base", "schema wire", "lifecycle block", "jobs export", "host monitor", "daemon cli testing")
ALLOWED_SIDEWAYS = {("monitor", "host"), ("cli", "daemon")}
HOME = re.compile(r"blockjobs(\.[a-z_0-9]+)+(:[a-z_]+)?")
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def part_of(module: str) -> str | None:
    """The layer's package name of a dotted module in blockjobs; None for the package itself."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


def imports() -> Iterator[tuple[str, str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE.parent).with_suffix("")
        importer = part_of(".".join(relative.parts))
        if importer in (None, "__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                assert node.module is not None
                modules = [node.module]
                if node.module == "blockjobs":
                    modules = [f"blockjobs.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and HOME.fullmatch(node.value):
                modules = [node.value.partition(":")[0]]  # loaded when it is wanted (base/homes.py)
                assert importlib.util.find_spec(modules[0]), f"{path}:{node.lineno}: there is no {node.value}"
            for module in modules:
                imported = part_of(module) if module.split(".")[0] == "blockjobs" else None
                if imported is not None:
                    yield importer, imported, f"{path}:{node.lineno}"


def test_every_part_has_a_layer() -> None:
    parts = {entry.stem for entry in SOURCE.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} <= LEVEL.keys()


def test_imports_only_point_down() -> None:
    found = 0
    for importer, imported, where in imports():
        if imported.startswith("_"):
            continue
        found += 1
        down = LEVEL[importer] > LEVEL[imported]
        assert down or importer == imported or (importer, imported) in ALLOWED_SIDEWAYS, (
            f"{where}: {importer} must not import {imported}"
        )
    assert found > 50
