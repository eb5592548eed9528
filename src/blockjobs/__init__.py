"""QEMU's background jobs for disk images, as a daemon, a command and an asyncio library."""

__version__ = "0.1.0"
