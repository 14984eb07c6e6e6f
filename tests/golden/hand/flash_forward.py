"""Softmax attention forward by hand: the text that generated forward kernels are held against."""

import triton
import triton.language as tl


@triton.jit
def flash_forward(
    Q,  # [B, H, P, E]
    K,  # [B, H, M, E]
    V,  # [B, H, M, F], E = F = D
    AV,  # [B, H, P, F]
    LSE,  # [B, H, P], base 2, float32, contiguous
    stride_qb, stride_qh, stride_qp,
    stride_kb, stride_kh, stride_km,
    stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_op,
    H,
    P,
    M,
    scale,  # log2(e) / sqrt(E): exponentials are powers of two
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    # Longest rows first: a causal row block reads as many keys as its index says.
    i_p = tl.num_programs(0) - 1 - tl.program_id(0)
    i_bh = tl.program_id(1)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_m = tl.arange(0, BLOCK_M)
    o_e = tl.arange(0, D)
    m_p = o_p < P

    p_q = Q + i_b * stride_qb + i_h * stride_qh + o_p.to(tl.int64)[:, None] * stride_qp + o_e[None, :]
    # One scalar pointer moves along a tensor. Addresses derived from the loop index instead make ptxas serialise every
    # product on sm_90; a tile of moving pointers spills.
    p_k = K + i_b * stride_kb + i_h * stride_kh
    o_k = o_m.to(tl.int64)[:, None] * stride_km + o_e[None, :]
    p_v = V + i_b * stride_vb + i_h * stride_vh
    o_v = o_m.to(tl.int64)[:, None] * stride_vm + o_e[None, :]

    b_q = tl.load(p_q, mask=m_p[:, None], other=0.0)  # [BLOCK_P, D]
    # Unscaled, so that a score costs one fused multiply-add: s * scale - rm * scale.
    b_rm = tl.full([BLOCK_P], float("-inf"), tl.float32)
    b_rd = tl.zeros([BLOCK_P], tl.float32)
    b_rnv = tl.zeros([BLOCK_P, D], tl.float32)

    # Keys [0, full) are read by every row of the block, keys [full, end) by some.
    if CAUSAL:
        end = tl.minimum(M, (i_p + 1) * BLOCK_P)
        full = tl.minimum(M, i_p * BLOCK_P + 1) // BLOCK_M * BLOCK_M
    else:
        end = M
        full = M // BLOCK_M * BLOCK_M

    for start in tl.range(0, full, BLOCK_M):
        b_k = tl.load(p_k + o_k)  # [BLOCK_M, D]
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_P, BLOCK_M]
        b_rm_new = tl.maximum(b_rm, tl.max(b_qk, 1))
        b_ms = b_rm_new * scale
        b_c = tl.math.exp2(b_rm * scale - b_ms)
        b_sn = tl.math.exp2(b_qk * scale - b_ms[:, None])
        b_rd = b_rd * b_c + tl.sum(b_sn, 1)
        b_v = tl.load(p_v + o_v)  # [BLOCK_M, D]
        b_rnv = tl.dot(b_sn.to(b_v.dtype), b_v, b_rnv * b_c[:, None], input_precision="ieee")
        b_rm = b_rm_new
        p_k += BLOCK_M * stride_km
        p_v += BLOCK_M * stride_vm

    for start in tl.range(full, end, BLOCK_M):
        m_m = start + o_m < M
        b_k = tl.load(p_k + o_k, mask=m_m[:, None], other=0.0)
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        m_qk = m_m[None, :]
        if CAUSAL:
            m_qk = m_qk & (start + o_m[None, :] <= o_p[:, None])
        b_qk = tl.where(m_qk, b_qk, float("-inf"))
        b_rm_new = tl.maximum(b_rm, tl.max(b_qk, 1))
        # A row without a key so far keeps -inf; subtracting 0 instead gives exp2(-inf) = 0.
        b_ms = tl.where(b_rm_new == float("-inf"), 0.0, b_rm_new * scale)
        b_c = tl.math.exp2(b_rm * scale - b_ms)
        b_sn = tl.math.exp2(b_qk * scale - b_ms[:, None])
        b_rd = b_rd * b_c + tl.sum(b_sn, 1)
        b_v = tl.load(p_v + o_v, mask=m_m[:, None], other=0.0)
        b_rnv = tl.dot(b_sn.to(b_v.dtype), b_v, b_rnv * b_c[:, None], input_precision="ieee")
        b_rm = b_rm_new
        p_k += BLOCK_M * stride_km
        p_v += BLOCK_M * stride_vm

    b_rd_safe = tl.where(b_rd == 0.0, 1.0, b_rd)
    b_av = b_rnv / b_rd_safe[:, None]
    p_av = AV + i_b * stride_ob + i_h * stride_oh + o_p.to(tl.int64)[:, None] * stride_op + o_e[None, :]
    tl.store(p_av, b_av.to(AV.dtype.element_ty), mask=m_p[:, None])
    b_lse = tl.where(b_rd == 0.0, float("-inf"), b_rm * scale + tl.math.log2(b_rd_safe))
    tl.store(LSE + i_bh.to(tl.int64) * P + o_p, b_lse, mask=m_p)
