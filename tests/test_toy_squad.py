"""The toy SQuAD: same bytes for same seed, the promised layout, and no good answer without reading the question."""

import collections
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from qa.load_model import POSITION_EMBEDDING_TYPES
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.read_squad import read_squad_file
from qa.squad_metric import raw_scores
from qa.train_questions import align_answers
from qa.windows import WindowSettings, make_features
from scripts import make_toy_squad

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "validation", "test", "train_v2", "validation_v2", "test_v2")
LENGTHS = (40, 96, 1000)
VERBS = {"die": "died in", "leave": "left", "marry": "married", "buy": "bought", "study": "studied", "go": "visited"}


def make(folder, *flags) -> Path:
    make_toy_squad.main([str(folder), *flags])
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make(tmp_path_factory.mktemp("toy") / "made" / "here", "--train_paragraphs", "300")


@pytest.fixture(scope="module")
def toy_of_lengths(tmp_path_factory):
    """As many paragraphs for training as it takes to have every word in the vocabulary."""
    flags = ["--train_paragraphs", "3000", "--max_position_embeddings", "48", "--validation_lengths"]
    return make(tmp_path_factory.mktemp("lengths"), *flags, *map(str, LENGTHS))


def paragraphs_of(folder, split):
    articles = json.loads((folder / f"{split}.json").read_text())["data"]
    return [paragraph for article in articles for paragraph in article["paragraphs"]]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes_in_another_process_with_longer_texts_or_without(toy, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "make_toy_squad.py", tmp_path, "--train_paragraphs", "300"]
    command += ["--validation_lengths", "48"]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    again = files_of(tmp_path)
    assert again.pop("validation_48.json") and again == files_of(toy)


def test_the_questions_are_still_those_that_measured_figures_are_of(toy):
    questions = b"".join((toy / f"{split}.json").read_bytes() for split in SPLITS)
    digest = hashlib.sha256(questions).hexdigest()
    assert digest == "3590aea10f60283ede520f1dd5afb112b63fec5a255f08aa0fdaa51cbf3aea97"


def test_seed_and_size_decide_on_what_they_should(toy, tmp_path):
    other = files_of(make(tmp_path / "seed", "--train_paragraphs", "20", "--seed", "1"))
    same = {name for name, content in files_of(toy).items() if other[name] == content}
    assert not [name for name in same if name.endswith(".safetensors") or name.removesuffix(".json") in SPLITS]
    smaller = make(tmp_path / "size", "--train_paragraphs", "20")
    assert len(paragraphs_of(smaller, "train")) == 20
    assert (smaller / "test_v2.json").read_bytes() == (toy / "test_v2.json").read_bytes()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--train_paragraphs 0", "--train_paragraphs must be at least 1"),
        ("--validation_lengths 48 39", "--validation_lengths at least 40"),
        ("--train_paragraphs 2 --validation_lengths 48", "--train_paragraphs are too few to learn whole words from"),
    ],
)
def test_refuses_what_cannot_be(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        make(tmp_path / "toy", *flags.split())
    assert message in (str(exit_status.value.code) + capsys.readouterr().err).splitlines()[-1]
    assert exit_status.value.code != 0 and not (tmp_path / "toy").exists()


def test_no_paragraph_is_in_two_splits(toy):
    contexts = {split: {paragraph["context"] for paragraph in paragraphs_of(toy, split)} for split in SPLITS}
    assert [len(contexts[split]) for split in SPLITS] == [300, 200, 100] * 2
    assert len(contexts["train"] | contexts["validation"] | contexts["test"]) == 600
    assert all(contexts[split] == contexts[f"{split}_v2"] for split in SPLITS[:3])


@pytest.mark.parametrize("split", SPLITS)
def test_layout(toy, split, tmp_path):
    examples = read_squad_file(str(toy / f"{split}.json"), cache_dir=str(tmp_path))
    assert len(set(examples["id"])) == len(examples) > 4 * len(set(examples["context"]))
    if "test" in split:
        assert "answers" not in examples.column_names
        return
    assert align_answers(examples, split, "drop") == (examples, [])
    unanswered = sum(not answers["text"] for answers in examples["answers"]) / len(examples)
    assert 0.15 < unanswered < 0.35 if "v2" in split else unanswered == 0


def told(question: str, context: str) -> tuple[list[str], list[str]]:
    """What the text tells of the one who is asked about, and of anyone: by subject and verb, without a model."""
    person, asked = re.fullmatch(r".* did (\w+) (\w+)\?", question).groups()
    of_verb = re.findall(rf"\b(\w+) {VERBS[asked]} ([^.]+)\.", context)
    return [answer for name, answer in of_verb if name == person], [answer for _, answer in of_verb]


def test_an_answer_is_told_of_the_one_who_is_asked_about_and_of_nobody_else(toy):
    for paragraph in paragraphs_of(toy, "validation_v2"):
        for qa in paragraph["qas"]:
            own, all_answers = told(qa["question"], paragraph["context"])
            assert own == [answer["text"] for answer in qa["answers"]] and qa["is_impossible"] == (not own)
            assert not own or len(set(all_answers)) == len(all_answers) > 1, "no distractor of the answer's kind"


@pytest.mark.parametrize("length", LENGTHS)
def test_longer_texts_fill_a_window_and_have_one_answer_at_any_place(toy_of_lengths, length):
    tokenizer = AutoTokenizer.from_pretrained(toy_of_lengths / "absolute")
    trained = {qa["question"] for paragraph in paragraphs_of(toy_of_lengths, "train") for qa in paragraph["qas"]}
    places = []
    for paragraph in paragraphs_of(toy_of_lengths, f"validation_{length}"):
        context, qas = paragraph["context"], paragraph["qas"]
        assert not [token for token in tokenizer.tokenize(context) if token.startswith("##") or token == "[UNK]"]
        deaths = re.findall(r"(\w+) died", context)
        assert len(set(deaths)) == len(deaths)
        for qa in qas:
            # What is left has no room for a sentence of four or five tokens; some questions are a token shorter.
            assert length - 7 < len(tokenizer(qa["question"], context)["input_ids"]) <= length
            (answer,) = qa["answers"]
            assert context[answer["answer_start"] :].startswith(answer["text"])
            assert len(re.findall(rf"\b{answer['text']}\b", context)) == 1 and qa["question"] in trained
            own, all_answers = told(qa["question"], context)
            assert own == [answer["text"]] and len(all_answers) > 1, "no distractor of the answer's kind"
            places.append(answer["answer_start"] / len(context))
    assert 300 <= len(places) < 306
    thirds = collections.Counter(int(3 * place) for place in places)
    assert all(0.25 < thirds[third] / len(places) < 0.42 for third in range(3))


@pytest.mark.parametrize("split", ["validation", "validation_v2"])
def test_without_the_question_f1_stays_under_40(toy, split):
    """An upper bound of all that never look at the question: in each paragraph the one span, or the empty answer, that
    is best on average over the paragraph's own gold answers."""
    scores = []
    for paragraph in paragraphs_of(toy, split)[:60]:
        golds = [[answer["text"] for answer in qa["answers"]] for qa in paragraph["qas"]]
        words = paragraph["context"].split()
        spans = {" ".join(words[start:end]) for start in range(len(words)) for end in range(start, start + 6)}
        scores += [max(sum(raw_scores(golds, [span] * len(golds))[1]) / len(golds) for span in spans)] * len(golds)
    assert 0.10 < sum(scores) / len(scores) < 0.40


def test_some_paragraphs_need_several_windows(toy, tmp_path):
    quickstart = (ROOT / "scripts" / "quickstart.sh").read_text(encoding="utf-8")
    settings = {name: int(re.search(rf"--{name} (\d+)", quickstart)[1]) for name in ("max_seq_length", "doc_stride")}
    examples = read_squad_file(str(toy / "validation.json"), cache_dir=str(tmp_path))
    features = make_features(examples, AutoTokenizer.from_pretrained(toy / "absolute"), WindowSettings(**settings))
    windows = collections.Counter(features["example_index"])
    assert 0.05 < sum(count > 1 for count in windows.values()) / len(examples) < 0.4


@pytest.mark.parametrize("position_embedding_type", POSITION_EMBEDDING_TYPES)
def test_models_and_tokenizers(toy, toy_of_lengths, position_embedding_type):
    folder = toy / position_embedding_type
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.model_type, config.position_embedding_type) == ("bert", position_embedding_type)
    assert tokenizer.is_fast and config.vocab_size == len(tokenizer) and config.max_position_embeddings == 512
    assert AutoConfig.from_pretrained(toy_of_lengths / position_embedding_type).max_position_embeddings == 48
    texts = [
        text for p in paragraphs_of(toy, "test_v2") for text in (p["context"], *(qa["question"] for qa in p["qas"]))
    ]
    tokens = tokenizer.tokenize(" ".join(texts))
    assert tokenizer.unk_token not in tokens  # and names and verbs are words of the vocabulary, not pieces
    assert sum(token.startswith("##") for token in tokens) < len(tokens) / 20
    relative = position_embedding_type != "absolute"
    model_class = RelativeBertForQuestionAnswering if relative else AutoModelForQuestionAnswering
    _, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())


@pytest.mark.slow
def test_quickstart(tmp_path):
    """In a copy of the repository, with the packages of this Python. Its f1 is far above what it must reach."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), ROOT / "qa", ROOT / "scripts"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path, "PIP_NO_INDEX": "1"}  # nothing is installed
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(re.search(r"^\{\n.*?^\}", done.stdout, flags=re.MULTILINE | re.DOTALL)[0])
    assert metrics["f1"] >= 95
    assert done.stdout.count("Question:") == 3
