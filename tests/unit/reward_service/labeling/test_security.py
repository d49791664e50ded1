"""Seals: what was not handed out to this labeler, in this session, with this secret, opens nothing."""

from pathlib import Path

import pytest

from protocol.errors import UserError
from reward_service.labeling.security import SESSION_S, Keeper, Refusal, SecretFile, new_token


def test_sessions_end_with_time_secret_and_leave(tmp_path: Path) -> None:
    keeper = Keeper(SecretFile(tmp_path / "secret"))
    cookie = keeper.open_session("p.1", invite_hash="abc", now=1000.0)
    session = keeper.session(cookie, now=1000.0 + SESSION_S)
    assert session is not None
    assert (session.labeler_id, session.invite) == ("p.1", "abc")
    assert keeper.session(cookie, now=1001.0 + SESSION_S) is None
    assert keeper.session(cookie.replace("p.1", "p.2"), now=1000.0) is None
    assert keeper.session(cookie.replace(".1000.", ".9000."), now=1000.0) is None
    assert all(keeper.session(strange, now=0.0) is None for strange in (None, "", "a.b.c.d.e", "é.1.2.3.é", "a.²..."))
    assert Keeper(SecretFile(None)).session(cookie, now=1000.0) is None
    keeper.end(session)
    again = Keeper(SecretFile(tmp_path / "secret"))
    assert again.session(cookie, now=1000.0) is None
    assert again.session(again.open_session("p.1", invite_hash="abc", now=1.0), now=1.0) is not None


def test_tickets_name_a_showing_and_belong_to_one_labeler() -> None:
    keeper = Keeper(SecretFile(None))
    ticket, label_id = keeper.ticket("ana", showing="lease 1", shown_at=2.5)
    assert keeper.ticket("ana", showing="lease 1", shown_at=2.5) == (ticket, label_id)
    assert keeper.ticket("bob", showing="lease 1", shown_at=2.5)[1] != label_id
    found = keeper.read_ticket(ticket, labeler_id="ana")
    assert (found.label_id, found.shown_at_ms) == (label_id, 2500)
    for labeler, strange in (("bob", ticket), ("ana", ticket.replace(".2500.", ".1.")), ("ana", "x"), ("ana", "é.1.é")):
        with pytest.raises(Refusal) as refused:
            keeper.read_ticket(strange, labeler_id=labeler)
        assert refused.value.status == 403


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    SecretFile(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        SecretFile(path)


def test_tokens_cannot_be_guessed() -> None:
    assert len(new_token()) == 32  # 24 bytes, 192 bits
    assert len({new_token() for _ in range(100)}) == 100
