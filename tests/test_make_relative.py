"""scripts/make_relative.py: what the student starts with and learns, what is left of a run, and what is refused."""

import gzip
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import PEOPLE, TOWNS, read, tiny_bert, tiny_questions
from transformers import BertForMaskedLM, BertForQuestionAnswering, DistilBertConfig, pipeline

import run_squad
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from scripts import make_relative

QUICK = "--max_seq_length 48 --per_device_train_batch_size 4 --use_cpu".split()
TYPE = ["--position_embedding_type", "relative_key_query"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model that answers questions and one that does not, text, and questions."""
    folder = tmp_path_factory.mktemp("inputs")
    model = BertForQuestionAnswering.from_pretrained(tiny_bert(folder / "qa", seed=1))
    for name, weight in model.named_parameters():
        if "LayerNorm" not in name:
            weight.data *= 10  # so that positions and attention matter
    model.save_pretrained(folder / "qa")
    masked = BertForMaskedLM.from_pretrained(folder / "qa")
    tiny_bert(folder / "masked")
    masked.save_pretrained(folder / "masked")
    lines = [f"{PEOPLE[i % 8]} lives in {TOWNS[i * 3 % 7]} , and {PEOPLE[i % 5]} goes to market ." for i in range(300)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    questions = tiny_questions(folder / "questions.json", paragraphs=16)
    return {"qa": f"{folder}/qa", "masked": f"{folder}/masked", "text": f"{folder}/text.txt", "questions": questions}


def shares(printed: str) -> dict:
    return json.loads(printed[printed.index("{\n") :])


# ---- What it makes ----


def test_the_student_of_a_teacher_whose_positions_are_all_one_is_its_equal(inputs):
    """What positions have in common is kept: no other test sees a start that is wrong."""
    teacher = BertForQuestionAnswering.from_pretrained(inputs["qa"]).eval()
    table = teacher.bert.embeddings.position_embeddings.weight
    table.data[:] = table[3].clone()
    student = make_relative.make_student(teacher, "relative_key_query", 32).eval()
    for layer in student.bert.encoder["layer"]:
        layer.attention.self.distance_embedding.weight.data.zero_()
    tokens = torch.randint(5, 40, (2, 32), generator=torch.Generator().manual_seed(0))
    types = (torch.arange(32) > 9).long().expand(2, -1)
    with torch.no_grad():
        expected, own = (model(tokens, token_type_ids=types) for model in (teacher, student))
    torch.testing.assert_close(own.start_logits, expected.start_logits)
    assert student.config.max_position_embeddings == 32


def test_text_makes_a_student_that_is_fine_tuned_as_any_bert(inputs, tmp_path, capsys):
    out = tmp_path / "student"
    sources = f"--text_file {inputs['text']} --train_file {inputs['questions']} --doc_stride 16"
    text = [*sources.split(), *"--num_train_epochs 10 --eval_strategy epoch --eval_on_start".split()]
    make_relative.main([inputs["masked"], *text, *TYPE, *QUICK, "--output_dir", str(out)])
    printed = shares(capsys.readouterr().out)
    history = [entry for entry in read(out, "trainer_state.json")["log_history"] if "eval_loss" in entry]
    assert history[0]["eval_loss"] > 1.1 * history[-1]["eval_loss"]
    assert history[0]["eval_layer_1"] < history[-1]["eval_layer_1"] == printed["eval_layer_1"]

    weights, before = load_file(out / "model.safetensors"), load_file(Path(inputs["masked"], "model.safetensors"))
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights[words], before[words])
    assert not any(name.startswith("qa_outputs") for name in weights)
    assert weights["bert.encoder.layer.0.attention.self.distance_embedding.weight"].shape == (95, 8)
    card = (out / "README.md").read_text()
    assert "masked with relative_key_query position embeddings" in card
    assert "of text.txt, questions.json, read 10.0 times" in card
    assert f"| layer_1 | {printed['eval_layer_1']:.3f} |" in card and "epoch" not in printed

    flags = f"--train_file {inputs['questions']} --do_train --max_seq_length 40 --doc_stride 16 --max_steps 1 --use_cpu"
    run_squad.main(["--model_name_or_path", str(out), *flags.split(), "--output_dir", str(tmp_path / "trained")])
    assert read(tmp_path, "trained", "config.json")["position_embedding_type"] == "relative_key_query"

    capsys.readouterr()
    make_relative.main([inputs["masked"], *text, *TYPE, *QUICK, "--output_dir", str(out)])
    out, err = capsys.readouterr()
    assert "It was made before" in err and out == ""


def test_a_model_that_answers_goes_on_answering(inputs, tmp_path, capsys):
    questions = ["--train_file", inputs["questions"], "--validation_file", inputs["questions"], "--do_eval"]
    flags = [*questions, *TYPE, *QUICK, "--doc_stride", "16", "--output_dir", str(tmp_path)]
    make_relative.main([inputs["qa"], *flags, "--num_train_epochs", "40", "--learning_rate", "2e-3"])
    printed = shares(capsys.readouterr().out)
    assert printed["teacher"]["f1"] > 0
    assert printed["student"]["total"] == 32
    assert read(tmp_path, "eval_results.json")["eval_f1"] == printed["student"]["f1"]
    assert (
        f"| student | {printed['student']['exact']:.2f} | {printed['student']['f1']:.2f} |"
        in (tmp_path / "README.md").read_text()
    )

    # Its answers are those of the teacher much more often than an untrained one's.
    text = json.loads(Path(inputs["questions"]).read_text())["data"]
    asked = [
        {"question": each["question"], "context": paragraph["context"]}
        for article in text
        for paragraph in article["paragraphs"]
        for each in paragraph["qas"]
    ]
    teacher = BertForQuestionAnswering.from_pretrained(inputs["qa"])
    untrained = make_relative.make_student(teacher, TYPE[1], 48)
    ask = pipeline(model=str(tmp_path), trust_remote_code=True)

    def answers(model):
        ask.model = model.eval()
        return [found["answer"] for found in ask(asked)]

    true, before = answers(teacher), answers(untrained)
    after = answers(RelativeBertForQuestionAnswering.from_pretrained(tmp_path))
    agree = [sum(a == b for a, b in zip(true, each, strict=True)) for each in (before, after)]
    assert agree[0] + 4 < agree[1], agree


def test_a_run_that_was_stopped_ends_as_one_that_was_not(inputs, tmp_path, monkeypatch):
    """The optimizer's groups are found again: distances have a learning rate, and moments, of their own."""

    def make(folder, *flags):
        flags = ["--text_file", inputs["text"], "--max_steps", "6", "--save_steps", "3", *TYPE, *QUICK, *flags]
        make_relative.main([inputs["qa"], *flags, "--output_dir", str(tmp_path / folder)])
        return load_file(tmp_path / folder / "model.safetensors")

    whole = make("whole")
    save = make_relative.DistillationTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(make_relative.DistillationTrainer, "_save_checkpoint", save_and_die)
        make("stopped")
    resumed = make("stopped")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


# ---- What it learns on ----


@given(st.text(alphabet="ab 日", min_size=1, max_size=300), st.integers(8, 64))
def test_passages_are_the_text(text, longest):
    draw = random.Random(0)
    passages = list(make_relative.cut(text, longest, draw))
    assert "".join(passages) == text
    assert all(0 < len(passage) <= longest + longest // 8 for passage in passages)


def test_text_of_several_files_gzipped_or_not_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffanna\tlives\n\n in paris", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"ben"))
    args = make_relative.DistillationDataArguments(text_file=[str(tmp_path)])
    assert make_relative.read_text(args, None) == "anna lives in paris ben"


def test_text_of_a_dataset_and_its_part(tmp_path):
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.txt").write_text("anna lives\nin paris\nben")
    args = make_relative.DistillationDataArguments(
        text_dataset_name=str(tmp_path / "lines"), text_dataset_split="train[:2]"
    )
    source = SimpleNamespace(token=None, cache_dir=str(tmp_path / "cache"))
    assert make_relative.read_text(args, source) == "anna lives in paris"
    (tmp_path / "more.txt").write_text("clara")
    args.text_file = [str(tmp_path / "more.txt")]
    assert make_relative.read_text(args, source) == "anna lives in paris clara"


# ---- Bad input ----


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("distilbert", "--text_file {text}", "is no BERT but of model_type distilbert"),
        ("relative", "--text_file {text}", "has relative_key positions already: train it with run_squad.py"),
        ("masked", "--text_file {text} --position_embedding_type absolute", "must be relative_key or rela"),
        ("masked", "", "give --text_file, --text_dataset_name, --train_file or --dataset_name"),
        ("masked", "--text_file {missing}", "missing: cannot be read: No such file or directory"),
        ("masked", "--text_file {empty}", "there is no text in"),
        ("masked", "--text_file {short}", "the text fills one window only: give more"),
        ("masked", "--text_file {latin}", "latin: is not in UTF-8 (byte 3): convert it, as with iconv"),
        ("masked", "--text_file {greek}", "of the text's tokens are [UNK]: it is not in the language of the model"),
        ("masked", "--text_dataset_name {rows}", "rows has no column text, but words: name another dataset"),
        ("masked", "--text_dataset_name {rows} --text_dataset_split test", "cannot be loaded from the hub"),
        ("masked", "--text_file {text} --max_seq_length 65", "--max_seq_length is 65, but"),
        ("masked", "--text_file {text} --metric_for_best_model f1", "--metric_for_best_model is 'f1', must be loss"),
        ("masked", "--train_file {questions} --validation_file {questions} --do_eval", "was not trained to answer any"),
        ("masked", "--text_file {text} --do_predict", "predicts nothing: leave out --do_train and --do_predict"),
        ("masked", "--train_file {questions} --validation_file {questions} --do_eval --do_train False", "always train"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_the_work(inputs, tmp_path, capsys, model, flags, says):
    DistilBertConfig(dim=16, n_layers=1, n_heads=2).save_pretrained(tmp_path / "distilbert")
    tiny_bert(tmp_path / "relative", "relative_key")
    contents = {
        "empty": b" \n",
        "short": b"anna lives in paris",
        "latin": b"caf\xe9",
        "greek": "αβγ δεζ ".encode() * 999,
    }
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.json").write_text('{"words": "anna"}')
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = {name: tmp_path / name for name in (*contents, "distilbert", "relative", "rows", "missing")}
    known = {**files, **inputs}
    flags = f"{known[model]} {' '.join(TYPE)} {' '.join(QUICK)} --doc_stride 16 {flags}".format(**known).split()
    with pytest.raises(SystemExit) as status:
        make_relative.main([*flags, "--output_dir", str(tmp_path / "out")])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status.value.code == 2 and line.startswith("make_relative.py: error: ") and says in line, line
    assert not (tmp_path / "out").exists()
