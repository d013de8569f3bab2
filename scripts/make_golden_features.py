"""Writes tests/golden/features.json: windows that transformers 4.57.6 makes of awkward questions and contexts.

    python scripts/make_golden_features.py tests/golden/features.json      # with transformers==4.57.6

`squad_convert_examples_to_features` (gone from transformers 5) runs with the slow BertTokenizer and a small vocabulary
made here, for each setting of lengths, over written cases and over random texts put together from awkward words.
"""

import json
import random
import string
import sys
import tempfile
from pathlib import Path

import transformers
from transformers import BertTokenizer, SquadExample, squad_convert_examples_to_features

SETTINGS = [  # max_seq_length, doc_stride, max_query_length
    (384, 128, 64),
    (64, 16, 24),
    (32, 8, 12),
    (40, 25, 12),  # doc_stride is all that the longest question leaves
]
WHOLE_WORDS = (
    "the of and was born in city river old bridge king year who what where when did live paint ##er ##ing ##ed ##s "
    "north ##ern garden won prize name museum cafe naive elan 東 京 大 学 北 18 ##90 ##95 ##43 ☃"
).split()
# "q" and "Q" are in no piece, so that every word with one is [UNK]
LETTERS = [letter for letter in string.ascii_lowercase + string.digits if letter != "q"]
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *string.punctuation,
    *LETTERS,
    *("##" + letter for letter in LETTERS),
    *WHOLE_WORDS,
]

# question, context, answer; the answer is marked by its first place in the context, "" has none
CASES = {
    "plain": ("Who was born?", "The king was born in the old city.", "king"),
    "answer is the first token": ("Who?", "Anna painted the bridge.", "Anna"),
    "answer is the last token": ("What?", "Anna painted the bridge", "bridge"),
    "answer is the whole context": ("What?", "The old northern garden", "The old northern garden"),
    "answer inside a word": ("What?", "The northerners live in cities.", "north"),
    "answer ends inside a word": ("When?", "It was in the 1890s that Anna won.", "1890"),
    "punctuation around": ("When?", "The king (1895–1943) was born.", "1943"),
    "the answer stands twice in one word": ("What?", "It was a ha-ha of the king.", "ha"),
    "no answer": ("Who?", "The old bridge was in the city.", ""),
    "empty context": ("Who was born?", "", ""),
    "context of spaces": ("Who was born?", "  \t ", ""),
    "question of one token": ("who", "The king was born in the old city.", "old"),
    "question longer than max_query_length": ("who was the old king " * 20, "The king was born in 1895.", "1895"),
    "leading spaces": ("   Who was born?", "   The king was born in the old city.", "king"),
    "crlf": ("Who\r\nwas born?", "The king\r\nwas born\r\n\r\nin the old city.\r\n", "the old city"),
    "answer over a line break": ("Where?", "It was in the old\r\ncity of the king.", "old\r\ncity"),
    "tabs": ("\tWho\twas born?", "The\tking\twas\t\tborn.", "king"),
    "non-breaking space": ("Who was\u00a0born?", "The\u00a0old king was\u00a0born in\u00a01895.", "king"),
    "narrow non-breaking space": ("Who?", "The\u202fold\u202fking was born.", "king"),
    "combining accents": ("Who?", "The cafe\u0301 of Ame\u0301lie was naïve, élan.", "Ame\u0301lie"),
    "precomposed accents": ("Who?", "The café of Amélie was naïve, élan.", "café"),
    "emoji": ("Who 😀?", "The king 😀 won 👩\u200d🎨 a prize ☃ in the city.", "prize"),
    "answer is an emoji": ("What?", "The king won ☃ in the city.", "☃"),
    "chinese": ("大学在哪里?", "北京大学 was in 東京 of the king 王.", "東京"),
    "answer inside chinese": ("Where?", "北京大学在東京大学北.", "大学"),
    "unknown words": ("Who was Quentin?", "Quentin of Iraq won the prize antiquedom.", "Iraq"),
    "control characters": ("Who?", "The ki\u0000ng \u0007was b\u200born in\ufeff the city.", "city"),
    "special tokens in the text": ("What is [MASK]?", "The [SEP] king [MASK] was born [CLS] in the city.", "born"),
    "a word of 120 letters": ("What?", "The king " + "won" * 40 + " in the city.", "city"),
    "capital I with a dot": ("Where?", "İstanbul was the city of the king.", "city"),
    "final sigma": ("Who?", "ΟΔΥΣΣΕΥΣ was the king.", "king"),
    "long": ("What did the king paint?", "The northern garden was old and the city of Anna won. " * 30, "won"),
    "long, answer at the end": ("Who?", "The old bridge of the city was in the river. " * 30 + "Zoe", "Zoe"),
    "long answer": (
        "What?",
        "The king " + "painted the river and " * 12 + "won.",
        "painted the river and " * 8 + "painted",
    ),
}

RANDOM_WORDS = (
    "the The of and, was born in city cities river old bridge King king's (1890) 1895–1943 $18.90 Quentin painter "
    "painting, painted northern «garden» won prize; name-museum café cafe\u0301 naïve 東京 北京大学 😀 ☃ xyz. U.S. "
    "a/b Mr. \u201cold\u201d élan, antique re\u0301sume\u0301 won't"
).split()
SPACES = [" "] * 12 + ["  ", "\n", "\r\n", "\t"]


def random_cases(count: int, seed: int):
    generator = random.Random(seed)
    for number in range(count):
        words = generator.choices(RANDOM_WORDS, k=generator.choice([3, 20, 60, 150]))
        context, starts, ends = generator.choice(["", "", " ", "\n"]), [], []
        for word in words:
            starts.append(len(context))
            context += word
            ends.append(len(context))
            context += generator.choice(SPACES)
        question = " ".join(generator.choices(RANDOM_WORDS, k=generator.choice([1, 4, 9, 30])))
        first = generator.randrange(len(words))
        last = min(first + generator.choice([0, 0, 1, 3, 12]), len(words) - 1)
        start, end = starts[first], ends[last]
        if generator.random() < 0.2:  # somewhere in the words
            start = generator.randrange(starts[first], ends[first])
            end = generator.randrange(max(start, starts[last]), ends[last]) + 1
        yield f"random {number}", question, context, context[start:end], start


def windows_of(examples: list[SquadExample], tokenizer, setting: tuple[int, int, int]) -> list[dict]:
    features = squad_convert_examples_to_features(
        examples, tokenizer, *setting, is_training=True, padding_strategy="do_not_pad", tqdm_enabled=False
    )
    return [
        {
            "id": feature.qas_id,
            "input_ids": feature.input_ids,
            "token_type_ids": "".join(map(str, feature.token_type_ids)),
            "start_position": feature.start_position,
            "end_position": feature.end_position,
        }
        for feature in features
    ]


def main(path: str) -> None:
    if transformers.__version__ != "4.57.6":
        sys.exit(f"transformers 4.57.6 is the reference, this is {transformers.__version__}")
    cases = [(name, *case, case[1].index(case[2])) for name, case in CASES.items()]
    cases += random_cases(60, seed=7)
    examples = [SquadExample(*case, title="", is_impossible=not case[3]) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
        tokenizer = BertTokenizer(vocabulary)
    windows = [windows_of(examples, tokenizer, setting) for setting in SETTINGS]
    golden = {
        "vocabulary": VOCABULARY,
        "examples": [dict(zip(("id", "question", "context", "answer", "start"), case, strict=True)) for case in cases],
        "settings": SETTINGS,
        "windows": windows,
    }
    Path(path).write_text(json.dumps(golden, separators=(",", ":")), encoding="utf-8")
    print(f"{path}: {len(cases)} questions, {[len(w) for w in windows]} windows")


if __name__ == "__main__":
    main(*sys.argv[1:])
