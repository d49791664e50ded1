"""The pages that labelers see."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from configs.labels import PeopleConfig
from reward_service.labeling.desk import Desk, Shown
from reward_service.labeling.forms import NOTE_CHARS, Answer, Leave, fields_of, read_form
from reward_service.labeling.people import Door, Me
from reward_service.labeling.rendering import Guidelines, Renderer, see, wants_json
from reward_service.labeling.security import Refusal
from reward_service.labeling.task_view import (
    Filled,
    TaskView,
    filled_from_answer,
    filled_from_label,
    prompt_of,
    responses_of,
)

FORM = "application/x-www-form-urlencoded"


async def form_fields(request: Request) -> list[tuple[str, str]]:
    """Read the fields of a form; the guard has its whole body already.

    Raises:
        Refusal: 415 or 422 if it is no form.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != FORM:
        raise Refusal(415, f"A form is sent as {FORM}.")
    return fields_of(await request.body())


Fields = Annotated[list[tuple[str, str]], Depends(form_fields)]


class LabelerPages:
    """Routes for labelers. They ask the database, so they are plain functions: each request has its own thread.

    Args:
        desk: Hands out tasks and takes answers.
        door: Knows who asks.
        renderer: Makes pages.
        guidelines: Shown beside every task.
        config: What labelers are asked for.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        *,
        desk: Desk,
        door: Door,
        renderer: Renderer,
        guidelines: Guidelines,
        config: PeopleConfig,
        clock: Callable[[], float],
    ) -> None:
        self._desk = desk
        self._door = door
        self._renderer = renderer
        self._guidelines = guidelines
        self._config = config
        self._clock = clock

    def router(self) -> APIRouter:
        """Return the routes."""
        router = APIRouter()
        router.add_api_route("/", self.home, methods=["GET"], response_model=None)
        router.add_api_route("/previous", self.previous, methods=["GET"], response_model=None)
        router.add_api_route("/labels", self.submit, methods=["POST"], response_model=None)
        router.add_api_route("/join/{token}", self.join, methods=["GET"], response_model=None)
        router.add_api_route("/leave", self.leave, methods=["POST"], response_model=None)
        router.add_api_route("/static/{name}", self.asset, methods=["GET"], response_model=None)
        return router

    def join(self, token: str) -> Response:
        """Exchange an invite link for a session, and leave the address that holds its token."""
        answer = see("/")
        self._door.come_in(token, answer)
        return answer

    def leave(self, request: Request, fields: Fields) -> Response:
        """End the session."""
        me = self._door.me(request)
        self._door.check_form(me, read_form(Leave, fields).csrf)
        answer = self._renderer.page(
            "message.html",
            title="You are signed out",
            message="Your invite link lets you in again.",
            next=None,
            forward=False,
        )
        self._door.leave(me, answer)
        return answer

    def home(self, request: Request) -> Response:
        """Show the next task."""
        me = self._door.me(request)
        shown = self._desk.next(me.labeler_id)
        if shown is None:
            return self._renderer.page("done.html", **self._surroundings(me, progress=self._desk.progress(kept_s=0.0)))
        return self._task_page(me, shown, Filled())

    def previous(self, request: Request) -> Response:
        """Show the last answer again, to be corrected."""
        me = self._door.me(request)
        shown = self._desk.previous(me.labeler_id)
        if shown is None or shown.corrects is None:
            return see("/")
        return self._task_page(me, shown, filled_from_label(shown.corrects))

    def submit(self, request: Request, fields: Fields) -> Response:
        """Take an answer."""
        me = self._door.me(request)
        self._door.check_form(me, dict(fields).get("csrf", ""))
        answer = read_form(Answer, fields)
        try:
            self._desk.submit(me.labeler_id, answer)
        except Refusal as refusal:
            if refusal.status == 403:
                self._door.note("task_refused", me.labeler_id)
            if refusal.status not in (422, 429) or wants_json(request):
                raise
            return self._again(me, answer, refusal)
        return JSONResponse({"message": "Saved."}) if wants_json(request) else see("/")

    def asset(self, name: str) -> Response:
        """Return a static file."""
        return self._renderer.asset(name)

    def _again(self, me: Me, answer: Answer, refusal: Refusal) -> Response:
        """Show the task once more, as it was filled in, with what is missing."""
        shown = self._desk.find(answer, me.labeler_id)
        if shown is None:
            raise refusal
        return self._task_page(me, shown, filled_from_answer(answer), refusal=refusal)

    def _task_page(self, me: Me, shown: Shown, filled: Filled, *, refusal: Refusal | None = None) -> Response:
        view = TaskView(
            kind=shown.task.kind,
            prompt=prompt_of(shown.task),
            responses=responses_of(shown.task, shown.presented, filled),
            filled=filled,
            ticket=shown.ticket,
            correction=shown.corrects is not None,
            left_s=self._desk.left_s(shown),
            read_s=self._desk.read_s(shown),
            ask_ratings=self._config.ask_ratings,
            flags=tuple(self._config.flags),
        )
        return self._renderer.page(
            "label.html",
            status=200 if refusal is None else refusal.status,
            task=view,
            message=None if refusal is None else refusal.message,
            note_chars=NOTE_CHARS,
            **self._surroundings(me, progress=self._desk.progress()),
        )

    def _surroundings(self, me: Me, *, progress: tuple[int, int]) -> dict[str, Any]:
        done, tasks = progress
        own = self._desk.book.figures(me.labeler_id, tasks_left=tasks - done, now=self._clock())
        return {
            "me": me,
            "progress": {"done": done, "tasks": tasks},
            "own": own,
            "last": own.total > 0,
            "guidelines": self._guidelines.blocks,
        }
