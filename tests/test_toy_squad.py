"""The toy SQuAD: same bytes for same seed, the promised layout, and no good answer without reading the question."""

import collections
import hashlib
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
LENGTHS = (40, 48, 60, 96, 131, 192, 384, 768, 1000)
VERBS = {"die": "died in", "leave": "left", "marry": "married", "buy": "bought", "study": "studied", "go": "visited"}


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


@pytest.fixture(scope="module")
def toy_of_lengths(tmp_path_factory):
    """As many paragraphs for training as it takes to have every word in the vocabulary."""
    folder = tmp_path_factory.mktemp("lengths")
    flags = ["--train_paragraphs", "3000", "--validation_lengths", *map(str, LENGTHS)]
    assert make_toy_squad(folder, *flags, "--max_position_embeddings", "48").returncode == 0
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


def test_the_questions_are_still_those_that_measured_figures_are_of(toy):
    questions = b"".join((toy / f"{split}.json").read_bytes() for split in SPLITS)
    digest = hashlib.sha256(questions).hexdigest()
    assert digest == "3590aea10f60283ede520f1dd5afb112b63fec5a255f08aa0fdaa51cbf3aea97"


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
    for paragraph in paragraphs_of(toy, split):
        for qa in paragraph["qas"]:
            person, asked = re.fullmatch(r".* did (\w+) (\w+)\?", qa["question"]).groups()
            verb = VERBS[asked]
            told = re.findall(rf"\b{person} {verb} ([^.]+)\.", paragraph["context"])
            assert told == [answer["text"] for answer in qa["answers"]], qa["id"]
            assert qa["is_impossible"] == (not told)
            if told:
                others = re.findall(rf"\b\w+ {verb} ([^.]+)\.", paragraph["context"])
                assert len(others) > 1 and len(set(others)) == len(others), "no distractor of the answer's kind"


@pytest.mark.parametrize("length", LENGTHS)
def test_longer_texts(toy_of_lengths, length):
    """They fill one window, are told in words of training, and have one answer to each question, at any place."""
    paragraphs = paragraphs_of(toy_of_lengths, f"validation_{length}")
    assert len({paragraph["context"] for paragraph in paragraphs}) == len(paragraphs)
    tokenizer = AutoTokenizer.from_pretrained(toy_of_lengths / "absolute")
    trained = paragraphs_of(toy_of_lengths, "train")
    trained_questions = {qa["question"] for paragraph in trained for qa in paragraph["qas"]}
    people = "Ada|Boris|Clara|David|Edith|Felix|Greta|Hugo"
    sentences = re.compile(rf"((^| )({people}) ({'|'.join(VERBS.values())}) \w+( \w+)?\.)+")

    ids, places = [], []
    for paragraph in paragraphs:
        context, qas = paragraph["context"], paragraph["qas"]
        assert sentences.fullmatch(context)
        assert not [token for token in tokenizer.tokenize(context) if token.startswith("##") or token == "[UNK]"]
        assert len({qa["question"].split(" did ")[0] + qa["question"].split()[-1] for qa in qas}) == len(qas)
        deaths = re.findall(r"(\w+) died", context)
        assert len(set(deaths)) == len(deaths)
        for qa in qas:
            assert qa["question"] in trained_questions
            # What is left has no room for a sentence of four or five tokens; some questions are a token shorter.
            tokens = len(tokenizer(qa["question"], context)["input_ids"])
            assert length - 7 < tokens <= length
            (answer,) = qa["answers"]
            text, start = answer["text"], answer["answer_start"]
            assert context[start : start + len(text)] == text
            assert len(re.findall(rf"\b{text}\b", context)) == 1
            person, asked = re.fullmatch(r".* did (\w+) (\w+)\?", qa["question"]).groups()
            assert re.findall(rf"\b{person} {VERBS[asked]} ([^.]+)\.", context) == [text]
            assert len(re.findall(rf" {VERBS[asked]} |^\w+ {VERBS[asked]} ", context)) > 1, "no distractor of its kind"
            assert len(re.findall(rf"\b{person} \w+ ", context)) > 1, "no distractor of the same person"
            ids.append(qa["id"])
            places.append(start / len(context))
    assert 300 <= len(ids) == len(set(ids)) < 306
    assert min(places) < 0.1 and max(places) > 0.9
    thirds = collections.Counter(int(3 * place) for place in places)
    assert all(0.25 < thirds[third] / len(places) < 0.42 for third in range(3))


def test_longer_texts_depend_on_seed_and_length_alone(toy_of_lengths, tmp_path):
    few = ["--train_paragraphs", "3000", "--max_position_embeddings", "48", "--validation_lengths"]
    assert make_toy_squad(tmp_path / "again", *few, "96", hash_seed="1").returncode == 0
    again, all_files = files_of(tmp_path / "again"), files_of(toy_of_lengths)
    assert again.items() <= all_files.items()
    assert all_files.keys() - again.keys() == {f"validation_{length}.json" for length in LENGTHS if length != 96}
    assert make_toy_squad(tmp_path / "other", *few, "96", "--seed", "1").returncode == 0
    assert (tmp_path / "other" / "validation_96.json").read_bytes() != again["validation_96.json"]


def test_longer_texts_leave_the_others_as_they_are(toy, tmp_path):
    assert make_toy_squad(tmp_path, "--validation_lengths", "48").returncode == 0
    with_length = files_of(tmp_path)
    assert with_length.pop("validation_48.json")
    assert with_length == files_of(toy)


def test_positions_of_the_models(toy, toy_of_lengths):
    for folder, positions in [(toy, 512), (toy_of_lengths, 48)]:
        for position_embedding_type in POSITION_EMBEDDING_TYPES:
            config = AutoConfig.from_pretrained(folder / position_embedding_type)
            assert config.max_position_embeddings == positions


def test_refuses_a_length_without_room_for_distractors(tmp_path):
    done = make_toy_squad(tmp_path / "toy", "--validation_lengths", "48", "39")
    assert done.returncode == 2
    assert "--validation_lengths: 39 is less than 40" in done.stderr
    assert not (tmp_path / "toy").exists()


def test_too_few_paragraphs_for_whole_words(tmp_path):
    done = make_toy_squad(tmp_path / "toy", "--train_paragraphs", "2", "--validation_lengths", "48")
    assert done.returncode == 2 and not (tmp_path / "toy").exists()
    assert "error: --train_paragraphs 2: too few to learn whole words from" in done.stderr.splitlines()[-1]
    assert make_toy_squad(tmp_path / "toy", "--train_paragraphs", "5", "--validation_lengths", "40").returncode == 0
    assert all(paragraph["qas"] for paragraph in paragraphs_of(tmp_path / "toy", "validation_40"))


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
