"""Styles for `parallelize_module`: modules that are divided among processes equal whole ones.

Processes take seconds to import PyTorch. So for each number of them, they are started once and run
every function that is marked with `check`; the tests say which of these passed.
"""

import copy
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from q4jit import ArgumentError, ExpertTensor, set_num_threads, specialize
from q4jit.precision import BOUNDS, relative_error
from q4jit.torch import Embedding, Experts, Linear, Weight
from q4jit.torch.parallel import ColwiseEmbedding, ColwiseLinear, FusedParallel, RowwiseLinear
from q4jit.weights.reference import exact_products, random_weight
from tests.support.paths import ROOT
from tests.support.torch.gloo import run_processes

pytestmark = pytest.mark.serial  # several processes

WIDTH, HIDDEN = 256, 512
ROWS: Final = (1, 3, 17, 200)

Check = Callable[[DeviceMesh], None]
CHECKS: Final[dict[str, Check]] = {}


def check(function: Check) -> Check:
    """Run a function in several processes; it gets their mesh."""
    CHECKS[function.__name__] = function
    return function


def linear(k: int, n: int, name: str = "Q4_0", seed: int = 0, *, bias: bool = True) -> Linear:
    torch.manual_seed(seed)
    values = nn.Parameter(torch.randn(n)) if bias else None
    return Linear(random_weight(name, k, n, seed), values)


class FeedForward(nn.Module):
    def __init__(self, name: str = "Q4_0") -> None:
        super().__init__()
        self.gate = linear(WIDTH, HIDDEN, name)
        self.up = linear(WIDTH, HIDDEN, name, 1)
        self.down = linear(HIDDEN, WIDTH, name, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def styles() -> dict[str, Any]:
    return {"gate": ColwiseLinear(), "up": ColwiseLinear(), "down": RowwiseLinear()}


def both(module: Any, mesh: DeviceMesh, plan: Any, **options: Any) -> tuple[Any, Any]:
    """Return a module, and a copy that is divided."""
    return module, parallelize_module(copy.deepcopy(module), mesh, plan, **options)


def rows(m: int, k: int = WIDTH) -> Tensor:
    """Return the same x [m, k] in every process, on its device."""
    generator = torch.Generator("cpu").manual_seed(m)
    return torch.randn(m, k, generator=generator, device="cpu").to(torch.get_default_device())


def part(whole: Tensor, mesh: DeviceMesh, dim: int = -1) -> Tensor:
    """Return what `DTensor` gives this process of a tensor."""
    parts = torch.chunk(whole, mesh.size(), dim)
    return parts[mesh.get_local_rank()].contiguous()


def counted_collectives() -> Any:
    return CommDebugMode()


def close(y: Tensor, expected: Tensor, factor: float = 1e-5) -> None:
    assert y.shape == expected.shape
    error = (y - expected).norm() / expected.norm()
    assert error <= factor, f"relative error {error:.1e}"


def close_gradients(got: Any, expected: Any) -> None:
    """Check the gradients that two modules give to an input; their parameters get some too."""
    x_got, x = (rows(3).requires_grad_() for _ in range(2))
    expected(x).square().sum().backward()
    got(x_got).square().sum().backward()
    assert x_got.grad is not None
    assert x.grad is not None
    close(x_got.grad, x.grad)


def same(y: Tensor, expected: Tensor) -> None:
    """Compare parts of N: by bits on a CPU. On a GPU the order of sums may depend on N."""
    if y.is_cuda:
        close(y, expected)
    else:
        assert torch.equal(y, expected)


# --- results --------------------------------------------------------------------------------------


@check
def columns_are_bit_equal(mesh: DeviceMesh) -> None:
    for name, counts in (("Q4_0", ROWS), ("Q4_K", (3,)), ("F16", (3,))):
        whole, own = both(linear(256, 192, name), mesh, ColwiseLinear())
        for m in counts:
            same(own(rows(m)), part(whole(rows(m)), mesh))


@check
def sums_over_k_keep_the_promise(mesh: DeviceMesh) -> None:
    for name, counts in (("Q4_0", ROWS), ("Q4_K", (3,)), ("F16", (3,))):
        weight = random_weight(name, 2048, 96)
        _, own = both(Linear(weight), mesh, RowwiseLinear(input_layouts=Replicate()))
        for m in counts:
            x = rows(m, 2048)
            y = own(x)
            assert torch.equal(y, own(x))
            exact, scale = exact_products(x.cpu().numpy(), [weight])
            error = relative_error(y.detach().cpu().numpy(), exact, scale)
            assert error is not None
            assert error <= BOUNDS["f32"]


@check
def a_feed_forward_is_summed_once(mesh: DeviceMesh) -> None:
    whole, own = both(FeedForward(), mesh, styles())
    with torch.no_grad():
        for m in (1, 17):
            y = own(rows(m))
            assert type(y) is Tensor
            close(y, whole(rows(m)))
        with counted_collectives() as counted:
            own(rows(3))
    if mesh.size() > 1:
        assert {str(name): n for name, n in counted.get_comm_counts().items()} == {
            "c10d_functional.all_reduce": 1
        }


@check
def gradients_are_those_of_the_whole(mesh: DeviceMesh) -> None:
    whole, own = both(FeedForward(), mesh, styles())
    close_gradients(own, whole)
    close(own.up.bias.grad, part(whole.up.bias.grad, mesh))
    close(own.down.bias.grad, whole.down.bias.grad)


@check
def frozen_biases_stay_frozen(mesh: DeviceMesh) -> None:
    for style in (ColwiseLinear(), RowwiseLinear()):
        _, own = both(linear(256, 128).requires_grad_(False), mesh, style)
        assert not own.bias.requires_grad


@check
def rows_of_x_may_be_divided(mesh: DeviceMesh) -> None:
    """As between layers whose norms divide the sequence: gather before, scatter after."""
    columns = ColwiseLinear(input_layouts=Shard(0))
    sums = RowwiseLinear(output_layouts=Shard(0))
    whole, own = both(FeedForward(), mesh, {"gate": columns, "up": columns, "down": sums})
    x = rows(4).requires_grad_()
    x_own = part(rows(4), mesh, 0).requires_grad_()
    y, y_own = whole(x), own(x_own)
    close(y_own, part(y, mesh, 0))
    y.square().sum().backward()
    y_own.square().sum().backward()
    assert x.grad is not None
    assert x_own.grad is not None
    close(x_own.grad, part(x.grad, mesh, 0))
    close(own.down.bias.grad, whole.down.bias.grad)
    assert torch.equal(own.down.bias.grad, _of_first(own.down.bias.grad))


def _of_first(values: Tensor) -> Tensor:
    values = values.clone()
    distributed.broadcast(values, 0)
    return values


@check
def outputs_have_the_layout_that_is_asked_for(mesh: DeviceMesh) -> None:
    x = rows(3)
    whole, own = both(linear(256, 192), mesh, ColwiseLinear(output_layouts=Replicate()))
    same(own(x), whole(x))
    whole, own = both(linear(256, 192), mesh, ColwiseLinear(use_local_output=False))
    y = own(x)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(1),)
    same(y.full_tensor(), whole(x))
    assert isinstance(own(DTensor.from_local(x, mesh, [Replicate()])), DTensor)
    whole, own = both(linear(256, 192), mesh, RowwiseLinear(use_local_output=False))
    y = own(DTensor.from_local(x, mesh, [Replicate()]))
    assert y.placements == (Replicate(),)
    close(y.to_local(), whole(x))
    plain = RowwiseLinear(output_layouts=Partial())
    whole, own = both(linear(256, 192, bias=False), mesh, plain)
    y = own(part(x, mesh))
    distributed.all_reduce(y)
    close(y, whole(x))


@check
def columns_need_not_divide_evenly(mesh: DeviceMesh) -> None:
    x = rows(3)
    whole, own = both(linear(256, 83), mesh, ColwiseLinear())
    same(own(x), part(whole(x), mesh))
    assert own.out_features == len(own.bias) == own(x).shape[-1]
    whole, own = both(linear(256, 83), mesh, ColwiseLinear(output_layouts=Replicate()))
    for x in (rows(3), rows(6).reshape(2, 3, WIDTH)):
        same(own(x), whole(x))
    close_gradients(own, whole)


@check
def bfloat16_and_autocast(mesh: DeviceMesh) -> None:
    whole, own = both(FeedForward().bfloat16(), mesh, styles())
    x = rows(3).bfloat16()
    assert own(x).dtype is torch.bfloat16
    close(own(x).float(), whole(x).float(), 2e-2)
    whole, own = both(FeedForward(), mesh, styles())
    with torch.autocast(mesh.device_type, dtype=torch.bfloat16):
        assert own(rows(3)).dtype is whole(rows(3)).dtype
        close(own(rows(3)).float(), whole(rows(3)).float(), 2e-2)


@check
def embeddings_divide_their_vectors(mesh: DeviceMesh) -> None:
    whole = Embedding(Weight(random_weight("Q8_0", 256, 50), lookup=True))
    ids = torch.tensor([[3, 49], [0, 3]])
    whole, own = both(whole, mesh, ColwiseEmbedding())
    assert own.embedding_dim == 256 // mesh.size()
    same(own(ids), part(whole(ids), mesh))
    whole, own = both(whole, mesh, ColwiseEmbedding(output_layouts=Replicate()))
    same(own(ids), whole(ids))


@specialize
def feed_forward(x: Any, gate: Any, up: Any, down: Any) -> Any:
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Weight(random_weight("Q4_0", WIDTH, HIDDEN))
        self.up = Weight(random_weight("Q4_0", WIDTH, HIDDEN, 1))
        self.down = Weight(random_weight("Q4_0", HIDDEN, WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = feed_forward(x, self.gate, self.up, self.down)
        return y


@check
def fused_functions_are_divided(mesh: DeviceMesh) -> None:
    whole, own = both(Fused(), mesh, FusedParallel(["gate", "up"], ["down"]))
    x, x_own = (rows(3).requires_grad_() for _ in range(2))
    y = whole(x)
    with counted_collectives() as counted:
        y_own = own(x_own)
    assert counted.get_total_counts() == (mesh.size() > 1)
    close(y_own, y)
    y.square().sum().backward()
    with counted_collectives() as counted:
        y_own.square().sum().backward()
    assert counted.get_total_counts() == (mesh.size() > 1)
    assert x.grad is not None
    assert x_own.grad is not None
    close(x_own.grad, x.grad)
    expected = whole.state_dict()
    own.load_state_dict(expected)
    close(own(x), y)


@specialize
def feed_forward_of_two(inputs: Any, gate: Any, down: Any) -> Any:
    return np.tanh(inputs["a"] @ gate) * (inputs["b"] @ gate) @ down


class FusedOfTwo(Fused):
    def forward(self, x: Any) -> Tensor:
        y: Tensor = feed_forward_of_two(x[0], self.gate, self.down)
        return y


@check
def inputs_in_containers_have_gradients(mesh: DeviceMesh) -> None:
    whole, own = both(FusedOfTwo(), mesh, FusedParallel(["gate"], ["down"]))
    grads = []
    for module in (whole, own):
        inputs = {name: rows(m).requires_grad_() for name, m in (("a", 3), ("b", 1))}
        loss = module([inputs]).square().sum()
        grads.append(torch.autograd.grad(loss, list(inputs.values())))
    for got, expected in zip(grads[1], grads[0], strict=True):
        close(got, expected)


@check
def experts_are_divided(mesh: DeviceMesh) -> None:
    def of(k: int, n: int) -> ExpertTensor:
        return ExpertTensor.stack([random_weight("Q4_0", k, n, seed) for seed in range(4)])

    experts = Experts(of(64, 256), of(64, 256), of(256, 64))
    whole, own = both(experts, mesh, FusedParallel(["gate", "up"], ["down"]))
    ids = torch.tensor([[0, 3], [2, 1], [3, 2]])
    weights = rows(3, 2).abs()
    x = rows(3, 64)
    close(own(x, ids, weights=weights), whole(x, ids, weights))
    state = own.state_dict()
    assert state["down.Q4_0"].shape == (4, 64, 256 // mesh.size() // 32 * 18)
    own.load_state_dict(whole.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in own.state_dict().items())


# --- states ---------------------------------------------------------------------------------------


@check
def states_hold_the_own_part(mesh: DeviceMesh) -> None:
    for name in ("Q4_0", "Q8_0"):
        whole, own = both(FeedForward(name), mesh, styles())
        state, own_state = whole.state_dict(), own.state_dict()
        assert list(state) == list(own_state)
        for key, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1), ("down.bias", None)):
            entry = f"{key}.{name}" if "weight" in key else key
            expected = state[entry] if dim is None else part(state[entry], mesh, dim)
            assert torch.equal(own_state[entry], expected)
        y = own(rows(3))
        fresh = parallelize_module(FeedForward(name), mesh, styles())
        for parameter in fresh.parameters():
            nn.init.zeros_(parameter)
        fresh.load_state_dict(own_state)
        assert torch.equal(fresh(rows(3)), y)


@check
def states_of_whole_modules_are_divided(mesh: DeviceMesh) -> None:
    whole = FeedForward()
    with torch.device("meta"):
        own: Any = nn.Sequential(copy.deepcopy(whole).to("meta"))
    parallelize_module(own, mesh, {f"0.{name}": style for name, style in styles().items()})
    assert own[0].up.weight.blocks.is_meta
    state = {f"0.{key}": value for key, value in whole.state_dict().items()}
    keys = dict(state)
    own.load_state_dict(state, assign=True)
    assert all(state[key] is keys[key] for key in state)  # not changed
    expected = parallelize_module(whole, mesh, styles())
    assert torch.equal(own(rows(3)), expected(rows(3)))


@check
def the_first_process_gives_the_weight(mesh: DeviceMesh) -> None:
    rank = distributed.get_rank()
    for style in (ColwiseLinear(), RowwiseLinear()):
        first, own = (linear(256, 128, seed=seed) for seed in (0, rank))
        expected = parallelize_module(first, mesh, style).state_dict()
        got = parallelize_module(own, mesh, style).state_dict()
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        own, local = both(linear(256, 128, seed=rank), mesh, style, src_data_rank=None)
        dim = 0 if isinstance(style, ColwiseLinear) else 1
        blocks = part(own.state_dict()["weight.Q4_0"], mesh, dim)
        assert torch.equal(local.state_dict()["weight.Q4_0"], blocks)


@check
def copies_work_and_pickles_are_refused(mesh: DeviceMesh) -> None:
    _, own = both(FeedForward(), mesh, styles())
    assert torch.equal(copy.deepcopy(own)(rows(3)), own(rows(3)))
    with pytest.raises(ArgumentError, match=r"save module\.state_dict\(\)"):
        pickle.dumps(own)


# --- compiled -------------------------------------------------------------------------------------


@check
def compiled_modules_are_two_graphs(mesh: DeviceMesh) -> None:
    _, pair = both(FeedForward(), mesh, styles())
    # PyTorch compiles the hooks of the outermost module apart, so that is another one
    _, fused = both(nn.Sequential(Fused()), mesh, {"0": FusedParallel(["gate", "up"], ["down"])})
    counters = torch._dynamo.utils.counters
    for own in (pair, fused):
        compiled: Any = torch.compile(own, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            counters.clear()
            for m in (3, 1, 17, 200):
                close(compiled(rows(m)), own(rows(m)))
            assert counters["stats"]["unique_graphs"] <= 2
        close_gradients(compiled, own)


@check
def compiled_parts_of_different_widths(mesh: DeviceMesh) -> None:
    whole, own = both(linear(256, 83), mesh, ColwiseLinear(output_layouts=Replicate()))
    compiled: Any = torch.compile(own, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for m in (3, 17):
            same(compiled(rows(m)), whole(rows(m)))


# --- bad input ------------------------------------------------------------------------------------


@check
def errors_name_the_module_and_the_cure(mesh: DeviceMesh) -> None:
    size = mesh.size()
    model: Any = type("Model", (nn.Module,), {})()
    model.layers = nn.ModuleList(nn.ModuleDict({"down": linear(768, 64, "Q4_K")}) for _ in range(2))
    model.plain = nn.Linear(8, 8)
    model.narrow = linear(256, 1)
    model.trained = Fused()
    model.trained.gain = nn.Parameter(torch.ones(WIDTH))
    with pytest.raises(
        ArgumentError,
        match=rf"^RowwiseLinear of 'layers\.0\.down': expected whole blocks of K on each of {size} "
        r"processes, got K = 768, which is 3 blocks of 256 elements in Q4_K; use 1 or 3 processes, "
        r"ColwiseLinear\(\), or a format with blocks of 32 elements$",
    ):
        parallelize_module(model, mesh, {"layers.*.down": RowwiseLinear()})
    for name, style, message in (
        ("narrow", ColwiseLinear(), "'narrow': expected a column .* N = 1; use fewer processes"),
        (
            "plain",
            RowwiseLinear(),
            r"'plain': expected a q4jit\.torch\.Linear, got nn\.Linear; use .*RowwiseParallel, or ",
        ),
        (
            "layers.1",
            ColwiseLinear(),
            r"'layers\.1': .* got nn\.ModuleDict; name the modules in it",
        ),
        ("layers.1.down", RowwiseLinear(output_layouts=Partial()), "add the bias outside"),
        (
            "",
            FusedParallel(["down"]),
            r"of the Model: expected a Weight as attribute 'down', got No",
        ),
        (
            "trained",
            FusedParallel(["gate", "up"], ["down"]),
            "'trained': expected frozen parameters, got 'gain', .*; give it to forward as an",
        ),
    ):
        with pytest.raises(ArgumentError, match=message):
            parallelize_module(model, mesh, {name: style})
    before = model.layers[0]["down"].state_dict()["weight.Q4_K"]
    assert before.shape == (64, 3 * 144)  # not changed
    parallelize_module(model, mesh, {"layers.1.down": ColwiseLinear()})
    with pytest.raises(ArgumentError, match=r"'layers\.1\.down': expected a whole module, got a "):
        parallelize_module(model, mesh, {"layers.1.down": ColwiseLinear()})


@check
def meshes_of_two_axes_are_refused(mesh: DeviceMesh) -> None:
    model = FeedForward()
    square = init_device_mesh(mesh.device_type, (1, mesh.size()), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ArgumentError, match=r"'up': expected a mesh of one axis, .*mesh\['tp'\]$"):
        parallelize_module(model, square, {"up": ColwiseLinear()})
    whole, own = both(model, square["tp"], styles())
    close(own(rows(3)), whole(rows(3)))


@check
def an_input_that_is_not_divided_is_refused(mesh: DeviceMesh) -> None:
    model: Any = nn.ModuleDict({"down": linear(256, 64)})
    parallelize_module(model, mesh, {"down": RowwiseLinear()})
    with pytest.raises(ArgumentError, match=r"'down': .* use input_layouts=Replicate\(\)"):
        model["down"](rows(3))


# --- the tests ------------------------------------------------------------------------------------


ERRORS: Final = (
    errors_name_the_module_and_the_cure,
    meshes_of_two_axes_are_refused,
    an_input_that_is_not_divided_is_refused,
)
SLOW: Final = (compiled_modules_are_two_graphs, compiled_parts_of_different_widths)


def names(size: int, device: str) -> list[str]:
    """Return the checks for a number of processes."""
    left_out = (*(ERRORS if device == "cuda" else ()), *(SLOW if size > 2 else ()))
    return [name for name, function in CHECKS.items() if function not in left_out]


def run_checks(finished: Path, device: str) -> None:
    set_num_threads(1)  # there are more processes than cores
    torch.set_default_device(device)
    size = distributed.get_world_size()
    mesh = init_device_mesh(device, (size,))
    for name in names(size, device):
        CHECKS[name](mesh)
        distributed.barrier()
        if distributed.get_rank() == 0:
            with finished.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")


Outcomes = Callable[[int], tuple[list[str], BaseException | None]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Return a function that runs the checks in processes, once: which passed, and the failure."""

    @functools.cache
    def run(size: int) -> tuple[list[str], BaseException | None]:
        finished = tmp_path_factory.mktemp("checks") / "finished"
        finished.touch()
        failure: BaseException | None = None
        try:
            run_processes(size, run_checks, finished, "cpu")
        except Exception as error:  # noqa: BLE001 - raised by the test of the check that failed
            failure = error
        return finished.read_text("utf-8").split(), failure

    return run


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in (2, 4) for name in names(size, "cpu")]
)
def test_divided_modules(outcomes: Outcomes, size: int, name: str) -> None:
    # A failure after the last check has another cause: Gloo's threads may abort a process that ends
    # (pytorch/pytorch#179291).
    passed, failure = outcomes(size)
    if name in passed:
        return
    failed = names(size, "cpu")[len(passed)]
    if name != failed:
        pytest.fail(f"it did not run, because {failed} failed")
    assert failure is not None
    raise failure


@pytest.mark.gpu
def test_divided_modules_on_gpus(tmp_path: Path) -> None:
    """With one GPU there is one process, which communicates with itself."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    size = min(2, torch.cuda.device_count())
    run_processes(size, run_checks, tmp_path / "finished", "cuda", backend="nccl")


def test_the_example_runs_with_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    sizes = ["--width", "64", "--hidden", "128", "--tokens", "1", "3", "--steps", "2"]
    done = subprocess.run(
        [*command, ROOT / "examples" / "tensor_parallel.py", *sizes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    first, *lines = done.stdout.splitlines()
    assert first.startswith("64 x 128 in Q4_0, 2 processes, ")
    errors = [float(line.partition("error ")[2].partition(",")[0]) for line in lines]
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_a_fused_module_needs_weights() -> None:
    with pytest.raises(ArgumentError, match=r"columns of FusedParallel: expected the name of a "):
        FusedParallel([])


def test_a_missing_process_group_is_named() -> None:
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    model = nn.ModuleDict({"up": linear(256, 64)})
    with pytest.raises(
        ArgumentError,
        match=r"'up': expected a process group, got none; start the program with torchrun .*init",
    ):
        parallelize_module(model, mesh, {"up": ColwiseLinear()})
