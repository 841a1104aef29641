"""Find the parts of a decoder in a transformers model: by the names that linears and norms have in a layer.

Names say what a module is; whether the parts act together as `description.Layer` says is tried, in `verification.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidConfig
from ..linear import AwqLinear
from ..ops import ACTIVATIONS, AttentionSpec, rms_norm
from .description import Attention, Description, GatedMlp, Layer, Norm, Part
from .projection import Projection

ATTENTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))
MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
NORMS = (  # before and after attention, before and after the MLP; two where there are only those before
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
)
MIXTURES = ("mlp", "block_sparse_moe", "feed_forward")
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
MAPPING_KEYS = (
    "attention",
    "layernorm",
    "mlp",
    "use_alibi",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "max_seq_len",
    "rope_theta",
)


class CannotFuse(Exception):
    """A part of the model is not what a fused decoder can be made of: `path`, and why."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Finder:
    """Reads one model. `mapping` is AWQ's `modules_to_fuse`, which names what the lists above do not."""

    def __init__(self, model: Any, mapping: Mapping[str, Any] | None):
        self.model = model
        self.config = model.config.get_text_config()
        self.mapping = _checked(mapping or {})
        self.parts: list[Part] = []
        self.paths = {module: path for path, module in model.named_modules()}

    def description(self) -> Description:
        """The decoder. Raises `CannotFuse`."""
        base = self.model.get_decoder() if hasattr(self.model, "get_decoder") else None
        if not isinstance(getattr(base, "layers", None), nn.ModuleList):
            raise CannotFuse(type(self.model).__name__, "it has no decoder with a list of layers")
        assert base is not None
        head = self.model.get_output_embeddings()
        if not isinstance(head, (nn.Linear, AwqLinear)):
            raise CannotFuse("lm_head", "the model has no linear that gives logits")
        alibi = bool(self.mapping.get("use_alibi"))
        embedding = self.model.get_input_embeddings()
        for module in (base.layers, embedding):
            self._take_path(module)
        rotary = None if alibi else self._rotary(base)
        rotary_dim = 0 if rotary is None else 2 * rotary(1)[0].shape[-1]
        layers = tuple(self._layer(base.layers, index, rotary_dim, alibi) for index in range(len(base.layers)))
        norm = self._norm(base, self.mapping.get("layernorm", ["norm"])[-1])
        self._take(self.model, next(name for name, child in self.model.named_children() if child is head))
        watched = [self.model, *(child for _, _, child in self.parts)]
        return Description(
            embedding,
            1.0,
            layers,
            norm,
            head,
            getattr(self.config, "final_logit_softcapping", None),
            rotary,
            self._rotary_limit(),
            tuple(self.parts),
            tuple(hooks for module in watched for hooks in (module._forward_hooks, module._forward_pre_hooks)),
        )

    def _layer(self, layers: nn.ModuleList, index: int, rotary_dim: int, alibi: bool) -> Layer:
        layer = self._take(layers, str(index))
        norms = self._norms(layer)
        attention = self._attention(layer, index, rotary_dim, alibi)
        mlp = self._mlp(layer)
        if len(norms) == 2:
            return Layer(norms[0], attention, None, norms[1], mlp, None)
        return Layer(norms[0], attention, norms[1], norms[2], mlp, norms[3])

    def _norms(self, layer: nn.Module) -> list[Norm]:
        given = self.mapping.get("layernorm")
        for names in [given[:-1]] if given else NORMS:
            if all(hasattr(layer, name) for name in names):
                return [self._norm(layer, name) for name in names]
        raise CannotFuse(self.paths[layer], f"it has no norms named {' or '.join(map(str, NORMS))}")

    def _norm(self, parent: nn.Module, name: str) -> Norm:
        """The RMS norm `name`. Some multiply by the weight, some by one more: the module is asked with numbers."""
        module = self._take(parent, name)
        path = self.paths[module]
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
            raise CannotFuse(path, f"{type(module).__name__} is not an RMS norm with a weight and an epsilon")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, len(weight), generator=generator).to(weight)
        expected = module(x).float()
        if getattr(module, "bias", None) is None:
            for candidate in (weight.float(), 1.0 + weight.float()):
                error = (rms_norm(x, candidate, eps).float() - expected).abs().max()
                if error <= 4 * torch.finfo(weight.dtype).eps * expected.abs().max():  # both round at most twice
                    return Norm(candidate.detach(), eps)
        raise CannotFuse(path, f"{type(module).__name__} does not compute an RMS norm")

    def _attention(self, layer: nn.Module, index: int, rotary_dim: int, alibi: bool) -> Attention:
        given = self.mapping.get("attention")
        module, names = self._child_with(layer, [tuple(given)] if given else ATTENTIONS, "attention")
        linears = [self._take(module, name) for name in names]
        head_dim = getattr(module, "head_dim", None) or self._number("hidden_size") // self._number(
            "num_attention_heads"
        )
        out = self._linear(linears[-1])
        heads = out.in_features // head_dim
        joint = sum(self._linear(linear).out_features for linear in linears[:-1])
        kv_heads, odd = divmod(joint - heads * head_dim, 2 * head_dim)
        if odd or kv_heads < 1 or heads % kv_heads:
            raise CannotFuse(self.paths[module], f"{joint} outputs of q, k and v are no heads of {head_dim} features")
        norms = [self._norm(module, name) if hasattr(module, name) else None for name in ("q_norm", "k_norm")]
        for norm in norms:
            if norm is not None and len(norm.weight) != head_dim:
                raise CannotFuse(self.paths[module], "its norms of q and k are not of one head each")
        if getattr(module, "sinks", None) is not None:
            raise CannotFuse(self.paths[module], "its attention has sinks")
        spec = AttentionSpec(
            heads,
            kv_heads,
            head_dim,
            float(getattr(module, "scaling", head_dim**-0.5)),
            rotary_dim,
            window=self._window(index),
            softcap=getattr(self.config, "attn_logit_softcapping", None),
            norm_eps=norms[0].eps if norms[0] is not None else None,
        )
        weights = [norm.weight if norm is not None else None for norm in norms]
        slopes = _alibi_slopes(heads).to(self.model.device) if alibi else None
        return Attention(Projection(linears[:-1]), Projection(linears[-1:]), spec, weights[0], weights[1], slopes)

    def _mlp(self, layer: nn.Module) -> GatedMlp | nn.Module:
        given = self.mapping.get("mlp")
        try:
            module, names = self._child_with(layer, [tuple(given)] if given else MLPS, "MLP")
        except CannotFuse:
            mixture = next((name for name in MIXTURES if hasattr(getattr(layer, name, None), "experts")), None)
            if mixture is None:
                raise
            return self._take(layer, mixture)
        if hasattr(module, "experts"):
            return self._take(layer, next(name for name, child in layer.named_children() if child is module))
        linears = [self._take(module, name) for name in names]
        for linear in linears:
            self._linear(linear)
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        return GatedMlp(Projection(linears[:-1]), Projection(linears[-1:]), _activation(act, self.paths[module]))

    def _child_with(
        self, layer: nn.Module, candidates: Sequence[tuple[str, ...]], what: str
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """The child of `layer` that has all the linears of one candidate, and their names."""
        for names in candidates:
            for name, child in layer.named_children():
                if all(isinstance(getattr(child, linear, None), nn.Module) for linear in names):
                    self._take(layer, name)
                    return child, names
        tried = " or ".join(", ".join(names) for names in candidates)
        raise CannotFuse(self.paths[layer], f"none of its modules is an {what} made of {tried}")

    def _linear(self, module: nn.Module) -> Any:
        if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
            raise CannotFuse(self.paths[module], f"{type(module).__name__} is not a linear")
        return module

    def _take(self, parent: nn.Module, name: str) -> nn.Module:
        child = getattr(parent, name, None)
        if not isinstance(child, nn.Module):
            raise CannotFuse(self.paths[parent], f"it has no module {name!r}")
        self.parts.append((parent._modules, name, child))
        return child

    def _take_path(self, module: nn.Module) -> None:
        """Take `module` and all that lies between the model and it."""
        parent = self.model
        for name in self.paths[module].split("."):
            parent = self._take(parent, name)

    def _number(self, name: str) -> int:
        return int(self.mapping.get(name) or getattr(self.config, name))

    def _window(self, index: int) -> int | None:
        """How many positions the layer sees, by the two ways in which configurations say so."""
        window = getattr(self.config, "sliding_window", None)
        if window is None or getattr(self.config, "use_sliding_window", True) is False:
            return None
        kinds = getattr(self.config, "layer_types", None)
        return int(window) if kinds is None or kinds[index] == "sliding_attention" else None

    def _rotary(self, base: nn.Module) -> Callable[[int], tuple[Tensor, Tensor]]:
        module = getattr(base, "rotary_emb", None)
        if not isinstance(module, nn.Module):
            raise CannotFuse(self.paths[base], "it has no rotary_emb, and no mapping says that it uses ALiBi")
        self._take(base, "rotary_emb")
        device = self.model.device

        def tables(count: int) -> tuple[Tensor, Tensor]:
            positions = torch.arange(count, device=device)[None]
            cos, sin = module(torch.zeros(1, device=device), positions)
            half = cos.shape[-1] // 2
            return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()

        try:
            cos, _ = tables(2)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CannotFuse(self.paths[module], f"it gives no table of angles: {error}") from error
        if cos.dim() != 2:
            raise CannotFuse(self.paths[module], "its angles are not of one position each")
        return tables

    def _rotary_limit(self) -> int | None:
        """The length to which angles do not depend on the sequence's own length."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") not in LENGTH_DEPENDENT_ROPE:
            return None
        return int(rope.get("original_max_position_embeddings") or self.config.max_position_embeddings)


def _activation(function: Any, path: str) -> str:
    """The name of an activation, which is asked with numbers: its class says too little."""
    x = torch.linspace(-6, 6, 101)
    with contextlib.suppress(TypeError, RuntimeError):  # some have parameters of the layer's width
        expected = function(x)
        for name, candidate in ACTIVATIONS.items():
            if torch.allclose(candidate(x), expected, rtol=0, atol=1e-6):  # gelu and gelu_tanh differ by 5e-4
                return name
    raise CannotFuse(path, f"its activation {function!r} is none of {', '.join(ACTIVATIONS)}")


def _alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes (Press et al. 2022): powers of 2^(-8/n), n the power of two at or below `heads`, then between."""
    floor = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / floor) for i in range(floor)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / floor) for i in range(heads - floor)]
    return torch.tensor(slopes)


def _checked(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in mapping:
        if key not in MAPPING_KEYS:
            raise InvalidConfig(f"modules_to_fuse has {key!r}; it may have {', '.join(MAPPING_KEYS)}")
    for key, least in (("attention", 2), ("mlp", 2), ("layernorm", 3)):
        names = mapping.get(key)
        if names is not None and (
            not isinstance(names, (list, tuple)) or len(names) < least or not all(isinstance(n, str) for n in names)
        ):
            raise InvalidConfig(
                f"modules_to_fuse: {key!r} is {names!r}; at least {least} names of modules are expected"
            )
    return mapping
