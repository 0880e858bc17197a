// normal, noising and sampler_step: counter-based noise, the forward process and the samplers' update.
//
// A sampler step reads x and the model's output and writes x': 12 bytes per value in fp32. Noise is never stored.

#include "common.h"

namespace wbdit {

// Philox's arguments for one draw: the key is the seed, the counter is (position / 4, sample, step).
struct Address {
  uint32_t key_low, key_high, step;

  Address(int64_t seed, int64_t step)
      : key_low(static_cast<uint32_t>(seed)),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)),
        step(static_cast<uint32_t>(step)) {}
};

struct Step {
  Rows x, out, previous, earlier, noise, to;
  const int64_t* samples;
  Address at;
  int64_t length;
  float a, b, c, d, e, clamp_min;
};

}  // namespace wbdit

#define KERNEL "noise_kernel.h"
#include "foreach_target.h"

namespace wbdit {
namespace {

// A tensor (B, ...) as B rows, one per sample.
Rows samples_of(const Tensor& t) {
  Rows r = rows(t);
  r.stride = t.size(0) ? t.numel() / t.size(0) : 0;
  return r;
}

Rows samples_of(const MaybeTensor& t) { return t ? samples_of(*t) : Rows{}; }

void normal(Tensor samples, Tensor out, int64_t seed, int64_t step) {
  const int64_t length = out.size(1);
  const Address at(seed, step);
  const int64_t* sample = static_cast<const int64_t*>(samples.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  each_row(out.size(0), length,
           [&](int64_t row, Scratch&) { ON_LEVEL(normal_row(at, sample[row], to + row * length, length)); });
}

void sampler_step(Tensor x, Tensor out, MaybeTensor previous, MaybeTensor earlier, MaybeTensor noise,
                  MaybeTensor samples, Tensor new_x, double a, double b, double c, double d, double e, double clamp_min,
                  int64_t seed, int64_t step) {
  const int64_t batch = x.size(0), length = batch ? x.numel() / batch : 0;
  const auto f = [](double v) { return static_cast<float>(v); };
  const Step s{samples_of(x),
               samples_of(out),
               samples_of(previous),
               samples_of(earlier),
               samples_of(noise),
               samples_of(new_x),
               samples ? static_cast<const int64_t*>(samples->const_data_ptr()) : nullptr,
               Address(seed, step),
               length,
               f(a),
               f(b),
               f(c),
               f(d),
               f(e),
               f(clamp_min)};
  each_row(batch, length, [&](int64_t row, Scratch& scratch) { ON_LEVEL(step_row(s, row, scratch)); });
}

void noising(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma, Tensor xt) {
  const int64_t batch = x0.size(0), length = batch ? x0.numel() / batch : 0;
  const Rows a = samples_of(x0), b = samples_of(noise), to = samples_of(xt);
  const float *signal = static_cast<const float*>(alpha.const_data_ptr()),
              *spread = static_cast<const float*>(sigma.const_data_ptr());
  each_row(batch, length, [&](int64_t row, Scratch& scratch) {
    ON_LEVEL(noising_row(a, b, to, signal[row], spread[row], row, length, scratch));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(wbdit_csrc, m) {
  m.def("noising(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma, Tensor(a!) xt) -> ()");
  m.def(
      "sampler_step(Tensor x, Tensor out, *, Tensor? previous=None, Tensor? earlier=None, Tensor? noise=None, "
      "Tensor? samples=None, Tensor(a!) new, float a, float b, float c, float d, float e, float clamp_min, int seed, "
      "int step) -> ()");
  m.def("normal(Tensor samples, Tensor(a!) out, int seed, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(wbdit_csrc, CPU, m) {
  m.impl("normal", TORCH_BOX(&normal));
  m.impl("sampler_step", TORCH_BOX(&sampler_step));
  m.impl("noising", TORCH_BOX(&noising));
}

}  // namespace wbdit
