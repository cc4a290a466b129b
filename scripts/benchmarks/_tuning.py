"""Peers whose kernels are tuned at the first call: their candidates compiled at once, in threads.

By itself a tuner compiles them one after the other, which for a whole model of
flash-linear-attention takes minutes. What is timed and chosen stays the same.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def compile_together() -> None:
    """Have every tuner of Triton's in this process compile its candidates before it times them."""
    from triton.runtime._async_compile import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    choose = Autotuner.prune_configs
    pool = ThreadPoolExecutor(os.cpu_count())

    def prune_configs(self, kwargs):
        found = choose(self, kwargs)
        call = {name: value for name, value in kwargs.items() if name != "warmup"}
        with AsyncCompileMode(pool, ignore_errors=True):
            for config in found:
                try:
                    self.fn.warmup(*self.nargs.values(), **call, **config.all_kwargs())
                except Exception:  # timing it, the tuner finds that it is none
                    continue
        return found

    Autotuner.prune_configs = prune_configs
