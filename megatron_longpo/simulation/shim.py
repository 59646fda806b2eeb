"""A device guard and accelerator hooks that need no GPU, compiled when first needed.

torch's autograd engine and its indexing ask the current accelerator for a device guard. A CPU build has none for ``cuda``, and
that of a CUDA build asks the driver. Both guard and hooks are looked up in registries, where the few lines of C++ below put
stand-ins with one device. The hooks have to be there before torch is imported, so this module imports nothing of it; the guard
of a CUDA build is registered by the import, and replaced after it (``replace_guard``).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megatron_longpo.errors import PlatformError

_SOURCE = """\
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
namespace {
const Device kOnly(DeviceType::CUDA, 0);

struct OneSimulatedDevice final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kOnly; }
  Device getDevice() const override { return kOnly; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kOnly); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kOnly); }
};
}  // namespace
C10_REGISTER_GUARD_IMPL(CUDA, OneSimulatedDevice);
}  // namespace c10::impl

extern "C" void replace_guard() {
  static c10::impl::DeviceGuardImplRegistrar again(c10::DeviceType::CUDA, new c10::impl::OneSimulatedDevice());
}

namespace at {
// The registry looks a class of this name up.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
// Before those of a CUDA build, which are then passed over.
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, CUDAHooks)
}  // namespace at
"""


def build() -> Path:
    """Compile the shim for the installed torch, or find it compiled.

    Raises:
        PlatformError: there is no C++ compiler, or it fails.
    """
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    version = importlib.metadata.version("torch")
    key = hashlib.sha256(f"{version} {torch_folder} {_SOURCE}".encode()).hexdigest()[:16]
    library = _cache_folder() / f"shim-{version}-{key}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise PlatformError(
            "there is no C++ compiler (g++ or clang++, or CXX in the environment); install one to simulate"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        source, made = Path(folder) / "shim.cpp", Path(folder) / "shim.so"
        source.write_text(_SOURCE, encoding="utf-8")
        libraries = torch_folder / "lib"
        command = [
            *compiler.split(),
            *("-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", str(source), "-o", str(made)),
            *(f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PlatformError(f"{compiler} cannot be run ({error}); set CXX to a C++ compiler to simulate") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise PlatformError(
                f"{compiler} cannot compile against torch {version} ({last}); a compiler for C++20 is needed to simulate"
            )
        # Into place at once: several simulations may begin together.
        os.replace(made, library)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Load a built shim; torch must not have been imported."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr,arg-type]
    ctypes.CDLL(str(torch_folder / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_longpo"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"megatron_longpo-{os.getuid()}"
