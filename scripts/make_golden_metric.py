"""Golden results of transformers 4.57.6's `squad_evaluate`, for tests/test_utils_qa.py.

    python scripts/make_golden_metric.py        under transformers 4.57.6: writes tests/golden/metric.json

One entry a case: the questions as [gold answers, prediction, null odds], the threshold and the result. Null odds and
threshold are null for version 1. The odds of one case are distinct, some are above 0 and some below.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import transformers
from transformers.data.metrics.squad_metrics import squad_evaluate

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "metric.json"

# Each pair is a gold answer and a prediction that is near it, in one respect.
NEAR = [
    ("the Eiffel Tower", "Eiffel Tower"),
    ("an apple a day", "apple day"),
    ("The The", "the"),
    ("theatre another a", "theatre another"),
    ("1,000", "1000"),
    ("U.S.", "us"),
    ("rock'n'roll", "rock n roll"),
    ("state-of-the-art", "state of the art"),
    ("“quoted”", "quoted"),
    ("em—dash", "em dash"),
    ("$5", "5"),
    ("a_b", "ab"),
    ("!!!", "?"),
    ("the", "a"),
    ("an", ""),
    ("Zürich", "zurich"),
    ("Zu\u0308rich", "Zürich"),
    ("ΌΣΟΣ", "όσος"),
    ("İstanbul", "istanbul"),
    ("STRASSE", "straße"),
    ("北京 大学", "北京大学"),
    ("１２", "12"),
    ("two\u00a0words", "two words"),
    ("zero\u200bwidth", "zerowidth"),
    ("line\nbreak\ttab", "line break tab"),
    ("à la carte", "la carte"),
    ("a\u0301 b", "b"),
    ("👑 queen", "queen"),
    ("x x y", "x y y"),
    ("to be or not to be", "be to not"),
    ("one", "two"),
    ("  padded  ", "padded"),
    ("", "something"),
]


def main() -> None:
    if transformers.__version__ != "4.57.6":
        raise SystemExit(f"this is transformers {transformers.__version__}: golden results come from 4.57.6")
    rng = random.Random(13)
    near = [[[gold], prediction] for gold, prediction in NEAR]
    several = [[["one", gold, "two"], prediction] for gold, prediction in NEAR]
    several += [[["two", "one two", ""], "one"], [["the", "two"], "the"], [["the", "a"], ""]]
    none = [[[], prediction] for _, prediction in NEAR if prediction not in ("a", "the", "?")]
    golden = [
        evaluate("near", near, None),
        evaluate("same", [[[gold], gold] for gold, _ in NEAR], None),
        evaluate("several", several, None),
        evaluate("made up", [made_up(rng, 0.0) for _ in range(120)], None),
        evaluate("without answers, version 1", near + none + [[[], ""]], None),
    ]
    made_up_2 = [made_up(rng, 0.4) for _ in range(150)]
    cases = {
        "several and none": several + none + [[[], ""]],
        "none": none,
        "made up": made_up_2,
        "one": [[["one"], "one"]],
    }
    for name, questions in cases.items():
        odds = rng.sample(range(-600, 900), len(questions))
        odds = [value / 64 + (0.0 if name == "one" else 1 / 128) for value in odds]
        rows = [[*question, value] for question, value in zip(questions, odds, strict=True)]
        golden += [evaluate(name, rows, threshold) for threshold in (-2.0, 0.0, rows[0][2])]
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")).replace('{"name"', '\n{"name"'))


def made_up(rng: random.Random, none_share: float) -> list:
    def words():
        return " ".join(rng.choice("the a red big old King, dog. of x-ray 7".split()) for _ in range(rng.randint(1, 4)))

    golds = [] if rng.random() < none_share else ["king " + words() for _ in range(rng.randint(1, 4))]
    return [golds, rng.choice([rng.choice(golds or ["big dog"]), "dog " + words(), ""])]


def evaluate(name: str, questions: list, threshold: float | None) -> dict:
    ids = [f"q{i}" for i in range(len(questions))]
    golds, *predicted = zip(*questions, strict=True)  # predictions, and in version 2 null odds
    answers = [[{"text": text, "answer_start": 0} for text in texts] for texts in golds]
    examples = [SimpleNamespace(qas_id=id_, answers=here) for id_, here in zip(ids, answers, strict=True)]
    by_id = [dict(zip(ids, values, strict=True)) for values in predicted]
    result = squad_evaluate(examples, *by_id) if threshold is None else squad_evaluate(examples, *by_id, threshold)
    return {"name": name, "threshold": threshold, "questions": questions, "result": result}


if __name__ == "__main__":
    main()
