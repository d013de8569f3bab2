"""The model against transformers 4.57.6 (golden files: scripts/make_golden_attention.py) and the plain formula."""

import copy
import itertools
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import read, with_google_names
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForQuestionAnswering

from qa import modeling_relative_bert as relative
from qa.modeling_relative_bert import RELATIVE_TYPES, RelativeBertForQuestionAnswering, RelativeBertSelfAttention

GOLDEN = Path(__file__).parent / "golden" / "attention"
EACH_TYPE = pytest.mark.parametrize("position_type", RELATIVE_TYPES)
ATTENTIONS = ("eager", "sdpa", "sdpa in parts", "sdpa off the CPU")
EACH_ATTENTION = pytest.mark.parametrize("attention", ATTENTIONS, indirect=True)
BATCHES = ("9_padded", "16_full", "23_padded", "24_full", "24_padded")


@pytest.fixture
def attention(request, monkeypatch) -> str:
    return set_attention(request.param, monkeypatch)


def set_attention(name: str, monkeypatch) -> str:
    """The attn_implementation of one of ATTENTIONS, which cut small inputs too, or run what a GPU runs, on the CPU."""
    if name == "sdpa in parts":
        monkeypatch.setattr(relative, "GROUP_ELEMENTS", 1)
        monkeypatch.setattr(relative, "BLOCK_QUERIES", 7)
    if name == "sdpa off the CPU":
        monkeypatch.setattr(relative, "on_cpu", lambda tensor: False)
    return name.split()[0]


def model_class(position_type: str) -> type:
    return BertForQuestionAnswering if position_type == "absolute" else RelativeBertForQuestionAnswering


def golden_model(position_type: str, **kwargs):
    return model_class(position_type).from_pretrained(GOLDEN / position_type, **kwargs)


def golden_batch(position_type: str, name: str) -> tuple[dict, dict]:
    """The inputs of one batch, and what 4.57.6 makes of them; `position_type` may end in _longer."""
    tensors = load_file(GOLDEN / f"{position_type}.safetensors")
    tensors = {key.removeprefix(name + "/"): value for key, value in tensors.items() if key.startswith(name + "/")}
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    return inputs, {key: value for key, value in tensors.items() if not key.startswith("inputs/")}


def small_config(position_type: str, **settings) -> BertConfig:
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return BertConfig(**(sizes | dict(max_position_embeddings=40, position_embedding_type=position_type) | settings))


def small_model(position_type: str, **settings):
    """A model whose weights are so large (standard deviation 1) that every one of them counts."""
    torch.manual_seed(0)
    model = model_class(position_type)(small_config(position_type, **settings))
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
@pytest.mark.parametrize("names", ("weight and bias", "gamma and beta"))
def test_loads_a_4_57_6_folder_whole(position_type, names, tmp_path):
    """The hub's oldest files name LayerNorm's weights gamma and beta; what is saved has its own names."""
    shutil.copytree(GOLDEN / position_type, tmp_path / "theirs")
    if names == "gamma and beta":
        with_google_names(str(tmp_path / "theirs"))
    model, report = RelativeBertForQuestionAnswering.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values()), report

    model.save_pretrained(tmp_path / "ours")
    ours, theirs = (read(folder, "config.json") for folder in (tmp_path / "ours", GOLDEN / position_type))
    for key in ("model_type", "architectures", "position_embedding_type"):
        assert ours[key] == theirs[key]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", GOLDEN / position_type))
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
        scores = scores + mask
    return torch.einsum("bhlr,brhd->blhd", scores.softmax(-1), value).reshape(batch, length, -1)


def attention_layer(position_type: str, attention: str, **settings) -> RelativeBertSelfAttention:
    torch.manual_seed(1)
    config = small_config(position_type, attn_implementation=attention, attention_probs_dropout_prob=0.0, **settings)
    return RelativeBertSelfAttention(config)


@settings(max_examples=80, deadline=None)
@given(
    position_type=st.sampled_from(RELATIVE_TYPES),
    attention=st.sampled_from(ATTENTIONS),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    padding=st.none() | st.integers(0, 30),
    group_heads=st.integers(1, 13),
    block_queries=st.integers(1, 41),
)
def test_equals_the_plain_formula(position_type, attention, batch, length, padding, group_heads, block_queries):
    """In groups of one head, of some heads of a sequence, of several sequences; in blocks of one query to all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        attention = set_attention(attention, monkeypatch)
        monkeypatch.setattr(relative, "GROUP_ELEMENTS", group_heads * length * (length + 8))
        monkeypatch.setattr(relative, "BLOCK_QUERIES", block_queries)
        layer = attention_layer(position_type, attention, num_attention_heads=4)
        hidden = torch.randn(batch, length, 32, requires_grad=True)
        mask = None
        if padding is not None:
            mask = torch.zeros(batch, 1, 1, length)
            mask[0, ..., max(1, length - padding) :] = relative.MASKED_SCORE
        weights = torch.randn(batch, length, 32)
        results = []
        for output in (layer(hidden, mask)[0], plain_attention(layer, hidden, mask)):
            results.append((output, *torch.autograd.grad((output * weights).sum(), (hidden, *layer.parameters()))))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-4


def test_a_cpu_works_on_parts_of_bounded_size(monkeypatch):
    """No tensor of a part holds more than GROUP_ELEMENTS, whatever the batch; a head too long for that is one part."""
    sizes = []
    attend = RelativeBertSelfAttention.attend

    def watch(layer, query, *rest):
        sizes.append(len(query))
        return attend(layer, query, *rest)

    monkeypatch.setattr(RelativeBertSelfAttention, "attend", watch)
    layer = attention_layer("relative_key_query", "sdpa", num_attention_heads=4)
    for elements, expected in ((3 * 20 * 28, [3, 3, 3, 3, 3, 3, 2]), (20 * 28 - 1, [1] * 20), (10**6, [20])):
        monkeypatch.setattr(relative, "GROUP_ELEMENTS", elements)
        sizes.clear()
        layer(torch.randn(5, 20, 32))
        assert sizes == expected


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
        mean = layer(hidden.repeat(300, 1, 1))[0].view(300, 2, 30, 32).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.08, rtol=0)
    torch.testing.assert_close(layer.eval()(hidden)[0], expected)


@EACH_TYPE
@pytest.mark.parametrize("length", (1, 5, 16, 23))
def test_bias_of_a_gpu_kernel_begins_where_it_can_be_loaded(position_type, length, monkeypatch):
    """16 bytes at a time, which a shifted view of the products may miss; torch pads the rows of other biases itself."""
    attend = Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    attention = set_attention("sdpa off the CPU", monkeypatch)
    attention_layer(position_type, attention)(torch.randn(3, length, 32))
    bias = attend.call_args.args[3]
    assert bias.shape == (3, 2, length, length) and bias.is_contiguous() and bias.data_ptr() % 16 == 0


# In graphs: made at one batch size and length, right at others


OTHER_LENGTHS = (2, 15, 24, 40)
# Of the graphs that take seconds to make, the one where most can go wrong is made each time.
EACH_GRAPH = pytest.mark.parametrize(
    "position_type, attention",
    [
        pytest.param(*each, marks=() if each == ("relative_key_query", "sdpa off the CPU") else pytest.mark.slow)
        for each in [("absolute", "eager"), ("absolute", "sdpa"), *itertools.product(RELATIVE_TYPES, ATTENTIONS)]
    ],
    indirect=["attention"],
)


class Logits(nn.Module):
    """A model as graphs are made of it: two inputs, two outputs."""

    def __init__(self, position_type: str, attention: str):
        super().__init__()
        self.model = small_model(position_type, attn_implementation=attention, num_hidden_layers=1).eval()

    def forward(self, input_ids, attention_mask):
        outputs = self.model(input_ids, attention_mask)
        return outputs.start_logits, outputs.end_logits


def graph_inputs(length: int, sequences=slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    batch = small_batch(length)
    return batch["input_ids"][sequences], batch["attention_mask"][sequences]


def assert_equal_at_other_lengths(graph, model: Logits, sequences=slice(2)) -> None:
    for length in OTHER_LENGTHS:
        inputs = graph_inputs(length, sequences)
        for ours, plain in zip(graph(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@EACH_TYPE
@EACH_ATTENTION
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_right_at_other_lengths(position_type, attention):
    model = Logits(position_type, attention)
    with torch.no_grad():
        trace = torch.jit.trace(model, graph_inputs(16))
        assert_equal_at_other_lengths(trace, model)


@EACH_GRAPH
def test_an_export_of_any_batch_and_length_is_right(position_type, attention):
    model = Logits(position_type, attention)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=40)}
    exported = torch.export.export(model, graph_inputs(16), dynamic_shapes=(sizes, sizes))
    assert_equal_at_other_lengths(exported.module(), model)


@EACH_GRAPH
@pytest.mark.parametrize("several", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_an_onnx_file_of_any_length_is_right(position_type, attention, several):
    """Made of one sequence, or of several for any batch; with gradients on, for which PyTorch takes other kernels."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Logits(position_type, attention)
    inputs = graph_inputs(16, slice(None) if several else slice(1, 2))
    sizes = {1: torch.export.Dim("length", min=2, max=40)} | ({0: torch.export.Dim("batch")} if several else {})
    program = torch.onnx.export(model, inputs, dynamic_shapes=(sizes, sizes), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [each.name for each in session.get_inputs()]

    def graph(*inputs):
        logits = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
        return [torch.from_numpy(each) for each in logits]

    assert_equal_at_other_lengths(graph, model, slice(2) if several else slice(1, 2))


@pytest.mark.slow
@EACH_GRAPH
def test_compiled_gives_the_same_loss_and_gradients(position_type, attention):
    model = small_model(position_type, attn_implementation=attention, num_hidden_layers=1).eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", dynamic=True)
    for length in (20, 23):
        losses = [each(**small_batch(length)).loss for each in (model, compiled)]
        torch.testing.assert_close(*losses)
        for each, loss in zip((model, compiled), losses, strict=True):
            each.zero_grad()
            loss.backward()
        for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


# At home in transformers


def test_a_saved_folder_brings_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    golden_model("relative_key_query").save_pretrained(tmp_path / "model")
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert_equals_golden(model, *golden_batch("relative_key_query", "23_padded"))
    assert not model.bert.embeddings.position_embeddings.weight.requires_grad
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "modeling_relative_bert.py"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "model" / name).read_text()


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
        mask = torch.where(batch["attention_mask"].bool(), 0.0, -torch.inf)[:, None, None, :]
        expected = plain_attention(attention, outputs.hidden_states[layer], mask)
        torch.testing.assert_close(context, expected, atol=1e-4, rtol=1e-4)


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
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad)


def test_token_embeddings_grow():
    model = small_model("relative_key").eval()
    before = model(**small_batch()).start_logits
    model.resize_token_embeddings(60)
    assert model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    assert model.get_input_embeddings().weight.shape == (60, 32) and model.config.vocab_size == 60
    assert torch.equal(model(**small_batch()).start_logits, before)
    model(**small_batch() | {"input_ids": torch.full((3, 20), 59)})


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


@EACH_ATTENTION
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_finite_where_a_sequence_is_all_masked(attention, dtype, tmp_path):
    """float32's least number is infinite in half precision, and the softmax of nothing but infinities is NaN."""
    golden_model("relative_key_query", attn_implementation=attention).to(dtype).save_pretrained(tmp_path)
    model = RelativeBertForQuestionAnswering.from_pretrained(tmp_path, dtype=dtype, attn_implementation=attention)
    inputs, golden = golden_batch("relative_key_query", "24_full")
    for least in (torch.finfo(torch.float).min, -torch.inf):
        mask = torch.zeros(2, 1, 1, 24)
        mask[0] = least
        outputs = model(**inputs | {"attention_mask": mask})
        assert outputs.start_logits.dtype == dtype and outputs.loss.isfinite()
        largest = golden["start_logits"].abs().max()
        assert (outputs.start_logits[1] - golden["start_logits"][1]).abs().max() <= 5e-2 * largest


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


# Bad input


def test_refuses_inputs_that_do_not_fit():
    model = small_model("relative_key", attn_implementation="sdpa")
    batch = small_batch(20)
    for changed, message in (
        (small_batch(41), "sequence of 41 tokens, but max_position_embeddings is 40"),
        ({"attention_mask": torch.ones(3, 19)}, r"attention_mask has shape \(3, 19\), but .* 3 sequences of 20 tokens"),
        ({"attention_mask": torch.ones(3, 20, 20)}, r"shape \(3, 20, 20\).*give it \(3, 20\), or 4 dimensions"),
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(3, 20, 32)}, "exactly one of input_ids or inputs_embeds"),
        ({"output_attentions": True}, "sdpa keeps no probabilities.*eager"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch | changed)


def test_refuses_a_config_it_cannot_build():
    for changed, message in (
        ({"position_embedding_type": "rotary"}, "type is 'rotary'.*relative_key or relative_key_query"),
        ({"position_embedding_type": "absolute"}, "type is 'absolute'.*BertForQuestionAnswering"),
        ({"is_decoder": True}, "is_decoder is set"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"num_attention_heads": 3}, "hidden_size is 32, not a multiple of num_attention_heads 3"),
    ):
        with pytest.raises(ValueError, match=message):
            RelativeBertForQuestionAnswering(BertConfig(**(small_config("relative_key").to_dict() | changed)))


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
    outputs = model(**inputs, output_attentions=True)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    torch.testing.assert_close(outputs.start_logits, golden["start_logits"], atol=1e-5, rtol=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="sdpa keeps no probabilities"):
        model(**inputs, output_attentions=True)
