"""Where ranks meet: processes of one machine that train together.

In: how many. Out: torchrun's environment of each. As under torchrun, the store is one of the process that starts them. A port that
was free a moment ago, and is taken by rank 0 later, may be somebody else's by then.
"""

import contextlib
from collections.abc import Iterator

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # which it has all the same


@contextlib.contextmanager
def rendezvous(world: int) -> Iterator[list[dict[str, str]]]:
    """The environments of `world` ranks, which can meet as long as the block lasts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    del store
