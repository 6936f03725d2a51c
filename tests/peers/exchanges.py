"""What every client asks of every target, and the bodies that both sides agree on. It runs in clients and tests."""

from __future__ import annotations

from dataclasses import dataclass, field

TARGETS = ("gunicorn", "http.server-1.0", "http.server-1.1", "node", "nginx")
CLIENTS = ("curl", "httpx", "urllib3", "aiohttp")

#: Those that have an idea of a connection that stays.
KEEPING = tuple(name for name in TARGETS if name != "http.server-1.0")

LARGE = 5_000_000

#: Requests that a client makes at the same time.
AT_ONCE = 20

#: nginx makes its own of time and size of a file: of `small` as the tests write it.
NGINX_ETAG = '"3b9aca00-6"'


def content(size: int) -> bytes:
    """No two lines are alike, so a part that is lost, repeated or out of place shows."""
    return b"".join(b"%09d\n" % n for n in range(size // 10 + 1))[:size]


@dataclass(frozen=True)
class Exchange:
    """`body` is a size; None is none. `may_end` names the targets whose connection it may cost.
    `status` is what targets say, each in its way.
    """

    name: str
    method: str
    path: str
    fields: dict[str, str] = field(default_factory=dict)
    body: int | None = None
    is_chunked: bool = False
    expects: bool = False
    targets: tuple[str, ...] = TARGETS
    may_end: tuple[str, ...] = ()
    status: tuple[int, ...] = (200,)

    def __str__(self) -> str:
        return self.name


QUERY = "/tell?q=%C3%A4%2f+%20&e=&=v&a[]=1;b=2|~'()*!,:@&x=%00%0d%0a&u=//b/../c?d"
CHUNKED = ("gunicorn", "node", "nginx")

EXCHANGES = (
    Exchange("get small", "GET", "/small"),
    Exchange("get large", "GET", "/large"),
    Exchange("head", "HEAD", "/large"),
    Exchange("204", "GET", "/none", status=(204,)),
    Exchange("302", "GET", "/moved", status=(302,)),
    Exchange("304", "GET", "/small", {"If-None-Match": '"0"'}, targets=TARGETS[:4], status=(304,)),
    Exchange("304 of a file", "GET", "/small", {"If-None-Match": NGINX_ETAG}, targets=("nginx",), status=(304,)),
    Exchange("206 of a file", "GET", "/large", {"Range": "bytes=4999990-"}, targets=("nginx",), status=(206,)),
    Exchange("404", "GET", "/missing", status=(404,)),
    Exchange("head of 404", "HEAD", "/missing", status=(404,)),
    Exchange("gzip", "GET", "/gzip", {"Accept-Encoding": "gzip"}),
    Exchange("no gzip", "GET", "/gzip", {"Accept-Encoding": "identity"}),
    Exchange("query", "GET", QUERY),
    Exchange("many fields", "GET", "/tell", {f"X-F{n}": f"value {n}, {n}" for n in range(60)}),
    Exchange("many fields back", "GET", "/fields"),
    Exchange("put", "PUT", "/store/a", body=200_000, status=(200, 201)),
    Exchange("put in chunks", "PUT", "/store/b", body=200_000, is_chunked=True, targets=CHUNKED, status=(200, 201)),
    Exchange("get what was put", "GET", "/store/a", targets=("nginx",)),
    Exchange("get what was put in chunks", "GET", "/store/b", targets=("nginx",)),
    Exchange("delete", "DELETE", "/store/a", status=(200, 204)),
    Exchange("delete after chunks", "DELETE", "/store/b", status=(200, 204)),
    # nginx answers these before it has the body, and gmux then cannot use the connection again.
    Exchange("post", "POST", "/echo", body=100_000, may_end=("nginx",)),
    Exchange("post empty", "POST", "/echo", body=0, may_end=("nginx",)),
    Exchange("post in chunks", "POST", "/echo", body=300_000, is_chunked=True, targets=CHUNKED, may_end=("nginx",)),
    Exchange("post expecting 100", "POST", "/echo", body=2_000_000, expects=True, targets=KEEPING, may_end=("nginx",)),
    Exchange(
        "413 by the target", "PUT", "/store/c", body=3_000_000, targets=("nginx",), may_end=("nginx",), status=(413,)
    ),
    Exchange("get after 413", "GET", "/small", targets=("nginx",)),
    # gmux ends the connection behind it, because a target may not read it.
    Exchange("delete with a body", "DELETE", "/store/d", body=10, targets=TARGETS[:4], may_end=TARGETS),
    Exchange("get after delete", "GET", "/small"),
)


def exchanges_of(target: str) -> list[Exchange]:
    return [exchange for exchange in EXCHANGES if target in exchange.targets]
