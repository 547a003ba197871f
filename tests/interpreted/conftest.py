"""The Triton kernels on CPU tensors, in Triton's interpreter: run by tests/test_interpreted.py.

Triton decides when a kernel is defined whether it is interpreted, so these tests want a process of their own:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import os
from typing import Any

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning")
    if not collect_ignore_glob:
        patch_the_language_once()
        leave_out_checks_without_an_end()
        make_types_once()


def patch_the_language_once() -> None:
    """The interpreter puts its own functions into triton.language at every call of a function: half its time.

    What it patches follows from the modules that the function sees, and needs no undoing in a process where
    everything is interpreted.
    """
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, dict[int, Any]()

    def patch(function: Any) -> Any:
        if id(function.__globals__) not in patched:
            patched[id(function.__globals__)] = original(function)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang = patch


def leave_out_checks_without_an_end() -> None:
    """Sums of integers are made again in 64 bits and compared, for an assertion that only `debug` makes."""
    import dataclasses

    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def make_types_once() -> None:
    """Each value that the interpreter makes has a type and a shape, which take it longer than the value.

    There are few of them, and they never change: equal ones share their parts.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    new_type, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    types, shapes, dtypes = dict[Any, dict[str, Any]](), dict[Any, Any](), dict[str, Any]()
    numpys_dtype = interpreter._get_np_dtype

    def make_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        if key not in types:
            new_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            new_tensor(self, handle, type)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def find_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in dtypes:
            dtypes[name] = numpys_dtype(type)
        return dtypes[name]

    tl.block_type.__init__, tl.tensor.__init__ = make_type, make_tensor
    interpreter._get_np_dtype = find_dtype
