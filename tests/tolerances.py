"""Every tolerance of the suite, with its reason.

Ops: relative L2 error per tensor against float64.
"""

# (outputs and states, dq dk dv, dg dbeta, preconditioner gradients)
OPS = {
    "fp64": (1e-10, 1e-10, 1e-10, 1e-10),  # same mathematics, other order of sums
    "fp32": (2e-6, 1e-5, 2e-5, 2e-5),  # one rounding a product, sums of up to 130 terms
    "fp32_gpu": (1e-5, 5e-5, 1e-4, 1e-4),  # tf32x3 products
    "bf16_gpu": (5e-3, 1e-2, 1.5e-2, 2e-2),  # bf16 operands, float32 accumulation
}
MAX_ABS_FACTOR = 20  # largest elementwise error allowed, in units of the relative L2 tolerance
SUM_FACTOR = 2  # gradients of per-head parameters are sums over every token, which largely cancel
