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
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr,
):
    # A: (P, K); W: (K, M); Y: (P, M)
    i_p = tl.program_id(0)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    r_k0 = tl.arange(0, BLOCK_K)
    o_m = tl.arange(0, M)
    # init RY[p, m, 0] = -inf
    b_RY = tl.full([BLOCK_P, M], float("-inf"), tl.float32)
    full_hi_k = K // BLOCK_K * BLOCK_K
    p_A = A
    o_A = o_p.to(tl.int64)[:, None] * stride_A_p + r_k0.to(tl.int64)[None, :] * stride_A_k
    p_W = W
    o_W = r_k0.to(tl.int64)[:, None] * stride_W_k + o_m.to(tl.int64)[None, :] * stride_W_m
    step_A = tl.cast(stride_A_k, tl.int64) * BLOCK_K
    step_W = tl.cast(stride_W_k, tl.int64) * BLOCK_K
    # tiles whose points are all live
    for start_k in tl.range(0, full_hi_k, BLOCK_K):
        b_A = tl.load(p_A + o_A, mask=(o_p < P)[:, None], other=0.0)  # [BLOCK_P, BLOCK_K]
        b_W = tl.load(p_W + o_W)  # [BLOCK_K, M]
        # LY[p, m, k1] = A[p, k1 * K0 + k0] + W[k1 * K0 + k0, m] :: max(k0)
        b_LY = tl.max(b_A.to(tl.float32)[:, :, None] + b_W.to(tl.float32)[None, :, :], axis=1)  # [BLOCK_P, M]
        # RY[p, m, k1 + 1] = max(RY[p, m, k1], LY[p, m, k1])
        b_RY = tl.maximum(b_RY, b_LY)  # [BLOCK_P, M]
        p_A += step_A
        p_W += step_W
    # tiles that test k < K
    for start_k in tl.range(full_hi_k, K, BLOCK_K):
        o_k = start_k + r_k0
        b_A = tl.load(p_A + o_A, mask=(o_p < P)[:, None] & (o_k < K)[None, :], other=0.0)  # [BLOCK_P, BLOCK_K]
        b_W = tl.load(p_W + o_W, mask=(o_k < K)[:, None], other=0.0)  # [BLOCK_K, M]
        b_LY = tl.max(tl.where((o_k < K)[None, :, None], b_A.to(tl.float32)[:, :, None] + b_W.to(tl.float32)[None, :, :], float("-inf")), axis=1)  # [BLOCK_P, M]
        b_RY = tl.maximum(b_RY, b_LY)  # [BLOCK_P, M]
        p_A += step_A
        p_W += step_W
    p_Y = Y
    o_Y = o_p.to(tl.int64)[:, None] * stride_Y_p + o_m.to(tl.int64)[None, :] * stride_Y_m
    # Y[p, m] = RY[p, m, K1]
    tl.store(p_Y + o_Y, b_RY.to(Y.dtype.element_ty), mask=(o_p < P)[:, None])
