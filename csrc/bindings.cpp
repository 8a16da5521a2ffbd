// The module pybackdoor._C. Each op's file <op>_bind.cpp binds its own.
#include "bindings.h"

#include "core/buffer_pool.h"
#include "core/cpu_isa.h"
#include "core/parallel.h"
#include "core/philox.h"

namespace pybackdoor {

#ifndef PYBACKDOOR_CUDA
std::string cuda_obstacle() { return "this build is CPU only"; }
#endif

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr char kCompiler[] = "gcc " __VERSION__;
#else
constexpr char kCompiler[] = "unknown";
#endif

#ifdef PYBACKDOOR_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

}  // namespace
}  // namespace pybackdoor

PYBIND11_MODULE(_C, m) {
  using namespace pybackdoor;
  m.attr("version") = PYBACKDOOR_VERSION;
  m.attr("compiler") = kCompiler;
  m.attr("built_with_cuda") = kWithCuda;
  m.attr("cuda_archs") = PYBACKDOOR_CUDA_ARCHS;
#if defined(__x86_64__)
  m.attr("isas_built") = py::make_tuple("avx512", "avx2", "portable");
#else
  m.attr("isas_built") = py::make_tuple("portable");
#endif
  py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()),
                               static_cast<py::ssize_t>(buffer.size()));
      });
  m.def("pooled_bytes", &pooled_bytes);
  m.def("empty_pool", &empty_pool);
  m.def("isas", [] { return py::tuple(py::cast(cpu_isas())); });
  m.def("cuda_obstacle", [] { return cuda_obstacle(); });
#ifdef PYBACKDOOR_CUDA
  m.def("cuda_capability", &cuda_capability, py::arg("device"));
#endif
  m.def("parallel_runtime", [] { return parallel_runtime(); });
  m.def(
      "philox",
      [](std::array<uint32_t, 4> counter, uint64_t key) {
        const Words words = philox({{counter[0], counter[1], counter[2], counter[3]}}, key);
        return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
      },
      py::arg("counter"), py::arg("key"));
  bind_adamw_ema(m);
  bind_contrastive_par(m);
  bind_trigger_normalize(m);
}
