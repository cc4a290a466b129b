"""Makes Triton's interpreter cheap enough for tests, without changing what it computes."""

import functools

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """Let a launch patch ``triton.language`` once, not at every call of a function in the kernel.

    The interpreter does it at each of them, by looking at every name of the language: a third of
    its time. Within a launch nothing undoes it.
    """
    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn) -> list:
        return [module for module in (tl, tl.core) if module in fn.__globals__.values()]

    def patch_if_needed(fn):
        if any(tl.core.is_builtin(module.load) for module in languages(fn)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_if_needed


def look_up_each_dtype_once() -> None:
    """Remember which NumPy type stands for a type: every operation of a kernel asks for it."""
    original = interpreter._get_np_dtype
    of_scalar = functools.cache(original)

    def np_dtype(kind):
        scalar = kind.scalar
        return original(kind) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._get_np_dtype = np_dtype
