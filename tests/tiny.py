"""Small data and models for the tests of the whole program: they learn nothing, and take seconds."""

import json
import re
import textwrap
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.read_squad import EXAMPLE_FEATURES

TOWNS = "paris rome berlin madrid vienna lisbon athens dublin".split()
PEOPLE = "anna ben clara david emma frank grace henry".split()
WORDS = (
    "where does who in live lives works as and a the baker doctor writer . ? , every day goes to market by bus".split()
)


def tiny_bert(folder: Path, position_embedding_type: str = "absolute", max_positions: int = 64, seed: int = 0) -> str:
    """Saves a BERT of one layer with random weights, and its tokenizer; returns the folder's name."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOWNS, *PEOPLE, *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=max_positions)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=max_positions,
        position_embedding_type=position_embedding_type,
    )
    torch.manual_seed(seed)
    absolute = position_embedding_type == "absolute"
    model = BertForQuestionAnswering(config) if absolute else RelativeBertForQuestionAnswering(config)
    model.save_pretrained(folder)
    return str(folder)


def tiny_questions(file: Path, paragraphs: int = 4, version_2: bool = False, answers: bool = True) -> str:
    """Writes a SQuAD file with two questions a paragraph, (in version 2 one of them without an answer)."""
    articles = []
    for p in range(paragraphs):
        person, town = PEOPLE[p % 8], TOWNS[(3 * p) % 8]
        context = f"{person} lives in {town} and works as a baker . every day {person} goes to the market by bus ."
        questions = [("where does " + person + " live ?", town), ("who lives in " + town + " ?", person)]
        qas = []
        for q, (question, answer) in enumerate(questions):
            qas.append({"id": f"{file.stem}-{p}-{q}", "question": question})
            if answers:
                impossible = version_2 and q == 1
                gold = [{"text": answer, "answer_start": context.index(answer)}]
                qas[-1].update({"answers": [] if impossible else gold, "is_impossible": impossible})
        articles.append({"title": f"town {p}", "paragraphs": [{"context": context, "qas": qas}]})
    file.write_text(json.dumps({"version": "tiny", "data": articles}))
    return str(file)


def with_google_names(folder: str) -> str:
    """Names the LayerNorms of the model in `folder` gamma and beta, as Google's checkpoints do; returns `folder`."""
    file = Path(folder, "model.safetensors")
    google = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = {re.sub("|".join(google), lambda ours: google[ours[0]], key): w for key, w in load_file(file).items()}
    assert sum(key.endswith(("gamma", "beta")) for key in weights) >= 6
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def with_own_code(folder: Path) -> str:
    """Makes the BERT in `folder` one whose configuration, model and tokenizer are classes of its own."""
    code = """
        from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast
        class OwnConfig(BertConfig):
            model_type = "own"
        class OwnModel(BertForQuestionAnswering):
            config_class = OwnConfig
        class OwnTokenizer(BertTokenizerFast):
            pass
    """
    (folder / "own.py").write_text(textwrap.dedent(code))
    autos = {"AutoConfig": "own.OwnConfig", "AutoModelForQuestionAnswering": "own.OwnModel"}
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    settings = {"config.json": {"model_type": "own", "auto_map": autos}, "tokenizer_config.json": tokenizer}
    for name, own in settings.items():
        (folder / name).write_text(json.dumps(read(folder, name) | own))
    return str(folder)


def read(*path) -> dict:
    return json.loads(Path(*path).read_text(encoding="utf-8"))


def weights(folder) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def without_times(metrics: dict) -> dict:
    """What must be equal in two runs, but for how long they took."""
    return {name: value for name, value in metrics.items() if "runtime" not in name and "per_second" not in name}


NO_ANSWER = {"text": [], "answer_start": []}


def make_examples(rows) -> Dataset:
    """Examples of (id, question, context, answer text or "" for none, answer start)."""
    columns = {name: [] for name in EXAMPLE_FEATURES}
    for id_, question, context, answer, start in rows:
        columns["id"].append(id_)
        columns["title"].append("")
        columns["context"].append(context)
        columns["question"].append(question)
        columns["answers"].append({"text": [answer], "answer_start": [start]} if answer else NO_ANSWER)
    return Dataset.from_dict(columns, features=EXAMPLE_FEATURES)
