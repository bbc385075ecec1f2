"""`keural serve` before vLLM or SGLang: our API, their network.

In: a model's path, settings, a socket. Out: the exit code.
"""

import shlex
import socket
from contextlib import AbstractContextManager
from pathlib import Path

from keural.errors import UserError
from keural.serve.engines.registry import saved_defaults
from keural.serve.server.keys import Keys
from keural.serve.server.log import set_up_logging, write_entry
from keural.serve.server.running import answer, name_of
from keural.serve.server.settings import Settings
from keural.serve.server.start import with_settings
from keural.serve.upstream.models import FrontModel, find_export, front_model
from keural.serve.upstream.opening import CONTRACTS, addresses, check_defaults, own, read_key, remote
from keural.serve.upstream.runner import Upstreams


def serve_elsewhere(path: Path, settings: Settings, keys: Keys | None, listener: socket.socket) -> int:
    """Front servers, or start one, and answer at `listener` until a signal ends it; returns the exit code. Raises `UserError`."""
    model = front_model(path)
    defaults, system = with_settings(*saved_defaults(model.directory), settings)
    name = settings.name or name_of(model.directory)
    set_up_logging()
    with _servers(model, name, settings) as upstreams:
        check_defaults(upstreams, defaults)
        return answer(upstreams, model.tokenizer, model.directory, settings, defaults, system, keys, listener)


def _servers(model: FrontModel, name: str, settings: Settings) -> AbstractContextManager[Upstreams]:
    """Servers that run already, or one that is started."""
    assert settings.engine is not None
    contract, count = CONTRACTS[settings.engine], settings.answers_at_once
    if settings.upstream:
        key = None if settings.upstream_key_file is None else read_key(settings.upstream_key_file)
        return remote(contract, addresses(settings.upstream), key, model, name, count, write_entry)
    try:
        more = shlex.split(settings.engine_arguments)
    except ValueError as error:
        raise UserError(f"--engine-args: cannot be read as a command line ({error})") from error
    contract.launch(model.directory, name, 0, "", more)  # says that an engine is not installed before an export is made for it
    return own(contract, find_export(model, settings.export), more, model, name, count, write_entry)
