"""Word to the service manager that started the server: systemd's protocol, one datagram a message.

In: what has happened. Out: a message to the socket that `NOTIFY_SOCKET` names; nothing where nobody asked for it.
"""

import os
import socket
from collections.abc import Callable

SOCKET, WATCHDOG, WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
TICKS = 10
"""A second, as uvicorn counts them."""


def tell(message: str) -> None:
    """Send a message such as `READY=1`. A manager that does not listen any more is no reason to stop answering."""
    address = os.environ.get(SOCKET, "")
    if address[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(1)
            connection.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        return


def watchdog(trouble: Callable[[], str | None]) -> Callable[[int], None]:
    """What to call at every tick of the loop: as long as there is no trouble, the manager hears so twice within its patience."""
    patience, process = os.environ.get(WATCHDOG, ""), os.environ.get(WATCHDOG_PID, "")
    if not patience.isdecimal() or int(patience) == 0 or process not in ("", str(os.getpid())):
        return lambda _: None
    every = max(1, int(patience) * TICKS // 2_000_000)

    def tick(counter: int) -> None:
        if counter % every == 0 and trouble() is None:
            tell("WATCHDOG=1")

    return tick
