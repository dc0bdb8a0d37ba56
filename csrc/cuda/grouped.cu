#include "cuda/grouped.h"
#include "cuda/grouped_launches.h"
#include "cuda/launch.h"

namespace citi {

int64_t GroupedColumnTiles(int64_t num_columns) { return NumColumnTiles(num_columns); }

cudaError_t CheckOnDevice(const GroupedProduct& p, int device, std::string* problem) {
  const Placed tensors[] = {{"order", p.routing.order.data}, {"offsets", p.routing.offsets.data},
                            {"rows", p.rows.matrix.data},    {"weight", p.weight.data},
                            {"out", p.out.matrix.data},      {"gates", p.gates.data},
                            {"factors", p.factors.data},     {"dots", p.dots.data}};
  return CheckOnDevice(tensors, device, problem);
}

cudaError_t CheckOnDevice(const GroupedGradient& g, int device, std::string* problem) {
  const Placed tensors[] = {{"order", g.routing.order.data},
                            {"offsets", g.routing.offsets.data},
                            {"left", g.left.matrix.data},
                            {"right", g.right.matrix.data},
                            {"out", g.out.data}};
  return CheckOnDevice(tensors, device, problem);
}

cudaError_t RunGroupedProduct(const GroupedProduct& product, int device, cudaStream_t stream) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const ProductPlan plan = PlanProduct(product);
  return WithTile(product.rows.matrix.dtype, plan.columns, [&](auto element, auto columns) {
    using Element = decltype(element);
    constexpr int kColumns = decltype(columns)::value;
    if (product.weight_is_out_in) {
      return Launch(MultiplyGroups<Element, kColumns, true>, plan.num_blocks, kGroupThreads,
                    ProductTile<kColumns, true>::kSharedBytes, stream, plan.launch);
    }
    return Launch(MultiplyGroups<Element, kColumns, false>, plan.num_blocks, kGroupThreads,
                  ProductTile<kColumns, false>::kSharedBytes, stream, plan.launch);
  });
}

cudaError_t RunGroupedGradient(const GroupedGradient& gradient, int device, cudaStream_t stream) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const GradientPlan plan = PlanGradient(gradient);
  return WithTile(gradient.left.matrix.dtype, plan.columns, [&](auto element, auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    return Launch(SumGroups<decltype(element), kColumns>, plan.num_blocks, kGroupThreads,
                  GradientTile<kColumns>::kSharedBytes, stream, plan.launch);
  });
}

}  // namespace citi
