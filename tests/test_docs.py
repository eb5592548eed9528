"""Every snippet in docs/ runs, in order, as a reader would run it; what is made from the code is current."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
PAGES = sorted(path for path in DOCS.rglob("*.md") if "adr" not in path.parts and "reference" not in path.parts)
MARK = "=== end of step"


def steps(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the lines that it is to print."""
    found: list[tuple[str, list[str]]] = []
    for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "python":
            name = re.match(r"# file: (\S+)\n", body)
            target = f"cat > {name[1]}" if name else f"{sys.executable} -"
            found.append((f"{target} <<'END_OF_SNIPPET'\n{body}END_OF_SNIPPET", []))
        if kind != "console":
            continue
        for line in body.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.startswith("> ") and found and not found[-1][1]:
                found[-1] = (f"{found[-1][0]}\n{line[2:]}", [])
            else:
                found[-1][1].append(line)
    return found


@pytest.mark.qemu
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_snippets(page: Path, tmp_path: Path) -> None:
    todo = steps(page)
    if not todo:
        return
    if any("qemu-system" in command for command, _ in todo) and shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no qemu-system-x86_64")
    for name, module in (("blockjobs", "blockjobs"), ("blockjobs-storage-daemon", "blockjobs.daemon")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (tmp_path / name).chmod(0o755)
    script = ["set -eu; PATH=$PWD:$PATH; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for command, _ in todo:
        # Seconds of guessing time for each passphrase are for people who have secrets.
        command = command.replace("encrypt.format=luks", "encrypt.format=luks,encrypt.iter-time=10")
        script += [command, f"echo; echo '{MARK}'"]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, capture_output=True, text=True, timeout=55, check=False
    )
    said = done.stdout.split(f"\n{MARK}\n")
    reached = todo[len(said) - 1][0] if len(said) <= len(todo) else "the end"
    assert done.returncode == 0, f"{reached}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    for (command, expected), output in zip(todo, said, strict=False):
        position = 0
        for line in expected:
            if line == "...":
                continue
            pattern = ".*".join(re.escape(part) for part in line.split("..."))
            match = re.compile(f"^{pattern}$", re.MULTILINE).search(output, position)
            assert match, f"{command}\nwas to print {line!r}, and printed\n{output}"
            position = match.end()


def test_what_is_made_from_the_code_is_current() -> None:
    import generate

    for name, text in generate.pages().items():
        assert (DOCS / name).read_text() == text, f"docs/{name}: run `make docs`"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
