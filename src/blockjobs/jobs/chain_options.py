"""The arguments of `block-stream` and `block-commit` (spec/jobs.md §1, §2)."""

from typing import Annotated

from blockjobs.lifecycle.error_policy import OnError
from blockjobs.schema.types import Options, features


class BlockStream(Options, frozen=True, kw_only=True):
    """Arguments of `block-stream`.

    Attributes:
        job_id: default is the device's name, which a node does not have.
        device: the image that becomes independent, by device or node name.
        base: file name of the image that stays below it.
        base_node: the same by node name.
        bottom: the last image to take from; what is below stays, even if it changes.
        backing_file: what the image's header is to call its new backing file.
        backing_mask_protocol: write `raw` as its format if it has none (QEMU 9.0).
        speed: bytes per second, 0 for no limit.
    """

    job_id: str | None = None
    device: str
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool | None = None
    bottom: str | None = None
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


class BlockCommit(Options, frozen=True, kw_only=True):
    """Arguments of `block-commit`.

    Attributes:
        job_id: default is the device's name, which a node does not have.
        device: the root of the chain, by device or node name.
        base_node: the image that takes everything in; the lowest by default.
        base: the same by file name.
        top_node: the uppermost image that is merged; the device by default.
        top: the same by file name.
        backing_file: what the headers of the images above are to call their new backing file.
        backing_mask_protocol: write `raw` as its format if it has none (QEMU 9.0).
        speed: bytes per second, 0 for no limit.
    """

    job_id: str | None = None
    device: str
    base_node: str | None = None
    base: Annotated[str | None, features("deprecated")] = None
    top_node: str | None = None
    top: Annotated[str | None, features("deprecated")] = None
    backing_file: str | None = None
    backing_mask_protocol: bool | None = None
    speed: int = 0
    on_error: OnError = OnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True
