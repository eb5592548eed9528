"""The graph of nodes: names, users and their rights, and everything that must happen all or nothing.

One graph belongs to one event loop. Changes of rights and edges happen between two awaits, so nobody ever sees them
half done; only opening and closing files waits.
"""

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Final

from blockjobs.base.bus import Bus
from blockjobs.base.clock import Clock
from blockjobs.base.entropy import Entropy
from blockjobs.base.errors import BlockjobsError, NodeNotFound, ParameterError, UsageError
from blockjobs.base.ids import NodeNames, is_well_formed
from blockjobs.base.offload import Offload
from blockjobs.base.quiesce import Quiescable
from blockjobs.base.trace import TracePoint
from blockjobs.block import drain
from blockjobs.block.claims import ALL, Perm, Rights
from blockjobs.block.dial import Dial, dial_socket
from blockjobs.block.edges import Edges
from blockjobs.block.edit import Edit
from blockjobs.block.filenames import filename_of
from blockjobs.block.gate import Gate
from blockjobs.block.medium import Medium
from blockjobs.block.node import Node
from blockjobs.block.objects import Objects
from blockjobs.block.opener import Opening
from blockjobs.block.options import NodeOptions
from blockjobs.block.policy import OpenPolicy
from blockjobs.block.rooms import Rooms
from blockjobs.block.settings import Settings
from blockjobs.block.users import Edge, Root
from blockjobs.block.vocabulary import LENGTH_MAX

log = logging.getLogger(__name__)
_trace_close = TracePoint("node_close", "nothing uses a node any more, and it is closed")

NODE_NAME_BYTES_MAX: Final = 31


class Graph(Edges):
    """All nodes of a host.

    Attributes:
        objects: what `object-add` made, by id.
        dial: how drivers reach servers; tests put memory here.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        offload: Offload,
        entropy: Entropy,
        bus: Bus,
        policy: OpenPolicy | None = None,
        objects: dict[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.clock, self.offload, self.entropy, self.bus = clock, offload, entropy, bus
        self.policy = policy or OpenPolicy()
        self.objects = Objects() if objects is None else objects
        self.dial: Dial = dial_socket
        self.rooms = Rooms()
        self._serials = count(1)
        self._nodes: dict[str, Node] = {}
        self._names = NodeNames(entropy)

    # --- looking up

    def __contains__(self, node: Node) -> bool:
        return self._nodes.get(node.name) is node

    def nodes(self) -> list[Node]:
        """All open nodes, newest first."""
        return [node for node in reversed(self._nodes.values()) if node.is_open]

    def node(self, name: str) -> Node:
        """The node of that name.

        Raises:
            NodeNotFound: in the words for a `node-name` argument.
        """
        node = self._nodes.get(name)
        if node is None or not node.is_open:
            raise NodeNotFound(node=name)
        return node

    def find(self, name: str) -> Node:
        """The node that an argument means which takes a device or a node name.

        Raises:
            NodeNotFound: in the words for such an argument.
        """
        node = self._nodes.get(name)
        if node is None or not node.is_open:
            raise NodeNotFound(device=name, node=name)
        return node

    def filename_of(self, node: Node) -> str:
        """See `Node.filename`."""
        return filename_of(node)

    # --- opening and closing

    async def open(self, options: NodeOptions, *, monitor_owned: bool = True, looks_only: bool = False) -> Node:
        """Open a node with its inline children and with the chain that headers name: all or nothing.

        Args:
            options: decoded and checked options.
            monitor_owned: it stays until `remove`; else until its last user goes.
            looks_only: only headers will be asked for: enciphered images open without their key.

        Raises:
            UsageError, IoFailure, ImageCorrupt: nothing is left open, no lock is kept.
        Waits: I/O. Checkpoint: no.
        """
        if options.node_name is None and monitor_owned:
            raise UsageError("'node-name' must be specified for the root node")
        async with Opening(self) as opening:
            node = await opening.open_root(options, base=Settings(looks_only=looks_only))
            node.monitor_owned = monitor_owned
        return node

    async def open_medium(self, medium: Medium, name: str, *, read_only: bool = False, unmap: bool = True) -> Node:
        """Make a `file` node over a medium of one's own, such as a simulated disk.

        Raises:
            UsageError: the name is taken or malformed.
        """
        async with Opening(self) as opening:
            node = opening.adopt_medium(medium, name, Settings(read_only=read_only, unmap=unmap))
            node.monitor_owned = True
        return node

    async def remove(self, name: str) -> None:
        """Delete a node that `open` made (blockdev-del); order and words of the checks: spec/block-layer.md §1.

        Raises:
            UsageError: the node is unknown or in use; nothing changed.
            IoFailure: metadata could not be written; the node is gone nevertheless.
        Waits: I/O. Checkpoint: no.
        """
        node = self._nodes.get(name)
        if node is None or not node.is_open:
            raise UsageError(f"Failed to find node with node-name='{name}'")
        if any(isinstance(parent, Root) and parent.is_backend for parent in node.parents):
            raise UsageError(f"Node {name} is in use")
        node.check_op("drive-del")
        if not node.monitor_owned:
            raise UsageError(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise UsageError(f"Block device {name} is in use")
        node.monitor_owned = False
        await self.close_unused(node)

    async def resize(self, node: Node, length: int) -> None:
        """Change a node's length for a user (block_resize).

        Raises:
            UsageError: the node cannot be resized now, or not to this length; nothing changed.
            IoFailure: the length is as before.
        Waits: for the node's users to park, then I/O. Checkpoint: no.
        """
        if length < 0:
            raise ParameterError.expects("size", "a >0 size")
        if length > LENGTH_MAX:
            raise UsageError(f"offset({length}) exceeds maximum({LENGTH_MAX})")
        node.check_op("resize")
        root = await self.claim("an unnamed block device", node, Perm.RESIZE, ALL)
        try:
            async with self.drained(node):
                await node.resize(length)
        finally:
            await self.release(root)

    async def close(self) -> None:
        """Close every node, users first. Claims that are still held end here.

        Raises:
            IoFailure: metadata of some image could not be written; everything is closed nevertheless.
        Waits: I/O. Checkpoint: no.
        """
        failure: BlockjobsError | None = None
        for node in self.nodes():
            node.monitor_owned = False
            node.parents = [parent for parent in node.parents if isinstance(parent, Edge)]
            self._unsettled.add(node)
        for node in self.nodes():
            try:
                await self.close_unused(node)
            except BlockjobsError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def close_unused(self, *nodes: Node) -> None:
        """Close those of `nodes` that nothing uses any more, and then their children in the same way.

        Raises:
            IoFailure, ImageCorrupt: the first failure; everything unused is closed nevertheless.
        Waits: I/O. Checkpoint: no.
        """
        failure: BlockjobsError | None = None
        pending = list(reversed(nodes))
        while pending:
            node = pending.pop()
            if node.parents or node.monitor_owned or not node.is_open:
                continue
            node.is_open = False  # nobody finds it from here on
            _trace_close(node=node.name)
            try:
                await node.driver.close()
            except BlockjobsError as error:
                log.warning("closing node '%s' failed: %s", node.name, error)
                failure = failure or error
            pending.extend(reversed(self.forget(node)))
        self.refresh_rights()
        await self.tidy()
        if failure is not None:
            raise failure

    # --- entering and leaving, for opener

    def register(self, options: NodeOptions, settings: Settings) -> Node:
        """Enter a node that is about to be opened under its name or a generated one.

        Raises:
            UsageError: the name is malformed, too long or taken.
        """
        name = options.node_name
        if name is None:
            name = self._names.next()
        elif not is_well_formed(name):
            raise UsageError(f"Invalid node-name: '{name}'")
        elif name in self._nodes:
            raise UsageError(f"Duplicate nodes with node-name='{name}'")
        elif len(name.encode()) > NODE_NAME_BYTES_MAX:
            raise UsageError("Node name too long")
        node = Node(self, name, options, settings, serial=next(self._serials))
        self._nodes[name] = node
        return node

    def forget(self, node: Node) -> list[Node]:
        """Take a closed node out of the graph; returns the nodes it used."""
        assert not node.parents and not node.is_open
        below = [self.detach(edge) for edge in list(node.edges.values())]
        del self._nodes[node.name]
        self._unsettled.discard(node)
        return below

    # --- users

    async def claim(
        self,
        owner: str,
        node: Node,
        needs: Perm,
        shares: Perm,
        *,
        user: Quiescable | None = None,
        name: str = "root",
        follows: bool = True,
    ) -> Root:
        """Become a user of `node`.

        Args:
            owner: how messages name the user: `an unnamed block device`, `backup job 'job0'`.
            needs: what the user will do.
            shares: what it lets others do.
            user: asked to be quiet when the node is drained; None if it issues nothing on its own.
            name: `root` for an export or a job's own backend; anything else is a mere hold on the node.
            follows: whether the claim moves to a filter that is inserted above the node.

        Raises:
            PermissionConflict, UsageError: refused; nothing changed.
        Waits: nothing. Checkpoint: no.
        """
        rights, serial = Rights(needs, shares), next(self._serials)
        root = Root(name, node, rights, owner=owner, user=user, follows=follows, serial=serial)
        node.parents.insert(0, root)
        self._unsettled.add(node)
        try:
            self.refresh_rights()
        except UsageError:
            node.parents.remove(root)
            raise
        if node.gate is not None and user is not None:
            node.gate.join(user)
        return root

    async def release(self, root: Root) -> None:
        """Stop using a node; it is closed if nothing else holds it.

        Raises:
            IoFailure, ImageCorrupt: closing failed; the node is gone nevertheless.
        Waits: I/O if the node closes. Checkpoint: no.
        """
        node = self.unclaim(root)
        await self.tidy()
        await self.close_unused(node)

    def unclaim(self, root: Root) -> Node:
        """The part of `release` that takes no time; returns the node. `tidy` and `close_unused` must follow."""
        root.node.parents.remove(root)
        self._unsettled.add(root.node)
        self.refresh_rights()
        return root.node

    async def change_claim(self, root: Root, *, needs: Perm, shares: Perm) -> None:
        """Take or share other rights than before.

        Raises:
            PermissionConflict, UsageError: refused; nothing changed.
        Waits: I/O of drivers that follow the change. Checkpoint: no.
        """
        before, root.rights = root.rights, Rights(needs, shares)
        self._unsettled.add(root.node)
        try:
            self.refresh_rights()
        except UsageError:
            root.rights = before
            raise
        await self.tidy()

    @asynccontextmanager
    async def drained(
        self, node: Node | None = None, *, apart_from: Quiescable | None = None, gate: Gate | None = None
    ) -> AsyncIterator[None]:
        """Nothing is in flight on `node` and all above it (None: anywhere), and no user issues anything new.

        Args:
            node: what is to be at rest.
            apart_from, gate: see `drain.quiesced`.

        Waits: for users to park and requests to end. Checkpoint: no.
        """
        covered: Iterable[Node] = self.nodes() if node is None else drain.with_all_above(node)
        async with drain.quiesced(list(covered), apart_from=apart_from, gate=gate):
            yield

    @asynccontextmanager
    async def edit(self) -> AsyncIterator[Edit]:
        """Change the graph: all or nothing. What is touched stays drained until the end of the block.

        Raises:
            PermissionConflict, UsageError: the result is not allowed; the graph is as before.
        Waits: for drains, and I/O of nodes that are opened or closed. Checkpoint: no.
        """
        async with Edit(self) as edit:
            yield edit

    async def set_read_only(self, node: Node, *, read_only: bool) -> None:
        """Switch an open node, and the children that were described inside it, between read-only and read-write.

        Read-only: everything is in the files before. Read-write: what opening for writing does is done, repairs too.

        Raises:
            PermissionConflict, UsageError: somebody writes, or the file cannot be opened so; nothing changed.
            IoFailure: as above.
        Waits: for the node's users to park, then I/O. Checkpoint: no.
        """
        async with self.edit() as edit:
            await edit.set_read_only(node, read_only=read_only)
