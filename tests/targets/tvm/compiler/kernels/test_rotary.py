import numpy as np
import pytest

from passopt.targets.tvm.compiler.kernels.rotary import rotary
from passopt.targets.tvm.compiler.kernels.standalone import compile_kernel


def reference(x, cos, sin, rotary_dim, interleaved):
    """The algorithm in the text of RotaryEmbedding, on [b, s, h, d] in float64."""
    wide, cos, sin = x.astype(np.float64), cos[:, :, None].astype(np.float64), sin[:, :, None].astype(np.float64)
    turned = wide[..., :rotary_dim]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else np.split(turned, 2, axis=-1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    y = wide.copy()
    if interleaved:
        y[..., 0:rotary_dim:2], y[..., 1:rotary_dim:2] = real, imaginary
    else:
        y[..., :rotary_dim] = np.concatenate([real, imaginary], axis=-1)
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(6, 12, 12), (5, 16, 8), (3, 64, 64), (2, 80, 20), (1, 128, 128)]
)
def test_equals_the_standard(cpu, heads, head_dim, rotary_dim, interleaved):
    kernel = compile_kernel(rotary(heads, head_dim, rotary_dim, interleaved, cpu.isa), cpu)
    rng = np.random.default_rng(heads)
    for batch, length, angles in [(1, 1, 1), (2, 1, 2), (3, 17, 1), (2, 130, 2)]:
        x = rng.standard_normal((batch, length, heads, head_dim), np.float32)
        theta = rng.uniform(-9, 9, (angles, length, rotary_dim // 2)).astype(np.float32)
        cos, sin = np.cos(theta), np.sin(theta)
        y = np.full_like(x, np.nan)
        kernel(x, cos, sin, y)
        np.testing.assert_allclose(y, reference(x, cos, sin, rotary_dim, interleaved), rtol=0, atol=1e-6)
