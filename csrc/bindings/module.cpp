// The module citi_kernels._C: Python numbers in, kernels of namespace citi behind.
//
// Whatever can be checked of the numbers is, before an address is used: wrong numbers raise
// ValueError, wrong types TypeError.

#include <atomic>
#include <string>

#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

std::atomic<Variant> variant_in_use{RunnableVariants().front()};

py::tuple NamesOfRunnableVariants() {
  py::list names;
  for (const Variant variant : RunnableVariants()) names.append(NameOf(variant));
  return py::tuple(names);
}

std::string UseCpuVariant(const std::string& name) {
  std::string known;
  for (const Variant variant : RunnableVariants()) {
    if (name.empty() || name == NameOf(variant)) {
      variant_in_use = variant;
      return NameOf(variant);
    }
    known += known.empty() ? NameOf(variant) : std::string(", ") + NameOf(variant);
  }
  Refuse("want one of " + known + "; got '" + name + "'");
}

py::dict BuiltWith() {
  py::dict built;
  built["compiler"] = CITI_COMPILER;
  built["flags"] = CITI_FLAGS;
  built["openmp"] = CITI_OPENMP_VERSION;
  built["cuda"] = CITI_CUDA_VERSION;
  built["cuda_archs"] = CITI_CUDA_ARCHS;
  return built;
}

}  // namespace

Variant VariantInUse() { return variant_in_use.load(); }

}  // namespace citi

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;  // NOLINT: names of arguments

  module.attr("version") = CITI_VERSION;
  module.attr("sources") = CITI_SOURCES;
  module.attr("built_with") = citi::BuiltWith();
  module.attr("cpu_features") = citi::NamesOfRunnableVariants();
  module.attr("DTYPES") = py::dict("float32"_a = static_cast<int>(citi::DType::kFloat32),
                                   "bfloat16"_a = static_cast<int>(citi::DType::kBFloat16),
                                   "float16"_a = static_cast<int>(citi::DType::kFloat16),
                                   "float64"_a = static_cast<int>(citi::DType::kFloat64),
                                   "bool"_a = static_cast<int>(citi::DType::kBool));
  module.def("use_cpu_variant", citi::UseCpuVariant, citi::Strictly("name"));
  citi::BindMolora(module);
  citi::BindRowDots(module);
  citi::BindScoreTile(module);
  citi::BindParameterScores(module);
#if defined(CITI_CUDA)
  citi::BindExtendedGemm(module);
  citi::BindRoutedGemm(module);
  citi::BindGrouped(module);
  citi::BindLayer(module);
  citi::BindSkinny(module);
#endif
}
