// MOLoRA as phases of tasks, in terms of sixteen lanes; compiled once for each variant.
//
//   forward    pack a, b and router as panels; block by block of tokens: shrink, route, expand
//              a few tokens: molora_few_tokens.h, molora_token_lanes.h
//   backward   pack; block by block of tokens: shrink, rank gradients, expand; block by block of
//              columns: the sums over tokens
#pragma once

#include "cpu/molora_dropout.h"
#include "cpu/molora_few_tokens.h"
#include "cpu/molora_rank_space.h"
#include "cpu/molora_sums.h"
#include "cpu/molora_token_lanes.h"
#include "whole_numbers.h"

namespace citi {
namespace {

// Of [a; router] in one panel or in two.
constexpr int64_t kMaxMoloraLanes = RoundUp(kMaxMoloraRows, kLanes) + kLanes;

// Cuts a workspace of fp32 into pieces of words.
class Workspace {
 public:
  explicit Workspace(const Vector& workspace) : at_(static_cast<float*>(workspace.data)) {}

  template <class Number>
  Number* Take(int64_t num_words) {
    float* taken = at_;
    at_ += RoundUp(num_words, kLanes);
    return reinterpret_cast<Number*>(taken);
  }

 private:
  float* at_;
};

inline int64_t NumBlocks(const MoloraSizes& sizes) {
  return CeilDiv(sizes.num_tokens, kMoloraTokens);
}

inline TokenBlock BlockOf(const MoloraSizes& sizes, int64_t task) {
  const int64_t begin = task * kMoloraTokens;
  return {begin, Min(kMoloraTokens, sizes.num_tokens - begin)};
}

// [a; router] in one panel; with dropout, where they see different inputs, in two.
template <class Words>
struct DownPanels {
  Panel<Words> ranks;  // of a, and of router unless it has its own
  Panel<Words> gates;  // of router, or of no rows

  template <class Problem>
  DownPanels(const Problem& problem, bool rows_are_lanes)
      : ranks{RowsOf(problem), problem.sizes.num_in, rows_are_lanes, nullptr},
        gates{AllRowsOf(problem.router, problem.dropout ? problem.sizes.num_gates() : 0),
              problem.sizes.num_in, rows_are_lanes, nullptr} {}

  int64_t NumTasks() const { return ranks.NumTasks() + gates.NumTasks(); }
  void Pack(int64_t task) const {
    const int64_t first = ranks.NumTasks();
    task < first ? ranks.Pack(task) : gates.Pack(task - first);
  }
  void Take(Workspace* workspace) {
    ranks.to = workspace->Take<typename Words::Number>(ranks.size());
    gates.to = workspace->Take<typename Words::Number>(gates.size());
  }

 private:
  template <class Problem>
  static Rows RowsOf(const Problem& problem) {
    const int64_t rank = problem.sizes.stacked_rank;
    return {problem.a, rank, problem.router, problem.dropout ? rank : problem.sizes.num_rows()};
  }
};

template <class Words>
class ForwardRun {
 public:
  explicit ForwardRun(const MoloraForward& forward)
      : forward_(forward),
        sizes_(forward.sizes),
        down_(forward, true),
        up_{AllRowsOf(forward.b, sizes_.num_out), sizes_.stacked_rank, true, nullptr},
        u_{nullptr, sizes_.stacked_rank} {
    Workspace workspace(forward.workspace);
    down_.Take(&workspace);
    up_.to = workspace.Take<Number>(up_.size());
    u_.numbers = workspace.Take<Number>(NumBlocks(sizes_) * kMoloraTokens *
                                        WordsOf<Words>(sizes_.stacked_rank));
  }

  int64_t NumPackTasks() const { return down_.NumTasks() + up_.NumTasks(); }
  void Pack(int64_t task) const {
    const int64_t first = down_.NumTasks();
    task < first ? down_.Pack(task) : up_.Pack(task - first);
  }

  int64_t NumTokenTasks() const { return NumBlocks(sizes_); }
  void Tokens(int64_t task) const {
    alignas(64) float z[kMoloraTokens * kMaxMoloraLanes];
    const TokenBlock block = BlockOf(sizes_, task);
    const int64_t rank_stride = down_.ranks.num_lanes();
    const float* logits = z + sizes_.stacked_rank;
    int64_t logits_stride = rank_stride;
    if (forward_.dropout) {
      float* gates = z + block.num_tokens * rank_stride;
      ShrinkKept(forward_.x, block, down_.ranks, down_.gates, sizes_.num_in, *forward_.dropout, z,
                 gates);
      logits = gates, logits_stride = down_.gates.num_lanes();
    } else {
      Shrink(forward_.x, block, down_.ranks, sizes_.num_in, z);
    }
    Number* u = u_.Block(block.begin);
    for (int64_t t = 0; t < block.num_tokens; ++t) {
      Route<typename Words::Element>(
          forward_, z + t * rank_stride, logits + t * logits_stride, block.begin + t,
          [=](int64_t j, float number) { u_.Put(u, t, j, Words::Of(number)); });
      u_.Complete(u, t);
    }
    Expand(u, up_, forward_.y, block, sizes_.num_out, forward_.has_base);
  }

 private:
  using Number = typename Words::Number;
  const MoloraForward& forward_;
  const MoloraSizes& sizes_;
  DownPanels<Words> down_;  // depth K, lanes [a; router]
  Panel<Words> up_;         // depth R, lanes N
  ExpandOperand<Words> u_;
};

template <class Words>
class BackwardRun {
 public:
  explicit BackwardRun(const MoloraBackward& backward)
      : backward_(backward),
        sizes_(backward.sizes),
        up_{AllRowsOf(backward.b, sizes_.num_out), sizes_.stacked_rank, false, nullptr},
        down_(backward, false),
        dz_{nullptr, down_.ranks.rows.num_rows},
        dlogits_{nullptr, down_.gates.rows.num_rows},
        dz_of_tokens_{nullptr, sizes_.num_rows()},
        u_of_tokens_{nullptr, sizes_.stacked_rank} {
    Workspace workspace(backward.workspace);
    up_.to = workspace.Take<Number>(up_.size());
    down_.Take(&workspace);
    for (ExpandOperand<Words>* each : {&dz_, &dlogits_}) {
      each->numbers = workspace.Take<Number>(NumBlocks(sizes_) * kMoloraTokens *
                                             WordsOf<Words>(each->num_columns));
    }
    const int64_t num_words = WordsOf<Words>(sizes_.num_tokens);
    dz_of_tokens_.numbers = workspace.Take<Number>(num_words * sizes_.num_rows());
    u_of_tokens_.numbers = workspace.Take<Number>(num_words * sizes_.stacked_rank);
  }

  int64_t NumPackTasks() const {
    return (HasDu() ? up_.NumTasks() : 0) + (HasDx() ? down_.NumTasks() : 0);
  }
  void Pack(int64_t task) const {
    const int64_t first = HasDu() ? up_.NumTasks() : 0;
    task < first ? up_.Pack(task) : down_.Pack(task - first);
  }

  int64_t NumTokenTasks() const { return NumBlocks(sizes_); }
  void Tokens(int64_t task) const {
    const TokenBlock block = BlockOf(sizes_, task);
    if (HasDb()) PutU(block);
    if (!HasDz()) return;
    alignas(64) float du[kMoloraTokens * kMaxMoloraLanes];
    if (HasDu()) Shrink(backward_.dy, block, up_, sizes_.num_out, du);
    Number* dz = dz_.Block(block.begin);
    Number* dlogits = dlogits_.Block(block.begin);
    for (int64_t t = 0; t < block.num_tokens; ++t) {
      RankGradient<Words> gradient{backward_, block.begin + t, {}};
      gradient.Compute(HasDu() ? du + t * up_.num_lanes() : nullptr);
      for (int64_t j = 0; j < sizes_.num_rows(); ++j) {
        const Number number = Words::Of(gradient.dz[j]);
        const int64_t j_of_gates = j - dz_.num_columns;
        j_of_gates < 0 ? dz_.Put(dz, t, j, number) : dlogits_.Put(dlogits, t, j_of_gates, number);
        dz_of_tokens_.Put(block.begin + t, j, number);
      }
      dz_.Complete(dz, t);
      dlogits_.Complete(dlogits, t);
    }
    CompleteLast(block, dz_of_tokens_);
    if (!HasDx()) return;
    if (backward_.dropout) {
      ExpandKept<Words>({dz, &down_.ranks}, {dlogits, &down_.gates}, backward_.dx, block,
                        sizes_.num_in, backward_.has_base, *backward_.dropout);
    } else {
      Expand(dz, down_.ranks, backward_.dx, block, sizes_.num_in, backward_.has_base);
    }
  }

  int64_t NumSumTasks() const { return NumUpSumTasks() + NumDownSumTasks(); }
  void Sum(int64_t task) const {
    task < NumUpSumTasks() ? SumUp(task * kSumColumns)
                           : SumDown((task - NumUpSumTasks()) * kSumColumns);
  }

 private:
  using Number = typename Words::Number;
  using X = typename Words::Element;

  bool HasDx() const { return backward_.dx.data != nullptr; }
  bool HasDb() const { return backward_.db.data != nullptr; }
  bool HasDown() const { return backward_.da.data != nullptr || backward_.drouter.data != nullptr; }
  bool HasDz() const { return HasDx() || HasDown(); }
  bool HasDu() const { return backward_.dy.data != nullptr && HasDz(); }
  int64_t NumUpSumTasks() const { return HasDb() ? CeilDiv(sizes_.num_out, kSumColumns) : 0; }
  int64_t NumDownSumTasks() const { return HasDown() ? CeilDiv(sizes_.num_in, kSumColumns) : 0; }

  void CompleteLast(const TokenBlock& block, const SumOperand<Words>& operand) const {
    if (block.begin + block.num_tokens == sizes_.num_tokens) operand.Complete(sizes_.num_tokens);
  }

  void PutU(const TokenBlock& block) const {
    const int64_t rank = sizes_.stacked_rank / sizes_.num_experts;
    for (int64_t t = block.begin; t < block.begin + block.num_tokens; ++t) {
      const X* h = static_cast<const X*>(backward_.h.data) + t * sizes_.stacked_rank;
      const float* probs = static_cast<const float*>(backward_.probs.data) + t * sizes_.num_gates();
      for (int64_t e = 0, j = 0; e < sizes_.num_experts; ++e) {
        const float scale = backward_.scaling * probs[e + 1];
        for (const int64_t end = j + rank; j < end; ++j) {
          u_of_tokens_.Put(t, j, Words::Of(IfKept(probs[e + 1], ToFloat(h[j]) * scale)));
        }
      }
    }
    CompleteLast(block, u_of_tokens_);
  }

  // db, whose rows are the columns of dy
  void SumUp(int64_t column) const {
    alignas(64) float sums[kSumRows][kSumColumns];
    const int64_t width = Min(kSumColumns, sizes_.num_out - column);
    for (int64_t m = 0; m < sizes_.stacked_rank; m += kSumRows) {
      const int64_t num_rows = Min(kSumRows, sizes_.stacked_rank - m);
      const SummedRows<Words> u{u_of_tokens_.numbers + m * Words::kNumbers, sizes_.stacked_rank,
                                num_rows};
      SumOverTokens(u, AllRowsOf(backward_.dy, sizes_.num_tokens), sizes_.num_out, column,
                    kUnchanged, sums);
      for (int64_t i = 0; i < num_rows; ++i) {
        Store(sums[i], width, backward_.db, column * sizes_.stacked_rank + m + i,
              sizes_.stacked_rank);
      }
    }
  }

  // da and drouter
  void SumDown(int64_t column) const {
    const int64_t rank = sizes_.stacked_rank;
    const bool has_da = backward_.da.data != nullptr;
    const int64_t last = backward_.drouter.data != nullptr ? sizes_.num_rows() : rank;
    if (!backward_.dropout) return SumRows(has_da ? 0 : rank, last, column, kUnchanged);
    if (has_da) {
      SumRows(0, rank, column,
              [&](int64_t d, int64_t depth, int64_t input, int64_t num_lanes, Number* panel) {
                DropInputsOfPanel<Words>(*backward_.dropout, d, depth, input, num_lanes, panel);
              });
    }
    SumRows(rank, last, column, kUnchanged);
  }

  // Rows [begin, end) of dz^T x.
  template <class Change>
  void SumRows(int64_t begin, int64_t end, int64_t column, const Change& change) const {
    alignas(64) float sums[kSumRows][kSumColumns];
    const int64_t width = Min(kSumColumns, sizes_.num_in - column);
    const int64_t rank = sizes_.stacked_rank;
    for (int64_t m = begin; m < end; m += kSumRows) {
      const int64_t num_rows = Min(kSumRows, end - m);
      const SummedRows<Words> dz{dz_of_tokens_.numbers + m * Words::kNumbers, sizes_.num_rows(),
                                 num_rows};
      SumOverTokens(dz, AllRowsOf(backward_.x, sizes_.num_tokens), sizes_.num_in, column, change,
                    sums);
      for (int64_t i = m; i < m + num_rows; ++i) {
        const bool is_router = i >= rank;
        Store(sums[i - m], width, is_router ? backward_.drouter : backward_.da,
              (is_router ? i - rank : i) * sizes_.num_in + column, 1);
      }
    }
  }

  static void Store(const float* sums, int64_t n, const Vector& vector, int64_t at,
                    int64_t stride) {
    if (vector.dtype == DType::kFloat32) {
      float* to = static_cast<float*>(vector.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i * stride] = sums[i];
    } else {
      BFloat16* to = static_cast<BFloat16*>(vector.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i * stride] = Rounded<BFloat16>(sums[i]);
    }
  }

  static constexpr auto kUnchanged = [](int64_t, int64_t, int64_t, int64_t, Number*) {};

  const MoloraBackward& backward_;
  const MoloraSizes& sizes_;
  Panel<Words> up_;               // depth N, lanes R
  DownPanels<Words> down_;        // depth [a; router], lanes K
  ExpandOperand<Words> dz_;       // what meets down_.ranks
  ExpandOperand<Words> dlogits_;  // what meets down_.gates
  SumOperand<Words> dz_of_tokens_;
  SumOperand<Words> u_of_tokens_;
};

template <class Words>
constexpr MoloraKernels KernelsOf() {
  using Forward = ForwardRun<Words>;
  using Few = ForwardOfFew<typename Words::Element>;
  using Lanes = ForwardInLanes;
  using Backward = BackwardRun<Words>;
  return {{{[](const MoloraForward& f) { return Forward(f).NumPackTasks(); },
            [](const MoloraForward& f, int64_t task) { Forward(f).Pack(task); }},
           {[](const MoloraForward& f) { return Forward(f).NumTokenTasks(); },
            [](const MoloraForward& f, int64_t task) { Forward(f).Tokens(task); }}},
          {{[](const MoloraForward& f) { return Few(f).NumShrinkTasks(); },
            [](const MoloraForward& f, int64_t task) { Few(f).Shrink(task); }},
           {[](const MoloraForward& f) { return Few(f).NumRouteTasks(); },
            [](const MoloraForward& f, int64_t) { Few(f).Route(); }},
           {[](const MoloraForward& f) { return Few(f).NumExpandTasks(); },
            [](const MoloraForward& f, int64_t task) { Few(f).Expand(task); }}},
          {{[](const MoloraForward& f) { return Lanes(f).NumPackTasks(); },
            [](const MoloraForward& f, int64_t task) { Lanes(f).Pack(task); }},
           {[](const MoloraForward& f) { return Lanes(f).NumShrinkTasks(); },
            [](const MoloraForward& f, int64_t task) { Lanes(f).Shrink(task); }},
           {[](const MoloraForward& f) { return Lanes(f).NumRouteTasks(); },
            [](const MoloraForward& f, int64_t) { Lanes(f).Route(); }},
           {[](const MoloraForward& f) { return Lanes(f).NumExpandTasks(); },
            [](const MoloraForward& f, int64_t task) { Lanes(f).Expand(task); }}},
          {{[](const MoloraBackward& b) { return Backward(b).NumPackTasks(); },
            [](const MoloraBackward& b, int64_t task) { Backward(b).Pack(task); }},
           {[](const MoloraBackward& b) { return Backward(b).NumTokenTasks(); },
            [](const MoloraBackward& b, int64_t task) { Backward(b).Tokens(task); }},
           {[](const MoloraBackward& b) { return Backward(b).NumSumTasks(); },
            [](const MoloraBackward& b, int64_t task) { Backward(b).Sum(task); }}},
          kNumInLanes};
}

inline MoloraKernels MoloraKernelsHere(DType dtype) {
  if (dtype == DType::kFloat32) return KernelsOf<Singles<float>>();
#if defined(CITI_AVX512_BF16)
  return KernelsOf<Pairs>();
#else
  return KernelsOf<Singles<BFloat16>>();
#endif
}

}  // namespace
}  // namespace citi
