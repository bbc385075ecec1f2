"""Looks after servers: are they there, are they the right ones, and does an engine of ours have to be started again.

In: servers. Out: what they can do, and their troubles, as long as the loop runs.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable

from keural.serve.upstream.child import Child, end_of
from keural.serve.upstream.client import Server
from keural.serve.upstream.contract import Facts, Failed
from keural.serve.upstream.runner import Upstreams

INTERVAL, WHILE_DOWN = 5.0, 0.5
"""Seconds between two looks at a server that works, and at one that does not."""
MOST_RESTARTS, RESTART_SPAN = 5, 600.0
"""So often within so many seconds a dead engine is started again."""
BACKOFF = 1.0
"""Seconds before the first start; twice as many before each other one within the span."""
START_SECONDS = 3600.0
"""For an engine to answer after its start: a large model is read from a slow disk."""
SIGN_OF_LIFE = 30.0
"""Seconds between two words about a start that takes its time."""


logger = logging.getLogger("keural.serve")


class Died(Exception):
    """An engine has ended before it answered."""


async def await_health(server: Server, child: Child, tell: Callable[[str], None]) -> None:
    """Wait until an engine that was started answers; `tell` hears that it takes long. Raises `Died`, `Failed`."""
    begun = last = time.monotonic()
    ending = asyncio.ensure_future(child.wait())
    try:
        while not ending.done():
            with contextlib.suppress(Failed):
                if await server.healthy():
                    child.settled()
                    return
            now = time.monotonic()
            if now - begun > START_SECONDS:
                raise Failed(f"does not answer {START_SECONDS:.0f} s after its start")
            if now - last > SIGN_OF_LIFE:
                last = now
                tell(f"{server.contract.name} is starting, {now - begun:.0f} s so far")
            await asyncio.wait({ending}, timeout=WHILE_DOWN)
        raise Died(end_of(ending.result()))
    finally:
        ending.cancel()


async def watch(server: Server, upstreams: Upstreams) -> None:
    """Look after a server until it is lost."""
    starts: deque[float] = deque(maxlen=MOST_RESTARTS)
    while upstreams.lost is None:
        await _pause(server)
        try:
            await _attend(server, upstreams, starts)
        except Exception:  # whatever it is, the other servers and the next look are not to suffer from it
            logger.exception("looking after an engine failed")
            await asyncio.sleep(INTERVAL)


async def _attend(server: Server, upstreams: Upstreams, starts: deque[float]) -> None:
    """Look once; `starts` are the times at which a dead engine was started again."""
    child = server.child
    if child is None or child.exit is None:
        return await _look(server, upstreams)
    while starts and time.monotonic() - starts[0] > RESTART_SPAN:
        starts.popleft()
    if len(starts) == MOST_RESTARTS:
        return _give_up(server, upstreams, end_of(child.exit))
    starts.append(time.monotonic())
    return await _start_again(server, child, upstreams, len(starts) - 1)


async def _pause(server: Server) -> None:
    """Wait until it is time to look: somebody asks for it, or the engine has ended, or some seconds are over."""
    waits = [asyncio.ensure_future(server.wake.wait())]
    if server.child is not None and server.child.exit is None:
        waits.append(asyncio.ensure_future(server.child.wait()))  # type: ignore[arg-type]
    await asyncio.wait(waits, timeout=INTERVAL if server.trouble is None else WHILE_DOWN, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    server.wake.clear()


async def _look(server: Server, upstreams: Upstreams) -> None:
    """Ask a server how it is; one that comes back is looked at as a new one."""
    before = server.trouble
    try:
        if not await server.healthy():
            raise Failed("says that it does not work")
        if before is not None:
            server.facts = await fitting(server, upstreams.model, upstreams.vocab_size, upstreams.context_length)
        server.trouble = None
    except Failed as error:
        server.trouble = str(error)
    if server.trouble != before:
        upstreams.log({"event": "upstream", "url": server.url, "trouble": server.trouble})
    if server.trouble is None and before is not None:
        upstreams.changed.set()


async def fitting(server: Server, model: str, vocab_size: int, longest: int) -> Facts:
    """The facts of a server that has to hold as much as those that work already. Raises `Failed` where it does not."""
    found = await server.look(model, vocab_size, longest)
    if found.context_length < longest:
        raise Failed(f"has a context of {found.context_length} tokens, and {longest} are promised")
    return found


async def _start_again(server: Server, child: Child, upstreams: Upstreams, before: int) -> None:
    """Start a dead engine, and wait until it answers or has died again."""
    assert child.exit is not None
    server.trouble = f"{end_of(child.exit)} and is started again"
    upstreams.log({"event": "engine_died", "how": end_of(child.exit), "restarts": child.restarts})
    await child.stop()
    await asyncio.sleep(BACKOFF * 2**before)
    child.restarts += 1
    try:
        await child.start()
        await await_health(server, child, lambda line: upstreams.log({"event": "engine", "message": line}))
    except (Died, Failed, OSError) as error:
        upstreams.log({"event": "engine_died", "how": str(error), "restarts": child.restarts})
        if child.exit is None:
            await child.stop()
        return
    await _look(server, upstreams)


def _give_up(server: Server, upstreams: Upstreams, how: str) -> None:
    why = f"{server.contract.name} {how} and was started again {MOST_RESTARTS} times"
    server.trouble = upstreams.lost = why
    upstreams.changed.set()
    upstreams.log({"event": "engine_lost", "how": how})
