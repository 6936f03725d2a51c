"""The order of the layers, read from the sources: imports point only from later to earlier (anchors.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gmux

ROOT = Path(gmux.__file__).parent

#: Each line may import from the lines above it, and its members in the order given. New modules must find a place.
LAYERS = [
    ["gmux", "gmux.errors"],
    ["gmux.codecs"],
    ["gmux.codecs._buffer", "gmux.codecs._card_data", "gmux.codecs._iso8583_identity", "gmux.codecs._iso8583_spec"],
    ["gmux.codecs.base"],
    ["gmux.codecs._iso8583_key", "gmux.codecs._iso8583_network"],
    ["gmux.codecs.framed"],
    ["gmux.codecs._http_authentication", "gmux.codecs._http_body"],
    ["gmux.codecs._http_head"],
    ["gmux.codecs._http_rewriting"],
    ["gmux.codecs._http_request"],
    ["gmux.codecs._http_answer", "gmux.codecs._http_refusal", "gmux.codecs._http_probe"],
    ["gmux.codecs.echo", "gmux.codecs.iso8583", "gmux.codecs.http"],
    ["gmux.codecs.registry"],
    ["gmux.kinds"],
    ["gmux.settings"],
    ["gmux.config", "gmux.toml_lines"],
    ["gmux.sources"],
    ["gmux.effective"],
    ["gmux.reference"],
    ["gmux.logfile"],
    ["gmux.logs"],
    [
        "gmux.scheduler",
        "gmux.deadlines",
        "gmux.descriptors",
        "gmux.spinner",
        "gmux.disk",
        "gmux.ends",
        "gmux.memory",
        "gmux.spool",
        "gmux.net",
        "gmux.ratelimit",
        "gmux.trace",
    ],
    ["gmux.folder"],
    ["gmux.mailbox", "gmux.slots", "gmux.slot_files"],
    ["gmux.sharing"],
    ["gmux.exchange"],
    ["gmux.keyed_line"],
    ["gmux.access"],
    ["gmux.upstream"],
    ["gmux.licence"],
    ["gmux.strict", "gmux.pipelined"],
    ["gmux.by_order", "gmux.by_key", "gmux.by_load", "gmux.private"],
    ["gmux.pool"],
    ["gmux.prober"],
    ["gmux.pipelined_pool"],
    ["gmux.keyed_pool"],
    ["gmux.broadcast"],
    ["gmux.client"],
    ["gmux.recorded_client"],
    ["gmux.listener", "gmux.succession"],
    ["gmux.route"],
    ["gmux.systemd"],
    ["gmux.listening"],
    ["gmux.samples"],
    ["gmux.worker"],
    ["gmux.master"],
    ["gmux.app"],
    ["gmux.cli"],
    ["gmux.__main__"],
]
ORDER = [module for layer in LAYERS for module in layer]

#: What a codec must not touch: it is a function of bytes.
IMPURE = {"gevent", "socket", "time", "logging", "ssl", "os", "threading", "gunicorn", "select", "asyncio", "datetime"}


#: Packages that stand in the order as one: their modules import one another freely, though in no cycle.
PACKAGES = ["gmux.samples"]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


class Imports(ast.NodeVisitor):
    """The modules that one source imports, inside functions too, but not those for the type checker alone."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, "imports name their module in full"
        assert node.module
        for alias in node.names:
            # `from gmux import net` names a module, `from gmux.net import connect` a thing in one.
            full = f"{node.module}.{alias.name}"
            self.found.add(full if full in SOURCES else node.module)


def imports(module: str) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(SOURCES[module].read_text()))
    return visitor.found


def place(module: str) -> str:
    return next((p for p in PACKAGES if module.startswith(p + ".")), module)


def test_every_module_has_its_place_in_the_layers():
    assert {place(module) for module in SOURCES} - set(ORDER) == set()


def test_imports_have_no_cycle():
    graph = {module: imports(module) & set(SOURCES) for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_to_earlier_layers_only(module):
    earlier = set(ORDER[: ORDER.index(place(module))])
    ours = {place(name) for name in imports(module) if name.split(".")[0] == "gmux"}
    assert ours - earlier - ({place(module)} & set(PACKAGES)) == set()


@pytest.mark.parametrize("module", [m for m in SOURCES if m.startswith("gmux.codecs") or m == "gmux.errors"])
def test_codecs_import_nothing_that_acts_on_the_world(module):
    assert {name.split(".")[0] for name in imports(module)} & IMPURE == set()


def test_reader_of_imports_sees_functions_and_skips_type_checking():
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    from c import d\n"
    visitor = Imports()
    visitor.visit(ast.parse(source))
    assert visitor.found == {"b", "c"}


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has after `code`, beyond those it starts with."""
    code = f"import sys; before = set(sys.modules)\n{code}\nprint(*(set(sys.modules) - before))"
    # -S leaves out `site`, whose .pth files may load anything; the paths are given instead.
    paths = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-S", "-c", paths + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def is_io(module: str) -> bool:
    return module.split(".")[0] in {"gevent", "socket", "_socket", "ssl", "select", "gunicorn"}


def test_framed_codecs_in_a_fresh_interpreter_load_neither_gevent_nor_socket():
    loaded = loaded_after("import gmux.codecs.echo, gmux.codecs.iso8583")
    assert "gmux.codecs.iso8583" in loaded
    assert {m for m in loaded if is_io(m)} == set()


def test_registry_with_every_codec_loads_nothing_of_ours_but_codecs():
    loaded = loaded_after("from gmux.codecs import registry\nfor name in registry.names(): registry.load(name)")
    ours = {m for m in loaded if m.split(".")[0] == "gmux"}
    assert ours <= {"gmux", "gmux.errors"} | {m for m in SOURCES if m.startswith("gmux.codecs")}
    assert "gevent" not in loaded
    # Not `socket`: importlib.metadata, which finds the entry points, imports `email`, which imports it.
    assert "gunicorn" not in loaded


def test_command_line_loads_no_gevent_until_it_serves():
    loaded = loaded_after("import gmux.cli")
    assert {m for m in loaded if m.split(".")[0] in {"gevent", "gunicorn"}} == set()


def test_check_answers_without_gevent():
    loaded = loaded_after("from gmux import cli\ntry: cli.main(['check'])\nexcept SystemExit: pass")
    assert {"gmux.sources", "gmux.effective"} <= loaded
    assert {m for m in loaded if m.split(".")[0] in {"gevent", "gunicorn"}} == set()
