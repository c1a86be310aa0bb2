"""``tools``: calls of the standard library's functions, from their signatures and docstrings.

    User:       Functions: textwrap.shorten(text, width), glob.escape(pathname)
                Collapse and truncate the given text to fit in the given width: width 12, text "blue lamp".
    Assistant:  {"name": "textwrap.shorten", "arguments": {"text": "blue lamp", "width": 12}}

The wish is the first line of the function's docstring, with a value for each parameter that is to be given;
the functions to choose from are in any order, and so are the values. A parameter's kind is told by its
default value, else by its name; functions that need one of another kind are left out.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from opmix_dist.data.source import Conversation, SourceFile
from opmix_dist.seeds import derive_seed

CALLS_PER_FUNCTION = 12
MAX_PARAMETERS = 4
"""Of a function, required ones; optional ones beyond it are not mentioned."""
MAX_WISH_CHARS = 80
GIVEN_SHARE = 0.4
"""Of optional parameters, that are given a value."""

MODULES = (
    "ast", "base64", "binascii", "bisect", "calendar", "cmath", "codecs", "colorsys", "compileall", "copy",
    "difflib", "email.utils", "filecmp", "fileinput", "fnmatch", "fractions", "functools", "getpass",
    "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "importlib.util", "inspect", "ipaddress",
    "itertools", "json", "keyword", "linecache", "locale", "logging", "lzma", "math", "mimetypes",
    "ntpath", "operator", "os", "pkgutil", "platform", "plistlib", "posixpath", "pprint", "py_compile",
    "quopri", "random", "re", "reprlib", "sched", "secrets", "shlex", "shutil", "signal", "site", "socket",
    "stat", "statistics", "string", "struct", "sysconfig", "tempfile", "textwrap", "time", "timeit",
    "tokenize", "token", "traceback", "unicodedata", "urllib.parse", "uuid", "warnings", "wave", "weakref",
    "xml.sax.saxutils", "zipapp", "zlib",
)  # fmt: skip
"""All of the standard library's that have functions of simple values, on every platform or almost."""

WORDS = ("apple", "blue", "cloud", "door", "eagle", "fern", "green", "house", "iron", "lamp", "moon", "night",
         "oak", "paper", "quiet", "river", "stone", "tree", "winter", "yellow")  # fmt: skip

Draw = Callable[[np.random.Generator], Any]


def _word(rng: np.random.Generator) -> str:
    return str(rng.choice(WORDS))


def _words(rng: np.random.Generator) -> str:
    return " ".join(_word(rng) for _ in range(int(rng.integers(1, 4))))


def _path(rng: np.random.Generator) -> str:
    return f"{_word(rng)}{rng.choice(['.txt', '.csv', '.py', '/' + _word(rng)])}"


def _integer(rng: np.random.Generator) -> int:
    return int(rng.integers(1, 100))


def _number(rng: np.random.Generator) -> float | int:
    return _integer(rng) if rng.random() < 0.5 else float(rng.integers(1, 200)) / 4 + 0.25


def _numbers(rng: np.random.Generator) -> list[int]:
    return [_integer(rng) for _ in range(int(rng.integers(2, 5)))]


def _switch(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


_BY_NAME: tuple[tuple[re.Pattern[str], Draw], ...] = tuple(
    (re.compile(pattern), draw)
    for pattern, draw in (
        (r"(base)?(path|file|dir)(name|1|2)?|src|dst|f1|f2|p|top|root|source|target|archive|root_dir", _path),
        (r"n|k|i|width|count|lo|hi|limit|length|size|indent|depth|year|month|day|m|start|stop|step|"
         r"(the)?(year|month|day|weekday)|lineno|num|number|maxsplit|maxlen|timeout|level", _integer),
        (r"x|y|z|a|b|c|h|l|s_|v|r|g|mu|sigma|alpha|beta|lambd|kappa|value|seconds|secs|q|amount", _number),
        (r"s|string|str|text|name|pattern|pat|prefix|suffix|sep|word|line|msg|message|key|title|encoding|"
         r"url|address|code|chr|fmt|format|ext|cmd|extension|option|domain|quote|safe|scheme", _words),
        (r"data|iterable|seq|sequence|values|list|items|list1|list2|it|names|heap", _numbers),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Tool:
    """A function: its name, what it does, and how to draw a value for each of its parameters, in order."""

    name: str
    wish: str
    required: dict[str, Draw]
    optional: dict[str, Draw]

    @property
    def signature(self) -> str:
        return f"{self.name}({', '.join([*self.required, *(f'{name}=' for name in self.optional)])})"


def files() -> Sequence[SourceFile]:
    """One for each module; those that are part of the interpreter have no size."""
    return [_file(name) for name in MODULES]


def groups(seed: int) -> Iterator[tuple[int, Sequence[Conversation]]]:
    """The calls of each function, drawn by the seed and its name."""
    found = [(number, tool) for number, name in enumerate(MODULES) for tool in _tools(name)]
    for number, tool in found:
        rng = np.random.default_rng([derive_seed(seed, "tools", tool.name)])
        calls = [_call(tool, found[int(rng.integers(len(found)))][1], rng) for _ in range(CALLS_PER_FUNCTION)]
        yield number, calls


def _call(tool: Tool, other: Tool, rng: np.random.Generator) -> Conversation:
    given = [name for name in tool.optional if rng.random() < GIVEN_SHARE]
    draws = {**tool.required, **{name: tool.optional[name] for name in given}}
    arguments = {name: draw(rng) for name, draw in draws.items()}
    said = [f"{name} {json.dumps(value)}" for name, value in arguments.items()]
    rng.shuffle(said)
    offered = [tool.signature] if other == tool or rng.random() < 0.5 else [tool.signature, other.signature]
    rng.shuffle(offered)
    question = f"Functions: {', '.join(offered)}\n{tool.wish}: {', '.join(said)}."
    call = {"name": tool.name, "arguments": arguments}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": json.dumps(call)},
    ]
    task = {"messages": messages[:1], "kind": "tool_call", "answer": call, "group": tool.name}
    return Conversation(messages, group=f"tools/{tool.name}", task=task)


def _file(module: str) -> SourceFile:
    path = getattr(importlib.import_module(module), "__file__", None)
    if path is None:
        return SourceFile(module, 0)
    return SourceFile(str(path), Path(path).stat().st_size)


@cache
def _tools(module: str) -> tuple[Tool, ...]:
    """The module's own public functions, sorted by name."""
    found = []
    for name, member in sorted(vars(importlib.import_module(module)).items()):
        is_function = isinstance(member, types.FunctionType | types.BuiltinFunctionType)
        if name.startswith("_") or not is_function or not _belongs(member, module):
            continue
        tool = _tool(f"{module}.{name}", member)
        if tool is not None:
            found.append(tool)
    return tuple(found)


def _belongs(function: Any, module: str) -> bool:
    """Also when it is written in C, in a module of the same name with an underscore."""
    return (function.__module__ or "").lstrip("_") in (module, {"os": "posix"}.get(module, module))


def _tool(name: str, function: Any) -> Tool | None:
    """None: it takes nothing, more or other than simple values, or does not say what it does."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # C functions need not tell
        return None
    wish = (inspect.getdoc(function) or "").partition("\n")[0].strip().rstrip(".:")
    if not 12 <= len(wish) <= MAX_WISH_CHARS or "(" in wish or not wish.isascii():
        return None
    required: dict[str, Draw] = {}
    optional: dict[str, Draw] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        draw = _draw_of(parameter)
        if parameter.default is parameter.empty:
            if draw is None:
                return None
            required[parameter.name] = draw
        elif draw is not None and len(required) + len(optional) < MAX_PARAMETERS:
            optional[parameter.name] = draw
    if not required or len(required) > MAX_PARAMETERS:
        return None
    return Tool(name, wish, required, optional)


def _draw_of(parameter: inspect.Parameter) -> Draw | None:
    for kind, draw in ((bool, _switch), (int, _integer), (float, _number), (str, _word)):
        if type(parameter.default) is kind:
            return draw
    return next((draw for pattern, draw in _BY_NAME if pattern.fullmatch(parameter.name)), None)
