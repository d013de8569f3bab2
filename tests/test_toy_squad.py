"""The toy SQuAD: same bytes for same seed, the promised layout, and no good answer without reading the question."""

import collections
import json
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from qa.load_model import POSITION_EMBEDDING_TYPES
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.read_squad import read_squad_file
from qa.train_questions import place_answers
from qa.windows import WindowSettings, make_features

ROOT = Path(__file__).parent.parent
QUICKSTART = (ROOT / "scripts" / "quickstart.sh").read_text(encoding="utf-8")
SPLITS = ("train", "validation", "test", "train_v2", "validation_v2", "test_v2")


def make_toy_squad(folder, *flags, hash_seed="0"):
    command = [sys.executable, ROOT / "scripts" / "make_toy_squad.py", folder, "--train_paragraphs", "300", *flags]
    return subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "made" / "here"
    assert make_toy_squad(folder).returncode == 0
    return folder


def paragraphs_of(folder, split):
    return [
        paragraph
        for article in json.loads((folder / f"{split}.json").read_text())["data"]
        for paragraph in article["paragraphs"]
    ]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_same_bytes_in_another_process(toy, tmp_path):
    assert make_toy_squad(tmp_path / "again", hash_seed="1").returncode == 0
    again = files_of(tmp_path / "again")
    assert again.keys() == files_of(toy).keys()
    assert [name for name, content in files_of(toy).items() if again[name] != content] == []


def test_another_seed_another_toy(toy, tmp_path):
    assert make_toy_squad(tmp_path, "--seed", "1").returncode == 0
    other = files_of(tmp_path)
    same = {name for name, content in files_of(toy).items() if other[name] == content}
    assert not same & {f"{split}.json" for split in SPLITS}
    assert not [name for name in same if name.endswith(".safetensors")]


def test_held_out_questions_do_not_depend_on_the_size_of_training(toy, tmp_path):
    assert make_toy_squad(tmp_path, "--train_paragraphs", "20").returncode == 0
    assert len(paragraphs_of(tmp_path, "train")) == 20
    for split in ("validation", "test_v2"):
        assert (tmp_path / f"{split}.json").read_bytes() == (toy / f"{split}.json").read_bytes()


def test_refuses_a_size_that_cannot_be(tmp_path):
    done = make_toy_squad(tmp_path / "toy", "--train_paragraphs", "0")
    assert done.returncode == 2
    assert "--train_paragraphs" in done.stderr and "'0'" in done.stderr
    assert not (tmp_path / "toy").exists()


def test_no_paragraph_is_in_two_splits(toy):
    contexts = {split: {paragraph["context"] for paragraph in paragraphs_of(toy, split)} for split in SPLITS}
    sizes = {split: len(found) for split, found in contexts.items()}
    assert sizes == {split: {"train": 300, "validation": 200, "test": 100}[split.split("_")[0]] for split in SPLITS}
    assert len(contexts["train"] | contexts["validation"] | contexts["test"]) == 600
    for split in ("train", "validation", "test"):
        assert contexts[split] == contexts[f"{split}_v2"]


@pytest.mark.parametrize("split", SPLITS)
def test_layout(toy, split, tmp_path):
    examples = read_squad_file(str(toy / f"{split}.json"), cache_dir=str(tmp_path))
    assert len(examples) > 4 * len(set(examples["context"]))
    assert len(set(examples["id"])) == len(examples)
    assert ("answers" in examples.column_names) == ("test" not in split)
    if "test" in split:
        return
    assert place_answers(examples, split, "drop") == (examples, [])
    unanswered = sum(not answers["text"] for answers in examples["answers"]) / len(examples)
    assert 0.15 < unanswered < 0.35 if "v2" in split else unanswered == 0


@pytest.mark.parametrize("split", ["train_v2", "validation_v2"])
def test_an_answer_is_told_of_the_one_who_is_asked_about_and_of_nobody_else(toy, split):
    """Reads the text with patterns of its own: subject and verb of the question find one sentence, or none."""
    verbs = {
        "die": "died in",
        "leave": "left",
        "marry": "married",
        "buy": "bought",
        "study": "studied",
        "go": "visited",
    }
    for paragraph in paragraphs_of(toy, split):
        for qa in paragraph["qas"]:
            person, asked = re.fullmatch(r".* did (\w+) (\w+)\?", qa["question"]).groups()
            verb = verbs[asked]
            told = re.findall(rf"\b{person} {verb} ([^.]+)\.", paragraph["context"])
            assert told == [answer["text"] for answer in qa["answers"]], qa["id"]
            assert qa["is_impossible"] == (not told)
            if told:
                others = re.findall(rf"\b\w+ {verb} ([^.]+)\.", paragraph["context"])
                assert len(others) > 1 and len(set(others)) == len(others), "no distractor of the answer's kind"


def words_of(text):
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def f1(predicted, gold):
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((collections.Counter(predicted) & collections.Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


@pytest.mark.parametrize("split", ["validation", "validation_v2"])
def test_without_the_question_f1_stays_under_40(toy, split):
    """An upper bound of all that never look at the question: in each paragraph the one span, or the empty answer, that
    is best on average over the paragraph's own gold answers."""
    scores = []
    for paragraph in paragraphs_of(toy, split):
        golds = [words_of("".join(answer["text"] for answer in qa["answers"][:1])) for qa in paragraph["qas"]]
        words = words_of(paragraph["context"])
        ends = range(len(words) + 1)
        spans = {tuple(words[start:end]) for start in ends for end in ends[start : start + 16]} | {()}
        best = max(sum(f1(list(span), gold) for gold in golds) for span in spans)
        scores += [best / len(golds)] * len(golds)
    mean = 100 * sum(scores) / len(scores)
    print(f"{split}: {mean:.2f}")
    assert 10 < mean < 40


def test_some_paragraphs_need_several_windows(toy, tmp_path):
    settings = {name: int(re.search(rf"--{name} (\d+)", QUICKSTART)[1]) for name in ("max_seq_length", "doc_stride")}
    tokenizer = AutoTokenizer.from_pretrained(toy / "absolute")
    examples = read_squad_file(str(toy / "validation.json"), cache_dir=str(tmp_path))
    features = make_features(examples, tokenizer, WindowSettings(**settings), desc="toy")
    windows = collections.Counter(features["example_index"])
    several = sum(count > 1 for count in windows.values()) / len(examples)
    assert 0.05 < several < 0.4


@pytest.mark.parametrize("position_embedding_type", POSITION_EMBEDDING_TYPES)
def test_models_and_tokenizers(toy, position_embedding_type):
    folder = toy / position_embedding_type
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.position_embedding_type) == ("bert", position_embedding_type)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and config.vocab_size == len(tokenizer)
    for paragraph in paragraphs_of(toy, "test_v2"):
        texts = [paragraph["context"], *(qa["question"] for qa in paragraph["qas"])]
        tokens = tokenizer.tokenize(" ".join(texts))
        assert tokenizer.unk_token not in tokens
        # names and verbs are words of the vocabulary, not pieces
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
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",  # nothing is installed
    }
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(re.search(r"^\{.*?^\}", done.stdout, flags=re.MULTILINE | re.DOTALL)[0])
    assert metrics["f1"] >= 95
    assert done.stdout.count("Question:") == 3
