// The module pybackdoor._C: integers and floats in, integers and strings out; no torch.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.attr("version") = PYBACKDOOR_VERSION; }
