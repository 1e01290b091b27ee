"""Server-sent events from aiohttp: one Runtime for the app, and all clients ride on the same passes.

python examples/aiohttp_app.py [model] [--port 8000]
curl -N 127.0.0.1:8000/generate -d '{"prompt": "Once upon a time", "max_new_tokens": 40}'
"""

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from aiohttp import web

from aollm import AollmError, GenerationConfig, RequestError, Runtime

HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEPALIVE_S = 5.0
RUNTIME = web.AppKey("runtime", Runtime)


def parse(body: bytes) -> tuple[Any, GenerationConfig]:
    """The prompt and the settings; `RequestError` says what is wrong with them."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise RequestError('send an object such as {"prompt": "Once upon a time", "max_new_tokens": 40}')
    return fields.pop("prompt"), GenerationConfig.of(None, fields)


async def generate(request: web.Request) -> web.StreamResponse:
    """Its `async with` holds the request to the model, which ends with it. A client that goes away cancels this handler."""
    loop, response = asyncio.get_running_loop(), web.StreamResponse(headers=HEADERS)
    wrote_at = loop.time()

    async def write(event: str) -> None:
        nonlocal wrote_at
        wrote_at = loop.time()
        await response.write(f"{event}\n\n".encode())

    async def keep_alive() -> None:
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(wrote_at + KEEPALIVE_S - loop.time())
                if loop.time() >= wrote_at + KEEPALIVE_S:
                    await write(": no token yet")

    try:
        prompt, settings = parse(await request.read())
        async with request.app[RUNTIME].stream(prompt, settings) as stream:  # a request that cannot be taken raises here
            await response.prepare(request)
            async with asyncio.TaskGroup() as group:
                alive = group.create_task(keep_alive())
                with suppress(ConnectionError):  # the client has gone
                    try:
                        await write(": on the next pass")
                        async for token in stream:
                            await write("data: " + json.dumps({"text": token.text, "choice": token.choice}))
                        await write("data: [DONE]")
                    except AollmError as error:
                        await write("data: " + json.dumps({"error": str(error)}))
                alive.cancel()
        return response
    except AollmError as error:
        return web.json_response({"error": str(error)}, status=400)


async def stats(request: web.Request) -> web.Response:
    runtime = request.app[RUNTIME]
    engine = runtime.engine
    return web.json_response({"riders": engine.riders, "waiting": engine.waiting, "passes": engine.passes, **runtime.cache_state()})


def app(model: str = "demo", **fields: Any) -> web.Application:
    """The app; `fields` are those of `Runtime.open`."""

    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        async with Runtime.open(model, **{"max_concurrent_requests": 64, **fields}) as app[RUNTIME]:
            yield

    made = web.Application()
    made.add_routes([web.post("/generate", generate), web.get("/stats", stats)])
    made.cleanup_ctx.append(lifespan)
    return made


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", default="demo")
    arguments.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    given = arguments.parse_args()
    listener = socket.create_server(("127.0.0.1", given.port))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    web.run_app(app(given.model), sock=listener, handler_cancellation=True, shutdown_timeout=1, print=None, access_log=None)
