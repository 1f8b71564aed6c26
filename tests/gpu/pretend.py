"""A pretended GPU for tests on machines without one: real code, real values, CUDA's rules.  Import it before torch.

1.  `runtime.c`, compiled here, answers what torch asks the CUDA runtime: one device of compute capability 9.0.  So CUDA is available,
    autograd has a queue for cuda:0, autocast is that of CUDA, Lightning finds a GPU.  No kernel is ever launched.
2.  A tensor on cuda:0 is a CudaTensor, which holds its values in a CPU tensor.  Below autograd and autocast every operator is done with
    these on the CPU: types, autocast's lists and control flow are a GPU's.

A DeviceError is raised where a GPU would refuse: operands on two devices, a CPU generator for a GPU's tensor, indices on the wrong side.
`waits` counts, by kind and line of ldm, what makes the CPU wait for the GPU: item, tolist, bool, boolean masks, copies that are not pinned.

Not pretended: kernels' own limits, memory, time, NCCL, torch.compile, several devices.
"""

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("runtime.c")
# of crt/host_defines.h, which pip's headers of CUDA come without
EMPTY = (
    "__device_builtin__", "__cudart_builtin__", "__builtin_align__(n)", "__align__(n)", "CUDARTAPI", "__CUDA_DEPRECATED",
    "__device_builtin_texture_type__", "__device_builtin_surface_type__", "__specialization_static",
)  # fmt: skip


def headers() -> list[Path]:
    """Folders of CUDA's headers among the installed packages; none: torch's build is for CPUs."""
    spec = find_spec("nvidia")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return [folder for place in places for folder in sorted(place.glob("*/include")) if (folder / "driver_types.h").is_file()]


def load_runtime() -> None:
    """Before torch is imported: its libraries then find these functions first."""
    assert "torch" not in sys.modules, "import this before torch"
    folders = headers()
    key = hashlib.sha256(SOURCE.read_bytes() + repr(folders).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"ldm-pretended-gpu-{os.getuid()}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as scratch:
            crt, made = Path(scratch) / "crt", Path(scratch) / "runtime.so"
            crt.mkdir()
            (crt / "host_defines.h").write_text("".join(f"#define {name}\n" for name in EMPTY))
            include = [f"-I{folder}" for folder in (scratch, *folders)]
            command = ["cc", "-w", "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *include, "-o", str(made), str(SOURCE)]
            subprocess.run(command, check=True)
            beside = library.with_suffix(f".{os.getpid()}.so")
            beside.write_bytes(made.read_bytes())
            os.replace(beside, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


load_runtime()
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
PACKAGE = "/ldm/"
waits: Counter[tuple[str, str]] = Counter()  # (kind, line of ldm)
attention: Counter[str] = Counter()  # CUDA's attention operators and the type that they ran in

MOVES = {aten.copy_.default, aten._to_copy.default, aten.lift_fresh.default, aten.set_.source_Tensor}
READS = {aten.index.Tensor, aten._unsafe_index.Tensor}
PUTS = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index_put.default}
WAITS = {
    aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select",
    aten.equal.default: "equal", aten._unique2.default: "unique", aten.unique_dim.default: "unique", aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave", aten.is_nonzero.default: "bool", aten._linalg_eigh.default: "eigh",
    aten.linalg_eigh.default: "eigh", aten.argwhere.default: "nonzero", aten.unique_consecutive.default: "unique",
}  # fmt: skip


class DeviceError(RuntimeError):
    """What a GPU would have raised."""


class _NoGradients(contextlib.ContextDecorator):
    """In the place of torch.inference_mode, whose marks a tensor subclass does not take."""

    def __init__(self, mode: bool = True) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(self.before and not self.mode)

    def __exit__(self, *_: object) -> None:
        torch.set_grad_enabled(self.before)


def _line() -> str | None:
    """The innermost line of ldm that is being executed, if ldm called for this; what Lightning or torchmetrics do is theirs."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/lightning/" in name or "/torchmetrics/" in name:
            return None
        if PACKAGE in name and "site-packages" not in name and "/tests/" not in name:
            return f"{name.rsplit(PACKAGE, 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def count(kind: str) -> None:
    """A wait for the GPU."""
    if (line := _line()) is not None:
        waits[kind, line] += 1


class CudaTensor(Tensor):
    """A tensor that says that it lies on cuda:0; `held` is a CPU tensor with its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "CudaTensor":
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, layout=held.layout,
            device=CUDA, requires_grad=False,
        )  # fmt: skip
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held.detach()!r})"

    def tolist(self) -> Any:
        count("tolist")
        return self.held.detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        count("copy to the CPU")
        return self.held.detach().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operator below autograd and autocast."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    cuda = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
    host = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    target = wanted.type if wanted is not None else "cuda" if cuda else "cpu"
    if func is aten.copy_.default:
        target = args[0].device.type
    _refuse(func, args, kwargs, cuda, host, target)
    if cuda:
        _count(func, args)
    _count_copies(func, args, kwargs, target)
    inner_args, inner = tree_map_only(CudaTensor, lambda tensor: tensor.held, (args, kwargs))
    if wanted is not None and wanted.type == "cuda":
        inner["device"] = torch.device("cpu")
    if inner.get("generator") is not None and inner["generator"].device.type == "cuda":
        inner["generator"] = None
    inner |= {name: False for name in ("pin_memory",) if inner.get(name)}
    inner |= {name: False for name in ("non_blocking",) if func in MOVES and name in inner}
    found = (_attend(func, inner_args, inner) or _only_on_cuda(func, inner_args)) if cuda else None
    found = func(*inner_args, **inner) if found is None else found
    if func is aten._local_scalar_dense.default:
        return found
    if func is aten._to_copy.default and target == "cuda" and found is inner_args[0]:
        found = found.clone()
    held, plain = {id(leaf.held): leaf for leaf in cuda}, {id(leaf) for leaf in host}  # operators in place give back their arguments

    def back(tensor: Tensor) -> Tensor:
        if id(tensor) in held:
            return held[id(tensor)]
        return CudaTensor(tensor) if target == "cuda" and id(tensor) not in plain else tensor

    return tree_map_only(Tensor, back, found)


def _refuse(func: Any, args: Any, kwargs: Any, cuda: list[CudaTensor], host: list[Tensor], target: str) -> None:
    """A DeviceError where a GPU would refuse."""
    generator = kwargs.get("generator")
    if isinstance(generator, torch.Generator) and generator.device.type != target:
        raise DeviceError(f"Expected a '{target}' device type for generator but found '{generator.device.type}' ({func})")
    if cuda and "out" in kwargs and not isinstance(kwargs["out"], CudaTensor):
        raise DeviceError(f"Expected out tensor to have device cuda:0, but got cpu instead ({func})")
    if not (cuda and host) or func in MOVES:
        return
    if func in READS or func in PUTS:
        if not isinstance(args[0], CudaTensor):
            raise DeviceError(f"indices should be either on cpu or on the same device as the indexed tensor (cpu) ({func})")
        count("index from the CPU")
        mixed = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, CudaTensor) and value.dim()]
    else:  # a number () of the CPU is an argument of the kernel, of pointwise operators only
        pointwise = torch.Tag.pointwise in func.tags or func in (aten.fill_.Tensor, aten.fill.Tensor)
        mixed = [value for value in host if value.dim() or not pointwise]
    if mixed:
        raise DeviceError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})")


def _count(func: Any, args: Any) -> None:
    if func in WAITS:
        count(WAITS[func])
    if func is aten.multinomial.default and not (len(args) > 2 and args[2] and args[1] > 1):
        count("multinomial")
    if func in READS | PUTS:
        masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if masked and (func in READS or args[2].numel() > 1):
            count("boolean mask")


def _count_copies(func: Any, args: Any, kwargs: Any, target: str) -> None:
    if func is aten.copy_.default:
        source, free = args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    elif func is aten._to_copy.default:
        source, free = args[0], kwargs.get("non_blocking", False)
    else:
        return
    if source.device.type != target:
        pinned = target == "cuda" and source.is_pinned()
        if not free or (target == "cuda" and not pinned):
            count(f"copy to the {'GPU' if target == 'cuda' else 'CPU'}{', not pinned' if free else ''}")


def _attend(func: Any, args: Any, kwargs: Any) -> Any:
    """CUDA's attention operators by the CPU's; None where func is none of them."""
    name = func._schema.name.split("::")[1]
    if not name.startswith("_scaled_dot_product_") or "for_cpu" in name:
        return None
    named = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
    q, k, v = named["query"], named["key"], named["value"]
    mask = named.get("attn_bias")
    options = {"scale": named.get("scale")}
    if mask is not None:
        options["attn_mask"] = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]).to(q.dtype)
    rest = named.get("dropout_p", 0.0), named.get("is_causal", False)
    if "backward" in name:
        grad = named.get("grad_out", named.get("grad_out_"))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, named["out"], named["logsumexp"], *rest, **options)
        return (*found, None) if "efficient" in name else found
    attention[f"{name} {q.dtype}"] += 1
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *rest, **options)
    seeds = [torch.zeros((), dtype=torch.int64) for _ in range(3)]
    if "efficient" in name:
        return out, logsumexp, *seeds[:2]
    return out, logsumexp, None, None, q.shape[2], k.shape[2], *seeds


def _only_on_cuda(func: Any, args: Any) -> Any:
    """Other operators that only CUDA has; None where func is none of them."""
    if func is aten.cudnn_batch_norm.default:
        return (*aten.native_batch_norm(*args), torch.empty(0, dtype=torch.uint8))
    if func is aten.cudnn_batch_norm_backward.default:
        x, grad, weight, mean, var, save_mean, save_rstd, eps, _ = args
        return aten.native_batch_norm_backward(grad, x, weight, mean, var, save_mean, save_rstd, True, eps, [True, True, True])
    if func is aten._fused_rms_norm_backward.default:
        grad, x, shape, rstd, weight, _ = args
        over, normal = tuple(range(-len(shape), 0)), x.float() * rstd
        told = grad.float() if weight is None else grad.float() * weight.float()
        dx = rstd * (told - normal * (told * normal).mean(over, keepdim=True))
        by_weight = None if weight is None else (grad.float() * normal).flatten(0, -len(shape) - 1).sum(0).to(weight.dtype)
        return dx.to(x.dtype), by_weight
    return None


class _Dispatch(TorchDispatchMode):
    """For operators that make tensors on cuda:0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """While it is entered, cuda:0 works."""
    before, inference = torch._C._only_lift_cpu_tensors(), torch.inference_mode
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to("cuda") makes new parameters; a GPU keeps the objects
    torch.inference_mode = _NoGradients  # type: ignore[assignment,misc]
    try:
        with _Dispatch():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.inference_mode = inference  # type: ignore[misc]


if __name__ == "__main__":  # python pretend.py SCRIPT [ARGUMENTS ...]
    import runpy

    sys.modules["pretend"] = sys.modules["__main__"]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with pretended_gpu():
        runpy.run_path(sys.argv[0], run_name="__main__")
