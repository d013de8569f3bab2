"""What a checkpoint is built with, and what a saved folder needs to load in transformers 4."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig

from qa.load_model import rename_extra_special_tokens, resolve_position_embedding_type

GOLDEN = Path(__file__).parent / "golden" / "attention"


def test_saved_tokenizer_suits_transformers_4(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "relative_key")
    tokenizer.add_special_tokens({"extra_special_tokens": ["[extra]"]})
    tokenizer.save_pretrained(tmp_path)
    rename_extra_special_tokens(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert isinstance(saved.get("extra_special_tokens", {}), dict)  # 4.57.6 calls .keys() on it
    assert saved["additional_special_tokens"] == ["[extra]"]

    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Who was queen of Paris? [extra]"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.extra_special_tokens == ["[extra]"]
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    rename_extra_special_tokens(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_rename_without_a_tokenizer_does_nothing(tmp_path):
    rename_extra_special_tokens(tmp_path)
    assert not list(tmp_path.iterdir())


def test_resolves_the_position_type():
    absolute, own = (BertConfig.from_pretrained(GOLDEN / name) for name in ("absolute", "relative_key"))
    assert resolve_position_embedding_type(absolute, "some/bert") == "absolute"
    assert resolve_position_embedding_type(absolute, "some/bert", "relative_key") == "relative_key"
    assert resolve_position_embedding_type(own, "some/bert") == "relative_key"
    assert resolve_position_embedding_type(own, "some/bert", "relative_key_query") == "relative_key_query"
    with pytest.raises(ValueError, match="some/bert was trained with relative_key and has no trained absolute"):
        resolve_position_embedding_type(own, "some/bert", "absolute")
    with pytest.raises(ValueError, match="'rotary' is unknown: use one of absolute, relative_key, relative_key_query"):
        resolve_position_embedding_type(absolute, "some/bert", "rotary")
    absolute.model_type = "roberta"
    with pytest.raises(ValueError, match="relative_key is for BERT, but some/bert is of model_type roberta"):
        resolve_position_embedding_type(absolute, "some/bert", "relative_key")
