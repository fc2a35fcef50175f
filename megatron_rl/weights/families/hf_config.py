"""The values of a config.json: read with the defaults of its architecture, and none of consequence left unread."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.errors import ConfigError
from megatron_rl.weights.families.rope import RopePlan, read_scaling

# Keys that change nothing about a model's parameters or its forward pass in a trainer.
_WITHOUT_EFFECT = frozenset(
    {
        "aux_loss_alpha",
        "max_window_layers",
        "moe_aux_loss_coeff",
        "original_max_position_embeddings",
        "output_attentions",
        "output_router_logits",
        "pretraining_tp",
        "quantization_config",
        "router_aux_loss_coef",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "seq_aux",
        "tokenizer_class",
    }
)
# A key with such a name may change what a model computes.
_SENSITIVE = re.compile(
    "bias|scal|cap|mult|window|norm|rope|rotary|expert|router|tie|attn|mlp|act|residual|clip|alpha|layer_types"
    "|interleav|shared|latent"
)


class HFConfig:
    """The values of a config.json. Errors name the file and the key.

    transformers leaves out keys that have the default of their class. So an absent key has the default of its
    architecture, never a common one.

    Args:
        values: the JSON object.
        where: path of the file, for error messages.
        defaults: defaults of the architecture's configuration class.
    """

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values, self.where, self._defaults = values, where, defaults or {}
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return a value, or its default; None if neither exists."""
        self._read.add(key)
        value = self.values.get(key)
        return self._defaults.get(key) if value is None else value

    def integer(self, key: str, *, least: int = 1) -> int:
        value = self._required(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, {kind} is needed")
        return value

    def either(self, *keys: str) -> int:
        """Return the integer of a key with several names, of which transformers may write any.

        Raises:
            ConfigError: if two of them are present with different values.
        """
        stated = {key: self.integer(key, least=0) for key in keys if self.values.get(key) is not None}
        if len(set(stated.values())) > 1:
            pairs = " and ".join(f"'{key}' = {value}" for key, value in stated.items())
            raise ConfigError(f"{self.where}: {pairs} contradict each other")
        self._read.update(keys)
        return next(iter(stated.values())) if stated else self.integer(keys[0], least=0)

    def number(self, key: str) -> float:
        return self._as_number(key, self._required(key))

    def boolean(self, key: str) -> bool:
        value = self._required(key)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, true or false is needed")
        return value

    def demand(self, key: str, supported: tuple[Any, ...]) -> None:
        """Check that `key` has one of the supported values. Raise ConfigError if it does not.

        None among the supported values also stands for an absent key.
        """
        value = self.get(key)
        if value not in supported:
            wanted = " or ".join(repr(choice) for choice in supported if choice is not None)
            raise ConfigError(
                f"{self.where}: '{key}' is {value!r}, which is not supported; supported: {wanted or 'null'}"
            )

    def rope(self, head_dim: int, *, theta: float = 10000.0, share: float | None = None) -> RopePlan:
        """Return the plan of RoPE.

        transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`. A value that stands in two
        places must be the same in both.

        Args:
            head_dim: dimensions of a head.
            theta: the architecture's default base.
            share: the architecture's default share of rotated dimensions; None if it rotates all, whatever is stated.
        """
        places = {key: self._mapping(key) for key in ("rope_parameters", "rope_scaling")}
        places["config.json"] = {
            key: self.values[key]
            for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
            if self.values.get(key) is not None
        }
        self._read.add("partial_rotary_factor")
        stated: dict[str, tuple[str, Any]] = {}
        for place, values in places.items():
            for key, value in values.items():
                name = "rope_type" if key == "type" else key
                before = stated.setdefault(name, (place, value))
                if before[1] != value:
                    raise ConfigError(
                        f"{self.where}: {before[0]} has {name} = {before[1]!r}, and {place} has {value!r}: "
                        "engines of different versions would take different ones. Remove the wrong one"
                    )
        rest = {name: value for name, (_, value) in stated.items()}
        kind = rest.pop("rope_type", "default")
        base = self._as_number("rope_theta", rest.pop("rope_theta", theta))
        rotated = rest.pop("partial_rotary_factor", share)
        dim = head_dim if share is None else int(head_dim * self._as_number("partial_rotary_factor", rotated))
        place = "rope_parameters" if places["rope_parameters"] else "rope_scaling"
        scaling = read_scaling(kind, rest, self.integer("max_position_embeddings"), f"{self.where}: '{place}'")
        return RopePlan(base, dim, scaling)

    def windows(self, layers: int, width: int | None, usual: list[str] | None = None) -> tuple[int | None, ...]:
        """Return the attention window of each layer, from `layer_types`.

        Args:
            layers: number of layers.
            width: keys that a query of a layer with a window sees; None: no layer has one.
            usual: `layer_types` if the key is absent; None: every layer has a window if there is a width.
        """
        kinds = self.get("layer_types")
        if kinds is None:
            kinds = usual or ["full_attention" if width is None else "sliding_attention"] * layers
        if not isinstance(kinds, Sequence) or isinstance(kinds, str) or len(kinds) != layers:
            raise ConfigError(
                f"{self.where}: 'layer_types' is {kinds!r}, one word for each of {layers} layers is needed"
            )
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise ConfigError(
                    f"{self.where}: 'layer_types' holds {kind!r}, which is not supported; supported: "
                    "'full_attention', 'sliding_attention'"
                )
        if "sliding_attention" in kinds and width is None:
            raise ConfigError(
                f"{self.where}: 'layer_types' asks for sliding attention, and no 'sliding_window' is in use"
            )
        found = tuple(width if kind == "sliding_attention" else None for kind in kinds)
        return found if any(found) else ()

    def finish(self) -> None:
        """Check that every key that may change what the model computes was read.

        Raises:
            ConfigError: names a key with a value that the family does not know.
        """
        for key, value in self.values.items():
            known = key in self._read or key in _WITHOUT_EFFECT or self._defaults.get(key, ...) == value
            neutral = value in (None, False, 0, [], {}, "") or (value == 1 and ("scal" in key or "mult" in key))
            # Nothing is dropped in training here, so dropout has no effect.
            if not known and not neutral and "drop" not in key and _SENSITIVE.search(key):
                raise ConfigError(
                    f"{self.where}: '{key}' is {value!r}, which this family does not know: it may change what the "
                    "model computes. Remove the key if it has no meaning for this model"
                )

    def _required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self.where}: key '{key}' is missing")
        return value

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, a mapping is needed")
        if any(isinstance(part, Mapping) for part in value.values()):
            raise ConfigError(f"{self.where}: '{key}' differs between layers, which is not supported")
        return {name: part for name, part in value.items() if part is not None}

    def _as_number(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: '{key}' is {value!r}, a positive number is needed")
        return float(value)
