"""Tokens: what a caller presents, what the file keeps of it, and which role and tenant it stands for.

The file is TOML with one `[[token]]` table each. It holds the SHA-256 of a token and never the token. A
token carries the id of its entry, so that one entry is found and one digest is compared, in constant time;
slow hashes are for passwords, and would only let strangers make a server work.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import tomlkit
from tomlkit.exceptions import TOMLKitError

from service.files import TomlError, parse_toml
from service.security.files import SecretFileError, locked, read_private, replace_private
from service.security.roles import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

PREFIX: Final = "timernn_"
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_TOKEN: Final = re.compile(r"timernn_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
# Fields that stand for one token: by its name it is revoked, and the log tells it from others.
_UNIQUE: Final = ("id", "name", "sha256", "certificate")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# Compared with where there is no entry, so that a wrong id takes as long as a wrong secret.
_NO_DIGEST: Final = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True, slots=True)
class Token:
    """An entry of the file.

    Attributes:
        id: Names the entry; 12 hexadecimal digits, part of the token and no secret.
        name: For the log and for people.
        tenant: Whose models and sessions it reaches.
        role: What it may do.
        digest: The SHA-256 of the token, 64 hexadecimal digits.
        created: When it was made, UTC.
        expires: When it ends, UTC; None: never.
        certificate: A subject alternative name: a client certificate with it, signed by the authority of
            --tls-client-ca, stands for the token. None: only the token itself does.
    """

    id: str
    name: str
    tenant: str
    role: Role
    digest: str
    created: datetime
    expires: datetime | None = None
    certificate: str | None = None

    def has_expired(self, now: datetime) -> bool:
        """Return whether its time is over."""
        return self.expires is not None and now >= self.expires


class TokenSet:
    """The entries of a file at one moment."""

    def __init__(self, tokens: Mapping[str, Token] | None = None) -> None:
        """Keep entries by id."""
        self._tokens = dict(tokens or {})
        self._certificates = {one.certificate: one for one in self if one.certificate}

    def __iter__(self) -> Iterator[Token]:
        """Go through the entries in the file's order."""
        return iter(self._tokens.values())

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._tokens)

    def get(self, token_id: str) -> Token | None:
        """Return the entry of an id."""
        return self._tokens.get(token_id)

    def of_certificate(self, names: Iterable[str]) -> Token | None:
        """Return the entry that names a certificate by one of its subject alternative names."""
        return next(
            (self._certificates[name] for name in names if name in self._certificates), None
        )

    def find(self, presented: str) -> Token | None:
        """Return the entry of a token; None when there is none, whatever is wrong with it.

        An expired one is returned: its caller says so in the log, and nothing of it to the client.
        """
        form = _TOKEN.fullmatch(presented)
        entry = self._tokens.get(form[1]) if form else None
        digest = hashlib.sha256(presented.encode(errors="replace")).hexdigest()
        is_right = hmac.compare_digest(digest, entry.digest if entry else _NO_DIGEST)
        return entry if is_right else None


def read_tokens(path: Path) -> TokenSet:
    """Read a file of tokens.

    Raises:
        SecretFileError: If it cannot be read, others may read it, or an entry is not valid.
    """
    return parse_tokens(read_private(path), str(path))


def parse_tokens(text: str, source: str) -> TokenSet:
    """Read the text of a file of tokens.

    Args:
        text: TOML.
        source: What errors call it.

    Raises:
        SecretFileError: If an entry is not valid; never with what a field holds.
    """
    try:
        document = parse_toml(text.encode(), is_secret=True)
    except TomlError as error:
        raise SecretFileError(f"{source}: {error}") from None
    unknown = sorted(set(document) - {"token"})
    if unknown:
        raise SecretFileError(f"{source}: expected [[token]] tables only, got {unknown[0]!r}")
    entries = document.get("token", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SecretFileError(f"{source}: expected each token as a [[token]] table")
    tokens: dict[str, Token] = {}
    taken: dict[tuple[str, Any], int] = {}
    for number, entry in enumerate(entries, 1):
        token = _entry(entry, f"{source}: token {number}")
        for field in _UNIQUE:
            other = taken.setdefault((field, entry.get(field)), number)
            if field in entry and other != number:
                text = f"{source}: token {number}: {field}: token {other} has the same one"
                raise SecretFileError(text)
        tokens[token.id] = token
    return TokenSet(tokens)


def create_token(
    path: Path, role: Role, tenant: str, *, name: str, expires: datetime | None
) -> tuple[str, Token]:
    """Add a token to a file, which is made if there is none; return the token and its entry.

    The token itself is kept nowhere.

    Raises:
        SecretFileError: If the file cannot be read or replaced.
        ValueError: If the name or the tenant is not valid.
    """
    check_name("tenant", tenant)
    token_id = secrets.token_hex(_ID_BYTES)
    name = name or f"{tenant}-{role.value}-{token_id[:4]}"
    check_name("name", name)
    presented = f"{PREFIX}{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    digest = hashlib.sha256(presented.encode()).hexdigest()
    token = Token(token_id, name, tenant, role, digest, _now(), expires)
    with locked(path):
        document = _document(path)
        if any(entry.get("name") == name for entry in document["token"]):
            raise ValueError(f"name: there is a token {name!r} already")
        document["token"].append(_table(token))
        replace_private(path, tomlkit.dumps(document))
    return presented, token


def revoke_tokens(path: Path, *, token_id: str = "", name: str = "", presented: str = "") -> Token:
    """Take one token out of a file, by its id, by its name or by itself; return its entry.

    Raises:
        SecretFileError: If the file cannot be read or replaced.
        LookupError: If there is no such token.
    """
    with locked(path):
        tokens = read_tokens(path)
        if presented:
            found = tokens.find(presented)
        else:
            found = next((one for one in tokens if token_id == one.id or name == one.name), None)
        if found is None:
            raise LookupError(f"{path} has no such token")
        document = _document(path)
        for index, entry in enumerate(document["token"]):
            if entry["id"] == found.id:
                del document["token"][index]
                break
        replace_private(path, tomlkit.dumps(document))
    return found


def check_name(field: str, text: str) -> None:
    """Check the name of a token or a tenant.

    Raises:
        ValueError: If it is not one.
    """
    if not _NAME.fullmatch(text):
        expected = "1 to 63 of letters, digits, . _ @ -, and a letter or digit first"
        raise ValueError(f"{field}: expected {expected}, got {text[:64]!r}")


def _entry(entry: Mapping[str, Any], source: str) -> Token:
    expected = {"id", "name", "tenant", "role", "sha256", "created"}
    missing, unknown = (
        sorted(expected - set(entry)),
        sorted(set(entry) - expected - {"expires", "certificate"}),
    )
    if missing or unknown:
        wrong = f"{missing[0]!r} is missing" if missing else f"{unknown[0]!r} is not known"
        raise SecretFileError(f"{source}: {wrong}")
    names = [role.value for role in Role]
    forms = {
        "id": (re.compile(rf"[0-9a-f]{{{2 * _ID_BYTES}}}"), f"{2 * _ID_BYTES} hexadecimal digits"),
        "name": (_NAME, "a name"),
        "tenant": (_NAME, "a name"),
        "role": (re.compile("|".join(names)), f"one of {', '.join(names)}"),
        "sha256": (_DIGEST, "64 hexadecimal digits"),
    }
    for field, (form, text) in forms.items():
        if not (isinstance(entry[field], str) and form.fullmatch(entry[field])):
            raise SecretFileError(f"{source}: {field}: expected {text}")
    times = {field: entry.get(field) for field in ("created", "expires") if field in entry}
    for field, moment in times.items():
        if not (isinstance(moment, datetime) and moment.tzinfo):
            raise SecretFileError(
                f"{source}: {field}: expected a time such as 2030-01-31T00:00:00Z"
            )
    return Token(
        entry["id"],
        entry["name"],
        entry["tenant"],
        Role(entry["role"]),
        entry["sha256"],
        entry["created"],
        entry.get("expires"),
        _certificate(entry, source),
    )


def _certificate(entry: Mapping[str, Any], source: str) -> str | None:
    name = entry.get("certificate")
    if name is None or (isinstance(name, str) and name):
        return name
    raise SecretFileError(f"{source}: certificate: expected a subject alternative name")


def _document(path: Path) -> tomlkit.TOMLDocument:
    """Return the file's text as it stands, comments included, to be changed; or an empty one."""
    if not path.exists():
        document = tomlkit.document()
        document.add(tomlkit.comment("Tokens of timernn; change them by `timernn tokens`."))
        document.add(tomlkit.nl())
    else:
        text = read_private(path)
        parse_tokens(text, str(path))  # what is not valid is not written again
        try:
            document = tomlkit.parse(text)
        except TOMLKitError as error:
            raise SecretFileError(f"{path}: not valid TOML") from error
    if not document.get("token"):
        document.pop("token", None)  # `token = []`, as the last one leaves it, takes no table
        document.add("token", tomlkit.aot())
    return document


def _table(token: Token) -> tomlkit.items.Table:
    table = tomlkit.table()
    table.update(
        {
            "id": token.id,
            "name": token.name,
            "tenant": token.tenant,
            "role": token.role.value,
            "sha256": token.digest,
            "created": token.created,
        }
    )
    if token.expires is not None:
        table["expires"] = token.expires
    return table


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
