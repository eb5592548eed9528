"""Who may come in: objects that say yes or no to an identity (a certificate's name, as `x509` spells it)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol, runtime_checkable

import msgspec

from blockjobs.base.clock import Clock
from blockjobs.base.errors import UsageError, error_text
from blockjobs.block.objects import ObjectOptions, object_options
from blockjobs.schema.command import convert
from blockjobs.schema.types import Options

RULES_FILE_BYTES_MAX: Final = 1 << 20


@runtime_checkable
class Authorizer(Protocol):
    """Made by `object-add`; asked by servers once they know whom they talk to."""

    def is_allowed(self, identity: str) -> bool:
        """Whether this one may come in."""
        ...


class QAuthZListPolicy(StrEnum):
    """What follows from a match."""

    DENY = "deny"
    ALLOW = "allow"


class QAuthZListFormat(StrEnum):
    """How a rule's `match` is compared: as it is, or with `*` (any text) and `?` (one character)."""

    EXACT = "exact"
    GLOB = "glob"


class QAuthZListRule(Options, frozen=True, kw_only=True):
    """One rule; the first that matches decides."""

    match: str
    policy: QAuthZListPolicy
    format: QAuthZListFormat = QAuthZListFormat.EXACT

    def matches(self, identity: str) -> bool:
        """Whether this rule speaks about `identity`."""
        if self.format is QAuthZListFormat.EXACT:
            return self.match == identity
        return _glob(self.match, identity)


@dataclass(frozen=True, slots=True)
class AuthList:
    """Rules in order, and what holds if none matches."""

    rules: Sequence[QAuthZListRule]
    policy: QAuthZListPolicy

    def is_allowed(self, identity: str) -> bool:
        """See `Authorizer`."""
        decision = next((rule.policy for rule in self.rules if rule.matches(identity)), self.policy)
        return decision is QAuthZListPolicy.ALLOW


@object_options.add
class AuthListOptions(ObjectOptions, frozen=True, kw_only=True, tag="authz-list"):
    """Rules given with the object."""

    policy: QAuthZListPolicy | None = None
    rules: list[QAuthZListRule] | None = None

    def build(self, clock: Clock, objects: Mapping[str, object]) -> AuthList:
        """See `ObjectOptions.build`. Nobody is allowed but by a rule, unless `policy` says otherwise."""
        del clock, objects
        return AuthList(self.rules or (), self.policy or QAuthZListPolicy.DENY)


class _RulesFile(Options, frozen=True, kw_only=True):
    policy: QAuthZListPolicy = QAuthZListPolicy.DENY
    rules: list[QAuthZListRule] = msgspec.field(default_factory=list)


@dataclass(slots=True)
class AuthListFile:
    """Rules from a file; with `refresh` they follow it. A file that became wrong lets nobody in."""

    filename: str
    refresh: bool
    rules: AuthList

    def is_allowed(self, identity: str) -> bool:
        """See `Authorizer`."""
        if self.refresh:
            try:
                self.rules = _read_rules(self.filename)
            except UsageError:
                return False
        return self.rules.is_allowed(identity)


@object_options.add
class AuthListFileOptions(ObjectOptions, frozen=True, kw_only=True, tag="authz-list-file"):
    """Rules in a JSON file: `{"policy": "deny", "rules": [{"match": "CN=a", "policy": "allow"}]}`."""

    filename: str
    refresh: bool = True

    def build(self, clock: Clock, objects: Mapping[str, object]) -> AuthListFile:
        """See `ObjectOptions.build`."""
        del clock, objects
        return AuthListFile(self.filename, self.refresh, _read_rules(self.filename))


def _read_rules(path: str) -> AuthList:
    """The rules a file holds now.

    Raises:
        UsageError: it cannot be read or is no list of rules.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(RULES_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UsageError(f"Unable to read {path}: {error_text(error.errno or 0)}") from error
    if len(content) > RULES_FILE_BYTES_MAX:
        raise UsageError(f"Unable to read {path}: a list of rules has at most {RULES_FILE_BYTES_MAX} bytes")
    try:
        found = convert(json.loads(content), _RulesFile)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"Unable to read {path}: not JSON: {error}") from error
    except UsageError as error:
        raise UsageError(f"Unable to read {path}: {error}") from error
    return AuthList(found.rules, found.policy)


def authorizer(objects: Mapping[str, object], name: str) -> Authorizer | None:
    """The authorisation object of that id; None: there is none, and whoever asks lets nobody in, as QEMU does."""
    found = objects.get(name)
    return found if isinstance(found, Authorizer) else None


def _glob(pattern: str, text: str) -> bool:
    """`*` is any run of characters, `?` one; takes at most len(pattern) * len(text) steps."""
    place = at = 0
    star, retry_at = -1, 0
    while at < len(text):
        if place < len(pattern) and pattern[place] == "*":
            star, retry_at = place, at
            place += 1
        elif place < len(pattern) and pattern[place] in ("?", text[at]):
            place += 1
            at += 1
        elif star >= 0:
            retry_at += 1
            place, at = star + 1, retry_at
        else:
            return False
    return pattern[place:].strip("*") == ""
