"""`-o` as qemu-img has it."""

import pytest

from blockjobs.base.errors import UsageError
from blockjobs.cli.image_options import parse_options


def test_values_are_read_by_their_kind() -> None:
    texts = ["cluster_size=128K,lazy-refcounts=on", "compat=0.10", "refcount_bits=8,compression_type=zstd,"]
    assert parse_options(texts, "qcow2") == {
        "cluster_size": 131072,
        "lazy_refcounts": True,
        "version": "v2",
        "refcount_bits": 8,
        "compression_type": "zstd",
    }
    assert parse_options(["preallocation=full"], "raw") == {"preallocation": "full"}
    assert parse_options([], "raw") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cluster_size", "needs a value"),
        ("cluster_size=big", "'big' is not a size"),
        ("lazy_refcounts=maybe", "expects on or off"),
        ("compression_type=lzma", "expects one of zlib, zstd"),
        ("compat=2", "expects 0.10"),
        ("refcount_bits=-1", "expects a number"),
        ("colour=red", "qcow2 images have no option 'colour', only "),
    ],
)
def test_mistakes_name_the_option(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as raised:
        parse_options([text], "qcow2")
    assert text.partition("=")[0] in str(raised.value)


def test_options_of_the_other_format_are_refused() -> None:
    with pytest.raises(UsageError, match="raw images have no option 'cluster_size'"):
        parse_options(["cluster_size=64K"], "raw")
