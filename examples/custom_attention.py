"""An attention of your own: its text, what the compiler makes of it, and a comparison with the formula.

Weights are squared, rectified scores that fade with distance, by another half-life in each head:

    W[p, m] = relu(QK[p, m]) ** 2 * 2 ** ((m - p) / HALF)        for keys m <= p

and are divided by their sum plus one, so a query that likes no key returns nearly nothing. Run it with

    python examples/custom_attention.py

where the package is installed, or with PYTHONPATH=. in a checkout. A GPU is used if there is one.
"""

import torch

import einsumcascade as ec

FADING = ec.parse(
    """
    in Q[b,h,p,e], K[b,h,m,e], V[b,h,m,f], HALF[h]
    const scale = E ** -0.5
    constraint m <= p
    QK[b,h,p,m] = scale * Q[b,h,p,e] * K[b,h,m,e]               :: sum(e)
    W[b,h,p,m]  = relu(QK[b,h,p,m]) ** 2 * exp2((m - p) / HALF[h])
    SD[b,h,p]   = W[b,h,p,m]                                    :: sum(m)
    AV[b,h,p,f] = W[b,h,p,m] * V[b,h,m,f] / (SD[b,h,p] + 1)     :: sum(m)
    out AV
    """,
    name="fading_attention.cascade",
)


def formula(
    q: torch.Tensor,  # (B, H, P, E)
    k: torch.Tensor,  # (B, H, M, E)
    v: torch.Tensor,  # (B, H, M, F)
    half: torch.Tensor,  # (H,)
) -> torch.Tensor:
    """Compute the same with the whole matrix of scores in memory."""
    i = torch.arange(q.shape[-2], device=q.device)
    j = torch.arange(k.shape[-2], device=q.device)
    distance = (j[None, :] - i[:, None]).to(q.dtype)
    # A key ahead would be weighted by a power that overflows, so its distance is set before the power is taken.
    fade = torch.where(distance <= 0, torch.exp2(distance.clamp(max=0) / half[:, None, None]), 0.0)
    weights = torch.relu(q @ k.mT * q.shape[-1] ** -0.5) ** 2 * fade
    return weights @ v / (weights.sum(-1, keepdim=True) + 1)


def main() -> None:
    """Print each step, and compare."""
    # The text divides after the sum over keys has begun: two passes as written, one after the division is deferred.
    derivation = ec.derive(FADING)
    print(str(derivation).splitlines()[0])

    # The kernel, for a GPU that need not be here. Tiles after the diagonal are not visited: hi_m ends the loop there.
    op = ec.compile(FADING)
    source = op.kernel(extents={"E": 64, "F": 64}, dtype="bfloat16", target="cuda:90").source
    print(*(line for line in source.splitlines() if "hi_m" in line or "for start_m" in line), sep="\n")

    # The op takes tensors in the order of `in`, or by name.
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.randn(2, 4, 300, 64, device=device) for _ in range(3))
    half = torch.tensor([4.0, 16.0, 64.0, 256.0], device=device)
    out = op(q, k, v, HALF=half)

    # The formula in float64 is the truth here; the formula in float32 shows what rounding alone does.
    truth = formula(q.double(), k.double(), v.double(), half.double())
    ours = (out - truth).abs().max().item()
    plain = (formula(q, k, v, half) - truth).abs().max().item()
    print(f"largest error: kernel {ours:.1e}, formula in float32 {plain:.1e}")
    assert ours <= 4 * plain + 1e-7, "the op and the formula disagree"


if __name__ == "__main__":
    main()
