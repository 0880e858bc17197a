"""The inference cache: its values equal those of a fresh copy of the model, and are computed once."""

import copy
import pickle

import pytest
import torch
from helpers import SMALL, relative_error, simulate_gpu, stirred
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wbdit import DiT, WBDiT, backend, ops
from wbdit.nn import crate, weight_cache
from wbdit.nn.weight_cache import WeightCache

BOTH = pytest.mark.parametrize("kind", [WBDiT, DiT])
TIMES, LABELS = (7, 500, 7, 999), (0, 2, 2, 3)


def make(kind=WBDiT, labels=(3,), **settings):
    return stirred(kind(**SMALL, label_sizes=labels, **settings))


def fresh_copy(model):
    copied = type(model)(**SMALL, label_sizes=model.label_sizes)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def call(model, times=TIMES, labels=LABELS):
    """Run the model on the same cells in every call."""
    x = torch.randn(len(times), 1, 40, generator=torch.Generator().manual_seed(1))
    y = torch.tensor(labels) if model.label_sizes else None
    return model(x.to(model.pos_embed.dtype), torch.tensor(times), y)


@torch.no_grad()
def sample(model, *arguments):
    return call(model, *arguments)


@pytest.fixture
def watch(monkeypatch):
    """Return a function that starts recording what a model computes from its weights, and returns the record."""

    def watched(model):
        computed = []
        condition, fold = model._condition, ops.fold

        def listed_condition(t, y):
            computed.append(list(zip(t.tolist(), y.tolist(), strict=True)))
            return condition(t, y)

        def listed_fold(dictionary):
            computed.append("fold")
            return fold(dictionary)

        monkeypatch.setattr(model, "_condition", listed_condition)
        monkeypatch.setattr(ops, "fold", listed_fold)
        return computed

    return watched


# weights that change


def training_step(model, optimizer=None):
    torch.manual_seed(0)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer.zero_grad()
    call(model.train()).square().mean().backward()
    optimizer.step()
    model.eval()


def load_other_weights(model):
    model.load_state_dict(stirred(copy.deepcopy(model), seed=1).state_dict())


@torch.no_grad()
def change_in_place(model):
    for p in model.parameters():
        p.mul_(1.5)


def change_data_in_place(model):
    for p in model.parameters():
        p.data.mul_(1.5)


def replace_data_twice(model):
    """The second tensor may reuse freed memory, so that the changed weight has its old address again."""
    for p in model.parameters():
        p.data = 1.2 * p.data
        p.data = 1.2 * p.data


@torch.no_grad()
def change_one_number_of_each(model):
    for p in model.parameters():
        p.view(-1)[1] += 0.5


def replace_data_by_another_in_one_number(model):
    for p in model.parameters():
        new = p.data.clone()
        new.view(-1)[1] += 0.5
        p.data = new


def go_to_another_type_and_back(model):
    model.to(torch.bfloat16)
    sample(model)
    model.to(torch.float32)


def change_one_dictionary(model):
    next(model.blocks[1].mlp.parameters()).data.mul_(1.5)


def change_one_modulation(model):
    model.blocks[1].adaLN_modulation[1].weight.data.mul_(1.5)


def change_the_label_table(model):
    model.y_embedder.embedding_table.weight.data.mul_(1.5)


def change_the_timestep_perceptron(model):
    model.t_embedder.mlp[0].weight.data.mul_(1.5)


CHANGES = [
    *(training_step, load_other_weights, change_in_place, change_data_in_place, replace_data_twice),
    *(change_one_number_of_each, replace_data_by_another_in_one_number, go_to_another_type_and_back),
    *(change_one_dictionary, change_one_modulation, change_the_label_table, change_the_timestep_perceptron),
]


@BOTH
@pytest.mark.parametrize(
    ("change", "labels"),
    [(change, labels) for change in CHANGES for labels in ((), (3,)) if labels or change is not change_the_label_table],
    ids=lambda value: getattr(value, "__name__", f"{sum(value) if isinstance(value, tuple) else 0} labels"),
)
def test_a_changed_weight_is_seen(kind, change, labels):
    model = make(kind, labels)
    before = sample(model)
    change(model)
    after = sample(model)
    assert relative_error(after, before) > 1e-4
    assert torch.equal(after, sample(fresh_copy(model)))


THROUGH_DATA = (
    *(change_data_in_place, change_one_dictionary, change_one_modulation),
    *(change_the_label_table, change_the_timestep_perceptron),
)


@BOTH
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_seen_on_a_gpu(kind, change, monkeypatch):
    """Nothing is read back: a change is seen by address, version or optimizer step, one through ``.data`` by `eval`."""
    simulate_gpu(monkeypatch)
    monkeypatch.setattr(Tensor, "tolist", lambda t: pytest.fail("reads values"))
    monkeypatch.setattr(Tensor, "item", lambda t: pytest.fail("reads a value"))
    model = make(kind)
    before = sample(model)
    assert torch.equal(sample(model), before)
    change(model)
    if change in THROUGH_DATA:
        model.eval()
    after = sample(model)
    with monkeypatch.context() as patched:
        patched.undo()
        assert relative_error(after, before) > 1e-4
    assert torch.equal(after, sample(fresh_copy(model)))


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_a_few_labels_trained_alone_are_seen(gpu, monkeypatch):
    """Fused optimizers do not increase a weight's version; here they also change only a few rows of a table."""
    if gpu:
        simulate_gpu(monkeypatch)
    model, labels = make(labels=(100,)), (1, 2, 2, 3)
    optimizer = torch.optim.AdamW(model.y_embedder.parameters(), lr=0.1, weight_decay=0.0, fused=True)
    before = sample(model, TIMES, labels)
    call(model, TIMES, labels).square().mean().backward()
    optimizer.step()
    after = sample(model, TIMES, labels)
    assert relative_error(after, before) > 1e-4
    assert torch.equal(after, sample(fresh_copy(model), TIMES, labels))


@BOTH
@pytest.mark.parametrize("labels", [(), (3,)])
def test_sampling_between_training_steps_leaves_them_alone(kind, labels):
    sampled, plain = make(kind, labels), make(kind, labels)
    for model in (sampled, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        for _ in range(3):
            training_step(model, optimizer)
            if model is sampled:
                sample(model)
    assert all(torch.equal(a, b) for a, b in zip(sampled.parameters(), plain.parameters(), strict=True))
    assert torch.equal(sample(sampled), sample(plain))


def test_each_type_of_product_has_its_own_dictionary():
    model = make()
    with torch.autocast("cpu", torch.bfloat16):
        sample(model)
    assert torch.equal(sample(model), sample(fresh_copy(model)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(model), sample(fresh_copy(model)))


# number of computations


@BOTH
def test_a_second_call_computes_nothing(kind, watch):
    model = make(kind)
    computed = watch(model)
    first = sample(model)
    assert len(computed) == (3 if kind is WBDiT else 1)  # the modulations, and two folded dictionaries
    computed.clear()
    assert torch.equal(sample(model), first)
    assert computed == []


@BOTH
def test_a_second_call_on_a_gpu_packs_no_weights(kind, monkeypatch):
    """The stacked modulations, the folded dictionaries and the casts are made once; gradients never meet them."""
    simulate_gpu(monkeypatch)
    model, made, get = make(kind), [], WeightCache.get

    def watched(cache, key, weights, compute):
        return get(cache, key, weights, lambda: made.append(key[0]) or compute())

    monkeypatch.setattr(WeightCache, "get", watched)
    first = sample(model)
    assert made == (["modulation", "network"] if kind is WBDiT else ["modulation"])
    assert torch.equal(sample(model), first)
    assert len(made) == 1 + (kind is WBDiT)
    call(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("labels", [(), (3,), (3, 2)])
@torch.no_grad()
def test_one_product_modulates_all_blocks(labels, monkeypatch):
    model, t = make(labels=labels), torch.tensor([7, 500, 7, 999])
    y = torch.tensor([[0, 1], [2, 0], [3, 2], [0, 0]])[:, : len(labels)] if labels else None
    expected = model.modulations(t, y)
    simulate_gpu(monkeypatch)
    found, tables = model.modulations(t, y), model.tables(t, 4, y)
    for block, (own, right) in enumerate(zip(found, expected, strict=True)):
        assert len(own) == len(right) == (6 if block < 2 else 2)
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(own, right, strict=True))
    for i in range(4):
        flat = [part for parts in model.modulations(t[i : i + 1].expand(4), y) for part in parts]
        for a, b in zip(model.at_timestep(tables, i, 4), flat, strict=True):
            assert a.shape == b.shape == (4, 32)
            assert relative_error(a, b) < 1e-6
    monkeypatch.setattr("wbdit.nn.conditioning.TABLE_BYTES", tables[0].nbytes - 1)
    assert model.tables(t, 4, y) is None


def test_only_new_pairs_are_computed(watch):
    model = make()
    computed = watch(model)
    sample(model, (7, 7, 7, 500), (1, 1, 0, 1))
    assert computed[0] == [(7, 1), (7, 0), (500, 1)]
    computed.clear()
    out = sample(model, (7, 8, 8, 500), (1, 1, 1, 2))
    assert computed == [[(8, 1), (500, 2)]]
    assert relative_error(out, sample(fresh_copy(model), (7, 8, 8, 500), (1, 1, 1, 2))) < 1e-6


@BOTH
@pytest.mark.parametrize("labels", [(), (3,)])
def test_a_mixed_batch_is_its_samples_one_by_one(kind, labels):
    model = make(kind, labels)
    x, t, y = torch.randn(4, 1, 40), torch.tensor(TIMES), torch.tensor(LABELS) if labels else None
    with torch.no_grad():
        whole = model(x, t, y)
        parts = [model(x[[i]], t[[i]], None if y is None else y[[i]]) for i in range(4)]
    assert relative_error(torch.cat(parts), whole) < 1e-5


def test_no_label_is_the_null_label():
    model = make()
    x, t = torch.randn(4, 1, 40), torch.tensor(TIMES)
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t, torch.full((4,), 3)))


def test_memory_is_bounded():
    cache, weight = WeightCache(limit=4), torch.zeros(3)
    for key in range(50):
        assert cache.get(key, [weight], lambda key=key: 10 * key) == 10 * key
        assert len(cache.values([weight])) <= 4


def test_a_model_remembers_so_many_timesteps_and_no_more():
    model = make()
    model._cache = WeightCache(limit=6)
    for t in range(0, 60, 4):
        times = range(t, t + 4)
        assert relative_error(sample(model, times), sample(fresh_copy(model), times)) < 1e-6
        assert len(model._cache._values) <= 6 + 4
    many = range(100, 120)
    assert relative_error(sample(model, many, 20 * (1,)), sample(fresh_copy(model), many, 20 * (1,))) < 1e-6


# copies


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
@BOTH
def test_a_copy_starts_with_nothing(kind, copied, watch):
    model = make(kind)
    before = sample(model)
    other = copied(model)
    change_data_in_place(model)
    computed = watch(other)
    assert torch.equal(sample(other), before)
    assert computed
    assert torch.equal(sample(model), sample(fresh_copy(model)))
    assert torch.equal(sample(other), before)


def test_memories_are_not_pickled():
    model = make()
    size = len(pickle.dumps(model))
    sample(model)
    assert len(pickle.dumps(model)) == size


# modes


@BOTH
def test_inference_mode(kind):
    model = make(kind)
    expected = sample(fresh_copy(model))
    with torch.inference_mode():
        assert torch.equal(call(model), expected)
        assert torch.equal(call(model), expected)
    assert torch.equal(sample(model), expected)
    call(model).sum().backward()  # inference-mode tensors cannot enter an autograd graph


@BOTH
def test_a_model_made_in_inference_mode(kind):
    with torch.inference_mode():
        model = make(kind)
        before = call(model)
        change_in_place(model)
        after = call(model)
    assert relative_error(after, before) > 1e-4
    assert torch.equal(after, sample(fresh_copy(model)))
    assert torch.equal(sample(model), after)


@BOTH
def test_gradients_never_come_from_memory(kind):
    model = make(kind)
    sample(model)
    call(model).square().sum().backward()
    wide = fresh_copy(model).double()
    with backend("reference"):
        call(wide).square().sum().backward()
    for p, right in zip(model.parameters(), wide.parameters(), strict=True):
        assert not p.requires_grad or relative_error(p.grad, right.grad) < 1e-4


def test_labels_are_dropped_in_training_without_gradients_too():
    model = make(class_dropout_prob=1.0)
    labeled, null = sample(model), sample(model, TIMES, (3, 3, 3, 3))
    assert relative_error(sample(model.train()), null) < 1e-6
    assert relative_error(labeled, null) > 1e-4
    assert torch.equal(sample(model.eval()), labeled)


def test_a_gpu_folds_in_fp32(monkeypatch):
    """The dictionary is rounded once, after the fold. A fake tensor simulates the GPU."""
    seen = []
    monkeypatch.setattr(ops, "fold", lambda weight: seen.append(weight.dtype) or torch.empty_like(weight))
    monkeypatch.setattr(crate, "product_dtype", lambda weight: torch.bfloat16)  # as under autocast on a GPU
    step = crate.ISTA(8)
    with FakeTensorMode():
        step.weight = torch.nn.Parameter(torch.empty(8, 8, device="cuda"))
        assert step.folded().dtype == torch.bfloat16
        with torch.no_grad():
            assert step.folded().dtype == torch.bfloat16
    assert seen == [torch.float32] * 2


def test_one_step_of_a_fused_optimizer_is_seen_on_a_gpu(monkeypatch):
    simulate_gpu(monkeypatch)
    model = make()
    optimizer = torch.optim.AdamW(model.blocks.parameters(), lr=0.1, fused=True)
    before = sample(model)
    call(model).square().mean().backward()
    optimizer.step()
    after = sample(model)
    assert relative_error(after, before) > 1e-4
    assert torch.equal(after, sample(fresh_copy(model)))


def test_the_memory_of_a_known_weight_is_held(monkeypatch):
    """Without reading values, a weight is known by its address: no new weight may get it before the next look."""
    simulate_gpu(monkeypatch)
    cache, weight = WeightCache(), torch.nn.Parameter(torch.zeros(1000))
    assert cache.get("key", [weight], lambda: "old") == "old"
    known, weight.data = weight.data_ptr(), weight.data.clone()
    assert [held.data_ptr() for held in cache._held] == [known]
    assert cache.get("key", [weight], lambda: "new") == "new"
    assert [held.data_ptr() for held in cache._held] == [weight.data_ptr()]


@pytest.mark.parametrize("inside", [False, True], ids=["outside a graph", "inside"])
def test_what_a_graph_records_is_not_kept(inside, monkeypatch):
    """A tensor made while a CUDA graph is recorded has no values before the graph is replayed."""
    monkeypatch.setattr(weight_cache, "_is_recording", lambda: inside)
    cache, weight = WeightCache(), torch.zeros(3)
    assert [cache.get("key", [weight], lambda made=made: made) for made in (1, 2)] == [1, 2 if inside else 1]
