"""column_sums: generated from the cascade below.

    in X[p, m], V[m, f]
    C[m] = X[p, m] :: sum(p)
    S[p, m] = exp(X[p, m] - C[m])
    Y[p, f] = S[p, m] * V[m, f] :: sum(m)
    out Y

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P"])
def column_sums_0_kernel(
    X, C,
    stride_X_p, stride_X_m,
    stride_C_m,
    M, P,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):
    # X: (P, M); C: (M)
    i_m = tl.program_id(0)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    r_p0 = tl.arange(0, BLOCK_P)
    # init RC[m, 0] = 0
    b_RC = tl.full([BLOCK_M], 0, tl.float32)
    full_hi_p = P // BLOCK_P * BLOCK_P
    p_X = X
    o_X = r_p0.to(tl.int64)[:, None] * stride_X_p + o_m.to(tl.int64)[None, :] * stride_X_m
    step_X = tl.cast(stride_X_p, tl.int64) * BLOCK_P
    # tiles whose points are all live
    for start_p in tl.range(0, full_hi_p, BLOCK_P):
        b_X = tl.load(p_X + o_X, mask=(o_m < M)[None, :], other=0.0)  # [BLOCK_P, BLOCK_M]
        # LC[m, p1] = X[p1 * P0 + p0, m] :: sum(p0)
        b_LC = tl.sum(tl.trans(b_X.to(tl.float32)), axis=1)  # [BLOCK_M]
        # RC[m, p1 + 1] = RC[m, p1] + LC[m, p1]
        b_RC = b_RC + b_LC  # [BLOCK_M]
        p_X += step_X
    # tiles that test p < P
    for start_p in tl.range(full_hi_p, P, BLOCK_P):
        o_p = start_p + r_p0
        b_X = tl.load(p_X + o_X, mask=tl.trans((o_p < P)[None, :] & (o_m < M)[:, None]), other=0.0)  # [BLOCK_P, BLOCK_M]
        b_LC = tl.sum(tl.trans(b_X.to(tl.float32)), axis=1)  # [BLOCK_M]
        b_RC = b_RC + b_LC  # [BLOCK_M]
        p_X += step_X
    p_C = C
    o_C = o_m.to(tl.int64) * stride_C_m
    # C[m] = RC[m, P1]
    tl.store(p_C + o_C, b_RC.to(C.dtype.element_ty), mask=o_m < M)


@triton.jit(do_not_specialize=["P"])
def column_sums_1_kernel(
    X, V, C, Y,
    stride_X_p, stride_X_m,
    stride_V_m, stride_V_f,
    stride_C_m,
    stride_Y_p, stride_Y_f,
    P, M,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, F: tl.constexpr,
):
    # X: (P, M); V: (M, F); C: (M); Y: (P, F)
    i_p = tl.program_id(0)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    r_m0 = tl.arange(0, BLOCK_M)
    o_f = tl.arange(0, F)
    # init RY[p, f, 0] = 0
    b_RY = tl.full([BLOCK_P, F], 0, tl.float32)
    full_hi_m = M // BLOCK_M * BLOCK_M
    p_X = X
    o_X = o_p.to(tl.int64)[:, None] * stride_X_p + r_m0.to(tl.int64)[None, :] * stride_X_m
    p_C = C
    o_C = r_m0.to(tl.int64) * stride_C_m
    p_V = V
    o_V = r_m0.to(tl.int64)[:, None] * stride_V_m + o_f.to(tl.int64)[None, :] * stride_V_f
    step_X = tl.cast(stride_X_m, tl.int64) * BLOCK_M
    step_C = tl.cast(stride_C_m, tl.int64) * BLOCK_M
    step_V = tl.cast(stride_V_m, tl.int64) * BLOCK_M
    # tiles whose points are all live
    for start_m in tl.range(0, full_hi_m, BLOCK_M):
        b_X = tl.load(p_X + o_X, mask=(o_p < P)[:, None], other=0.0)  # [BLOCK_P, BLOCK_M]
        b_C = tl.load(p_C + o_C)  # [BLOCK_M]
        # S[p, m1, m0] = exp2(X[p, m1 * M0 + m0] * 1.4426950408889634 - C[m1 * M0 + m0] * 1.4426950408889634)
        b_S = tl.math.exp2(b_X.to(tl.float32) * 1.4426950408889634 - tl.maximum(b_C.to(tl.float32) * 1.4426950408889634, -3.4028234663852886e+38)[None, :])  # [BLOCK_P, BLOCK_M]
        b_V = tl.load(p_V + o_V)  # [BLOCK_M, F]
        # LY[p, f, m1] = S[p, m1, m0] * V[m1 * M0 + m0, f] :: sum(m0)
        b_RY = tl.dot(b_S.to(b_V.dtype), b_V, b_RY, input_precision="ieee")  # [BLOCK_P, F]
        p_X += step_X
        p_C += step_C
        p_V += step_V
    # tiles that test m < M
    for start_m in tl.range(full_hi_m, M, BLOCK_M):
        o_m = start_m + r_m0
        b_X = tl.load(p_X + o_X, mask=(o_p < P)[:, None] & (o_m < M)[None, :], other=0.0)  # [BLOCK_P, BLOCK_M]
        b_C = tl.load(p_C + o_C, mask=o_m < M, other=0.0)  # [BLOCK_M]
        b_S = tl.math.exp2(b_X.to(tl.float32) * 1.4426950408889634 - tl.maximum(b_C.to(tl.float32) * 1.4426950408889634, -3.4028234663852886e+38)[None, :])  # [BLOCK_P, BLOCK_M]
        b_V = tl.load(p_V + o_V, mask=(o_m < M)[:, None], other=0.0)  # [BLOCK_M, F]
        b_RY = tl.dot(b_S.to(b_V.dtype), b_V, b_RY, input_precision="ieee")  # [BLOCK_P, F]
        p_X += step_X
        p_C += step_C
        p_V += step_V
    p_Y = Y
    o_Y = o_p.to(tl.int64)[:, None] * stride_Y_p + o_f.to(tl.int64)[None, :] * stride_Y_f
    # Y[p, f] = RY[p, f, M1]
    tl.store(p_Y + o_Y, b_RY.to(Y.dtype.element_ty), mask=(o_p < P)[:, None])
