"""The model against transformers 4.57.6 (golden files: scripts/make_golden_attention.py) and the plain formula."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering

from qa import modeling_relative_bert as relative
from qa.modeling_relative_bert import RelativeBertForQuestionAnswering, RelativeBertSelfAttention

GOLDEN = Path(__file__).parent / "golden" / "attention"
RELATIVE_TYPES = ("relative_key", "relative_key_query")
EACH_TYPE = pytest.mark.parametrize("position_type", RELATIVE_TYPES)
EACH_ATTENTION = pytest.mark.parametrize("attention", ("eager", "sdpa", "sdpa in parts"), indirect=True)
BATCHES = ("9_padded", "16_full", "23_padded", "24_full", "24_padded")


@pytest.fixture
def attention(request, monkeypatch):
    """attn_implementation. Inputs as small as here are one group of heads and one block of queries, unless cut finer."""
    if request.param == "sdpa in parts":
        monkeypatch.setattr(relative, "GROUP_ELEMENTS", 1)
        monkeypatch.setattr(relative, "BLOCK_QUERIES", 7)
    return request.param.split()[0]


def golden_model(position_type: str, **kwargs):
    model_class = BertForQuestionAnswering if position_type == "absolute" else RelativeBertForQuestionAnswering
    return model_class.from_pretrained(GOLDEN / position_type, **kwargs)


def golden_batch(position_type: str, name: str) -> tuple[dict, dict]:
    """The inputs of one batch, and what 4.57.6 makes of them; `position_type` may end in _longer."""
    tensors = load_file(GOLDEN / f"{position_type}.safetensors")
    tensors = {key.removeprefix(name + "/"): value for key, value in tensors.items() if key.startswith(name + "/")}
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    return inputs, {key: value for key, value in tensors.items() if not key.startswith("inputs/")}


def small_config(position_type: str, **settings) -> BertConfig:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertConfig(**(sizes | dict(max_position_embeddings=40, position_embedding_type=position_type) | settings))


def small_model(position_type: str, **settings) -> RelativeBertForQuestionAnswering:
    """A model whose weights are large enough for every one of them to matter."""
    torch.manual_seed(0)
    model = RelativeBertForQuestionAnswering(small_config(position_type, **settings))
    for name, parameter in model.named_parameters():
        if not name.endswith("LayerNorm.weight"):
            nn.init.normal_(parameter)
    return model


def small_batch(length: int = 20) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {
        "input_ids": torch.randint(5, 50, (3, length), generator=generator),
        "attention_mask": mask,
        "start_positions": torch.tensor([0, 1, 2]),
        "end_positions": torch.tensor([0, 2, length - 1]),
    }


# Equal to transformers 4.57.6


@pytest.mark.parametrize("position_type", ("absolute", *RELATIVE_TYPES))
@EACH_ATTENTION
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_4_57_6(position_type, attention, batch):
    inputs, golden = golden_batch(position_type, batch)
    model = golden_model(position_type, attn_implementation=attention).train()  # its dropout is 0
    assert_equals_golden(model, inputs, golden)


def assert_equals_golden(model, inputs: dict, golden: dict, rounding: float = 1e-6) -> None:
    outputs = model(**inputs)
    outputs.loss.backward()
    for key in ("start_logits", "end_logits", "loss"):
        torch.testing.assert_close(outputs[key], golden[key], atol=1e-5, rtol=0)
    gradients = {f"gradients/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {key for key in golden if key.startswith("gradients/")}
    for name, gradient in gradients.items():
        # Some are zero but for rounding, such as that of a bias which shifts all logits alike: hence `rounding`.
        assert (gradient - golden[name]).norm() <= 1e-4 * golden[name].norm() + rounding, name


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(position_type, attention, dtype):
    inputs, golden = golden_batch(position_type, "24_padded")
    model = golden_model(position_type, attn_implementation=attention)
    with torch.autocast("cpu", dtype):
        outputs = model(**inputs)
    outputs.loss.backward()
    largest = max(golden["start_logits"].abs().max(), golden["end_logits"].abs().max())
    for key in ("start_logits", "end_logits"):
        assert (outputs[key] - golden[key]).abs().max() <= 2e-2 * largest
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - golden[f"gradients/{name}"]).norm()
            assert error <= 0.1 * golden[f"gradients/{name}"].norm() + 0.02, name


@EACH_TYPE
def test_loads_a_4_57_6_folder_whole(position_type, tmp_path):
    model, report = golden_model(position_type, output_loading_info=True)
    assert not any(report.values()), report

    model.save_pretrained(tmp_path)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / position_type))
    for key in ("model_type", "architectures", "position_embedding_type"):
        assert ours[key] == theirs[key]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / position_type))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# Equal to the plain formula, where 4.57.6's golden files do not reach


def plain_attention(layer: RelativeBertSelfAttention, hidden, mask=None) -> torch.Tensor:
    """The formula of Huang et al. 2020 (methods 3 and 4) over a gathered (length, length, head size) tensor."""
    batch, length, _ = hidden.shape
    heads = (batch, length, layer.num_attention_heads, layer.attention_head_size)
    query, key, value = (linear(hidden).view(heads) for linear in (layer.query, layer.key, layer.value))
    positions = torch.arange(length)
    distances = layer.distance_embedding(positions[:, None] - positions + layer.max_position_embeddings - 1)
    scores = torch.einsum("blhd,brhd->bhlr", query, key) + torch.einsum("blhd,lrd->bhlr", query, distances)
    if layer.position_embedding_type == "relative_key_query":
        scores = scores + torch.einsum("brhd,lrd->bhlr", key, distances)
    scores = scores / math.sqrt(layer.attention_head_size)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhlr,brhd->blhd", scores.softmax(-1), value).reshape(batch, length, -1)


def attention_layer(position_type: str, attention: str, **settings) -> RelativeBertSelfAttention:
    torch.manual_seed(1)
    config = small_config(position_type, attn_implementation=attention, attention_probs_dropout_prob=0.0, **settings)
    return RelativeBertSelfAttention(config)


@settings(max_examples=60, deadline=None)
@given(
    position_type=st.sampled_from(RELATIVE_TYPES),
    attention=st.sampled_from(("eager", "sdpa")),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    padding=st.sampled_from((0, 1, 5)),
)
def test_equals_the_plain_formula(position_type, attention, batch, length, padding):
    layer = attention_layer(position_type, attention)
    hidden = torch.randn(batch, length, 32, requires_grad=True)
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    mask[0, ..., max(1, length - padding) :] = False
    weights = torch.randn(batch, length, 32)

    results = []
    for output in (
        layer(hidden, mask if attention == "sdpa" else torch.where(mask, 0.0, torch.finfo(torch.float).min))[0],
        plain_attention(layer, hidden, mask),
    ):
        gradients = torch.autograd.grad((output * weights).sum(), (hidden, *layer.parameters()))
        results.append((output, *gradients))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-4


def test_distance_is_query_minus_key():
    """One head, values that count positions, one distance made to win: each query attends to the key before it."""
    config = small_config("relative_key", num_attention_heads=1, attn_implementation="sdpa")
    layer = RelativeBertSelfAttention(config).eval()
    with torch.no_grad():
        for linear in (layer.query, layer.key, layer.value):
            linear.weight.zero_()
            linear.bias.zero_()
        layer.query.bias[0] = 1.0
        layer.value.weight[0, 0] = 1.0
        layer.distance_embedding.weight.zero_()
        layer.distance_embedding.weight[1 + 40 - 1, 0] = 1e4  # distance 1, max_position_embeddings 40
        hidden = torch.zeros(1, 6, 32)
        hidden[0, :, 0] = torch.arange(6)
        attended = layer(hidden)[0][0, :, 0]
    torch.testing.assert_close(attended[1:], torch.arange(5.0))
    torch.testing.assert_close(attended[0], torch.tensor(2.5))  # query 0 has no key before it: the mean of all


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_gradient_against_finite_differences(position_type, attention, dropout):
    layer = attention_layer(position_type, attention, max_position_embeddings=6).double().train()
    layer.dropout.p = dropout
    hidden = torch.randn(4, 5, 32, dtype=torch.double, requires_grad=True)

    def attend(hidden, table):
        torch.manual_seed(7)  # the same probabilities are dropped each time
        return torch.func.functional_call(layer, {"distance_embedding.weight": table}, (hidden,))[0]

    table = layer.distance_embedding.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(attend, (hidden, table), fast_mode=True)


@pytest.mark.parametrize(("length", "plain"), [(32, True), (33, False), (1, True)])
@pytest.mark.parametrize("elements", (-1, 0))
def test_plain_where_there_is_nothing_to_cut(length, plain, elements, monkeypatch):
    query = torch.randn(3, 4, length, 8)
    monkeypatch.setattr(relative, "GROUP_ELEMENTS", 3 * 4 * length * (length + 8) + elements)
    assert relative.fits_cache(query) == (plain and elements == 0)
    one_block = len(list(relative.query_blocks(length))) == 1
    assert relative.fits_cache(query) == (one_block and len(list(relative.head_groups(query))) == 1)


@pytest.mark.parametrize(
    ("heads_of_a_group", "groups", "block_queries"),
    [(1, 20, 1), (2, 10, 5), (3, 10, 16), (4, 5, 32), (9, 3, 32), (20, 1, 64), (99, 1, 64)],
)
@pytest.mark.parametrize("masked", (False, True))
def test_sizes_of_groups_and_blocks_change_nothing(monkeypatch, heads_of_a_group, groups, block_queries, masked):
    """Groups of one head, of some heads of a sequence, of a sequence, of several, of all; the last one smaller."""
    layer = attention_layer("relative_key_query", "sdpa", num_attention_heads=4)
    hidden = torch.randn(5, 37, 32, requires_grad=True)
    mask = None
    if masked:  # of its own for each sequence
        mask = (torch.arange(37) < torch.tensor([37, 9, 20, 1, 33])[:, None])[:, None, None, :]
    parameters = (hidden, *layer.parameters())
    expected = plain_attention(layer, hidden, mask)
    monkeypatch.setattr(relative, "GROUP_ELEMENTS", heads_of_a_group * 37 * (37 + 8))
    monkeypatch.setattr(relative, "BLOCK_QUERIES", block_queries)
    assert len(list(relative.head_groups(torch.empty(5, 4, 37, 8)))) == groups
    output = layer(hidden, mask)[0]
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    ours, plain = (torch.autograd.grad((each * weights).sum(), parameters) for each in (output, expected))
    for gradient, other in zip(ours, plain, strict=True):
        assert (gradient - other).norm() <= 1e-5 * other.norm() + 1e-4


@EACH_TYPE
@EACH_ATTENTION
def test_dropout_is_of_the_probabilities_and_repeats(position_type, attention):
    layer = attention_layer(position_type, attention).train()
    hidden = torch.randn(2, 30, 32)
    expected = plain_attention(layer, hidden)
    layer.dropout.p = 0.3
    torch.manual_seed(5)
    first = layer(hidden)[0]
    torch.manual_seed(5)
    assert torch.equal(first, layer(hidden)[0])
    assert not torch.equal(first, layer(hidden)[0])
    with torch.no_grad():
        mean = torch.stack([layer(hidden)[0] for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.03, rtol=0)
    torch.testing.assert_close(layer.eval()(hidden)[0], expected)


@EACH_TYPE
@pytest.mark.parametrize("length", (1, 2, 16, 23, 40))
@pytest.mark.parametrize("masked", (False, True))
def test_bias_of_sdpa_is_aligned(position_type, length, masked, monkeypatch):
    """Off the CPU and compiled, torch's memory-efficient kernel gets the bias: it takes multiples of 8 elements."""
    biases = []
    attend = F.scaled_dot_product_attention

    def capture(query, key, value, bias, **kwargs):
        biases.append(bias)
        return attend(query, key, value, bias, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", capture)
    layer = attention_layer(position_type, "sdpa")
    hidden = torch.randn(3, length, 32, requires_grad=True)
    mask = None
    if masked:
        mask = torch.ones(3, 1, 1, length, dtype=torch.bool)
        mask[0, ..., max(1, length - 5) :] = False

    copy.deepcopy(layer).to("meta")(hidden.to("meta"), mask if mask is None else mask.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    output = layer(hidden, mask)[0]
    for bias in biases:
        assert bias.shape == (3, 2, length, length) and bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1]), bias.stride()
        assert bias.stride(-2) < length + 8
    assert [bias.device.type for bias in biases] == ["meta", "cpu"] and biases[1].data_ptr() % 16 == 0

    weights = torch.randn_like(output)
    results = []
    for each in (output, plain_attention(layer, hidden, mask)):
        results.append((each, *torch.autograd.grad((each * weights).sum(), (hidden, *layer.parameters()))))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-4


# At home in transformers


def test_saved_folder_is_enough_in_another_process(tmp_path):
    position_type = "relative_key_query"
    model = golden_model(position_type)
    model.save_pretrained(tmp_path / "model")
    inputs, golden = golden_batch(position_type, "23_padded")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import torch
from transformers import AutoModelForQuestionAnswering
model = AutoModelForQuestionAnswering.from_pretrained("model", trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model)
outputs = model(**torch.load("inputs.pt"))
torch.save((outputs.start_logits.detach(), outputs.end_logits.detach()), "logits.pt")
assert not model.bert.embeddings.position_embeddings.weight.requires_grad
model.save_pretrained("again")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    start_logits, end_logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(start_logits, golden["start_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(end_logits, golden["end_logits"], atol=1e-5, rtol=0)
    for name in ("config.json", "modeling_relative_bert.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


def test_without_trust_remote_code_the_positions_are_lost(tmp_path):
    """What the README warns of: transformers 5 alone loads the folder as BERT with absolute positions."""
    golden_model("relative_key").save_pretrained(tmp_path)
    model, report = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is BertForQuestionAnswering
    assert len(report["unexpected_keys"]) == 2
    inputs, golden = golden_batch("relative_key", "24_full")
    assert (model(**inputs).start_logits - golden["start_logits"]).std() > 0.3


@EACH_TYPE
def test_starts_from_an_absolute_checkpoint(position_type):
    config = BertConfig.from_pretrained(GOLDEN / "absolute")
    config.position_embedding_type = position_type
    model, report = RelativeBertForQuestionAnswering.from_pretrained(
        GOLDEN / "absolute", config=config, output_loading_info=True
    )
    new = {f"bert.encoder.layer.{layer}.attention.self.distance_embedding.weight" for layer in (0, 1)}
    assert set(report.pop("missing_keys")) == new
    assert not any(report.values()), report
    weights = load_file(GOLDEN / "absolute" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in new:
            assert 0.01 < parameter.std() < 0.03  # initializer_range 0.02
        else:
            assert torch.equal(parameter, weights[name])
    assert not model.bert.embeddings.position_embeddings.weight.requires_grad


@EACH_TYPE
def test_no_trainable_parameter_without_gradient(position_type):
    for model in (small_model(position_type), golden_model(position_type)):
        model.train()(**small_batch(20) | {"input_ids": small_batch(20)["input_ids"] % 25}).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == ["bert.embeddings.position_embeddings.weight"]


@EACH_TYPE
def test_output_attentions_and_hidden_states(position_type):
    model = small_model(position_type, attn_implementation="eager").eval()
    batch = small_batch()
    outputs = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    for layer, probabilities in enumerate(outputs.attentions):
        assert probabilities.shape == (3, 2, 20, 20)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 2, 20))
        assert probabilities[1, :, :, 10:].abs().max() == 0
        attention = model.bert.encoder.layer[layer].attention.self
        value = attention.value(outputs.hidden_states[layer]).view(3, 20, 2, 16).transpose(1, 2)
        context = (probabilities @ value).transpose(1, 2).reshape(3, 20, 32)
        mask = batch["attention_mask"].bool()[:, None, None, :]
        torch.testing.assert_close(context, plain_attention(attention, outputs.hidden_states[layer], mask))


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(position_type, attention, reentrant):
    model = small_model(position_type, attn_implementation=attention).train()
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again.enable_input_require_grads()
    losses = []
    for each in (model, again):
        torch.manual_seed(3)
        losses.append(each(**small_batch()).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("position_type", "attention"),
    [("relative_key", "sdpa"), ("relative_key_query", "sdpa"), ("relative_key", "eager")],
)
def test_compile(position_type, attention):
    model = small_model(position_type, attn_implementation=attention).eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    for length in (20, 23, 40):
        losses = [each(**small_batch(length)).loss for each in (model, compiled)]
        torch.testing.assert_close(*losses)
        for each, loss in zip((model, compiled), losses, strict=True):
            each.zero_grad()
            loss.backward()
        for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other.grad)


@EACH_TYPE
@EACH_ATTENTION
def test_inference_mode(position_type, attention):
    model = small_model(position_type, attn_implementation=attention).eval()
    with torch.inference_mode():
        inference = model(**small_batch()).start_logits
    torch.testing.assert_close(inference, model(**small_batch()).start_logits.detach())


@EACH_TYPE
def test_save_and_load_through_safetensors(position_type, tmp_path):
    model = small_model(position_type).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = RelativeBertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(again(**small_batch()).start_logits, model(**small_batch()).start_logits)
    half = RelativeBertForQuestionAnswering.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = half(**small_batch()).start_logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(**small_batch()).start_logits, atol=0.02, rtol=0.05)


@EACH_TYPE
def test_loads_googles_names_and_saves_its_own(position_type, tmp_path):
    """The hub's oldest files name LayerNorm's weights gamma and beta, and hold more than the model takes."""
    weights = load_file(GOLDEN / position_type / "model.safetensors")
    rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    googles = {
        next((name.replace(ours, theirs) for ours, theirs in rename.items() if name.endswith(ours)), name): weight
        for name, weight in weights.items()
    }
    more = {
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "bert.pooler.dense.weight": torch.zeros(32, 32),
        "bert.pooler.dense.bias": torch.zeros(32),
        "cls.predictions.transform.LayerNorm.gamma": torch.ones(32),
        "cls.predictions.bias": torch.zeros(25),
    }
    shutil.copytree(GOLDEN / position_type, tmp_path / "theirs")
    save_file(googles | more, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    model, report = RelativeBertForQuestionAnswering.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert len(report["unexpected_keys"]) >= 4  # position_ids is left out by some versions
    model.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_token_embeddings_grow(tmp_path):
    model = small_model("relative_key").eval()
    before = model(**small_batch()).start_logits
    model.resize_token_embeddings(60)
    assert model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    assert model.get_input_embeddings().weight.shape == (60, 32) and model.config.vocab_size == 60
    assert torch.equal(model(**small_batch()).start_logits, before)
    model(**small_batch() | {"input_ids": torch.full((3, 20), 59)})
    model.save_pretrained(tmp_path)
    again = RelativeBertForQuestionAnswering.from_pretrained(tmp_path)
    assert torch.equal(again(**small_batch()).start_logits, before)


@EACH_TYPE
@EACH_ATTENTION
def test_masks_of_every_form(position_type, attention):
    model = small_model(position_type, attn_implementation=attention).eval()
    batch = small_batch()
    expected = model(**batch)
    mask = batch["attention_mask"]
    least = torch.finfo(torch.float).min
    for form in (
        mask.float(),
        mask.bool(),
        mask[:, None, None, :],
        mask.bool()[:, None, None, :].expand(3, 1, 20, 20),
        torch.where(mask.bool(), 0.0, least)[:, None, None, :],
        torch.where(mask.bool(), 0.0, float("-inf"))[:, None, None, :].expand(3, 2, 20, 20),
    ):
        outputs = model(**batch | {"attention_mask": form})
        torch.testing.assert_close(outputs.start_logits[mask.bool()], expected.start_logits[mask.bool()])
    whole = {"attention_mask": torch.ones_like(mask)}
    torch.testing.assert_close(model(**batch | whole), model(**batch | {"attention_mask": None}))


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.parametrize("off_the_cpu", (False, True))
def test_mask_of_another_dtype_hides_all(position_type, attention, off_the_cpu, monkeypatch):
    """float32's least number is infinite in bfloat16, and a sequence of nothing but infinities is no number."""
    if off_the_cpu:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = small_model(position_type, attn_implementation=attention).eval()
    for least in (torch.finfo(torch.float).min, float("-inf")):
        mask = torch.zeros(3, 1, 1, 20)
        mask[0] = least
        with torch.autocast("cpu", torch.bfloat16):
            assert model(**small_batch() | {"attention_mask": mask}).loss.isfinite()


def test_inputs_as_of_bert():
    model = small_model("relative_key_query", attn_implementation="eager").eval()
    batch = small_batch()
    expected = model(**batch)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    without_ids = {key: value for key, value in batch.items() if key != "input_ids"}
    others = {"token_type_ids": torch.zeros(3, 20, dtype=torch.long), "position_ids": torch.arange(20)[None]}
    torch.testing.assert_close(model(**without_ids, inputs_embeds=embeddings), expected)
    torch.testing.assert_close(model(**batch, **others), expected)
    columns = {key: batch[key][:, None] for key in ("start_positions", "end_positions")}
    torch.testing.assert_close(model(**batch | columns).loss, expected.loss)
    loss, start_logits, end_logits, hidden_states, attentions = model(
        **batch, return_dict=False, output_hidden_states=True, output_attentions=True
    )
    assert torch.equal(loss, expected.loss) and torch.equal(end_logits, expected.end_logits)
    assert len(hidden_states) == 3 and len(attentions) == 2
    assert torch.equal(model.bert(batch["input_ids"], batch["attention_mask"])[0], hidden_states[-1])


def test_classes_that_must_not_be_split_exist():
    """FSDP and device maps look these names up."""
    model = small_model("relative_key")
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}


DDP = """
import os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from tests.test_modeling_relative_bert import small_batch, small_model
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
model = small_model(sys.argv[4], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(2):
    optimizer.zero_grad()
    batch = small_batch(20)
    rows = slice(rank, rank + 1)
    model(**{key: value[rows] for key, value in batch.items()}).loss.backward()
    optimizer.step()
torch.save(model.module.state_dict(), sys.argv[3] + f".{rank}")
dist.barrier()
os._exit(0)  # gloo's teardown aborts a process that has done its work now and then
"""


def test_distributed_without_find_unused_parameters(tmp_path):
    position_type = "relative_key_query"
    root = str(Path(__file__).parent.parent)
    arguments = [root, "RANK", str(tmp_path / "store"), position_type]
    processes = [
        subprocess.Popen([sys.executable, "-c", DDP, *(str(rank) if a == "RANK" else a for a in arguments)], cwd=root)
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"store.{rank}") for rank in (0, 1))

    alone = small_model(position_type, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for row in (0, 1):
            (alone(**{key: value[row : row + 1] for key, value in small_batch(20).items()}).loss / 2).backward()
        optimizer.step()
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


# Bad input


def test_refuses_more_tokens_than_positions():
    model = small_model("relative_key")
    with pytest.raises(ValueError, match="41 tokens.*max_position_embeddings is 40"):
        model(**small_batch(41))
    model(**small_batch(40))


def test_refuses_inputs_that_do_not_fit():
    model = small_model("relative_key", attn_implementation="sdpa")
    batch = small_batch(20)
    for changed, message in (
        ({"attention_mask": torch.ones(3, 19)}, r"attention_mask has shape \(3, 19\), but .* 3 sequences of 20 tokens"),
        ({"attention_mask": torch.ones(3, 20, 20)}, r"shape \(3, 20, 20\).*give it \(3, 20\), or four dimensions"),
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(3, 20, 32)}, "exactly one of input_ids or inputs_embeds"),
        ({"output_attentions": True}, "sdpa keeps no probabilities.*eager"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"position_embedding_type": "rotary"},
            "position_embedding_type is 'rotary'.*relative_key or relative_key_query",
        ),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'.*BertForQuestionAnswering"),
        ({"is_decoder": True}, "is_decoder is set"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"num_attention_heads": 3}, "hidden_size is 32, not a multiple of num_attention_heads 3"),
    ],
)
def test_refuses_a_config_it_cannot_build(settings, message):
    with pytest.raises(ValueError, match=message):
        RelativeBertForQuestionAnswering(BertConfig(**(small_config("relative_key").to_dict() | settings)))


@pytest.mark.parametrize("attention", ("flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"))
def test_refuses_attention_that_cannot_take_a_bias(attention):
    for refused in (
        lambda: golden_model("relative_key", attn_implementation=attention),
        lambda: golden_model("relative_key").set_attn_implementation(attention),
        lambda: small_model("relative_key", attn_implementation=attention),
    ):
        with pytest.raises(ValueError, match="use eager or sdpa"):
            refused()


def test_attention_can_be_switched():
    model = golden_model("relative_key_query", attn_implementation="sdpa")
    inputs, golden = golden_batch("relative_key_query", "9_padded")
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).start_logits, golden["start_logits"], atol=1e-5, rtol=0)
