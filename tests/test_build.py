"""The build: what is compiled, what importing costs, which backend is chosen, and the errors."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm

from pybackdoor import _backend, _build_info, _native
from pybackdoor.ops import trigger_normalize

ROOT = Path(__file__).resolve().parent.parent
IMAGES = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
NORM = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_build_info_tells_the_whole_story(monkeypatch):
    monkeypatch.delenv("PYBACKDOOR_BACKEND", raising=False)
    info = _build_info.build_info()
    assert info["version"] == "0.1.0" and info["compiler"]
    assert info["isa_usable"] == [i for i in info["isa_built"] if i in info["isa_usable"]]
    assert info["isa"] == info["isa_usable"][0] and info["isa_usable"][-1] == "portable"
    assert info["built_with_cuda"] == bool(info["cuda_archs"])
    if info["built_with_cuda"]:
        assert re.fullmatch(r"\d+(;\d+)*\+PTX", info["cuda_archs"])
    op = info["ops"]["trigger_normalize"]
    assert op["cpu"] == {"backend": "cpu", "reason": "native cpu"}
    if info["cuda"] is None:
        assert op["cuda"]["backend"] == "cuda"
    else:
        assert op["cuda"]["backend"] in ("triton", "reference")
        assert info["cuda"] in op["cuda"]["reason"] and "riton" in op["cuda"]["reason"]


def test_importing_the_ops_is_lean():
    heavy = ["PIL", "open_clip", "torchvision", "tqdm", "matplotlib", "yaml", "safetensors"]
    heavy += ["huggingface_hub", "transformers", "pybackdoor.kernels"]
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import pybackdoor, pybackdoor.ops\n"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])\n"
        "print(torch.cuda.is_initialized())"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["[]", "False"]


def test_missing_native_module_says_why_and_what_to_run():
    code = "import sys; sys.modules['pybackdoor._C'] = None; import pybackdoor.ops"
    result = run_python(code)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: pybackdoor: the native module pybackdoor._C cannot be loaded ("
    )
    assert "pip install -e ." in last


def test_one_openmp_runtime_shared_with_torch():
    """A parallel call must not bring a second libgomp into the process."""
    code = (
        "import torch; torch.set_num_threads(2); from pybackdoor.ops import trigger_normalize\n"
        "x = torch.zeros(64, 64, 64, 3, dtype=torch.uint8)\n"
        "trigger_normalize(x, mean=(0.5,) * 3, std=(0.5,) * 3)\n"
        "maps = {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split('/')[-1]}\n"
        "from pybackdoor import build_info\n"
        "print(sorted(maps) == [build_info()['openmp']], maps)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True"), result.stdout


def test_torchs_runtime_is_taken_even_when_another_came_first(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs cc on Linux")
    other, source = tmp_path / "libgomp-other.so", tmp_path / "other.c"
    source.write_text("void GOMP_parallel(void (*f)(void*), void* p) { f(p); }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", other, source], check=True)
    ask = "import torch\nfrom pybackdoor import build_info\nprint(build_info()['openmp'])"
    want = run_python(ask).stdout
    result = run_python(f"import ctypes; ctypes.CDLL({str(other)!r})\n{ask}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == want and want.startswith("/") and want.strip() != str(other)


def test_forced_backends(monkeypatch):
    want = trigger_normalize(IMAGES, **NORM)
    for name in ("cpu", "reference"):
        monkeypatch.setenv("PYBACKDOOR_BACKEND", name)
        assert _backend.choose(IMAGES, "trigger_normalize").name == name
        assert torch.equal(trigger_normalize(IMAGES, **NORM), want)
    for name in ("cuda", "triton"):
        monkeypatch.setenv("PYBACKDOOR_BACKEND", name)
        message = (
            f"trigger_normalize: PYBACKDOOR_BACKEND={name} cannot be used: the tensor is on cpu"
        )
        with pytest.raises(RuntimeError, match=message):
            trigger_normalize(IMAGES, **NORM)
        assert _build_info.build_info()["ops"]["trigger_normalize"]["cpu"]["backend"] == "none"
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="the tensor is on cuda"):
        _backend.choose(torch.device("cuda"), "trigger_normalize")
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "gpu")
    with pytest.raises(ValueError, match="one of cuda, triton, cpu, reference, got 'gpu'"):
        trigger_normalize(IMAGES, **NORM)
    monkeypatch.setenv("PYBACKDOOR_BACKEND", "triton")
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: "no Triton today")
    for op, obstacle in (("trigger_normalize", "no Triton today"), ("x", "x has no Triton kernel")):
        with pytest.raises(RuntimeError, match=f"{op}: .*=triton cannot be used: {obstacle}"):
            _backend.choose(torch.device("cuda"), op)


def test_choice_follows_what_is_available(monkeypatch):
    """The order on CUDA: native, Triton, the reference with one warning that says why."""
    monkeypatch.delenv("PYBACKDOOR_BACKEND", raising=False)
    cuda = torch.device("cuda")
    monkeypatch.setattr(_backend, "cuda_status", lambda index: None)
    assert _backend.choose(cuda, "trigger_normalize") == ("cuda", "native cuda")
    monkeypatch.setattr(_backend, "cuda_status", lambda index: "not available, because it rains")
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: "no Triton today")
    _backend._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="slow reference on cuda .*because it rains"):
        assert _backend.choose(cuda, "trigger_normalize").name == "reference"
    assert _backend.choose(cuda, "trigger_normalize").name == "reference"  # silent, or an error
    obstacle = _backend.choose(cuda, "trigger_normalize", warn=False).reason
    assert "triton: no Triton today" in obstacle
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: None)
    choice = _backend.choose(cuda, "trigger_normalize")
    assert choice.name == "triton" and "because it rains" in choice.reason


def test_matrix_products_need_triton_beside_native_code(monkeypatch):
    monkeypatch.delenv("PYBACKDOOR_BACKEND", raising=False)
    cuda = torch.device("cuda")
    monkeypatch.setattr(_backend, "cuda_status", lambda index: None)
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: None)
    assert _backend.choose(cuda, "contrastive_par").name == "cuda"
    monkeypatch.setattr(_backend, "_triton_obstacle", lambda device: "no Triton today")
    choice = _backend.choose(cuda, "contrastive_par", warn=False)
    assert choice.name == "reference" and "no Triton today" in choice.reason


def test_a_device_that_the_build_has_no_code_for_is_not_chosen(monkeypatch):
    """Device 0 is old, device 1 is not: each tensor goes where its own device leads."""
    for archs, good, bad in (
        ("80;90+PTX", (80, 86, 89, 90, 100, 120), (70, 75)),
        ("75;90+PTX", (75, 90, 121), (70, 80, 89)),
        ("86+PTX", (86, 89, 90), (80, 75)),
    ):
        assert all(_native.has_code_for(archs, c) for c in good)
        assert not any(_native.has_code_for(archs, c) for c in bad)

    class Driver:
        cuda_archs = "80;90+PTX"
        cuda_obstacle = staticmethod(lambda: "")
        cuda_capability = staticmethod(lambda index: (75, 89)[index])

    monkeypatch.delenv("PYBACKDOOR_BACKEND", raising=False)
    monkeypatch.setattr(_native, "_C", Driver)
    _native.cuda_status.cache_clear()
    try:
        old = _backend.choose(torch.device("cuda", 0), "trigger_normalize", warn=False)
        new = _backend.choose(torch.device("cuda", 1), "trigger_normalize")
        assert new == ("cuda", "native cuda") and old.name == "reference"
        assert "because it is built for sm_80;90, this device is sm_75" in old.reason
    finally:
        _native.cuda_status.cache_clear()


@pytest.mark.gpu
def test_the_devices_capability_is_read():
    if not _native._C.built_with_cuda:
        pytest.skip("built without CUDA")
    major, minor = torch.cuda.get_device_capability(0)
    assert _native._C.cuda_capability(0) == 10 * major + minor


THREADS = """
import ctypes, importlib.util, resource, sys, threading
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
batch, size = 32, 64
images = (ctypes.c_uint8 * (batch * size * size * 3))(*([7, 50, 255] * (batch * size * size)))
def run(threads):
    out = (ctypes.c_float * len(images))()
    _C.trigger_normalize(
        images=ctypes.addressof(images), out=ctypes.addressof(out), poisoned=0, pattern=0, mask=0,
        grid=0, trigger_id=0, position=0, strength=0, sample_id=0, image_size=(batch, size, size),
        table_size=(0, 0, 0, 0), mode=0, flags=[False] * 3, strength_value=1.0, augment=False,
        augment_values=[0.0] * 5, half_noise=True, seed=0, view=0, input_layout=0, layout=0,
        patch_size=0, dtype=0, mean=(0.5,) * 3, std=(0.5,) * 3, device=-1, stream=0, isa="auto",
        threads=threads)
    return bytes(out)
alone = run(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), -1))  # no room for a thread's stack
try:
    threading.Thread(target=int).start()
    sys.exit("a thread could start")
except RuntimeError:
    same = [run(4) == alone]
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
same.append(run(4) == alone)
print(same, repr(_C.parallel_runtime()))
"""


def test_plain_threads_without_torch_and_when_none_can_start():
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-S", "-c", THREADS, _native._C.__file__]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert result.stdout == "[True, True] ''\n", result.stderr


def load_setup(monkeypatch):
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("pybackdoor_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rule_that_finds_nvcc(monkeypatch, tmp_path):
    rule = load_setup(monkeypatch)
    monkeypatch.setattr(rule, "CUDA_PREFIX", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("PYBACKDOOR_CUDA", raising=False)
    assert rule.find_nvcc() is None
    monkeypatch.setenv("PYBACKDOOR_CUDA", "1")
    with pytest.raises(
        SystemExit, match="^error: PYBACKDOOR_CUDA=1, but nvcc is not on PATH"
    ) as error:
        rule.find_nvcc()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("PYBACKDOOR_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be auto, 1 or 0, got 'yes'"):
        rule.find_nvcc()
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PYBACKDOOR_CUDA", "auto")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert rule.find_nvcc() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(rule, "CUDA_PREFIX", str(tmp_path / "toolkit"))
    assert rule.find_nvcc() == str(nvcc)
    monkeypatch.setenv("PYBACKDOOR_CUDA", "0")
    assert rule.find_nvcc() is None


def fake_nvcc(folder, monkeypatch, script):
    """Makes `nvcc` a shell script that notes its arguments in the file calls."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("CXX", "PYBACKDOOR_CUDA", "PYBACKDOOR_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return str(nvcc)


def test_nvcc_gets_the_architectures_and_the_host_compiler(monkeypatch, tmp_path):
    rule = load_setup(monkeypatch)
    nvcc = fake_nvcc(tmp_path, monkeypatch, "exit 0")
    default = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90"
    default = [nvcc, *default.split(), "-gencode", "arch=compute_90,code=compute_90"]
    assert rule.choose_cuda(tmp_path) == (default, "80;90")
    monkeypatch.setenv("PYBACKDOOR_CUDA_ARCHS", "")
    assert rule.choose_cuda(tmp_path) == (default, "80;90")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1  # not asked twice
    monkeypatch.setenv("CXX", "ccache g++-11 -m64")
    monkeypatch.setenv("PYBACKDOOR_CUDA_ARCHS", "100;86")
    command, label = rule.choose_cuda(tmp_path)
    assert command[1:3] == ["-ccbin", "g++-11"] and label == "86;100"
    assert command[-1] == "arch=compute_100,code=compute_100"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and calls[1].startswith("-ccbin g++-11 -gencode arch=compute_86")
    for bad in ("8.0", "native", "80,90", ";"):
        monkeypatch.setenv("PYBACKDOOR_CUDA_ARCHS", bad)
        message = f"PYBACKDOOR_CUDA_ARCHS must be numbers like 80;90, got {bad!r}"
        with pytest.raises(SystemExit, match=re.escape(message)):
            rule.choose_cuda(tmp_path)
    monkeypatch.setenv("PYBACKDOOR_CUDA", "0")  # then nobody looks at them
    assert rule.choose_cuda(tmp_path) == ([], "PYBACKDOOR_CUDA=0")


def test_an_nvcc_that_cannot_compile_leaves_the_cpu(monkeypatch, tmp_path):
    rule = load_setup(monkeypatch)
    script = "echo 'In file included from x:'; echo 'nvcc fatal : no g++' >&2; exit 1"
    fake_nvcc(tmp_path, monkeypatch, script)
    assert rule.choose_cuda(tmp_path) == ([], "nvcc cannot compile: nvcc fatal : no g++")
    monkeypatch.setenv("PYBACKDOOR_CUDA", "1")
    message = "^error: PYBACKDOOR_CUDA=1, but nvcc cannot compile: nvcc fatal : no g\\+\\+$"
    with pytest.raises(SystemExit, match=message):
        rule.choose_cuda(tmp_path)
    fake_nvcc(tmp_path, monkeypatch, "exit 3")
    assert rule.choose_cuda(tmp_path) == ([], "nvcc cannot compile: exit status 3")


def test_cuda_code_compiles_without_warnings(monkeypatch, tmp_path):
    """Unoptimised: what optimising makes of it is read in the built module."""
    monkeypatch.setenv("PYBACKDOOR_CUDA", "auto")
    nvcc = load_setup(monkeypatch).find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++17", f"-I{ROOT / 'csrc'}", "-c", "--threads", "0", "-arch=sm_80"]
    command += ["-Xcicc", "-O0", "-Xptxas", "-O0", *map(str, ROOT.glob("csrc/**/*.cu"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr + result.stdout, result.stderr + result.stdout


def cuobjdump(*arguments):
    """What the tool of the toolkit, or of Triton, prints of the built module."""
    if not _native._C.built_with_cuda:
        pytest.skip("built without CUDA")
    triton = importlib.util.find_spec("triton")
    ours = triton and Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    places = ("cuobjdump", "/usr/local/cuda/bin/cuobjdump", ours)
    tool = next(filter(None, (p and shutil.which(p) for p in places)), None)
    if tool is None:
        pytest.skip("needs cuobjdump")
    command = [tool, *arguments, _native._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


KERNEL = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+) ")
# Of 256 threads each, four blocks fit on a multiprocessor, three, or two; trigger_normalize's float
# kernels are left out, and take two.
REGISTERS = {
    "adamw_ema": 64,
    "contrastive_par": 80,
    "trigger_normalize": 80,
    "trigger_normalize_backward": 128,
}


def test_the_built_kernels_do_not_spill():
    sources = [p.name.removesuffix("_cuda.cu") for p in ROOT.glob("csrc/ops/*_cuda.cu")]
    assert sorted(sources) == sorted(REGISTERS)
    by_arch = {}
    for part in cuobjdump("-res-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = sm_(\d+)", part)[1]
        by_arch.setdefault(arch, []).extend(KERNEL.findall(part))
        assert part.count("Function ") == len(KERNEL.findall(part)), part
    assert set(by_arch) == set(_native._C.cuda_archs.removesuffix("+PTX").split(";"))
    for kernels in by_arch.values():
        assert len(kernels) == len(next(iter(by_arch.values())))
        assert [k for k in kernels if k[2:] != ("0", "0")] == []
        for op, limit in REGISTERS.items():
            own = [(name, int(used)) for name, used, _, _ in kernels if f"_{op}_cuda_cu_" in name]
            assert own, f"no kernel of {op}"
            if op == "trigger_normalize":
                own = [(name, used) for name, used in own if "ELb1E" in name]
            assert own and max(used for _, used in own) <= limit, own


def test_a_cpu_only_build_works_and_says_so(tmp_path):
    for name in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(name, reason=f"building needs {name}")
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    build += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    # Unoptimised, and by a path with a space: this is about the build, not about speed.
    environment = os.environ | {"PYBACKDOOR_CUDA": "0", "CXXFLAGS": "-O0"}
    build[4:] = [part.replace(str(tmp_path), str(tmp_path / "a b")) for part in build[4:]]
    result = subprocess.run(build, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pybackdoor: CPU only (PYBACKDOOR_CUDA=0)" in result.stdout
    assert "warning:" not in result.stderr.replace("SetuptoolsWarning:", "")
    module = tmp_path / "a b" / "lib" / "pybackdoor"
    code = (
        f"import sys; sys.path.insert(0, {str(module)!r}); import _C\n"
        "print(_C.built_with_cuda, repr(_C.cuda_archs), _C.cuda_obstacle(), _C.isas()[-1])"
    )
    result = run_python(code)
    assert result.stdout.strip() == "False '' this build is CPU only portable", result.stderr


def test_the_built_module_holds_the_stated_architectures():
    listed = cuobjdump("--list-elf", "--list-ptx")
    archs = _native._C.cuda_archs.removesuffix("+PTX").split(";")
    assert set(re.findall(r"\.sm_(\d+)\.cubin", listed)) == set(archs)
    assert set(re.findall(r"\.sm_(\d+)\.ptx", listed)) == {archs[-1]}


def test_a_required_gpu_turns_skips_into_failures(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    text = "import pytest\n\n\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
    (tmp_path / "test_it.py").write_text(text)
    for required, code in (("1", 1), ("0", 0)):
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        result = warm.run(command, {"PYBACKDOOR_REQUIRE_GPU": required}, tmp_path)
        assert result.returncode == code, result.stdout
        assert ("but torch sees no CUDA device" in result.stdout) == (required == "1")
