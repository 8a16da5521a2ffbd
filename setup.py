"""The one build rule: the CPU core always, CUDA when nvcc is found; torch is never asked."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_PREFIX = "/usr/local/cuda"  # where the toolkit installs itself
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {  # these files run only on a CPU that reports the feature
    "avx2": "-mavx2 -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mf16c"
    " -Wno-uninitialized",  # GCC 12 warns of its own _mm512_undefined_ps
}


def find_nvcc() -> str | None:
    """Path of nvcc from PATH, $CUDA_HOME or the default prefix; None for a CPU-only build."""
    mode = os.environ.get("PYBACKDOOR_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        sys.exit(f"error: PYBACKDOOR_CUDA must be auto, 1 or 0, got {mode!r}")
    homes = [h for h in (os.environ.get("CUDA_HOME"), CUDA_PREFIX) if h]
    found = shutil.which("nvcc") or next(
        (str(p) for h in homes if os.access(p := Path(h, "bin", "nvcc"), os.X_OK)), None
    )
    if mode == "1" and not found:
        sys.exit(
            "error: PYBACKDOOR_CUDA=1, but nvcc is not on PATH, in $CUDA_HOME or in /usr/local/cuda"
        )
    return None if mode == "0" else found


def escape(path: Path) -> str:
    """A path as ninja's build lines want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it, so a build without changes takes no time."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        nvcc = find_nvcc()
        archs = [a for a in os.environ.get("PYBACKDOOR_CUDA_ARCHS", "80;90").split(";") if a]
        gencode = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
        gencode.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        label = f"{';'.join(archs)}+PTX" if nvcc else ""
        why = "PYBACKDOOR_CUDA=0" if os.environ.get("PYBACKDOOR_CUDA") == "0" else "no nvcc found"
        print(f"pybackdoor: CUDA {label}" if nvcc else f"pybackdoor: CPU only ({why})")

        csrc = shlex.quote(str(ROOT / "csrc"))
        defines = f"""'-DPYBACKDOOR_VERSION="{self.distribution.get_version()}"'"""
        defines += f""" '-DPYBACKDOOR_CUDA_ARCHS="{label}"'""" + " -DPYBACKDOOR_CUDA" * bool(nvcc)
        headers = (sysconfig.get_paths()["include"], pybind11.get_include())
        python = " ".join(f"-isystem {shlex.quote(h)}" for h in headers)
        host = "-fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
        cxxflags = f"-std=c++17 -O3 -Wall -Wextra {host} -I{csrc} {python} {defines}"
        cxxflags += " " + os.environ.get("CXXFLAGS", "")
        nvflags = f"-std=c++17 -O3 {' '.join(gencode)} -Xcompiler {host.replace(' ', ',')}"
        nvflags += f" -I{csrc} {defines}"
        cxx = os.environ.get("CXX", "c++")
        link = f"{nvcc} -shared -cudart static {' '.join(gencode)}" if nvcc else f"{cxx} -shared"
        ldflags = shlex.split(os.environ.get("LDFLAGS", ""))
        if nvcc:  # which passes on only what it is told to
            ldflags = [
                f"-Xlinker {f[4:]}" if f[:4] == "-Wl," else f"-Xcompiler {f}" for f in ldflags
            ]
        lines = [
            f"rule cxx\n  command = {cxx} -MMD -MF $out.d {cxxflags} $isa -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule nvcc\n  command = {nvcc} -MMD -MF $out.d {nvflags} -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {link} -o $out $in {' '.join(ldflags)}",
        ]
        objects = []
        for source in sorted(ROOT.glob("csrc/**/*.c*")):
            isa = source.stem.rpartition("_")[2]
            if (source.suffix == ".cu" and not nvcc) or (isa in ISA_FLAGS and not X86):
                continue
            objects.append(f"{source.name}.o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines.append(
                f"build {objects[-1]}: {rule} {escape(source)}\n  isa = {ISA_FLAGS.get(isa, '')}"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines.append(f"build {escape(target)}: link {' '.join(objects)}")
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        program = Path(ninja.BIN_DIR, "ninja")
        subprocess.run([program, "-C", folder, *(["-v"] if self.verbose > 1 else [])], check=True)


sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.c*"))
setup(
    packages=[*find_packages(include=["pybackdoor*"]), "pybackdoor.kernels"],
    package_dir={"pybackdoor.kernels": "kernels"},
    ext_modules=[Extension("pybackdoor._C", sources)],
    cmdclass={"build_ext": NinjaBuild},
)
