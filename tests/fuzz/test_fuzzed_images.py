"""Two thousand spoiled images, and those that once did harm: each costs one line of text at most."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import Bench
from recipes import Mutator, corpus
from side import SideTrial, side_corpus
from trial import Trial, prepare

HERE = Path(__file__).parent
IMAGES = int(os.environ.get("BLOCKJOBS_FUZZ_IMAGES", "2000"))
WORKERS = 2
FIRST = 1_000_000
COMPARED, BY_COMMAND, BY_DAEMON = 60, 4, 60
NAMES_FILES = ("backed", "data-file", "data-file-raw", "luks-inside", "luks")


@pytest.fixture(scope="module")
def bench():
    with Bench() as bench:
        yield bench


@pytest.mark.serial
@pytest.mark.timeout(600)
def test_spoiled_images_do_no_harm():
    each = -(-IMAGES // WORKERS)
    words = [sys.executable, str(HERE / "fuzz.py")]
    workers = [
        subprocess.Popen([*words, str(FIRST + each * index), str(each)], stdout=subprocess.PIPE, text=True)
        for index in range(WORKERS)
    ]
    tried = 0
    for worker in workers:
        output, _ = worker.communicate(timeout=500)
        *found, last = output.splitlines()
        assert not found, "\n".join(found[:5])
        assert worker.returncode == 0
        tried += json.loads(last)["tried"]
    assert tried >= IMAGES


@pytest.mark.parametrize("recipe", corpus(), ids=lambda recipe: f"{recipe.seed}-{recipe.why[:60]}".replace(" ", "-"))
def test_what_once_did_harm_does_no_more(recipe, tmp_path, bench):
    assert not Trial(recipe, tmp_path, bench).run()


@pytest.mark.parametrize("recipe", side_corpus(), ids=lambda recipe: recipe.why[:60].replace(" ", "-"))
def test_bitmap_files_that_once_did_harm_do_no_more(recipe, tmp_path, bench):
    assert not SideTrial(recipe, tmp_path, bench).run()


@pytest.mark.qemu
def test_what_qemu_img_calls_broken_is_not_called_sound(tmp_path, bench):
    numbers = iter(range(FIRST, FIRST + IMAGES))
    compared = broken = 0
    while compared < COMPARED:
        number = next(numbers)
        recipe = Mutator(number).recipe()
        if recipe.seed in NAMES_FILES:
            continue
        trial = Trial(recipe, tmp_path, bench)
        trial.image.write_bytes(trial.raw)
        described = f"driver=qcow2,file.filename={trial.image}"
        theirs = subprocess.run(
            ["qemu-img", "check", "--image-opts", described], capture_output=True, timeout=60, cwd=tmp_path
        )
        trial.run()
        ours = trial.outcomes.get("check")
        compared += 1
        if theirs.returncode in (2, 3):
            broken += 1
            assert isinstance(ours, str) or not ours.is_clean, f"{number}: {recipe.to_json()}\n{theirs.stdout.decode()}"
    assert broken > COMPARED // 10


def _command(words, directory):
    program = [sys.executable, "-c", "from blockjobs.cli.main import run_and_exit; run_and_exit()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=60, cwd=directory)
    assert done.stdout or done.stderr or words[0] == "convert"
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2, 3, 63), done.stderr
    return done


def test_the_command_lives(tmp_path):
    prepare(tmp_path)
    image = tmp_path / "in" / "image"
    for recipe in corpus()[:: max(1, len(corpus()) // BY_COMMAND)]:
        if recipe.seed.startswith("luks"):
            continue
        raw = recipe.build()
        image.write_bytes(raw)
        for words in (["info", "in/image"], ["convert", "in/image", "copy.raw"]):
            _command([words[0], "-f", "qcow2", *words[1:]], tmp_path)
        assert image.read_bytes() == raw
        _command(["check", "-f", "qcow2", "-r", "all", "in/image"], tmp_path)


def test_the_daemon_lives(tmp_path):
    """One daemon opens them all, and answers after each."""
    import player

    prepare(tmp_path)
    image = tmp_path / "in" / "image"
    probe = {"execute": "query-named-block-nodes", "arguments": {"flat": True}}
    with player.Daemon(player.OURS, tmp_path) as daemon:
        for number in range(FIRST, FIRST + BY_DAEMON):
            recipe = Mutator(number).recipe()
            image.write_bytes(recipe.build())
            node = {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": str(image)}}
            reply = daemon.qmp.ask({"execute": "blockdev-add", "arguments": node}, wait_s=20)[0]
            assert "return" in reply or reply["error"]["class"] == "GenericError"
            if "return" in reply:
                daemon.qmp.ask({"execute": "blockdev-del", "arguments": {"node-name": "n"}}, wait_s=20)
            assert daemon.qmp.ask(probe, wait_s=20)[0] == {"return": []}, recipe.to_json()
        assert "Traceback" not in daemon.stderr
