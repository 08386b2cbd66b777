"""The review page's server: its routes, and what each answers."""

import json
import re
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from captioner.errors import CaptionerError, InputError, printable
from captioner.output.decisions import ConflictError, Decision, Journal
from captioner.output.images import OutputImages
from captioner.review.pictures import SIZES, map_png, photo_jpeg
from captioner.review.rows import attention_maps
from captioner.review.web.index import RowIndex
from captioner.review.web.pictures import PictureCache
from captioner.review.web.security import HEADERS, Guard
from captioner.review.web.view import PAGE, SORTS, View
from captioner.schema import COLUMNS

__all__ = ["make_app"]

_STATIC = {"review.css": "text/css", "review.js": "text/javascript", "icon.svg": "image/svg+xml"}
_LONGEST_CAPTION = 10_000  # characters of an edited caption
_LARGEST_BODY = 100_000  # bytes
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_CAPTION_COLUMNS = frozenset(COLUMNS.names)
#: Columns that the page of a row does not list, as it shows them in other ways.
_SHOWN_APART = ("attention", "attention_peak", "tokens", "token_logprobs", "captions")


def make_app(index: RowIndex, journal: Journal, guard: Guard) -> Starlette:
    """Builds the application that shows an index and records decisions in the journal."""
    for decision in journal.all():
        index.decide(decision)
    review = _Review(index, journal, guard)

    async def protect(
        request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = guard.refusal(request) or await answer(request)
        response.headers.update(HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")  # decisions change the pages
        return response

    return Starlette(
        routes=[
            Route("/", review.grid),
            Route("/row/{number:int}", review.row),
            Route("/photo/{size}/{number:int}", review.photo),
            Route("/map/{number:int}/{word:int}", review.map),
            Route("/decision/{number:int}", review.decide, methods=["POST"]),
            Route("/progress", review.progress),
            Route("/static/{name}", review.static),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=protect)],
        exception_handlers={
            CaptionerError: _explain,
            HTTPException: _explain_status,
            Exception: _explain_bug,
        },
    )


async def _explain(_: Request, error: Exception) -> Response:
    return PlainTextResponse(printable(str(error)), 404 if isinstance(error, InputError) else 500)


async def _explain_status(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(error.detail, error.status_code)


async def _explain_bug(_: Request, __: Exception) -> Response:
    """The server prints the traceback; its answer passes by what adds the headers to others."""
    return PlainTextResponse("Unexpected error: the terminal shows it.", 500, HEADERS)


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_BODY:
            raise HTTPException(413, "The caption is too long.")
    return body


class _Review:
    """Answers requests. Work that waits for the database, a disk or a bucket runs in a thread."""

    def __init__(self, index: RowIndex, journal: Journal, guard: Guard):
        self._index, self._journal, self._guard = index, journal, guard
        self._photos = OutputImages(index.directory)
        self._pictures = PictureCache()
        self._low_score = index.directory.low_score
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("captioner.review.web"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["printable"] = printable

    async def grid(self, request: Request) -> Response:
        """A page of rows, with the filters."""
        view = View.from_parameters(request.query_params.multi_items())
        return await run_in_threadpool(self._grid, view)

    def _grid(self, view: View) -> Response:
        if self._index.overwritten:
            self._index.check()
        self._index.wait(view.page * PAGE)
        columns = self._index.columns
        ask = self._index.query
        count = ask(*view.count(columns))
        total = count[0]["rows"] if count else 0
        names = [
            name for name in ("status", "decision", "finish") if name in {*columns, "decision"}
        ]
        return self._page(
            "grid.html",
            view=view,
            rows=ask(*view.page_of_rows(columns)),
            total=total,
            pages=max(1, -(-total // PAGE)),
            facets={name: ask(*view.facet(name, columns)) for name in names},
            source_columns=[
                name
                for name in columns
                if name not in _CAPTION_COLUMNS and not name.startswith("__")
            ],
        )

    async def row(self, request: Request) -> Response:
        """One row: its photo, a map for each word, its columns."""
        view = View.from_parameters(request.query_params.multi_items())
        return await run_in_threadpool(self._row, request.path_params["number"], view)

    def _row(self, number: int, view: View) -> Response:
        row, maps = self._read(number)
        decision = self._journal[row["uri"]]
        words = [
            {"text": token, "probability": float(np.exp(logprob))}
            for token, logprob in zip(
                row["tokens"] or [], row["token_logprobs"] or [], strict=False
            )
        ]
        before, after = self._neighbours(number, view)
        return self._page(
            "row.html",
            view=view,
            number=number,
            row={"captions": None, **row},
            words=words,
            maps=0 if maps is None else len(maps),
            decision=decision,
            before=before,
            after=after,
            columns={
                name: value
                for name, value in row.items()
                if name not in _SHOWN_APART and value is not None
            },
        )

    def _neighbours(self, number: int, view: View) -> tuple[tuple[int, int], tuple[int, int]]:
        """The previous and next row in the view, each as ``(number, page)``; number -1 for none."""
        columns = self._index.columns
        numbers: list[tuple[int, int]] = []
        for page in (view.page - 1, view.page, view.page + 1):
            if page >= 1:
                found = self._index.query(*view.neighbours(columns, page))
                numbers += [(each["__row"], page) for each in found]
        places = [place for place, (each, _) in enumerate(numbers) if each == number]
        if not places:
            return (-1, 1), (-1, 1)
        [place] = places
        before = numbers[place - 1] if place else (-1, 1)
        after = numbers[place + 1] if place + 1 < len(numbers) else (-1, 1)
        return before, after

    async def photo(self, request: Request) -> Response:
        """A row's photo, small or large."""
        number, size = request.path_params["number"], request.path_params["size"]
        if size not in SIZES:
            raise HTTPException(404, "Unknown size: use small or large.")
        uri = await run_in_threadpool(self._uri, number)

        def make() -> bytes:
            return photo_jpeg(self._photos, uri, size)[0]

        picture = await run_in_threadpool(self._pictures.get, (uri, size), make)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private"})

    async def map(self, request: Request) -> Response:
        """The attention map of a word of a row."""
        return await run_in_threadpool(self._map, **request.path_params)

    def _map(self, number: int, word: int) -> Response:
        _, maps = self._read(number)
        if maps is None or word >= len(maps):
            raise HTTPException(404, "This word has no attention map.")
        return Response(
            map_png(maps[word]), media_type="image/png", headers={"Cache-Control": "private"}
        )

    async def decide(self, request: Request) -> Response:
        """Records a decision: JSON with ``decision``, ``caption`` and the ``revision`` seen."""
        values = _parse(await _read_body(request))
        uri = await run_in_threadpool(self._uri, request.path_params["number"])
        try:
            made = await run_in_threadpool(
                self._journal.decide,
                uri,
                values["decision"],
                values["caption"],
                seen=values["revision"],
            )
        except ConflictError as conflict:
            return JSONResponse(_as_json(conflict.current), 409)
        await run_in_threadpool(self._index.decide, made)
        return JSONResponse(_as_json(made))

    async def progress(self, _: Request) -> Response:
        """How much of the output is indexed; the page polls it."""
        return JSONResponse(self._progress())

    async def static(self, request: Request) -> Response:
        """The style sheet and the script."""
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404, "File not found.")
        data = resources.files("captioner.review.web").joinpath("static", name).read_bytes()
        return Response(data, media_type=_STATIC[name])

    def _progress(self) -> dict[str, Any]:
        return {
            "rows": self._index.rows,
            "total": self._index.total,
            "complete": self._index.complete,
            "problem": self._index.problem and printable(self._index.problem),
        }

    def _uri(self, number: int) -> str:
        if number >= self._index.rows:
            raise HTTPException(404, "There is no such row.")
        found = self._index.query("SELECT uri FROM captions WHERE __row = ?", [number])
        if not found:
            raise HTTPException(404, "Row not found: reload the page.")
        uri: str = found[0]["uri"]
        return uri

    def _read(self, number: int) -> tuple[dict[str, Any], np.ndarray | None]:
        """A row and its attention maps, one per word; None for a row without maps."""
        self._index.check()
        found = self._index.read_row(number)
        if found is None:
            raise HTTPException(404, "Row not found: reload the page.")
        row, schema = found
        return row, attention_maps(row, schema) if row["attention"] else None

    def _page(self, template: str, **values: Any) -> Response:
        return HTMLResponse(
            self._templates.get_template(template).render(
                output=self._index.directory.uri,
                write_token=self._guard.write_token,
                sorts=SORTS,
                low_score=self._low_score,
                progress=self._progress(),
                **values,
            )
        )


def _parse(body: bytes) -> dict[str, Any]:
    """The values of a decision, checked."""
    try:
        values = json.loads(body)
        kind, caption, revision = values["decision"], values["caption"], values["revision"]
    except (ValueError, KeyError, TypeError) as error:
        raise HTTPException(
            400, "The request must be JSON with decision, caption and revision."
        ) from error
    if kind not in ("accepted", "rejected", "edited", None):
        raise HTTPException(400, "The decision must be accepted, rejected, edited or null.")
    if not isinstance(revision, str) or not revision.isdecimal() or len(revision) > 20:
        raise HTTPException(400, "The revision must be a number, as text.")
    if (kind == "edited") != isinstance(caption, str):
        raise HTTPException(400, "Only an edited decision has a caption, and it needs one.")
    if caption is not None:
        caption = " ".join(caption.split())
        if _UNWRITABLE.search(caption):
            raise HTTPException(400, "A caption has no control characters or halves of characters.")
        if not caption or len(caption) > _LONGEST_CAPTION:
            raise HTTPException(400, f"A caption must have 1 to {_LONGEST_CAPTION} characters.")
    return {"decision": kind, "caption": caption, "revision": int(revision)}


def _as_json(decision: Decision) -> dict[str, Any]:
    """A decision for the page; a revision is text, which JavaScript does not round."""
    return {
        "decision": decision.decision,
        "caption": decision.caption,
        "revision": str(decision.revision),
    }
