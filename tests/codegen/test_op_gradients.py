"""Ops in training: gradients in eager mode, under transforms and in traces, and the refusals that belong to them."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import einsumcascade as ec
from einsumcascade.codegen.op import Op
from einsumcascade.errors import InputError, LoweringError
from einsumcascade.gallery import load
from einsumcascade.language.parser import parse
from einsumcascade.schedules.schedule import Schedule
from tests.codegen.calls import inputs_of, qkv, variant_inputs

ROOT = Path(__file__).resolve().parents[2]
Function = Callable[..., tuple[torch.Tensor, torch.Tensor]]
LSE = load("softmax_lse")


def doubles(*, batch: int = 5) -> list[torch.Tensor]:
    """Q, K and V of several examples, in float64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 1, 2, n, 4, generator=generator, dtype=torch.float64) for n in (6, 7, 7)]


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the logarithm of its normaliser."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1).float()


def loss_of(function: Function) -> Callable[..., torch.Tensor]:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        out, lse = function(*tensors)
        return (out * torch.arange(4)).sum() + (lse**2).sum()

    return loss


def loss_of_one(function: Function) -> Callable[..., torch.Tensor]:
    """A loss that leaves an output alone."""
    return lambda *tensors: (function(*tensors)[0] ** 2).sum()


# --- gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_attention", "softmax_lse", "alibi", "sinklogit", "softcap"])
def test_gradients_pass_gradcheck(name: str) -> None:
    cascade = load(name)
    # An output that the text makes float32 has not the digits that differences need.
    cascade = parse(str(cascade).replace(": float32", ": float64"), name=name)
    inputs = inputs_of(cascade, "float64", B=1, H=2, P=3, M=4, E=2, F=2).values()
    assert torch.autograd.gradcheck(ec.compile(cascade), [t.requires_grad_() for t in inputs])


def test_only_inputs_that_require_a_gradient_get_one() -> None:
    q, k, v = qkv()
    k.requires_grad_()
    ec.compile("softmax_attention")(q, k, v).sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None


def test_a_gradient_has_the_dtype_of_its_input() -> None:
    op = ec.compile("sinklogit")
    inputs = inputs_of(op.cascade, "bfloat16", B=1, H=2, P=9, M=9, E=8, F=8)
    sink = next(n for n, t in inputs.items() if t.dim() == 1)
    inputs[sink] = inputs[sink].float()
    op(**{n: t.requires_grad_() for n, t in inputs.items()}).sum().backward()
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in inputs.values())


def test_the_source_of_a_call_that_records_is_that_of_the_forward_that_saves() -> None:
    op = ec.compile("softmax_attention")
    op(*(t.requires_grad_() for t in qkv()))
    assert "LSE" in op.source
    op(*qkv())
    assert "LSE" not in op.source


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_pytorch_records_nothing(mode: Callable[[], object]) -> None:
    op = ec.compile("softmax_attention")
    tensors = [t.requires_grad_() for t in qkv()]
    with mode():  # type: ignore[attr-defined]
        out = op(*tensors)
    assert not out.requires_grad and not op._pairs


# --- transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, None, 0), (0, 1, 2)])
def test_vmap_is_the_op_with_one_more_batch_rank(axes: tuple[int | None, ...]) -> None:
    given = [t[0] if a is None else t.movedim(0, a) for t, a in zip(doubles(), axes, strict=True)]
    for actual, expected in zip(
        vmap(ec.compile(LSE), in_dims=axes)(*given), vmap(formula, in_dims=axes)(*given), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_vmaps_nest() -> None:
    given = [t.unflatten(0, (2, 3)) for t in doubles(batch=6)]
    torch.testing.assert_close(vmap(vmap(ec.compile(LSE)))(*given), vmap(vmap(formula))(*given))


@pytest.mark.parametrize("loss", [loss_of, loss_of_one])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda q, k, v: grad(f, argnums=(0, 1, 2))(q[0], k[0], v[0]),
        lambda f: vmap(grad(f, argnums=(0, 1, 2))),
        lambda f: lambda q, k, v: vmap(grad(f, argnums=(0, 2)), in_dims=(0, None, None))(q, k[0], v[0]),
        lambda f: grad(lambda *tensors: vmap(f)(*tensors).sum(), argnums=(0, 1)),
    ],
    ids=["grad", "vmap of grad", "vmap of grad over one input", "grad of vmap"],
)
def test_transforms_compose(loss: Callable[[Function], Callable[..., torch.Tensor]], transform: object) -> None:
    ours, theirs = (transform(loss(f)) for f in (ec.compile(LSE), formula))  # type: ignore[operator]
    torch.testing.assert_close(ours(*doubles()), theirs(*doubles()), atol=1e-6, rtol=1e-6)


def test_a_vmap_is_differentiated_in_eager_mode() -> None:
    found = []
    for function in (ec.compile(LSE), formula):
        tensors = [t.requires_grad_() for t in doubles()]
        vmap(loss_of(function))(*tensors).sum().backward()
        found.append([t.grad for t in tensors])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)


def test_a_jacobian_is_a_vmap_of_the_backward() -> None:
    q, k, v = (t[0] for t in doubles())
    op = ec.compile(LSE)
    torch.testing.assert_close(jacrev(lambda x: op(x, k, v)[0])(q), jacrev(lambda x: formula(x, k, v)[0])(q))


def test_an_op_without_a_gradient_is_vmapped_all_the_same() -> None:
    cascade = load("linattn")
    op = ec.compile(cascade)
    one = inputs_of(cascade, "float64", T=5, P=5, M=5, E=3, F=3)
    several = [torch.stack([t, 2 * t]) for t in one.values()]
    torch.testing.assert_close(vmap(op)(*several)[1], op(*(t[1] for t in several)))


# --- what is refused --------------------------------------------------------------------------------------------


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(LoweringError) as caught:
        action()
    assert caught.value.codes == ("first-derivatives-only",)
    return str(caught.value)


def test_a_gradient_of_a_gradient_is_refused_in_one_sentence() -> None:
    op = ec.compile(LSE)
    q, k, v = (t[0] for t in doubles())
    x = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_of(op)(x, k, v), x, create_graph=True)
    assert "the gradient of a gradient is not derived" in refused(lambda: first.sum().backward())
    refused(lambda: grad(lambda y: grad(loss_of(op))(y, k, v).sum())(q))


def test_forward_mode_is_refused() -> None:
    op = ec.compile(LSE)
    q, k, v = (t[0] for t in doubles())
    assert "forward mode" in refused(lambda: jvp(lambda x: op(x, k, v)[0], (q,), (q,)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        refused(lambda: op(dual, k, v))
        torch.testing.assert_close(op(q, k, v), formula(q, k, v))


class Sub(torch.Tensor):
    """A class of a user's own."""


class Wrapper(torch.Tensor):
    """A class that answers for its operators."""

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        raise AssertionError("an op went into a tensor of a class it does not know")


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda t: t.as_subclass(Sub), "Sub"),
        (lambda t: torch.Tensor._make_wrapper_subclass(Wrapper, t.shape), "Wrapper"),
        (lambda t: torch.nested.nested_tensor([t[0], t[1]], layout=torch.jagged), "NestedTensor"),
        (lambda t: torch.nested.nested_tensor([t[0], t[1]]), "nested"),
        (lambda t: t.to_sparse(), "sparse_coo"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_more_than_their_elements_are_refused(
    made: Callable[[torch.Tensor], object], named: str
) -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    op(q, k, v)
    for position in range(3):
        given = [made(t) if n == position else t for n, t in enumerate((q, k, v))]
        with pytest.raises(InputError, match=rf"\[tensor-subclass\]: {'QKV'[position]} is .*{named}"):
            op(*given)


def test_a_parameter_is_a_tensor() -> None:
    q, k, v = qkv()
    op = ec.compile("softmax_attention")
    assert torch.equal(op(torch.nn.Parameter(q), torch.nn.Parameter(k), torch.nn.Buffer(v)), op(q, k, v))


# --- autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_tensors_of_two_or_more_axes(compiled: bool, dtype: torch.dtype) -> None:
    op = ec.compile("sinklogit")
    inputs = inputs_of(op.cascade, "float32", B=1, H=2, P=9, M=9, E=8, F=8)
    names = list(inputs)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return op(**dict(zip(names, tensors, strict=True)))

    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    leaves = [t.requires_grad_() for t in inputs.values()]
    with torch.autocast("cpu", dtype=dtype):
        out = function(*leaves)
    out.sum().backward()
    assert out.dtype == dtype and all(t.grad is not None and t.grad.dtype == torch.float32 for t in leaves)
    cast = [t.detach().to(dtype) if t.dim() > 1 else t.detach() for t in leaves]
    assert torch.equal(out, call(*cast))


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = (t[0] for t in doubles())
    op = ec.compile("softmax_attention")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = op(q, k, v)
    assert torch.equal(inside, op(q, k, v))


# --- copies -----------------------------------------------------------------------------------------------------


def test_an_op_is_copied_and_pickled() -> None:
    op = ec.compile("alibi", precision="tf32")
    inputs = list(inputs_of(op.cascade, "float32", B=1, H=2, P=9, M=9, E=8, F=8).values())
    expected = op(*inputs)
    for again in (copy.copy(op), copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert again is not op and again.precision == "tf32" and again.cascade.name == "alibi"
        assert torch.equal(again(*inputs), expected)


def test_a_pickled_op_works_in_a_fresh_process(tmp_path: Path) -> None:
    op = ec.compile("softmax_attention")
    tensors = qkv(dtype=torch.float64)
    torch.save({"op": op, "tensors": tensors, "expected": op(*tensors)}, tmp_path / "op.pt")
    script = (
        "import sys, torch\n"
        "found = torch.load(sys.argv[1], weights_only=False)\n"
        "leaves = [t.requires_grad_() for t in found['tensors']]\n"
        "out = found['op'](*leaves)\n"
        "out.sum().backward()\n"
        "assert torch.equal(out, found['expected']) and all(t.grad is not None for t in leaves)\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "op.pt"], cwd=ROOT, check=True, timeout=120)


# --- modules ----------------------------------------------------------------------------------------------------


def sinks() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    op = ec.compile("sinklogit")
    inputs = inputs_of(op.cascade, "float32", B=1, H=2, P=9, M=9, E=8, F=8)
    (name,) = (n for n, t in inputs.items() if t.dim() == 1)
    return op.module(**{name: torch.nn.Parameter(inputs.pop(name))}), list(inputs.values())


def test_a_module_holds_parameters_and_takes_the_rest() -> None:
    module, rest = sinks()
    ((name, held),) = module.named_parameters()
    assert torch.equal(module(*rest), module.op(**{name: held}, **dict(zip(module.taken, rest, strict=True))))
    module(*rest).sum().backward()
    assert held.grad is not None and held.grad.abs().sum() > 0
    assert repr(module) == f"Module(sinklogit({', '.join(module.taken)}))"


def test_a_module_is_saved_moved_copied_and_compiled() -> None:
    module, rest = sinks()
    other, _ = sinks()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(*rest), module(*rest))
    other.load_state_dict(module.state_dict())
    expected = module(*rest)
    assert torch.equal(other(*rest), expected)
    assert torch.equal(copy.deepcopy(module)(*rest), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*rest), expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*rest), expected, rtol=0, atol=0)
    assert module.to(torch.float64)(*(t.double() for t in rest)).dtype == torch.float64


def test_a_plain_tensor_of_a_module_is_a_buffer() -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    module = op.module(K=k)
    assert not list(module.parameters()) and list(module.state_dict()) == ["K"]
    assert torch.equal(module(q, V=v), op(q, k, v))


def test_mistakes_with_a_module_are_one_message_each() -> None:
    op = ec.compile("softmax_attention")
    q, k, v = qkv()
    module = op.module(K=k)
    for code, action in {
        "unknown-input": lambda: op.module(k=k),
        "wrong-type": lambda: op.module(K=[1.0]),
        "too-many-inputs": lambda: module(q, v, v),
        "repeated-input": lambda: module(q, v, K=k),
        "missing-input": lambda: module(q),
        "name-clash": lambda: ec.compile(parse("in training[m]\nS = training[m]\nout S")).module(training=q),
    }.items():
        with pytest.raises(InputError) as caught:
            action()  # type: ignore[no-untyped-call]
        assert caught.value.codes == (code,)


def test_a_table_is_added_up_in_a_fixed_order_where_that_is_asked_for() -> None:
    inputs = variant_inputs("t5bias", "float64")
    x = [t.requires_grad_() for t in inputs.values()]
    table = list(inputs).index("BIAS")

    def gradient(op: Op) -> tuple[torch.Tensor, str]:
        found = torch.autograd.grad(op(*x).square().sum(), x)[table]
        (pair,) = op._pairs.values()
        assert pair.backward.last is not None
        return found, pair.backward.last().source

    plain = ec.compile("t5bias")
    value, text = gradient(plain)
    assert "tl.atomic_add" in text
    ordered, text = gradient(ec.compile("t5bias", schedule=Schedule(scatter="fixed order")))
    assert "atomic" not in text
    torch.testing.assert_close(value, ordered, rtol=1e-12, atol=1e-12)
    torch.use_deterministic_algorithms(True)
    try:
        asked, text = gradient(plain)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "atomic" not in text
    assert torch.equal(asked, ordered)


# --- iterations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_1p", "sparsemax", "gla", "deltanet", "abc_causal"])
def test_gradients_of_iterations_are_differences_of_the_op(name: str) -> None:
    op = ec.compile(name)
    inputs = {n: t.requires_grad_() for n, t in variant_inputs(name, "float64").items()}
    assert torch.autograd.gradcheck(op, list(inputs.values()), fast_mode=True)
