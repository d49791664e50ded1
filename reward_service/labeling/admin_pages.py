"""The page that admins see: figures, and who may come in."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from reward_service.labeling.admin_figures import AdminFigures
from reward_service.labeling.forms import Disable, Invite, read_form
from reward_service.labeling.labeler_pages import Fields
from reward_service.labeling.people import Door, Invitation, Me, invite
from reward_service.labeling.rendering import Renderer, see
from reward_service.labeling.security import Refusal
from reward_service.preferences.store import PreferenceStore


class AdminPages:
    """Routes for admins.

    Args:
        store: Tasks, labels and labelers.
        door: Knows who asks.
        renderer: Makes pages.
        base_url: Where invite links point to.
    """

    def __init__(self, *, store: PreferenceStore, door: Door, renderer: Renderer, base_url: str) -> None:
        self._store = store
        self._door = door
        self._renderer = renderer
        self._base_url = base_url
        self._figures = AdminFigures(store)

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        router.add_api_route("/admin", self.overview, methods=["GET"], response_model=None)
        router.add_api_route("/admin/invite", self.invite, methods=["POST"], response_model=None)
        router.add_api_route("/admin/disable", self.disable, methods=["POST"], response_model=None)
        return router

    def overview(self, request: Request) -> Response:
        """Show the figures."""
        return self._page(self._door.admin(request), link=None)

    def invite(self, request: Request, fields: Fields) -> Response:
        """Invite somebody, or renew their link, and show it once."""
        me = self._door.admin(request)
        self._door.check_form(me, dict(fields).get("csrf", ""))
        form = read_form(Invite, fields)
        link = invite(self._store, form.name, role=form.role, base_url=self._base_url)
        self._door.note("renewed" if link.is_renewed else "invited", me.labeler_id, {"role": link.role})
        return self._page(me, link=link)

    def disable(self, request: Request, fields: Fields) -> Response:
        """End somebody's access; their labels stay."""
        me = self._door.admin(request)
        self._door.check_form(me, dict(fields).get("csrf", ""))
        labeler_id = read_form(Disable, fields).labeler_id
        if labeler_id == me.labeler_id:
            raise Refusal(422, "You cannot end your own access.")
        if all(labeler.labeler_id != labeler_id for labeler in self._store.labelers()):
            raise Refusal(422, "There is no such person.")
        self._store.disable_labeler(labeler_id, now=self._door.now())
        self._door.note("disabled", me.labeler_id, {"whom": labeler_id})
        return see("/admin")

    def _page(self, me: Me, *, link: Invitation | None) -> Response:
        return self._renderer.page("admin.html", me=me, figures=self._figures.read(), link=link)
