"""Templates and static files, read once when the server starts."""

import hashlib
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from protocol.errors import UserError
from reward_service.labeling.guard import retry_after
from reward_service.labeling.security import Refusal
from reward_service.labeling.shown import visible

HERE = Path(__file__).parent
YEAR_S = 365 * 24 * 3600
_TITLES = {
    401: "Please open your invite link",
    403: "Not allowed",
    404: "Nothing here",
    409: "Too late for this task",
    413: "Too much text",
    422: "Something is missing",
    429: "A little slower, please",
    500: "Something went wrong",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidelineBlock:
    """A heading, a list or a paragraph of the guidelines."""

    kind: Literal["heading", "list", "paragraph"]
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidelines:
    """What labelers are asked to do."""

    blocks: tuple[GuidelineBlock, ...]
    version: str
    """A digest of the text; every label says under which guidelines it was given."""


class Renderer:
    """Turns values into pages. Whatever goes into a template is escaped; nothing is ever marked as safe.

    Args:
        values: What every page may show, such as the run's name.
    """

    def __init__(self, values: Mapping[str, object]) -> None:
        self._assets = {path.name: path.read_bytes() for path in sorted((HERE / "static").iterdir())}
        digests = {name: hashlib.sha256(body).hexdigest()[:12] for name, body in self._assets.items()}
        self._environment = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals.update(values)
        self._environment.globals["asset"] = lambda name: f"/static/{name}?v={digests[name]}"
        texts = [path.read_bytes() for path in sorted((HERE / "templates").iterdir())]
        self.version = hashlib.sha256(b"\0".join([*texts, *self._assets.values()])).hexdigest()[:12]

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """Render a template."""
        return HTMLResponse(self._environment.get_template(template).render(values), status_code=status)

    def asset(self, name: str) -> Response:
        """Return a static file; its address changes with its content, so that browsers may keep it."""
        body = self._assets.get(name)
        if body is None:
            raise Refusal(404, "There is no such file.")
        kind = mimetypes.guess_type(name)[0]
        return Response(body, media_type=kind, headers={"cache-control": f"private, max-age={YEAR_S}, immutable"})

    def refusal(self, request: Request, refusal: Refusal) -> Response:
        """Tell a person, or the page's script, why a request was refused."""
        headers = retry_after(refusal)
        if wants_json(request):
            told = {"message": refusal.message, "keep": refusal.keep}
            return JSONResponse(told, status_code=refusal.status, headers=headers)
        # A link from another site brings no cookie along (SameSite=Strict); from here on it does.
        forward = refusal.status == 401 and request.headers.get("sec-fetch-site") == "cross-site"
        answer = self.page(
            "message.html",
            status=refusal.status,
            title="One moment" if forward else _TITLES.get(refusal.status, "That did not work"),
            message="Opening the page …" if forward else refusal.message,
            next={401: "Go on" if forward else None, 404: "To the tasks", 409: "Go on with the next task"}.get(
                refusal.status, "Back to the task"
            ),
            forward=forward,
        )
        answer.headers.update(headers)
        return answer


def wants_json(request: Request) -> bool:
    """Tell whether the page's script asks, or a browser without it."""
    return request.headers.get("accept", "").startswith("application/json")


def see(path: str) -> Response:
    """Send a browser on to a page of ours, with GET."""
    return RedirectResponse(path, status_code=303)


def read_guidelines(path: str | None) -> Guidelines:
    """Read the guidelines: headings after `#`, lists after `-`, paragraphs between empty lines.

    Args:
        path: A text file; None for the built-in guidelines.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        text = (HERE / "guidelines.txt" if path is None else Path(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the guidelines {path} cannot be read: {error}", next_step="give a text file in UTF-8, or none"
        ) from error
    blocks: list[GuidelineBlock] = []
    for paragraph in visible(text).split("\n\n"):
        _add_paragraph(blocks, [line for line in paragraph.split("\n") if line.strip()])
    return Guidelines(blocks=tuple(blocks), version=hashlib.sha256(text.encode()).hexdigest()[:12])


def _add_paragraph(blocks: list[GuidelineBlock], lines: list[str]) -> None:
    for line in lines:
        kind: Literal["heading", "list", "paragraph"] = "paragraph"
        text = line.strip()
        if text.startswith("#"):
            kind, text = "heading", text.lstrip("#").strip()
        elif text.startswith(("- ", "* ")):
            kind, text = "list", text[2:]
        joins = kind != "heading" and blocks and blocks[-1].kind == kind and line is not lines[0]
        if joins:
            blocks[-1] = GuidelineBlock(kind=kind, lines=(*blocks[-1].lines, text))
        else:
            blocks.append(GuidelineBlock(kind=kind, lines=(text,)))
