"""max_plus: generated from the cascade below.

    in A[p, k], W[k, m]
    Y[p, m] = A[p, k] + W[k, m] :: max(k)
    out Y

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P"])
def max_plus_kernel(
    A, W, Y,
    stride_A_p, stride_A_k,
    stride_W_k, stride_W_m,
    stride_Y_p, stride_Y_m,
    P, K,
    BLOCK_P: tl.constexpr, M: tl.constexpr,
):
    # A: (P, K); W: (K, M); Y: (P, M)
    i_p = tl.program_id(0)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_m = tl.arange(0, M)
    # init RY[p, m, 0] = -inf
    b_RY = tl.full([BLOCK_P, M], float("-inf"), tl.float32)
    # steps of k1
    for i_k1 in tl.range(0, K):
        p_A = A + tl.cast(i_k1, tl.int64) * stride_A_k
        o_A = o_p.to(tl.int64) * stride_A_p
        b_A = tl.load(p_A + o_A, mask=o_p < P, other=0.0)  # [BLOCK_P]
        p_W = W + tl.cast(i_k1, tl.int64) * stride_W_k
        o_W = o_m.to(tl.int64) * stride_W_m
        b_W = tl.load(p_W + o_W)  # [M]
        # LY[p, m, k1] = A[p, k1] + W[k1, m]
        b_LY = b_A.to(tl.float32)[:, None] + b_W.to(tl.float32)[None, :]  # [BLOCK_P, M]
        # RY[p, m, k1 + 1] = max(RY[p, m, k1], LY[p, m, k1])
        b_RY = tl.maximum(b_RY, b_LY)  # [BLOCK_P, M]
    p_Y = Y
    o_Y = o_p.to(tl.int64)[:, None] * stride_Y_p + o_m.to(tl.int64)[None, :] * stride_Y_m
    # Y[p, m] = RY[p, m, K1]
    tl.store(p_Y + o_Y, b_RY.to(Y.dtype.element_ty), mask=(o_p < P)[:, None])
