"""Make a toy SQuAD, a vocabulary and untrained tiny BERTs, so that everything here runs without the network.

Usage: python scripts/make_toy_squad.py toy_squad [--seed 0]

A paragraph tells the same two or three kinds of fact about several people, so that every answer has distractors of its
own kind and only the question says which one is meant:

    Clara married Ivan. Oscar worked as a baker. Clara worked as a singer. Oscar married Nina.
    What did Clara work as?  ->  singer

The folder then holds

    train.json, validation.json, test.json            official SQuAD 1.1 layout; the test file has no answers
    train_v2.json, validation_v2.json, test_v2.json   the same paragraphs with questions without an answer added
    absolute/, relative_key/, relative_key_query/     an untrained tiny BERT of each position type, with tokenizer

No paragraph is in two splits. The same seed gives the same bytes.
"""

import argparse
import json
import os
import random
import string
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from modeling_relative_bert import POSITION_EMBEDDING_TYPES, RelativeBertForQuestionAnswering  # noqa: E402

PARAGRAPHS = {"train": 10000, "validation": 200, "test": 100}
PARAGRAPHS_PER_ARTICLE = 20
LONG_PARAGRAPHS = 0.1  # this share does not fit into one window of the quickstart's max_seq_length

PEOPLE = ("Ada Boris Clara David Edith Felix Greta Hugo Ida Karl Laura Martin Nina Oscar Paula Simon").split()
PLACES = (
    "Athens Berlin Bombay Boston Cairo Chicago Delhi Dublin Geneva Hanoi Havana Kiev Lagos Lima Lisbon London Lyon "
    "Madrid Milan Moscow Munich Naples Oslo Paris Porto Prague Rome Sofia Tokyo Vienna"
).split()
JOBS = (
    "baker barber butcher carpenter cook dancer doctor farmer fisher gardener hunter judge lawyer mason miller miner "
    "nurse painter pilot poet porter printer sailor singer smith soldier tailor teacher weaver writer"
).split()
YEARS = [str(year) for year in range(1850, 1890)]
MONTHS = "January February March April May June July August September October November December".split()
DATES = [f"{day} {month}" for month in MONTHS for day in range(1, 29)]

# kind of fact: (sentence, question, answers to choose from)
FACTS = {
    "birthplace": ("{person} was born in {answer}.", "Where was {person} born?", PLACES),
    "move": ("{person} moved to {answer}.", "Where did {person} move to?", PLACES),
    "job": ("{person} worked as a {answer}.", "What did {person} work as?", JOBS),
    "marriage": ("{person} married {answer}.", "Who did {person} marry?", PEOPLE),
    "death": ("{person} died in {answer}.", "When did {person} die?", YEARS),
    "holiday": ("{person} celebrated on {answer}.", "When did {person} celebrate?", DATES),
}


def make_paragraph(rng, paragraph_id):
    """A paragraph of the official layout, {"context", "qas"}, and a list of questions on it without an answer."""
    is_long = rng.random() < LONG_PARAGRAPHS
    people = rng.sample(PEOPLE, 7 if is_long else rng.choice([2, 3]))
    stranger = people.pop() if is_long else rng.choice([name for name in PEOPLE if name not in people])
    kinds = rng.sample(sorted(FACTS), rng.choice([2, 3]) if len(people) == 2 else 2)
    facts = []
    for kind in kinds:
        choices = [answer for answer in FACTS[kind][2] if answer not in people and answer != stranger]
        facts += [
            (person, kind, answer) for person, answer in zip(people, rng.sample(choices, len(people)), strict=True)
        ]
    rng.shuffle(facts)

    context, qas = "", []
    for person, kind, answer in facts:
        sentence, question, _ = FACTS[kind]
        before_answer = context + sentence.format(person=person, answer="\n").split("\n")[0]
        qas.append(
            {
                "id": f"{paragraph_id}-{len(qas)}",
                "question": question.format(person=person),
                "answers": [{"text": answer, "answer_start": len(before_answer)}],
            }
        )
        context += sentence.format(person=person, answer=answer) + " "

    untold_kind = rng.choice([kind for kind in sorted(FACTS) if kind not in kinds])
    unanswerable = [(stranger, rng.choice(kinds)), (rng.choice(people), untold_kind)]
    no_answer_qas = [
        {
            "id": f"{paragraph_id}-none-{number}",
            "question": FACTS[kind][1].format(person=person),
            "answers": [],
            "is_impossible": True,
        }
        for number, (person, kind) in enumerate(unanswerable)
    ]
    return {"context": context.rstrip(), "qas": qas}, no_answer_qas


def make_splits(rng):
    """{file name without ending: articles} for the three splits in both versions; no context occurs twice."""
    seen_contexts = set()
    splits = {}
    for split, num_paragraphs in PARAGRAPHS.items():
        version_1, version_2 = [], []
        while len(version_1) < num_paragraphs:
            paragraph, no_answer_qas = make_paragraph(rng, f"{split}-{len(version_1)}")
            if paragraph["context"] in seen_contexts:
                continue
            seen_contexts.add(paragraph["context"])
            version_1.append(paragraph)
            answerable = [{**qa, "is_impossible": False} for qa in paragraph["qas"]]
            version_2.append({"context": paragraph["context"], "qas": answerable + no_answer_qas})
        splits[split] = make_articles(split, version_1)
        splits[f"{split}_v2"] = make_articles(split, version_2)
    return splits


def make_articles(split, paragraphs):
    if split == "test":
        paragraphs = [
            {**paragraph, "qas": [{"id": qa["id"], "question": qa["question"]} for qa in paragraph["qas"]]}
            for paragraph in paragraphs
        ]
    return [
        {
            "title": f"{split} {start // PARAGRAPHS_PER_ARTICLE}",
            "paragraphs": paragraphs[start:][:PARAGRAPHS_PER_ARTICLE],
        }
        for start in range(0, len(paragraphs), PARAGRAPHS_PER_ARTICLE)
    ]


def train_tokenizer(articles):
    """A BertTokenizerFast whose WordPiece vocabulary is trained on the contexts and questions."""
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    texts = [paragraph["context"] for paragraph in paragraphs]
    texts += [qa["question"] for paragraph in paragraphs for qa in paragraph["qas"]]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers the continuing characters in hash order, another one in each process, and breaks ties by
    # number: listing them among the special tokens fixes their numbers.
    continuing = [f"##{character}" for character in string.ascii_lowercase + string.digits]
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special + continuing, show_progress=False)
    wordpiece.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=wordpiece.get_vocab())


def save_models(output_dir, tokenizer):
    """Untrained models with the weights that torch's generator gives now; the position types share what they can."""
    transformers.logging.disable_progress_bar()
    rng_state = torch.get_rng_state()
    for position_embedding_type in POSITION_EMBEDDING_TYPES:
        torch.set_rng_state(rng_state)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            max_position_embeddings=512,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            position_embedding_type=position_embedding_type,
        )
        is_absolute = position_embedding_type == "absolute"
        model = (BertForQuestionAnswering if is_absolute else RelativeBertForQuestionAnswering)(config)
        model.save_pretrained(output_dir / position_embedding_type)
        tokenizer.save_pretrained(output_dir / position_embedding_type)


def write_json(path, content):
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(beside, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    splits = make_splits(random.Random(arguments.seed))
    for name, articles in splits.items():
        write_json(arguments.output_dir / f"{name}.json", {"version": "toy", "data": articles})
    torch.manual_seed(arguments.seed)
    save_models(arguments.output_dir, train_tokenizer(splits["train"]))


if __name__ == "__main__":
    main()
