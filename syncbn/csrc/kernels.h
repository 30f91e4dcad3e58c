// What the operators and the passes over a batch agree on; knows nothing of torch, so that kernels compile in seconds.
#pragma once

#include <cstdint>

namespace syncbn {

enum DType { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3, kNumDTypes = 4 };
enum Activation { kIdentity = 0, kRelu = 1, kLeakyRelu = 2, kSilu = 3, kNumActivations = 4 };

// One tensor of shape (N, C, S), S being every spatial dimension together. Strides are in elements.
//
// Planes (NCHW-like): S has stride 1; `outer` is the stride of N, `inner` that of C.
// Rows (NHWC-like): C has stride 1; `outer` is the stride of N, `inner` that of S.
struct Stream {
  void* data;  // null where there is no such tensor
  int64_t outer;
  int64_t inner;
};

struct Batch {
  bool rows;
  int64_t n, c, s;
  const uint8_t* mask;  // (N, S), contiguous, 0 or 1; null where every position counts
};

// What one job reduces: some tiles of some channels (planes; see `planes_tiling`), or some of the N·S rows.
struct Part {
  int64_t channel_begin, channel_end;
  int64_t begin, end;
};

// What one job maps: positions in (N, C, S) order (planes), or rows in (N, S) order.
struct Range {
  int64_t begin, end;
};

// How a channel of planes is cut into tiles: whole planes together while they fit, equal pieces of one otherwise.
struct Tiling {
  int64_t planes;  // in a tile
  int64_t chunk;   // positions of each plane in a tile
  int64_t chunks;  // tiles that a plane is cut into
  int64_t tiles;   // of a channel
};

constexpr int64_t kTileElements = 4096;  // 16 KiB of float32: the second pass over a tile finds it in the L1 cache

static inline Tiling planes_tiling(const Batch& batch) {
  Tiling tiling{1, batch.s, 1, batch.n};
  if (batch.s > kTileElements) {
    const int64_t pieces = (batch.s + kTileElements - 1) / kTileElements;
    tiling.chunk = (batch.s + pieces - 1) / pieces;
    tiling.chunks = (batch.s + tiling.chunk - 1) / tiling.chunk;
    tiling.tiles = batch.n * tiling.chunks;
  } else if (batch.s > 0) {
    tiling.planes = kTileElements / batch.s;
    tiling.tiles = (batch.n + tiling.planes - 1) / tiling.planes;
  }
  return tiling;
}

// y = f((x − pivot) · scale + shift [+ residual]). Coefficients of shape (C,) in the precision of the computation:
// double for float64, float for the rest.
struct Normalize {
  Stream x, residual, y;
  const void *pivot, *scale, *shift;
  Activation activation;
  double negative_slope;
};

// g = f'·dy, Σg and Σg·(x − pivot). `saved` is y for relu and leaky_relu, the residual for silu. scale and shift serve
// silu alone, whose z they form again. `grad` receives g, where there is one.
struct GradientSums {
  Stream dy, x, saved, grad;
  const void *pivot, *scale, *shift;
  Activation activation;
  double negative_slope;
};

// dx = g · grad_scale + (x − pivot) · scale + shift.
struct InputGradient {
  Stream grad, x, dx;
  const void *pivot, *grad_scale, *scale, *shift;
};

// The passes for one element type. Sums are (C,) and start as zeros; a pass sets those of its part's channels. `spare`
// is (C,) as well.
struct Passes {
  void (*moments)(const Batch&, const Stream& x, Part, double* sum, double* sum_of_squares, double* spare);
  void (*normalize)(const Batch&, const Normalize&, Range);
  void (*gradient_sums)(const Batch&, const GradientSums&, Part, double* sum, double* sum_of_products);
  void (*input_gradient)(const Batch&, const InputGradient&, Range);
};

struct Kernels {
  Passes passes[kNumDTypes];
  // Statistics `[mean, 1/σ, n]` and Σ(x − mean)², (C,), from the payload `[Σx, Σx², n]`.
  void (*finalize)(const double* payload, int64_t channels, double eps, double* statistics, double* squared_deviations);
};

// The same kernels, compiled for different instruction sets.
extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace syncbn
