"""`-o key=value,...`: options for new images, named as qemu-img names them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from blockjobs.base.errors import UsageError
from blockjobs.base.units import parse_size

_SWITCH: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_COMPAT: Final = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}


def _switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError("expects on or off")
    return _SWITCH[text.lower()]


def _compat(text: str) -> str:
    if text not in _COMPAT:
        raise ValueError("expects 0.10 (v2) or 1.1 (v3)")
    return _COMPAT[text]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("expects a number")
    return int(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def pick(text: str) -> str:
        if text not in words:
            raise ValueError(f"expects one of {', '.join(words)}")
        return text

    return pick


_FILE: Final[dict[str, Callable[[str], Any]]] = {
    "preallocation": _one_of("off", "falloc", "full"),
    "nocow": _switch,
    "extent_size_hint": parse_size,
}
_QCOW2: dict[str, Callable[[str], Any]] = {
    "cluster_size": parse_size,
    "compat": _compat,
    "compression_type": _one_of("zlib", "zstd"),
    "extended_l2": _switch,
    "lazy_refcounts": _switch,
    "preallocation": _one_of("off", "metadata", "falloc", "full"),
    "refcount_bits": _count,
    "data_file_raw": _switch,
    "data_file": str,
    "backing_file": str,
    "backing_fmt": str,
}
_CIPHER: Final[dict[str, Callable[[str], Any]]] = {
    "key-secret": str,
    "cipher-alg": str,
    "cipher-mode": str,
    "ivgen-alg": str,
    "ivgen-hash-alg": str,
    "hash-alg": str,
    "iter-time": _count,
}
_QCOW2 |= {f"encrypt.{name}": reader for name, reader in _CIPHER.items()}
_QCOW2 |= {"encrypt.format": _one_of("aes", "luks"), "encryption": _switch}
_OLD_ENCRYPTION: Final = "qcow"
"""What QMP calls the format that is `aes` here."""
_LUKS: Final[dict[str, Callable[[str], Any]]] = {
    **{name.replace("-", "_"): reader for name, reader in _CIPHER.items()},
    "preallocation": _one_of("off", "metadata", "falloc", "full"),
}
_KNOWN: Final = {"qcow2": _QCOW2, "raw": _FILE, "luks": _LUKS}
_SLOT: Final[dict[str, Callable[[str], Any]]] = {
    "state": _one_of("active", "inactive"),
    "new-secret": str,
    "old-secret": str,
    "keyslot": _count,
    "iter-time": _count,
}
AMENDABLE: Final[dict[str, Callable[[str], Any]]] = {
    "backing_file": str,
    "backing_fmt": str,
    "compat": _compat,
    "data_file": str,
    "data_file_raw": _switch,
    "lazy_refcounts": _switch,
    "refcount_bits": _count,
    "size": parse_size,
    **{f"encrypt.{name}": reader for name, reader in _SLOT.items()},
}
"""What can be changed of a qcow2 image."""
AMENDABLE_LUKS: Final = {name.replace("-", "_"): reader for name, reader in _SLOT.items()}
"""What can be changed of a luks image."""


def wants_help(options: Iterable[str]) -> bool:
    """Whether `-o help` was said: what there is, instead of doing it."""
    return any(item in ("help", "?") for text in options for item in text.split(","))


def readers_for(format: str) -> Mapping[str, Callable[[str], Any]]:
    """The options of new images of a format, and what reads their values."""
    return _KNOWN[format]


def option_lines(known: Mapping[str, Callable[[str], Any]]) -> list[str]:
    """The options that there are and the type of their values, one a line."""
    types: dict[Callable[[str], Any], str] = {parse_size: "size", _switch: "bool (on/off)", _count: "num"}
    return [f"  {name}=<{types.get(reader, 'str')}>" for name, reader in sorted(known.items())]


def parse_options(
    texts: Iterable[str],
    format: str,
    *,
    known: Mapping[str, Callable[[str], Any]] | None = None,
    what: str = "create",
) -> dict[str, Any]:
    """Read the values of all `-o` into arguments for `Host.create_image`, or `Host.amend`.

    Args:
        known: readers of the options that there are; by default those for new images.
        what: the command, for messages.

    Raises:
        UsageError: an option that the format does not have, or a value that it does not take.
    """
    known = _KNOWN[format] if known is None else known
    members: dict[str, Any] = {}
    for item in (item for text in texts for item in text.split(",") if item):
        name, equals, value = item.partition("=")
        name = name.strip() if name.strip() in known else name.strip().replace("-", "_")
        reader = known.get(name)
        if reader is None:
            if what != "create":
                hint = "\nThis option is only supported for image creation" if name in _KNOWN[format] else ""
                raise UsageError(f"Invalid parameter '{name}'{hint}")
            raise UsageError(f"-o: {format} images have no option '{name}', only {', '.join(sorted(known))}")
        if not equals:
            raise UsageError(f"-o: '{name}' needs a value ({name}=...)")
        try:
            read = reader(value)
        except ValueError as error:
            reason = str(error)
            raise UsageError(f"-o {name}={value}: {reason}") from error
        if name.startswith("encrypt."):
            members.setdefault("encrypt", {})[name.removeprefix("encrypt.")] = read
        else:
            members["version" if name == "compat" else name] = read
    _name_encryption(members)
    return members


def _name_encryption(members: dict[str, Any]) -> None:
    """`encryption=on` is short for the old kind, whose name is another in QMP. Raises UsageError: said twice."""
    encrypt = members.get("encrypt", {})
    if members.pop("encryption", False):
        if "format" in encrypt:
            raise UsageError("-o: 'encrypt.format' and its alias 'encryption' can't be used at the same time")
        encrypt["format"] = "aes"
    if encrypt:
        members["encrypt"] = encrypt
    if encrypt.get("format") == "aes":
        encrypt["format"] = _OLD_ENCRYPTION


def data_file_as_node(members: dict[str, Any]) -> dict[str, Any]:
    """The same options, a data file's name as the node that `blockdev-create` wants."""
    name = members.get("data_file")
    return members if name is None else {**members, "data_file": {"driver": "file", "filename": name}}
