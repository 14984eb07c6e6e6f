"""softmax_1p: generated from the cascade below.

    in Q[b, h, p, e], K[b, h, m, e], V[b, h, m, f]
    const scale = E ** -0.5
    rank m0 = 64
    rank m1 = (M + M0 - 1) // M0
    constraint m1 * M0 + m0 < M
    init RM[b, h, 0, p] = -inf
    init RD[b, h, 0, p] = 0
    init RNV[b, h, 0, p, f] = 0
    iter m1:
      QK[b, h, m1, m0, p] = scale * Q[b, h, p, e] * K[b, h, m1 * M0 + m0, e] :: sum(e)
      LM[b, h, m1, p] = QK[b, h, m1, m0, p] :: max(m0)
      RM[b, h, m1 + 1, p] = max(RM[b, h, m1, p], LM[b, h, m1, p])
      SLN[b, h, m1, m0, p] = exp(QK[b, h, m1, m0, p] - RM[b, h, m1 + 1, p])
      SLD[b, h, m1, p] = SLN[b, h, m1, m0, p] :: sum(m0)
      SLNV[b, h, m1, p, f] = SLN[b, h, m1, m0, p] * V[b, h, m1 * M0 + m0, f] :: sum(m0)
      PRM[b, h, m1, p] = exp(RM[b, h, m1, p] - RM[b, h, m1 + 1, p])
      RD[b, h, m1 + 1, p] = PRM[b, h, m1, p] * RD[b, h, m1, p] + SLD[b, h, m1, p]
      RNV[b, h, m1 + 1, p, f] = PRM[b, h, m1, p] * RNV[b, h, m1, p, f] + SLNV[b, h, m1, p, f]
    end
    AV[b, h, p, f] = RNV[b, h, M1, p, f] / RD[b, h, M1, p]
    out AV

b_X is a block of X, p_X a pointer, o_x coordinates of a rank, i_x an index, r_x positions in a tile. A running state
begins with R, what one tile adds to it with L, and what moves a state to a new reference with C.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "H", "P", "M", "M1"])
def softmax_1p_kernel(
    Q, K, V, AV,
    stride_Q_b, stride_Q_h, stride_Q_p, stride_Q_e,
    stride_K_b, stride_K_h, stride_K_m, stride_K_e,
    stride_V_b, stride_V_h, stride_V_m, stride_V_f,
    stride_AV_b, stride_AV_h, stride_AV_p, stride_AV_f,
    B, H, P, M, M1,
    M0: tl.constexpr, BLOCK_P: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
):
    # Q: (B, H, P, E); K: (B, H, M, E); V: (B, H, M, F); AV: (B, H, P, F)
    scale = 0.125  # E ** -0.5
    pid = tl.program_id(0)
    i_p = pid % tl.cdiv(P, BLOCK_P)
    pid = pid // tl.cdiv(P, BLOCK_P)
    i_h = (pid % H).to(tl.int64)
    pid = pid // H
    i_b = pid.to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    r_m0 = tl.arange(0, M0)
    o_f = tl.arange(0, F)
    o_e = tl.arange(0, E)
    p_Q = Q + i_b * stride_Q_b + i_h * stride_Q_h
    o_Q = o_p.to(tl.int64)[:, None] * stride_Q_p + o_e.to(tl.int64)[None, :] * stride_Q_e
    b_Q = tl.load(p_Q + o_Q, mask=(o_p < P)[:, None], other=0.0)  # [BLOCK_P, E]
    # init RM[b, h, 0, p] = -inf
    b_RM = tl.full([BLOCK_P], float("-inf"), tl.float32)
    # init RD[b, h, 0, p] = 0
    b_RD = tl.full([BLOCK_P], 0, tl.float32)
    # init RNV[b, h, 0, p, f] = 0
    b_RNV = tl.full([BLOCK_P, F], 0, tl.float32)
    hi_m = M1 * M0
    full_hi_m = tl.minimum(M, hi_m) // M0 * M0
    p_K = K + i_b * stride_K_b + i_h * stride_K_h
    o_K = r_m0.to(tl.int64)[:, None] * stride_K_m + o_e.to(tl.int64)[None, :] * stride_K_e
    p_V = V + i_b * stride_V_b + i_h * stride_V_h
    o_V = r_m0.to(tl.int64)[:, None] * stride_V_m + o_f.to(tl.int64)[None, :] * stride_V_f
    step_K = tl.cast(stride_K_m, tl.int64) * M0
    step_V = tl.cast(stride_V_m, tl.int64) * M0
    # tiles whose points are all live
    for start_m in tl.range(0, full_hi_m, M0):
        b_K = tl.load(p_K + o_K)  # [M0, E]
        # QK[b, h, m1, m0, p] = scale * Q[b, h, p, e] * K[b, h, m1 * M0 + m0, e] :: sum(e)
        b_QK = tl.dot(b_Q, tl.trans(b_K), input_precision="ieee")  # [BLOCK_P, M0]
        b_QK = b_QK * scale  # [BLOCK_P, M0]
        # LM[b, h, m1, p] = QK[b, h, m1, m0, p] :: max(m0)
        b_LM = tl.max(b_QK, axis=1)  # [BLOCK_P]
        # RM[b, h, m1 + 1, p] = max(RM[b, h, m1, p], LM[b, h, m1, p] * 1.4426950408889634)
        b_RM_new = tl.maximum(b_RM, b_LM * 1.4426950408889634)  # [BLOCK_P]
        # SLN[b, h, m1, m0, p] = exp2(QK[b, h, m1, m0, p] * 1.4426950408889634 - RM[b, h, m1 + 1, p])
        b_SLN = tl.math.exp2(b_QK * 1.4426950408889634 - b_RM_new[:, None])  # [BLOCK_P, M0]
        # SLD[b, h, m1, p] = SLN[b, h, m1, m0, p] :: sum(m0)
        b_SLD = tl.sum(b_SLN, axis=1)  # [BLOCK_P]
        b_V = tl.load(p_V + o_V)  # [M0, F]
        # PRM[b, h, m1, p] = exp2(RM[b, h, m1, p] - RM[b, h, m1 + 1, p])
        b_PRM = tl.math.exp2(b_RM - b_RM_new)  # [BLOCK_P]
        # RD[b, h, m1 + 1, p] = PRM[b, h, m1, p] * RD[b, h, m1, p] + SLD[b, h, m1, p]
        b_RD = b_PRM * b_RD + b_SLD  # [BLOCK_P]
        # RNV[b, h, m1 + 1, p, f] = PRM[b, h, m1, p] * RNV[b, h, m1, p, f] + SLNV[b, h, m1, p, f]
        b_RNV = b_PRM[:, None] * b_RNV  # [BLOCK_P, F]
        # SLNV[b, h, m1, p, f] = SLN[b, h, m1, m0, p] * V[b, h, m1 * M0 + m0, f] :: sum(m0)
        b_RNV = tl.dot(b_SLN.to(b_V.dtype), b_V, b_RNV, input_precision="ieee")  # [BLOCK_P, F]
        b_RM = b_RM_new  # [BLOCK_P]
        p_K += step_K
        p_V += step_V
    # tiles that test m < M
    for start_m in tl.range(full_hi_m, hi_m, M0):
        o_m = start_m + r_m0
        b_K = tl.load(p_K + o_K, mask=(o_m < M)[:, None], other=0.0)  # [M0, E]
        b_QK = tl.dot(b_Q, tl.trans(b_K), input_precision="ieee")  # [BLOCK_P, M0]
        b_QK = b_QK * scale  # [BLOCK_P, M0]
        # culled points hold the identity of the reduction that follows
        b_QK = tl.where((o_m < M)[None, :], b_QK, float("-inf"))  # [BLOCK_P, M0]
        b_LM = tl.max(b_QK, axis=1)  # [BLOCK_P]
        b_RM_new = tl.maximum(b_RM, b_LM * 1.4426950408889634)  # [BLOCK_P]
        b_SLN = tl.math.exp2(b_QK * 1.4426950408889634 - tl.where(b_RM_new == float("-inf"), 0.0, b_RM_new)[:, None])  # [BLOCK_P, M0]
        b_SLD = tl.sum(b_SLN, axis=1)  # [BLOCK_P]
        b_V = tl.load(p_V + o_V, mask=(o_m < M)[:, None], other=0.0)  # [M0, F]
        b_PRM = tl.math.exp2(b_RM - tl.where(b_RM_new == float("-inf"), 0.0, b_RM_new))  # [BLOCK_P]
        b_RD = b_PRM * b_RD + b_SLD  # [BLOCK_P]
        b_RNV = b_PRM[:, None] * b_RNV  # [BLOCK_P, F]
        b_RNV = tl.dot(b_SLN.to(b_V.dtype), b_V, b_RNV, input_precision="ieee")  # [BLOCK_P, F]
        b_RM = b_RM_new  # [BLOCK_P]
        p_K += step_K
        p_V += step_V
    # AV[b, h, p, f] = RNV[b, h, M1, p, f] / RD[b, h, M1, p]
    b_AV = b_RNV / tl.where(b_RD == 0.0, 1.0, b_RD)[:, None]  # [BLOCK_P, F]
    p_AV = AV + i_b * stride_AV_b + i_h * stride_AV_h
    o_AV = o_p.to(tl.int64)[:, None] * stride_AV_p + o_f.to(tl.int64)[None, :] * stride_AV_f
    tl.store(p_AV + o_AV, b_AV.to(AV.dtype.element_ty), mask=(o_p < P)[:, None])
