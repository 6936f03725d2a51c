"""The reference of the settings, docs/settings.md: rendered from their declarations and the texts here.

`python -m gmux.reference` prints it; `make docs` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from gmux.kinds import FLAG
from gmux.settings import PROTOCOL, ROUTE_GROUPS, SETTINGS, Setting

_INTRO = """\
<!-- Made by `make docs` from gmux/settings.py and gmux/reference.py. -->

# Settings

Every setting is a flag of `gmux server` and `gmux check`, a variable of the environment and a key in a
[file](configuration.md). A flag goes before a variable, a variable before the file, and the file before the default.
Those under {routes} are settings of routes: a file has them in `[[route]]` and
`[defaults]`, and the others in `[service]`.

`--timeout 10s` and `--timeout=10s` mean the same. Flags are written out in full and given once, but for
{repeating}, which take an array in a file, and in a variable a value in each line.
What is `true` or `false` is a flag without a value.

Each wrong value is told in one line that names its place, the value and what is allowed. gmux ends with code 2 when all
are of flags and variables, else with code 1; `gmux check` ends with code 1. A flag that is unknown ends both with 2.

Times are a number with `ms`, `s`, `m`, `h` or `d`; a bare number is seconds. Sizes are a number with `k`, `M` or `G`
(powers of 1024); a bare number is bytes. `0` turns a limit or a delay off where the table allows it. A setting that is
for some protocols is refused with others, but in `[defaults]`, where it is for the routes that can use it.
"""

_TABLE = """\
| flag | key | variable | default | allowed | what it does, and what happens at the limit |
| --- | --- | --- | --- | --- | --- |"""

#: What stands above the table of a group.
_GROUPS = {"HTTP": "See [what gmux writes](protocols.md#fields-that-gmux-writes).\n"}

#: What a setting does, by its name: more than its help, which has one line.
ABOUT: dict[str, str] = {
    "config": (
        "A [file of settings](configuration.md) in TOML, of up to 1 MiB. Flags and variables go before what it says. "
        "A reload reads it again."
    ),
    "protocol": "How messages are framed, on both sides. See [protocols](protocols.md).",
    "listen": (
        "Where clients connect. A bare port is all addresses, IPv6 and IPv4. A name stands for the first address it "
        "resolves to. Port 0 is a free port; the log tells which. `unix:/PATH` is a Unix socket. Each route needs an "
        "address of its own, so in a file it stands in `[[route]]` alone."
    ),
    "target": (
        "Where requests go. `embedded` starts a sample target inside gmux, for the four protocols of gmux; it takes "
        "`--pool-size` connections and refuses more."
    ),
    "listen_mode": (
        "Who may connect to the Unix socket that `--listen` makes: those who may write to it. Not allowed with a port."
    ),
    "listen_owner": (
        "User and group of the Unix socket that `--listen` makes. Without it they are those of the service. Not "
        "allowed with a port."
    ),
    "pool_size": (
        "Upstream connections to the target, at most, over all gmux of one user on one machine. Requests above it wait."
    ),
    "pool_min": (
        "At most `--pool-size`. Connections opened at start, kept while idle, and made again when they end. With "
        "`--upstream-idle-timeout` and no `--pool-min`, it is 0."
    ),
    "budget": (
        "The name of the budget that `--pool-size` is for. Without it, the address of the target as it is written. "
        "Give routes to one target that is written in several ways the same name, and routes to two targets behind "
        "one address two names."
    ),
    "pipeline": (
        "Requests in flight on each connection, at most. See [several in flight](protocols.md#several-in-flight). For "
        "`http` it is 1 until the target has passed [a probe](protocols.md#the-probe). Not allowed with "
        "`--request-delay`."
    ),
    "prefer_pipeline": (
        "Fill a connection before another is opened. Without it, a request goes beside others only when all "
        "`--pool-size` connections are there. Needs a `--pipeline` above 1."
    ),
    "correlation": (
        "How an answer finds its request, by its place in the order or by its key. `auto` is by key when `--pipeline` "
        "is above 1."
    ),
    "spec": (
        "Where the fields of a message are. `ascii` and `binary` are the specs that come with pyiso8583; a file is one "
        "of its form, in JSON. `auto` is `ascii` by key; by order, gmux finds the [type and field "
        "11](protocols.md#what-a-message-is) without a spec."
    ),
    "key_fields": (
        "The fields that an answer has in common with its request: one list for all message types, and one for each "
        "type that differs. Without it, by key 11 and 41, or 7 and 11 where there is no 41; by order 11."
    ),
    "late_window": (
        "By key: for this long after `--timeout` the key of a request stays reserved on its connection, so that a late "
        "answer is not taken for that of a new request. `0`: as long as the connection is open. A connection with "
        "4,096 reserved keys is replaced when nothing is in flight on it."
    ),
    "unsolicited": (
        "What gmux does with [an unsolicited message](protocols.md#what-belongs-to-one-hop). `auto` drops it, with a "
        "warning, and closes the connection where it cannot read the message type."
    ),
    "answer_network_management": (
        "gmux answers echo tests, sign-ons and sign-offs of the target, and echo tests of clients."
    ),
    "on_connect": (
        "A message, without its length header, that is sent on each new connection. gmux waits for its answer before "
        "the first request. Without an answer the attempt to connect has failed."
    ),
    "idle_check": (
        "gmux sends an echo test on a connection that is idle for this long, and closes it when no answer comes within "
        "`--timeout`."
    ),
    "queue_limit": (
        "Requests that may wait for a connection. One more is refused as overloaded. A client waits with one request "
        "at a time, so this also bounds the clients that wait."
    ),
    "queue_timeout": (
        "Longest wait for a connection. `--connect-delay` and `--request-delay` count as waiting. Then the request is "
        "refused and never sent."
    ),
    "connect_timeout": (
        "Longest time to make a connection, name resolution included. The wait for one that another process holds "
        "comes before it, and counts as waiting for a connection (`--queue-timeout`)."
    ),
    "timeout": (
        "Longest silence of the target. It starts when the request is sent and anew with each part of the answer that "
        "goes on to the client. Only `http` answers have parts; elsewhere it is the time for the whole answer. It "
        "starts anew too while the target takes a large request. Then the request fails and the upstream connection "
        "is closed, but see [several in flight](protocols.md#several-in-flight)."
    ),
    "connect_delay": "Rest of a new connection before its first request. It must be shorter than `--queue-timeout`.",
    "request_delay": "Rest of a connection between the end of an answer and the next request.",
    "retry_delay": (
        "Pause after a failed connect, or after a connection that the target ended before its first request and "
        "sooner than this. It doubles with each failure in a row, up to 30 s, and is up to a quarter shorter by "
        "chance."
    ),
    "upstream_idle_timeout": (
        "A connection above `--pool-min` is closed when it is idle for so long. Not allowed with `--pool-min` equal "
        "to `--pool-size`."
    ),
    "upstream_max_age": (
        "A connection this old is closed at once when idle, else behind the answer in flight, and replaced when it is "
        "needed or `--pool-min` asks for it."
    ),
    "private_timeout": (
        "With NTLM, Negotiate and similar schemes the target authenticates the connection, and only that client uses "
        "it from then on. When the client has sent no request for this long after an answer, the connection is closed. "
        "See [connections that belong to a client](protocols.md#connections-that-belong-to-a-client)."
    ),
    "max_clients": (
        "Clients connected at once to a worker. One more is refused: a 503 over `http`, a close elsewhere. Clients "
        "whose connection gmux is ending do not count: they have places of their own, a quarter more, at least 16. "
        "When these are taken, the first of them whose answer is sent is closed for the next client. Clients that "
        "connect and say nothing do count: `--client-idle-timeout` ends them. gmux raises its limit of open files as "
        "far as the system allows; a client is one file."
    ),
    "max_message": (
        "The largest message, framing included for `echo`, the message behind the length header for `iso8583` and "
        "`mpu`, the body of a request for `http`. A larger request is refused. A larger answer ends the upstream "
        "connection, but for `http`, whose answers have no limit."
    ),
    "request_timeout": (
        "Longest time from a request's first byte to its last, the whole body included: raise it for large uploads. "
        "Then the client is refused."
    ),
    "client_idle_timeout": "A client that begins no request for so long is closed.",
    "client_write_timeout": (
        "A client that takes not one byte of its waiting answer for so long is cut off with a reset."
    ),
    "spool_memory": (
        "Of one answer that its client does not take, or of one request body that comes in parts, so much is held in "
        "memory; what is above goes to a temporary file."
    ),
    "spool_limit": (
        "The most that is held for one client in memory and file together. A client too slow for its answer is then "
        "cut off with a reset."
    ),
    "via": "`--no-via`, or `via = false` in a file: add no `Via: 1.1 gmux` to requests and answers.",
    "forwarded": (
        "Tell the target the client's address and the host it asked for, in the fields of that name. What the client "
        "said in any of them is dropped. `off` adds nothing and passes what came: right behind another proxy that "
        "tells it."
    ),
    "set_header": (
        "Each request gets this field in place of the client's of that name; without a value the field is only "
        "removed. May be given several times. Fields that gmux writes itself are refused."
    ),
    "host": "Each request gets this `Host`, whatever the client asked for.",
    "workers": (
        "Processes that serve clients. They share the pool: a connection that one does not need goes to another that "
        "does. More than `--pool-size` of a route are refused: one of them could only wait. Limits of clients and "
        "memory are for each worker."
    ),
    "worker_timeout": "A worker whose loop gives no sign of life for so long is killed and replaced.",
    "graceful_timeout": (
        "Time for requests under way after TERM. Then their clients are cut off with a reset, and gmux exits."
    ),
    "memory_limit": (
        "The most that a worker holds in memory for all clients of all its routes: 16 KiB for each client, requests, "
        "bytes sent ahead of their turn, and answers not taken. Past it, new clients and requests above 4 KiB are "
        "refused. Well before, answers and bodies go to temporary files, and no client is read ahead. What is in "
        "flight to the target comes on top: see [memory limits](design.md#memory-limits)."
    ),
    "disk_limit": (
        "The most that a worker holds on disk, for all clients of all its routes: what is above `--spool-memory` or "
        "`--memory-limit`. It is one file without a name in the folder for temporary files (`$TMPDIR`, else `/tmp`). "
        "It grows in blocks of 64 KiB, and each message in it takes at least one. Past the limit a request is "
        "refused, and a client too slow for its answer is cut off with a reset. `0`: no file."
    ),
    "spin": (
        "For so long after each request is sent and each answer has come, gmux polls instead of sleeping: shorter "
        "answer times for more CPU. See [spinning](design.md#spinning)."
    ),
    "name": (
        "The processes are called `gmux: master [NAME]` and `gmux: worker [NAME]`. While an upgrade goes on, the name "
        "of the new ones ends in `.2`."
    ),
    "daemon": (
        "Go to the background when the listeners are open. Standard error is gone then: give `--log-file` with it. "
        "Not for systemd or containers."
    ),
    "pid": (
        "The file is made at the start and removed at the end. While an upgrade goes on, the new master has its own, "
        "with `.2` behind the name."
    ),
    "user": (
        "The workers run as this user; the master stays who it is. Only root can do so. The runtime folder must be "
        "this user's."
    ),
    "group": "The workers run as this group.",
    "umask": "For the files of the logs. Without it, as it is. The pid file can be read by all.",
    "chdir": (
        "Names of files in the settings that are not absolute begin here, but for that of `--config`. Without it they "
        "begin where gmux was started."
    ),
    "runtime_dir": (
        "Where gmux processes that share a budget meet. It is made when it is missing, and must belong to the user of "
        "the workers, who alone may write to it. Without it: `/run/gmux` for root, else `gmux` in `$XDG_RUNTIME_DIR`, "
        "else `gmux-UID` in the folder for temporary files."
    ),
    "log_file": (
        "USR1 opens the file again, under its name, as logrotate wants it. `-` is standard error. Under systemd "
        "standard error is the journal: lines have a level there and no time of their own."
    ),
    "log_level": "The least level that is logged. Not allowed with `--verbose` or `--quiet`, which say it already.",
    "log_format": "The form of the log and of the access log.",
    "access_log": (
        "See [the access log](configuration.md#the-access-log). `-` is standard output. USR1 opens the file again."
    ),
    "verbose": "Dump each message in hex, with debug lines. Not allowed with `--quiet`.",
    "unsafe_dump": "With `-v`: do not overwrite card data of ISO 8583.",
    "quiet": "Log warnings and errors only. Not allowed with `--verbose`.",
}


def render() -> str:
    groups = " and ".join(", ".join(ROUTE_GROUPS).rsplit(", ", 1))
    repeating = " and ".join(f"`{s.flag}`" for s in SETTINGS if s.kind.repeats)
    parts = [_INTRO.format(routes=groups, repeating=repeating)]
    for group, settings in groupby(SETTINGS, lambda s: s.group):
        parts.append(f"## {group}\n")
        if group in _GROUPS:
            parts.append(_GROUPS[group])
        parts.append("\n".join([_TABLE, *map(_row, settings)]) + "\n")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    flags = ", ".join(f"`{name}`" for name in (setting.flag, setting.short) if name)
    key = "" if setting.name == "config" else f"`{setting.key}`"
    about = " ".join([ABOUT[setting.name], *_remarks(setting)])
    cells = (flags, key, f"`{setting.variable}`", _default(setting), _allowed(setting), about)
    return f"| {' | '.join(cells)} |"


def _default(setting: Setting) -> str:
    """The same on each machine."""
    if callable(setting.default):
        return "`50us`; `0` with one processor"
    return f"`{setting.default}`" if setting.default else "none"


def _allowed(setting: Setting) -> str:
    """The same whatever codecs are installed."""
    if setting.kind is PROTOCOL:
        return "one of the names that `gmux list` prints"
    return "`true` or `false`" if setting.kind is FLAG else setting.allowed


def _remarks(setting: Setting) -> Iterator[str]:
    if setting.protocols:
        yield f"For {', '.join(f'`{name}`' for name in setting.protocols)} alone."
    if setting.is_fixed:
        yield "A reload does not change it."


if __name__ == "__main__":
    print(render(), end="")
