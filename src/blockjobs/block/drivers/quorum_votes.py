"""Counting votes: what most children of a quorum say (spec/block-layer.md §2). No I/O here."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from blockjobs.base.errors import IoFailure
from blockjobs.base.span import Span
from blockjobs.schema.command import Event, event

SECTOR = 512


class QuorumOpType(StrEnum):
    """What a child did wrong."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"


@event("QUORUM_FAILURE", since="2.0")
class QuorumFailure(Event, frozen=True, kw_only=True):
    """Too few children agree, so a request failed.

    Attributes:
        reference: the node of the quorum.
        sector_num: where the request began, in sectors of 512 bytes.
        sectors_count: how many it touched.
    """

    reference: str
    sector_num: int
    sectors_count: int


@event("QUORUM_REPORT_BAD", since="2.0")
class QuorumReportBad(Event, frozen=True, kw_only=True):
    """A child failed, or says something else than the majority.

    Attributes:
        type: what it was asked to do.
        error: why it failed; absent if it answered.
        node_name: the child.
        sector_num: where the request began, in sectors of 512 bytes.
        sectors_count: how many it touched.
    """

    type: QuorumOpType
    error: str | None = None
    node_name: str
    sector_num: int
    sectors_count: int


def sectors_of(span: Span) -> tuple[int, int]:
    """First sector of a run, and how many it touches."""
    first = span.at // SECTOR
    return first, -(-span.end // SECTOR) - first


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a vote on content.

    Attributes:
        content: what won.
        losers: edges of the children that said something else.
    """

    content: bytearray
    losers: Sequence[str]


def judge(ballots: Mapping[str, bytearray], threshold: int) -> Verdict | None:
    """What at least `threshold` children say, by edge; None if nothing gets so many votes. Ties go to the later one."""
    versions: list[tuple[bytearray, list[str]]] = []
    for edge, content in ballots.items():
        voters = next((voters for version, voters in versions if version == content), None)
        if voters is None:
            versions.append((content, [edge]))
        else:
            voters.append(edge)
    content, winners = max(reversed(versions), key=lambda version: len(version[1]))
    if len(winners) < threshold:
        return None
    return Verdict(content, [edge for edge in ballots if edge not in winners])


def commonest(failures: Iterable[IoFailure]) -> IoFailure:
    """The failure that most children had; ties go to the later one."""
    found = list(failures)
    counts = Counter(failure.errno for failure in found)
    return max(reversed(found), key=lambda failure: counts[failure.errno])
