"""The command `blockjobs`: runs the command line, and turns every error into one line and an exit code."""

import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from blockjobs import __version__
from blockjobs.base.collector import relax_collector
from blockjobs.base.errors import BlockjobsError, IoFailure
from blockjobs.cli.objects import OBJECTS, without_objects

TRACEBACK_VARIABLE: Final = "BLOCKJOBS_TRACEBACK"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on standard error.

    Args:
        words: without the program's name; the process's own by default.
    """
    words, objects = without_objects(sys.argv[1:] if words is None else words)
    OBJECTS.set(objects)
    if words == ["--version"]:  # sooner than the library for command lines is loaded
        print(__version__)
        return 0
    from cyclopts.exceptions import CycloptsError

    from blockjobs.cli.arguments import explain

    # 1 says "different" there.
    failed = 2 if words[:1] == ["compare"] else 1
    try:
        code = _run(words)
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(explain(error, words), failed)
    except IoFailure as error:
        return _fail(f"{error.where}: {error}" if error.where else str(error), failed)
    except BlockjobsError as error:
        return _fail(str(error), failed)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failed
    except OSError as error:
        where = f"'{error.filename}': " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", failed)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # a bug: one line for people, all of it for us
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return _fail(f"internal error, please report it ({what}; {TRACEBACK_VARIABLE}=1 shows more)", failed)
    return code if isinstance(code, int) else 0


def _run(words: Sequence[str]) -> object:
    """Parse and run; options that are cut short are told when the parser meets them, which is before anything runs.

    Returns what the command returned. Raises what it raises, and CycloptsError.
    """
    from cyclopts.exceptions import UnknownOptionError

    from blockjobs.cli.app import WORDS, app, whole_app

    while True:
        WORDS.set(tuple(words))
        chosen = whole_app() if not words or words[0] in ("--help", "-h") else app
        try:
            return chosen(words, exit_on_error=False, print_error=False, result_action="return_value")
        except UnknownOptionError as error:
            from blockjobs.cli.abbreviations import spelled_out

            whole = spelled_out(words, error)
            if whole is None:
                raise
        words, objects = without_objects(whole)
        OBJECTS.set((*OBJECTS.get(), *objects))


def run_and_exit() -> NoReturn:
    """The program: as `main`, and the process ends.

    At once: all that was opened is closed, workers have ended, and what the interpreter would do besides, which is to
    take apart some hundred modules, is a seventh of the time of a small command.
    """
    relax_collector()
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # the caller may have closed it
                stream.flush()
        except OSError:
            code = code or 1  # `main` has said it
    os._exit(code)


def _fail(text: str, code: int) -> int:
    print(f"blockjobs: {text}", file=sys.stderr)
    return code
