"""The permission solver against the definition: every user's needs lie within every other user's shares."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockjobs.base.errors import PermissionConflict, UsageError
from blockjobs.block.claims import ALL, CHANGES, NONE, Perm, Rights, solve

perms = st.integers(0, 15).map(Perm)
rights = st.tuples(perms, perms).map(lambda pair: Rights(*pair))


@dataclass(eq=False)
class FakeClaim:
    holder: str
    rights: Rights
    is_edge: bool


@dataclass(eq=False)
class FakeNode:
    """A vertex whose driver takes `extra` on each child and withholds `kept`."""

    name: str
    read_only: bool
    extra: Perm
    kept: Perm
    claims: list[FakeClaim] = field(default_factory=list)
    below: dict[str, tuple["FakeNode", FakeClaim]] = field(default_factory=dict)
    refusal_to_write: str = "Block node is read-only"

    def child_rights(self, edge: str, needs: Perm, shares: Perm) -> Rights:
        return Rights(needs | self.extra, shares & ~self.kept)


@st.composite
def graphs(draw: st.DrawFn) -> list[FakeNode]:
    count = draw(st.integers(1, 6))
    nodes = [
        FakeNode(f"n{index}", draw(st.booleans()), draw(st.one_of(st.just(NONE), perms)), draw(st.just(NONE) | perms))
        for index in range(count)
    ]
    for upper in range(count):
        for lower in range(upper + 1, count):
            if draw(st.booleans()):
                claim = FakeClaim(f"n{upper}->n{lower}", Rights(NONE, ALL), True)
                nodes[upper].below[f"c{lower}"] = nodes[lower], claim
                nodes[lower].claims.append(claim)
    for index in draw(st.lists(st.integers(0, count - 1), max_size=4)):
        nodes[index].claims.append(FakeClaim(f"root{index}", draw(rights), False))
    return draw(st.permutations(nodes))


def by_definition(nodes: list[FakeNode]) -> tuple[dict[FakeNode, Rights], bool]:
    """Sums of rights (iterated to a fixed point) and whether they are allowed."""
    current = {claim: claim.rights for node in nodes for claim in node.claims if not claim.is_edge}
    for node in nodes:
        for _, claim in node.below.values():
            current[claim] = Rights(NONE, ALL)
    sums: dict[FakeNode, Rights] = {}
    for _ in nodes:
        for node in nodes:
            needs, shares = NONE, ALL
            for claim in node.claims:
                needs, shares = needs | current[claim].needs, shares & current[claim].shares
            sums[node] = Rights(needs, shares)
            for edge, (_child, claim) in node.below.items():
                current[claim] = node.child_rights(edge, needs, shares)
    allowed = all(
        current[a].needs & ~current[b].shares == NONE
        for node in nodes
        for a in node.claims
        for b in node.claims
        if a is not b
    ) and not any(node.read_only and sums[node].needs & CHANGES for node in nodes)
    return sums, allowed


@given(graphs())
@settings(max_examples=150)
def test_solver_agrees_with_the_definition(nodes: list[FakeNode]) -> None:
    sums, allowed = by_definition(nodes)
    before = [claim.rights for node in nodes for claim in node.claims]
    try:
        solution = solve(nodes)
    except UsageError:
        assert not allowed
    else:
        assert allowed
        assert solution.nodes == sums
    assert before == [claim.rights for node in nodes for claim in node.claims]  # pure


@given(graphs(), st.data())
@settings(max_examples=100)
def test_looking_only_below_a_change_is_enough(nodes: list[FakeNode], data: st.DataObject) -> None:
    """Settle a graph, change one root, solve from there: as good as solving everything."""
    try:
        before = solve(nodes)
    except UsageError:
        return
    for claim, settled in before.claims.items():
        assert isinstance(claim, FakeClaim)
        claim.rights = settled
    node = data.draw(st.sampled_from(nodes))
    node.claims.append(FakeClaim("new", data.draw(rights), False))
    try:
        wanted = solve(nodes)
    except UsageError:
        with pytest.raises(UsageError):
            solve([node])
    else:
        partial = solve([node])
        assert {**before.nodes, **partial.nodes} == wanted.nodes
        assert {**before.claims, **partial.claims} == wanted.claims


def test_the_text_names_both_users() -> None:
    node = FakeNode("f", False, NONE, NONE)
    node.claims = [
        FakeClaim("node 'a2' (uses node 'f' as 'file' child)", Rights(ALL, Perm.CONSISTENT_READ), False),
        FakeClaim("node 'a' (uses node 'f' as 'file' child)", Rights(Perm.WRITE | Perm.RESIZE, ALL), False),
    ]
    with pytest.raises(PermissionConflict) as caught:
        solve([node])
    assert str(caught.value) == (
        "Permission conflict on node 'f': permissions 'write, resize' are both required by node 'a' (uses node 'f' as "
        "'file' child) and unshared by node 'a2' (uses node 'f' as 'file' child)."
    )
