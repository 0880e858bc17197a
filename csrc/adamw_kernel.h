// AdamW on a range of weights, and sums of squares. Included once for each instruction set.

#include "sweep.h"

static float sum_of_squares(const float* from, int64_t n) {
  Sum total;
  sweep(n, [&](int64_t i, int u, auto lane) INLINE {
    const auto value = at<decltype(lane)>(from + i);
    total.add(u, value * value);
  });
  return total.total();
}

// Loshchilov and Hutter 2019, Decoupled weight decay regularization, algorithm 2, then the moving average.
static void update(const Update& u, int64_t begin, int64_t end) {
  const float* __restrict gradient = u.gradient;
  float* __restrict weight = u.weight, * __restrict first = u.first, * __restrict second = u.second;
  float* __restrict average = u.average;
  const float clip = u.clip, keep = u.keep, rate = u.rate, root = 1 / u.root, eps = u.eps, toward = u.toward;
  const float into_first = 1 - u.beta1, beta2 = u.beta2, into_second = 1 - u.beta2;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float g = clip * gradient[i];
    first[i] += into_first * (g - first[i]);
    second[i] = beta2 * second[i] + into_second * g * g;
    weight[i] = keep * weight[i] - rate * first[i] / (std::sqrt(second[i]) * root + eps);
  }
  if (!average) return;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) average[i] += toward * (weight[i] - average[i]);
}
