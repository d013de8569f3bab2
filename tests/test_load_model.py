"""What a checkpoint is built with, how its positions grow, and what a folder needs to load in transformers 4."""

import copy
import json
import logging
import math
import types
from pathlib import Path

import pytest
import torch
from test_modeling_relative_bert import assert_equals_golden, golden_batch, golden_model
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from qa.load_model import grow_positions, rename_extra_special_tokens, resolve_position_embedding_type
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering

GOLDEN = Path(__file__).parent / "golden" / "attention"
EACH_TYPE = pytest.mark.parametrize("position_type", ("relative_key", "relative_key_query"))
EACH_ATTENTION = pytest.mark.parametrize("attention", ("eager", "sdpa"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "relative_key")  # of 24 tokens at most


def small_model(position_type: str, attention: str, positions: int = 64) -> RelativeBertForQuestionAnswering:
    """Of 64 positions, without dropout, its distance embeddings so large that they matter."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
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


def attend_with_clipped_distances(self, hidden, mask=None):
    """A layer's forward: scores as Huang et al. 2020 write them, the distance clipped as Shaw et al. 2018 write it."""
    batch, length, _ = hidden.shape
    heads = (batch, length, self.num_attention_heads, self.attention_head_size)
    query, key, value = (linear(hidden).view(heads) for linear in (self.query, self.key, self.value))
    largest = (self.distance_embedding.num_embeddings - 1) // 2
    distances = torch.arange(length)[:, None] - torch.arange(length)
    rows = self.distance_embedding(distances.clip(-largest, largest) + largest)  # (length, length, head size)
    scores = torch.einsum("blhd,brhd->bhlr", query, key) + torch.einsum("blhd,lrd->bhlr", query, rows)
    if self.position_embedding_type == "relative_key_query":
        scores = scores + torch.einsum("brhd,lrd->bhlr", key, rows)
    scores = scores / math.sqrt(self.attention_head_size)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhlr,brhd->blhd", scores.softmax(-1), value).reshape(batch, length, -1), None


def clipping_model(model: RelativeBertForQuestionAnswering) -> RelativeBertForQuestionAnswering:
    """A copy that takes windows of any length with the tables that it has."""
    model = copy.deepcopy(model)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.forward = types.MethodType(attend_with_clipped_distances, attention)
    model.bert.embeddings.position_embeddings.num_embeddings = 10**6  # what refuses longer windows; it is not added
    return model


@EACH_TYPE
@EACH_ATTENTION
def test_grown_equals_before_bit_for_bit_up_to_its_old_length(position_type, attention, tokenizer):
    model = small_model(position_type, attention)
    grown = copy.deepcopy(model)
    grow_positions(grown, tokenizer, 200)
    for length in (1, 33, 63, 64):
        for padded in (False, True):
            batch = small_batch(length, padded and length > 3)
            before, after = model(**batch), grown(**batch)
            for key in ("start_logits", "end_logits", "loss"):
                assert torch.equal(before[key], after[key])


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("length", (65, 200))
def test_grown_equals_clipped_distances(position_type, attention, padded, length, tokenizer):
    model = small_model(position_type, attention)
    clipping = clipping_model(model)
    grow_positions(model, tokenizer, 200)
    ours, plain = (each(**small_batch(length, padded)) for each in (model, clipping))
    for key in ("start_logits", "end_logits", "loss"):
        torch.testing.assert_close(ours[key], plain[key], atol=1e-5, rtol=0)

    ours.loss.backward()
    plain.loss.backward()
    expected = dict(clipping.named_parameters())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        if "distance_embedding" in name:  # a repeated row's gradients, put together, are that of the one row
            inner = slice(200 - 63, 200 + 62)  # distances -62 to 62
            first, last = gradient[: 200 - 63].sum(0, keepdim=True), gradient[200 + 62 :].sum(0, keepdim=True)
            gradient = torch.cat([first, gradient[inner], last])
        assert gradient.shape == expected[name].shape
        assert (gradient - expected[name].grad).norm() <= 1e-5 * expected[name].grad.norm() + 1e-6, name


@EACH_TYPE
@EACH_ATTENTION
def test_grown_equals_4_57_6(position_type, attention, tokenizer):
    """Which looks distances up in tables that scripts/make_golden_attention.py has grown without this project."""
    model = golden_model(position_type, attn_implementation=attention).train()  # its dropout is 0
    grow_positions(model, tokenizer, 210)
    assert_equals_golden(model, *golden_batch(f"{position_type}_longer", "200_padded"), rounding=4e-6)


def test_grows_tables_configuration_and_tokenizer_and_says_so(tokenizer, tmp_path, caplog):
    model = small_model("relative_key", "sdpa")
    absolute = model.bert.embeddings.position_embeddings
    rows, absolute_rows = model.bert.encoder.layer[1].attention.self.distance_embedding.weight, absolute.weight
    caplog.set_level(logging.INFO)
    grow_positions(model, tokenizer, 70)
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


def test_each_grown_row_is_trained_for_its_own_distance(tokenizer):
    model = small_model("relative_key_query", "sdpa")
    grow_positions(model, tokenizer, 100)
    rows = model.bert.encoder.layer[0].attention.self.distance_embedding.weight
    model(**small_batch(100, padded=False)).loss.backward()
    torch.optim.SGD([rows], lr=1e3).step()
    assert len(rows[:37].unique(dim=0)) == len(rows[-37:].unique(dim=0)) == 37


def test_what_has_no_need_to_grow_stays(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    model = small_model("relative_key", "sdpa")
    absolute = BertForQuestionAnswering(BertConfig(**model.config.to_dict() | {"position_embedding_type": "absolute"}))
    for each, length in ((model, 64), (model, 20), (absolute, 200)):
        before = {name: weight.clone() for name, weight in each.state_dict().items()}
        grow_positions(each, tokenizer, length)
        assert each.config.max_position_embeddings == 64
        assert before.keys() == each.state_dict().keys()
        assert all(torch.equal(before[name], weight) for name, weight in each.state_dict().items())
    assert not caplog.messages


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
