"""What every room needs and none is about: errors in one line, and files written whole."""

import argparse
import codecs
import contextlib
import io
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class QAError(ValueError):
    """What is wrong, where, and what to do about it, in one line for the user, who sees no traceback."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def require_at_least_1(settings, *names: str) -> None:
    """Raises QAError for the first of these attributes, which are flags, that is below 1; None is no value."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise QAError(f"--{name} is {value}, must be at least 1")


@contextlib.contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Raises QAError for whatever error of a library: those of writers, trackers and the hub are of many classes."""
    try:
        yield
    except QAError:
        raise
    except Exception as error:
        raise QAError(f"{what}: {one_line(error)}") from error


class OneLineParser(argparse.ArgumentParser):
    """Errors are one line, without the usage, and ~ is a home folder (but in arguments of type=str).

    And what is printed is printed, whatever letters the console lacks.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register("type", None, os.path.expanduser)
        if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's, which lacks none
            sys.stdout.reconfigure(errors="backslashreplace")  # as standard error

    def error(self, message: str) -> NoReturn:
        self.refuse(f"{message} (--help shows all flags)")

    def refuse(self, error: object) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {error}\n")


@contextlib.contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[str]:
    """Gives the name to write a file under, which becomes `path` at the end: a reader never sees a part of it.

    Raises QAError that names the file where it cannot be written, as on a full disk.
    """
    partial = f"{os.fspath(path)}.{uuid.uuid4().hex[:8]}.partial"
    try:
        os.makedirs(os.path.dirname(partial) or ".", exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise QAError(f"cannot write {os.fspath(path)}: {error.strerror or one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def write_text(path: str | os.PathLike, pieces: Iterable[str]) -> None:
    """Writes the pieces, one after the other, as UTF-8, as `written_whole` does, and flushes them to the disk."""
    # The halves of surrogate pairs, which stand for bytes in the names of files, become escapes that JSON knows.
    utf8 = {"encoding": "utf-8", "errors": "backslashreplace"}
    with written_whole(path) as partial, open(partial, "w", buffering=2**20, **utf8) as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())  # a loss of power would leave the new name and none of its bytes


def write_json(path: str | os.PathLike, obj) -> None:
    """Writes `obj` as JSON (indent 4), as `write_text` does. Raises ValueError for NaN and infinity."""
    write_text(path, [json.dumps(obj, indent=4, allow_nan=False, ensure_ascii=False), "\n"])


def json_line(obj) -> str:
    """`obj` as JSON to print, in one line: letters as they are where standard output is UTF-8, else in ASCII."""
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"
    # Control characters that JSON leaves as they are; they could command the terminal, or end the line.
    escape = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
    return json.dumps(obj, ensure_ascii=not is_utf8).translate(escape)


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file, {} where there is no file. Raises QAError that names one without an object."""
    if not os.path.exists(path):
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise QAError(f"{path}: cannot be read as a JSON object ({one_line(error)}): move it away") from error
    return content
