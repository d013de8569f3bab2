"""The README.md of a trained model: what it says for each way of training one, and what it must not say."""

import re

import pytest
from huggingface_hub import ModelCard

from qa.legacy_flags import parse_flags
from qa.model_card import model_card
from run_squad import DataTrainingArguments, ModelArguments, QATrainingArguments

SCORES = {"exact": 80.123456, "f1": 90.0, "total": 6, "HasAns_exact": 80.123456, "HasAns_f1": 90.0, "HasAns_total": 6}


@pytest.fixture
def make_card(tmp_path):
    """The card of a model trained with these flags; {here} is a folder with train.json, dev.json and a model, bert."""
    (tmp_path / "bert").mkdir()
    for name in ("train.json", "dev.json"):
        (tmp_path / name).touch()

    def make(flags, position_type="absolute", metrics=SCORES, hub_model_id=None):
        argv = f"--output_dir {tmp_path}/my_model --do_train {flags.format(here=tmp_path)}".split()
        groups, _ = parse_flags((ModelArguments, DataTrainingArguments, QATrainingArguments), argv)
        text = model_card(*groups, position_type, metrics, hub_model_id)
        assert str(tmp_path) not in text
        return ModelCard(text)

    return make


def test_a_model_of_the_hub_on_a_dataset_of_the_hub(make_card):
    card = make_card("--model_name_or_path google-bert/bert-base-uncased --dataset_name squad --learning_rate 3e-5")
    assert (card.data.base_model, card.data.datasets) == ("google-bert/bert-base-uncased", ["squad"])
    assert (card.data.pipeline_tag, card.data.library_name) == ("question-answering", "transformers")
    assert {(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results} == {
        (metric, value, "squad") for value, metrics in ((80.1235, "exact HasAns_exact"), (90.0, "f1 HasAns_f1"))
        for metric in metrics.split()
    }  # fmt: skip
    assert "google-bert/bert-base-uncased, fine-tuned for extractive question answering on squad, with" in card.text
    assert "On squad (6 questions):" in card.text and "| f1 | 90.00 |" in card.text
    (flags,) = re.findall(r"```\n(--.*?)\n```", card.text, flags=re.DOTALL)
    said = "model_name_or_path google-bert/bert-base-uncased, dataset_name squad, learning_rate 3e-05, do_train True"
    assert sorted(flags.split("\n")) == sorted(f"--{flag}" for flag in said.split(", "))
    assert "- torch " in card.text and card.text.count("trust_remote_code") == 1  # for the pipeline


def test_a_local_model_on_local_files_goes_by_names_without_folders(make_card):
    files = "--train_file {here}/train.json --validation_file {here}/dev.json"
    card = make_card("--model_name_or_path {here}/bert --dataset_name squad " + files)
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "bert, fine-tuned for extractive question answering on train.json, with" in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"dev.json"}
    assert 'from_pretrained("my_model")' in card.text


def test_a_held_out_part_is_said_to_be_one(make_card):
    card = make_card("--model_name_or_path bert --train_file {here}/train.json --validation_split_percentage 20")
    assert {result.dataset_name for result in card.data.eval_results} == {"20% of the contexts of train.json, held out"}


def test_relative_positions_need_trust_remote_code(make_card):
    card = make_card("--model_name_or_path bert --dataset_name squad", "relative_key", hub_model_id="us/my-squad")
    assert card.data.model_name == "us/my-squad" and "relative_key" in card.data.tags
    assert 'AutoModelForQuestionAnswering.from_pretrained("us/my-squad", trust_remote_code=True)' in card.text
    assert "with relative_key position embeddings" in card.text and "adds absolute ones" in card.text


def test_a_model_without_scores_has_no_results_and_tokens_stay_out(make_card):
    flags = "--model_name_or_path bert --dataset_name squad --token hf_abc --hub_token hf_def"
    card = make_card(flags, metrics={})
    assert card.data.eval_results is None and "| metric |" not in card.text
    assert "hf_" not in card.content
