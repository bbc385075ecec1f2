"""The page at `/`: a chat in a browser.

In: the files of `serve/web/`. Out: answers with their types, marks of their versions, and headers that let the page do little: run
its own scripts, ask this server, and nothing else. Scripts cannot turn text into markup at all (Trusted Types without a policy).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

ADDRESSES = {
    "/": "index.html",
    **{
        f"/web/{name}": name
        for name in (
            "style.css",
            "api.js",
            "app.js",
            "code.js",
            "composer.js",
            "dom.js",
            "markdown.js",
            "store.js",
            "tree.js",
            "turns.js",
            "words.js",
            "vendor/highlight-11.12.0.js",
            "vendor/highlight-11.12.0-bash.js",
            "vendor/highlight-11.12.0-javascript.js",
            "vendor/highlight-11.12.0-json.js",
            "vendor/highlight-11.12.0-python.js",
            "vendor/marked-18.2.1.js",
        )
    },
}
"""Files by address: these and no others."""
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # kept, and asked about each time: a newer package has newer files
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


@dataclass(frozen=True)
class File:
    """A file as it is sent."""

    body: bytes
    headers: Mapping[str, str]

    def answer(self, request: Request) -> Response:
        """The file, or word that the browser has it already. The body of an answer to HEAD is left out by the server."""
        known = request.headers.get("if-none-match", "")
        if self.headers["etag"] in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(
                status_code=304, headers={name: value for name, value in self.headers.items() if name != "content-type"}
            )
        return Response(self.body, headers=dict(self.headers))


def read_page() -> dict[str, File]:
    """The files of the page by their addresses."""
    return {address: _read(name) for address, name in ADDRESSES.items()}


def _read(name: str) -> File:
    body = files("keural.serve").joinpath("web", *name.split("/")).read_bytes()
    tag = hashlib.sha256(body).hexdigest()[:32]
    return File(body, {**HEADERS, "content-type": TYPES[name.rpartition(".")[2]], "etag": f'"{tag}"'})
