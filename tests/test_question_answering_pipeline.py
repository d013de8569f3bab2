"""The pipeline that is saved with a model: the evaluation's answers, by the interface that transformers removed."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_windows import roberta_tokenizer
from tiny import read, tiny_bert
from transformers import BertForQuestionAnswering, RobertaConfig, RobertaForQuestionAnswering, pipeline

import run_squad
from qa.load_model import PIPELINE_SETTINGS
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from qa.question_answering_pipeline import DEFAULTS, QuestionAnsweringPipeline
from qa.windows import WindowSettings
from utils_qa import AnswerSettings

MODELS = {"absolute": BertForQuestionAnswering, "relative_key_query": RelativeBertForQuestionAnswering}
SETTINGS = "--max_seq_length 24 --doc_stride 7 --max_query_length 6 --n_best_size 7 --max_answer_length 5".split()
TEXT = "anna lives in pari\u0301s and works as a baker .\r\n" + 5 * "ben lives in rome , and ben goes to market . "
QUESTIONS = ["who lives in rome ?", "  where does anna live ? where ? where ?", "what ?"]


@pytest.fixture(scope="module", params=["absolute", "relative_key_query"])
def trained(request, tmp_path_factory) -> Path:
    """A trained model and its evaluation; with version 2 for the relative one, about half of its answers empty."""
    folder = tmp_path_factory.mktemp(request.param)
    bert = tiny_bert(folder / "bert", request.param, seed=1)
    model = MODELS[request.param].from_pretrained(bert)
    for name, weight in model.named_parameters():  # so large that position type, question and window change answers
        if "LayerNorm" not in name:
            weight.data *= 20 if "attention" in name else 4
    model.save_pretrained(bert)
    qas = [
        {"id": str(i), "question": q, "answers": [{"text": "rome", "answer_start": TEXT.index("rome")}]}
        for i, q in enumerate(QUESTIONS)
    ]
    other = {"context": "clara lives in berlin .", "qas": [{**qas[0], "id": "other", "answers": []}]}
    data = [{"title": "", "paragraphs": [{"context": TEXT, "qas": qas}, other]}]
    (folder / "data.json").write_text(json.dumps({"data": data}))
    argv = ["--model_name_or_path", bert, "--output_dir", str(folder / "out"), "--use_cpu", *SETTINGS]
    argv += ["--train_file", str(folder / "data.json"), "--validation_file", str(folder / "data.json"), "--do_train"]
    argv += "--do_eval --num_train_epochs 1 --learning_rate 1e-6 --version_2_with_negative".split()
    if request.param == "absolute":
        other["qas"][0]["answers"] = [{"text": "berlin", "answer_start": 15}]
        (folder / "data.json").write_text(json.dumps({"data": data}))
        argv.remove("--version_2_with_negative")
    run_squad.main(argv)
    if request.param != "absolute":
        odds = sorted(read(folder / "out", "eval_null_odds.json").values())
        argv += ["--null_score_diff_threshold", str(sum(odds[1:3]) / 2), "--overwrite_output_dir"]
        run_squad.main(argv)
        assert list(read(folder / "out", "eval_predictions.json").values()).count("") == 2
    return folder / "out"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_says_what_the_evaluation_says(trained, batch_size):
    """Its code is that beside the weights, and its settings those of the training."""
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu")
    assert "transformers_modules" in type(ask).__module__
    examples = [{"question": question, "context": TEXT} for question in QUESTIONS]
    examples.append({"question": QUESTIONS[0], "context": "clara lives in berlin ."})
    got = ask(examples, top_k=8, batch_size=batch_size)
    predictions, n_best = (read(trained, f"eval_{name}.json") for name in ("predictions", "nbest_predictions"))
    assert len(predictions) == 4
    for (id_, expected), (best, *others), example in zip(predictions.items(), got, examples, strict=True):
        assert best["answer"] == expected == example["context"][best["start"] : best["end"]]
        assert [each["score"] for each in others] == sorted((each["score"] for each in others), reverse=True)
        by_span = {}
        for entry in n_best[id_]:
            span = (entry["start"] or 0, entry["end"] or 0, entry["text"])
            by_span[span] = by_span.get(span, 0) + entry["probability"]
        scores = {(each["start"], each["end"], each["answer"]): each["score"] for each in (best, *others)}
        assert scores == pytest.approx(by_span, abs=1e-5)


def test_the_interface_that_was_removed(trained):
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu")
    question, other = QUESTIONS[:2]
    one = ask(question=question, context=TEXT)
    assert list(one) == ["score", "start", "end", "answer"]
    both = [one, ask(question=other, context=TEXT)]
    for same_one in (
        ask(question, TEXT),
        ask({"question": question, "context": TEXT}),
        ask(question=[question], context=TEXT),
    ):
        assert same_one == one
    examples = [{"question": question, "context": TEXT}, {"question": other, "context": TEXT}]
    assert ask(examples) == ask(*examples) == ask(question=[question, other], context=TEXT) == both
    assert ask(question=[question, other], context=[TEXT, TEXT]) == list(ask(each for each in examples)) == both
    assert ask([]) == ask(question=[], context=TEXT) == []
    assert len(ask(question=question, context=TEXT, top_k=3)) == 3
    short = {"question": question, "context": "rome", "top_k": 3, "n_best_size": 20}
    assert ask(**short, handle_impossible_answer=False)["answer"] == "rome"  # all that there is
    answers = ask(**short, handle_impossible_answer=True)
    assert sorted((each["start"], each["end"], each["answer"]) for each in answers) == [(0, 0, ""), (0, 4, "rome")]


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"question": " ", "context": TEXT}, "`question` is empty"),
        ({"question": "who ?", "context": ""}, "`context` is empty"),
        ({"question": "who ?"}, "`context` is None"),
        ({"question": ["who ?", 3], "context": TEXT}, "`question` is 3"),
        ({"question": ["who ?"], "context": [TEXT, TEXT]}, "there are 1 questions, but 2 contexts"),
        ({"question": "who ?", "context": TEXT, "top_k": 0}, "top_k is 0"),
        ({"question": "who ?", "context": TEXT, "topk": 3}, "there is no setting topk"),
        ({"question": "who ?", "context": TEXT, "doc_stride": 20}, "doc_stride 20 would leave tokens"),
        ({"question": "who ?", "context": TEXT, "max_seq_len": 65}, "max_seq_len is 65, but the model"),
    ],
)
def test_bad_input_is_said_in_one_line(trained, asked, message):
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ask(**asked)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="a question is asked as a dict"):
        ask(["who ?"])


def test_a_text_is_tokenized_once_for_all_its_questions(trained, monkeypatch):
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu")
    tokenized = []

    class Backend:
        def encode(self, text, **settings):
            tokenized.append(text)
            return backend.encode(text, **settings)

    backend, ask.backend = ask.backend, Backend()
    ask(question=7 * QUESTIONS, context=TEXT)
    assert tokenized.count(TEXT) == 1 and len(tokenized) == 1 + 7 * len(QUESTIONS)


def test_saved_by_itself_it_stands_beside_its_model(trained, tmp_path):
    """And answers by the settings that it was made with."""
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu", max_answer_len=1)
    ask.save_pretrained(tmp_path)
    again = pipeline("extractive-question-answering", model=str(tmp_path), trust_remote_code=True, device="cpu")
    answers = ask(question=QUESTIONS, context=TEXT)
    assert again(question=QUESTIONS, context=TEXT) == answers
    assert not [each for each in answers if " " in each["answer"]]


def test_its_defaults_are_those_of_the_program_and_marks_stay_on_words(trained):
    ours = {field.name: field.default for kind in (WindowSettings, AnswerSettings) for field in fields(kind)}
    assert {theirs: ours[name] for name, theirs in PIPELINE_SETTINGS.items()} == DEFAULTS
    ask = pipeline(model=str(trained), trust_remote_code=True, device="cpu")
    asked = {"question": QUESTIONS[1], "context": "pari\u0301s", "n_best_size": 20, "handle_impossible_answer": False}
    assert ask(**asked)["answer"] == ask(**asked, align_to_words=True)["answer"] == "pari\u0301s"


def test_words_of_another_encoder_without_settings(tmp_path):
    """RoBERTa's byte-level tokens are parts of words, it has no token types and positions that start elsewhere."""
    tokenizer = roberta_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=386, type_vocab_size=1, **sizes)
    ask = QuestionAnsweringPipeline(RobertaForQuestionAnswering(config).eval(), tokenizer)
    text = "Unquestionably, Marie Curie's birthplace is Warszawa. " * 40
    answers = ask(question="Where was Marie Curie born?", context=text, top_k=20)
    aligned = ask(question="Where was Marie Curie born?", context=text, top_k=20, align_to_words=True)
    for each in (*answers, *aligned):
        assert each["answer"] == text[each["start"] : each["end"]] == each["answer"].strip()
    cut = [each for each in answers if text[each["start"] - 1].isalpha() or text[each["end"]].isalpha()]
    assert cut and not [e for e in aligned if text[e["start"] - 1].isalpha() or text[e["end"]].isalpha()]
