"""A route: one listener, one codec, one pool, and their limits."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from functools import partial
from time import monotonic

import gevent

from gmux.access import AccessLog
from gmux.client import LINGER_TIMEOUT, Clients, ClientSettings
from gmux.config import RouteConfig, ServiceConfig
from gmux.descriptors import Descriptors
from gmux.disk import Disk
from gmux.ends import Ends
from gmux.keyed_pool import KeyedPool
from gmux.listener import Listener
from gmux.memory import Memory
from gmux.net import Address
from gmux.pipelined_pool import PipelinedPool
from gmux.pool import CLOSE, Pool, PoolParts, PoolSettings
from gmux.recorded_client import RecordedClient
from gmux.scheduler import Scheduler, Share
from gmux.slots import Slots
from gmux.spinner import Spinner
from gmux.succession import Succession
from gmux.trace import Trace

#: Seconds between two looks at whether the last request is answered.
DRAIN_INTERVAL = 0.02

#: Seconds between two attempts to hand over a client.
HAND_OVER_INTERVAL = 0.001

#: Seconds for which connections to the target are kept for a successor, when there are no clients any more.
HAND_OVER_PATIENCE = 0.5


@dataclass(frozen=True, slots=True)
class Common:
    """What the routes of one process have in common."""

    scheduler: Scheduler
    spinner: Spinner
    memory: Memory
    disk: Disk
    ends: Ends
    descriptors: Descriptors


class Route:
    """Made by the worker for a listening socket and the address of the target."""

    def __init__(
        self,
        config: RouteConfig,
        service: ServiceConfig,
        listening: socket.socket,
        target: Address,
        slots: Slots,
        common: Common,
        log: logging.Logger,
        succession: Succession | None = None,
        access: AccessLog | None = None,
    ) -> None:
        """`succession` is not there where the listening socket is not shared with other processes."""
        codec = config.make_codec()
        trace = Trace(log, codec.redact, unsafe=service.unsafe_dump) if service.verbose else None
        pool_settings = PoolSettings(
            target=target,
            size=config.pool_size,
            minimum=config.pool_min,
            pipeline=config.pipeline,
            prefer_pipeline=config.prefer_pipeline,
            late_window=config.late_window,
            unsolicited=config.unsolicited,
            hears=config.unsolicited != CLOSE or config.answer_network_management,
            greeting=config.make_greeting(codec),
            idle_check=config.idle_check,
            queue_limit=config.queue_limit,
            queue_timeout=config.queue_timeout,
            connect_timeout=config.connect_timeout,
            timeout=config.timeout,
            connect_delay=config.connect_delay,
            request_delay=config.request_delay,
            retry_delay=config.retry_delay,
            idle_timeout=config.upstream_idle_timeout,
            max_age=config.upstream_max_age,
            private_timeout=config.private_timeout,
        )
        client_settings = ClientSettings(
            request_timeout=config.request_timeout,
            idle_timeout=config.client_idle_timeout,
            write_timeout=config.client_write_timeout,
            spool_memory=config.spool_memory,
            spool_limit=config.spool_limit,
        )
        pool_class = KeyedPool if codec.correlation == "key" else PipelinedPool if config.pipeline > 1 else Pool
        route_access = access.of_route(config.name) if access else None
        share = Share(common.scheduler)
        parts = PoolParts(codec, slots, share, common.spinner, log, trace, route_access)
        self._pool = pool_class(pool_settings, parts)
        self._clients = Clients(client_settings, codec, self._pool, common.memory, common.disk, common.ends, share, log)
        self._pool.broadcast = self._clients.broadcast
        if route_access is not None:
            self._clients.make_client = partial(RecordedClient, route_access)
        common.descriptors.reserve(self._pool.unmade)
        has_others = config.pool_size > 1
        self._listener = Listener(listening, self._clients, config.max_clients, common.descriptors, log, has_others)
        self._succession = succession
        self._protocol = config.protocol
        self._log = log

    def start(self) -> None:
        self._pool.start()
        self._listener.start()
        if self._succession is not None:
            self._succession.open(self._protocol, self._listener.adopt, self._log)

    def requests_under_way(self) -> int:
        return sum(client.has_request for client in self._clients.members)

    def drain(self, seconds: float) -> bool:
        """Stop accepting, let requests under way end, and close; switches greenlets. Whether all ended in time."""
        end = monotonic() + seconds
        clients = self._clients
        self._listener.close()
        has_successor = self._succession is not None and self._succession.begin()
        if self._succession is not None:
            clients.hand_over = self._succession.hand_over
            gevent.sleep(0)  # those that came in the last moment are among them now
        clients.drain(has_successor)
        self._pool.drain()
        with gevent.Timeout(seconds, False):
            while len(clients.members) > len(clients.lingering):
                # A mailbox takes few messages at a time, and its reader soon has them.
                gevent.sleep(HAND_OVER_INTERVAL if clients.leave() else DRAIN_INTERVAL)
        is_done = len(clients.members) == len(clients.lingering)
        if has_successor and is_done:
            # It may just be starting, and will ask.
            with gevent.Timeout(HAND_OVER_PATIENCE, False):
                while not self._pool.is_empty:
                    gevent.sleep(DRAIN_INTERVAL)
        # The connections to the target go first: after a reload another process waits for them, and clients that are
        # slow to close do not need them any more.
        self._pool.stop()
        if is_done:
            # The last bytes of an answer may still be on their way.
            with gevent.Timeout(max(LINGER_TIMEOUT, end - monotonic()), False):
                while clients.members:
                    gevent.sleep(DRAIN_INTERVAL)
        for client in list(clients.members):
            client.abort()
        if self._succession is not None:
            self._succession.close()
        clients.warn.flush()
        return is_done
