"""A gateway process: takes over the listening socket and runs the HTTP face on it."""

from __future__ import annotations

import logging
import socket
import sys

import msgspec

from streaming import process
from streaming.settings import GatewayConfig

log = logging.getLogger(__name__)


class GatewaySpec(msgspec.Struct, frozen=True):
    """`entry` is "module:callable", called with the configuration and the socket whose descriptor is `fd`."""

    config: GatewayConfig
    fd: int
    entry: str


def main() -> int:
    spec = process.receive(GatewaySpec)
    process.configure_logging(spec.config.settings.log_level, "gateway")
    try:
        run = process.imported(spec.entry)
        run(spec.config, socket.socket(fileno=spec.fd))
    except Exception as error:  # whatever it is, the reader of the log needs one line that says it
        debugging = spec.config.settings.log_level == "debug"
        log.error("cannot go on: %s", process.describe_error(error), exc_info=debugging)
        return process.CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
