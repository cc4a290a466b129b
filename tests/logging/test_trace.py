"""A trace by part: told from what survives compilation, and adding up to the wall time."""

import csv

import pytest

from pdn.logging.trace import (
    BETWEEN,
    COMMUNICATION,
    COPIES,
    HEAD,
    IDLE,
    MIXER,
    MLP,
    OPTIMISER,
    STEPS,
    UPDATE,
    Products,
    by_part,
    lines,
    write,
)

D, INNER, VOCAB, TOKENS = 64, 160, 1000, 512
SHAPES = {
    "embedding.weight": (VOCAB, D),
    "blocks.0.mixer.q_proj.weight": (D, D),
    "blocks.0.mlp.gate_proj.weight": (INNER, D),
    "blocks.0.mlp.down_proj.weight": (D, INNER),
    "blocks.0.mlp_norm.weight": (D,),
}
PRODUCTS = Products.of(SHAPES, [TOKENS])


class Trace:
    """Writes down what a GPU does, launched by the host 1 us before; times in us."""

    def __init__(self):
        self.events = [span("user_annotation", STEPS, 0, 2000)]
        self.time, self.launches = 10, 0

    def kernel(self, name, dur, *within, stream=7, cat="kernel", at=None):
        """Add a kernel that was launched within operators, each a name or (name, shapes)."""
        start = self.time if at is None else at
        self.launches += 1
        for depth, operator in enumerate(within):
            called, shapes = operator if isinstance(operator, tuple) else (operator, [])
            kind = "user_annotation" if called == UPDATE else "cpu_op"
            begin, length = start - 2 + depth / 10, 2 - depth / 5
            self.events.append(span(kind, called, begin, length, args={"Input Dims": shapes}))
        number = {"correlation": self.launches}
        self.events.append(span("cuda_runtime", "cudaLaunchKernel", start - 1, 0.1, args=number))
        self.events.append(span(cat, name, start, dur, tid=0, args=number | {"stream": stream}))
        if at is None:
            self.time += dur + 5
        return self


def span(cat, name, ts, dur, tid=1, args=None):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": ts,
        "dur": dur,
        "tid": tid,
        "args": args or {},
    }


def product(*shapes):
    return ("aten::mm", [list(shape) for shape in shapes])


def compiled_step() -> Trace:
    """Return a step of one compiled block: nothing in it names a module."""
    trace, region = Trace(), "Torch-Compiled Region: 0/0"
    trace.kernel("Memcpy HtoD (Pinned -> Device)", 3, cat="gpu_memcpy")
    trace.kernel("gather", 10, "aten::embedding")
    trace.kernel("triton_red_fused_rms_norm_0", 4, region)
    trace.kernel("nvjet_tst", 100, region, product((TOKENS, D), (D, D)))
    trace.kernel("triton_poi_fused_silu_1", 20, region)
    trace.kernel("scan_kernel", 200, region, "pdn::chunk_forward")
    trace.kernel("nvjet_tst", 100, region, product((TOKENS, D), (D, D)))
    trace.kernel("triton_red_fused_add_rms_norm_2", 6, region)
    trace.kernel("nvjet_tst", 150, region, product((TOKENS, D), (D, INNER)))
    trace.kernel("triton_poi_fused_mul_silu_3", 30, region)
    trace.kernel("nvjet_tst", 150, region, product((TOKENS, INNER), (INNER, D)))
    trace.kernel("triton_red_fused_add_rms_norm_4", 8, region)
    trace.kernel("nvjet_tst", 90, product((TOKENS // 2, D), (D, VOCAB)))
    trace.kernel("triton_red_fused_logsumexp_0", 40)
    trace.kernel("nvjet_tst", 90, product((TOKENS // 2, VOCAB), (VOCAB, D)))
    # backward: the gradient of a weight, then our own kernel, launched by hand
    trace.kernel(
        "nvjet_tst", 150, "CompiledFunctionBackward", product((INNER, TOKENS), (TOKENS, D))
    )
    trace.kernel("gradient_kernel", 300, "CompiledFunctionBackward")
    trace.kernel("ncclDevKernel_AllReduce", 330, stream=20, at=trace.time - 305)
    trace.kernel("multi_tensor_apply", 60, UPDATE, "aten::_fused_adamw_")
    return trace


def test_each_kernel_of_a_compiled_step_goes_to_its_part():
    table = by_part(compiled_step().events, PRODUCTS, 1)
    found = {part: ms for part, (ms, _) in table.parts.items()}
    idle = found.pop(IDLE)
    assert found == pytest.approx(
        {
            MIXER: (100 + 20 + 200 + 100 + 300) / 1e3,
            MLP: (150 + 30 + 150 + 150) / 1e3,
            HEAD: (10 + 90 + 40 + 90) / 1e3,
            BETWEEN: (4 + 6 + 8) / 1e3,
            OPTIMISER: 0.06,
            COMMUNICATION: 0.005,  # the gap before the optimiser
            COPIES: 0.003,
        }
    )
    assert table.on_gpu and table.hidden_ms == pytest.approx(0.325)
    assert idle == pytest.approx(2.0 - sum(found.values()))
    assert table.added_up == pytest.approx(1) and table.named > 0.98


def test_a_product_that_two_parts_could_have_made_is_left_to_its_neighbours():
    both = Products.of(SHAPES | {"blocks.0.mlp.up_proj.weight": (D, D)}, [TOKENS])
    assert PRODUCTS.part([(TOKENS, D), (D, D)]) == MIXER
    assert both.part([(TOKENS, D), (D, D)]) is None
    assert both.part([(TOKENS, D), (D, INNER)]) == MLP
    assert PRODUCTS.part([(3, D), (D, D)]) is None  # of other things than tokens


def test_weights_that_read_the_same_may_be_one_product():
    names = "q_proj", "k_proj", "decay.rates.proj"
    sizes = dict(zip(names, [D, D, 8], strict=True))
    mixer = {f"blocks.0.mixer.{name}.weight": (rows, D) for name, rows in sizes.items()}
    both = SHAPES | {"blocks.0.mlp.up_proj.weight": (INNER, D)} | mixer
    products = Products.of(both, [TOKENS])
    assert products.part([(TOKENS, D), (D, 2 * INNER)]) == MLP
    assert products.part([(TOKENS, D), (D, 2 * D + 8)]) == MIXER
    assert products.part([(TOKENS, D), (D, 3 * D)]) == MIXER  # filled up
    assert products.part([(2 * D + 8, TOKENS), (TOKENS, D)]) == MIXER
    assert products.part([(TOKENS, D), (D, INNER + D)]) is None  # of two modules


def test_operators_of_a_cpu_count_their_own_time_once():
    events = [
        span("user_annotation", STEPS, 0, 1000),
        span("cpu_op", "aten::matmul", 100, 100),
        span("cpu_op", "aten::mm", 120, 70, args={"Input Dims": [[TOKENS, D], [D, INNER]]}),
        span("cpu_op", "aten::silu", 300, 50),
        span("cpu_op", "aten::mm", 400, 100, args={"Input Dims": [[TOKENS, INNER], [INNER, D]]}),
    ]
    table = by_part(events, PRODUCTS, 2)
    assert not table.on_gpu and table.added_up == pytest.approx(1)
    assert table.parts[MLP][0] == pytest.approx((70 + 10 + 50 + 100) / 2e3)  # 10 us after the first
    assert table.parts[BETWEEN][0] == pytest.approx(20 / 2e3)  # before it
    with pytest.raises(ValueError, match="no range"):
        by_part(events[1:], PRODUCTS, 2)


def test_the_table_is_printed_and_kept(tmp_path):
    table = by_part(compiled_step().events, PRODUCTS, 1)
    text = "\n".join(lines(table, 1.5))
    assert "of the GPU" in text and "the host waited for data 1.500 ms" in text
    assert "add up to 100.0%" in text and "gradient_kernel" in text
    write(table, tmp_path)
    with open(tmp_path / "parts.csv", newline="") as file:
        parts = {row["part"]: float(row["ms"]) for row in csv.DictReader(file)}
    assert parts[MIXER] == pytest.approx(0.72) and sum(parts.values()) == pytest.approx(2.0)
    with open(tmp_path / "kernels.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["part"], first["kernel"]) == (MLP, "nvjet_tst")
