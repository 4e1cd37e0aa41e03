"""Decorated functions in other processes: pickled by name or by value, as plain functions are."""

import copy
import functools
import importlib
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from q4jit import specialize
from q4jit.dispatcher import Specialized
from tests.support import child
from tests.support.functions import random

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
CURE = "pickle finds functions only by name: define it in a module, or use cloudpickle"

scale = 3.0


@specialize(target="cpu", precision="f16")
def scaled(x: Any, k: float = 2.0) -> Any:
    return x * k * scale


def plain(x: Any) -> Any:
    return x + 1


decorated = specialize(plain, K=32)
decorated_partial = specialize(functools.partial(plain))


class Layer:
    @staticmethod
    @specialize
    def double(x: Any) -> Any:
        return x * 2


@specialize
def power(x: Any, n: int = 1) -> Any:
    return x if n == 0 else power.py_func(x, n - 1) * 2


def closure(factor: float) -> Specialized[..., Any]:
    @specialize
    def inner(x: Any, offset: float = 1.0) -> Any:
        return x * factor + offset

    return inner


# --- pickle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function", [scaled, Layer.double, power], ids=repr)
def test_pickle_gives_the_same_object_by_name(
    function: Specialized[..., Any], protocol: int
) -> None:
    data = pickle.dumps(function, protocol)
    assert pickle.loads(data) is function
    assert len(data) < 500
    assert CURE.encode() not in data


@pytest.mark.parametrize("function", [decorated, decorated_partial], ids=["function", "partial"])
def test_a_function_with_another_name_is_decorated_again(function: Specialized[..., Any]) -> None:
    again = pickle.loads(pickle.dumps(function))
    assert again.options == function.options
    np.testing.assert_array_equal(again(random(2, 32)), random(2, 32) + np.float32(1))


@pytest.mark.parametrize("function", [closure(2.0), specialize(lambda x: x)], ids=repr)
def test_the_error_of_pickle_says_what_to_do(function: Specialized[..., Any]) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError), match=CURE):
        pickle.dumps(function)


def test_partial_functions_and_containers_keep_the_object() -> None:
    again = pickle.loads(pickle.dumps([functools.partial(scaled, k=2.0), {"f": scaled}]))
    assert again[0].func is scaled
    assert again[1]["f"] is scaled


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("function", [scaled, decorated, closure(2.0)], ids=repr)
def test_a_copy_is_the_function_itself(
    function: Specialized[..., Any], call: Callable[[Any], Any]
) -> None:
    assert call(function) is function


# --- cloudpickle ----------------------------------------------------------------------------------


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module `__main__` of its own, as a script or a notebook has."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    program = """
from q4jit import specialize
scale = 3.0
def helper(x):
    return x * scale
@specialize(target="cpu", precision="f16")
def scaled(x, k=2.0):
    return helper(x) * k
@specialize
def power(x, n=1):
    return x if n == 0 else power.py_func(x, n - 1) * 2
class Layer:
    @specialize
    def double(x):
        return x * 2
"""
    exec(compile(program, "<notebook>", "exec"), vars(module))
    return module


def sent(value: Any, monkeypatch: pytest.MonkeyPatch, dumps: Callable[[Any], bytes]) -> Any:
    """Pickle a value and load it where `__main__` is empty, as in a worker."""
    data = dumps(value)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        return pickle.loads(data)


def test_cloudpickle_sends_functions_of_main_by_value(
    main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random(2, 32)
    wanted = main.scaled(x)  # its kernels, locks and counts do not travel
    again = sent(main.scaled, monkeypatch, cloudpickle.dumps)
    assert again is not main.scaled
    assert again.stats.misses == 0
    assert (again.options, again.__name__) == (main.scaled.options, "scaled")
    assert again.py_func.__defaults__ == (2.0,)
    main.scale = 100.0  # the globals that it reads travelled with it
    np.testing.assert_array_equal(again(x), wanted)
    assert "scale = 3.0" in again.explain()


def test_other_pickles_of_main_go_by_name(main: Any) -> None:
    for protocol in PROTOCOLS:
        assert pickle.loads(pickle.dumps(main.scaled, protocol)) is main.scaled


def test_a_redefined_function_is_not_taken_for_the_old_one(
    main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = main.scaled
    data = cloudpickle.dumps(old)
    main.scaled = specialize(lambda x: x)
    again = pickle.loads(data)
    assert again is not main.scaled
    np.testing.assert_array_equal(again(random(2, 32)), old(random(2, 32)))
    replaced = sent(old, monkeypatch, cloudpickle.dumps)
    np.testing.assert_array_equal(replaced(random(2, 32)), old(random(2, 32)))


def test_functions_that_refer_to_themselves(main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    again = sent(main.power, monkeypatch, cloudpickle.dumps)
    assert again.py_func.__globals__["power"] is again
    np.testing.assert_array_equal(again(random(2, 32), 3), random(2, 32) * 8)


@pytest.mark.parametrize("name", ["closure", "lambda", "method", "partial", "plain"])
def test_cloudpickle_sends_all_kinds(name: str, main: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.__module__, before = ("__main__", plain.__module__) if name == "plain" else ("", "")
    functions: dict[str, Any] = {
        "closure": closure(4.0),
        "lambda": specialize(lambda x: x * scale),
        "method": main.Layer.double,
        "partial": functools.partial(main.scaled, k=4.0),
        "plain": specialize(plain),
    }
    function, x = functions[name], random(2, 32)
    again = sent(function, monkeypatch, cloudpickle.dumps)
    if before:
        plain.__module__ = before
    np.testing.assert_array_equal(again(x), function(x))


def test_cloudpickle_sends_functions_of_modules_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_module.py").write_text(
        "from q4jit import specialize\n@specialize\ndef f(x):\n    return x * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("users_module")
    monkeypatch.setitem(sys.modules, "users_module", module)  # forgotten after the test
    assert pickle.loads(cloudpickle.dumps(module.f)) is module.f
    cloudpickle.register_pickle_by_value(module)
    by_value = pickle.loads(cloudpickle.dumps(module.f))
    assert by_value is not module.f
    np.testing.assert_array_equal(by_value(random(2, 32)), random(2, 32) * 2)


# --- processes ------------------------------------------------------------------------------------

PROGRAM = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
import numpy as np
from joblib import Parallel, delayed
from q4jit import TraceError, quantize, specialize

factor = 3.0

@specialize
def scaled(x, w, k):
    return x @ w * k * factor

@specialize
def wrong(x):
    return x if x > 0 else -x

def plain(x, w, k):
    return scaled(x, w, k)

def run(how, function, calls):
    if how == "joblib":
        return Parallel(n_jobs=2)(delayed(function)(*call) for call in calls)
    context = multiprocessing.get_context(how)
    if function is plain:
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            return list(pool.map(function, *zip(*calls)))
    with context.Pool(2) as pool:
        return pool.starmap(function, calls, 1)

if __name__ == "__main__":
    how = sys.argv[1]
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    w = quantize(np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32), "Q4_0")
    calls = [(x, w, float(k)) for k in range(4)]
    wanted = [scaled(*call) for call in calls]
    np.testing.assert_array_equal(run(how, scaled, calls), wanted)
    np.testing.assert_array_equal(run(how, plain, calls), wanted)
    try:
        run(how, wrong, [(x,), (x,)])
    except TraceError as error:
        assert "line 16, in wrong" in str(error), error
    else:
        raise AssertionError("no TraceError")
    print("done")
"""


@pytest.mark.process
@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver", "joblib"])
def test_functions_of_a_script_run_in_workers(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    done = child.finish([sys.executable, str(script), how], child.environment())
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.process
def test_functions_without_a_file_run_in_workers_of_joblib() -> None:
    """As in a notebook: no worker can import `__main__`."""
    assert "done\n" in child.run(
        """
        from joblib import Parallel, delayed
        def products():
            return Parallel(n_jobs=2)(delayed(product)(x_wide, w) for w in [wide] * 3)
        for y in products():
            np.testing.assert_allclose(y, expected_wide, rtol=1e-4, atol=1e-4)
        print("done")
        """
    )
