// Row dots of one part of the tokens, in terms of sixteen lanes; compiled once for each variant.
//
// A dot is summed in 64 lanes: element i of the segment into lane i % 64, then the lanes pairwise.
// Inputs that do not lie feature by feature, or mix fp64 with another dtype, are packed tile by
// tile and then take the same path: the layout changes no bit.
//
// Shapes: T tokens, F features, S segments of `length` features.
#pragma once

#include "cpu/lanes.h"
#include "row_dots_arguments.h"
#include "whole_numbers.h"

namespace citi {
namespace {

constexpr int64_t kStripes = 4;
// Features of a packed tile or of a tile of products; 16 tokens of two matrices are 32 KiB of fp32.
constexpr int64_t kTile = 256;
constexpr int64_t kPackedTokens = 16;
// Shorter segments would leave most lanes empty: their products are summed one by one.
constexpr int64_t kShortSegment = 16;

template <class L, class A, class B>
inline L Products(const A* a, const B* b, const typename L::Value* offset) {
  const L x = L::Load(a);
  return (offset == nullptr ? x : x - L::Load(offset)) * L::Load(b);
}

template <class L, class A, class B>
inline L ProductsOfTail(const A* a, const B* b, const typename L::Value* offset, int64_t n) {
  const L x = LoadTail<L>(a, n);
  return (offset == nullptr ? x : x - LoadTail<L>(offset, n)) * LoadTail<L>(b, n);
}

template <class L>
struct Dot {
  L stripes[kStripes];

  // Adds n products; n is a multiple of 64 unless these are the last.
  template <class A, class B>
  inline void Add(const A* a, const B* b, const typename L::Value* offset, int64_t n) {
    // Locals stay in registers.
    L s0 = stripes[0], s1 = stripes[1], s2 = stripes[2], s3 = stripes[3];
    int64_t i = 0;
    const auto at = [&](int64_t j) { return offset == nullptr ? nullptr : offset + j; };
    for (; i + kStripes * kLanes <= n; i += kStripes * kLanes) {
      s0 = s0 + Products<L>(a + i, b + i, at(i));
      s1 = s1 + Products<L>(a + i + 16, b + i + 16, at(i + 16));
      s2 = s2 + Products<L>(a + i + 32, b + i + 32, at(i + 32));
      s3 = s3 + Products<L>(a + i + 48, b + i + 48, at(i + 48));
    }
    stripes[0] = s0, stripes[1] = s1, stripes[2] = s2, stripes[3] = s3;
    for (int64_t k = 0; i + kLanes <= n; i += kLanes, ++k) {
      stripes[k] = stripes[k] + Products<L>(a + i, b + i, at(i));
    }
    if (i < n) {
      L& stripe = stripes[i / kLanes % kStripes];
      stripe = stripe + ProductsOfTail<L>(a + i, b + i, at(i), n - i);
    }
  }

  inline typename L::Value Sum() const {
    typename L::Value lanes[kLanes];
    ((stripes[0] + stripes[1]) + (stripes[2] + stripes[3])).Store(lanes);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) lanes[i] = lanes[i] + lanes[i + width];
    }
    return lanes[0];
  }
};

// Where the elements of a few tokens' tile are: in the matrices themselves.
template <class A_, class B_>
struct InPlace {
  using A = A_;
  using B = B_;
  static constexpr int64_t kMaxFeatures = INT64_MAX;
  const RowDots& dots;

  explicit InPlace(const RowDots& dots_) : dots(dots_) {}

  void Take(const int64_t* tokens, int64_t num_tokens, int64_t f, int64_t, const A** a,
            const B** b) {
    for (int64_t i = 0; i < num_tokens; ++i) {
      a[i] = static_cast<const A*>(dots.a.data) + tokens[i] * dots.a.row_stride + f;
      b[i] = static_cast<const B*>(dots.b.data) + tokens[i] * dots.b.row_stride + f;
    }
  }
};

template <class Value, class Element>
void PackElements(const Matrix& matrix, const int64_t* tokens, int64_t num_tokens, int64_t f,
                  int64_t n, Value* to) {
  const Element* from = static_cast<const Element*>(matrix.data);
  const auto convert = [](Element element) {
    if constexpr (sizeof(Element) == 2) {
      return static_cast<Value>(ToFloat(element));
    } else {
      return static_cast<Value>(element);
    }
  };
  // Tokens that lie side by side are read so.
  for (int64_t j = 0; j < n; ++j) {
    const Element* column = from + (f + j) * matrix.column_stride;
    for (int64_t i = 0; i < num_tokens; ++i) {
      to[i * kTile + j] = convert(column[tokens[i] * matrix.row_stride]);
    }
  }
}

// A copy, in the dtype of the dots.
template <class Value>
struct Packed {
  using A = Value;
  using B = Value;
  static constexpr int64_t kMaxFeatures = kTile;
  const RowDots& dots;
  Value copies[2][kPackedTokens * kTile];

  explicit Packed(const RowDots& dots_) : dots(dots_) {}

  void Take(const int64_t* tokens, int64_t num_tokens, int64_t f, int64_t n, const Value** a,
            const Value** b) {
    Pack(dots.a, tokens, num_tokens, f, n, copies[0]);
    Pack(dots.b, tokens, num_tokens, f, n, copies[1]);
    for (int64_t i = 0; i < num_tokens; ++i) {
      a[i] = copies[0] + i * kTile;
      b[i] = copies[1] + i * kTile;
    }
  }

 private:
  static void Pack(const Matrix& matrix, const int64_t* tokens, int64_t num_tokens, int64_t f,
                   int64_t n, Value* to) {
    switch (matrix.dtype) {
      case DType::kFloat32:
        return PackElements<Value, float>(matrix, tokens, num_tokens, f, n, to);
      case DType::kBFloat16:
        return PackElements<Value, BFloat16>(matrix, tokens, num_tokens, f, n, to);
      case DType::kFloat16:
        return PackElements<Value, Float16>(matrix, tokens, num_tokens, f, n, to);
      case DType::kFloat64:
        return PackElements<Value, double>(matrix, tokens, num_tokens, f, n, to);
      case DType::kBool:
        return;
    }
  }
};

// The next tokens that count, at most `wanted`; advances t.
inline int64_t NextTokens(const RowDots& dots, int64_t wanted, int64_t end, int64_t* t,
                          int64_t* tokens) {
  const uint8_t* valid = static_cast<const uint8_t*>(dots.valid.data);
  int64_t found = 0;
  for (; *t < end && found < wanted; ++*t) {
    if (valid == nullptr || valid[*t] != 0) tokens[found++] = *t;
  }
  return found;
}

template <class Value>
inline double Contribution(Value dot, bool is_signed) {
  return static_cast<double>(is_signed || dot > 0 ? dot : -dot);
}

template <class L, class Source, int64_t kTokens>
void LongSegments(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  using Value = typename L::Value;
  const Value* offset = static_cast<const Value*>(dots.offset.data);
  const int64_t num_segments = dots.num_segments();
  const int64_t length = dots.num_features / num_segments;
  Source source(dots);
  int64_t tokens[kTokens];
  const typename Source::A* a[kTokens];
  const typename Source::B* b[kTokens];
  for (int64_t t = begin; const int64_t n = NextTokens(dots, kTokens, end, &t, tokens);) {
    for (int64_t s = 0; s < num_segments; ++s) {
      Dot<L> of_token[kTokens];
      for (int64_t i = 0; i < n; ++i) {
        for (L& stripe : of_token[i].stripes) stripe = L::Zero();
      }
      for (int64_t l = 0; l < length; l += Min(Source::kMaxFeatures, length)) {
        const int64_t f = s * length + l;
        const int64_t width = Min(Source::kMaxFeatures, length - l);
        source.Take(tokens, n, f, width, a, b);
        for (int64_t i = 0; i < n; ++i) {
          of_token[i].Add(a[i], b[i], offset == nullptr ? nullptr : offset + f, width);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        sums[s] += Contribution(of_token[i].Sum(), dots.is_signed);
      }
    }
  }
}

// sums[f] += | products |, for tokens in turn.
template <class L, class A, class B>
inline void AddColumns(const A* const* a, const B* const* b, const typename L::Value* offset,
                       int64_t num_tokens, int64_t n, bool is_signed, double* sums) {
  const auto widened = [=](const L& products) {
    const L signless = is_signed ? products : products.Abs();
    if constexpr (sizeof(typename L::Value) == sizeof(double)) {
      return signless;
    } else {
      return Widen(signless);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Doubles sum = Doubles::Load(sums + i);
    const typename L::Value* at = offset == nullptr ? nullptr : offset + i;
    for (int64_t t = 0; t < num_tokens; ++t) {
      sum = sum + widened(Products<L>(a[t] + i, b[t] + i, at));
    }
    sum.Store(sums + i);
  }
  if (i < n) {
    Doubles sum = LoadTail<Doubles>(sums + i, n - i);
    const typename L::Value* at = offset == nullptr ? nullptr : offset + i;
    for (int64_t t = 0; t < num_tokens; ++t) {
      sum = sum + widened(ProductsOfTail<L>(a[t] + i, b[t] + i, at, n - i));
    }
    double padded[kLanes];
    sum.Store(padded);
    for (int64_t j = 0; i + j < n; ++j) sums[i + j] = padded[j];
  }
}

// sums[s] += | products of a segment, summed one by one |; n is a multiple of the length.
template <class L, class A, class B>
inline void AddShortSegments(const A* a, const B* b, const typename L::Value* offset, int64_t n,
                             int64_t length, bool is_signed, double* sums) {
  typename L::Value products[kTile];
  const auto at = [&](int64_t j) { return offset == nullptr ? nullptr : offset + j; };
  for (int64_t i = 0; i < n; i += kLanes) {
    const bool is_whole = i + kLanes <= n;
    (is_whole ? Products<L>(a + i, b + i, at(i)) : ProductsOfTail<L>(a + i, b + i, at(i), n - i))
        .Store(products + i);
  }
  for (int64_t s = 0; s < n / length; ++s) {
    typename L::Value dot = products[s * length];
    for (int64_t l = 1; l < length; ++l) dot = dot + products[s * length + l];
    sums[s] += Contribution(dot, is_signed);
  }
}

template <class L, class Source, int64_t kTokens>
void ShortSegments(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  using Value = typename L::Value;
  const Value* offset = static_cast<const Value*>(dots.offset.data);
  const int64_t length = dots.num_features / dots.num_segments();
  const int64_t tile = kTile - kTile % length;
  Source source(dots);
  int64_t tokens[kTokens];
  const typename Source::A* a[kTokens];
  const typename Source::B* b[kTokens];
  for (int64_t t = begin; const int64_t n = NextTokens(dots, kTokens, end, &t, tokens);) {
    for (int64_t f = 0; f < dots.num_features; f += tile) {
      const int64_t width = Min(tile, dots.num_features - f);
      const Value* offset_of_tile = offset == nullptr ? nullptr : offset + f;
      source.Take(tokens, n, f, width, a, b);
      if (length == 1) {
        AddColumns<L>(a, b, offset_of_tile, n, width, dots.is_signed, sums + f);
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        AddShortSegments<L>(a[i], b[i], offset_of_tile, width, length, dots.is_signed,
                            sums + f / length);
      }
    }
  }
}

template <class L, class Source>
void Segments(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  constexpr bool kIsPacked = Source::kMaxFeatures == kTile;
  if (dots.num_features / dots.num_segments() >= kShortSegment) {
    // In place one token after the other: rows are read from their first to their last byte.
    return LongSegments<L, Source, kIsPacked ? kPackedTokens : 1>(dots, begin, end, sums);
  }
  ShortSegments<L, Source, kIsPacked ? kPackedTokens : 8>(dots, begin, end, sums);
}

template <class A>
void WithB(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  switch (dots.b.dtype) {
    case DType::kFloat32:
      return Segments<Floats, InPlace<A, float>>(dots, begin, end, sums);
    case DType::kBFloat16:
      return Segments<Floats, InPlace<A, BFloat16>>(dots, begin, end, sums);
    default:
      return Segments<Floats, InPlace<A, Float16>>(dots, begin, end, sums);
  }
}

inline void RowDotsOfTokensHere(const RowDots& dots, int64_t begin, int64_t end, double* sums) {
  for (int64_t s = 0; s < dots.num_segments(); ++s) sums[s] = 0.0;
  const bool in_place = dots.a.column_stride == 1 && dots.b.column_stride == 1;
  if (dots.is_double()) {
    if (in_place && dots.a.dtype == dots.b.dtype) {
      return Segments<Doubles, InPlace<double, double>>(dots, begin, end, sums);
    }
    return Segments<Doubles, Packed<double>>(dots, begin, end, sums);
  }
  if (!in_place) return Segments<Floats, Packed<float>>(dots, begin, end, sums);
  switch (dots.a.dtype) {
    case DType::kFloat32:
      return WithB<float>(dots, begin, end, sums);
    case DType::kBFloat16:
      return WithB<BFloat16>(dots, begin, end, sums);
    default:
      return WithB<Float16>(dots, begin, end, sums);
  }
}

}  // namespace
}  // namespace citi
