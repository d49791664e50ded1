"""Who is asking: invite tokens, sessions, and the seals that tie a form to its session and its task.

Everything that the page hands out is sealed with one secret,

    seal(purpose, parts) = HMAC-SHA256(secret, JSON [purpose, parts])

so that a request can be checked without a table of open sessions.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UserError

TOKEN_BYTES = 24
"""192 bits: nobody guesses an invite token, so a plain hash of it is enough at rest."""
SESSION_S = 14 * 24 * 3600.0


class Refusal(Exception):
    """A request that is refused, with what the person who made it is told.

    Args:
        status: The HTTP status.
        message: One or two plain sentences.
        retry_after_s: When the same request may pass.
        keep: Whether the page should keep the answer and try again later.
    """

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None, keep: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s
        self.keep = keep


def new_token() -> str:
    """Make the secret part of an invite link."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_hash(token: str) -> str:
    """Hash an invite token; the hash is all that is kept of it."""
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Somebody who came through an invite link."""

    labeler_id: str
    started_at: int
    nonce: str
    invite: str
    """The invite token's hash, by which the store finds the labeler: a new link ends the sessions of the old one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """The name of one showing of one task, in the page's form.

    It is the label's id as well, so that a repeated submit is the same label. It tells nothing about the task.
    """

    label_id: str
    shown_at_ms: int


class SecretFile:
    """The secret behind all seals, and the sessions that ended before their time.

    Args:
        path: A file that only its owner may read: the secret, then a line for each ended session. None keeps all of it
            in memory; then a restart ends all sessions.

    Raises:
        UserError: If the file is readable for others, or is not what this class writes.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._ended: dict[str, int] = {}
        self.secret = secrets.token_bytes(32) if path is None else self._load(path)

    def is_ended(self, session: Session) -> bool:
        """Tell whether somebody signed out of this session."""
        return session.nonce in self._ended

    def end(self, session: Session) -> None:
        """Remember that a session ended; its cookie opens nothing any more, not even after a restart."""
        if session.nonce in self._ended:
            return
        self._ended[session.nonce] = session.started_at
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{session.nonce} {session.started_at}\n")
                file.flush()
                os.fsync(file.fileno())

    def _load(self, path: Path) -> bytes:
        made = _create(path)
        if made is not None:
            return bytes.fromhex(made)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise UserError(
                "the labeling page's secret can be read by others",
                where=str(path),
                next_step=f"chmod 600 {path}, or delete it: a new one is made, and labelers open their links again",
            )
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            nonce, started_at = line.split()
            self._ended[nonce] = int(started_at)
        return bytes.fromhex(first)


def _create(path: Path) -> str | None:
    """Create the file with a new secret, readable by its owner alone; return None if it is there already."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    secret = secrets.token_hex(32)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(secret + "\n")
    return secret


class Keeper:
    """Hands out and checks sessions, form tokens and tickets.

    Args:
        secret_file: The secret, and the sessions that ended.
    """

    def __init__(self, secret_file: SecretFile) -> None:
        self._file = secret_file

    def open_session(self, labeler_id: str, *, invite_hash: str, now: float) -> str:
        """Return the cookie of a new session."""
        fields = [labeler_id, int(now), secrets.token_hex(12), invite_hash]
        return ".".join([*map(str, fields), self._seal("session", *fields)])

    def session(self, cookie: str | None, *, now: float) -> Session | None:
        """Read a session cookie.

        Returns:
            The session, or None if the cookie is missing, forged, too old or signed out.
        """
        parts = (cookie or "").rsplit(".", 4)
        if len(parts) != 5 or not (parts[1].isascii() and parts[1].isdigit()):
            return None
        labeler_id, started_at, nonce, invite, seal = parts
        session = Session(labeler_id=labeler_id, started_at=int(started_at), nonce=nonce, invite=invite)
        genuine = hmac.compare_digest(
            seal.encode(), self._seal("session", labeler_id, session.started_at, nonce, invite).encode()
        )
        if not genuine or now - session.started_at > SESSION_S or self._file.is_ended(session):
            return None
        return session

    def end(self, session: Session) -> None:
        """End a session for good."""
        self._file.end(session)

    def form_token(self, session: Session) -> str:
        """Return the token that every form of this session carries."""
        return self._seal("form", session.labeler_id, session.nonce)

    def check_form_token(self, session: Session, token: str) -> None:
        """Check that a form came from a page of this very session.

        Raises:
            Refusal: 403 if it did not.
        """
        if not hmac.compare_digest(token.encode(), self.form_token(session).encode()):
            raise Refusal(
                403, "This form belongs to another session. Load the page again, then repeat what you did.", keep=True
            )

    def ticket(self, labeler_id: str, *, showing: str, shown_at: float) -> tuple[str, str]:
        """Make the ticket of one showing of a task to one labeler.

        Args:
            labeler_id: Who sees it.
            showing: What makes this showing what it is: the lease's token, or the label that is corrected.
            shown_at: Seconds since the epoch.

        Returns:
            The ticket, and the label id in it.
        """
        label_id = self.label_id(labeler_id, showing=showing)
        shown_at_ms = round(shown_at * 1000)
        return f"{label_id}.{shown_at_ms}.{self._seal('ticket', labeler_id, label_id, shown_at_ms)}", label_id

    def label_id(self, labeler_id: str, *, showing: str) -> str:
        """Derive the label id of one showing: the same every time, so that a repeated submit is one label."""
        return self._seal("label", labeler_id, showing)[:24]

    def read_ticket(self, ticket: str, *, labeler_id: str) -> Ticket:
        """Check a ticket that came back.

        Raises:
            Refusal: 403 if it was not given to this labeler.
        """
        parts = ticket.split(".")
        if len(parts) == 3 and parts[1].isascii() and parts[1].isdigit():
            found = Ticket(label_id=parts[0], shown_at_ms=int(parts[1]))
            seal = self._seal("ticket", labeler_id, found.label_id, found.shown_at_ms)
            if hmac.compare_digest(parts[2].encode(), seal.encode()):
                return found
        raise Refusal(403, "This task was not given to you.")

    def _seal(self, purpose: str, *parts: object) -> str:
        return hmac.new(self._file.secret, json.dumps([purpose, *parts]).encode(), hashlib.sha256).hexdigest()
