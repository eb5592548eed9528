"""Things made by `object-add` that nodes refer to by id: throttle groups, secrets, TLS credentials.

An object type is one option struct with a `build` method, registered with `@object_options.add`; whoever owns the type
keeps struct and class together (a throttle group lives beside its filter).
"""

import base64
import errno
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from msgspec import Struct

from blockjobs.base.clock import Clock
from blockjobs.base.errors import ParameterError, UsageError, error_text
from blockjobs.base.ids import is_well_formed
from blockjobs.schema.types import Options
from blockjobs.schema.union import OpenUnion

SECRET_BYTES_MAX: Final = 1 << 20  # a passphrase or a key, never a disk given by mistake
_BASE64: Final = re.compile(r"[A-Za-z0-9+/=\n]*")


class ObjectOptions(Options, frozen=True, kw_only=True, tag_field="qom-type"):
    """Creates a user-creatable object; the members are its properties (`object_properties`)."""

    id: str

    def build(self, clock: Clock, objects: Mapping[str, object]) -> object:
        """Make the object. `objects` are those that exist already.

        Raises:
            UsageError: the options contradict each other; nothing was made.
        """
        raise AssertionError(f"{type(self).__name__} cannot be built")


_HOMES: Final = {
    "secret": "blockjobs.block.objects",
    "tls-creds-x509": "blockjobs.block.tls_creds",
    "tls-creds-psk": "blockjobs.block.tls_creds",
    "authz-list": "blockjobs.block.authz",
    "authz-list-file": "blockjobs.block.authz",
    "iothread": "blockjobs.block.iothread",
    "throttle-group": "blockjobs.block.drivers.throttle_group",
}

object_options = OpenUnion("ObjectOptions", base=ObjectOptions, homes=_HOMES)
if TYPE_CHECKING:
    AnyObjectOptions: TypeAlias = ObjectOptions
else:
    AnyObjectOptions = object_options.type


class Objects(dict[str, object]):
    """Objects by id.

    Attributes:
        options: what each one was made from, by id; asked through `object_properties`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, ObjectOptions] = {}

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.options.pop(name, None)


def add_object(objects: dict[str, object], options: ObjectOptions, clock: Clock) -> None:
    """Create an object and enter it under its id.

    Raises:
        UsageError: the id is malformed or taken, or the options are wrong; `objects` is as before.
    """
    if not is_well_formed(options.id):
        raise ParameterError.expects("id", "an identifier")
    if options.id in objects:
        raise UsageError(f"attempt to add duplicate property '{options.id}' to object (type 'container')")
    objects[options.id] = options.build(clock, objects)
    if isinstance(objects, Objects):
        objects.options[options.id] = options


def delete_object(objects: dict[str, object], name: str) -> None:
    """Forget an object; one that has a true `in_use` attribute is kept.

    Raises:
        UsageError: there is none of that id, or a node uses it.
    """
    if name not in objects:
        raise UsageError(f"object '{name}' not found")
    if getattr(objects[name], "in_use", False):
        raise UsageError(f"object '{name}' is in use, can not be deleted")
    del objects[name]


class SecretFormat(StrEnum):
    """How a secret's text stands for its bytes."""

    RAW = "raw"
    BASE64 = "base64"


class Secret(Struct, frozen=True):
    """A password or key; its content stays out of logs."""

    content: bytes

    def __repr__(self) -> str:
        return "Secret(…)"


@object_options.add
class SecretOptions(ObjectOptions, frozen=True, kw_only=True, tag="secret"):
    """A password or key, given in clear or read from a file, or enciphered under another secret (`keyid`)."""

    data: str | None = None
    file: str | None = None
    format: SecretFormat = SecretFormat.RAW
    keyid: str | None = None
    iv: str | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> Secret:
        """See `ObjectOptions.build`. A file is read once, now."""
        del clock
        if self.data is not None and self.file is not None:
            raise UsageError("'file' and 'data' are mutually exclusive")
        if self.file is not None:
            content = _read_secret_file(self.file)
        elif self.data is not None:
            content = self.data.encode()
        else:
            raise UsageError("Either 'file' or 'data' must be provided")
        if self.keyid is not None:
            return Secret(self._deciphered(content, objects))
        return Secret(_decode_base64(content) if self.format is SecretFormat.BASE64 else content)

    def _deciphered(self, content: bytes, objects: Mapping[str, object]) -> bytes:
        """AES-256-CBC under another secret, in base64 if the format says so.

        Raises:
            UsageError: no such key, a wrong one, or an IV that is none.
        """
        assert self.keyid is not None
        key = objects.get(self.keyid)
        if key is None:
            raise UsageError(f"No secret with id '{self.keyid}'")
        if not isinstance(key, Secret):
            raise UsageError(f"Object with id '{self.keyid}' is not a secret")
        if len(key.content) != 32:
            raise UsageError("Key should be 32 bytes in length")
        if self.iv is None:
            raise UsageError("IV is required to decrypt secret")
        iv = _decode_base64(self.iv.encode())
        if len(iv) != 16:
            raise UsageError(f"IV should be 16 bytes in length not {len(iv)}")
        if self.format is SecretFormat.BASE64:
            content = _decode_base64(content)
        return _decipher_secret(key.content, iv, content)


def _decipher_secret(key: bytes, iv: bytes, content: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    if not content or len(content) % 16:
        raise UsageError(f"Length {len(content)} must be a multiple of block size 16")
    plain = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor().update(content)
    padding = plain[-1]
    if not 0 < padding <= 16 or plain[-padding:] != bytes([padding]) * padding:
        raise UsageError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[:-padding]


def _decode_base64(content: bytes) -> bytes:
    """As QEMU does it: line breaks and missing padding are fine, other strange characters are not."""
    text = content.decode("latin-1")
    if not _BASE64.fullmatch(text):
        raise UsageError("Base64 data contains invalid characters")
    digits = text.replace("\n", "").rstrip("=")
    if len(digits) % 4 == 1:
        digits = digits[:-1]
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


def _read_secret_file(path: str) -> bytes:
    try:
        # O_NONBLOCK: a FIFO without a writer must not hang the whole process.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        what = f"Failed to open file “{path}”: {error_text(error.errno or errno.EIO)}"
        raise UsageError(f"Unable to read {path}: {what}") from error
    content = b""
    try:
        while piece := os.read(descriptor, SECRET_BYTES_MAX):
            content += piece
            if len(content) > SECRET_BYTES_MAX:
                raise UsageError(f"Unable to read {path}: a secret has at most {SECRET_BYTES_MAX} bytes")
    except OSError as error:
        what = f"Error reading file “{path}”: {error_text(error.errno or errno.EIO)}"
        raise UsageError(f"Unable to read {path}: {what}") from error
    finally:
        os.close(descriptor)
    return content
