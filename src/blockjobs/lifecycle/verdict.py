"""Where an author's code ends and the life cycle begins again: whatever it raised becomes a failure, or nothing."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Final

from blockjobs.base.errors import JobCancelled
from blockjobs.lifecycle.failure import CANCELED, Failure, failure_of, is_expected
from blockjobs.lifecycle.runner import Runner

_LOG: Final = logging.getLogger(__name__)


async def verdict(runner: Runner, work: Awaitable[None]) -> Failure | None:
    """Await a body or a hook; the only place of the life cycle that catches what authors raise.

    Raises:
        asyncio.CancelledError: the loop is torn down.
    Checkpoint: as `work`. Waits: for `work`.
    """
    try:
        await work
    except JobCancelled:
        return CANCELED
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return CANCELED  # the author awaited something that was cancelled
    except BaseExceptionGroup as errors:
        return _of_group(runner, errors)
    except Exception as error:
        return _failed(runner, error)
    return None


def _of_group(runner: Runner, errors: BaseExceptionGroup[BaseException]) -> Failure:
    """A body that uses a `TaskGroup` raises groups; a cancellation in it that stands alone is just that."""
    others = errors.split(JobCancelled)[1]
    if others is None:
        return CANCELED
    first = _first_of(others)
    if not isinstance(first, Exception):
        raise errors
    return _failed(runner, first)


def _first_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _failed(runner: Runner, error: Exception) -> Failure:
    if not is_expected(error):
        _LOG.error("job '%s' raised", runner.life.key, exc_info=error)
    return failure_of(error)
