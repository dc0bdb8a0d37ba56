// A layer's plans run pass by pass: plain loops stand for the kernels, values against fp64.
//
// The kernels have tests of their own. Here it counts what each is given: which memory, written
// before it is read, and beside what.

// Device code needs its words first.
// clang-format off
#include "simt_tensor_core.h"
#include "cuda/layer_plan.h"
// clang-format on
#include <cmath>

#include "skinny_cases.h"
#include "test_matrix.h"

namespace citi {
namespace {

constexpr float kScaling = 0.5f;

double At(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.row_stride + j * m.column_stride;
  return Decode(m.dtype, static_cast<const char*>(m.data) + at * SizeOf(m.dtype));
}

void Put(double value, const Vector& v, int64_t at) {
  const auto number = static_cast<float>(value);
  void* to = static_cast<char*>(v.data) + at * SizeOf(v.dtype);
  if (v.dtype == DType::kFloat32) {
    *static_cast<float*>(to) = number;
  } else {
    *static_cast<uint16_t*>(to) =
        v.dtype == DType::kBFloat16 ? BFloat16BitsOf(number) : Float16BitsOf(number);
  }
}

double Get(const Vector& v, int64_t at) {
  return Decode(v.dtype, static_cast<const char*>(v.data) + at * SizeOf(v.dtype));
}

Vector AsVector(const Matrix& m) { return {const_cast<void*>(m.data), m.num_bytes, m.dtype, 0}; }

int32_t* Mutable(const Indices& numbers) { return const_cast<int32_t*>(numbers.data); }

// Does what each pass is for, with loops.
class PassModel {
 public:
  void operator()(const PackArguments& s) const {
    for (int64_t at = 0; at < s.num_rows * s.num_columns; ++at) Put(0.0, s.out, at);
    for (int64_t i = 0; i < s.zeros.size; ++i) Mutable(s.zeros)[i] = 0;
    for (const PackedMatrix& each : s.sources) {
      for (int64_t i = 0; i < each.num_rows; ++i) {
        for (int64_t j = 0; j < each.num_columns; ++j) {
          Put(At(each.matrix, i, j), s.out, (each.first_row + i) * s.num_columns + j);
        }
      }
    }
  }
  void operator()(const ShrinkArguments& s) const {
    Route(s.shape, s.x, Rows(s.stack, s.num_inputs), s.num_inputs, s.h, s.u, s.probs, s.scaling);
  }
  void operator()(const RowProductArguments& s) const {
    // All in the last part.
    const int64_t size = s.num_tokens * s.num_rows;
    for (int64_t at = 0; at < s.parts.size; ++at) Put(0.0, s.parts, at);
    for (int64_t t = 0; t < s.num_tokens; ++t) {
      for (int64_t v = 0; v < s.num_rows; ++v) {
        double sum = 0.0;
        for (int64_t n = 0; n < s.num_columns; ++n) {
          sum += At(s.wide, t, n) * Get(s.rows, v * s.num_columns + n);
        }
        Put(sum, s.parts, s.parts.size - size + t * s.num_rows + v);
      }
    }
  }
  void operator()(const ScaleArguments& s) const {
    Scale(s.shape, s.h, s.probs, s.u, s.scaling);
  }
  void operator()(const FactorArguments& s) const {
    const int64_t size = s.num_columns * s.num_narrow, num_shares = s.parts.size / size;
    const int64_t num_tiles = s.done.data == nullptr ? 1 : s.done.size / num_shares;
    for (int64_t share = 0; share < num_shares; ++share) {
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        if (!Makes(s, share * num_tiles + tile)) continue;
        for (int64_t n = tile; n < s.num_columns; n += num_tiles) {
          for (int64_t v = 0; v < s.num_narrow; ++v) {
            double sum = 0.0;
            for (int64_t t = share; t < s.num_tokens; t += num_shares) {
              sum += At(s.wide, t, n) * At(s.narrow, t, v);
            }
            Put(sum, s.parts, share * size + n * s.num_narrow + v);
          }
        }
      }
    }
  }
  void operator()(const RankArguments& s) const {
    const int64_t P = s.shape.padded_ranks();
    Vector du{nullptr, 0, DType::kFloat32, s.shape.num_tokens * P};
    std::vector<float> sums(static_cast<size_t>(du.size));
    du.data = sums.data();
    for (int64_t at = 0; at < du.size; ++at) {
      double sum = 0.0;
      for (int64_t part = 0; part < s.num_parts; ++part) sum += Get(s.du, part * du.size + at);
      Put(sum, du, at);
    }
    RankGradients(s.shape, Rows(du, P), s.h, s.probs, s.dgate, s.dz, s.scaling);
  }
  void operator()(const SumArguments& s) const {
    for (const SumOutput& each : s.outputs) {
      for (int64_t i = 0; i < s.num_rows; ++i) {
        for (int64_t j = 0; j < each.count; ++j) {
          double sum = 0.0;
          for (int64_t part = 0; part < s.num_parts; ++part) {
            sum += Get(s.parts, (part * s.num_rows + i) * s.num_columns + each.first + j);
          }
          Put(sum, each.out, each.is_transposed ? j * s.num_rows + i : i * each.count + j);
        }
      }
    }
  }
  void operator()(const ExtendedGemm& s) const {
    for (int64_t i = 0; i < s.num_rows; ++i) {
      for (int64_t j = 0; j < s.num_columns; ++j) {
        double sum = s.bias.data == nullptr ? 0.0 : Get(s.bias, j);
        for (int64_t k = 0; k < s.depth; ++k) sum += At(s.left, i, k) * Right(s, s.right, k, j);
        for (int64_t k = 0; k < s.more; ++k) {
          sum += At(s.more_left, i, k) * Right(s, s.more_right, k, j);
        }
        Put(sum, AsVector(s.out), i * s.out.row_stride + j);
      }
    }
  }
  void operator()(const RoutedGemm& s) const {
    const RankShape& shape = s.shape;
    for (int64_t i = 0; i < s.counts.size; ++i) CHECK(s.counts.data[i] == 0, "counts begin at 0");
    const Vector more = AsVector(s.gemm.more_left);
    if (s.gemm.is_input_gradient) {
      const int64_t P = shape.padded_ranks();
      std::vector<float> sums(static_cast<size_t>(shape.num_tokens * P));
      const Vector du{sums.data(), 0, DType::kFloat32, shape.num_tokens * P};
      for (int64_t t = 0; t < shape.num_tokens; ++t) {
        for (int64_t r = 0; r < shape.num_ranks(); ++r) {
          double sum = 0.0;
          for (int64_t n = 0; n < s.gemm.depth; ++n) {
            sum += At(s.gemm.left, t, n) * At(s.narrow, n, r);
          }
          Put(sum, du, t * P + r);
        }
      }
      RankGradients(shape, Rows(du, P), s.h, s.probs, s.dgate, more, s.scaling);
    } else {
      Route(shape, s.gemm.left, s.narrow, s.gemm.depth, s.h, more, s.probs, s.scaling);
    }
    (*this)(s.gemm);
    for (int64_t i = 0; i < s.counts.size; ++i) Mutable(s.counts)[i] = 2;
  }

 private:
  static Matrix Rows(const Vector& v, int64_t num_columns) {
    return {v.data, v.num_bytes, v.dtype, num_columns, 1};
  }
  static double Right(const ExtendedGemm& s, const Matrix& right, int64_t k, int64_t j) {
    return s.is_input_gradient ? At(right, k, j) : At(right, j, k);
  }
  // Whether this part is made by this launch, and says so.
  static bool Makes(const FactorArguments& s, int64_t part) {
    if (s.done.data == nullptr) return true;
    if (s.counts.data == nullptr) return s.done.data[part] == 0;
    for (int64_t i = 0; i < s.counts.size; ++i) {
      if (s.counts.data[i] != 2) return false;
    }
    if (part % 3 == 1) return false;  // a block that came too early
    Mutable(s.done)[part] = 1;
    return true;
  }
  static void Scale(const RankShape& shape, const Vector& h, const Vector& probs, const Vector& u,
                    float scaling) {
    const int64_t R = shape.num_ranks(), P = shape.padded_ranks(), G = shape.num_gates();
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t r = 0; r < P; ++r) {
        const double gate = r < R ? Get(probs, t * G + 1 + r / shape.expert_rank) : 0.0;
        Put(r < R ? scaling * gate * Get(h, t * R + r) : 0.0, u, t * P + r);
      }
    }
  }
  static void Route(const RankShape& shape, const Matrix& x, const Matrix& stack, int64_t num_in,
                    const Vector& h, const Vector& u, const Vector& probs, float scaling) {
    const int64_t R = shape.num_ranks(), P = shape.padded_ranks(), G = shape.num_gates();
    const auto product = [&](int64_t t, int64_t row) {
      double sum = 0.0;
      for (int64_t k = 0; k < num_in; ++k) sum += At(x, t, k) * At(stack, row, k);
      return sum;
    };
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      double total = 0.0;
      for (int64_t g = 0; g < G; ++g) total += std::exp(product(t, P + g));
      for (int64_t g = 0; g < G; ++g) Put(std::exp(product(t, P + g)) / total, probs, t * G + g);
      for (int64_t r = 0; r < R; ++r) Put(product(t, r), h, t * R + r);
    }
    Scale(shape, h, probs, u, scaling);
  }
  static void RankGradients(const RankShape& shape, const Matrix& du, const Vector& h,
                            const Vector& probs, const Vector& dgate, const Vector& dz,
                            float scaling) {
    const int64_t R = shape.num_ranks(), P = shape.padded_ranks(), G = shape.num_gates();
    const int64_t Z = shape.num_rows();
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t z = 0; z < Z; ++z) Put(0.0, dz, t * Z + z);
      std::vector<double> incoming(static_cast<size_t>(G), 0.0);
      double mean = 0.0;
      for (int64_t g = 0; g < G; ++g) {
        double& sum = incoming[static_cast<size_t>(g)];
        if (dgate.data != nullptr) sum = Get(dgate, t * G + g);
        for (int64_t i = 0; g > 0 && i < shape.expert_rank; ++i) {
          const int64_t r = (g - 1) * shape.expert_rank + i;
          sum += scaling * Get(h, t * R + r) * At(du, t, r);
          Put(scaling * Get(probs, t * G + g) * At(du, t, r), dz, t * Z + r);
        }
        mean += Get(probs, t * G + g) * sum;
      }
      for (int64_t g = 0; g < G; ++g) {
        Put(Get(probs, t * G + g) * (incoming[static_cast<size_t>(g)] - mean), dz, t * Z + P + g);
      }
    }
  }
};

// When a stream beside the product comes to run.
enum class Order { kProductFirst, kBesideFirst };

void RunPlan(const LayerPlan& plan, Order order) {
  const PassModel model;
  const auto run = [&](const std::vector<Pass>& passes) {
    for (const Pass& pass : passes) std::visit(model, pass);
  };
  run(plan.first);
  if (order == Order::kBesideFirst) run(plan.beside);
  std::visit(model, plan.product);
  if (order == Order::kProductFirst) run(plan.beside);
  run(plan.last);
}

// Memory of exactly the size, at a multiple of 256 bytes, that begins as NaN.
class WorkspaceMemory {
 public:
  explicit WorkspaceMemory(int64_t num_bytes)
      : num_bytes_(num_bytes),
        data_(static_cast<char*>(
            ::operator new[](static_cast<size_t>(num_bytes), std::align_val_t{256}))) {
    std::memset(data_.get(), 0xff, static_cast<size_t>(num_bytes));
  }
  Vector AsVector() { return {data_.get(), num_bytes_, DType::kBool, num_bytes_}; }

 private:
  struct Free {
    void operator()(char* data) const { ::operator delete[](data, std::align_val_t{256}); }
  };
  int64_t num_bytes_;
  std::unique_ptr<char[], Free> data_;
};

struct Case {
  LayerShape shape;
  bool is_routed, has_bias, has_dgate;
  bool needs_a, needs_b, needs_router;
  Order order;

  std::string Name() const {
    std::string name = is_routed ? "routed" : "extended";
    for (const int64_t size : {shape.ranks.num_tokens, shape.num_in, shape.num_out}) {
      name += " " + std::to_string(size);
    }
    name += ", asked for:";
    if (needs_a) name += " a";
    if (needs_b) name += " b";
    if (needs_router) name += " router";
    if (has_dgate) name += ", dgate";
    return name + (order == Order::kBesideFirst ? ", beside first" : "");
  }
};

// A layer, forward and backward, and the same in fp64.
class Layer {
 public:
  explicit Layer(const Case& c)
      : c_(c),
        T(c.shape.ranks.num_tokens),
        K(c.shape.num_in),
        N(c.shape.num_out),
        R(c.shape.ranks.num_ranks()),
        G(c.shape.ranks.num_gates()),
        x(T, K, 8),
        weight(N, K),
        bias(1, N),
        dy(T, N, 16),
        y(T, N),
        h(T, R),
        dx(T, K),
        a(R, K),
        b(R, N),
        router(G, K),
        probs(T, G),
        dgate(T, G),
        da(R, K),
        drouter(G, K),
        db(N, R) {
    x.Fill(1, 0.25), weight.Fill(2, 0.125), bias.Fill(3, 0.25), dy.Fill(4, 0.25);
    a.Fill(5, 0.125), b.Fill(6, 0.125), router.Fill(7, 0.0625), dgate.Fill(8, 0.25);
  }

  void Run() {
    const RankShape& ranks = c_.shape.ranks;
    // b lies transposed.
    Matrix b_NR = b.AsMatrix();
    std::swap(b_NR.row_stride, b_NR.column_stride);
    const LayerForward forward{c_.shape,
                               c_.is_routed,
                               kScaling,
                               x.AsMatrix(),
                               weight.AsMatrix(),
                               c_.has_bias ? bias.AsVector() : Vector{},
                               a.AsMatrix(),
                               b_NR,
                               router.AsMatrix(),
                               y.AsVector(),
                               h.AsVector(),
                               probs.AsVector()};
    RunIn(forward);
    const Vector none{nullptr, 0, DType::kFloat32, 0};
    const LayerBackward backward{c_.shape,
                                 c_.is_routed,
                                 kScaling,
                                 dy.AsMatrix(),
                                 c_.needs_a || c_.needs_router ? x.AsMatrix() : Matrix{},
                                 weight.AsMatrix(),
                                 a.AsMatrix(),
                                 b_NR,
                                 router.AsMatrix(),
                                 h.AsVector(),
                                 probs.AsVector(),
                                 c_.has_dgate ? dgate.AsVector() : none,
                                 dx.AsVector(),
                                 c_.needs_a ? da.AsVector() : none,
                                 c_.needs_b ? db.AsVector() : none,
                                 c_.needs_router ? drouter.AsVector() : none};
    RunIn(backward);
    CHECK(Invalid(c_.shape).empty() && Invalid(ranks).empty(), c_.Name());
    Compare();
  }

 private:
  template <class Arguments>
  void RunIn(const Arguments& arguments) {
    const int64_t num_bytes = PlanLayer(arguments, nullptr).workspace_bytes;
    WorkspaceMemory memory(num_bytes);
    Vector workspace = memory.AsVector();
    CHECK(InvalidWorkspace(workspace, num_bytes).empty(), c_.Name());
    CHECK(!InvalidWorkspace(workspace, num_bytes + 1).empty(), c_.Name());
    const LayerPlan plan = PlanLayer(arguments, workspace.data);
    CHECK(plan.workspace_bytes == num_bytes, c_.Name());
    CHECK(Invalid(plan).empty(), c_.Name() + ": " + Invalid(plan));
    const std::string overlap = InvalidOverlap(arguments, workspace);
    CHECK(overlap.empty(), c_.Name() + ": " + overlap);
    CheckOverlaps(arguments, workspace);
    CheckReaders(plan);
    RunPlan(plan, c_.order);
    workspace.data = static_cast<char*>(workspace.data) + 16;
    CHECK(!InvalidWorkspace(workspace, num_bytes).empty(), c_.Name());
  }

  template <class Arguments>
  void ExpectOverlap(const std::string& wanted, const Arguments& arguments,
                     const Vector& workspace) const {
    const std::string message = InvalidOverlap(arguments, workspace);
    CHECK(message == wanted, c_.Name() + ": wanted " + wanted + ", got '" + message + "'");
  }

  void CheckOverlaps(const LayerForward& valid, const Vector& workspace) {
    LayerForward layer = valid;
    layer.y.data = workspace.data;
    ExpectOverlap("workspace: must not overlap y", layer, workspace);
    layer.y = valid.y, layer.a.data = workspace.data;
    ExpectOverlap("workspace: must not overlap a", layer, workspace);
    layer.a = valid.a, layer.y.data = x.memory.data() + 1;
    ExpectOverlap("y: must not overlap x", layer, workspace);
    layer.y = valid.y, layer.probs.data = router.memory.data();
    ExpectOverlap("probs: must not overlap router", layer, workspace);
  }

  void CheckOverlaps(const LayerBackward& valid, const Vector& workspace) {
    LayerBackward layer = valid;
    layer.dx.data = x.memory.data();
    const bool reads_x = c_.needs_a || c_.needs_router;
    ExpectOverlap(reads_x ? "dx: must not overlap x" : "", layer, workspace);
    layer.dx.data = workspace.data;
    ExpectOverlap("workspace: must not overlap dx", layer, workspace);
    layer.dx = valid.dx, layer.h.data = workspace.data;
    ExpectOverlap("workspace: must not overlap h", layer, workspace);
    layer.h = valid.h, layer.da = {b.memory.data(), 0, DType::kFloat32, 1};
    ExpectOverlap("da: must not overlap b", layer, workspace);
  }

  // What reads the product's dz beside it looks at the counts first.
  void CheckReaders(const LayerPlan& plan) const {
    const auto* product = std::get_if<RoutedGemm>(&plan.product);
    for (const Pass& pass : plan.beside) {
      const auto* factor = std::get_if<FactorArguments>(&pass);
      if (product == nullptr || factor == nullptr || factor->wide.data != x.memory.data()) continue;
      CHECK(factor->counts.data == product->counts.data, c_.Name() + ": dz before it is there");
    }
  }

  // Each within what rounding h, u, dz and the results to bf16 can do.
  void Compare() {
    std::vector<double> true_da(static_cast<size_t>(R * K), 0.0);
    std::vector<double> true_db(static_cast<size_t>(N * R), 0.0);
    std::vector<double> true_drouter(static_cast<size_t>(G * K), 0.0);
    const auto at = [](int64_t i, int64_t columns, int64_t j) {
      return static_cast<size_t>(i * columns + j);
    };
    for (int64_t t = 0; t < T; ++t) {
      std::vector<double> gate(static_cast<size_t>(G)), ranks(static_cast<size_t>(R)), du(ranks);
      double total = 0.0;
      for (int64_t g = 0; g < G; ++g) {
        double logit = 0.0;
        for (int64_t k = 0; k < K; ++k) logit += x.Get(t, k) * router.Get(g, k);
        total += gate[static_cast<size_t>(g)] = std::exp(logit);
      }
      for (double& each : gate) each /= total;
      for (int64_t r = 0; r < R; ++r) {
        for (int64_t k = 0; k < K; ++k) ranks[static_cast<size_t>(r)] += x.Get(t, k) * a.Get(r, k);
        for (int64_t n = 0; n < N; ++n) du[static_cast<size_t>(r)] += dy.Get(t, n) * b.Get(r, n);
      }
      const auto gate_of = [&](int64_t r) {
        return gate[static_cast<size_t>(1 + r / c_.shape.ranks.expert_rank)];
      };
      for (int64_t n = 0; n < N; ++n) {
        double sum = c_.has_bias ? bias.Get(0, n) : 0.0;
        for (int64_t k = 0; k < K; ++k) sum += x.Get(t, k) * weight.Get(n, k);
        for (int64_t r = 0; r < R; ++r) {
          const double u = kScaling * gate_of(r) * ranks[static_cast<size_t>(r)];
          sum += u * b.Get(r, n);
          true_db[at(n, R, r)] += dy.Get(t, n) * u;
        }
        IsNear("y", y.Get(t, n), sum);
      }
      std::vector<double> incoming(static_cast<size_t>(G), 0.0);
      double mean = 0.0;
      for (int64_t g = 0; g < G; ++g) {
        double& sum = incoming[static_cast<size_t>(g)];
        if (c_.has_dgate) sum += dgate.Get(t, g);
        for (int64_t r = 0; r < R; ++r) {
          if (1 + r / c_.shape.ranks.expert_rank != g) continue;
          sum += kScaling * ranks[static_cast<size_t>(r)] * du[static_cast<size_t>(r)];
        }
        mean += gate[static_cast<size_t>(g)] * sum;
      }
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0.0;
        for (int64_t n = 0; n < N; ++n) sum += dy.Get(t, n) * weight.Get(n, k);
        for (int64_t r = 0; r < R; ++r) {
          const double dh = kScaling * gate_of(r) * du[static_cast<size_t>(r)];
          sum += dh * a.Get(r, k);
          true_da[at(r, K, k)] += dh * x.Get(t, k);
        }
        for (int64_t g = 0; g < G; ++g) {
          const double dlogit =
              gate[static_cast<size_t>(g)] * (incoming[static_cast<size_t>(g)] - mean);
          sum += dlogit * router.Get(g, k);
          true_drouter[at(g, K, k)] += dlogit * x.Get(t, k);
        }
        IsNear("dx", dx.Get(t, k), sum);
      }
    }
    CompareAll("da", &da, true_da, c_.needs_a);
    CompareAll("db", &db, true_db, c_.needs_b);
    CompareAll("drouter", &drouter, true_drouter, c_.needs_router);
  }

  void CompareAll(const std::string& name, Table<float>* ours, const std::vector<double>& truth,
                  bool is_asked_for) {
    for (int64_t i = 0; i < ours->rows; ++i) {
      for (int64_t j = 0; j < ours->columns; ++j) {
        const double value = ours->Get(i, j);
        if (is_asked_for) {
          IsNear(name, value, truth[static_cast<size_t>(i * ours->columns + j)]);
        } else {
          CHECK(std::isnan(value), c_.Name() + ": " + name + " was written");
        }
      }
    }
  }

  void IsNear(const std::string& name, double ours, double truth) const {
    CHECK(std::fabs(ours - truth) <= 0.03 * (1.0 + std::fabs(truth)),
          c_.Name() + ": " + name + " is " + std::to_string(ours) + ", not " +
              std::to_string(truth));
  }

  const Case c_;
  const int64_t T, K, N, R, G;
  Table<BFloat16> x, weight, bias, dy, y, h, dx;
  Table<float> a, b, router, probs, dgate, da, drouter, db;
};

void TestLayers() {
  // One tile and one share, then several of both; ranks that are padded, and that are not.
  const LayerShape shapes[] = {{{50, 3, 5}, 24, 40}, {{300, 4, 8}, 320, 264}, {{1, 1, 1}, 8, 8}};
  for (const LayerShape& shape : shapes) {
    const bool is_large = shape.num_in > 100;
    for (int choice = 0; choice < 64; ++choice) {
      const auto bit = [choice](int i) { return (choice >> i & 1) != 0; };
      if (is_large && choice % 16 != 15) continue;
      Layer({shape, bit(0), bit(1), bit(1), bit(2), bit(3), bit(4),
             bit(5) ? Order::kBesideFirst : Order::kProductFirst})
          .Run();
    }
  }
}

void TestShapes() {
  const LayerShape good{{64, 4, 8}, 64, 96};
  CHECK(Invalid(good).empty(), "a good shape");
  for (const LayerShape& bad :
       {LayerShape{{0, 4, 8}, 64, 96}, LayerShape{{64, 4, 8}, 60, 96}, LayerShape{{64, 4, 8}, 64, 0},
        LayerShape{{64, 4, 8}, int64_t{1} << 40, 96}, LayerShape{{64, 40, 8}, 64, 96}}) {
    CHECK(!Invalid(bad).empty(), "a bad shape");
  }
}

}  // namespace
}  // namespace citi

int main() {
  citi::TestLayers();
  citi::TestShapes();
  return citi::Report();
}
