"""Puts the labeling page together."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from configs.labels import PeopleConfig
from reward_service.labeling.admin_pages import AdminPages
from reward_service.labeling.desk import Desk, Terms
from reward_service.labeling.guard import Guard, Hosts, Limits
from reward_service.labeling.labeler_pages import LabelerPages
from reward_service.labeling.people import Door
from reward_service.labeling.rendering import Renderer, read_guidelines
from reward_service.labeling.security import Keeper, Refusal, SecretFile
from reward_service.preferences.store import PreferenceStore

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where and how the page is served."""

    run_name: str
    base_url: str
    """Where invite links point to."""
    hosts: Hosts
    secure: bool = False
    """Whether people reach it over https."""
    limits: Limits = field(default_factory=Limits)


def make_app(
    store: PreferenceStore,
    *,
    config: PeopleConfig,
    site: Site,
    secret_file: SecretFile,
    clock: Callable[[], float] = time.time,
) -> ASGIApp:
    """Put the page together.

    Args:
        store: Tasks, labels and labelers.
        config: What labelers are asked for.
        site: Where and how it is served.
        secret_file: The secret behind sessions and forms.
        clock: Seconds since the epoch.

    Returns:
        The page, guarded.

    Raises:
        UserError: If the guidelines cannot be read.
    """
    keeper = Keeper(secret_file)
    renderer = Renderer({"run_name": site.run_name})
    guidelines = read_guidelines(config.guidelines)
    door = Door(store, keeper, secure=site.secure, clock=clock)
    terms = Terms(ui_version=renderer.version, guideline_version=guidelines.version)
    desk = Desk(store, keeper, config=config, terms=terms, clock=clock)
    pages = LabelerPages(desk=desk, door=door, renderer=renderer, guidelines=guidelines, config=config, clock=clock)
    admin = AdminPages(store=store, door=door, renderer=renderer, base_url=site.base_url)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(pages.router())
    app.include_router(admin.router())
    _tell_refusals(app, renderer)
    return Guard(app, hosts=site.hosts, limits=site.limits, labeler_of=door.labeler_of, refuse=renderer.refusal)


def _tell_refusals(app: FastAPI, renderer: Renderer) -> None:
    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return renderer.refusal(request, error)

    def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return renderer.refusal(request, Refusal(error.status_code, "This page has nothing under that address."))

    def failed(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path.split("/")[1], exc_info=error)
        return renderer.refusal(
            request, Refusal(500, "The server could not do that. Try again; if it stays so, tell an admin.", keep=True)
        )

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, failed)
