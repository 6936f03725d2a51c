"""A real client in a process of its own: `client NAME TARGET URL...` does all exchanges at each URL, one after another
on one connection where it can, then asks the last URL for AT_ONCE tokens at once. What it got is JSON on its stdout.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Barrier
from typing import Any

from tests.peers.exchanges import AT_ONCE, Exchange, content, exchanges_of

#: Seconds for one exchange.
PATIENCE = 15

Got = dict[str, Any]
Ask = Callable[[Exchange], Got]


def got(status: int, fields: Iterable[tuple[str, str]], body: bytes) -> Got:
    text = body.decode("latin-1") if len(body) < 20_000 else ""
    digest = hashlib.sha256(body).hexdigest()
    return {"status": status, "fields": list(fields), "length": len(body), "sha256": digest, "text": text}


def decoded(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]


def fields_of(exchange: Exchange) -> dict[str, str]:
    fields = dict(exchange.fields)
    if exchange.body is not None:
        fields["Content-Type"] = "application/octet-stream"
    if exchange.expects:
        fields["Expect"] = "100-continue"
    return fields


def body_of(exchange: Exchange) -> Any:
    """None, bytes, or an iterator, which the libraries send in chunks."""
    if exchange.body is None:
        return None
    data = content(exchange.body)
    return iter((data[:1000], data[1000:])) if exchange.is_chunked else data


@contextmanager
def httpx_client(base: str) -> Iterator[Ask]:
    import httpx

    def ask(exchange: Exchange) -> Got:
        request = client.build_request(
            exchange.method, base + exchange.path, headers=fields_of(exchange), content=body_of(exchange)
        )
        answer = client.send(request, stream=True)
        body = b"".join(answer.iter_raw())
        return got(answer.status_code, decoded(answer.headers.raw), body)

    with httpx.Client(timeout=PATIENCE, trust_env=False) as client:
        yield ask


@contextmanager
def urllib3_client(base: str) -> Iterator[Ask]:
    import urllib3

    def ask(exchange: Exchange) -> Got:
        answer = pool.request(
            exchange.method,
            base + exchange.path,
            headers=fields_of(exchange),
            body=body_of(exchange),
            chunked=exchange.is_chunked,
            decode_content=False,
        )
        return got(answer.status, answer.headers.items(), answer.data)

    with urllib3.PoolManager(maxsize=AT_ONCE, timeout=PATIENCE, retries=False) as pool:
        yield ask


def one_by_one(client: Callable[[str], AbstractContextManager[Ask]], base: str, exchanges: list[Exchange]) -> list[Got]:
    answers = []
    with client(base) as ask:
        for exchange in exchanges:
            try:
                answers.append(ask(exchange))
            except Exception as error:
                answers.append({"error": repr(error)})
    return answers


def at_once(client: Callable[[str], AbstractContextManager[Ask]], base: str, exchanges: list[Exchange]) -> list[Got]:
    ready = Barrier(AT_ONCE)

    def meet(exchange: Exchange) -> Got:
        ready.wait(PATIENCE)
        return ask(exchange)

    with client(base) as ask, ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(meet, exchanges))


async def with_aiohttp(base: str, exchanges: list[Exchange], is_at_once: bool) -> list[Got]:
    import aiohttp
    from yarl import URL

    async def ask(exchange: Exchange) -> Got:
        fields, body = fields_of(exchange), body_of(exchange)
        # It waits for the 100 only when it writes the field itself.
        fields.pop("Expect", None)
        async with session.request(
            exchange.method,
            URL(base + exchange.path, encoded=True),
            headers=fields,
            data=drip(body) if exchange.is_chunked else body,
            expect100=exchange.expects,
            allow_redirects=False,
        ) as answer:
            return got(answer.status, decoded(answer.raw_headers), await answer.read())

    async def drip(parts: Iterator[bytes]) -> Any:
        for part in parts:
            yield part

    async with aiohttp.ClientSession(
        auto_decompress=False,
        connector=aiohttp.TCPConnector(limit=AT_ONCE),
        timeout=aiohttp.ClientTimeout(PATIENCE),
    ) as session:
        if is_at_once:
            return list(await asyncio.gather(*map(ask, exchanges)))
        answers = []
        for exchange in exchanges:
            try:
                answers.append(await ask(exchange))
            except Exception as error:
                answers.append({"error": repr(error)})
        return answers


def with_curl(base: str, exchanges: list[Exchange], is_at_once: bool) -> list[Got]:
    """One curl for all, which uses its connection again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["curl", "-q"]
        if is_at_once:
            words += ["--parallel", "--parallel-immediate", "--parallel-max", str(AT_ONCE)]
        for n, exchange in enumerate(exchanges):
            words += ["--next"] if n else []
            words += ["-sS", "-g", "--path-as-is", "--noproxy", "*", "--max-time", str(PATIENCE)]
            words += ["-D", f"{folder}/{n}.head", "-o", f"{folder}/{n}.body"]
            words += ["-I"] if exchange.method == "HEAD" else ["-X", exchange.method]
            fields = fields_of(exchange)
            if exchange.body is not None:
                (folder / f"{n}.sent").write_bytes(content(exchange.body))
                words += ["--data-binary", f"@{folder}/{n}.sent"]
                # Of itself curl expects 100 from a megabyte on.
                words += ["-H", "Transfer-Encoding: chunked"] if exchange.is_chunked else []
                words += [] if exchange.expects else ["-H", "Expect:"]
            for field in fields.items():
                words += ["-H", "{}: {}".format(*field)]
            words.append(base + exchange.path)
        done = subprocess.run(words, capture_output=True, text=True, timeout=2 * PATIENCE)
        return [
            curls_answer(folder, n, exchange, done.returncode and f"curl exits with {done.returncode}: {done.stderr}")
            for n, exchange in enumerate(exchanges)
        ]


def curls_answer(folder: Path, n: int, exchange: Exchange, error: str | int) -> Got:
    head, body = folder / f"{n}.head", folder / f"{n}.body"
    if error or not head.exists():
        return {"error": str(error)}
    # Interim answers stand before it.
    status, *lines = head.read_bytes().decode("latin-1").rstrip().split("\r\n\r\n")[-1].split("\r\n")
    data = body.read_bytes() if body.exists() and exchange.method != "HEAD" else b""
    fields = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return got(int(status.split(" ")[1]), fields, data)


def do(name: str, base: str, exchanges: list[Exchange], is_at_once: bool = False) -> list[Got]:
    if name == "curl":
        return with_curl(base, exchanges, is_at_once)
    if name == "aiohttp":
        return asyncio.run(with_aiohttp(base, exchanges, is_at_once))
    client = {"httpx": httpx_client, "urllib3": urllib3_client}[name]
    return (at_once if is_at_once else one_by_one)(client, base, exchanges)


def main(name: str, target: str, *bases: str) -> None:
    exchanges = exchanges_of(target)
    # Each on a connection of its own, so that the connections can be counted.
    tokens = [Exchange(str(n), "GET", f"/token/{name}-{n}", {"Connection": "close"}) for n in range(AT_ONCE)]
    results = [do(name, base, exchanges) for base in bases]
    print(json.dumps({"results": results, "at_once": do(name, bases[-1], tokens, is_at_once=True)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
