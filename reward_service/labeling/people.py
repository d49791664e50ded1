"""Who may come in: invite links, sessions, and what each role may do."""

import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from reward_service.labeling.security import SESSION_S, Keeper, Refusal, Session, new_token, token_hash
from reward_service.preferences.people import Role
from reward_service.preferences.store import PreferenceStore

COOKIE = "rondo_session"
COME_IN = "Open the invite link that you were given; it signs you in. If it does not work any more, ask for a new one."


@dataclass(frozen=True, slots=True, kw_only=True)
class Me:
    """Who is asking."""

    labeler_id: str
    name: str
    role: str
    csrf: str
    session: Session

    @property
    def key(self) -> str:
        """Names the labeler's part of the browser's storage."""
        return hashlib.sha256(self.labeler_id.encode()).hexdigest()[:12]


class Door:
    """Lets people in and out.

    Args:
        store: Knows the labelers.
        keeper: Makes and checks sessions.
        secure: Whether the page is served over https, so that the cookie must be too.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, store: PreferenceStore, keeper: Keeper, *, secure: bool, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._secure = secure
        self._clock = clock
        self._cookie = f"__Host-{COOKIE}" if secure else COOKIE

    def session_of(self, request: Request) -> Session | None:
        """Read the session of a request; the database is not asked."""
        return self._keeper.session(request.cookies.get(self._cookie), now=self._clock())

    def labeler_of(self, request: Request) -> str | None:
        """Say whose session a request belongs to; the database is not asked."""
        session = self.session_of(request)
        return None if session is None else session.labeler_id

    def me(self, request: Request) -> Me:
        """Say who is asking.

        Raises:
            Refusal: 401 for nobody, or for somebody whose link was taken back.
        """
        session = self.session_of(request)
        labeler = None if session is None else self._store.labeler_by_token_hash(session.invite)
        if session is None or labeler is None or labeler.labeler_id != session.labeler_id:
            raise Refusal(401, COME_IN, keep=True)
        return Me(
            labeler_id=labeler.labeler_id,
            name=labeler.display_name,
            role=labeler.role,
            csrf=self._keeper.form_token(session),
            session=session,
        )

    def admin(self, request: Request) -> Me:
        """Say who is asking, and that it is an admin.

        Raises:
            Refusal: 401 for nobody, 403 for a labeler.
        """
        me = self.me(request)
        if me.role != "admin":
            raise Refusal(403, "This page is for admins.")
        return me

    def check_form(self, me: Me, token: str) -> None:
        """Check that a form is of this session's own making.

        Raises:
            Refusal: 403 if not; it goes into the audit.
        """
        try:
            self._keeper.check_form_token(me.session, token)
        except Refusal:
            self.note("form_refused", me.labeler_id)
            raise

    def come_in(self, token: str, answer: Response) -> None:
        """Exchange an invite token for a session.

        Raises:
            Refusal: 401 if nobody has this token.
        """
        invite_hash = token_hash(token)
        labeler = self._store.labeler_by_token_hash(invite_hash)
        if labeler is None:
            self.note("join_refused", None)
            raise Refusal(401, "This invite link is not valid (any more). Ask for a new one.")
        now = self._clock()
        value = self._keeper.open_session(labeler.labeler_id, invite_hash=invite_hash, now=now)
        answer.set_cookie(
            self._cookie, value, max_age=int(SESSION_S), httponly=True, samesite="strict", secure=self._secure, path="/"
        )
        self.note("joined", labeler.labeler_id)

    def leave(self, me: Me, answer: Response) -> None:
        """End a session."""
        self._keeper.end(me.session)
        answer.delete_cookie(self._cookie, httponly=True, samesite="strict", secure=self._secure, path="/")
        self.note("left", me.labeler_id)

    def now(self) -> float:
        """Return the time, in seconds since the epoch."""
        return self._clock()

    def note(self, event: str, labeler_id: str | None, details: Mapping[str, str] | None = None) -> None:
        """Write into the audit."""
        self._store.audit(event, labeler_id=labeler_id, details=dict(details or {}), now=self._clock())


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """A link for somebody. It is the only copy of its token: the store keeps the hash."""

    url: str
    name: str
    role: Role
    is_renewed: bool
    """Whether they had been invited before, so that an older link has stopped working."""


def invite(store: PreferenceStore, name: str, *, role: Role = "labeler", base_url: str) -> Invitation:
    """Invite somebody to the labeling page, or renew the link of whoever has this name already.

    Args:
        store: The run's preference store.
        name: What the admin view calls them; labels carry a pseudonym.
        role: An admin sees the admin view, and may label too. Who was invited before keeps their role.
        base_url: Where the page is reached, such as http://127.0.0.1:8600.
    """
    token, new_id = new_token(), f"p-{secrets.token_hex(6)}"
    found = store.add_labeler(new_id, display_name=name, token_hash=token_hash(token), role=role, now=time.time())
    return Invitation(
        url=f"{base_url.rstrip('/')}/join/{token}",
        name=found.display_name,
        role=found.role,
        is_renewed=found.labeler_id != new_id,
    )
