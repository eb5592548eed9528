"""An image that is handed over: another program writes to it, and we go on afterwards."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.block.activity import set_active
from blockjobs.block.kept_info import node_info
from blockjobs.host import Host


def qemu_io(path: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = ["qemu-io", "-f", "qcow2", "-c", command, str(path)]
    return subprocess.run(words, check=False, capture_output=True, text=True)


@pytest.mark.qemu
@pytest.mark.parametrize("from_the_start", [False, True])
def test_another_program_has_it_meanwhile(tmp_path: Path, from_the_start: bool) -> None:
    path = tmp_path / "i.qcow2"

    async def run() -> None:
        async with Host() as host:
            await host.create_image(str(path), "qcow2", 1 << 20)
            file = {"driver": "file", "filename": str(path)}
            options = {"driver": "qcow2", "node-name": "n", "file": file, "active": not from_the_start}
            node = await host.blockdev_add(options)
            if not from_the_start:
                async with host.access(node, write=True) as root:
                    assert "lock" in qemu_io(path, "write 0 1k").stderr
                    await root.node.write(0, b"ours" * 1024)
                    with pytest.raises(UsageError, match="cannot support read-write users"):
                        await set_active(host.graph, "n", False)
                await set_active(host.graph, "n", False)
            assert (await node_info(node)).active is False
            assert (await node_info(node)).ro is True
            assert "wrote 4096" in qemu_io(path, "write -P 9 4k 4k").stdout
            with pytest.raises(UsageError):
                async with host.access(node, write=True):
                    pass
            await set_active(host.graph, None, True)
            assert (await node_info(node)).active is True
            async with host.access(node, write=True) as root:
                assert await root.node.read(4096, 4096) == b"\t" * 4096
                await root.node.write(8192, b"again")
            await set_active(host.graph, "n", True)
            with pytest.raises(UsageError, match="Failed to find node with node-name='nope'"):
                await set_active(host.graph, "nope", True)

    asyncio.run(run())
    assert subprocess.run(["qemu-img", "check", "-q", str(path)], check=False).returncode == 0
