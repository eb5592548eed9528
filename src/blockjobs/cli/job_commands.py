"""Commands on the jobs of a server, declared; the work is in the modules that they import when run."""

from collections.abc import Callable

from blockjobs.cli.arguments import AsJson, Connect, Size, Switch


def jobs(*, connect: Connect, json: AsJson = False) -> int:
    """List the jobs.

    Args:
        connect: path of the server's QMP socket, or host:port.
        json: what query-jobs and query-block-jobs say.
    """
    from blockjobs.cli.remote import list_jobs

    return list_jobs(connect, as_json=json)


def watch(job: str | None = None, /, *, connect: Connect, json: AsJson = False) -> int:
    """Show progress until a job, or every job there is, has ended.

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        json: progress and outcomes as JSON, one object a line.
    """
    from blockjobs.cli.watch import watch as follow

    return follow(connect, job, as_json=json)


def cancel(job: str, /, *, connect: Connect, force: Switch = False, json: AsJson = False) -> int:
    """Cancel a job.

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        force: also if it is paused; a mirror that is ready stops in the middle instead of ending well.
        json: what is left of it as JSON.
    """
    from blockjobs.cli.remote import cancel as run_cancel

    return run_cancel(connect, job, force=force, as_json=json)


def speed(job: str, rate: Size, /, *, connect: Connect, json: AsJson = False) -> int:
    """Change the rate limit of a job.

    Args:
        job: its id.
        rate: bytes a second, such as 100M; 0 is no limit.
        connect: path of the server's QMP socket, or host:port.
        json: the job as JSON.
    """
    from blockjobs.cli.remote import set_speed

    return set_speed(connect, job, rate, as_json=json)


def _verb(verb: str, help: str) -> Callable[..., int]:
    def use(job: str, /, *, connect: Connect, json: AsJson = False) -> int:
        from blockjobs.cli.remote import use_verb

        return use_verb(connect, verb, job, as_json=json)

    use.__doc__ = f"""{help}

    Args:
        job: its id.
        connect: path of the server's QMP socket, or host:port.
        json: the job as JSON.
    """
    return use


pause = _verb("pause", "Hold a job at its next checkpoint.")
resume = _verb("resume", "Let a paused job go on.")
complete = _verb("complete", "Ask a ready job to finish.")
finalize = _verb("finalize", "Settle a pending job, and its whole group.")
dismiss = _verb("dismiss", "Forget a concluded job.")


def schema(*, qapi: Switch = False) -> int:
    """Print the schema of our QMP server, as query-qmp-schema answers it.

    Args:
        qapi: instead, the job schema (types, statuses, verbs, commands and the event) as QAPI text.
    """
    from blockjobs.cli.schema import schema as show

    return show(qapi=qapi)
