#include "cpu/score_tile.h"

#include "bindings/numbers.h"

namespace py = pybind11;

namespace citi {
namespace {

using Pair = std::tuple<int64_t, int64_t>;

// shape and begin of the tile; number and length of the weight's segments. Rows, then columns.
ScoreTile OfSizes(const Pair& shape, const Pair& begin, const Pair& segments, const Pair& lengths) {
  ScoreTile tile{};
  std::tie(tile.num_rows, tile.num_columns) = shape;
  std::tie(tile.first_row, tile.first_column) = begin;
  std::tie(tile.num_row_segments, tile.num_column_segments) = segments;
  std::tie(tile.row_length, tile.column_length) = lengths;
  const std::string wrong = InvalidSizes(tile);
  if (!wrong.empty()) Refuse(wrong);
  return tile;
}

int64_t NumSums(const Pair& shape, const Pair& begin, const Pair& segments, const Pair& lengths) {
  return OfSizes(shape, begin, segments, lengths).num_sums();
}

void Accumulate(const Pair& shape, const Pair& begin, const Pair& segments, const Pair& lengths,
                const MatrixNumbers& gradient, const MatrixNumbers& weight,
                const VectorNumbers& scores, double scale, uint64_t seed,
                const std::optional<VectorNumbers>& sums, int64_t num_threads) {
  ScoreTile tile = OfSizes(shape, begin, segments, lengths);
  tile.gradient = AsMatrix("gradient", gradient);
  tile.weight = AsMatrix("weight", weight);
  tile.scores = AsVector("scores", scores);
  tile.scale = static_cast<float>(scale);
  tile.seed = seed;
  tile.sums = AsVector("sums", sums);
  const std::string wrong = Invalid(tile);
  if (!wrong.empty()) Refuse(wrong);
  CheckThreads(num_threads);
  const py::gil_scoped_release released;
  AccumulateScoreTile(tile, VariantInUse(), num_threads);
}

}  // namespace

void BindScoreTile(py::module_& module) {
  module.def("score_tile_sums", NumSums, Strictly("shape"), Strictly("begin"), Strictly("segments"),
             Strictly("lengths"));
  module.def("accumulate_score_tile", Accumulate, py::kw_only(), Strictly("shape"),
             Strictly("begin"), Strictly("segments"), Strictly("lengths"), Strictly("gradient"),
             Strictly("weight"), Strictly("scores"), Strictly("scale"), Strictly("seed"),
             Strictly("sums"), Strictly("num_threads"));
}

}  // namespace citi
