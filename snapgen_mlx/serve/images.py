"""OpenAI's routes for pictures: generations, streamed or whole."""

import asyncio
import base64
import io
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException

from ..editing import Edit, parse_margins, read_picture
from ..errors import SnapGenError, UsageError
from ..prompts import expand
from .engine import Busy, Ended, Engine, Job, Late, Picture, Progress, Stopping, UnknownModel
from .guard import MAX_BODY, error_body
from .schema import Editing, Generation, check_number

log = logging.getLogger("snapgen_mlx.serve")
router = APIRouter()
STATUS: list[tuple[type[Exception], int, str]] = [
    *((UnknownModel, 404, "model_not_found"), (UsageError, 400, "invalid_request")),
    *((Busy, 429, "busy"), (Stopping, 503, "stopping"), (Late, 504, "too_late")),
]
EDITS = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "allOf": [
                        Editing.model_json_schema(),
                        {
                            "type": "object",
                            "required": ["image"],
                            "properties": {
                                "image": {"type": "string", "format": "binary"},
                                "mask": {"type": "string", "format": "binary"},
                            },
                        },
                    ]
                }
            }
        },
    }
}
GLANCE = 0.1  # seconds between two checks that a client is still there


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    status, body = _failure(error)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(body, status, headers)


def _failure(error: Exception) -> tuple[int, dict]:
    for kind, status, code in STATUS:
        if isinstance(error, kind):
            return status, error_body(str(error), code)
    if isinstance(error, SnapGenError):
        return 500, error_body(str(error), "failed")
    log.error("a request failed", exc_info=error)
    return 500, error_body(f"unexpected {type(error).__name__}; the server's log says more")


async def follow(engine: Engine, job: Job, request: Request) -> AsyncIterator:
    """Submit a job and yield its events up to Ended; a client that goes away cancels it."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def emit(event):
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the server is down already
            job.cancelled.set()

    job.emit = emit
    engine.submit(job)
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), GLANCE)
            except TimeoutError:
                if await request.is_disconnected():
                    return
                continue
            yield event
            if isinstance(event, Ended):
                return
    finally:
        engine.cancel(job)


def encode(image: Image.Image, fields: Generation) -> str:
    """A picture as a file in base64."""
    kind, quality = fields.output_format or "png", fields.output_compression
    options: dict[str, Any] = {"format": kind}
    if kind == "jpeg":
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image, options["quality"] = image.convert("RGB"), 95 if quality is None else quality
    elif kind == "webp":
        options |= {"lossless": True} if quality is None else {"quality": quality}
    file = io.BytesIO()
    image.save(file, **options)
    return base64.b64encode(file.getvalue()).decode()


@router.post("/v1/images/generations")
async def generations(fields: Generation, request: Request):
    """Pictures from words: whole, or with ``stream`` as server-sent events."""
    return await answer(fields, request, "image_generation")


@router.post("/v1/images/edits", openapi_extra=EDITS)
async def edits(request: Request):
    """A picture made from another one, under a mask or wholly: multipart/form-data."""
    try:
        form = await request.form(max_files=2, max_fields=40, max_part_size=MAX_BODY)
    except AnyHTTPException as e:
        raise HTTPException(400, f"the body is not valid multipart/form-data: {e.detail}") from e
    files = {k.removesuffix("[]"): v for k, v in form.items() if not isinstance(v, str)}
    texts = {k: v for k, v in form.items() if isinstance(v, str)}
    if not files.keys() <= {"image", "mask"} or "image" not in files:
        raise UsageError("send one file as image, and at most one as mask")
    try:
        fields = Editing.model_validate(texts)
    except ValidationError as e:
        raise RequestValidationError(
            [error | {"loc": ("body", *error["loc"])} for error in e.errors()]
        ) from e
    margins = parse_margins(fields.outpaint) if fields.outpaint else None

    def read() -> tuple[Edit, dict]:
        data = {k: upload.file.read() for k, upload in files.items()}
        pictures = {k: read_picture(io.BytesIO(of)) for k, of in data.items()}
        said: dict[str, Any] = {k: upload.filename or k for k, upload in files.items()}
        said |= {"outpaint": fields.outpaint} if fields.outpaint else {}
        said["digests"] = {k: sha256(of).hexdigest()[:16] for k, of in data.items()}
        return Edit(pictures["image"], pictures.get("mask"), margins), said

    edit, said = await asyncio.to_thread(read)
    return await answer(fields, request, "image_edit", edit=edit, files=said)


async def answer(fields: Generation, request: Request, kind: str, **more):
    """Draw what a request asks for. ``more`` goes to the Job; ``kind`` names streamed events."""
    engine: Engine = request.app.state.engine
    prompts = expand(fields.prompt)
    check_number(prompts, fields.n)
    about = engine.models.get(fields.model or next(iter(engine.models)), {})
    if fields.background == "transparent" and not about.get("transparent", True):
        raise UsageError("this model draws on white; leave out background, or name another model")
    job = Job(
        prompts=prompts,
        emit=lambda event: None,  # ``follow`` sets it
        seeds=fields.seeds(random.randrange(2**32)),
        model=fields.model,
        variant=fields.variant,
        given=fields.given,
        previews=fields.partial_images if fields.stream else 0,
        keep=fields.keep,
        **more,
    )
    events = follow(engine, job, request)
    if fields.stream:
        # The first event tells whether the request can be met at all, by its status.
        first = await anext(events, None)
        if isinstance(first, Ended) and first.error:
            raise first.error
        return StreamingResponse(
            _stream(first, events, fields, kind),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )
    data = []
    async for event in events:
        if isinstance(event, Picture):
            if fields.response_format == "url":
                picture = {"url": str(request.url_for("picture", name=event.name))}
            else:
                picture = {"b64_json": await asyncio.to_thread(encode, event.image, fields)}
            data.append(picture | _facts(event))
        elif isinstance(event, Ended) and event.error:
            raise event.error
    return {
        "created": int(time.time()),
        "background": fields.background or "auto",
        "output_format": fields.output_format or "png",
        "data": data,
    }


def _facts(event: Picture) -> dict:
    return {
        "name": event.name,
        "seconds": round(event.seconds, 3),
        "settings": event.settings,
        "notes": event.notes,
    }


async def _stream(first, events, fields: Generation, kind: str) -> AsyncIterator[str]:
    shown = 0
    common: dict[str, Any] = {"background": fields.background or "auto", "quality": "auto"}
    common["output_format"] = fields.output_format or "png"
    event = first
    while event is not None:
        data: dict[str, Any] | None = None
        if isinstance(event, Progress):
            data = {
                "type": f"{kind}.progress",
                "picture": event.picture,
                "step": event.step,
                "steps": event.steps,
                "seconds_left": round(event.seconds_left, 2),
            }
            if event.preview is not None:
                data |= common | {
                    "type": f"{kind}.partial_image",
                    "partial_image_index": shown,
                    "b64_json": await asyncio.to_thread(encode, event.preview, fields),
                    "size": "x".join(map(str, event.preview.size)),
                    "created_at": int(time.time()),
                }
                shown += 1
            elif not fields.progress:  # OpenAI's clients do not know these events
                data = None
        elif isinstance(event, Picture):
            data = common | {
                "type": f"{kind}.completed",
                "picture": event.picture,
                "b64_json": await asyncio.to_thread(encode, event.image, fields),
                "size": "x".join(map(str, event.image.size)),
                "created_at": int(time.time()),
                **_facts(event),
            }
        elif event.error:
            data = {"type": "error", **_failure(event.error)[1]}
        if data:
            yield f"event: {data['type']}\ndata: {json.dumps(data)}\n\n"
        event = await anext(events, None)
