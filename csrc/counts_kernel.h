// The softmax over a gene's levels, vectorized across cells. Included once for each instruction set.

#include "simd.h"

constexpr int vectors_per_step = 2;  // vectors of cells per step of the loop over levels
constexpr int64_t unit = vectors_per_step * VL;
constexpr float log2e = 1.44269504088896341f;

static inline V load_some(const float* from, int64_t n) {
  if (n >= VL) return load(from);
  float some[VL] = {};
  std::copy_n(from, n, some);
  return load(some);
}

// Target levels as integers, stored in the bits of floats so that they can be transposed.
static inline V load_some(const uint8_t* from, int64_t n) {
  uint8_t some[VL] = {};
  std::copy_n(from, std::min<int64_t>(n, VL), some);
  typedef uint8_t B __attribute__((vector_size(VL)));
  B b;
  std::memcpy(&b, some, sizeof b);
  return std::bit_cast<V>(__builtin_convertvector(b, I));
}

// A strip of cells by up to VL genes. Scratch memory holds it transposed: row i, `strip` numbers long, has the cells of
// gene i side by side, and zeros after the last cell.
struct Strip {
  int64_t cell, cells, gene, genes;
  int64_t whole() const { return (cells + unit - 1) / unit * unit; }

  // `row(cell)` points to the first gene of a cell
  template <class Row>
  void read(Row&& row, float* to) const {
    for (int64_t first = 0; first < whole(); first += VL) {
      V tile[VL];
      for (int i = 0; i < VL; ++i) tile[i] = first + i < cells ? load_some(row(cell + first + i) + gene, genes) : V{};
      transpose(tile);
      for (int i = 0; i < VL; ++i) store(to + i * strip + first, tile[i]);
    }
  }

  void read(const Rows& from, float* to) const {
    read([&](int64_t row) { return static_cast<const float*>(from[row]); }, to);
  }

  void write(const float* from, const Rows& to) const {
    for (int64_t first = 0; first < cells; first += VL) {
      V tile[VL];
      for (int i = 0; i < VL; ++i) tile[i] = load(from + i * strip + first);
      transpose(tile);
      for (int64_t i = 0; i < std::min<int64_t>(VL, cells - first); ++i) {
        float* row = static_cast<float*>(to[cell + first + i]) + gene;
        if (genes >= VL)
          store(row, tile[i]);
        else
          std::memcpy(row, &tile[i], genes * sizeof(float));
      }
    }
  }
};

// One gene's tables, and its rows of cells.
struct Gene {
  const float *base, *values, *counts, *slope;
  const float *x, *log_odds, *mixture, *alpha, *inverse;
  int64_t size;
  float nan_guard;  // 0, or NaN where a table has one
};

// `vectors_per_step` vectors of cells of one gene, with the maximum and the sum of their softmax.
struct Cells {
  V x[vectors_per_step], log_odds[vectors_per_step], mixture[vectors_per_step];
  V top[vectors_per_step], sum[vectors_per_step];

  // Write the logits to `logits` (size, unit) and their maximum to `top`; call also(level, j, logit) for each logit.
  template <class Also>
  inline INLINE void weigh(const Gene& g, int64_t cell, float* logits, Also&& also) {
    V alpha[vectors_per_step], inverse[vectors_per_step];
    for (int j = 0; j < vectors_per_step; ++j) {
      x[j] = load(g.x + cell + j * VL);
      log_odds[j] = load(g.log_odds + cell + j * VL);
      mixture[j] = load(g.mixture + cell + j * VL);
      alpha[j] = load(g.alpha + cell + j * VL);
      inverse[j] = load(g.inverse + cell + j * VL);
      top[j] = set1(-std::numeric_limits<float>::infinity());
    }
    for (int64_t l = 0; l < g.size; ++l)
      for (int j = 0; j < vectors_per_step; ++j) {
        const V off = (x[j] - alpha[j] * g.values[l]) * inverse[j];
        const V logit = g.base[l] + mixture[j] * g.slope[l] + log_odds[j] * g.counts[l] - off * off;
        store(logits + l * unit + j * VL, logit);
        top[j] = max(top[j], logit);
        also(l, j, logit);
      }
  }

  // Replace the logits by exponentials and sum these; call also(level, j, exponential) for each of them.
  template <class Also>
  inline INLINE void exponentiate(const Gene& g, float* logits, Also&& also) {
    for (int j = 0; j < vectors_per_step; ++j) sum[j] = V{};
    for (int64_t l = 0; l < g.size; ++l)
      for (int j = 0; j < vectors_per_step; ++j) {
        // a floor far below rounding error: products with denormal numbers take 100 cycles
        const V e = exp2(max((load(logits + l * unit + j * VL) - top[j]) * log2e, set1(-80.f)));
        store(logits + l * unit + j * VL, e);
        sum[j] += e;
        also(l, j, e);
      }
  }

  // 0, or NaN if an input is not finite: the comparisons in max and exp2 would hide a NaN.
  V nan_guard(const Gene& g, int j) const { return 0 * (x[j] + log_odds[j] + mixture[j]) + g.nan_guard; }
};

static inline I is(const float* targets, int64_t l) {
  return std::bit_cast<I>(load(targets)) == static_cast<int32_t>(l);
}

// Call run(gene, strip, row of the gene in it) for each gene of a block, strip by strip, and after(strip) at the end of
// each strip. Scratch rows 0 to 4 hold x, log_odds, mixture, dnll or u, and target, transposed. For count_draw, row 9
// holds the logarithms of the cells' factors. 8 and otherwise 9 are free.
template <class Run, class After>
static inline void each_gene(const Counts& c, int64_t block, Scratch& scratch, Run&& run, After&& after) {
  float *x = scratch.row(0), *log_odds = scratch.row(1), *mixture = scratch.row(2), *dnll = scratch.row(3),
        *target = scratch.row(4), *alpha = scratch.row(5), *inverse = scratch.row(6), *slope = scratch.row(7),
        *log_scale = scratch.row(9);
  for (int64_t first = block; first < std::min(c.genes, block + widest); first += VL)
    for (int64_t cell = 0; cell < c.cells; cell += strip) {
      const Strip s{cell, std::min(strip, c.cells - cell), first, std::min<int64_t>(VL, c.genes - first)};
      s.read(c.x, x);
      s.read(c.log_odds, log_odds);
      s.read(c.mixture, mixture);
      if (c.dnll || c.u) s.read(c.dnll ? c.dnll : c.u, dnll);
      if (c.target) s.read([&](int64_t row) { return c.target + row * c.genes; }, target);
      for (int64_t i = 0; i < s.whole(); ++i) {
        alpha[i] = i < s.cells ? c.alpha[cell + i] : 0;
        inverse[i] = i < s.cells ? 0.70710678118654752f / c.sigma[cell + i] : 0;  // sqrt(1/2) / sigma
        if (c.log_scale) log_scale[i] = i < s.cells ? c.log_scale[cell + i] + 0 * (alpha[i] + inverse[i]) : 0;
      }
      for (int64_t i = 0; i < s.genes; ++i) {
        const int64_t at = (first + i) * c.levels, size = std::min<int64_t>(c.n_levels[first + i], c.levels);
        const float *log_base0 = c.log_base0 + at, *log_base1 = c.log_base1 + at, *values = c.values + at;
        float nan_guard = 0;
        for (int64_t l = 0; l < size; ++l) {
          slope[l] = log_base1[l] - log_base0[l];
          nan_guard += 0 * (slope[l] + values[l]);
        }
        const int64_t row = i * strip;
        run(Gene{log_base0, values, c.counts, slope, x + row, log_odds + row, mixture + row, alpha, inverse, size,
                 nan_guard},
            s, i);
      }
      after(s);
    }
}

static void count_mean(const Counts& c, int64_t block, Scratch& scratch) {
  float *logits = scratch.row(8), *out = scratch.row(0);  // the output overwrites x, which has been read
  each_gene(
      c, block, scratch,
      [&](const Gene& g, const Strip& s, int64_t i) {
        for (int64_t cell = 0; cell < s.whole(); cell += unit) {
          Cells cells;
          V mean[vectors_per_step] = {};
          cells.weigh(g, cell, logits, [](int64_t, int, V) INLINE {});
          cells.exponentiate(g, logits, [&](int64_t l, int j, V e) INLINE { mean[j] += e * g.values[l]; });
          for (int j = 0; j < vectors_per_step; ++j)
            store(out + i * strip + cell + j * VL, mean[j] / cells.sum[j] + cells.nan_guard(g, j));
        }
      },
      [&](const Strip& s) { s.write(out, c.out); });
}

static void count_nll(const Counts& c, int64_t block, Scratch& scratch) {
  float *logits = scratch.row(8), *out = scratch.row(0);
  const float* targets = scratch.row(4);
  each_gene(
      c, block, scratch,
      [&](const Gene& g, const Strip& s, int64_t i) {
        for (int64_t cell = 0; cell < s.whole(); cell += unit) {
          const float* target = targets + i * strip + cell;
          float* to = out + i * strip + cell;
          Cells cells;
          V chosen[vectors_per_step];
          for (V& v : chosen) v = set1(-std::numeric_limits<float>::infinity());
          cells.weigh(g, cell, logits, [&](int64_t l, int j, V logit) INLINE {
            chosen[j] = is(target + j * VL, l) ? logit : chosen[j];
          });
          cells.exponentiate(g, logits, [](int64_t, int, V) INLINE {});
          for (int j = 0; j < vectors_per_step; ++j) {
            float sums[VL];
            store(sums, cells.sum[j]);
#pragma omp simd
            for (int lane = 0; lane < VL; ++lane) sums[lane] = natural_log(sums[lane]);
            store(to + j * VL, load(sums) - (chosen[j] - cells.top[j]) + cells.nan_guard(g, j));
          }
        }
      },
      [&](const Strip& s) { s.write(out, c.out); });
}

static void count_nll_backward(const Counts& c, int64_t block, Scratch& scratch) {
  float *logits = scratch.row(8), *sums = scratch.row(9), *dlog_odds = scratch.row(1), *dmixture = scratch.row(2);
  each_gene(
      c, block, scratch,
      [&](const Gene& g, const Strip& s, int64_t i) {
        std::fill_n(sums, g.size * 2 * VL, 0.f);
        for (int64_t cell = 0; cell < s.whole(); cell += unit) {
          const float *target = scratch.row(4) + i * strip + cell, *dnll = scratch.row(3) + i * strip + cell;
          Cells cells;
          cells.weigh(g, cell, logits, [](int64_t, int, V) INLINE {});
          cells.exponentiate(g, logits, [](int64_t, int, V) INLINE {});
          V upstream[vectors_per_step], share[vectors_per_step];
          V along_count[vectors_per_step] = {}, along_slope[vectors_per_step] = {};
          for (int j = 0; j < vectors_per_step; ++j) {
            upstream[j] = load(dnll + j * VL);
            share[j] = upstream[j] / cells.sum[j] + cells.nan_guard(g, j);
          }
          for (int64_t l = 0; l < g.size; ++l) {
            V low = load(sums + 2 * l * VL), high = load(sums + (2 * l + 1) * VL);
            for (int j = 0; j < vectors_per_step; ++j) {
              V slope = load(logits + l * unit + j * VL) * share[j];
              slope = is(target + j * VL, l) ? slope - upstream[j] : slope;
              along_count[j] += slope * g.counts[l];
              along_slope[j] += slope * g.slope[l];
              const V part = slope * cells.mixture[j];
              low += slope - part;
              high += part;
            }
            store(sums + 2 * l * VL, low);
            store(sums + (2 * l + 1) * VL, high);
          }
          for (int j = 0; j < vectors_per_step; ++j) {
            store(dlog_odds + i * strip + cell + j * VL, along_count[j]);
            store(dmixture + i * strip + cell + j * VL, along_slope[j]);
          }
        }
        for (int64_t l = 0; l < g.size; ++l) {
          c.dlog_base0[(s.gene + i) * c.levels + l] += sum(load(sums + 2 * l * VL));
          c.dlog_base1[(s.gene + i) * c.levels + l] += sum(load(sums + (2 * l + 1) * VL));
        }
      },
      [&](const Strip& s) {
        s.write(dlog_odds, c.out);
        s.write(dmixture, c.dmixture);
      });
}

// ln(1 / (1 + exp(-x))). The relative error is small, because counts of millions multiply the result: for e below 1,
// ln(1 + e) = 2 artanh(e / (2 + e)). The first omitted term of the series of artanh is 4e-9 of it.
static inline V log_sigmoid(V x) {
  const V e = exp2(max(x, -x) * -log2e), s = e / (2 + e), q = s * s;
  V series = q * (1 / 15.f) + 1 / 13.f;
  series = series * q + 1 / 11.f;
  series = series * q + 1 / 9.f;
  series = series * q + 1 / 7.f;
  series = series * q + 1 / 5.f;
  series = series * q + 1 / 3.f;
  series = series * q + 1;
  return (x > 0 ? V{} : x) - 2 * s * series;
}

// Replace a gene's log ratios in scratch memory by natural parameters, with each cell's factor applied.
static inline void scale_odds(const Strip& s, Scratch& scratch, int64_t gene) {
  float *log_odds = scratch.row(1) + gene * strip, *log_scale = scratch.row(9);
  for (int64_t cell = 0; cell < s.whole(); cell += VL)
    store(log_odds + cell, log_sigmoid(load(log_odds + cell) + load(log_scale + cell)));
}

// Add the expected counts of a block of genes to the block's sums.
static void count_expect(const Counts& c, int64_t block, Scratch& scratch) {
  float* logits = scratch.row(8);
  float* expected = c.expected + block / widest * ((c.cells + strip - 1) / strip * strip);
  each_gene(
      c, block, scratch,
      [&](const Gene& g, const Strip& s, int64_t i) {
        scale_odds(s, scratch, i);
        for (int64_t cell = 0; cell < s.whole(); cell += unit) {
          Cells cells;
          V mean[vectors_per_step] = {};
          cells.weigh(g, cell, logits, [](int64_t, int, V) INLINE {});
          cells.exponentiate(g, logits, [&](int64_t l, int j, V e) INLINE { mean[j] += e * g.counts[l]; });
          for (int j = 0; j < vectors_per_step; ++j) {
            float* to = expected + s.cell + cell + j * VL;
            store(to, load(to) + mean[j] / cells.sum[j] + cells.nan_guard(g, j));
          }
        }
      },
      [](const Strip&) {});
}

// The counts at the positions `share`, 0 to 1, within bins; a NaN gives the lowest count.
static inline void place(const Counts& c, const float* share, const int32_t* level, float* to) {
  int32_t counts[VL];
  for (int lane = 0; lane < VL; ++lane) {
    const int32_t first = c.lowest[level[lane]], range = c.highest[level[lane]] - first;
    const float last = static_cast<float>(range), inside = share[lane] * (last + 1);
    counts[lane] = first + (inside >= last ? range : inside > 0 ? static_cast<int32_t>(inside) : 0);
  }
  std::memcpy(to, counts, sizeof counts);
}

// A level is drawn where the sum of exponentials reaches u times the total. Both sums have the same order, so u = 1
// reaches the total exactly.
static void count_draw(const Counts& c, int64_t block, Scratch& scratch) {
  float *logits = scratch.row(8), *out = scratch.row(0);
  const float* u = scratch.row(3);
  each_gene(
      c, block, scratch,
      [&](const Gene& g, const Strip& s, int64_t i) {
        scale_odds(s, scratch, i);
        for (int64_t cell = 0; cell < s.whole(); cell += unit) {
          Cells cells;
          cells.weigh(g, cell, logits, [](int64_t, int, V) INLINE {});
          cells.exponentiate(g, logits, [](int64_t, int, V) INLINE {});
          for (int j = 0; j < vectors_per_step; ++j) {
            const V reach = load(u + i * strip + cell + j * VL) * cells.sum[j] + cells.nan_guard(g, j);
            V mass = load(logits + j * VL), below = mass, until = below;
            I level = {};
            for (int64_t l = 1; l < g.size; ++l) {
              const V e = load(logits + l * unit + j * VL);
              const I further = below < reach;
              below += e;
              mass = further ? e : mass;
              until = further ? below : until;
              level = further ? I{} + static_cast<int32_t>(l) : level;
            }
            float share[VL];
            int32_t levels[VL];
            store(share, 1 - (until - reach) / mass);
            std::memcpy(levels, &level, sizeof level);
            place(c, share, levels, out + i * strip + cell + j * VL);
          }
        }
      },
      [&](const Strip& s) { s.write(out, c.out); });
}
