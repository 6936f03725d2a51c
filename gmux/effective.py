"""The effective settings as a file that means the same, each with where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from gmux import config
from gmux.config import Given, GivenRoute, RouteConfig
from gmux.errors import ConfigErrors
from gmux.kinds import FLAG, MODE
from gmux.settings import OF_ROUTES, OF_SERVICE, Setting
from gmux.sources import TABLES, Loaded

_DEFAULT = "default"


def render(loaded: Loaded) -> str:
    """A setting that is not given and has no default, or none that does anything, is left out."""
    of_service = {s.name: Given(s.default_text, _DEFAULT) for s in OF_SERVICE if s.default_text} | dict(loaded.texts)
    lines = ["[service]", *_lines("service", of_service)]
    for route, given in zip(loaded.config.routes, loaded.routes, strict=True):
        lines += ["", "[[route]]", *_lines("route", _with_defaults(route, given))]
    return "\n".join(lines)


def _with_defaults(route: RouteConfig, given: GivenRoute) -> dict[str, Given]:
    """What was given and the defaults, but for those that are not allowed to be given beside it."""
    texts = dict(given.texts)
    for setting in OF_ROUTES:
        if setting.name not in texts and setting.default_text:
            value = getattr(route, setting.name)
            # Some defaults follow from other settings, such as that of --pool-min.
            text = setting.default_text if value == setting.default_value else str(value)
            more = texts | {setting.name: Given(text, _DEFAULT)}
            try:
                config.read({}, [GivenRoute(more)])
            except ConfigErrors:
                continue
            texts = more
    return texts


def _lines(table: str, texts: dict[str, Given]) -> Iterator[str]:
    for key, setting in TABLES[table].items():
        if setting.name in texts:
            given = texts[setting.name]
            text = given.text
            value = _write(setting, text) if isinstance(text, str) else f"[{', '.join(map(_write_string, text))}]"
            yield f"{key} = {value}  # {given.where.removesuffix(': ' + key)}"


def _write(setting: Setting, text: str) -> str:
    is_number = setting.kind is not MODE and re.fullmatch("0|[1-9][0-9]{0,17}", text, re.ASCII)
    return text if setting.kind is FLAG or is_number else _write_string(text)


def _write_string(text: str) -> str:
    # JSON has the same escapes, but one character less that needs one.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
