# mypy: allow-untyped-defs
"""The small steps between the products of a decoder layer, one launch each instead of four to eight: RMS norm, rotary
embedding of q and k, gated activation.

  x, y             16-bit float | float32 [.., W], last dimension contiguous; any strides before (a slice of a merged
                   q/k/v product is read in place); results contiguous
  weight           [W]           cos, sin  [T, R], R <= D rotary dimensions, both halves filled as transformers does

Arithmetic is float32 inside with one rounding at the end, except where a model rounds in between and the values would
otherwise be another model's: `form` of a norm says which of the three in use it is.

    llama  weight * round(x / rms)         gemma  round((x / rms) * (1 + weight))         float  round(weight * x / rms)

One launch on a GPU; on a CPU one call of the native library (native_layer.py) in bfloat16, and the torch twins below
otherwise, which are the oracle of both; BITSMITH_KERNELS (paths.py) forces one of the three. Left out: LayerNorm, exact
(erf) GELU, the residual's sum (recorded steps bind torch's own: native_layer.py), gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native_layer, ops
from .cases import Case, Target, Weight
from .lang import EXACT, jit, tl
from .paths import takes_triton
from .plans import power_of_two

FORMS = ("llama", "gemma", "float")
ACTS = ("silu", "gelu_tanh")
_GATED_BLOCK = 1024


@jit(do_not_specialize=["M"])
def norm_kernel(
    x, weight, y, M, INNER, outer_stride, inner_stride, eps,
    W: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of M is x[r // INNER, r % INNER]. Grid (ceil(M / ROWS),)."""
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (r < M)[:, None] & (c < W)[None, :]
    at = (r // INNER * outer_stride + r % INNER * inner_stride)[:, None] + c[None, :]
    h = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 1) / W + eps)[:, None]
    w = tl.load(weight + c, mask=c < W, other=0).to(tl.float32)[None, :]
    if FORM == "llama":
        h = h.to(y.dtype.element_ty).to(tl.float32) * w
    elif FORM == "gemma":
        h = h * (1.0 + w)
    else:
        h = h * w
    tl.store(y + r[:, None] * W + c[None, :], h.to(y.dtype.element_ty), mask=inside)


@jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out, q_token, q_head, k_token, k_head, HQ, HK,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Heads of q and k one after the other. HALF, TAIL: powers of two of at least R / 2 and D - R (0: nothing to copy).
    Grid (T, ceil((HQ + HK) / HEADS))."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, HALF)
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + R // 2
    c = tl.load(cos + t * R + first, mask=i < R // 2, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + t * R + first, mask=i < R // 2, other=0).to(tl.float32)[None, :]
    is_q, is_k = h < HQ, (h >= HQ) & (h < HQ + HK)
    q_in, k_in = q + t * q_token + h[:, None] * q_head, k + t * k_token + (h - HQ)[:, None] * k_head
    q_at, k_at = q_out + (t * HQ + h)[:, None] * D, k_out + (t * HK + h - HQ)[:, None] * D
    of_q, of_k = is_q[:, None] & (i < R // 2)[None, :], is_k[:, None] & (i < R // 2)[None, :]
    a = tl.where(of_q, tl.load(q_in + first, mask=of_q, other=0), tl.load(k_in + first, mask=of_k, other=0))
    b = tl.where(of_q, tl.load(q_in + second, mask=of_q, other=0), tl.load(k_in + second, mask=of_k, other=0))
    a, b = a.to(tl.float32), b.to(tl.float32)
    low, high = (a * c - b * s).to(q_out.dtype.element_ty), (b * c + a * s).to(q_out.dtype.element_ty)
    tl.store(q_at + first, low, mask=of_q)
    tl.store(q_at + second, high, mask=of_q)
    tl.store(k_at + first, low, mask=of_k)
    tl.store(k_at + second, high, mask=of_k)
    if TAIL:
        j = tl.arange(0, TAIL) + R
        of_q, of_k = is_q[:, None] & (j < D)[None, :], is_k[:, None] & (j < D)[None, :]
        tl.store(q_at + j, tl.load(q_in + j, mask=of_q, other=0), mask=of_q)
        tl.store(k_at + j, tl.load(k_in + j, mask=of_k, other=0), mask=of_k)


@jit
def gated_kernel(gate, up, y, W, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y [M, W] = act(gate) * up. Grid (M, ceil(W / BLOCK))."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + r * gate_stride + c, mask=c < W, other=0).to(tl.float32)
    u = tl.load(up + r * up_stride + c, mask=c < W, other=0).to(tl.float32)
    # gelu_tanh: 1 + tanh(z) = 2 * sigmoid(2 z)
    inner = g if ACT == "silu" else 1.5957691216057308 * (g + 0.044715 * g * g * g)
    tl.store(y + r * W + c, (g * tl.sigmoid(inner) * u).to(y.dtype.element_ty), mask=c < W)


def norm_twin(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """x [.., W] -> x's dtype, in the steps transformers' models write."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if form == "llama":
        return weight * h.to(x.dtype)
    return (h * (1.0 + weight.float() if form == "gemma" else weight.float())).to(x.dtype)


def rope_twin(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """q [T, HQ, D], k [T, HK, D], cos and sin [T, R] -> the same shapes and dtypes, in float32 inside."""
    r = cos.shape[-1]
    step = slice(0, r, 2) if interleaved else slice(0, r // 2)
    c, s = cos.float()[:, None, step], sin.float()[:, None, step]

    def turn(x: Tensor) -> Tensor:
        h = x[..., :r].float()
        a, b = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        low, high = a * c - b * s, b * c + a * s
        turned = torch.stack([low, high], -1).flatten(-2) if interleaved else torch.cat([low, high], -1)
        return torch.cat([turned.to(x.dtype), x[..., r:]], -1)

    return turn(q), turn(k)


def gated_twin(gate: Tensor, up: Tensor, act: str) -> Tensor:
    g = gate.float()
    return ((F.silu(g) if act == "silu" else F.gelu(g, approximate="tanh")) * up.float()).to(gate.dtype)


def _rows(x: Tensor) -> Tensor:
    """[A, B, W] with W contiguous: a view where the leading dimensions can be merged."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])


def _norm_options(width: int) -> dict[str, Any]:
    """About 2048 numbers a program: many short rows (q and k norms), or one long one."""
    block = power_of_two(width)
    return {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4 if block <= 4096 else 8, **EXACT}


def _launch_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, width = _rows(x), x.shape[-1]
        options = _norm_options(width)
        count = rows.shape[0] * rows.shape[1]
        norm_kernel[(-(-count // options["ROWS"]),)](
            rows, weight.contiguous(), y, count, rows.shape[1], *rows.stride()[:2], eps, width, form, **options
        )
    return y


def _norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    if takes_triton(x):
        return _launch_norm(x, weight, eps, form)
    if native_layer.usable(x, weight):
        y, rows = torch.empty(x.shape, dtype=x.dtype), _rows(x)
        native_layer.norm(y, rows, weight, eps, FORMS.index(form))()
        return y
    return norm_twin(x, weight, eps, form).contiguous()


def _bind_norm(y: Sequence[Tensor], x: Tensor, weight: Tensor, eps: float, form: str) -> ops.Call | None:
    if takes_triton(x) or not native_layer.usable(x, weight) or _moved(_rows(x), x):
        return None
    return native_layer.norm(y[0], _rows(x), weight, eps, FORMS.index(form))


def _moved(view: Tensor, x: Tensor) -> bool:
    """Whether `view` of `x` had to be a copy, which a later call would not see change."""
    return view.data_ptr() != x.data_ptr()


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if not takes_triton(q):
        if native_layer.usable(q, k, cos, sin):
            cos, sin = cos.contiguous(), sin.contiguous()
            turned = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
            for y, x in zip(turned, (q, k), strict=True):
                native_layer.turn(y, x, cos, sin, interleaved)()
            return turned
        a, b = rope_twin(q, k, cos, sin, interleaved)
        return a.contiguous(), b.contiguous()
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    (tokens, hq, d), hk, r = q.shape, k.shape[1], cos.shape[-1]
    if tokens:
        heads = min(8, power_of_two(hq + hk))
        rope_kernel[(tokens, -(-(hq + hk) // heads))](
            q, k, cos.contiguous(), sin.contiguous(), *out, *q.stride()[:2], *k.stride()[:2], hq, hk, d, r,
            interleaved, heads, power_of_two(r // 2), power_of_two(d - r) if d > r else 0, num_warps=4, **EXACT,
        )  # fmt: skip
    return out[0], out[1]


def _bind_rope(
    y: Sequence[Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[ops.Call, ...] | None:
    dense = cos.is_contiguous() and sin.is_contiguous()
    if takes_triton(q) or not dense or not native_layer.usable(q, k, cos, sin):
        return None
    return tuple(native_layer.turn(to, x, cos, sin, interleaved) for to, x in zip(y, (q, k), strict=True))


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if not takes_triton(gate):
        if native_layer.usable(gate, up):
            y = torch.empty(gate.shape, dtype=gate.dtype)
            a, b = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
            native_layer.gated(y, a, b, ACTS.index(act))()
            return y
        return gated_twin(gate, up, act).contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        width = gate.shape[-1]
        a, b = (x.reshape(-1, width) for x in (gate, up))
        a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (a, b))
        gated_kernel[(a.shape[0], -(-width // _GATED_BLOCK))](
            a, b, y, width, a.stride(0), b.stride(0), act, _GATED_BLOCK, num_warps=4, **EXACT
        )
    return y


def _bind_gated(y: Sequence[Tensor], gate: Tensor, up: Tensor, act: str) -> ops.Call | None:
    if takes_triton(gate) or not native_layer.usable(gate, up):
        return None
    a, b = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    return None if _moved(a, gate) or _moved(b, up) else native_layer.gated(y[0], a, b, ACTS.index(act))


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _two_like(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


# form: one of FORMS.
rms_norm = ops.define("rms_norm(Tensor x, Tensor weight, float eps, str form) -> Tensor", _norm, _like, _bind_norm)
# q [T, HQ, D], k [T, HK, D], cos and sin [T, R]; interleaved: a pair is two neighbours, not two halves.
rope = ops.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    _rope,
    _two_like,
    _bind_rope,
)
# act: one of ACTS.
gated = ops.define("gated(Tensor gate, Tensor up, str act) -> Tensor", _gated, _like, _bind_gated)


def aot_cases(target: Target, weights: Sequence[Weight]) -> Iterator[Case]:
    """A 4096-wide norm of each form and a q norm; rotary of 32 + 8 heads of 128; both activations."""
    p = f"*{target.dtype}"
    arguments = {"x": p, "weight": p, "y": p, "M": "i32", "INNER": "i32", "outer_stride": "i32", "inner_stride": "i32"}
    arguments["eps"] = "fp32"
    for name, form, width in (*((form, form, 4096) for form in FORMS), ("head", "llama", 128)):
        options = _norm_options(width)
        tile = {"ROWS": options.pop("ROWS"), "BLOCK": options.pop("BLOCK"), "W": width, "FORM": form}
        yield Case("rms_norm", 1, name, "fused", norm_kernel, arguments, tile, options, target.dtype)
    names = ("q", "k", "cos", "sin", "q_out", "k_out")
    turns: dict[str, Any] = dict.fromkeys(names, p)
    turns |= dict.fromkeys(("q_token", "q_head", "k_token", "k_head", "HQ", "HK"), "i32")
    for name, interleaved in (("half", False), ("interleaved", True)):
        tile = {"D": 128, "R": 128, "INTERLEAVED": interleaved, "HEADS": 8, "HALF": 64, "TAIL": 0}
        yield Case("rope", 1, name, "fused", rope_kernel, turns, tile, {"num_warps": 4, **EXACT}, target.dtype)
    both = {"gate": p, "up": p, "y": p, **dict.fromkeys(("W", "gate_stride", "up_stride"), "i32")}
    for act in ACTS:
        tile = {"ACT": act, "BLOCK": _GATED_BLOCK}
        yield Case("gated", 1, act, "fused", gated_kernel, both, tile, {"num_warps": 4, **EXACT}, target.dtype)
