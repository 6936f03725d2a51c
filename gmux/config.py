"""The configuration: the settings of a service and of its routes, parsed and found to fit together.

Where a setting was given is told by each error, and all errors are told at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmux.codecs import registry
from gmux.codecs.base import Codec, Limits, Request
from gmux.errors import ConfigError, ConfigErrors, FramingError
from gmux.kinds import Address
from gmux.settings import BY_FLAG, BY_NAME, ISO8583, OF_ROUTES, OF_SERVICE, SETTINGS, Setting


@dataclass(frozen=True, slots=True)
class Given:
    """What somebody gave for a setting: the text, and the name of the place, for errors.

    The place is `--pool-size`, `GMUX_POOL_SIZE`, or `gmux.toml:12: pool-size`.
    """

    text: str | list[str]
    where: str


#: By the name of the setting.
Texts = Mapping[str, Given]


@dataclass(frozen=True, slots=True)
class GivenRoute:
    """What was given for one route. `where` names the place of its beginning, for errors; `name` may be empty."""

    texts: Texts
    name: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """The settings of a route, parsed. Times in seconds, sizes in bytes."""

    name: str
    protocol: str
    listen: Address
    target: Address | None
    listen_mode: int
    listen_owner: tuple[int, int] | None
    pool_size: int
    pool_min: int
    budget: str
    pipeline: int
    prefer_pipeline: bool
    correlation: str
    spec: str | dict[str, dict[str, Any]]
    key_fields: tuple[tuple[str, tuple[int, ...]], ...]
    late_window: float
    unsolicited: str
    answer_network_management: bool
    on_connect: bytes
    idle_check: float
    queue_limit: int
    queue_timeout: float
    connect_timeout: float
    timeout: float
    connect_delay: float
    request_delay: float
    retry_delay: float
    upstream_idle_timeout: float
    upstream_max_age: float
    private_timeout: float
    max_clients: int
    max_message: int
    request_timeout: float
    client_idle_timeout: float
    client_write_timeout: float
    spool_memory: int
    spool_limit: int
    via: bool
    forwarded: str
    set_header: tuple[tuple[str, str], ...]
    host: str

    def make_codec(self) -> Codec:
        """The codec of the protocol, with its limits and its settings. Raises ConfigError."""
        settings = {s.name: getattr(self, s.name) for s in SETTINGS if s.is_of_codec and self.protocol in s.protocols}
        if "host" in settings:
            settings["authority"] = format_authority(self.target)
        return registry.load(self.protocol)(Limits(max_message=self.max_message), **settings)

    def make_greeting(self, codec: Codec) -> Request | None:
        """What --on-connect sends. Raises ConfigError."""
        if not self.on_connect:
            return None
        try:
            return codec.make_request(self.on_connect)
        except FramingError as error:
            raise ConfigError(f"--on-connect: the file holds no message of {self.protocol}: {error}") from None


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """The settings of a service, parsed, and its routes."""

    config: str
    workers: int
    worker_timeout: int
    graceful_timeout: float
    memory_limit: int
    disk_limit: int
    spin: float
    name: str
    daemon: bool
    pid: str
    user: int | None
    group: int | None
    umask: int | None
    chdir: str
    runtime_dir: str
    log_file: str
    log_level: str
    log_format: str
    access_log: str
    verbose: bool
    unsafe_dump: bool
    quiet: bool
    routes: tuple[RouteConfig, ...]


def format_authority(target: Address | None) -> str:
    """The target as in a Host field."""
    if target is None or isinstance(target, str):
        return "localhost"
    host, port = target
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read(texts: Texts, routes: Sequence[GivenRoute]) -> ServiceConfig:
    """The configuration from what was given for the service and for each route. Raises ConfigErrors."""
    problems: list[str] = []
    values = _parse(OF_SERVICE, texts, problems)
    is_service_right = not problems
    right = [(parsed, route) for route in routes if (parsed := _read_route(route, problems)) is not None]
    problems += _names_given_twice(routes)
    config = ServiceConfig(**values, routes=tuple(route for route, _ in right))
    if is_service_right:
        problems += [_place(texts, name) + text for name, text in _service_conflicts(config)]
    problems += _routes_conflicts(right)
    if problems:
        raise ConfigErrors(problems)
    return config


def verify(config: ServiceConfig, routes: Sequence[GivenRoute]) -> None:
    """Make each codec once: in a worker its failure would be one to try again, without end. Raises ConfigErrors."""
    problems = []
    for route, given in zip(config.routes, routes, strict=True):
        try:
            codec = route.make_codec()
            route.make_greeting(codec)
            if route.idle_check:
                codec.make_echo_test(1, "0101000000")
        except ConfigError as error:
            flag, colon, text = str(error).partition(": ")
            setting = BY_FLAG.get(flag)
            problems.append(_place_in(given, setting.name) + text if setting and colon else str(error))
        except Exception as error:  # another package's code: anything may come
            problems.append(f"{_place_in(given, 'protocol')}cannot load the protocol {route.protocol}: {error!r}")
    if problems:
        raise ConfigErrors(problems)


def _place(texts: Texts, name: str) -> str:
    return f"{texts[name].where if name in texts else BY_NAME[name].flag}: "


def _place_in(route: GivenRoute, name: str) -> str:
    """A default has no place of its own, but its route may have."""
    if route.where and name not in route.texts:
        return f"{route.where}: {BY_NAME[name].key}: "
    return _place(route.texts, name)


def _of(route_name: str) -> str:
    return f" of the route {route_name}" if route_name else ""


def _parse(settings: Sequence[Setting], texts: Texts, problems: list[str]) -> dict[str, Any]:
    """The values by name; a default stands in for a wrong one, which becomes a problem."""
    values = {}
    for setting in settings:
        values[setting.name] = setting.default_value
        if setting.name in texts:
            try:
                values[setting.name] = setting.parse(texts[setting.name].text)
            except ConfigError as error:
                problems.append(_place(texts, setting.name) + str(error))
    return values


def _read_route(route: GivenRoute, problems: list[str]) -> RouteConfig | None:
    """The route, or None when there is something wrong with it, which is a problem then."""
    given = route.texts
    known = len(problems)
    values = _parse(OF_ROUTES, given, problems)
    if len(problems) > known:
        return None  # what would be said of how its settings fit might be wrong
    foreign = set()
    for setting in OF_ROUTES:
        if setting.name in given and setting.protocols and values["protocol"] not in setting.protocols:
            foreign.add(setting.name)
            problems.append(
                f"{_place_in(route, setting.name)}is not allowed with --protocol"
                f" {values['protocol']}{_of(route.name)}: it is for {', '.join(setting.protocols)} alone"
            )
    if values["upstream_idle_timeout"] and "pool_min" not in given:
        values["pool_min"] = 0
    if values["correlation"] == "auto":
        is_by_key = values["protocol"] in ISO8583 and values["pipeline"] > 1
        values["correlation"] = "key" if is_by_key else "order"
    if values["unsolicited"] == "auto" and values["protocol"] not in ISO8583:
        values["unsolicited"] = "close"  # no other codec can tell what a message is
    elif values["unsolicited"] == "auto" and values["correlation"] == "key":
        values["unsolicited"] = "drop"
    config = RouteConfig(name=route.name, **values)
    conflicts = _route_conflicts(config, given)
    problems += [_place_in(route, name) + text for name, text in conflicts if name not in foreign]
    return config


def _route_conflicts(config: RouteConfig, given: Texts) -> Iterator[tuple[str, str]]:
    """The settings of a route that contradict others of it: the name of each, and what is to be said."""
    if not isinstance(config.listen, str):
        for name in ("listen_mode", "listen_owner"):
            if name in given:
                yield name, "is not allowed with a port: it is for --listen unix:/PATH alone"
    if config.pool_min > config.pool_size:
        yield "pool_min", f"'{config.pool_min}' is not allowed: at most --pool-size, which is {config.pool_size}"
    if config.upstream_idle_timeout and config.pool_min == config.pool_size:
        yield (
            "upstream_idle_timeout",
            f"is not allowed with --pool-min {config.pool_min}: it closes connections above that number, and"
            f" --pool-size is {config.pool_size}",
        )
    if config.connect_delay and config.queue_timeout and config.connect_delay >= config.queue_timeout:
        yield (
            "connect_delay",
            f"'{config.connect_delay:g}s' is not allowed: it counts as waiting, so it must be shorter than"
            f" --queue-timeout, which is {config.queue_timeout:g}s",
        )
    if config.pipeline > 1 and config.request_delay:
        yield "request_delay", f"is not allowed with --pipeline {config.pipeline}: it is a rest between two requests"
    if "late_window" in given and config.correlation != "key":
        yield "late_window", "is not allowed with --correlation order, which closes the connection after --timeout"
    # A request and its answer are of one kind: 0800 and 0810.
    kinds = [f"{mti[:2]}{int(mti[2]) // 2}" if mti else "" for mti, _ in config.key_fields]
    if len(set(kinds)) < len(kinds):
        yield "key_fields", "is given twice for the same kind of message"
    if config.prefer_pipeline and config.pipeline == 1:
        yield "prefer_pipeline", "is not allowed with --pipeline 1: a connection is full with one request"
    if config.upstream_max_age and config.upstream_max_age <= config.connect_delay:
        yield (
            "upstream_max_age",
            f"'{config.upstream_max_age:g}s' is not allowed: it must be longer than --connect-delay, which is"
            f" {config.connect_delay:g}s",
        )


def _service_conflicts(config: ServiceConfig) -> Iterator[tuple[str, str]]:
    if config.verbose and config.quiet:
        yield "quiet", "is not allowed together with --verbose"
    for flag in ("verbose", "quiet"):
        if getattr(config, flag) and config.log_level != "info":
            yield "log_level", f"{config.log_level!r} is not allowed together with --{flag}, which says it already"
    for route in config.routes:
        of_route = _of(route.name)
        if config.workers > route.pool_size:
            yield (
                "workers",
                f"'{config.workers}' is not allowed: at most --pool-size{of_route}, which is {route.pool_size}, as a"
                " worker without a connection could only wait for one",
            )
        if config.workers > 1 and route.target is None:
            yield (
                "workers",
                f"'{config.workers}' is not allowed with --target embedded{of_route}, which is inside one worker",
            )


def _names_given_twice(routes: Sequence[GivenRoute]) -> Iterator[str]:
    """Also names not given, where there are several routes to tell apart."""
    counts = Counter(route.name for route in routes)
    for route in routes:
        if not route.name and len(routes) > 1:
            yield f"{_place_in(route, 'name')}is missing: each of several routes needs one"
        elif counts[route.name] > 1:
            yield f"{_place_in(route, 'name')}{route.name!r} is not allowed: another route has this name"


def _routes_conflicts(routes: Sequence[tuple[RouteConfig, GivenRoute]]) -> Iterator[str]:
    """What routes cannot have in common, and what those to one target must have."""
    listeners: dict[Address, RouteConfig] = {}
    budgets: dict[str, RouteConfig] = {}
    for route, given in routes:
        is_any_port = not isinstance(route.listen, str) and not route.listen[1]
        other = listeners.setdefault(route.listen, route)
        if other is not route and not is_any_port:
            yield f"{_place_in(given, 'listen')}is not allowed: the route {other.name} listens there already"
        if route.target is not None:
            other = budgets.setdefault(budget_name(route), route)
            if other.pool_size != route.pool_size:
                yield (
                    f"{_place_in(given, 'pool_size')}'{route.pool_size}' is not allowed: it is {other.pool_size} in"
                    f" the route {other.name}, which shares the connections to the target"
                )


def budget_name(route: RouteConfig) -> str:
    """The name of the budget of a route's upstream connections. A name that was given is told from an address."""
    assert route.target is not None
    if route.budget:
        return "budget " + route.budget
    return "unix:" + route.target if isinstance(route.target, str) else format_authority(route.target)
