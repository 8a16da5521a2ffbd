"""The one build rule: the CPU core always, CUDA when nvcc is found; torch is never asked."""

import os
import platform
import re
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


def cuda_archs() -> list[str]:
    """The numbers in PYBACKDOOR_CUDA_ARCHS, ascending: the last one's PTX is kept too."""
    text = os.environ.get("PYBACKDOOR_CUDA_ARCHS") or "80;90"
    archs = [a for a in text.split(";") if a]
    if not archs or not all(re.fullmatch("[1-9][0-9]{1,2}", a) for a in archs):
        sys.exit(f"error: PYBACKDOOR_CUDA_ARCHS must be numbers like 80;90, got {text!r}")
    return sorted(set(archs), key=int)


def host_compiler() -> list[str]:
    """nvcc's option for the compiler in $CXX, behind a cache or alone; empty without $CXX."""
    words = shlex.split(os.environ.get("CXX", ""))
    named = [w for w in words if Path(w).name not in ("ccache", "sccache")]
    return ["-ccbin", named[0]] if named else []


def nvcc_obstacle(command: list[str], folder: Path) -> str | None:
    """Why nvcc cannot compile an empty file; None if it can, or could when last asked so."""
    stamp, source = folder / "nvcc_works", folder / "empty.cu"
    if stamp.exists() and stamp.read_text() == shlex.join(command):
        return None
    source.write_text("")
    command_line = [*command, "-c", str(source), "-o", str(folder / "empty.o")]
    result = subprocess.run(command_line, capture_output=True, text=True)
    if result.returncode == 0:
        stamp.write_text(shlex.join(command))
        return None
    lines = [s.strip() for s in (result.stderr + result.stdout).splitlines() if s.strip()]
    telling = [s for s in lines if "error" in s or "fatal" in s]
    return (telling or lines or [f"exit status {result.returncode}"])[0]


def choose_cuda(folder: Path) -> tuple[list[str], str]:
    """The nvcc command with its architectures (empty for a CPU-only build), and the label.

    The label is that of the architectures, or the reason why there are none.
    """
    nvcc = find_nvcc()
    if not nvcc:
        off = os.environ.get("PYBACKDOOR_CUDA") == "0"
        return [], "PYBACKDOOR_CUDA=0" if off else "no nvcc found"
    archs = cuda_archs()
    targets = [f"arch=compute_{a},code=sm_{a}" for a in archs]
    targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    command = [nvcc, *host_compiler()]
    for target in targets:
        command += ["-gencode", target]
    obstacle = nvcc_obstacle(command, folder)
    if obstacle and os.environ.get("PYBACKDOOR_CUDA") == "1":
        sys.exit(f"error: PYBACKDOOR_CUDA=1, but nvcc cannot compile: {obstacle}")
    return ([], f"nvcc cannot compile: {obstacle}") if obstacle else (command, ";".join(archs))


def escape(path: Path) -> str:
    """A path as ninja's build lines want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it, so a build without changes takes no time."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        command, why = choose_cuda(folder)
        nvcc, label = shlex.join(command), f"{why}+PTX" if command else ""
        print(f"pybackdoor: CUDA {label}" if nvcc else f"pybackdoor: CPU only ({why})")

        csrc = shlex.quote(str(ROOT / "csrc"))
        defines = f"""'-DPYBACKDOOR_VERSION="{self.distribution.get_version()}"'"""
        defines += f""" '-DPYBACKDOOR_CUDA_ARCHS="{label}"'""" + " -DPYBACKDOOR_CUDA" * bool(nvcc)
        headers = (sysconfig.get_paths()["include"], pybind11.get_include())
        python = " ".join(f"-isystem {shlex.quote(h)}" for h in headers)
        host = "-fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
        cxxflags = f"-std=c++17 -O3 -Wall -Wextra {host} -I{csrc} {python} {defines}"
        cxxflags += " " + os.environ.get("CXXFLAGS", "")
        nvflags = f"-std=c++17 -O3 -Xcompiler {host.replace(' ', ',')}"
        nvflags += f" -I{csrc} {defines}"
        cxx = os.environ.get("CXX", "c++")
        link = f"{nvcc} -shared -cudart static" if nvcc else f"{cxx} -shared"
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
