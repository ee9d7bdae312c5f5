"""Rows of one batch through different adapters: each gets what it gets alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from adapted_models import change
from named_adapters import Every, attached, ids, rule
from trimtab.surgery.names import entries

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# The plans of ``named_adapters`` without what cannot be told apart by rows.
MIXES = [
    ["legal", None, "default", "v1.5 (fr)"],
    ["whole", "legal", "whole", "default"],
    [None, None, "v1.5 (fr)", "v1.5 (fr)"],
    ["legal", "legal", "legal", "legal"],
]


class Rows(Every):
    """``Every``, whose experts get rows of tokens as those of transformers do."""

    def __init__(self, quantised: str = "") -> None:
        super().__init__(quantised)
        self.experts = StandardExperts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.convolution(x.mT).mT.tanh()
        x = self.block(x)
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        x = x + self.wide(self.experts(self.narrow(rows), chosen, weights).view(*x.shape[:2], 4))
        logits: Tensor = self.head(self.norm(x + self.packed(x)))
        return logits


class StandardExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.inner, self.outer = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inner = torch.einsum("eoi,ti->teo", self.inner, hidden_states).tanh()
        outer = torch.einsum("eoi,tei->teo", self.outer, inner)
        return (outer.gather(1, top_k_index[..., None].expand(-1, -1, 4)) * top_k_weights[..., None]).sum(1)


def built(quantised: str = "") -> nn.Module:
    torch.manual_seed(3)
    model = Rows(quantised).eval().requires_grad_(False)
    for name in ("legal", "v1.5 (fr)", "default", "whole"):
        attached(model, name)
    return model


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    return built()


@pytest.fixture
def model(shared: nn.Module) -> nn.Module:
    return copy.deepcopy(shared)


def alone(model: nn.Module, names: list[str | None], *inputs: Tensor) -> Tensor:
    """The output of each row alone, with its own adapter active."""
    active, rows = trimtab.active_adapter(model), []
    for row, name in enumerate(names):
        trimtab.set_adapter(model, name)
        rows.append(model(*(one[row : row + 1] for one in inputs)))
    trimtab.set_adapter(model, active)
    return torch.cat(rows)


@pytest.mark.parametrize("names", MIXES, ids=str)
@pytest.mark.parametrize("quantised", ["", "nf4"])
def test_each_row_gets_what_it_gets_alone(quantised: str, names: list[str | None]) -> None:
    model = built(quantised)
    batch = ids(len(names))
    with torch.no_grad():
        want, bare = alone(model, names, batch), alone(model, [None] * 4, batch)
        before = model(batch)
        with trimtab.per_row(model, names):
            got = model(batch)
            with trimtab.per_row(model, [None, "legal"]):
                assert torch.allclose(model(batch[:2])[0], bare[0], **CLOSE)
            with trimtab.for_inference(model):
                assert torch.allclose(model(batch), want, **CLOSE)
            assert trimtab.active_adapter(model) == "whole"
            with trimtab.disable_adapter(model):
                assert torch.allclose(model(batch), bare, **CLOSE)
    assert torch.allclose(got, want, **CLOSE)
    with torch.no_grad():
        assert torch.equal(model(batch), before)
    assert "forward" not in vars(model.attention)
    assert all("_rows" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("names", MIXES[:2], ids=str)
def test_gradients_go_to_the_adapter_that_is_trained(names: list[str | None], model: nn.Module) -> None:
    trimtab.set_adapter(model, "legal")
    batch = ids(4)
    alone(model, names, batch)
    trained = trimtab.trainable_parameters(model)

    def gradients(output: Tensor) -> dict[str, Tensor | None]:
        for parameter in trained.values():
            parameter.grad = None
        output.square().mean().backward()
        return {key: one.grad for key, one in trained.items()}

    rows = [row for row, name in enumerate(names) if name == "legal"]
    want = gradients(model(batch[rows]) * (len(rows) / 4) ** 0.5)
    with trimtab.per_row(model, names):
        got = gradients(model(batch))
    for key, gradient in want.items():
        assert gradient is not None
        assert torch.allclose(got[key], gradient, rtol=1e-3, atol=1e-6), key  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_in_any_dtype_and_for_few_tokens_and_many(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16, bias=False), nn.LayerNorm(16)).to(dtype)
    names = ["lora", "dora", "mora", "full"]
    for name in names:
        options = {} if name == "full" else {"rank": 3, "magnitude": name == "dora" or name == "mora"}
        trimtab.attach(net, rule(["0", "2"], name, bias=True, **options), name=name)
        change(net)
    rows = ["mora", "lora", None, "dora", "lora", "dora", None, "full", "mora"]
    for mix in (rows, [name if name != "full" else "lora" for name in rows]):
        x = torch.randn(len(mix), tokens, 24).to(dtype)
        with torch.no_grad():
            want = alone(net, mix, x)
            with trimtab.per_row(net, mix):
                got = net(x)
        room = {torch.float64: 1e-10, torch.bfloat16: 3e-2}[dtype]
        assert torch.allclose(got, want, rtol=room, atol=room)


def test_numbers_against_the_plain_formula() -> None:
    """The effective weights of each adapter, in float64, row by row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 32)).double()
    for name, method in (("a", "dora"), ("b", "mora"), ("c", "lora")):
        trimtab.attach(net, rule("0", method, rank=2), name=name)
        change(net)
    weights = {None: net[0].base.weight}
    for name in ("a", "b", "c"):
        entry = entries(net, name)["0"]
        weights[name] = entry.adapter.effective_weight(entry.handle, torch.float64)
    names = ["b", "a", None, "c", "a"]
    x = torch.randn(5, 3, 24, dtype=torch.float64)
    with torch.no_grad(), trimtab.per_row(net, names):
        got = net(x)
    for row, name in enumerate(names):
        assert torch.allclose(got[row], x[row] @ weights[name].T + net[0].base.bias, atol=1e-12)


def test_one_product_with_the_weight_serves_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(24, 32))
    for name, method in (("a", "dora"), ("b", "mora"), ("c", "lora")):
        trimtab.attach(net, rule("0", method, rank=2), name=name)
    trimtab.attach(net, rule("0", "full", tensors=["bias"]), name="d")
    products = []
    original = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.data_ptr() == net[0].base.weight.data_ptr():
            products.append(x.shape[0])
        return original(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with torch.no_grad(), trimtab.per_row(net, ["a", "b", None, "c", "a", "d"]):
        net(torch.randn(6, 3, 24))
    assert products == [18]


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **{**sizes, **settings}, pad_token_id=0, eos_token_id=39)).eval()


def with_adapters(model: Any) -> Any:
    plans = {
        "a": rule("all-linear", "dora", rank=2),
        "b": [rule("*.mlp.*", "mora", rank=2), rule("*.q_proj", "lora", rank=3)],
        "c": rule(["lm_head", "*.embed_tokens"], "lora", rank=2),
    }
    for name, plan in plans.items():
        trimtab.attach(model, plan, name=name)
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(model).values():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
def test_generation_goes_row_by_row(settings: dict[str, Any]) -> None:
    model = with_adapters(llama())
    names = ["b", None, "a", "c"]
    prompts = torch.randint(1, 39, (4, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **settings}
    want = []
    for row, name in enumerate(names):
        trimtab.set_adapter(model, name)
        want.append(model.generate(prompts[row : row + 1], **options))
    with trimtab.per_row(model, names), trimtab.for_inference(model):
        got = model.generate(prompts, **options)
    assert torch.equal(got, torch.cat(want))
    assert len({tuple(row.tolist()) for row in got[:, 5:]}) > 1
    assert "generate" not in vars(model)


def test_an_encoder_and_its_decoder_generate_row_by_row() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    for name, method in (("a", "dora"), ("b", "mora")):
        trimtab.attach(model, rule("all-linear", method, rank=2), name=name)
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(model).values():
                parameter.add_(0.5 * torch.randn_like(parameter))
    prompts = torch.randint(1, 40, (3, 6))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    names = ["b", None, "a"]
    want = []
    for row, name in enumerate(names):
        trimtab.set_adapter(model, name)
        want.append(model.generate(prompts[row : row + 1], **options))
    with trimtab.per_row(model, names):
        assert torch.equal(model.generate(prompts, **options), torch.cat(want))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"the batch has 3 rows .* and 2 adapters were named"),
        (["a", "b", None, "c"], r"the batch has 3 rows .* and 4 adapters were named"),
        (["a", "x", None], r"no adapter 'x', but 'a', 'b', 'c'"),
        ("abc", r"expected a list .* got 'abc'"),
        ([], r"expected a list .* got \[\]"),
    ],
)
def test_what_does_not_fit_is_refused(names: Any, message: str) -> None:
    model = with_adapters(llama())
    with pytest.raises(trimtab.SurgeryError, match=message), trimtab.per_row(model, names), torch.no_grad():
        model(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(trimtab.SurgeryError, match=message), trimtab.per_row(model, names):
        model.generate(torch.ones(3, 4, dtype=torch.long), max_new_tokens=2)
    with torch.no_grad():
        model(torch.ones(3, 4, dtype=torch.long))


def test_a_model_without_adapters_has_no_rows_for_them() -> None:
    with pytest.raises(trimtab.SurgeryError, match="no adapters"), trimtab.per_row(nn.Sequential(), [None]):
        pass


def test_adapters_neither_come_nor_go_meanwhile() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        trimtab.attach(net, rule("0", "lora", rank=1), name=name)
    with trimtab.per_row(net, ["a", None]):
        for call in (
            lambda: trimtab.delete_adapter(net, "a"),
            lambda: trimtab.attach(net, rule("0", "lora", rank=1), name="c"),
            lambda: trimtab.merge(net),
            lambda: trimtab.detach(net),
        ):
            with pytest.raises(trimtab.SurgeryError, match="leave that context first"):
                call()
    assert trimtab.adapters(net) == ["a", "b"]
    trimtab.detach(net)


def test_experts_with_an_order_of_their_own_are_refused() -> None:
    from expert_models import made, tokens

    for kind in ("llama4", "jetmoe", "dbrx"):
        model = made(kind)
        trimtab.attach(model, rule("*experts*", "lora", rank=1), name="a")
        words = r"order of their own|one expert"
        with pytest.raises(trimtab.SurgeryError, match=words), trimtab.per_row(model, ["a", None]):
            pass
        with torch.no_grad(), trimtab.per_row(model, ["a", "a"]):
            model(tokens())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_go_token_by_token(kind: str) -> None:
    from expert_models import implementations, made, tokens

    for implementation in implementations(made(kind)):
        model = made(kind, implementation=implementation).eval()
        for name, method in (("a", "dora"), ("b", "lora")):
            trimtab.attach(model, rule(["*experts*", "*_proj"], method, rank=1), name=name)
            change(model)
        batch = tokens()
        with torch.no_grad():
            for names in (["a", "b"], [None, "a"]):
                want = torch.cat(
                    [
                        (trimtab.set_adapter(model, name), model(batch[row : row + 1]).logits)[1]
                        for row, name in enumerate(names)
                    ]
                )
                with trimtab.per_row(model, names):
                    assert torch.allclose(model(batch).logits, want, **CLOSE)


def test_a_weight_that_is_read_while_rows_differ_is_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    trimtab.attach(net, rule("0", "lora", rank=1), name="a")
    change(net)
    with trimtab.per_row(net, ["a", None]):
        assert net[0].weight.shape == (8, 8)
        assert net[0].weight.dtype == torch.float32
        with pytest.raises(trimtab.SurgeryError, match="is read, and not called"):
            net[0].weight + 1
    with trimtab.per_row(net, ["a", "a"]):
        assert torch.equal(net[0].weight + 0, net[0].weight + 0)


def sequence_first() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)


def batch_first() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


@pytest.mark.parametrize("build", [sequence_first, batch_first])
def test_the_encoder_layer_of_torch(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(build()).eval()
    for name, method in (("a", "lora"), ("b", "mora")):
        trimtab.attach(net, rule(["*self_attn", "*linear1"], method, rank=1), name=name)
        change(net)
    x = torch.randn(4, 4, 8)
    if build is sequence_first:
        with (
            pytest.raises(trimtab.SurgeryError, match="batch_first=False"),
            trimtab.per_row(net, ["a", None, "b", "a"]),
        ):
            pass
        return
    mask = torch.tensor([[False, False, True, True]] * 2 + [[False] * 4] * 2)
    with torch.no_grad():
        names = ["a", None, "b", "a"]
        want = alone(net, names, x)
        masked = torch.cat(
            [
                net[0](x[row : row + 1], src_key_padding_mask=mask[row : row + 1])
                if not trimtab.set_adapter(net, name)
                else x
                for row, name in enumerate(names)
            ]
        )
        with trimtab.per_row(net, names):
            assert torch.allclose(net(x), want, **CLOSE)
            assert torch.allclose(net[0](x, src_key_padding_mask=mask), masked, **CLOSE)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_row_that_all_share_gets_each_adapter() -> None:
    """Positions are looked up once for the whole batch (GPT-2)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)).eval()
    for name, method in (("a", "lora"), ("b", "dora")):
        trimtab.attach(model, rule(["*.wpe", "*.wte", "lm_head", "*.c_attn"], method, rank=1), name=name)
        change(model)
    batch = torch.randint(0, 30, (3, 5))
    names = ["b", None, "a"]
    with torch.no_grad():
        want = torch.cat(
            [
                (trimtab.set_adapter(model, name), model(batch[row : row + 1]).logits)[1]
                for row, name in enumerate(names)
            ]
        )
        with trimtab.per_row(model, names):
            assert torch.allclose(model(batch).logits, want, **CLOSE)


def test_compiled_code_goes_row_by_row() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    for name, method in (("a", "dora"), ("b", "mora")):
        trimtab.attach(net, rule("*", method, rank=2), name=name)
        change(net)
    compiled, x = torch.compile(net, backend="eager"), torch.randn(3, 2, 8)
    with torch.no_grad():
        for names in (["a", None, "b"], ["b", "b", "a"]):
            want = alone(net, names, x)
            with trimtab.per_row(compiled, names):
                assert torch.allclose(compiled(x), want, **CLOSE)


def test_a_trained_tensor_that_changes_meanwhile_is_followed() -> None:
    """A pass with gradients has norms computed again, and so has loading."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        trimtab.attach(net, rule("0", "dora", rank=2), name=name)
        change(net)
    x, optimizer = torch.randn(2, 3, 8), torch.optim.SGD(trimtab.trainable_parameters(net).values(), lr=5.0)
    with trimtab.per_row(net, ["a", "b"]):
        with torch.no_grad():
            before = net(x)
        net(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            after = net(x)
    assert not torch.allclose(after[1], before[1])
    with torch.no_grad():
        assert torch.allclose(after, alone(net, ["a", "b"], x), **CLOSE)


def test_rows_are_dealt_anew_and_adapters_come_back_as_they_were(shared: nn.Module) -> None:
    batches = [["legal", None, "default"], ["default", "v1.5 (fr)"], ["legal", None, "default"], [None]]
    with (
        torch.no_grad(),
        trimtab.for_inference(shared),
        trimtab.per_row(shared, ["legal", "default", None, "v1.5 (fr)"]) as plan,
    ):
        for names in batches:
            plan.deal(names)
            together = shared(ids(len(names)))
            for row, name in enumerate(names):
                plan.deal([name])
                torch.testing.assert_close(together[row], shared(ids(len(names))[row : row + 1])[0], **CLOSE)
    legal = next(iter(entries(shared, "legal").values())).adapter
    with torch.no_grad(), trimtab.for_inference(shared):
        with trimtab.per_row(shared, ["legal", None, "default", None]):
            shared(ids())
        kept = legal.kept_since
        with trimtab.per_row(shared, ["legal", None, "default", None]):
            shared(ids())
        assert legal.kept_since == kept, "what a caller holds outlives the rows"


def test_convolutions_and_columns_go_row_by_row() -> None:
    """Updates that can share a product with the weight, and such as need a pass of their own."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Conv1d(8, 6, 3), nn.Flatten(), nn.Linear(24, 9)
    )
    plans = {
        "a": [rule("0", "lora", rank=2, across_groups=True), rule(["1", "3"], "dora", rank=2)],
        "b": [rule(["0", "1", "3"], "mora", rank=1)],
        "c": [rule(["1", "3"], "dora", rank=2, magnitude_axis="input")],
        "d": [rule("3", "full", tensors=["bias"])],
    }
    for name, plan in plans.items():
        trimtab.attach(net, trimtab.Plan(plan), name=name)
        change(net)
    x = torch.randn(4, 4, 6)
    for names in (["c", "b", "d", None], ["b", None, "d", "b"], ["a", "d", None, "a"]):
        with torch.no_grad():
            want = alone(net, names, x)
            with trimtab.per_row(net, names):
                assert torch.allclose(net(x), want, **CLOSE), names


def test_adapters_of_one_weight_have_one_copy_of_its_norms() -> None:
    net: Any = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b", "c"):
        trimtab.attach(net, rule("0", "dora", rank=1), name=name)
    a, b, c = (entries(net, name)["0"].adapter for name in ("a", "b", "c"))
    shared = c.squares
    trimtab.set_adapter(net, "a")
    assert a.squares is shared, "who rests gives them to the next"
    assert b.squares is None
    assert c.squares is None
    with torch.no_grad(), trimtab.per_row(net, ["a", "b", "c"]):
        net(torch.randn(3, 1, 8))
        assert a.squares is b.squares is c.squares is shared
