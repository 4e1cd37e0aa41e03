"""Fused decoder layers: classes between a layer's own class and its object.

A fused layer is the same object with the same modules, whose class has become a subclass of its
own. So `isinstance`, names, `state_dict`, `to` and the hooks by which transformers captures hidden
states and attentions stay as they were. The subclasses are made when they are needed.
"""

import functools
import sys
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor, nn

from q4jit.errors import ArgumentError, expected
from q4jit.torch.fusion import functions
from q4jit.torch.fusion.attention import (
    AUTO,
    by_head,
    is_one_query,
    one_query,
    rotated,
    turns_of,
)
from q4jit.torch.fusion.styles import Style
from q4jit.torch.guards import constant
from q4jit.torch.modules import Linear


@dataclass(frozen=True)
class Facts:
    """What `fuse` has found out about a decoder layer.

    Attributes:
        name: of the layer, for errors.
        style: of its architecture.
        norm, mlp, act: the classes of its norms, feed-forward and activation.
        attention, feed_forward: whether this half is fused.
        eps: of its norms.
        activation: of its feed-forward.
        decoding: one of `DECODING`.
        options: keyword arguments of the model's attention.
    """

    name: str
    style: Style
    norm: type[nn.Module]
    mlp: type[nn.Module]
    act: type[Any]
    attention: bool
    feed_forward: bool
    eps: float
    activation: str
    decoding: str = AUTO
    options: dict[str, Any] = field(default_factory=dict)


class FusedDecoderLayer:
    """The forward of a decoder layer, with one call before attention and one after it."""

    _modules: dict[str, Any]
    _fused: Facts

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the hidden states after the layer: [B, T, width], as those given."""
        facts, modules, x = self._fused, self._modules, hidden_states
        given = position_embeddings, attention_mask, cache
        if not facts.attention:
            x = _unfused_attention(facts, modules, x, given, kwargs)
            return _feed_forward(facts, modules, x)
        attention = modules["self_attn"]
        if not isinstance(attention, FusedAttention):
            _refuse(f"self_attn of {facts.name}", type(attention).__name__)
        query, key, value = _project(facts, modules, x)
        mixed, _ = attention(query, key, value, *given, **kwargs)
        own, zero = attention._modules, facts.style.zero_centred
        _, after_attention, before, after = facts.style.norms
        o = _linear(facts, own, "o_proj")
        y = _gain(facts, modules, after_attention)
        if not facts.feed_forward:
            x = functions.ADD[o.precision](x, mixed, *_operands(o), y, facts.eps, zero)
            return _unfused_feed_forward(facts, modules, x)
        made: Tensor = functions.FINISH[o.precision](
            x,
            mixed,
            *_operands(o),
            y,
            _gain(facts, modules, before),
            _gain(facts, modules, after),
            facts.eps,
            zero,
            facts.activation,
            *_matrices(facts, modules),
        )
        return made


class FusedAttention:
    """The part of attention without weights, between q, k, v and the output's product."""

    _modules: dict[str, Any]
    _fused: Facts
    _interfaces: Any
    _eager: Any
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    training: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        cache: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the mixed values [B, T, heads · D], and the attention's weights or None.

        query: [B, T, heads · D]. key, value: [B, T, kv heads · D].
        """
        batch, length = query.shape[:2]
        width = self.head_dim
        query, key, value = (by_head(x, batch, length, width) for x in (query, key, value))
        if "q_norm" in self._modules:
            query, key = self._modules["q_norm"](query), self._modules["k_norm"](key)
        cos, sin = turns_of(position_embeddings)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        facts, implementation = self._fused, self.config._attn_implementation
        if (
            implementation == "sdpa"
            and is_one_query(query, attention_mask, kwargs, facts.decoding)
            and not (self.training and self.attention_dropout)
        ):
            mixed = one_query(query, key, value, attention_mask, self.scaling, facts.decoding)
            return mixed.reshape(batch, length, -1), None
        attend = self._interfaces.get_interface(implementation, self._eager)
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **facts.options,
            **kwargs,
        )
        return mixed.reshape(batch, length, -1), weights


# --- the halves of a layer ------------------------------------------------------------------------


def _project(facts: Facts, modules: dict[str, Any], x: Tensor) -> Any:
    own, style = modules["self_attn"]._modules, facts.style
    head = x, _gain(facts, modules, style.norms[0]), facts.eps, style.zero_centred
    if style.divided:
        qkv, module = _linear(facts, own, "qkv_proj"), modules["self_attn"]
        kv_width = module.num_key_value_heads * module.head_dim
        first = qkv.out_features - 2 * kv_width
        function = functions.PROJECT_DIVIDED[qkv.precision]
        return function(*head, *_operands(qkv), first, first + kv_width)
    q, k, v = (_linear(facts, own, name) for name in ("q_proj", "k_proj", "v_proj"))
    return functions.PROJECT[q.precision](*head, *_operands(q), *_operands(k), *_operands(v))


def _feed_forward(facts: Facts, modules: dict[str, Any], x: Tensor) -> Tensor:
    _, _, before, after = facts.style.norms
    matrices = _matrices(facts, modules)
    precision = modules["mlp"]._modules["down_proj"].precision
    made: Tensor = functions.FEED_FORWARD[precision](
        x,
        _gain(facts, modules, before),
        _gain(facts, modules, after),
        facts.eps,
        facts.style.zero_centred,
        facts.activation,
        *matrices,
    )
    return made


def _matrices(facts: Facts, modules: dict[str, Any]) -> tuple[Any, ...]:
    """Return weight and bias of gate, up and down."""
    own = _read(facts, modules, "mlp", facts.mlp)._modules
    _read(facts, own, facts.style.activation, facts.act)
    down = _operands(_linear(facts, own, "down_proj"))
    if facts.style.divided:
        return *_operands(_linear(facts, own, "gate_up_proj")), None, None, *down
    gate, up = _linear(facts, own, "gate_proj"), _linear(facts, own, "up_proj")
    return *_operands(gate), *_operands(up), *down


def _unfused_attention(
    facts: Facts, modules: dict[str, Any], x: Tensor, given: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    before, after, _, _ = facts.style.norms
    embeddings, mask, cache = given
    y, _ = modules["self_attn"](
        hidden_states=modules[before](x),
        position_embeddings=embeddings,
        attention_mask=mask,
        cache=cache,
        **kwargs,
    )
    made: Tensor = x + (modules[after](y) if after else y)
    return made


def _unfused_feed_forward(facts: Facts, modules: dict[str, Any], x: Tensor) -> Tensor:
    _, _, before, after = facts.style.norms
    y = modules["mlp"](modules[before](x))
    made: Tensor = x + (modules[after](y) if after else y)
    return made


def _linear(facts: Facts, modules: dict[str, Any], name: str) -> Linear:
    linear: Linear = _read(facts, modules, name, Linear)
    return linear


def _read(facts: Facts, modules: dict[str, Any], name: str, kind: type[nn.Module]) -> Any:
    """Return a module that functions compute instead of, if it is as it was in `fuse`."""
    module = modules.get(name)
    if (
        type(module) is not kind
        or module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__  # as accelerate replaces it
    ):
        _refuse(f"{name} of {facts.name}", type(module).__name__)
    return module


def _operands(linear: Linear) -> tuple[Any, Any]:
    """Return weight and bias, without the search of `nn.Module.__getattr__`."""
    return linear._modules["weight"], linear._parameters["bias"]


def _gain(facts: Facts, modules: dict[str, Any], name: str) -> Tensor | None:
    if not name:
        return None
    gain: Tensor = _read(facts, modules, name, facts.norm)._parameters["weight"]
    return gain


@constant
def _refuse(where: str, kind: str) -> None:
    """Raise ArgumentError for a module that was changed after `fuse`."""
    what, got = "the module without hooks that fuse has read", f"a changed one, {kind}"
    cure = "call unfuse(model) before a change, and fuse(model) after it"
    raise ArgumentError(expected(what, got, where=where, cure=cure))


# --- classes --------------------------------------------------------------------------------------

_PREFIX: Final = "Fused"


def become(module: nn.Module, mixin: type, facts: Facts) -> None:
    """Give a module the class that combines a mixin with its own."""
    own: Any = type(module)
    module.__class__ = _combined(mixin, own)
    module._fused = facts  # type: ignore[assignment]  # neither a tensor nor a module


def become_own(module: nn.Module) -> None:
    """Give a fused module its own class again."""
    fused: Any = module
    fused.__class__ = fused._own
    del fused._fused


def is_fused(module: nn.Module) -> bool:
    """Return whether `become` has changed the class of a module."""
    return "_fused" in vars(module)


@functools.cache
def _combined(mixin: type, own: type) -> Any:
    module: Any = sys.modules[own.__module__]
    names = {
        "__module__": own.__module__,
        "__reduce_ex__": _reduced,
        "_mixin": mixin,
        "_own": own,
        "_interfaces": module.ALL_ATTENTION_FUNCTIONS,
        "_eager": staticmethod(module.eager_attention_forward),
    }
    return type(_PREFIX + own.__name__, (mixin, own), names)


def _reduced(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle or copy an object by the two classes, because no module has the combined one."""
    kind = type(self)
    return _blank, (kind._mixin, kind._own), self.__dict__


def _blank(mixin: type, own: type) -> Any:
    kind = _combined(mixin, own)
    return kind.__new__(kind)
