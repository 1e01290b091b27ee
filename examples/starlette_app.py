"""Server-sent events from Starlette: one Runtime for the app, and all clients ride on the same passes.

python examples/starlette_app.py [model] [--port 8000]
curl -N 127.0.0.1:8000/generate -d '{"prompt": "Once upon a time", "max_new_tokens": 40}'
"""

import argparse
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from aollm import AollmError, GenerationConfig, RequestError, Runtime

HEADERS = {"content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no"}
KEEPALIVE_S = 5.0


def parse(body: bytes) -> tuple[Any, GenerationConfig]:
    """The prompt and the settings; `RequestError` says what is wrong with them."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise RequestError('send an object such as {"prompt": "Once upon a time", "max_new_tokens": 40}')
    return fields.pop("prompt"), GenerationConfig.of(None, fields)


class Generate:
    """An ASGI endpoint. Its `async with` holds the request to the model, which ends with it, however that is left."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, wrote_at = Request(scope, receive), anyio.current_time()

        async def write(event: str, more: bool = True) -> None:
            nonlocal wrote_at
            wrote_at = anyio.current_time()
            await send({"type": "http.response.body", "body": f"{event}\n\n".encode(), "more_body": more})

        async def keep_alive() -> None:
            while True:
                await anyio.sleep_until(wrote_at + KEEPALIVE_S)
                if anyio.current_time() >= wrote_at + KEEPALIVE_S:
                    await write(": no token yet")

        async def leave_with_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        try:
            prompt, settings = parse(await request.body())
            async with request.app.state.runtime.stream(prompt, settings) as stream:  # a request that cannot be taken raises here
                headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async with anyio.create_task_group() as group:
                    await write(": on the next pass")
                    group.start_soon(leave_with_client)
                    group.start_soon(keep_alive)
                    try:
                        async for token in stream:
                            await write("data: " + json.dumps({"text": token.text, "choice": token.choice}))
                        await write("data: [DONE]", more=False)
                    except AollmError as error:
                        await write("data: " + json.dumps({"error": str(error)}), more=False)
                    group.cancel_scope.cancel()
        except AollmError as error:
            await JSONResponse({"error": str(error)}, 400)(scope, receive, send)


async def stats(request: Request) -> JSONResponse:
    runtime = request.app.state.runtime
    engine = runtime.engine
    return JSONResponse({"riders": engine.riders, "waiting": engine.waiting, "passes": engine.passes, **runtime.cache_state()})


def app(model: str = "demo", **fields: Any) -> Starlette:
    """The app; `fields` are those of `Runtime.open`."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Runtime.open(model, **{"max_concurrent_requests": 64, **fields}) as app.state.runtime:
            yield

    return Starlette(routes=[Route("/generate", Generate(), methods=["POST"]), Route("/stats", stats)], lifespan=lifespan)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default="demo")
    arguments.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    given = arguments.parse_args()
    listener = socket.create_server(("127.0.0.1", given.port))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app(given.model), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])
