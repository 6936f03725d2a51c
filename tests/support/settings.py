"""Settings as they would be given by flags."""

from __future__ import annotations

from collections.abc import Mapping

from gmux import config
from gmux.config import Given, GivenRoute, RouteConfig, ServiceConfig
from gmux.settings import BY_NAME, OF_ROUTES


def read(texts: Mapping[str, str | list[str]]) -> ServiceConfig:
    """A service with one route. Raises ConfigErrors."""
    given = {name: Given(text, BY_NAME[name].flag) for name, text in texts.items()}
    of_route = {s.name: given.pop(s.name) for s in OF_ROUTES if s.name in given}
    return config.read(given, [GivenRoute(of_route)])


def read_route(texts: Mapping[str, str | list[str]]) -> RouteConfig:
    """The one route. Raises ConfigErrors."""
    (route,) = read(texts).routes
    return route
