// The host's tensor cores and copies, which other tests rest on: one product by every road there
// is.

#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "simt_tensor_core.h"

namespace citi {
namespace {

constexpr int kRows = 16, kColumns = 16, kDepth = 32;

template <class Element>
struct Product {
  const Element* a;  // (16, 32)
  const Element* b;  // (32, 16), or (16, 32): transposed
  float* d;          // (16, 16)
};

template <class Element>
void Stage(unsigned char* to, const Element* from, int count, bool waits) {
  for (int i = static_cast<int>(threadIdx.x) * 8; i < count; i += 32 * 8) {
    CopyAsync(to + i * 2, from + i, true);
  }
  CommitCopies();
  if (waits) WaitForCopies<0>();
}

template <class Element>
void Multiply(Product<Element> product, bool b_is_transposed, bool waits) {
  unsigned char* a = SharedMemory();
  unsigned char* b = a + kRows * kDepth * 2;
  Stage(a, product.a, kRows * kDepth, true);
  Stage(b, product.b, kDepth * kColumns, waits);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, c = lane % 4;
  float d[2][4] = {};
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t of_a[4], of_b[4];
    LoadMatrices(of_a, a + ((lane % 16) * kDepth + k + lane / 16 * 8) * 2);
    if (b_is_transposed) {
      const int n = lane % 8 + lane / 16 * 8;
      LoadMatrices(of_b, b + (n * kDepth + k + lane / 8 % 2 * 8) * 2);
    } else {
      LoadMatricesTransposed(of_b, b + ((k + lane % 16) * kColumns + lane / 16 * 8) * 2);
    }
    MultiplyAdd<Element>(d[0], of_a, of_b[0], of_b[1]);
    MultiplyAdd<Element>(d[1], of_a, of_b[2], of_b[3]);
  }
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      product.d[(g + i / 2 * 8) * kColumns + n * 8 + 2 * c + i % 2] = d[n][i];
    }
  }
  WaitForCopies<0>();
}

template <class Element>
bool IsRight(bool b_is_transposed, bool waits) {
  std::vector<Element> a(kRows * kDepth), b(kDepth * kColumns);
  std::vector<float> d(kRows * kColumns, std::nanf(""));
  // Small integers: products and sums are exact.
  for (size_t i = 0; i < a.size(); ++i) a[i] = Rounded<Element>(static_cast<float>(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = Rounded<Element>(static_cast<float>(i * 5 % 11) - 5);
  const Product<Element> product{a.data(), b.data(), d.data()};
  simt::LaunchShared(1, 32, (a.size() + b.size()) * 2, Multiply<Element>, product, b_is_transposed,
                     waits);
  for (int row = 0; row < kRows; ++row) {
    for (int n = 0; n < kColumns; ++n) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        const int at = b_is_transposed ? n * kDepth + k : k * kColumns + n;
        sum +=
            ToFloat(a[static_cast<size_t>(row * kDepth + k)]) * ToFloat(b[static_cast<size_t>(at)]);
      }
      if (d[static_cast<size_t>(row * kColumns + n)] != sum) return false;
    }
  }
  return true;
}

void CheckRounding() {
  const struct {
    float value;
    uint16_t bfloat16, float16;
  } cases[] = {{1.0f, 0x3f80, 0x3c00},
               {-0.0f, 0x8000, 0x8000},
               {1.00390625f, 0x3f80, 0x3c04},
               {1.01171875f, 0x3f82, 0x3c0c},
               {65519.9f, 0x4780, 0x7bff},
               {65520.0f, 0x4780, 0x7c00},
               {5.9604645e-8f, 0x3380, 0x0001},
               {2.9802322e-8f, 0x3300, 0x0000},
               {4.4703484e-8f, 0x3340, 0x0001},
               {6.097555e-5f, 0x3880, 0x03ff},
               {std::numeric_limits<float>::infinity(), 0x7f80, 0x7c00}};
  for (const auto& each : cases) {
    CHECK(Rounded<BFloat16>(each.value).bits == each.bfloat16, std::to_string(each.value));
    CHECK(Rounded<Float16>(each.value).bits == each.float16, std::to_string(each.value));
  }
  CHECK(std::isnan(ToFloat(Rounded<BFloat16>(std::nanf("")))), "NaN in bf16");
  CHECK(std::isnan(ToFloat(Rounded<Float16>(std::nanf("")))), "NaN in fp16");
}

}  // namespace
}  // namespace citi

int main() {
  using namespace citi;
  for (const bool b_is_transposed : {false, true}) {
    CHECK(IsRight<BFloat16>(b_is_transposed, true), "bf16");
    CHECK(IsRight<Float16>(b_is_transposed, true), "fp16");
    CHECK(!IsRight<BFloat16>(b_is_transposed, false), "a missing wait goes unseen");
  }
  CheckRounding();
  return Report();
}
