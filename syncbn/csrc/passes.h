// The passes over a batch. Included by one translation unit per instruction set, which has defined
// SYNCBN_VECTOR_BYTES and SYNCBN_KERNELS, the name of its table.
//
// A vector holds consecutive positions of one channel in planes, and consecutive channels of one position in rows.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

using syncbn::Activation;
using syncbn::Batch;
using syncbn::Part;
using syncbn::Range;
using syncbn::Stream;

// Accumulators of a reduction that do not wait for each other.
constexpr int kSlots = 4;

// Squares that an accumulator takes before it is added to another. Where values lie far from zero they are multiples of
// their last place, most of whose squares have the same low bits; a long sum in float32 rounds those off all in the
// same direction. (Measured at mean/σ = 1e4: 4e-7 of the variance without runs, 5e-8 with.)
constexpr int kRun = 16;

// How far ahead of a reduction over planes memory is asked for, in elements.
constexpr int64_t kPlanesAhead = 512;

// Vectors of channels that a loop over rows keeps in registers: two lines of the cache with AVX2, since rows are read
// from memory at leaps.
constexpr int kBlock = 4;

SYNCBN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Asks for what lies `elements` ahead, where the processor's own prefetching loses track: at blocks of the channels
// of many rows.
template <class T>
SYNCBN_INLINE void prefetch(const T* p, int64_t elements) {
  __builtin_prefetch(p + elements);
}

template <int I>
struct Slot {
  static constexpr int value = I;
};

// Calls f(offset, lanes, slot) for the vectors of `length` elements, the slots in turn.
template <class A, class F>
SYNCBN_INLINE void for_vectors(int64_t length, F f) {
  constexpr int width = kWidth<A>;
  int64_t i = 0;
  for (; i + kSlots * width <= length; i += kSlots * width) {
    f(i, All{}, Slot<0>{});
    f(i + width, All{}, Slot<1>{});
    f(i + 2 * width, All{}, Slot<2>{});
    f(i + 3 * width, All{}, Slot<3>{});
  }
  if (i + width <= length) {
    f(i, All{}, Slot<0>{});
    i += width;
    if (i + width <= length) {
      f(i, All{}, Slot<1>{});
      i += width;
      if (i + width <= length) {
        f(i, All{}, Slot<2>{});
        i += width;
      }
    }
  }
  if (i < length) f(i, First{static_cast<int>(length - i)}, Slot<3>{});
}

// The same for what may be computed twice: f(offset, lanes, slot, fresh), of so many slots. Where a span ends, the last
// whole vector is computed again in part, for storing a part of a vector is slow on some processors; `fresh` are the
// lanes that are new.
template <class A, int kNumSlots, class F>
SYNCBN_INLINE void for_overlapping_vectors(int64_t length, F f) {
  static_assert(kNumSlots == 1 || kNumSlots == kSlots);
  constexpr int width = kWidth<A>;
  int64_t i = 0;
  if constexpr (kNumSlots == kSlots) {
    for (; i + kSlots * width <= length; i += kSlots * width) {
      f(i, All{}, Slot<0>{}, All{});
      f(i + width, All{}, Slot<1>{}, All{});
      f(i + 2 * width, All{}, Slot<2>{}, All{});
      f(i + 3 * width, All{}, Slot<3>{}, All{});
    }
  }
  for (; i + width <= length; i += width) f(i, All{}, Slot<0>{}, All{});
  if (i == length) return;
  if (length < width) {
    const First lanes{static_cast<int>(length)};
    f(0, lanes, Slot<0>{}, lanes);
  } else {
    f(length - width, All{}, Slot<kNumSlots - 1>{}, Last{static_cast<int>(length - i)});
  }
}

// Calls f(channel, lanes, Slot<vectors>) for blocks of channels.
template <class A, class F>
SYNCBN_INLINE void for_channel_blocks(int64_t channels, F f) {
  constexpr int width = kWidth<A>;
  int64_t c = 0;
  for (; c + kBlock * width <= channels; c += kBlock * width) f(c, All{}, Slot<kBlock>{});
  if (c + 2 * width <= channels) {
    f(c, All{}, Slot<2>{});
    c += 2 * width;
  }
  if (c + width <= channels) {
    f(c, All{}, Slot<1>{});
    c += width;
  }
  if (c < channels) f(c, First{static_cast<int>(channels - c)}, Slot<1>{});
}

// Calls f(sample, first row in the sample, rows) for pieces of a range of rows.
template <class F>
SYNCBN_INLINE void for_row_tiles(const Batch& batch, int64_t begin, int64_t end, int64_t tile, F f) {
  int64_t n = begin / batch.s, s = begin % batch.s;
  while (begin < end) {
    const int64_t rows = smaller(smaller(end - begin, batch.s - s), tile);
    f(n, s, rows);
    begin += rows;
    s += rows;
    if (s == batch.s) {
      s = 0;
      ++n;
    }
  }
}

// A tile of planes: samples [n, n + planes), positions [s, s + positions) of each, for channels [c, c + channels).
struct Tile {
  int64_t c, channels, n, planes, s, positions;
};

// Planes from here on are worth a fold into float64 each.
constexpr int64_t kLongPlane = 512;

// Channels whose sums are kept side by side, at most. Short planes are walked in the order of memory, one sample's
// planes of a block of channels after the other: a walk through the samples of one channel would leap by the same
// stride each time, into the same few lines of the cache.
constexpr int kChannels = 64;

// Calls begin(c, channels) for blocks of `block` channels of a part, f(tile) for the tiles of each, and
// end(c, channels).
template <class Begin, class F, class End>
SYNCBN_INLINE void for_plane_tiles(const Batch& batch, const Part& part, int64_t block, Begin begin, F f, End end) {
  const syncbn::Tiling tiling = syncbn::planes_tiling(batch);
  for (int64_t c = part.channel_begin; c < part.channel_end; c += block) {
    const int64_t channels = smaller(block, part.channel_end - c);
    begin(c, channels);
    for (int64_t index = part.begin; index < part.end; ++index) {
      const int64_t n = index / tiling.chunks * tiling.planes;
      const int64_t s = index % tiling.chunks * tiling.chunk;
      f(Tile{c, channels, n, smaller(batch.n - n, tiling.planes), s, smaller(batch.s - s, tiling.chunk)});
    }
    end(c, channels);
  }
}

// Calls f(k, plane) for the planes of a tile in the order of memory; k counts its channels.
template <class F>
SYNCBN_INLINE void for_planes(const Tile& tile, F f) {
  for (int64_t n = tile.n; n < tile.n + tile.planes; ++n) {
    for (int64_t k = 0; k < tile.channels; ++k) f(k, n);
  }
}

// Rows of a tile. Not too few, for each tile costs a fold into float64; not so many that it leaves the cache.
SYNCBN_INLINE int64_t rows_per_tile(int64_t channels) {
  const int64_t rows = 2 * syncbn::kTileElements / channels;
  return rows < 32 ? 32 : rows;
}

// Rows that a pass takes side by side, which loads what belongs to a channel once for all of them. Memory is fastest in
// its own order, a row at a time; but in short rows the loads weigh more, and rows of a page and more are streams that
// the processor follows side by side.
constexpr int kBand = 2;
constexpr int64_t kShortRow = 256, kPage = 4096;  // bytes

// The distance between the rows of a band, which has to be the same in all tensors; 0 where rows go one by one.
template <class T, int kStreams>
SYNCBN_INLINE int64_t band_stride(int64_t channels, const Stream (&streams)[kStreams]) {
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T)), stride = streams[0].inner;
  if (bytes > kShortRow && bytes < kPage) return 0;
  for (const Stream& stream : streams) {
    if (stream.data && stream.inner != stride) return 0;
  }
  return stride;
}

// Calls f(row, Slot<rows>) for the rows [begin, end) of a sample, in bands or one by one, and skip(row) for those that
// its mask leaves out.
template <class F, class Skip>
SYNCBN_INLINE void for_bands(int64_t begin, int64_t end, bool bands, const uint8_t* mask, F f, Skip skip) {
  int64_t r = begin;
  if (bands && !mask) {
    for (; r + kBand <= end; r += kBand) f(r, Slot<kBand>{});
  }
  for (; r < end; ++r) {
    if (mask && !mask[r]) {
      skip(r);
    } else {
      f(r, Slot<1>{});
    }
  }
}

template <class T>
SYNCBN_INLINE T* at(const Stream& stream, int64_t outer, int64_t inner) {
  return static_cast<T*>(stream.data) + outer * stream.outer + inner * stream.inner;
}

SYNCBN_INLINE const uint8_t* mask_at(const Batch& batch, int64_t n, int64_t s) {
  return batch.mask ? batch.mask + n * batch.s + s : nullptr;
}

template <class A>
SYNCBN_INLINE Real<A> sum_slots(const Real<A> (&slots)[kSlots]) {
  return (slots[0] + slots[1]) + (slots[2] + slots[3]);
}

// Which positions of a tile count.
SYNCBN_INLINE int64_t count_in(const Batch& batch, const Tile& tile) {
  if (!batch.mask) return tile.planes * tile.positions;
  int64_t count = 0;
  for (int64_t n = tile.n; n < tile.n + tile.planes; ++n) {
    const uint8_t* mask = mask_at(batch, n, tile.s);
    uint32_t counted = 0;
    for (int64_t i = 0; i < tile.positions; ++i) counted += mask[i] != 0;
    count += counted;
  }
  return count;
}

// The lanes of a vector of A as one or two vectors of doubles: f(offset, its lanes, which half).
template <class A, class F>
SYNCBN_INLINE void for_doubles(All, F f) {
  f(0, All{}, 0);
  if constexpr (sizeof(A) == sizeof(float)) f(kWidth<double>, All{}, 1);
}
template <class A, class F>
SYNCBN_INLINE void for_doubles(First lanes, F f) {
  f(0, First{lanes.count < kWidth<double> ? lanes.count : kWidth<double>}, 0);
  if constexpr (sizeof(A) == sizeof(float)) {
    if (lanes.count > kWidth<double>) f(kWidth<double>, First{lanes.count - kWidth<double>}, 1);
  }
}
SYNCBN_INLINE Real<double> doubles(Real<double> value, int) { return value; }
SYNCBN_INLINE Real<double> doubles(Real<float> value, int half) { return widen(value, half); }

// Moments about a pivot: Σd and Σd² of n values, d = x − pivot. D is double or a vector of them.
template <class D>
struct Centered {
  D pivot{}, d{}, d2{};
  double n = 0;

  // Takes in a tile's moments, moved to this pivot; the first tile's pivot is kept. So what is added up is of the size
  // of the deviations, and the cancellation that raw moments bring is paid for once instead of once a tile.
  SYNCBN_INLINE void add(const Centered& tile) {
    if (n == 0) {
      *this = tile;
      return;
    }
    const D shift = tile.pivot - pivot;
    const D moved = tile.d + tile.n * shift;
    d += moved;
    d2 += tile.d2 + shift * (tile.d + moved);
    n += tile.n;
  }
  SYNCBN_INLINE D sum() const { return d + n * pivot; }
  SYNCBN_INLINE D sum_of_squares() const { return d2 + pivot * (sum() + d); }
};

// Channels of a block: as many as leave its tile in the L2 cache between the two passes over it.
SYNCBN_INLINE int64_t moments_block(const Batch& batch) {
  const syncbn::Tiling tiling = syncbn::planes_tiling(batch);
  const int64_t fit = 4 * syncbn::kTileElements / (smaller(tiling.planes, batch.n) * tiling.chunk);
  return batch.s >= kLongPlane || fit < 1 ? 1 : smaller(fit, kChannels);
}

template <class T, bool kMasked>
void plane_moments(const Batch& batch, const Stream& x, const Part& part, double* sum, double* sum_of_squares,
                   double*) {
  using A = ComputeType<T>;
  Centered<double> totals[kChannels];
  for_plane_tiles(
      batch, part, moments_block(batch),
      [&](int64_t, int64_t channels) __attribute__((always_inline)) {
        for (int64_t k = 0; k < channels; ++k) totals[k] = {};
      },
      [&](const Tile& tile) __attribute__((always_inline)) {
        const double count = static_cast<double>(count_in(batch, tile));
        if (kMasked && count == 0) return;
        Real<A> values[kChannels];
        for (int64_t k = 0; k < tile.channels; ++k) values[k] = Real<A>{};
        for_planes(tile, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          const T* p = at<const T>(x, n, tile.c + k) + tile.s;
          const uint8_t* mask = mask_at(batch, n, tile.s);
          Real<A> slots[kSlots] = {};
          for_vectors<A>(tile.positions, [&](int64_t i, auto lanes, auto slot) __attribute__((always_inline)) {
            Real<A> value = load(p + i, lanes);
            if constexpr (kMasked) value = select<A>(load_mask<A>(mask + i, lanes), value, Real<A>{});
            slots[slot.value] += value;
            prefetch(p + i, kPlanesAhead);
          });
          values[k] += sum_slots<A>(slots);
        });
        A pivots[kChannels];
        Real<A> d[kChannels], d2[kChannels];
        for (int64_t k = 0; k < tile.channels; ++k) {
          pivots[k] = static_cast<A>(sum_lanes(values[k]) / count);
          d[k] = d2[k] = Real<A>{};
        }
        for_planes(tile, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          const A pivot = pivots[k];
          constexpr int64_t run = kRun * kSlots * kWidth<A>;
          for (int64_t begin = 0; begin < tile.positions; begin += run) {
            const T* p = at<const T>(x, n, tile.c + k) + tile.s + begin;
            const uint8_t* mask = mask_at(batch, n, tile.s + begin);
            const int64_t length = smaller(tile.positions - begin, run);
            Real<A> run_d[kSlots] = {}, run_d2[kSlots] = {};
            for_vectors<A>(length, [&](int64_t i, auto lanes, auto slot) __attribute__((always_inline)) {
              Real<A> centered = load(p + i, lanes) - pivot;
              if constexpr (kMasked) {
                centered = select<A>(load_mask<A>(mask + i, lanes), centered, Real<A>{});
              } else {
                centered = keep<A>(centered, lanes);
              }
              run_d[slot.value] += centered;
              run_d2[slot.value] += centered * centered;
            });
            d[k] += sum_slots<A>(run_d);
            d2[k] += sum_slots<A>(run_d2);
          }
        });
        for (int64_t k = 0; k < tile.channels; ++k) {
          totals[k].add({pivots[k], sum_lanes(d[k]), sum_lanes(d2[k]), count});
        }
      },
      [&](int64_t c, int64_t channels) __attribute__((always_inline)) {
        for (int64_t k = 0; k < channels; ++k) {
          sum[c + k] = totals[k].sum();
          sum_of_squares[c + k] = totals[k].sum_of_squares();
        }
      });
}

template <class T, bool kMasked>
void row_moments(const Batch& batch, const Stream& x, const Part& part, double* sum, double* sum_of_squares,
                 double* pivots) {
  using A = ComputeType<T>;
  constexpr int width = kWidth<A>;
  double done = 0;  // rows that `sum` and `sum_of_squares` hold about `pivots`
  for_row_tiles(batch, part.begin, part.end, rows_per_tile(batch.c), [&](int64_t n, int64_t s, int64_t rows) {
    const T* first = at<const T>(x, n, s);
    const uint8_t* mask = mask_at(batch, n, s);
    int64_t count = rows;
    if constexpr (kMasked) {
      count = 0;
      for (int64_t r = 0; r < rows; ++r) count += mask[r] != 0;
      if (count == 0) return;
    }
    for_channel_blocks<A>(batch.c, [&](int64_t c, auto lanes, auto block) __attribute__((always_inline)) {
      constexpr int vectors = block.value;
      constexpr int slots = kSlots / vectors;  // rows in flight
      const auto for_rows = [&](int64_t r, int64_t end, auto f) __attribute__((always_inline)) {
        const T* p = first + c + r * x.inner;
        if constexpr (!kMasked && slots > 1) {
          for (; r + slots <= end; r += slots) {
            for (int slot = 0; slot < slots; ++slot, p += x.inner) f(p, slot);
          }
        }
        for (; r < end; ++r, p += x.inner) {
          if (!kMasked || mask[r]) f(p, 0);
        }
      };
      Real<A> values[slots][vectors] = {};
      for_rows(0, rows, [&](const T* p, int slot) __attribute__((always_inline)) {
        for (int v = 0; v < vectors; ++v) {
          values[slot][v] += load(p + v * width, lanes);
          prefetch(p + v * width, vectors * width);
        }
      });
      Real<A> pivot[vectors];
      const A share = A(1) / static_cast<A>(count);
      for (int v = 0; v < vectors; ++v) {
        for (int slot = 1; slot < slots; ++slot) values[0][v] += values[slot][v];
        pivot[v] = values[0][v] * share;
      }
      Real<A> d[slots][vectors] = {}, d2[slots][vectors] = {};
      for (int64_t r = 0; r < rows; r += kRun * slots) {
        Real<A> run_d2[slots][vectors] = {};
        for_rows(r, smaller(r + kRun * slots, rows), [&](const T* p, int slot) __attribute__((always_inline)) {
          for (int v = 0; v < vectors; ++v) {
            const Real<A> centered = load(p + v * width, lanes) - pivot[v];
            d[slot][v] += centered;
            run_d2[slot][v] += centered * centered;
          }
        });
        for (int slot = 0; slot < slots; ++slot) {
          for (int v = 0; v < vectors; ++v) d2[slot][v] += run_d2[slot][v];
        }
      }
      for (int v = 0; v < vectors; ++v) {
        for (int slot = 1; slot < slots; ++slot) {
          d[0][v] += d[slot][v];
          d2[0][v] += d2[slot][v];
        }
        for_doubles<A>(lanes, [&](int offset, auto part_lanes, int half) __attribute__((always_inline)) {
          const int64_t to = c + v * width + offset;
          Centered<Real<double>> total{load(pivots + to, part_lanes), load(sum + to, part_lanes),
                                       load(sum_of_squares + to, part_lanes), done};
          total.add({doubles(pivot[v], half), doubles(d[0][v], half), doubles(d2[0][v], half),
                     static_cast<double>(count)});
          store(pivots + to, total.pivot, part_lanes);
          store(sum + to, total.d, part_lanes);
          store(sum_of_squares + to, total.d2, part_lanes);
        });
      }
    });
    done += static_cast<double>(count);
  });
  if (done == 0) return;
  for_channel_blocks<double>(batch.c, [&](int64_t c, auto lanes, auto block) __attribute__((always_inline)) {
    for (int v = 0; v < block.value; ++v) {
      const int64_t to = c + v * kWidth<double>;
      const Centered<Real<double>> total{load(pivots + to, lanes), load(sum + to, lanes),
                                         load(sum_of_squares + to, lanes), done};
      store(sum + to, total.sum(), lanes);
      store(sum_of_squares + to, total.sum_of_squares(), lanes);
    }
  });
}

template <class T>
void moments(const Batch& batch, const Stream& x, Part part, double* sum, double* sum_of_squares, double* spare) {
  const auto pass = batch.rows ? (batch.mask ? row_moments<T, true> : row_moments<T, false>)
                               : (batch.mask ? plane_moments<T, true> : plane_moments<T, false>);
  pass(batch, x, part, sum, sum_of_squares, spare);
}

// Element-wise passes. An Op gives the coefficients of channels, the places of rows in memory, and the value to store.
// It is taken by value: through a reference, each store would have everything loaded again that it might have changed.
template <class Op>
SYNCBN_INLINE void map_planes(const Batch& batch, const Op op, Range range) {
  using A = typename Op::A;
  const int64_t first = range.begin / batch.s;
  int64_t s = range.begin % batch.s, n = first / batch.c, c = first % batch.c;
  for (int64_t done = range.begin; done < range.end;) {
    const int64_t positions = smaller(batch.s - s, range.end - done);
    const uint8_t* mask = mask_at(batch, n, s);
    const auto coefficients = op.broadcast_coefficients(c);
    const auto place = op.place(n, c, s);
    for_overlapping_vectors<A, 1>(
        positions, [&](int64_t i, auto lanes, auto, auto) __attribute__((always_inline)) {
          Real<A> value = op(coefficients, place, i, lanes);
          if (mask) value = select<A>(load_mask<A>(mask + i, lanes), value, Real<A>{});
          store(place.out + i, value, lanes);
        });
    done += positions;
    s = 0;
    if (++c == batch.c) {
      c = 0;
      ++n;
    }
  }
}

template <class Op>
SYNCBN_INLINE void map_rows(const Batch& batch, const Op op, Range range) {
  using A = typename Op::A;
  const int64_t channels = batch.c, stride = op.band_stride(channels);
  for_row_tiles(batch, range.begin, range.end, range.end, [&](int64_t n, int64_t s, int64_t rows) {
    for_bands(
        s, s + rows, stride != 0, mask_at(batch, n, 0),
        [&](int64_t r, auto height) __attribute__((always_inline)) {
          const auto place = op.place(n, r, 0);
          for_overlapping_vectors<A, 1>(channels, [&](int64_t c, auto lanes, auto, auto) __attribute__((always_inline)) {
            const auto coefficients = op.load_coefficients(c, lanes);
            for (int i = 0; i < height.value; ++i) {
              const int64_t at = i * stride + c;
              store(place.out + at, op(coefficients, place, at, lanes), lanes);
            }
          });
        },
        [&](int64_t r) { memset(op.place(n, r, 0).out, 0, sizeof(typename Op::T) * channels); });
  });
}

template <class Op>
void map(const Batch& batch, const Op& op, Range range) {
  if (batch.rows) {
    map_rows(batch, op, range);
  } else {
    map_planes(batch, op, range);
  }
}

// (x − pivot) · scale + shift, of one channel or of a vector of them.
template <class A_>
struct Affine {
  using A = A_;
  Real<A> pivot, scale, shift;

  template <class Arguments>
  static SYNCBN_INLINE Affine broadcast(const Arguments& arguments, int64_t c) {
    return {::broadcast(static_cast<const A*>(arguments.pivot)[c]),
            ::broadcast(static_cast<const A*>(arguments.scale)[c]),
            ::broadcast(static_cast<const A*>(arguments.shift)[c])};
  }
  template <class Arguments, class L>
  static SYNCBN_INLINE Affine load(const Arguments& arguments, int64_t c, L lanes) {
    return {::load(static_cast<const A*>(arguments.pivot) + c, lanes),
            ::load(static_cast<const A*>(arguments.scale) + c, lanes),
            ::load(static_cast<const A*>(arguments.shift) + c, lanes)};
  }
};

// F.relu and F.leaky_relu hand a NaN on.
template <Activation kActivation, class A>
SYNCBN_INLINE Real<A> activate(Real<A> z, A negative_slope) {
  if constexpr (kActivation == syncbn::kRelu) return select<A>(z < 0, Real<A>{}, z);
  if constexpr (kActivation == syncbn::kLeakyRelu) return select<A>(z < 0, z * negative_slope, z);
  if constexpr (kActivation == syncbn::kSilu) return z / (A(1) + exp(-z));
  return z;
}

// f'·dy; at zero the side below, and a NaN of y lets dy through. `output` is y for relu and leaky_relu, z for silu.
template <Activation kActivation, class A>
SYNCBN_INLINE Real<A> differentiate(Real<A> dy, Real<A> output, A negative_slope) {
  if constexpr (kActivation == syncbn::kRelu) return select<A>(output <= 0, Real<A>{}, dy);
  if constexpr (kActivation == syncbn::kLeakyRelu) return select<A>(output <= 0, dy * negative_slope, dy);
  if constexpr (kActivation == syncbn::kSilu) {
    const Real<A> sigmoid = A(1) / (A(1) + exp(-output));
    return dy * (sigmoid * (A(1) + output * (A(1) - sigmoid)));
  }
  return dy;
}

template <class T_, Activation kActivation, bool kResidual>
struct NormalizeOp {
  using T = T_;
  using A = ComputeType<T>;
  using Coefficients = Affine<A>;
  struct Place {
    const T *x, *residual;
    T* out;
  };
  const syncbn::Normalize arguments;

  SYNCBN_INLINE int64_t band_stride(int64_t channels) const {
    return ::band_stride<T>(channels, {arguments.x, arguments.residual, arguments.y});
  }
  SYNCBN_INLINE Coefficients broadcast_coefficients(int64_t c) const { return Affine<A>::broadcast(arguments, c); }
  template <class L>
  SYNCBN_INLINE Coefficients load_coefficients(int64_t c, L lanes) const {
    return Affine<A>::load(arguments, c, lanes);
  }
  SYNCBN_INLINE Place place(int64_t outer, int64_t inner, int64_t last) const {
    return {at<const T>(arguments.x, outer, inner) + last,
            kResidual ? at<const T>(arguments.residual, outer, inner) + last : nullptr,
            at<T>(arguments.y, outer, inner) + last};
  }
  template <class L>
  SYNCBN_INLINE Real<A> operator()(const Coefficients& k, const Place& place, int64_t i, L lanes) const {
    Real<A> z = (load(place.x + i, lanes) - k.pivot) * k.scale + k.shift;
    if constexpr (kResidual) z += load(place.residual + i, lanes);
    return activate<kActivation, A>(z, static_cast<A>(arguments.negative_slope));
  }
};

template <class T, bool kResidual>
void normalize_with(const Batch& batch, const syncbn::Normalize& arguments, Range range) {
  switch (arguments.activation) {
    case syncbn::kRelu:
      return map(batch, NormalizeOp<T, syncbn::kRelu, kResidual>{arguments}, range);
    case syncbn::kLeakyRelu:
      return map(batch, NormalizeOp<T, syncbn::kLeakyRelu, kResidual>{arguments}, range);
    case syncbn::kSilu:
      return map(batch, NormalizeOp<T, syncbn::kSilu, kResidual>{arguments}, range);
    default:
      return map(batch, NormalizeOp<T, syncbn::kIdentity, kResidual>{arguments}, range);
  }
}

template <class T>
void normalize(const Batch& batch, const syncbn::Normalize& arguments, Range range) {
  if (arguments.residual.data) {
    normalize_with<T, true>(batch, arguments, range);
  } else {
    normalize_with<T, false>(batch, arguments, range);
  }
}

template <class T_>
struct InputGradientOp {
  using T = T_;
  using A = ComputeType<T>;
  struct Coefficients {
    Affine<A> x;
    Real<A> grad_scale;
  };
  struct Place {
    const T *grad, *x;
    T* out;
  };
  const syncbn::InputGradient arguments;

  SYNCBN_INLINE int64_t band_stride(int64_t channels) const {
    return ::band_stride<T>(channels, {arguments.x, arguments.grad, arguments.dx});
  }
  SYNCBN_INLINE Coefficients broadcast_coefficients(int64_t c) const {
    return {Affine<A>::broadcast(arguments, c), broadcast(static_cast<const A*>(arguments.grad_scale)[c])};
  }
  template <class L>
  SYNCBN_INLINE Coefficients load_coefficients(int64_t c, L lanes) const {
    return {Affine<A>::load(arguments, c, lanes), load(static_cast<const A*>(arguments.grad_scale) + c, lanes)};
  }
  SYNCBN_INLINE Place place(int64_t outer, int64_t inner, int64_t last) const {
    return {at<const T>(arguments.grad, outer, inner) + last, at<const T>(arguments.x, outer, inner) + last,
            at<T>(arguments.dx, outer, inner) + last};
  }
  template <class L>
  SYNCBN_INLINE Real<A> operator()(const Coefficients& k, const Place& place, int64_t i, L lanes) const {
    const Real<A> from_x = (load(place.x + i, lanes) - k.x.pivot) * k.x.scale + k.x.shift;
    return load(place.grad + i, lanes) * k.grad_scale + from_x;
  }
};

template <class T>
void input_gradient(const Batch& batch, const syncbn::InputGradient& arguments, Range range) {
  map(batch, InputGradientOp<T>{arguments}, range);
}

template <class T, Activation kActivation>
struct Gradient {
  using A = ComputeType<T>;
  struct Place {
    const T *dy, *x, *saved;
    T* grad;
  };
  const syncbn::GradientSums arguments;

  SYNCBN_INLINE int64_t band_stride(int64_t channels) const {
    return ::band_stride<T>(channels, {arguments.x, arguments.dy, arguments.saved, arguments.grad});
  }
  SYNCBN_INLINE Affine<A> broadcast_coefficients(int64_t c) const { return Affine<A>::broadcast(arguments, c); }
  template <class L>
  SYNCBN_INLINE Affine<A> load_coefficients(int64_t c, L lanes) const {
    return Affine<A>::load(arguments, c, lanes);
  }
  SYNCBN_INLINE Place place(int64_t outer, int64_t inner, int64_t last) const {
    return {at<const T>(arguments.dy, outer, inner) + last, at<const T>(arguments.x, outer, inner) + last,
            arguments.saved.data ? at<const T>(arguments.saved, outer, inner) + last : nullptr,
            arguments.grad.data ? at<T>(arguments.grad, outer, inner) + last : nullptr};
  }
  // g, and x − pivot in `centered`.
  template <class L>
  SYNCBN_INLINE Real<A> operator()(const Affine<A>& k, const Place& place, int64_t i, L lanes,
                                   Real<A>& centered) const {
    const Real<A> dy = load(place.dy + i, lanes);
    centered = load(place.x + i, lanes) - k.pivot;
    Real<A> output{};
    if constexpr (kActivation == syncbn::kSilu) {
      output = centered * k.scale + k.shift;
      if (place.saved) output += load(place.saved + i, lanes);
    } else if constexpr (kActivation != syncbn::kIdentity) {
      output = load(place.saved + i, lanes);
    }
    return differentiate<kActivation, A>(dy, output, static_cast<A>(arguments.negative_slope));
  }
};

template <class T, Activation kActivation, bool kMasked>
void plane_gradient_sums(const Batch& batch, const syncbn::GradientSums& arguments, const Part& part, double* sum,
                         double* sum_of_products) {
  using A = ComputeType<T>;
  constexpr bool kWrites = kMasked || kActivation != syncbn::kIdentity;
  const Gradient<T, kActivation> gradient{arguments};
  const auto add_plane = [&](int64_t n, int64_t c, const Tile& tile, Real<A>& total, Real<A>& total_of_products)
                             __attribute__((always_inline)) {
    const Affine<A> coefficients = gradient.broadcast_coefficients(c);
    const auto place = gradient.place(n, c, tile.s);
    const uint8_t* mask = mask_at(batch, n, tile.s);
    Real<A> slots[kSlots] = {}, product_slots[kSlots] = {};
    for_overlapping_vectors<A, kSlots>(
        tile.positions, [&](int64_t i, auto lanes, auto slot, auto fresh) __attribute__((always_inline)) {
          Real<A> centered;
          Real<A> g = gradient(coefficients, place, i, lanes, centered);
          if constexpr (kMasked) {
            const Int<A> counted = load_mask<A>(mask + i, lanes);
            g = select<A>(counted, g, Real<A>{});
            centered = select<A>(counted, centered, Real<A>{});
          }
          if constexpr (kWrites) store(place.grad + i, g, lanes);
          slots[slot.value] += keep<A>(g, fresh);
          product_slots[slot.value] += keep<A>(g * centered, fresh);
        });
    total += sum_slots<A>(slots);
    total_of_products += sum_slots<A>(product_slots);
  };
  const bool many_chunks = syncbn::planes_tiling(batch).chunks > 1;
  if (batch.s >= kLongPlane) {
    for_plane_tiles(
        batch, part, many_chunks ? 1 : batch.c, [](int64_t, int64_t) {},
        [&](const Tile& tile) __attribute__((always_inline)) {
          for_planes(tile, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
            Real<A> total{}, total_of_products{};
            add_plane(n, tile.c + k, tile, total, total_of_products);
            sum[tile.c + k] += sum_lanes(total);
            sum_of_products[tile.c + k] += sum_lanes(total_of_products);
          });
        },
        [](int64_t, int64_t) {});
    return;
  }
  for_plane_tiles(
      batch, part, kChannels, [](int64_t, int64_t) {},
      [&](const Tile& tile) __attribute__((always_inline)) {
        Real<A> totals[kChannels], totals_of_products[kChannels];
        for (int64_t k = 0; k < tile.channels; ++k) totals[k] = totals_of_products[k] = Real<A>{};
        for_planes(tile, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
          add_plane(n, tile.c + k, tile, totals[k], totals_of_products[k]);
        });
        for (int64_t k = 0; k < tile.channels; ++k) {
          sum[tile.c + k] += sum_lanes(totals[k]);
          sum_of_products[tile.c + k] += sum_lanes(totals_of_products[k]);
        }
      },
      [](int64_t, int64_t) {});
}

// Channels whose sums a pass over rows keeps in the L1 cache, and rows that are added up before they go into float64.
constexpr int64_t kSpan = 1024;
constexpr int64_t kRows = 256;

template <class T, Activation kActivation>
void row_gradient_sums(const Batch& batch, const syncbn::GradientSums& arguments, const Part& part, double* sum,
                       double* sum_of_products) {
  using A = ComputeType<T>;
  constexpr bool kWrites = kActivation != syncbn::kIdentity;
  const Gradient<T, kActivation> gradient{arguments};
  const int64_t all_channels = batch.c;
  const int64_t stride = gradient.band_stride(all_channels);
  const int64_t most_rows = smaller(rows_per_tile(all_channels), kRows);
  for_row_tiles(batch, part.begin, part.end, most_rows, [&](int64_t n, int64_t s, int64_t rows) {
    const uint8_t* mask = mask_at(batch, n, 0);
    for (int64_t first = 0; first < all_channels; first += kSpan) {
      const int64_t channels = smaller(all_channels - first, kSpan);
      alignas(64) A totals[kSpan], totals_of_products[kSpan];
      memset(totals, 0, sizeof(A) * channels);
      memset(totals_of_products, 0, sizeof(A) * channels);
      for_bands(
          s, s + rows, stride != 0, mask,
          [&](int64_t r, auto height) __attribute__((always_inline)) {
            const auto place = gradient.place(n, r, first);
            for_overlapping_vectors<A, 1>(
                channels, [&](int64_t c, auto lanes, auto, auto fresh) __attribute__((always_inline)) {
                  const Affine<A> coefficients = gradient.load_coefficients(first + c, lanes);
                  Real<A> total{}, total_of_products{};
                  for (int i = 0; i < height.value; ++i) {
                    const int64_t at = i * stride + c;
                    Real<A> centered;
                    const Real<A> g = gradient(coefficients, place, at, lanes, centered);
                    if (kWrites || mask) store(place.grad + at, g, lanes);
                    total += g;
                    total_of_products += g * centered;
                  }
                  store(totals + c, load(totals + c, lanes) + keep<A>(total, fresh), lanes);
                  store(totals_of_products + c, load(totals_of_products + c, lanes) + keep<A>(total_of_products, fresh),
                        lanes);
                });
          },
          [&](int64_t r) { memset(gradient.place(n, r, first).grad, 0, sizeof(T) * channels); });
      for (int64_t c = 0; c < channels; ++c) {
        sum[first + c] += static_cast<double>(totals[c]);
        sum_of_products[first + c] += static_cast<double>(totals_of_products[c]);
      }
    }
  });
}

template <class T, Activation kActivation>
void gradient_sums_with(const Batch& batch, const syncbn::GradientSums& arguments, const Part& part, double* sum,
                        double* sum_of_products) {
  const auto pass = batch.rows  ? row_gradient_sums<T, kActivation>
                    : batch.mask ? plane_gradient_sums<T, kActivation, true>
                                 : plane_gradient_sums<T, kActivation, false>;
  pass(batch, arguments, part, sum, sum_of_products);
}

template <class T>
void gradient_sums(const Batch& batch, const syncbn::GradientSums& arguments, Part part, double* sum,
                   double* sum_of_products) {
  switch (arguments.activation) {
    case syncbn::kRelu:
      return gradient_sums_with<T, syncbn::kRelu>(batch, arguments, part, sum, sum_of_products);
    case syncbn::kLeakyRelu:
      return gradient_sums_with<T, syncbn::kLeakyRelu>(batch, arguments, part, sum, sum_of_products);
    case syncbn::kSilu:
      return gradient_sums_with<T, syncbn::kSilu>(batch, arguments, part, sum, sum_of_products);
    default:
      return gradient_sums_with<T, syncbn::kIdentity>(batch, arguments, part, sum, sum_of_products);
  }
}

// Plain loops, which the compiler makes vectors of.
void finalize(const double* payload, int64_t channels, double eps, double* __restrict statistics,
              double* __restrict squared_deviations) {
  const double *sums = payload, *squares = payload + channels;
  double *means = statistics, *invstds = statistics + channels;
  const double count = payload[2 * channels], n = count < 1 ? 1 : count;
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = sums[c] / n;
    // Σx² − (Σx)²/n, with (Σx)²/n = mean·Σx + (rest of the division)·Σx and the rounding of mean·Σx as well: from the
    // payload on, nothing more is lost to cancellation.
    const double product = mean * sums[c];
    const double rest = __builtin_fma(mean, sums[c], -product) + __builtin_fma(-mean, n, sums[c]) / n * sums[c];
    double deviations = (squares[c] - product) - rest;
    deviations = deviations < 0 ? 0 : deviations;  // rounding of a constant channel; a NaN stays
    means[c] = mean;
    squared_deviations[c] = deviations;
    invstds[c] = 1 / __builtin_sqrt(deviations / n + eps);
  }
  statistics[2 * channels] = count;
}

template <class T>
constexpr syncbn::Passes passes_of() {
  return {moments<T>, normalize<T>, gradient_sums<T>, input_gradient<T>};
}

}  // namespace

// In the order of DType.
const syncbn::Kernels syncbn::SYNCBN_KERNELS = {
    {passes_of<double>(), passes_of<float>(), passes_of<BFloat16>(), passes_of<Float16>()}, finalize};
