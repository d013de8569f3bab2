"""scripts/report.py: what it counts, against plain counting; what it marks and escapes; what it refuses."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
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
    "&lt;b&gt; &amp;amp; &#60;b&#62; &nbsp $name ${tiles} $$ {style}",
    "<iframe src=https://example.org></iframe><a href=https://example.org>link</a>",
    "W" * 700,
    "\u202egnp.exe and عربي 中文 🎉",
]
ONE_QUESTION = {"id": "1", "question": "?", "context": "a b", "golds": ["a"], "n_best": [("a", 1.0, 0)]}


def write_run(folder: Path, rows: list[dict], **settings) -> None:
    """A run's folder with a file of questions beside it. Rows: id, question, context, golds, and n_best, best first:
    (text, probability, start)."""
    folder.mkdir(parents=True, exist_ok=True)
    data, n_best = [], {}
    for row in rows:
        gold = {"text": row["golds"], "answer_start": [row["context"].index(gold) for gold in row["golds"]]}
        data.append({"id": row["id"], "context": row["context"], "question": row["question"], "answers": gold})
        n_best[row["id"]] = [
            {"text": t, "probability": p, "start": s, "end": None if s is None else s + len(t)}
            for t, p, s in row["n_best"]
        ]
    file = folder.parent / "questions.json"
    contents = {
        file: {"data": data},
        folder / "eval_predictions.json": {id_: candidates[0]["text"] for id_, candidates in n_best.items()},
        folder / "eval_nbest_predictions.json": n_best,
        folder / "qa_settings.json": {"validation_file": str(file), **settings},
    }
    for path, content in contents.items():
        path.write_text(json.dumps(content))


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
    tiny_bert(folder)
    write_run(folder, rows, max_seq_length=48, doc_stride=16, max_query_length=8, cache_dir=None)
    history = [{"step": 10 * i, "loss": 4 / i} for i in range(1, 40)]
    history += [{"step": 100 * i, "eval_f1": 20.0 * i, "eval_loss": 5.0 - i / 7} for i in range(1, 4)]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 390, "log_history": history}))


def read_run(folder: Path):
    return report.read_run(str(folder), validation_file=None, dataset_name=None, dataset_config_name=None)


def question(**values) -> report.Question:
    defaults = {"id": "q", "question": "Who?", "context": "a b c", "answers": {"text": ["a"], "answer_start": [0]}}
    defaults |= {"answer": "a", "span": (0, 1), "probability": 0.5, "exact": 1, "f1": 1.0}
    return report.Question(**(defaults | {"num_windows": 1} | values))


class Reader(HTMLParser):
    """The text of some HTML, with the class of the mark that each character stands in, and all elements."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.characters, self.kind = [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
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


@pytest.mark.parametrize("version_2", [False, True])
def test_report_of_a_run(version_2, tmp_path, capsys):
    model = tiny_bert(tmp_path / "model")
    out = tmp_path / "out"
    file = tiny_questions(tmp_path / "dev.json", paragraphs=5, version_2=version_2)
    argv = ["--model_name_or_path", model, "--output_dir", str(out), "--do_train", "--do_eval", "--use_cpu"]
    argv += ["--train_file", file, "--validation_file", file, "--max_seq_length", "24", "--doc_stride", "8"]
    argv += ["--num_train_epochs", "2", "--logging_steps", "1", "--eval_strategy", "epoch", "--max_eval_samples", "9"]
    run_squad.main(argv + ["--version_2_with_negative"] * version_2)
    out = out.rename(tmp_path / "moved")
    capsys.readouterr()

    report.main([str(out)])
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    text = Reader((out / "report.html").read_text(encoding="utf-8")).text
    results = json.loads((out / "eval_results.json").read_text())
    assert f"{results['eval_f1']:.2f}f1{results['eval_exact']:.2f}exact" in text and "9questions" in text
    for title in ("Training", "Question word", "Answer length", "Context length", "Number of windows", "Calibration"):
        assert title in text
    for kind, name in (("f1, with an answer", "HasAns_f1"), ("f1, without one", "NoAns_f1")):
        assert (f"{results.get(f'eval_{name}', -1):.2f}{kind}" in text) == version_2

    questions, history = read_run(out)
    assert sum(q.num_windows for q in questions) == results["eval_samples"]
    for name in ("exact", "f1"):
        assert 100 * np.mean([getattr(q, name) for q in questions]) == pytest.approx(results[f"eval_{name}"])
    assert all(q.context[slice(*q.span)] == q.answer for q in questions if q.span is not None)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for name in ("loss", "eval_loss", "eval_f1"):
        assert history[name] == [(entry["step"], entry[name]) for entry in log if name in entry]
    assert len(history["loss"]) > 2 == len(history["eval_loss"])
    assert all(f"{name} {history[key][-1][1]:.4g}" in text for name, key in
               (("training", "loss"), ("evaluation", "eval_loss"), ("f1", "eval_f1")))  # fmt: skip


def test_hostile_texts_stay_text(tmp_path):
    write_hostile_run(tmp_path / "run")
    report.main([str(tmp_path / "run")])
    page = Reader((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "a", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    names = [name for _, attributes in page.elements for name in attributes]
    assert not [name for name in names if name.startswith("on") or name == "src"] and names.count("href") == 1
    template = report.TEMPLATE.read_text()
    assert "url(" not in template and "@import" not in template and '<link rel="icon" href="data:,">' in template
    for text in HOSTILE_TEXTS:
        assert page.text.count(text) >= 6


def test_both_losses_share_their_axes(tmp_path):
    write_run(tmp_path / "run", [ONE_QUESTION])
    history = [{"step": step, "loss": 2 / step} for step in range(1, 5)]
    history += [{"step": 2, "eval_loss": 4.0, "eval_f1": 1.0}, {"step": 4, "eval_loss": 1.0, "eval_f1": 2.0}]

    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": history}))
    card = Reader(report.training_card(read_run(tmp_path / "run")[1]))
    points = [attributes["points"] for tag, attributes in card.elements if tag == "polyline"]
    training, evaluation, _ = [[tuple(map(float, xy.split(","))) for xy in line.split()] for line in points]

    x_of_step, y_of_loss = dict(zip(range(1, 5), training, strict=True)), {2: training[0][1], 0.5: training[-1][1]}
    unit = (y_of_loss[0.5] - y_of_loss[2]) / 1.5
    assert [x for x, _ in evaluation] == [x_of_step[2][0], x_of_step[4][0]]
    assert [(y_of_loss[2] - y) / unit for _, y in evaluation] == pytest.approx([4 - 2, 1 - 2], abs=0.01)


def test_a_run_of_which_little_is_known(tmp_path):
    write_run(tmp_path / "run", [ONE_QUESTION])
    (tmp_path / "run" / "qa_settings.json").unlink()
    report.main([str(tmp_path / "run"), "--validation_file", str(tmp_path / "questions.json")])
    page = Reader((tmp_path / "run" / "report.html").read_text()).text
    assert "trainer_state.json is missing" in page
    assert "Not known: the folder lacks qa_settings.json" in page
    assert "0 of 1 questions are not answered exactly" in page


def test_each_error_is_one_line(tmp_path, capsys):
    run, questions, other = tmp_path / "run", tmp_path / "questions.json", tmp_path / "other.json"

    def refusal(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit_status:
            report.main([str(run), *argv])
        out, err = capsys.readouterr()
        assert (exit_status.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("report.py: error: ") and not (run / "report.html").exists()
        return err

    assert "holds no eval_predictions.json: run run_squad.py with --do_eval first" in refusal()
    write_run(run, [ONE_QUESTION, {**ONE_QUESTION, "id": "2"}])
    assert "unrecognized arguments: --validationfile" in refusal("--validationfile")
    assert "none.json, which was evaluated, is not there" in refusal("--validation_file", str(tmp_path / "none.json"))
    other.write_text(questions.read_text().replace('"id": "2"', '"id": "3"'))
    assert "lacks 1 of its questions (first ids: 2)" in refusal("--validation_file", str(other))
    other.write_text(json.dumps([{"id": "1", "context": "a", "question": "?"}]))
    assert "no validation questions with gold answers" in refusal("--validation_file", str(other))
    (run / "eval_nbest_predictions.json").write_text('{"1": []}')
    for settings, message in (
        (json.dumps({"validation_file": str(questions)}), "of different evaluations: evaluate again"),
        ("{}", "does not say which questions were evaluated"),
        ("{", "qa_settings.json: cannot be read as a JSON object"),
    ):
        (run / "qa_settings.json").write_text(settings)
        assert message in refusal()


@pytest.mark.parametrize(
    "text, word",
    [
        ("In what year, and when?", "what"),
        ("How many people?", "how many"),
        ("HOW MUCH?", "how much"),
        ("How?", "how"),
        ("To whom did he write?", "who"),
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
    assert [report.tenth(p) for p in (0.0, 0.05, 0.35, 0.99, 1.0)] == ["0.0–0.1"] * 2 + ["0.3–0.4"] + ["0.9–1.0"] * 2
    given_answers = [(0.05, 0), (0.05, 1), (0.3, 0), (0.95, 1), (1.0, 1), (0.99, 0)]
    questions = [question(probability=p, exact=e) for p, e in given_answers]
    error = report.calibration_error({"0": questions[:2], "3": questions[2:3], "9": questions[3:]})
    assert error == pytest.approx((2 * 0.45 + 0.3 + 3 * (0.98 - 2 / 3)) / 6)


def test_probability_of_a_span_that_two_windows_see(tmp_path):
    n_best = [("a", 0.4, 0), ("a", 0.3, 0), ("a", 0.2, 4), ("b", 0.1, 2)]
    write_run(tmp_path / "run", [{**ONE_QUESTION, "context": "a b a", "n_best": n_best}])
    assert read_run(tmp_path / "run")[0][0].probability == pytest.approx(0.7)


def test_worst_questions_come_first():
    questions = [question(id=str(i), exact=0, f1=0.25 * (i % 3), probability=i / 100) for i in range(100)]
    chosen = report.worst([question(id="right"), *questions])
    assert [int(q.id) for q in chosen] == [*range(99, -1, -3), *range(97, -1, -3), *range(98, -1, -3)]


@given(st.data())
def test_marks_cover_the_answers(data):
    context = data.draw(st.text(alphabet="ab <&\">\n'é{}", min_size=1, max_size=30))
    span = st.tuples(st.integers(0, len(context)), st.integers(0, len(context))).map(sorted).map(tuple)
    golds, predicted = data.draw(st.lists(span, max_size=3)), data.draw(st.none() | span)
    answers = {"text": [context[slice(*gold)] for gold in golds], "answer_start": [start for start, _ in golds]}
    marked = Reader(report.marked_context(question(context=context, answers=answers, span=predicted)))
    assert marked.text == context
    for i, (_, kind) in enumerate(marked.characters):
        in_gold = any(start <= i < end for start, end in golds)
        in_predicted = predicted is not None and predicted[0] <= i < predicted[1]
        assert kind == {(0, 0): None, (1, 0): "gold", (0, 1): "pred", (1, 1): "both"}[in_gold, in_predicted]


def test_a_long_context_is_cut_to_the_surroundings():
    context, n = "x" * 5000 + "gold" + "y" * 5000 + "predicted" + "z" * 5000, report.SURROUNDINGS
    answers = {"text": ["gold"], "answer_start": [5000]}
    shown = Reader(report.marked_context(question(context=context, answers=answers, span=(10004, 10013)))).text
    assert shown == f" … {'x' * n}gold{'y' * n} … {'y' * n}predicted{'z' * n} … "
    unanswered = question(context=context, answers={"text": [], "answer_start": []}, span=None)
    assert Reader(report.marked_context(unanswered)).text == f"{'x' * n} … "


def test_misplaced_gold_answers_do_not_break_the_page():
    answers = {"text": ["ana", "cdefghi", "far away", "anywhere"], "answer_start": [-2, 2, 50, -1]}
    html = report.marked_context(question(context="abc", answers=answers, span=None))
    assert Reader(html).characters == [("a", "gold"), ("b", None), ("c", "gold")]
