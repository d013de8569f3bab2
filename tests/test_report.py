"""scripts/report.py: what it counts, against plain counting; what it marks and escapes; what it refuses."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bert, tiny_questions

import run_squad
from scripts import report

HOSTILE_TEXTS = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    '"><svg onload=window.hacked=1>',
    "' onmouseover='window.hacked = 1",
    "</p></li></ol></main></body></html><h1>out",
    "</style></title><style>* { display: none }</style><!--",
    "&lt;b&gt; &amp;amp; &#60;b&#62; &nbsp",
    "<iframe src=https://example.org></iframe><a href=https://example.org>link</a>",
    "W" * 700,
    "\u202egnp.exe and عربي 中文 🎉",
]


def write_run(folder: Path, rows: list[dict], null_odds: dict | None = None, **settings) -> None:
    """A run's folder with a file of questions beside it. Rows: id, question, context, golds, and n_best, best first:
    (text, probability, start)."""
    folder.mkdir(parents=True, exist_ok=True)
    data, answers, n_best = [], {}, {}
    for row in rows:
        starts = [row["context"].index(gold) for gold in row["golds"]]
        gold = {"text": row["golds"], "answer_start": starts}
        data.append({"id": row["id"], "context": row["context"], "question": row["question"], "answers": gold})
        n_best[row["id"]] = [
            {"text": t, "probability": p, "start": s, "end": None if s is None else s + len(t)}
            for t, p, s in row["n_best"]
        ]
        answers[row["id"]] = row["n_best"][0][0]
    file = folder.parent / "questions.json"
    file.write_text(json.dumps({"data": data}))
    (folder / "eval_predictions.json").write_text(json.dumps(answers))
    (folder / "eval_nbest_predictions.json").write_text(json.dumps(n_best))
    if null_odds is not None:
        (folder / "eval_null_odds.json").write_text(json.dumps(null_odds))
    settings = {"validation_file": str(file), "version_2_with_negative": null_odds is not None, **settings}
    (folder / "qa_settings.json").write_text(json.dumps(settings))


def write_hostile_run(folder: Path) -> None:
    """Texts that would break the page if they were taken for HTML, in every place that the data has."""
    rows = []
    for i, text in enumerate(HOSTILE_TEXTS):
        context = f"before {text} after {text}"
        common = {"context": context, "question": f"{'who what when where which why how'.split()[i % 7]} {text}?"}
        rows.append({"id": f"{text} {i}", **common, "golds": ["before"], "n_best": [(text, 0.8, 7), ("", 0.1, None)]})
        rows.append({"id": f"gold {i}", **common, "golds": [text], "n_best": [("before", i / 20, 0), ("", 0.1, None)]})
        rows.append({"id": f"right {i}", **common, "golds": [text], "n_best": [(text, 0.9, 7), ("", 0.1, None)]})
        rows.append({"id": f"none {i}", **common, "golds": [], "n_best": [("", 0.7, None), (text, 0.3, 7)]})
        rows.append({"id": f"none but {i}", **common, "golds": [], "n_best": [(text, 0.9, 7), ("", 0.1, None)]})
    null_odds = {
        row["id"]: 3.0 * i / len(rows) + (2 if row["n_best"][0][0] == "" else -4) for i, row in enumerate(rows)
    }
    tiny_bert(folder)
    write_run(folder, rows, null_odds, max_seq_length=48, doc_stride=16, max_query_length=8)
    history = [{"step": 10 * i, "loss": 4 / i} for i in range(1, 40)]
    history += [{"step": 100 * i, "eval_f1": 20.0 * i, "eval_loss": 5.0 - i / 7} for i in range(1, 4)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 390, "log_history": history}))


def question(**values) -> report.Question:
    defaults = {"id": "q", "question": "Who?", "context": "a b c", "golds": ["a"], "gold_spans": [(0, 1)]}
    defaults |= {"answer": "a", "span": (0, 1), "probability": 0.5, "exact": 1, "f1": 1.0, "num_windows": 1}
    return report.Question(**(defaults | values))


class Reader(HTMLParser):
    """The text of some HTML, with the class of the mark that each character stands in, and all attributes."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.characters, self.kind = [], [], [], None
        self.elements = []  # (tag, attributes)
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.elements.append((tag, attrs))
        if tag == "mark":
            self.kind = dict(attrs)["class"]

    def handle_endtag(self, tag):
        if tag == "mark":
            self.kind = None

    def handle_data(self, data):
        self.characters += [(character, self.kind) for character in data]

    @property
    def text(self) -> str:
        return "".join(character for character, _ in self.characters)


# ---- A whole run ----


@pytest.mark.parametrize("version_2", [False, True])
def test_report_of_a_run(version_2, tmp_path, capsys):
    model = tiny_bert(tmp_path / "model")
    out = tmp_path / "out"
    file = tiny_questions(tmp_path / "dev.json", paragraphs=5, version_2=version_2)
    argv = ["--model_name_or_path", model, "--output_dir", str(out), "--do_train", "--do_eval", "--use_cpu"]
    argv += ["--train_file", file, "--validation_file", file, "--max_seq_length", "24", "--doc_stride", "8"]
    argv += ["--num_train_epochs", "2", "--logging_steps", "1", "--eval_strategy", "epoch", "--max_eval_samples", "9"]
    run_squad.main(argv + ["--version_2_with_negative"] * version_2)
    capsys.readouterr()

    report.main([str(out)])
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = Reader((out / "report.html").read_text(encoding="utf-8"))
    results = json.loads((out / "eval_results.json").read_text())
    assert f"{results['eval_f1']:.2f}f1{results['eval_exact']:.2f}exact9questions" in page.text
    for title in ("Training", "Question word", "Answer length", "Context length", "Number of windows", "Calibration"):
        assert title in page.text
    assert ("Average precision" in page.text) == version_2

    run = report.read_run(report.make_parser().parse_args([str(out)]))
    assert sum(q.num_windows for q in run.questions) == results["eval_samples"]
    for name in ("exact", "f1"):
        mean = 100 * sum(getattr(q, name) for q in run.questions) / 9
        assert mean == pytest.approx(results[f"eval_{name}"])
    assert all(q.context[slice(*q.span)] == q.answer for q in run.questions if q.span is not None)
    state = json.loads((out / "trainer_state.json").read_text())
    assert [step for step, _ in run.loss] == list(range(1, state["global_step"] + 1))
    assert len(run.f1) == 2
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in state["log_history"] if "eval_loss" in entry]
    assert run.eval_loss == evaluated and len(evaluated) == 2
    assert f"evaluation {evaluated[-1][1]:.4g}" in page.text and f"training {run.loss[-1][1]:.4g}" in page.text


def test_page_stands_alone(tmp_path):
    write_hostile_run(tmp_path / "run")
    report.main([str(tmp_path / "run")])
    page = Reader((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "a", "object", "embed", "form"} & set(page.tags)
    assert not [(name, value) for name, value in page.attributes if name.startswith("on") or name == "src"]
    assert [value for name, value in page.attributes if name == "href"] == ["data:,"]
    assert "url(" not in report.STYLE and "@import" not in report.STYLE
    for text in HOSTILE_TEXTS:
        assert page.text.count(text) >= 6


def losses_of(folder: Path, history: list[dict]) -> Reader:
    """The card of the training of a run with this history."""
    rows = [{"id": "1", "question": "?", "context": "a b", "golds": ["a"], "n_best": [("a", 1.0, 0)]}]
    write_run(folder, rows)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": history}))
    return Reader(report.training_card(report.read_run(report.make_parser().parse_args([str(folder)]))))


def test_both_losses_share_their_axes(tmp_path):
    training = [{"step": step, "loss": 2 / step} for step in range(1, 5)]
    evaluations = [{"step": 2, "eval_loss": 4.0, "eval_f1": 1.0}, {"step": 4, "eval_loss": 1.0, "eval_f1": 2.0}]

    def lines(card, kind):
        places = [dict(attributes)["points"] for tag, attributes in card.elements if tag == "polyline"
                  and kind in dict(attributes)["class"].split()]  # fmt: skip
        return [[tuple(map(float, place.split(","))) for place in line.split()] for line in places]

    both = losses_of(tmp_path / "both", training + evaluations)
    ((*_, trained),), (((x, y), (x_end, y_end)),) = lines(both, "dark-line"), lines(both, "evaluation-line")
    assert trained[0] == x_end == 2 * x - 38  # the same steps; the axis begins at 38
    # A loss has its height from the bottom, at 142: 0.5 at the end of training, then 4 and 1.
    assert [round((142 - height) / (142 - trained[1]), 1) for height in (y, y_end)] == [8, 2]
    assert "training 0.5" in both.text and "evaluation 1" in both.text

    alone = losses_of(tmp_path / "alone", training + [{"step": step, "eval_f1": 2.0} for step in (2, 4)])
    assert "evaluation" not in alone.text and not lines(alone, "evaluation-line") and len(lines(alone, "line")) == 2
    unlogged = losses_of(tmp_path / "unlogged", evaluations)
    assert "evaluation 1" in unlogged.text and "training 0" not in unlogged.text and lines(unlogged, "evaluation-line")


def test_a_run_of_which_little_is_known(tmp_path):
    rows = [{"id": "1", "question": "?", "context": "a b", "golds": ["a"], "n_best": [("a", 1.0, 0)]}]
    write_run(tmp_path / "run", rows)
    (tmp_path / "run" / "qa_settings.json").unlink()
    report.main([str(tmp_path / "run"), "--validation_file", str(tmp_path / "questions.json")])
    page = Reader((tmp_path / "run" / "report.html").read_text()).text
    assert "holds no trainer_state.json" in page
    assert "Not known: run has no qa_settings.json" in page
    assert "Every question is answered exactly" in page


def test_version_2_where_every_question_has_an_answer(tmp_path):
    rows = [{"id": "1", "question": "?", "context": "a b", "golds": ["a"], "n_best": [("b", 0.7, 2), ("", 0.3, None)]}]
    write_run(tmp_path / "run", rows, {"1": -1.0})
    report.main([str(tmp_path / "run")])
    assert "Every question has a gold answer" in (tmp_path / "run" / "report.html").read_text()


def test_each_error_is_one_line(tmp_path, capsys):
    row = {"question": "?", "context": "a b", "golds": ["a"], "n_best": [("a", 1.0, 0)]}
    rows = [{"id": "1", **row}, {"id": "2", **row}]
    run = tmp_path / "run"

    def refusal(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_status:
            report.main([str(run), *argv])
        out, err = capsys.readouterr()
        assert (exit_status.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("report.py: error: ") and not (run / "report.html").exists()
        return err

    assert "there is no such folder" in refusal()
    run.mkdir()
    assert "holds no eval_predictions.json: run run_squad.py with --do_eval first" in refusal()
    write_run(run, rows)
    assert "unrecognized arguments: --validationfile" in refusal("--validationfile")
    assert "none.json, which was evaluated, is not there" in refusal("--validation_file", str(tmp_path / "none.json"))

    (tmp_path / "other.json").write_text((tmp_path / "questions.json").read_text().replace('"id": "2"', '"id": "3"'))
    message = refusal("--validation_file", str(tmp_path / "other.json"))
    assert "lacks 1 of its questions (first ids: 2)" in message

    (tmp_path / "no_gold.json").write_text(json.dumps([{"id": "1", "context": "a", "question": "?"}]))
    assert "no validation questions with gold answers" in refusal("--validation_file", str(tmp_path / "no_gold.json"))

    (run / "eval_null_odds.json").write_text('{"1": 0.0}')
    assert "report.html" not in [path.name for path in run.iterdir()]
    (run / "qa_settings.json").write_text(json.dumps({"validation_file": str(tmp_path / "questions.json")}))
    assert "of different questions: evaluate again" in refusal()
    (run / "qa_settings.json").write_text("{}")
    assert "does not say which questions were evaluated" in refusal()
    (run / "qa_settings.json").write_text("{")
    assert "qa_settings.json: is not JSON" in refusal()


# ---- Statistics ----


@pytest.mark.parametrize(
    "text, word",
    [
        ("Who was she?", "who"),
        ("In what year, and when?", "what"),
        ("How many people?", "how many"),
        ("HOW MUCH?", "how much"),
        ("How?", "how"),
        ("To whom did he write?", "who"),
        ("Whose house?", "who"),
        ("The show is where?", "where"),
        ("Name the city.", "other"),
        ("", "other"),
    ],
)
def test_question_word(text, word):
    assert report.question_word(text) == word


def test_range_name():
    names = [report.range_name(value, [1, 2, 3, 5, 10]) for value in (1, 2, 3, 4, 5, 6, 10, 11, 99)]
    assert names == ["1", "2", "3", "4–5", "4–5", "6–10", "6–10", "11+", "11+"]
    assert [report.range_name(value, [50, 100]) for value in (0, 50, 51, 101)] == ["≤ 50", "≤ 50", "51–100", "101+"]


def test_calibration_by_hand():
    given_answers = [(0.05, 0), (0.05, 1), (0.3, 0), (0.95, 1), (1.0, 1), (0.99, 0)]
    bins = report.calibration([question(probability=p, exact=e) for p, e in given_answers])
    assert bins == [
        pytest.approx((0.05, 0.5, 2)),
        pytest.approx((0.3, 0.0, 1)),
        pytest.approx((0.98, 2 / 3, 3)),
    ]
    assert report.calibration_error(bins) == pytest.approx((2 * 0.45 + 0.3 + 3 * (0.98 - 2 / 3)) / 6)


def test_probability_of_a_span_that_two_windows_see(tmp_path):
    n_best = [("a", 0.4, 0), ("a", 0.3, 0), ("a", 0.2, 4), ("b", 0.1, 2)]
    write_run(tmp_path / "run", [{"id": "1", "question": "?", "context": "a b a", "golds": ["a"], "n_best": n_best}])
    run = report.read_run(report.make_parser().parse_args([str(tmp_path / "run")]))
    assert run.questions[0].probability == pytest.approx(0.7)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0])), min_size=1, max_size=12))
def test_no_answer_curve_counts_at_each_threshold(rows):
    has_answer, odds = [has for has, _ in rows], [odds for _, odds in rows]
    if all(has_answer):
        return
    points = report.no_answer_curve(has_answer, odds)
    assert len(points) == len(set(odds))
    for threshold, precision, recall in points:
        chosen = [has for has, value in rows if value > threshold]
        assert precision == pytest.approx(chosen.count(False) / len(chosen))
        assert recall == pytest.approx(chosen.count(False) / has_answer.count(False))
        assert report.at_threshold(has_answer, odds, threshold) == pytest.approx((precision, recall))
    assert points[-1][2] == 1.0
    assert report.at_threshold(has_answer, odds, max(odds)) is None


def test_average_precision_by_hand():
    # Ranked: right, wrong, right; so 1/2 of the recall at precision 1 and 1/2 at 2/3.
    points = report.no_answer_curve([False, True, False], [3.0, 2.0, 1.0])
    assert report.average_precision(points) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_worst_questions_come_first():
    questions = [question(id=str(i), exact=0, f1=0.25 * (i % 3), probability=i / 100) for i in range(100)]
    questions += [question(id="right")]
    chosen = report.worst(questions)
    assert len(chosen) == 50
    assert [int(q.id) for q in chosen] == [*range(99, -1, -3), *range(97, 48, -3)][:50]


# ---- Charts and marks ----


@given(st.floats(0.001, 1e7))
def test_ticks_are_round_and_inside(high):
    values = report.ticks(0, high)
    assert 3 <= len(values) <= 6 and values[0] == 0 and values[-1] <= high * (1 + 1e-9)
    assert f"{values[1]:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")
    assert values == pytest.approx([i * values[1] for i in range(len(values))])


@given(st.data())
def test_marks_cover_the_answers(data):
    context = data.draw(st.text(alphabet="ab <&\">\n'é", min_size=1, max_size=30))
    span = st.tuples(st.integers(0, len(context)), st.integers(0, len(context))).map(sorted).map(tuple)
    golds, predicted = data.draw(st.lists(span, max_size=3)), data.draw(st.none() | span)
    html = report.marked_context(question(context=context, gold_spans=golds, span=predicted))
    marked = Reader(html)
    assert marked.text == context
    for i, (_, kind) in enumerate(marked.characters):
        in_gold = any(start <= i < end for start, end in golds)
        in_predicted = predicted is not None and predicted[0] <= i < predicted[1]
        assert kind == {(0, 0): None, (1, 0): "gold", (0, 1): "pred", (1, 1): "both"}[in_gold, in_predicted]


def test_a_long_context_is_cut_to_the_surroundings():
    context = "x" * 5000 + "gold" + "y" * 5000 + "predicted" + "z" * 5000
    spans = {"gold_spans": [(5000, 5004)], "span": (10004, 10013)}
    shown = Reader(report.marked_context(question(context=context, **spans))).text
    n = report.SURROUNDINGS
    assert shown == f" … {'x' * n}gold{'y' * n} … {'y' * n}predicted{'z' * n} … "
    no_spans = Reader(report.marked_context(question(context=context, gold_spans=[], span=None))).text
    assert no_spans == f"{'x' * n} … "


def test_misplaced_gold_answers_do_not_break_the_page():
    html = report.marked_context(question(context="abc", gold_spans=[(-2, 1), (2, 9), (50, 60)], span=None))
    assert Reader(html).characters == [("a", "gold"), ("b", None), ("c", "gold")]


def test_shutil_copy_of_a_run_can_be_reported(tmp_path):
    write_hostile_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "copy")
    report.main([str(tmp_path / "elsewhere" / "copy")])
    assert "<h1>copy</h1>" in (tmp_path / "elsewhere" / "copy" / "report.html").read_text()
