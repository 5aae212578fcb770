"""What every request passes before it is read: host, origin, token, size and time."""

import asyncio
import hmac
import json
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "snapgen-mlx-token"
OPEN = ("/health",)  # paths that need no token
MAX_BODY = 20_000_000  # bytes: a picture of 2048 pixels a side and its mask
BODY_SECONDS = 30.0  # seconds within which a body must arrive
DRAIN_SECONDS = 1.0  # seconds within which the body of a refused request may still arrive
# The page loads nothing from other hosts, and no other page may show or read what is here.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def error_body(message: str, code: str | None = None, param: str | None = None) -> dict:
    """An error as OpenAI's API words it."""
    kind = "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """ASGI middleware that refuses what the application should never see.

    Args:
        token: what clients must present, as ``Authorization: Bearer`` or in the page's cookie;
            None for servers that only this machine reaches, which then answer to no other name
            than this machine's (another site's name may point here: DNS rebinding).
        seconds: the most that one answer may take, reading and waiting included.
    """

    def __init__(self, app, token: str | None, seconds: float):
        self.app, self.token, self.seconds = app, token, seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websockets here
            return await send({"type": "websocket.close", "code": 1008})
        started = False

        async def send_guarded(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        async def refuse(status, message, code=None):
            body = json.dumps(error_body(message, code)).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            start = {"type": "http.response.start", "status": status, "headers": headers}
            await send_guarded(start)
            await send({"type": "http.response.body", "body": body})

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _drain(receive)
            return await refuse(*refusal)
        if self.token and (login := self._login(scope)):
            start = {"type": "http.response.start", "status": 303, "headers": login}
            await send_guarded(start)
            return await send({"type": "http.response.body", "body": b""})
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            return await refuse(408, f"the body did not come within {BODY_SECONDS:g} seconds")
        if body is None:  # the client is gone
            return None
        if len(body) > MAX_BODY:
            return await refuse(413, _too_large())

        async def replay():
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        try:
            async with asyncio.timeout(self.seconds):
                await self.app(scope, replay, send_guarded)
        except TimeoutError:
            if not started:
                await refuse(504, f"not answered within {self.seconds:g} seconds")

    def _refusal(self, scope, headers: dict) -> tuple | None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname
            origin = urlsplit(headers["origin"]).netloc if "origin" in headers else host
        except ValueError:
            return 400, "the Host or Origin header is malformed"
        if not self.token and name not in LOOPBACK:
            return 421, f"this server does not answer to the name {name!r}; use 127.0.0.1"
        if origin != host:
            return 403, "requests from other sites' pages are refused", "other_origin"
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            return 413, _too_large()
        if self.token and scope["path"] not in OPEN and not self._is_known(scope, headers):
            return 401, "wrong or missing token; see what the server printed", "invalid_api_key"
        return None

    def _is_known(self, scope, headers: dict) -> bool:
        presented = headers.get("authorization", "").removeprefix("Bearer ")
        if not presented:
            try:
                morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                morsel = None
            presented = morsel.value if morsel else ""
        return self._is_token(presented) or self._login(scope) is not None

    def _login(self, scope) -> list | None:
        """Headers that move the token of ``/?token=...`` from the address to a cookie."""
        if scope["path"] != "/" or scope["method"] != "GET":
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not self._is_token(given):
            return None
        cookie = f"{COOKIE}={given}; HttpOnly; SameSite=Strict; Path=/"
        return [(b"location", b"/"), (b"set-cookie", cookie.encode())]

    def _is_token(self, presented: str) -> bool:
        return self.token is not None and hmac.compare_digest(
            presented.encode("utf-8", "replace"), self.token.encode()
        )


def _too_large() -> str:
    return f"a body of more than {MAX_BODY // 10**6} MB; send smaller pictures"


async def _drain(receive) -> None:
    """Read and forget the rest of a refused request's body, as far as it comes in time.

    A socket that closes with unread bytes is reset, and the client never sees the answer.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] != "http.disconnect":
                if not message.get("more_body", False):
                    return


async def _body(receive) -> bytes | None:
    """The body, cut off soon after MAX_BODY; None when the client went away."""
    parts, length, more = [], 0, True
    while more and length <= MAX_BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        more = message.get("more_body", False)
    if more:
        await _drain(receive)
    return b"".join(parts)
