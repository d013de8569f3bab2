"""Files are written whole or not at all."""

import json
import math
import os
import threading

import pytest

from qa.files import QAError, write_json, write_text
from scripts import ask


def test_json_takes_no_nan_and_keeps_the_old_file(tmp_path):
    value = {"é": [1, None], "a file of Latin 1": os.fsdecode("ł".encode("latin2"))}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and '"é": [\n' in text
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"f1": math.nan})
    assert os.listdir(tmp_path) == ["x.json"] and (tmp_path / "x.json").read_text() == text


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "text"
    write_text(path, ["old"])
    seen = set()
    half_written, read = threading.Event(), threading.Event()

    def pieces():
        yield "new" * 10**6
        half_written.set()
        assert read.wait(10)
        yield "end"

    writer = threading.Thread(target=write_text, args=(path, pieces()))
    writer.start()
    assert half_written.wait(10)
    seen.add(path.read_text())
    read.set()
    writer.join()
    assert seen == {"old"} and path.read_text() == "new" * 10**6 + "end"

    with open(path) as reader:  # opened before, it goes on with the old file
        write_text(path, ["newer"])
        assert reader.read() == "new" * 10**6 + "end"

    def broken():
        yield "half"
        raise OSError("disk full")

    with pytest.raises(QAError, match="cannot write .*text: disk full"):
        write_text(path, broken())
    assert path.read_text() == "newer" and os.listdir(tmp_path) == ["text"]


def test_scripts_take_a_tilde_for_the_home_folder_but_not_in_a_question(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    args = ask.make_parser().parse_args(["~/model", "--context_file=~/text.txt", "--question=~/bin is where?"])
    assert [args.model_dir, args.context_file] == ["/home/anna/model", "/home/anna/text.txt"]
    assert args.question == "~/bin is where?"
