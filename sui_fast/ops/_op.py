"""Ops are declared once: a plain PyTorch function becomes an op that checks, chooses, registers and differentiates.

    @op(shapes={"a": "n s i", "g": "n k s o"}, result="n k", examples=examples)
    def name(a: Tensor, g: Tensor) -> Tensor: ...

The signature is the schema, the docstring the contract and the body the reference. An argument may be a list of tensors
(of the layers, say), then letters with a star belong to one place in the lists only. What a call does:

- arguments are checked at the border: kind, layout, device, dtype and the sizes that share a letter;
- the first kernel that accepts the arguments runs, else the body. CUDA tensors try triton, then cuda; CPU tensors
  try cpu.
  Triton's interpreter is never an automatic choice;
- a backend named by ``use_backend`` or SUI_FAST_BACKEND runs, or BackendError tells why it cannot, also where the op
  has no kernel for it ("reference" always can; "ntk_gram=triton" names a backend for one op only);
- a kernel must agree with the body on small examples the first time it is used on a device, else it is put aside;
- inside torch.compile, and where a kernel meets autograd, the call is the custom op sui_fast::name, whose derivative is
  that of the body. Under torch.func transforms and forward-mode tangents the body itself runs, whatever was named.

A kernel for the op ``name`` lives in ``_<backend>.py`` beside its declaration: a function ``name`` with the op's
arguments, and ``refuse_name``, which returns None or the reason why it cannot take them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._errors import ArgumentError, BackendError, complaint
from ._backends import BACKENDS, refuse_backend
from ._register import as_tuple, register

_log = logging.getLogger("sui_fast")
_named: ContextVar[str] = ContextVar("sui_fast_backend", default="")
_lock = threading.RLock()
_ENVIRONMENT = "SUI_FAST_BACKEND"
_LIST = "list[Tensor]"
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

OPS: dict[str, Op] = {}


@functools.lru_cache(maxsize=64)
def _parse(names: str) -> dict[str, str]:
    """{"*" or op: backend} of a text like "triton" or "triton,jvp=reference"; later parts win, "auto" names nothing."""
    chosen: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in names.split(","))):
        name, _, backend = part.rpartition("=")
        if backend not in (*BACKENDS, "auto") or (name and name not in OPS):
            raise ArgumentError(
                complaint(
                    "backend",
                    f"one of {', '.join(BACKENDS)}, auto, or op=backend with an op of {', '.join(OPS)}",
                    repr(part),
                    f"Correct use_backend() or {_ENVIRONMENT}.",
                )
            )
        if not name:
            chosen.clear()
        chosen[name or "*"] = backend
    return chosen


def named_backend(op: str = "*") -> str | None:
    """Backend named for an op (or for all) by use_backend or the environment, or None."""
    text = _named.get()
    outer = os.environ.get(_ENVIRONMENT)
    if outer:
        text = f"{outer},{text}"
    if not text:
        return None
    chosen = _parse(text)
    name = chosen.get(op) or chosen.get("*")
    return None if name == "auto" else name


@contextlib.contextmanager
def use_backend(name: str):
    """Run ops with the named backend inside the ``with`` block, or raise with the reason why it cannot.

    Args:
        name: "reference" | "cpu" | "triton" | "cuda" | "auto", or "ntk_gram=triton" for one op (comma between).
            An op without a kernel for the named backend raises. SUI_FAST_BACKEND takes the same text for a whole
            process; the block wins over it. Holds in this thread and its async tasks only.
    Raises:
        ArgumentError: no such backend or op. BackendError: from the op, when the backend cannot run it.
    """
    _parse(name)
    token = _named.set(f"{_named.get()},{name}")
    try:
        yield
    finally:
        _named.reset(token)


def _kind(tensor: Tensor) -> str:
    """tensor.device.type, many times as fast."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


class Op:
    """One declared op: its border, its kernels, its registration. ``op`` makes it; users call what that returns."""

    def __init__(
        self,
        body: Callable,
        shapes: dict[str, str],
        result: str,
        examples: Callable,
        *,
        dtypes: dict,
        result_dtype: torch.dtype | None,
        check: Callable | None,
    ):
        self.name, self.body, self.examples, self._check = body.__name__, body, examples, check
        self.signature = inspect.signature(body)
        self.parameters = list(self.signature.parameters)
        self.tensors = [
            (self.parameters.index(name), name, spec.split(), dtypes.get(name)) for name, spec in shapes.items()
        ]
        self._lists = {place for place, *_ in self.tensors if body.__annotations__[self.parameters[place]] == _LIST}
        self._result = [shape.split() for shape in result.split(",")]
        self._result_dtype = result_dtype
        self._package = sys.modules[body.__module__].__package__
        folder = Path(sys.modules[body.__module__].__file__).parent
        self.kernels = [name for name in BACKENDS if (folder / f"_{name}.py").is_file()]
        self._automatic = {
            device: [name for name in names if name in self.kernels] for device, names in _AUTOMATIC.items()
        }
        self._loaded: dict[str, Any] = {}
        self._trusted: dict[tuple, str | None] = {}
        self._logged: set[str] = set()
        self._agree = functools.lru_cache(maxsize=256)(self._check_described)
        self.registered = register(self)

    # border ---------------------------------------------------------------------------------------------------------
    def complain(self, argument: str, expected: str, got: object, todo: str) -> ArgumentError:
        return ArgumentError(complaint(f"{argument} of {self.name}", expected, got, todo))

    def length(self, args: tuple) -> int:
        """Length of the lists, which is one; 0 where no argument is a list."""
        length = 0
        for place, name, *_ in self.tensors:
            if place not in self._lists:
                continue
            value = args[place]
            if not isinstance(value, list | tuple):
                raise self.complain(name, "a list of tensors", type(value).__name__, "Pass one tensor for each layer.")
            length = length or len(value)
            if len(value) != length or not length:
                raise self.complain(
                    name, f"{length or 'one or more'} tensors", f"{len(value)}", "Pass one tensor for each layer."
                )
        return length

    def pieces(self, length: int) -> list[tuple]:
        """(name, letters, dtypes) of every tensor, those of lists of a length one after the other, as in ``flat``."""
        found = []
        for place, name, letters, dtypes in self.tensors:
            if place not in self._lists:
                found.append((name, letters, dtypes))
                continue
            for number in range(length):
                own = [f"{letter[1:]}[{number}]" if letter[0] == "*" else letter for letter in letters]
                found.append((f"{name}[{number}]", own, dtypes))
        return found

    def flat(self, values: tuple | list) -> list:
        """Of one value (or list of values) for each argument those that belong to tensors, lists laid end to end."""
        found: list = []
        for place, *_ in self.tensors:
            found += values[place] if place in self._lists else [values[place]]
        return found

    def refill(self, args: tuple | list, tensors: list) -> list:
        """The arguments with other tensors, given as ``flat`` would give them."""
        args, parts = list(args), iter(tensors)
        for place, *_ in self.tensors:
            args[place] = [next(parts) for _ in args[place]] if place in self._lists else next(parts)
        return args

    def first(self, args: tuple) -> Tensor:
        first = args[self.tensors[0][0]]
        return first if isinstance(first, Tensor) else first[0]

    def border(self, args: tuple) -> bool:
        """Check the arguments; True when all tensors are ordinary (no subclass such as a fake tensor)."""
        length = self.length(args) if self._lists else 0
        tensors = self.flat(args)
        try:
            described = tuple([(type(x), x.shape, x.dtype, x.device, x.layout) for x in tensors])
        except AttributeError:
            for tensor, (name, *_) in zip(tensors, self.pieces(length), strict=True):
                if not isinstance(tensor, Tensor):
                    kind = type(tensor).__name__
                    raise self.complain(name, "a torch.Tensor", kind, "Convert it with torch.as_tensor().") from None
            raise
        ordinary = all([kind is Tensor or kind is torch.nn.Parameter for kind, *_ in described])
        # sizes of a fake tensor may be symbols, which have no hash
        (self._agree if ordinary else self._agree.__wrapped__)(length, described)
        if self._check is not None:
            self._check(*args)
        return ordinary

    def _check_described(self, length: int, described: tuple) -> None:
        """Raise unless kinds, shapes, devices, layouts and dtypes agree; remembered, as the next such call is free."""
        sizes: dict[str, int] = {}
        dtype, device = None, described[0][3]
        for (kind, shape, found, where, layout), (name, letters, dtypes) in zip(
            described, self.pieces(length), strict=True
        ):
            if not issubclass(kind, Tensor):
                raise self.complain(name, "a torch.Tensor", kind.__name__, "Convert it with torch.as_tensor().")
            if len(shape) != len(letters):
                raise self.complain(
                    name, f"{len(letters)} dimensions [{', '.join(letters)}]", f"shape {list(shape)}", "Reshape it."
                )
            for letter, size in zip(letters, shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise self.complain(
                        name,
                        f"[{', '.join(letters)}] with {letter} = {sizes[letter]} as before",
                        f"shape {list(shape)}",
                        "Pass arguments that describe the same samples and layer.",
                    )
            if where.type == "meta":
                raise self.complain(name, "a tensor with data", "a meta tensor", "Move the model to a real device.")
            if where != device:
                raise self.complain(
                    name,
                    f"device {device}, as the arguments before it",
                    f"device {where}",
                    "Move all arguments to one device.",
                )
            if layout is not torch.strided:
                raise self.complain(name, "a dense tensor", f"layout {layout}", "Call .to_dense() first.")
            if dtypes is not None:
                if found not in dtypes:
                    raise self.complain(name, " or ".join(map(str, dtypes)), f"dtype {found}", "Convert it.")
            elif dtype is None:
                dtype = found
                if not found.is_floating_point:
                    raise self.complain(name, "a real floating-point tensor", f"dtype {found}", "Convert it.")
            elif found is not dtype:
                raise self.complain(
                    name,
                    f"{dtype}, as the arguments before it",
                    f"dtype {found}",
                    "Convert all arguments to one dtype.",
                )

    # choice ---------------------------------------------------------------------------------------------------------
    def named(self) -> str | None:
        """Backend named for this op by use_backend or the environment, or None."""
        return named_backend(self.name)

    def kernel(self, backend: str) -> Any:
        """The module with this op's kernel for a backend, or the reason (a str) why there is none."""
        if backend not in self._loaded:
            if backend not in self.kernels:
                return f"{self.name} has no {backend} kernel"
            try:
                module = importlib.import_module(f"{self._package}._{backend}")
                if not hasattr(module, self.name):
                    module = f"{self.name} has no {backend} kernel"
            except (ImportError, OSError) as error:
                module = f"its kernel cannot be loaded ({type(error).__name__}: {error})"
            self._loaded[backend] = module
        return self._loaded[backend]

    def refusal(self, backend: str, args: tuple) -> str | None:
        """Why a backend cannot run this call; None when it can."""
        if backend == "reference":
            return None
        if backend not in self.kernels:
            return f"{self.name} has no {backend} kernel"
        first = self.first(args)
        reason = refuse_backend(backend, _kind(first))
        if reason is not None:
            return reason
        module = self.kernel(backend)
        if isinstance(module, str):
            return module
        reason = getattr(module, f"refuse_{self.name}")(*args)
        return reason if reason is not None else self.distrust(backend, first.device)

    def distrust(self, backend: str, device: torch.device) -> str | None:
        """Run the kernel against the body on the examples, once per device; the reason not to use it, or None."""
        key = (backend, device)
        if key not in self._trusted:
            with _lock:
                if key not in self._trusted:
                    self._trusted[key] = reason = self._compare(backend, device)
                    if reason is not None:
                        warnings.warn(
                            f"sui_fast: the {backend} kernel of {self.name} is put aside on {device}: {reason}",
                            RuntimeWarning,
                            stacklevel=3,
                        )
        return self._trusted[key]

    def _compare(self, backend: str, device: torch.device) -> str | None:
        module = self.kernel(backend)
        try:
            with torch.no_grad():
                for example in self.examples(device):
                    if getattr(module, f"refuse_{self.name}")(*example) is not None:
                        continue
                    got, want = getattr(module, self.name)(*example), self.body(*example)
                    for mine, theirs in zip(as_tuple(got), as_tuple(want), strict=True):
                        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
                            return (
                                f"it returns {mine.dtype} {list(mine.shape)}, the reference "
                                f"{theirs.dtype} {list(theirs.shape)}"
                            )
                        error = (mine - theirs).norm() / (theirs.norm() + torch.finfo(theirs.dtype).tiny)
                        if not error <= (1e-9 if theirs.dtype == torch.float64 else 1e-4):
                            return f"it differs from the reference by {error:.1e} relative"
        except Exception as error:  # whatever a driver or compiler throws, the body still gives the right number
            return f"it fails ({type(error).__name__}: {str(error)[:300]})"
        return None

    def choose(self, args: tuple) -> tuple[str, Callable]:
        """(backend, function) for these arguments; BackendError when a named backend refuses them."""
        backend = self.named()
        if backend is None:
            for candidate in self._automatic.get(_kind(self.first(args)), ()):
                if self.refusal(candidate, args) is None:
                    backend = candidate
                    break
            else:
                backend = "reference"
        elif backend != "reference":
            reason = self.refusal(backend, args)
            if reason is not None:
                raise BackendError(
                    complaint(
                        f"backend of {self.name}",
                        f"{backend}, as named",
                        f"a refusal: {reason}",
                        "Use use_backend('auto') or another backend; sui-fast doctor lists them.",
                    )
                )
        if backend not in self._logged:
            self._logged.add(backend)
            _log.info("%s runs on backend %s", self.name, backend)
        return backend, self.body if backend == "reference" else getattr(self._loaded[backend], self.name)

    # call -----------------------------------------------------------------------------------------------------------
    def bind(self, args: tuple, kwargs: dict) -> tuple:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def call(self, args: tuple) -> Any:
        ordinary = self.border(args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._run(self.body, args)
        if not ordinary or torch._C._len_torch_dispatch_stack():
            return self.registered(*args)
        backend, function = self.choose(args)
        if backend != "reference" and torch.is_grad_enabled():
            if any(tensor.requires_grad for tensor in self.flat(args)):
                return self.registered(*args)
        return self._run(function, args)

    def _run(self, function: Callable, args: tuple) -> Any:
        device = _kind(self.first(args))
        if torch.is_autocast_enabled(device):  # the accumulation dtype is part of the contract
            with torch.autocast(device, enabled=False):
                return function(*args)
        return function(*args)


def op(
    *,
    shapes: dict[str, str],
    result: str,
    examples: Callable,
    dtypes: dict[str, tuple] | None = None,
    result_dtype: torch.dtype | None = None,
    check: Callable | None = None,
) -> Callable[[Callable], Callable]:
    """Declare the decorated function as an op.

    Args:
        shapes: {argument: "letters"} of every tensor argument; equal letters are equal sizes. In lists of tensors,
            which are equally long, a letter with a star ("*s") is a size of its own at every place.
        result: shapes of the results, a comma between two; letters, integer arguments, products like "n1*k1".
        examples: device -> argument tuples for the self-test of kernels, milliseconds of work.
        dtypes: {argument: dtypes} of arguments outside the rule "all of one real floating dtype".
        result_dtype: dtype of the results; default: that of the first tensor, float32 where it is half precision.
        check: called with all arguments; raises for values that cannot give a right number.
    """

    def declare(body: Callable) -> Callable:
        declared = OPS[body.__name__] = Op(
            body, shapes, result, examples, dtypes=dtypes or {}, result_dtype=result_dtype, check=check
        )
        arity, registered, run = len(declared.parameters), declared.registered, declared.call

        @functools.wraps(body)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                return registered(*args, **kwargs)
            if kwargs or len(args) != arity:
                args = declared.bind(args, kwargs)
            return run(args)

        call.op = declared
        return call

    return declare
