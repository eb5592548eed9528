"""The facades to embed: `Host`, and `ImageHost` for programs without jobs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockjobs.host.host import Host
    from blockjobs.host.images import ImageHost

__all__ = ["Host", "ImageHost"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: who only looks at images should not pay for jobs and exports.
    if name == "Host":
        from blockjobs.host.host import Host

        return Host
    if name == "ImageHost":
        from blockjobs.host.images import ImageHost

        return ImageHost
    raise AttributeError(f"module 'blockjobs.host' has no attribute '{name}'")
