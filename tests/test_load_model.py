"""What a checkpoint is built with, how its positions grow, and what a folder needs to load in transformers 4."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from test_modeling_relative_bert import assert_equals_golden, golden_batch, golden_model
from tiny import read
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertTokenizer,
    CanineTokenizer,
    PreTrainedTokenizerFast,
)

from qa.files import QAError
from qa.load_model import (
    check_length,
    check_tokenizer,
    fit_token_types,
    load_config,
    load_tokenizer,
    rename_extra_special_tokens,
    resize_position_embeddings,
    resolve_position_embedding_type,
)
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering
from trainer_qa import NEWEST_TESTED

GOLDEN = Path(__file__).parent / "golden" / "attention"
EACH_TYPE = pytest.mark.parametrize("position_type", ("relative_key", "relative_key_query"))
EACH_ATTENTION = pytest.mark.parametrize("attention", ("eager", "sdpa"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "relative_key")  # of 24 tokens at most


def small_model(position_type: str, attention: str) -> RelativeBertForQuestionAnswering:
    """Of 64 positions, without dropout, its distance embeddings so large that they matter."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        position_embedding_type=position_type,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = RelativeBertForQuestionAnswering(config)
    for layer in model.bert.encoder.layer:
        torch.nn.init.normal_(layer.attention.self.distance_embedding.weight)
    return model


def small_batch(length: int, padded: bool) -> dict[str, torch.Tensor]:
    mask = torch.ones(3, length, dtype=torch.long)
    if padded:
        mask[1, length // 3 :] = 0
        mask[2, length - 1 :] = 0
    ids = torch.randint(5, 50, (3, length), generator=torch.Generator().manual_seed(length))
    places = torch.tensor([0, 1, length // 4])
    return {"input_ids": ids, "attention_mask": mask, "start_positions": places, "end_positions": places}


@EACH_TYPE
@EACH_ATTENTION
def test_logits_stay_bit_for_bit_up_to_the_old_length(position_type, attention, tokenizer):
    model = small_model(position_type, attention)
    grown = copy.deepcopy(model)
    resize_position_embeddings(grown, tokenizer, 200)
    for length in (1, 33, 63, 64):
        for padded in (False, True):
            batch = small_batch(length, padded and length > 3)
            before, after = model(**batch), grown(**batch)
            for key in ("start_logits", "end_logits", "loss"):
                assert torch.equal(before[key], after[key])


@EACH_TYPE
@EACH_ATTENTION
def test_longer_windows_equal_4_57_6(position_type, attention, tokenizer):
    """Which looks distances up in tables that scripts/make_golden_attention.py has grown without this project."""
    model = golden_model(position_type, attn_implementation=attention).train()  # its dropout is 0
    resize_position_embeddings(model, tokenizer, 210)
    assert_equals_golden(model, *golden_batch(f"{position_type}_longer", "200_padded"), rounding=4e-6)


def test_tables_configuration_and_tokenizer_grow_and_a_line_says_so(tokenizer, tmp_path, caplog):
    model = small_model("relative_key", "sdpa")
    absolute = model.bert.embeddings.position_embeddings
    rows, absolute_rows = model.bert.encoder.layer[1].attention.self.distance_embedding.weight, absolute.weight
    caplog.set_level(logging.INFO)
    resize_position_embeddings(model, tokenizer, 70)
    assert caplog.messages == [
        "Relative positions grow from 64 tokens to 70 (--max_seq_length): distances beyond 63 start as that one."
    ]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved, report = RelativeBertForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert saved.config.max_position_embeddings == AutoTokenizer.from_pretrained(tmp_path).model_max_length == 70
    for each in (model, saved):
        table = each.bert.encoder.layer[1].attention.self.distance_embedding
        assert len(table.weight) == table.num_embeddings == 139 and table.weight.requires_grad
        assert torch.equal(table.weight[6:-6], rows)
        assert torch.equal(table.weight[:6], rows[:1].expand(6, -1))
        assert torch.equal(table.weight[-6:], rows[-1:].expand(6, -1))
        absolute = each.bert.embeddings.position_embeddings.weight
        assert torch.equal(absolute[:64], absolute_rows) and not absolute[64:].any() and not absolute.requires_grad


def test_absolute_positions_and_shorter_windows_change_nothing(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    model = small_model("relative_key", "sdpa")
    absolute = BertForQuestionAnswering(BertConfig(**model.config.to_dict() | {"position_embedding_type": "absolute"}))
    for each, length in ((model, 64), (model, 20), (absolute, 200)):
        before = {name: weight.clone() for name, weight in each.state_dict().items()}
        resize_position_embeddings(each, tokenizer, length)
        assert each.config.max_position_embeddings == 64
        assert before.keys() == each.state_dict().keys()
        assert all(torch.equal(before[name], weight) for name, weight in each.state_dict().items())
    assert not caplog.messages


def test_saved_tokenizer_suits_transformers_4(tmp_path):
    rename_extra_special_tokens(tmp_path)  # of which there is none
    assert not list(tmp_path.iterdir())
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


def test_position_type_of_a_checkpoint_and_a_flag():
    absolute, own = (BertConfig.from_pretrained(GOLDEN / name) for name in ("absolute", "relative_key"))
    assert resolve_position_embedding_type(absolute, "some/bert") == "absolute"
    assert resolve_position_embedding_type(absolute, "some/bert", "relative_key") == "relative_key"
    assert resolve_position_embedding_type(own, "some/bert") == "relative_key"
    assert resolve_position_embedding_type(own, "some/bert", "relative_key_query") == "relative_key_query"
    with pytest.raises(QAError, match="some/bert was trained with relative_key and has no trained absolute"):
        resolve_position_embedding_type(own, "some/bert", "absolute")
    with pytest.raises(QAError, match="'rotary' is unknown: use one of absolute, relative_key, relative_key_query"):
        resolve_position_embedding_type(absolute, "some/bert", "rotary")
    absolute.model_type = "roberta"
    with pytest.raises(QAError, match="relative_key is for BERT, but some/bert is of model_type roberta"):
        resolve_position_embedding_type(absolute, "some/bert", "relative_key")


CASED = "[PAD] [UNK] [CLS] [SEP] [MASK] Marie Curie marie".split()


def save_vocabulary(folder: Path, **settings) -> str:
    """A BERT without weights whose tokenizer is its vocab.txt, and tokenizer_config.json where there are settings."""
    BertConfig(vocab_size=len(CASED)).save_pretrained(folder)
    Path(folder, "vocab.txt").write_text("\n".join(CASED))
    if settings:
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_do_lower_case_decides_where_the_folder_does_not(tmp_path, caplog):
    silent = save_vocabulary(tmp_path / "silent", model_max_length=64)
    for flag, tokens, warnings in (
        (None, ["marie", "[UNK]"], 1),
        (True, ["marie", "[UNK]"], 1),
        (False, ["Marie", "Curie"], 0),
    ):
        caplog.clear()
        tokenizer = load_tokenizer(silent, flag)
        assert tokenizer.tokenize("Marie Curie") == tokens
        assert len(caplog.messages) == warnings
        assert not warnings or "2 of its 3 tokens have capitals and never occur (such as Curie)" in caplog.text
    tokenizer.save_pretrained(tmp_path / "saved")
    for folder, says in (("saved", False), ("says", True)):
        save_vocabulary(tmp_path / "says", do_lower_case=True)
        load_tokenizer(str(tmp_path / folder), says)
        does = "does" if says else "does not"
        with pytest.raises(
            QAError, match=f"^--do_lower_case is {not says}, but the tokenizer of .*{folder} {does} lower"
        ):
            load_tokenizer(str(tmp_path / folder), not says)


def test_configurations_that_do_not_say_what_to_build(tmp_path):
    folder = save_vocabulary(tmp_path)
    config = read(folder, "config.json") | {"auto_map": {"AutoModelForQuestionAnswering": "theirs.OwnBert"}}
    Path(folder, "config.json").write_text(json.dumps(config))
    assert load_config(folder, trust_remote_code=True).model_type == "bert"
    with pytest.raises(QAError, match="has a model class of its own, theirs.OwnBert: give --trust_remote"):
        load_config(folder)
    del config["model_type"]
    Path(folder, "config.json").write_text(json.dumps(config))
    with pytest.raises(QAError, match=r'it has no model_type: add it \(such as "model_type": "bert"\)'):
        load_config(folder)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
POSITIONS = {"max_position_embeddings": 20}


@pytest.mark.parametrize(
    ("model_type", "settings", "longest"),
    [
        ("Bert", SMALL | POSITIONS, 20),
        ("Roberta", SMALL | POSITIONS, 18),
        ("IBert", SMALL | POSITIONS, 18),
        ("MPNet", SMALL | POSITIONS, 18),
        ("DistilBert", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16} | POSITIONS, 20),
        ("Nystromformer", SMALL | POSITIONS, 20),
        ("XLM", {"emb_dim": 16, "n_layers": 1, "n_heads": 2} | POSITIONS, 20),
        ("RoFormer", SMALL | POSITIONS, 20),
        ("Bart", {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1} | POSITIONS, 20),
        ("DebertaV2", SMALL | POSITIONS, 20),
        ("DebertaV2", SMALL | POSITIONS | {"position_biased_input": False, "relative_attention": True}, None),
        ("ModernBert", SMALL | POSITIONS | {"pad_token_id": 0}, None),
        ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}, None),
        ("T5", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}, None),
    ],
)
def test_the_limit_is_the_table_of_absolute_positions(model_type, settings, longest):
    try:
        config = getattr(transformers, f"{model_type}Config")(**settings)
    except StrictDataclassError:  # ModernBERT's, of an earlier transformers
        if transformers.__version__ == NEWEST_TESTED:
            raise
        pytest.skip("transformers does not make its configuration with the huggingface_hub that is here")
    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(config)
    check_length(longest or 10**6, model, [])
    if longest:
        with pytest.raises(QAError, match=f"--max_seq_length is {longest + 1}, .* positions for {longest} tokens only"):
            check_length(longest + 1, model, [])


@pytest.mark.parametrize(
    ("model_type", "types", "left_out"),
    [("Bert", 1, True), ("Bert", 2, False), ("Electra", 1, True), ("DebertaV2", 0, False), ("DistilBert", None, True)],
)
def test_token_types_are_left_out_where_the_model_has_one(model_type, types, left_out, tmp_path):
    settings = {} if types is None else SMALL | {"type_vocab_size": types}
    with torch.device("meta"):
        model = AutoModelForQuestionAnswering.from_config(getattr(transformers, f"{model_type}Config")(**settings))
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(CASED)})
    fit_token_types(model, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert ("token_type_ids" in each("marie", "Curie")) != left_out


def test_tokenizers_that_windows_cannot_be_made_by(tokenizer):
    check_tokenizer(tokenizer)
    with pytest.raises(QAError, match="CanineTokenizer .* is a slow tokenizer"):
        check_tokenizer(CanineTokenizer())
    with pytest.raises(QAError, match="has no padding token"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    tokenizer.padding_side = "left"
    with pytest.raises(QAError, match="BertTokenizer .* pads on the left"):
        check_tokenizer(tokenizer)
