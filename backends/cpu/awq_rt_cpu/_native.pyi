# src/module.cpp. Operators return NotImplemented for what they do not serve. dtypes are the numbers in `strips.DTYPES`.

from torch import Tensor

def offered() -> list[tuple[str, str]]: ...
def choose(name: str) -> None: ...
def chosen() -> tuple[str, str]: ...
def has_int8() -> bool: ...
def set_exchange(capsule: object) -> None: ...

class Linear:
    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        dtype: int,
        scale_dtype: int,
        bias_dtype: int | None,
        mode: str,
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    def pack(self, codes: int, zeros: int, scales: int, packed: int, threads: int) -> None: ...
    def unpack(self, packed: int, codes: int, zeros: int, scales: int, threads: int) -> None: ...
    def run(self, x: Tensor, packed: int, bias: int, threads: int) -> Tensor: ...

class Attention:
    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        interleaved: bool,
        window: int,
        scale: float,
        softcap: float,
        norm_eps: float,
    ) -> None: ...
    def append(
        self,
        qkv: Tensor,
        first: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        threads: int,
    ) -> Tensor: ...
    def decode(
        self,
        qkv: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        slopes: Tensor | None,
        threads: int,
    ) -> Tensor: ...

class Tape:
    """Keeps what its thread's operators do between `start` and `stop`, and does parts of it again."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def __len__(self) -> int: ...
    def run(self, first: int, last: int, threads: int) -> None: ...

def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, most_rows: int, threads: int) -> Tensor: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, threads: int) -> Tensor: ...
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, threads: int) -> Tensor: ...
def gated_activation(gate_up: Tensor, activation: int, threads: int) -> Tensor: ...
def argmax(logits: Tensor, found: Tensor, threads: int) -> Tensor: ...
