"""`replace_linears`: quantise the layers of a model in place."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import nn

from q4jit.conversions import tensor_dtype
from q4jit.errors import ArgumentError, FormatError, expected, short_name
from q4jit.precision import BOUNDS
from q4jit.progress import progress
from q4jit.torch.hooks import has_hooks
from q4jit.torch.inputs import check_one_of
from q4jit.torch.modules import Embedding, Linear
from q4jit.torch.quantizing import check_frozen, is_float, quantized_weight
from q4jit.torch.report import Replaced, Report, Skipped
from q4jit.torch.weight import Weight
from q4jit.weights.encode import find_encoder
from q4jit.weights.formats import FORMATS, Format, find_format

# modules that pass the weights of their layers to functions, instead of calling the layers
_READERS: Final = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def replace_linears(
    model: nn.Module,
    format: str,  # noqa: A002 - the name in quantize
    *,
    skip: Sequence[str] = (),
    fallback: str | None = None,
    embeddings: str | None = None,
    precision: str = "f32",
) -> Report:
    """Replace each `nn.Linear` of a model by a `Linear` with a quantised weight, in place.

    Float weights are freed one by one. Layers that share a weight share the quantised one. Progress
    is shown on standard error. On the device "meta" nothing is quantised: load a state then.

    A layer is skipped, and the report says why, if K is not a whole number of blocks, if it has
    hooks, if its class is a subclass of `nn.Linear`, or if a module that is not replaced has the
    same weight or reads it: an `nn.Embedding`, or an `nn.TransformerEncoderLayer`.

    Args:
        model: a module that contains the layers.
        format: one that `quantize` makes, for example "Q4_K".
        skip: names of modules, or patterns of `fnmatch` such as "*.attn.*". A module's name also
            stands for everything in it.
        fallback: the format of weights whose K is not a whole number of blocks of their format,
            for example "Q8_0". None: they are skipped.
        embeddings: replace each `nn.Embedding`, too, by an `Embedding` of this format. A layer with
            the same weight gets this format, and the two share one `Weight`.
        precision: of the layers, as in `specialize`.

    Returns:
        A `Report`. `print(report)` shows a table.

    Raises:
        ArgumentError: a weight requires a gradient, a pattern matches no layer, or another argument
            is unsuitable. Nothing was replaced.
        FormatError: the format is unknown, or `quantize` does not make it; or the values of a
            weight are beyond its range, and layers before it are replaced.
    """
    given: object = model
    if not isinstance(given, nn.Module) or isinstance(given, nn.Linear | nn.Embedding):
        cure = "use Linear.from_linear or Embedding.from_embedding for a layer"
        what, got = "a module that contains layers", type(given).__name__
        raise ArgumentError(expected(what, got, where="replace_linears", cure=cure))
    check_one_of(precision, tuple(BOUNDS), "precision")
    formats: dict[type[nn.Module], Format] = {nn.Linear: find_format(format)}
    if embeddings is not None:
        formats[nn.Embedding] = find_format(embeddings)
    other = None if fallback is None else find_format(fallback)
    for fmt in [*formats.values(), *([other] if other else [])]:
        find_encoder(fmt)
    layers = _layers(model, tuple(formats))
    _skip_chosen(layers, skip)
    _skip_unsuitable(model, layers)
    groups = _groups(model, layers, formats, other)
    shown = progress(groups, "replacing layers")
    made = [entry for group in shown for entry in group.replace(model, precision)]
    order = {layer.name: i for i, layer in enumerate(layers)}
    skipped = (Skipped(layer.name, layer.reason) for layer in layers if layer.reason)
    return Report(tuple(sorted(made, key=lambda entry: order[entry.name])), tuple(skipped))


@dataclass
class _Layer:
    """A layer of the model. It does not hold the module, so that float weights can be freed.

    Attributes:
        names: of the module; several if it is in several places.
        kind: `nn.Linear` or `nn.Embedding`.
        reason: why it is skipped; empty if it is replaced.
    """

    names: list[str]
    kind: type[nn.Module]
    weight: int  # the id of its parameter
    reason: str = ""

    @property
    def name(self) -> str:
        return self.names[0]


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[_Layer]:
    """Return the layers of these kinds, and of their subclasses."""
    layers: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        if kind is not None:
            layer = layers.setdefault(id(module), _Layer([], kind, id(module.weight)))
            layer.names.append(name)
    return list(layers.values())


def _skip_chosen(layers: Sequence[_Layer], skip: object) -> None:
    """Skip the layers that patterns match. Raises ArgumentError for one that matches none."""
    if not isinstance(skip, Sequence | set | frozenset) or isinstance(skip, str):
        got = short_name(skip)
        raise ArgumentError(expected("a list of names and patterns", got, where="skip"))
    for pattern in skip:
        if not isinstance(pattern, str):
            raise ArgumentError(expected("a name or pattern", repr(pattern), where="skip"))
        chosen = [layer for layer in layers if any(_matches(name, pattern) for name in layer.names)]
        if not chosen:
            names = [name for layer in layers for name in layer.names]
            close = difflib.get_close_matches(pattern, names) or names[:3]
            cure = f"the layers are named {', '.join(map(short_name, close))}, …" if close else ""
            what = "a name or pattern of a layer"
            raise ArgumentError(expected(what, short_name(pattern), where="skip", cure=cure))
        for layer in chosen:
            layer.reason = layer.reason or f"skip={pattern!r}"


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches a name, or that of a module around it."""
    parts = name.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(fnmatchcase(whole, pattern) for whole in around)


def _skip_unsuitable(model: nn.Module, layers: Sequence[_Layer]) -> None:
    for layer in layers:
        layer.reason = layer.reason or next(
            filter(None, (_unsuitable(model, name, layer.kind) for name in layer.names)), ""
        )
    own = {name for layer in layers for name in layer.names}
    users: dict[int, str] = {}  # parameters of modules that are not replaced
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in own:
            users |= {id(p): f"{name}.{key}" for key, p in module._parameters.items()}
    for layer in layers:
        if layer.weight in users and not layer.reason:
            user = users[layer.weight]
            layer.reason = f"{user} is the same weight"
            if isinstance(model.get_submodule(user.rpartition(".")[0]), nn.Embedding):
                layer.reason += '; give embeddings="Q8_0", for example'


def _unsuitable(model: nn.Module, name: str, kind: type[nn.Module]) -> str:
    """Return why a layer cannot be replaced; empty if it can."""
    layer: Any = model.get_submodule(name)
    parent, own = model.get_submodule(name.rpartition(".")[0]), type(layer)
    if own is not kind:
        return f"it is a {own.__name__}, a subclass of nn.{kind.__name__}"
    if isinstance(parent, _READERS):
        return f"nn.{type(parent).__name__} reads its weight without calling it"
    if "weight" not in layer._parameters:
        return "its weight is computed from other parameters"
    if has_hooks(layer) or "forward" in vars(layer):
        return "it has hooks, which its replacement would not have"
    if not is_float(layer.weight):
        return f"its weight is a {type(layer.weight).__name__} in {tensor_dtype(layer.weight)}"
    if not layer.weight.numel():
        return "its weight is empty"
    if kind is nn.Embedding and layer.max_norm is not None:
        return "it has max_norm, which changes its weight"
    return ""


@dataclass
class _Group:
    """Layers that are replaced, and have one weight.

    Attributes:
        fmt: of the quantised weight.
    """

    fmt: Format
    layers: list[_Layer] = field(default_factory=list)

    def replace(self, model: nn.Module, precision: str) -> Iterator[Replaced]:
        """Replace the layers, and yield what was done."""
        first, weight = self.layers[0].name, None
        for layer in self.layers:
            old: Any = model.get_submodule(layer.name)
            if weight is None:
                weight = self._quantized(old, f"{layer.name}.weight")
            new: Embedding | Linear
            if layer.kind is nn.Embedding:
                new = Embedding(weight, dtype=_result_dtype(old.weight))
            else:
                new = Linear(weight, old.bias, precision=precision)
            new.train(old.training)
            size = old.weight.nbytes
            for name in layer.names:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, new)
            yield Replaced(
                layer.name,
                weight.format,
                weight.K,
                weight.N,
                size,
                weight.nbytes,
                "" if layer.name == first else first,
            )

    def _quantized(self, layer: Any, where: str) -> Weight:
        """Return the weight of the layers, in the layout of products unless there are none."""
        lookup = all(each.kind is nn.Embedding for each in self.layers)
        try:
            return quantized_weight(layer.weight, where, to=self.fmt.name, lookup=lookup)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error


def _groups(
    model: nn.Module,
    layers: Sequence[_Layer],
    formats: dict[type[nn.Module], Format],
    fallback: Format | None,
) -> list[_Group]:
    """Return the layers to replace. Raises ArgumentError for a weight that requires a gradient."""
    tied: dict[int, list[_Layer]] = {}
    for layer in layers:
        tied.setdefault(layer.weight, []).append(layer)
    groups = []
    for same in tied.values():
        kind = nn.Embedding if any(layer.kind is nn.Embedding for layer in same) else nn.Linear
        skipped = next((layer for layer in same if layer.reason), None)
        if skipped is not None:
            _skip(same, f"{skipped.name}, which is skipped, has the same weight")
            continue
        name = f"{same[0].name}.weight"
        weight: Any = model.get_parameter(name)
        k, fmt = weight.shape[1], formats[kind]
        fits = [f for f in (fmt, fallback) if f is not None and k % f.block_elements == 0]
        if not fits:
            other = "Q8_0" if k % FORMATS["Q8_0"].block_elements == 0 else "F16"
            cure = f'; give fallback="{other}", for example'
            blocks = f"blocks of {(fallback or fmt).name}, {(fallback or fmt).block_elements}"
            _skip(same, f"K = {k} is not a whole number of {blocks} each{cure}")
            continue
        check_frozen(weight, name)
        groups.append(_Group(fits[0], same))
    return groups


def _skip(layers: Sequence[_Layer], reason: str) -> None:
    for layer in layers:
        layer.reason = layer.reason or reason


def _result_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float32 if weight.dtype is torch.float64 else weight.dtype
