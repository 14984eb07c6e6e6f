"""linear: generated from the cascade below.

    in Q[b, h, p, e], K[b, h, m, e], V[b, h, m, f]
    FQ[b, h, p, e] = elu(Q[b, h, p, e]) + 1
    FK[b, h, m, e] = elu(K[b, h, m, e]) + 1
    KV[b, h, e, f] = FK[b, h, m, e] * V[b, h, m, f] :: sum(m)
    KS[b, h, e] = FK[b, h, m, e] :: sum(m)
    NV[b, h, p, f] = FQ[b, h, p, e] * KV[b, h, e, f] :: sum(e)
    SD[b, h, p] = FQ[b, h, p, e] * KS[b, h, e] :: sum(e)
    AV[b, h, p, f] = NV[b, h, p, f] / SD[b, h, p]
    out AV

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "H", "M"])
def linear_0_kernel(
    K, V, KV, KS,
    stride_K_b, stride_K_h, stride_K_m, stride_K_e,
    stride_V_b, stride_V_h, stride_V_m, stride_V_f,
    stride_KV_b, stride_KV_h, stride_KV_e, stride_KV_f,
    stride_KS_b, stride_KS_h, stride_KS_e,
    B, H, M,
    BLOCK_M: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
):
    # K: (B, H, M, E); V: (B, H, M, F); KV: (B, H, E, F); KS: (B, H, E)
    pid = tl.program_id(0)
    i_h = (pid % H).to(tl.int64)
    pid = pid // H
    i_b = pid.to(tl.int64)
    r_m0 = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, E)
    o_f = tl.arange(0, F)
    # init RKV[b, h, e, f, 0] = 0
    b_RKV = tl.full([E, F], 0, tl.float32)
    # init RKS[b, h, e, 0] = 0
    b_RKS = tl.full([E], 0, tl.float32)
    full_hi_m = M // BLOCK_M * BLOCK_M
    p_K = K + i_b * stride_K_b + i_h * stride_K_h
    o_K = r_m0.to(tl.int64)[:, None] * stride_K_m + o_e.to(tl.int64)[None, :] * stride_K_e
    p_V = V + i_b * stride_V_b + i_h * stride_V_h
    o_V = r_m0.to(tl.int64)[:, None] * stride_V_m + o_f.to(tl.int64)[None, :] * stride_V_f
    step_K = tl.cast(stride_K_m, tl.int64) * BLOCK_M
    step_V = tl.cast(stride_V_m, tl.int64) * BLOCK_M
    # tiles whose points are all live
    for start_m in tl.range(0, full_hi_m, BLOCK_M):
        b_K = tl.load(p_K + o_K)  # [BLOCK_M, E]
        tmp_0 = b_K.to(tl.float32)
        # FK[b, h, e, m1, m0] = elu(K[b, h, m1 * M0 + m0, e]) + 1
        b_FK = (tl.where(tmp_0 > 0, tmp_0, tl.math.exp2(tl.minimum(tmp_0, 0.0) * 1.4426950408889634) - 1.0)) + 1  # [BLOCK_M, E]
        b_V = tl.load(p_V + o_V)  # [BLOCK_M, F]
        # LKV[b, h, e, f, m1] = FK[b, h, e, m1, m0] * V[b, h, m1 * M0 + m0, f] :: sum(m0)
        b_RKV = tl.dot(tl.trans(b_FK.to(b_V.dtype)), b_V, b_RKV, input_precision="ieee")  # [E, F]
        # LKS[b, h, e, m1] = FK[b, h, e, m1, m0] :: sum(m0)
        b_LKS = tl.sum(b_FK, axis=0)  # [E]
        # RKS[b, h, e, m1 + 1] = RKS[b, h, e, m1] + LKS[b, h, e, m1]
        b_RKS = b_RKS + b_LKS  # [E]
        p_K += step_K
        p_V += step_V
    # tiles that test m < M
    for start_m in tl.range(full_hi_m, M, BLOCK_M):
        o_m = start_m + r_m0
        b_K = tl.load(p_K + o_K, mask=(o_m < M)[:, None], other=0.0)  # [BLOCK_M, E]
        tmp_0 = b_K.to(tl.float32)
        b_FK = (tl.where(tmp_0 > 0, tmp_0, tl.math.exp2(tl.minimum(tmp_0, 0.0) * 1.4426950408889634) - 1.0)) + 1  # [BLOCK_M, E]
        b_V = tl.load(p_V + o_V, mask=(o_m < M)[:, None], other=0.0)  # [BLOCK_M, F]
        b_RKV = tl.dot(tl.trans(b_FK.to(b_V.dtype)), b_V, b_RKV, input_precision="ieee")  # [E, F]
        # culled points hold the identity of the reduction that follows
        b_FK = tl.where((o_m < M)[:, None], b_FK, 0.0)  # [BLOCK_M, E]
        b_LKS = tl.sum(b_FK, axis=0)  # [E]
        b_RKS = b_RKS + b_LKS  # [E]
        p_K += step_K
        p_V += step_V
    p_KV = KV + i_b * stride_KV_b + i_h * stride_KV_h
    o_KV = o_e.to(tl.int64)[:, None] * stride_KV_e + o_f.to(tl.int64)[None, :] * stride_KV_f
    # KV[b, h, e, f] = RKV[b, h, e, f, M1]
    tl.store(p_KV + o_KV, b_RKV.to(KV.dtype.element_ty))
    p_KS = KS + i_b * stride_KS_b + i_h * stride_KS_h
    o_KS = o_e.to(tl.int64) * stride_KS_e
    # KS[b, h, e] = RKS[b, h, e, M1]
    tl.store(p_KS + o_KS, b_RKS.to(KS.dtype.element_ty))


@triton.jit(do_not_specialize=["B", "H", "P"])
def linear_1_kernel(
    Q, KV, KS, AV,
    stride_Q_b, stride_Q_h, stride_Q_p, stride_Q_e,
    stride_KV_b, stride_KV_h, stride_KV_e, stride_KV_f,
    stride_KS_b, stride_KS_h, stride_KS_e,
    stride_AV_b, stride_AV_h, stride_AV_p, stride_AV_f,
    B, H, P,
    BLOCK_P: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
):
    # Q: (B, H, P, E); KV: (B, H, E, F); KS: (B, H, E); AV: (B, H, P, F)
    pid = tl.program_id(0)
    i_p = pid % tl.cdiv(P, BLOCK_P)
    pid = pid // tl.cdiv(P, BLOCK_P)
    i_h = (pid % H).to(tl.int64)
    pid = pid // H
    i_b = pid.to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_e = tl.arange(0, E)
    o_f = tl.arange(0, F)
    p_Q = Q + i_b * stride_Q_b + i_h * stride_Q_h
    o_Q = o_p.to(tl.int64)[:, None] * stride_Q_p + o_e.to(tl.int64)[None, :] * stride_Q_e
    b_Q = tl.load(p_Q + o_Q, mask=(o_p < P)[:, None], other=0.0)  # [BLOCK_P, E]
    p_KV = KV + i_b * stride_KV_b + i_h * stride_KV_h
    o_KV = o_e.to(tl.int64)[:, None] * stride_KV_e + o_f.to(tl.int64)[None, :] * stride_KV_f
    b_KV = tl.load(p_KV + o_KV)  # [E, F]
    p_KS = KS + i_b * stride_KS_b + i_h * stride_KS_h
    o_KS = o_e.to(tl.int64) * stride_KS_e
    b_KS = tl.load(p_KS + o_KS)  # [E]
    tmp_0 = b_Q.to(tl.float32)
    # FQ[b, h, p, e] = elu(Q[b, h, p, e]) + 1
    b_FQ = (tl.where(tmp_0 > 0, tmp_0, tl.math.exp2(tl.minimum(tmp_0, 0.0) * 1.4426950408889634) - 1.0)) + 1  # [BLOCK_P, E]
    # NV[b, h, p, f] = FQ[b, h, p, e] * KV[b, h, e, f] :: sum(e)
    b_NV = tl.dot(b_FQ.to(Q.dtype.element_ty), b_KV.to(Q.dtype.element_ty), input_precision="ieee")  # [BLOCK_P, F]
    # SD[b, h, p] = FQ[b, h, p, e] * KS[b, h, e] :: sum(e)
    b_SD = tl.sum(b_FQ * b_KS.to(tl.float32)[None, :], axis=1)  # [BLOCK_P]
    tmp_1 = b_SD[:, None]
    # AV[b, h, p, f] = NV[b, h, p, f] / SD[b, h, p]
    b_AV = tl.where(b_NV == 0, tl.where(tmp_1 == 0, 0.0, b_NV / tmp_1), b_NV / tmp_1)  # [BLOCK_P, F]
    p_AV = AV + i_b * stride_AV_b + i_h * stride_AV_h
    o_AV = o_p.to(tl.int64)[:, None] * stride_AV_p + o_f.to(tl.int64)[None, :] * stride_AV_f
    tl.store(p_AV + o_AV, b_AV.to(AV.dtype.element_ty), mask=(o_p < P)[:, None])
