"""Make a toy SQuAD, a vocabulary and untrained tiny BERTs, so that everything here runs without the network.

Usage: python scripts/make_toy_squad.py toy_squad [--seed 0]

A paragraph tells the same two or three kinds of fact about several people, so that every answer has distractors of its
own kind and only the question says which one is meant:

    Clara married Ivan. Hugo studied law. Clara studied music. Hugo married Nina.
    What did Clara study?  ->  music

The folder then holds {train,validation,test}.json as SQuAD 1.1, the same paragraphs with unanswerable questions added
in *_v2.json, and an untrained BERT with tokenizer in absolute/, relative_key/ and relative_key_query/. The test files
have no answers. No paragraph is in two splits. The same seed gives the same bytes.
"""

import argparse
import itertools
import json
import math
import random
import string
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qa.files import write_text  # noqa: E402
from qa.load_model import POSITION_EMBEDDING_TYPES  # noqa: E402
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering  # noqa: E402

HELD_OUT_PARAGRAPHS = {"validation": 200, "test": 100}
PARAGRAPHS_PER_ARTICLE = 20
LONG_PARAGRAPHS = 0.05  # this share does not fit into one window of the quickstart's max_seq_length
QUESTIONS_PER_LENGTH = 300
TOKENS_PER_FACT = 4.3  # on average
SHORTEST_LENGTH = 40  # holds two people's facts, and so a distractor of each answer

PEOPLE = "Ada Boris Clara David Edith Felix Greta Hugo".split()
SPOUSES = (
    "Alma Bruno Dora Emil Frida Georg Helga Ida Jonas Karl Laura Martin Nina Oscar Paula Ralf Simon Stella Thomas Vera"
).split()
PLACES = (
    "Athens Berlin Bombay Boston Cairo Chicago Delhi Dublin Geneva Hanoi Havana Kiev Lagos Lima Lisbon London Lyon "
    "Madrid Milan Moscow Munich Naples Oslo Paris Porto Prague Rome Sofia Tokyo Vienna"
).split()
SUBJECTS = (
    "algebra anatomy botany dance geology greek history latin law logic medicine music optics painting physics poetry"
).split()
YEARS = [str(year) for year in range(1850, 1890)]
NUMBERS = "two three four five six seven eight nine ten eleven twelve twenty thirty forty".split()
THINGS = "apples books chairs clocks coats cows hats horses houses lamps maps mirrors pears pigs ships swords".split()
PURCHASES = [f"{number} {things}" for number in NUMBERS for things in THINGS]

# kind of fact: (sentence, question, answers to choose from)
FACTS = {
    "death": ("{person} died in {answer}.", "When did {person} die?", YEARS),
    "departure": ("{person} left {answer}.", "Which city did {person} leave?", PLACES),
    "marriage": ("{person} married {answer}.", "Who did {person} marry?", SPOUSES),
    "purchase": ("{person} bought {answer}.", "What did {person} buy?", PURCHASES),
    "study": ("{person} studied {answer}.", "What did {person} study?", SUBJECTS),
    "visit": ("{person} visited {answer}.", "Where did {person} go?", PLACES),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_paragraphs", type=int, default=10_000, help="about 7 questions each")
    longer = "for each also a file of longer texts, which fill a window of so many tokens with their questions"
    parser.add_argument("--validation_lengths", type=int, nargs="+", default=[], metavar="TOKENS", help=longer)
    positions = "of the models (%(default)s): their longest window"
    parser.add_argument("--max_position_embeddings", type=int, default=512, help=positions)
    args = parser.parse_args(argv)
    if args.train_paragraphs < 1 or min(args.validation_lengths, default=SHORTEST_LENGTH) < SHORTEST_LENGTH:
        parser.error(f"--train_paragraphs must be at least 1, --validation_lengths at least {SHORTEST_LENGTH}")
    transformers.logging.disable_progress_bar()

    splits = make_splits(random.Random(args.seed), {**HELD_OUT_PARAGRAPHS, "train": args.train_paragraphs})
    tokenizer = train_tokenizer(splits["train"])
    for length in args.validation_lengths:
        rng, name = random.Random(f"{args.seed} {length}"), f"validation_{length}"
        splits[name] = make_articles(name, make_long_paragraphs(rng, length, tokenizer))
    for name, articles in splits.items():
        write_text(args.output_dir / f"{name}.json", [json.dumps({"version": "toy", "data": articles})])
    for position_embedding_type in POSITION_EMBEDDING_TYPES:
        torch.manual_seed(args.seed)
        model = untrained_model(position_embedding_type, len(tokenizer), args.max_position_embeddings)
        model.save_pretrained(args.output_dir / position_embedding_type)
        tokenizer.save_pretrained(args.output_dir / position_embedding_type)


# ---- Paragraphs ----


def make_splits(rng, num_paragraphs):
    """{file name without ending: articles} for the three splits in both versions; no context occurs twice."""
    contexts, splits = set(), {}
    for split, number in num_paragraphs.items():
        version_1, version_2 = [], []
        while len(version_1) < number:
            paragraph, no_answer_qas = make_paragraph(rng, f"{split}-{len(version_1)}")
            if paragraph["context"] not in contexts:
                contexts.add(paragraph["context"])
                version_1.append(paragraph)
                answerable = [{**qa, "is_impossible": False} for qa in paragraph["qas"]]
                version_2.append({"context": paragraph["context"], "qas": answerable + no_answer_qas})
        splits[split] = make_articles(split, version_1)
        splits[f"{split}_v2"] = make_articles(split, version_2)
    return splits


def make_articles(split, paragraphs):
    """In SQuAD's layout; without answers where the split is the test's."""
    for qa in (qa for paragraph in paragraphs for qa in paragraph["qas"] if split == "test"):
        del qa["answers"]
        qa.pop("is_impossible", None)
    parts = [paragraphs[i : i + PARAGRAPHS_PER_ARTICLE] for i in range(0, len(paragraphs), PARAGRAPHS_PER_ARTICLE)]
    return [{"title": f"{split} {number}", "paragraphs": part} for number, part in enumerate(parts)]


def make_paragraph(rng, paragraph_id):
    """A paragraph of the official layout, {"context", "qas"}, and a list of questions on it without an answer."""
    is_long = rng.random() < LONG_PARAGRAPHS
    people = rng.sample(PEOPLE, 7 if is_long else rng.choice([2, 3]))
    stranger = people.pop() if is_long else rng.choice([name for name in PEOPLE if name not in people])
    kinds = rng.sample(sorted(FACTS), 3 if is_long else rng.choice([2, 3]) if len(people) == 2 else 2)
    facts = []
    for kind in kinds:
        answers = rng.sample(FACTS[kind][2], len(people))
        facts += [(person, kind, answer) for person, answer in zip(people, answers, strict=True)]
    rng.shuffle(facts)
    paragraph = tell(facts, facts, paragraph_id)

    untold_kind = rng.choice([kind for kind in sorted(FACTS) if kind not in kinds])
    no_answer_qas = []
    for person, kind in ((stranger, rng.choice(kinds)), (rng.choice(people), untold_kind)):
        qa = {"id": f"{paragraph_id}-none-{len(no_answer_qas)}", "question": FACTS[kind][1].format(person=person)}
        no_answer_qas.append({**qa, "answers": [], "is_impossible": True})
    return paragraph, no_answer_qas


def tell(facts, asked, paragraph_id):
    """The paragraph that tells the facts (person, kind, answer) in their order, with a question on each of `asked`."""
    context, qas = "", []
    for person, kind, answer in facts:
        sentence, question, _ = FACTS[kind]
        before, after = sentence.format(person=person, answer="\n").split("\n")
        context += before
        if (person, kind, answer) in asked:
            gold = {"text": answer, "answer_start": len(context)}
            question = question.format(person=person)
            qas.append({"id": f"{paragraph_id}-{len(qas)}", "question": question, "answers": [gold]})
        context += answer + after + " "
    return {"context": context.rstrip(), "qas": qas}


# ---- Longer texts ----


def make_long_paragraphs(rng, length, tokenizer):
    """Paragraphs that fill a window of `length` tokens with any of their questions."""

    def count_tokens(text):
        return len(tokenizer.tokenize(text))

    questions = [question.format(person=person) for _, question, _ in FACTS.values() for person in PEOPLE]
    room = length - max(map(count_tokens, questions)) - tokenizer.num_special_tokens_to_add(pair=True)
    paragraphs, asked = [], 0
    while asked < QUESTIONS_PER_LENGTH:
        paragraph = make_long_paragraph(rng, f"validation_{length}-{len(paragraphs)}", room, count_tokens)
        if paragraph["qas"]:  # words in pieces may leave no room for what is asked
            paragraphs.append(paragraph)
            asked += len(paragraph["qas"])
    return paragraphs


def make_long_paragraph(rng, paragraph_id, num_tokens, count_tokens):
    """A paragraph of `num_tokens` tokens, or a few less, with one question on each kind of fact in it, whose answer
    stands nowhere else. When all facts are told, people go on to visit further cities and to buy further things.
    """

    def tokens_of(person, kind, answer):
        return count_tokens(FACTS[kind][0].format(person=person, answer=answer))

    # About as many kinds of fact as people, as in a short paragraph; the last person may have no room for all kinds.
    kinds = rng.sample(sorted(FACTS), min(round(math.sqrt(num_tokens / TOKENS_PER_FACT)), len(FACTS)))
    tokens_per_person = sum(tokens_of(PEOPLE[0], kind, FACTS[kind][2][0]) for kind in kinds)
    whole = min(num_tokens // tokens_per_person, len(PEOPLE))
    if whole < 1:
        sys.exit("make_toy_squad.py: error: --train_paragraphs are too few to learn whole words from")
    people = rng.sample(PEOPLE, min(whole + 1, len(PEOPLE)))
    golds = {}
    for kind in kinds:
        golds[kind] = rng.choice([answer for answer in FACTS[kind][2] if answer not in golds.values()])
    asked = {(rng.choice(people[:whole]), kind): golds[kind] for kind in kinds}

    every = [(person, kind) for person in people for kind in kinds]
    # Nobody dies twice, and nobody does twice what a question asks about.
    again = [(person, kind) for person, kind in every if kind != "death" and (person, kind) not in asked]
    facts = []
    for person, kind in itertools.chain(every, iter(lambda: rng.choice(again), None)):
        others = [answer for answer in FACTS[kind][2] if answer not in golds.values()]
        fact = (person, kind, asked.get((person, kind)) or rng.choice(others))
        num_tokens -= tokens_of(*fact)
        if num_tokens < 0:
            break
        facts.append(fact)
    rng.shuffle(facts)
    return tell(facts, {(*who, answer) for who, answer in asked.items()}, paragraph_id)


# ---- Tokenizer and models ----


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


def untrained_model(position_embedding_type, vocab_size, max_position_embeddings):
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=8, intermediate_size=256)
    config = BertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        position_embedding_type=position_embedding_type,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); the usual 0.02 is for wider models
        **sizes,
    )
    if position_embedding_type == "absolute":
        return BertForQuestionAnswering(config)
    model = RelativeBertForQuestionAnswering(config)
    for name, parameter in model.named_parameters():
        if "distance_embedding" in name:
            torch.nn.init.normal_(parameter)  # as large as the queries and keys, else distances hardly count at first
    return model


if __name__ == "__main__":
    main()
