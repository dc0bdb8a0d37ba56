// Numbers of Python as structs. Tensors come as tuples of their address, the bytes from there to
// the end of their storage, their dtype as in DTYPES, and size or strides in elements.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/cpu_features.h"
#include "dropout.h"
#include "tensors.h"

namespace citi {

// data, num_bytes, dtype, row_stride, column_stride
using MatrixNumbers = std::tuple<uintptr_t, int64_t, int32_t, int64_t, int64_t>;
// data, num_bytes, dtype, size
using VectorNumbers = std::tuple<uintptr_t, int64_t, int32_t, int64_t>;
// data, num_bytes, size; of int32
using IndexNumbers = std::tuple<uintptr_t, int64_t, int64_t>;
// seed_low, seed_high, threshold, inverse_keep
using DropoutNumbers = std::tuple<uint32_t, uint32_t, uint32_t, float>;

[[noreturn]] void Refuse(const std::string& problem);

DType AsDType(const char* name, int32_t code);
Matrix AsMatrix(const char* name, const MatrixNumbers& numbers);
Matrix AsMatrix(const char* name, const std::optional<MatrixNumbers>& numbers);
Vector AsVector(const char* name, const VectorNumbers& numbers);
Vector AsVector(const char* name, const std::optional<VectorNumbers>& numbers);
Indices AsIndices(const std::optional<IndexNumbers>& numbers);
Dropout AsDropout(const DropoutNumbers& numbers);
std::optional<Dropout> AsDropout(const std::optional<DropoutNumbers>& numbers);

void CheckThreads(int64_t num_threads);

// The variant of the CPU kernels that runs.
Variant VariantInUse();

// An argument that is not converted: no float for an integer.
inline pybind11::arg Strictly(const char* name) { return pybind11::arg(name).noconvert(); }

// Each op adds its functions.
void BindMolora(pybind11::module_& module);
void BindRowDots(pybind11::module_& module);
void BindScoreTile(pybind11::module_& module);
void BindParameterScores(pybind11::module_& module);
// With CUDA alone.
void BindExtendedGemm(pybind11::module_& module);
void BindRoutedGemm(pybind11::module_& module);
void BindGrouped(pybind11::module_& module);
void BindLayer(pybind11::module_& module);
void BindSkinny(pybind11::module_& module);

}  // namespace citi
