"""softmax_attention: generated from the cascade below.

    in Q[b, h, p, e], K[b, h, m, e], V[b, h, m, f]
    const scale = E ** -0.5
    constraint m <= p
    QK[b, h, p, m] = scale * Q[b, h, p, e] * K[b, h, m, e] :: sum(e)
    GM[b, h, p] = QK[b, h, p, m] :: max(m)
    SN[b, h, p, m] = exp(QK[b, h, p, m] - GM[b, h, p])
    SD[b, h, p] = SN[b, h, p, m] :: sum(m)
    A[b, h, p, m] = SN[b, h, p, m] / SD[b, h, p]
    AV[b, h, p, f] = A[b, h, p, m] * V[b, h, m, f] :: sum(m)
    out AV

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "H", "P", "M"])
def softmax_attention_kernel(
    Q, K, V, AV,
    stride_Q_b, stride_Q_h, stride_Q_p, stride_Q_e,
    stride_K_b, stride_K_h, stride_K_m, stride_K_e,
    stride_V_b, stride_V_h, stride_V_m, stride_V_f,
    stride_AV_b, stride_AV_h, stride_AV_p, stride_AV_f,
    B, H, P, M,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
):
    # Q: (B, H, P, E); K: (B, H, M, E); V: (B, H, M, F); AV: (B, H, P, F)
    scale = 0.125  # E ** -0.5
    scale_log2e = scale * 1.4426950408889634
    pid = tl.program_id(0)
    i_p = tl.cdiv(P, BLOCK_P) - 1 - pid % tl.cdiv(P, BLOCK_P)
    pid = pid // tl.cdiv(P, BLOCK_P)
    i_h = (pid % H).to(tl.int64)
    pid = pid // H
    i_b = pid.to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    first_p = i_p * BLOCK_P
    last_p = tl.minimum(first_p + BLOCK_P, P) - 1
    r_m0 = tl.arange(0, BLOCK_M)
    o_f = tl.arange(0, F)
    o_e = tl.arange(0, E)
    p_Q = Q + i_b * stride_Q_b + i_h * stride_Q_h
    o_Q = o_p.to(tl.int64)[:, None] * stride_Q_p + o_e.to(tl.int64)[None, :] * stride_Q_e
    b_Q = tl.load(p_Q + o_Q, mask=(o_p < P)[:, None], other=0.0)  # [BLOCK_P, E]
    # init RGMN[b, h, p, 0] = -inf
    b_RGMN = tl.full([BLOCK_P], float("-inf"), tl.float32)
    # init RSD[b, h, p, 0] = 0
    b_RSD = tl.full([BLOCK_P], 0, tl.float32)
    # init RAVN[b, h, p, f, 0] = 0
    b_RAVN = tl.full([BLOCK_P, F], 0, tl.float32)
    hi_m = tl.minimum(M, last_p + 1)
    full_hi_m = tl.minimum(M, first_p + 1) // BLOCK_M * BLOCK_M
    p_K = K + i_b * stride_K_b + i_h * stride_K_h
    o_K = r_m0.to(tl.int64)[:, None] * stride_K_m + o_e.to(tl.int64)[None, :] * stride_K_e
    p_V = V + i_b * stride_V_b + i_h * stride_V_h
    o_V = r_m0.to(tl.int64)[:, None] * stride_V_m + o_f.to(tl.int64)[None, :] * stride_V_f
    step_K = tl.cast(stride_K_m, tl.int64) * BLOCK_M
    step_V = tl.cast(stride_V_m, tl.int64) * BLOCK_M
    # tiles whose points are all live
    for start_m in tl.range(0, full_hi_m, BLOCK_M):
        b_K = tl.load(p_K + o_K)  # [BLOCK_M, E]
        # QKN[b, h, p, m1, m0] = Q[b, h, p, e] * K[b, h, m1 * M0 + m0, e] :: sum(e)
        b_QKN = tl.dot(b_Q, tl.trans(b_K), input_precision="ieee")  # [BLOCK_P, BLOCK_M]
        # LGMN[b, h, p, m1] = QKN[b, h, p, m1, m0] :: max(m0)
        b_LGMN = tl.max(b_QKN, axis=1)  # [BLOCK_P]
        # RGMN[b, h, p, m1 + 1] = max(RGMN[b, h, p, m1], LGMN[b, h, p, m1] * (scale * 1.4426950408889634))
        b_RGMN_new = tl.maximum(b_RGMN, b_LGMN * scale_log2e)  # [BLOCK_P]
        # SN[b, h, p, m1, m0] = exp2(QKN[b, h, p, m1, m0] * (scale * 1.4426950408889634) - RGMN[b, h, p, m1 + 1])
        b_SN = tl.math.exp2(b_QKN * scale_log2e - b_RGMN_new[:, None])  # [BLOCK_P, BLOCK_M]
        # LSD[b, h, p, m1] = SN[b, h, p, m1, m0] :: sum(m0)
        b_LSD = tl.sum(b_SN, axis=1)  # [BLOCK_P]
        # CGM[b, h, p, m1] = exp2(RGMN[b, h, p, m1] - RGMN[b, h, p, m1 + 1])
        b_CGM = tl.math.exp2(b_RGMN - b_RGMN_new)  # [BLOCK_P]
        # RSD[b, h, p, m1 + 1] = CGM[b, h, p, m1] * RSD[b, h, p, m1] + LSD[b, h, p, m1]
        b_RSD = b_CGM * b_RSD + b_LSD  # [BLOCK_P]
        b_V = tl.load(p_V + o_V)  # [BLOCK_M, F]
        # RAVN[b, h, p, f, m1 + 1] = CGM[b, h, p, m1] * RAVN[b, h, p, f, m1] + LAVN[b, h, p, f, m1]
        b_RAVN = b_CGM[:, None] * b_RAVN  # [BLOCK_P, F]
        # LAVN[b, h, p, f, m1] = SN[b, h, p, m1, m0] * V[b, h, m1 * M0 + m0, f] :: sum(m0)
        b_RAVN = tl.dot(b_SN.to(b_V.dtype), b_V, b_RAVN, input_precision="ieee")  # [BLOCK_P, F]
        b_RGMN = b_RGMN_new  # [BLOCK_P]
        p_K += step_K
        p_V += step_V
    # tiles that test m < M and m <= p
    for start_m in tl.range(full_hi_m, hi_m, BLOCK_M):
        o_m = start_m + r_m0
        b_K = tl.load(p_K + o_K, mask=(o_m < M)[:, None], other=0.0)  # [BLOCK_M, E]
        b_QKN = tl.dot(b_Q, tl.trans(b_K), input_precision="ieee")  # [BLOCK_P, BLOCK_M]
        m_live = (o_m < M)[None, :] & (o_m[None, :] <= o_p[:, None])
        # culled points hold the identity of the reduction that follows
        b_QKN = tl.where(m_live, b_QKN, float("-inf"))  # [BLOCK_P, BLOCK_M]
        b_LGMN = tl.max(b_QKN, axis=1)  # [BLOCK_P]
        b_RGMN_new = tl.maximum(b_RGMN, b_LGMN * scale_log2e)  # [BLOCK_P]
        b_SN = tl.math.exp2(b_QKN * scale_log2e - tl.where(b_RGMN_new == float("-inf"), 0.0, b_RGMN_new)[:, None])  # [BLOCK_P, BLOCK_M]
        b_LSD = tl.sum(b_SN, axis=1)  # [BLOCK_P]
        b_CGM = tl.math.exp2(b_RGMN - tl.where(b_RGMN_new == float("-inf"), 0.0, b_RGMN_new))  # [BLOCK_P]
        b_RSD = b_CGM * b_RSD + b_LSD  # [BLOCK_P]
        b_V = tl.load(p_V + o_V, mask=(o_m < M)[:, None], other=0.0)  # [BLOCK_M, F]
        b_RAVN = b_CGM[:, None] * b_RAVN  # [BLOCK_P, F]
        b_RAVN = tl.dot(b_SN.to(b_V.dtype), b_V, b_RAVN, input_precision="ieee")  # [BLOCK_P, F]
        b_RGMN = b_RGMN_new  # [BLOCK_P]
        p_K += step_K
        p_V += step_V
    # AV[b, h, p, f] = RAVN[b, h, p, f, M1] / RSD[b, h, p, M1]
    b_AV = b_RAVN / tl.where(b_RSD == 0.0, 1.0, b_RSD)[:, None]  # [BLOCK_P, F]
    p_AV = AV + i_b * stride_AV_b + i_h * stride_AV_h
    o_AV = o_p.to(tl.int64)[:, None] * stride_AV_p + o_f.to(tl.int64)[None, :] * stride_AV_f
    tl.store(p_AV + o_AV, b_AV.to(AV.dtype.element_ty), mask=(o_p < P)[:, None])
