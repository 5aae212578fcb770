"""The application: OpenAI's API, the gallery and the page."""

import asyncio
import io
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.exceptions import HTTPException as AnyHTTPException

from .. import __version__
from ..errors import SnapGenError
from ..picture_file import picture_bytes, read_metadata
from . import images
from .engine import Engine
from .guard import Guard, error_body

STATIC = Path(__file__).parent / "static"
MAX_ZIP = 1000  # pictures
SLACK = 60.0  # seconds that an answer may take besides drawing


def create_app(engine: Engine, token: str | None = None) -> Guard:
    """The ASGI application around a started engine, whose requests need ``token`` unless None."""
    app = FastAPI(
        title="snapgen-mlx",
        version=__version__,
        description="Pictures from words. The routes under /v1 are OpenAI's.",
        docs_url=None,  # its page would load scripts from other hosts
        redoc_url=None,
    )
    app.state.engine = engine
    app.include_router(images.router)
    _add_errors(app)
    _add_models(app, engine)
    _add_gallery(app, engine)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return Guard(app, token, engine.timeout + SLACK)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(AnyHTTPException)
    async def http_error(request: Request, error: AnyHTTPException):
        return JSONResponse(error_body(error.detail), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first = error.errors()[0]
        param = ".".join(str(place) for place in first["loc"][1:]) or None
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "json_invalid":
            param, what = None, "the body is not valid JSON"
        message = f"{param}: {what}" if param else what
        return JSONResponse(error_body(message, "invalid_request", param), 400)

    @app.exception_handler(SnapGenError)
    async def known(request: Request, error: SnapGenError):
        return images.error_response(error)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception):
        return images.error_response(error)


def _add_models(app: FastAPI, engine: Engine) -> None:
    def described(name: str) -> dict:
        about = {k: v for k, v in engine.models[name].items() if k != "words"}
        return {"id": name, "object": "model", "created": 0, "owned_by": "snapgen-mlx", **about}

    @app.get("/health")
    def health():
        """Whether the server draws, and how many requests it has to."""
        return {"status": "ok", "version": __version__, "waiting": engine.waiting}

    @app.get("/v1/models")
    def models():
        """Models that requests may name, with their widths and own settings."""
        return {"object": "list", "data": [described(name) for name in engine.models]}

    @app.get("/v1/models/{name}")
    def model(name: str):
        """One of them."""
        if name not in engine.models:
            raise HTTPException(404, f"no model {name!r} here")
        return described(name)

    @app.get("/words")
    def words(model: str):
        """Things that a model is known to draw, for suggestions; none where it has no list."""
        if model not in engine.models:
            raise HTTPException(404, f"no model {model!r} here")
        return {"words": engine.models[model]["words"]}


def _add_gallery(app: FastAPI, engine: Engine) -> None:
    gallery = engine.gallery

    def path_of(name: str) -> Path:
        path = gallery.path(name)
        if path is None:
            raise HTTPException(404, f"no picture {name!r} in the gallery")
        return path

    @app.get("/gallery")
    def pictures(
        search: Annotated[str, Query(max_length=1000)] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
    ):
        """Kept pictures with their settings, newest first, whose prompts have these words."""
        data, total = gallery.list(search, offset, limit)
        return {"data": data, "total": total}

    @app.get("/gallery.zip")
    def archive(name: Annotated[list[str], Query(max_length=MAX_ZIP)]):
        """Pictures of the gallery as one ZIP file."""
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it was sent)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as z:
            for each in dict.fromkeys(name):
                z.write(path_of(each), each)
        length = file.tell()
        file.seek(0)
        headers = {
            "content-disposition": 'attachment; filename="pictures.zip"',
            "content-length": str(length),
        }
        chunks = iter(lambda: file.read(1 << 16), b"")
        return StreamingResponse(chunks, media_type="application/zip", headers=headers)

    @app.get("/gallery/{name}", name="picture")
    def picture(name: str, format: Literal["png", "webp"] = "png"):
        """One picture as its PNG, settings inside, or as lossless WebP with the same."""
        path = path_of(name)
        if format == "png":
            return FileResponse(path, headers={"cache-control": "private, max-age=31536000"})
        with Image.open(path) as image:
            data = picture_bytes(image, ".webp", read_metadata(path))
        filename = f'inline; filename="{path.stem}.webp"'
        return Response(data, 200, {"content-disposition": filename}, "image/webp")

    @app.delete("/gallery/{name}")
    def remove(name: str):
        """Delete a picture for good."""
        path_of(name)
        gallery.remove(name)
        return {"deleted": name}

    @app.post("/settings")
    async def settings(request: Request):
        """The settings inside a picture, whose bytes are the body; null for foreign ones."""
        file = io.BytesIO(await request.body())
        try:
            return {"settings": await asyncio.to_thread(read_metadata, file)}
        except SnapGenError:
            return {"settings": None}
